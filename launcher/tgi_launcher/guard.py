"""Cleans up when the launcher dies without being able to: kills its process groups, removes its sockets and files.

A tiny process of its own session. It reads orders from its stdin, whose other end only the launcher holds; the end of
the pipe without a `done` before it means that the launcher was killed. The children also ask the kernel to die with the
launcher (`exec_child.py`); the guard adds what that cannot do: grandchildren, sockets, the file with the API key.
The upper half runs in the launcher, `main` in the guard (`python -I -S guard.py`), standard library only.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable


class Guard:
    """The launcher's end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch_group(self, pid: int) -> None:
        """Process group `pid` dies with the launcher."""
        self._send(f"group {pid}")

    def forget_group(self, pid: int) -> None:
        """Process group `pid` is gone; its number may be reused."""
        self._send(f"gone {pid}")

    def watch_path(self, path: str) -> None:
        """`path`, a socket, file or directory, is removed with the launcher."""
        self._send(f"path {path}")

    def done(self) -> None:
        """The launcher has cleaned up itself."""
        self._send("done")
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass  # the guard was killed; nothing is left for it to do
        self._process.wait()

    def _send(self, order: str) -> None:
        if self._process.stdin is None:
            return
        try:
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # Somebody killed the guard. The children still die with the launcher; stale sockets go at the next start.
            pass


def remove(path: str) -> None:
    """Removes a file, socket or directory tree, if it is there."""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            import shutil

            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
    except OSError:
        return


def kill_group(pid: int) -> None:
    """SIGKILL to every process of group `pid`, if there are any."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def follow(orders: Iterable[str]) -> None:
    """Obeys until `done`, or cleans up at the end of `orders`."""
    groups: list[int] = []
    paths: list[str] = []
    for order in orders:
        verb, _, rest = order.rstrip("\n").partition(" ")
        if verb == "done":
            return
        if verb == "group":
            groups.append(int(rest))
        elif verb == "gone":
            groups.remove(int(rest))
        elif verb == "path":
            paths.append(rest)
    for pid in groups:
        kill_group(pid)
    for path in paths:
        remove(path)


def main() -> None:
    """The guard itself: no signal that ends the launcher's session may end it first."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    os.chdir("/")
    follow(sys.stdin)


if __name__ == "__main__":
    main()
