"""Fixtures: a tiny model directory, and a real launcher process with fake children whose output can be waited for."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def write_model(directory: Path) -> Path:
    """A llama of 2,048 parameters, as far as config.json and a safetensors header go."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    write_safetensors(directory / "model.safetensors")
    return directory


def write_safetensors(path: Path) -> None:
    """One float32 tensor of 2,048 zeros."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, 8192]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8192))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


class Launched:
    """A launcher process with fake children."""

    def __init__(self, folder: Path, argv: list[str], environ: dict[str, str]) -> None:
        self.folder = folder
        self.prefix = str(folder / "shard")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "run_launcher.py"), "--shard-uds-path", self.prefix, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FAKE_DIR": str(folder), "HOSTNAME": "0.0.0.0", "TMPDIR": str(folder), **environ},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
        )
        self._changed = threading.Condition()
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Iterator[str], lines: list[str]) -> None:
        for line in stream:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, count: int = 1, timeout_s: float = 90.0) -> str:
        """The `count`-th line that matches; fails when it does not come."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = [line for line in self.lines if re.search(pattern, line)]
                if len(found) >= count:
                    return found[count - 1]
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self._reading()):
                    raise AssertionError(f"no {pattern!r} in:\n{self.output}\n{self.errors}")
                self._changed.wait(min(left, 0.2))

    def _reading(self) -> bool:
        return any(reader.is_alive() for reader in self._readers)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ends(self, timeout_s: float = 90.0) -> int:
        """Exit status, after everything it wrote was read."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end:\n{self.output}") from None
        for reader in self._readers:
            reader.join(5)
        return status

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.ends()

    def pid(self, name: str, start: int = 1) -> int:
        """Pid of the `start`-th start of a fake shard ("shard-0"), or of the router."""
        files = {"router": "router.pid", "grandchild": "grandchild"}
        path = self.folder / files.get(name, f"{name}.start-{start}")
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if path.exists() and path.read_text():
                return int(path.read_text())
            time.sleep(0.01)
        raise AssertionError(f"{name} did not start:\n{self.output}")

    def all_pids(self) -> list[int]:
        files = [*self.folder.glob("shard-*.start-*"), *self.folder.glob("router.pid"), *self.folder.glob("grandchild")]
        return [int(path.read_text()) for path in files]

    def leftovers(self) -> list[str]:
        """Sockets, locks and private directories that are still there."""
        return sorted(str(p) for p in self.folder.iterdir() if p.is_socket() or p.name.startswith(("shard.", "text-")))


def is_alive(pid: int) -> bool:
    """Whether a process with this number runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def launch(tmp_path: Path, model_dir: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers; whatever is left of them at the end of the test is killed."""
    started: list[Launched] = []

    def start(*argv: str, shard: str = "", router: str = "", model: bool = True, **environ: str) -> Launched:
        folder = tmp_path / f"run-{len(started)}"
        folder.mkdir()
        arguments = ["--port", str(free_port()), *(["--model-id", str(model_dir)] if model else []), *argv]
        launched = Launched(folder, arguments, {"FAKE_SHARD": shard, "FAKE_ROUTER": router, **environ})
        started.append(launched)
        return launched

    yield start
    for launched in started:
        if launched.process.poll() is None:
            launched.process.kill()
            launched.ends()
    pids = [pid for launched in started for pid in launched.all_pids()]
    assert eventually(lambda: not any(map(is_alive, pids))), "a child outlived its launcher"
