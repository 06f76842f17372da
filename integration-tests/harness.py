"""Starts the launcher as a user would and speaks HTTP to it. Imports none of our packages.

`start()` runs `text-generation-launcher` with its own port and socket path, and returns a `Server`. A Server knows its
processes by the socket path in their command lines, so that a test can kill one and prove that none is left.
Fixtures: conftest.py.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Json = dict[str, Any]
A = TypeVar("A")
T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_S = 120.0  # the machine may be busy; a start takes a few seconds
MODEL_DIR = ROOT / "demo" / "tgi_demo" / "model"

# What the tests run in may carry TGI's variables (a container sets PORT and HOSTNAME); none may reach the launcher.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")


def environment(**extra: str) -> dict[str, str]:
    """The launcher's environment: little of ours, one compute thread, and what coverage needs to follow."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith("COVERAGE")}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], T], *, within_s: float, what: str) -> T:
    """Polls until `condition` returns something true, and returns it. Fails by name when it does not."""
    deadline = time.monotonic() + within_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]  # lower-case names
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Stream:
    """A response read while it comes. Closing it early is a client that leaves."""

    def __init__(self, port: int, path: str, body: Json, timeout_s: float = 120.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        self._connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = {k.lower(): v for k, v in self._response.getheaders()}

    def __iter__(self) -> Iterator[bytes]:
        """The data of each event; comments are skipped."""
        lines = []
        for line in self._response:
            if line.startswith(b"data: "):
                lines.append(line[6:].rstrip(b"\n"))
            elif line == b"\n" and lines:
                yield b"\n".join(lines)
                lines.clear()
        self.close()

    def events(self) -> Iterator[Json]:
        """The parsed events, without `[DONE]`."""
        return (json.loads(data) for data in self if data != b"[DONE]")

    def close(self) -> None:
        # shutdown() because the response object keeps the socket open until it is read to its end
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._response.close()
        self._connection.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Process:
    pid: int
    command: str

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def is_alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False


def processes_with(text: str) -> list[Process]:
    """Running processes whose command line contains `text`, oldest first."""
    found = []
    for entry in sorted((e for e in Path("/proc").iterdir() if e.name.isdigit()), key=lambda e: int(e.name)):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        process = Process(int(entry.name), command)
        if text in command and process.is_alive() and process.pid != os.getpid():
            found.append(process)
    return found


class Server:
    """One launcher and everything it started."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
        self.process = process
        self.port = port
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self.uds_path = str(folder / "s")

    # HTTP

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = 120.0
    ) -> Response:
        """body: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Response(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Response:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> Response:
        return self.request("POST", path, body)

    def stream(self, path: str, body: Json) -> Stream:
        return Stream(self.port, path, body)

    def generate(self, inputs: str, **parameters: Any) -> Json:
        """`/generate` that must succeed: the parsed answer."""
        response = self.post("/generate", {"inputs": inputs, "parameters": parameters})
        assert response.status == 200, response.text
        answer: Json = response.json
        return answer

    def generate_stream(self, inputs: str, **parameters: Any) -> list[Json]:
        """`/generate_stream` to its end: the parsed events."""
        with self.stream("/generate_stream", {"inputs": inputs, "parameters": parameters}) as stream:
            assert stream.status == 200
            return list(stream.events())

    def health(self) -> int | None:
        """Status of /health; None when nobody answers."""
        try:
            return self.request("GET", "/health", timeout_s=5.0).status
        except (OSError, http.client.HTTPException):
            return None

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of `name` that carry `labels`."""
        total, seen = 0.0, False
        for line in self.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{k}="{v}"' in (match[1] or "") for k, v in labels.items()):
                total, seen = total + float(match[2]), True
        assert seen, f"/metrics has no {name} {labels}"
        return total

    # Processes

    def processes(self) -> list[Process]:
        """Everything that belongs to this server, the launcher included."""
        return processes_with(self.uds_path)

    def shards(self) -> list[Process]:
        return [p for p in self.processes() if "text-generation-server" in p.command and p.pid != self.process.pid]

    def router(self) -> Process:
        (router,) = [p for p in self.processes() if "text-generation-router" in p.command]
        return router

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait_ready(self, within_s: float = START_S) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the launcher exited with {self.process.returncode}:\n{self.log()}")
            return self.health() == 200

        try:
            wait_until(ready, within_s=within_s, what="/health answers 200")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-6000:]}") from None

    def wait_exit(self, within_s: float) -> int:
        """The launcher's exit status."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher still runs after {within_s} s:\n{self.log()[-6000:]}") from None

    def sockets(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if p.is_socket())

    def leftovers(self) -> list[str]:
        """What a finished server must not leave behind."""
        return [f"process {p.pid}: {p.command[:100]}" for p in self.processes()] + self.sockets()

    def stop(self) -> None:
        """Drains it, and fails when it does not end cleanly."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.wait_exit(60)
        assert status == 0, f"exit status {status}\n{self.log()[-6000:]}"
        assert self.leftovers() == []

    def destroy(self) -> None:
        """Ends whatever is left, quietly: for the end of a test that went wrong."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                process.signal(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def start(
    *flags: str,
    env: dict[str, str] | None = None,
    port: int | None = None,
    wait: bool = True,
    prefix: tuple[str, ...] = (),
) -> Server:
    """Starts a launcher on the embedded demo model (unless `flags` name another). prefix: a command to run it under."""
    port = port or free_port()
    folder = Path(tempfile.mkdtemp(prefix="tgi-it-"))  # short: a Unix socket's path has at most 107 bytes
    command = [*prefix, str(BIN / "text-generation-launcher"), "--port", str(port), "--hostname", "127.0.0.1"]
    command += ["--shard-uds-path", str(folder / "s"), "--master-port", str(free_port()), *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    server = Server(process, port, folder)
    if wait:
        try:
            server.wait_ready()
        except BaseException:
            server.destroy()
            raise
    return server


def run_launcher(
    *flags: str, env: dict[str, str] | None = None, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """A launcher that is expected to end by itself, with stdout and stderr apart."""
    return subprocess.run(
        [str(BIN / "text-generation-launcher"), *flags],
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def together(call: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """`call` of every item, all at once, each in a thread; the results in order."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(call, items))
