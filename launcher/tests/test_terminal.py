"""The launcher in a real terminal that goes away while it serves."""

import os
import pty
import signal
import socket
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

# The leader of the terminal's session, which alone gets the kernel's SIGHUP; like make it stays and passes nothing on.
LEADER = """
import signal, subprocess, sys
signal.signal(signal.SIGHUP, lambda *_: None)
arguments = sys.argv[2:]
if "background" in arguments:
    arguments.remove("background")
    child = subprocess.Popen(arguments, process_group=0)
else:
    child = subprocess.Popen(arguments)
status = child.wait()
with open(sys.argv[1], "w") as file:
    file.write(str(status))
"""


def start(folder: Path, model_dir: Path, *options: str) -> tuple[int, int]:
    """The launcher with fake children under such a leader: the leader's pid and the terminal's other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    launcher = [sys.executable, str(HERE / "run_launcher.py"), "--shard-uds-path", str(folder / "shard")]
    launcher += ["--model-id", str(model_dir), "--port", port]
    environ = {**os.environ, "FAKE_DIR": str(folder), "HOSTNAME": "127.0.0.1", "TMPDIR": str(folder)}
    leader, terminal = pty.fork()
    if leader == 0:
        argv = [sys.executable, "-c", LEADER, str(folder / "status"), *options, *launcher]
        os.execve(sys.executable, argv, environ)
    return leader, terminal


def read_until(terminal: int, text: bytes, timeout_s: float = 90.0) -> bytes:
    deadline, seen = time.monotonic() + timeout_s, b""
    while text not in seen:
        assert time.monotonic() < deadline, seen.decode(errors="replace")
        seen += os.read(terminal, 65536)
    return seen


def wait_for_status(folder: Path, timeout_s: float = 30.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (folder / "status").exists() and (status := (folder / "status").read_text()):
            return status
        time.sleep(0.02)
    return "still running"


def test_a_terminal_that_is_closed_ends_it_although_nobody_passes_the_hangup_on(
    tmp_path: Path, model_dir: Path
) -> None:
    leader, terminal = start(tmp_path, model_dir)
    read_until(terminal, b"Ctrl-C to stop")
    os.close(terminal)
    status = wait_for_status(tmp_path)
    os.waitpid(leader, 0)
    assert status == "0"
    assert [path.name for path in tmp_path.iterdir() if path.is_socket()] == []


def test_in_the_background_it_outlives_its_terminal(tmp_path: Path, model_dir: Path) -> None:
    leader, terminal = start(tmp_path, model_dir, "background")
    read_until(terminal, b"Serving at")
    os.close(terminal)
    router = int((tmp_path / "router.pid").read_text())
    time.sleep(0.5)  # that nothing happens can only be waited for
    os.kill(router, 0)
    launcher = int(Path(f"/proc/{router}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGTERM)
    assert wait_for_status(tmp_path) == "0"
    os.waitpid(leader, 0)
