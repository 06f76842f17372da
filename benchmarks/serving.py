"""Runs the server to be measured: the launcher on the embedded demo model, on a free port, until the block ends.

Called by bench.py and startup.py. Says when things happened; what they mean is the caller's business.
"""

import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
COMMAND = Path(sys.executable).with_name("text-generation-launcher")


@dataclass(frozen=True, slots=True)
class Serving:
    """A launcher that runs. started_s: time.time() just before it was executed."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    started_s: float
    healthy_s: float  # time.time() when /health answered 200

    def records(self) -> list[Json]:
        """The log so far; needs `--json-output`."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _status(port: int) -> int | None:
    """Status of /health, None while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@contextmanager
def serving(*flags: str, timeout_s: float = 300.0) -> Iterator[Serving]:
    """Starts the launcher with `flags`, yields when it is healthy, and drains it."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tgi-bench-") as name:
        log = Path(name) / "log"
        command = [str(COMMAND), "--port", str(port), "--hostname", "127.0.0.1", "--master-port", str(free_port())]
        command += ["--shard-uds-path", f"{name}/s", *flags]
        with log.open("wb") as out:
            started_s = time.time()
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while _status(port) != 200:
                if process.poll() is not None or time.time() - started_s > timeout_s:
                    raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.005)
            yield Serving(process, f"http://127.0.0.1:{port}", log, started_s, time.time())
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
