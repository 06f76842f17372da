"""Downloads from a Hub on loopback: resume, hashes, retries, gated and missing repositories, full disks, stalls."""

import argparse
import errno
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tgi_launcher import download, hub
from tgi_launcher.errors import DownloadError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_good"
DOWNLOAD = (sys.executable, "-m", "tgi_launcher.download")


@dataclass
class FakeHub:
    """One repository, `org/tiny`, and the ways its server may misbehave."""

    files: dict[str, bytes]
    url: str = ""
    gated: bool = False
    private: bool = False
    fail_first: int = 0  # answers 503 so many times
    cut_after: int | None = None  # closes the connection in the middle of the first large answer
    stall_after: int | None = None  # sends no more after so many bytes, until `released`
    corrupt: bool = False
    etag_metadata: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, content in sorted(self.files.items()):
            entry: dict[str, Any] = {"rfilename": name}
            if self.etag_metadata:
                sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry |= {"size": len(content), "blobId": sha1}
            if name.endswith((".safetensors", ".bin")) and self.etag_metadata:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 100}
            siblings.append(entry)
        return {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}

    def asked_for(self, name: str) -> list[str | None]:
        """The Range headers of the requests for a file."""
        return [ranges for path, ranges in self.requests if path.endswith(f"/{name}")]


def handler(fake: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            return

        def refuse(self, status: int, code: str | None = None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            with fake.lock:
                fake.requests.append((self.path, self.headers.get("Range")))
                fail = fake.fail_first > 0
                fake.fail_first -= 1
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if fail:
                self.refuse(503)
            elif not self.path.startswith(("/api/models/org/tiny", "/org/tiny/")):
                self.refuse(401 if not authorized else 404, "RepoNotFound")
            elif fake.private and not authorized:
                self.refuse(401, "RepoNotFound")
            elif self.path.startswith("/api/") and not re.search(rf"revision/(main|v1|{COMMIT})", self.path):
                self.refuse(404, "RevisionNotFound")
            elif self.path.startswith("/api/"):
                self.answer(json.dumps(fake.info()).encode(), "api")
            elif fake.gated and not authorized:
                self.refuse(403, "GatedRepo")
            else:
                name = self.path.partition(f"/resolve/{COMMIT}/")[2].partition("?")[0]
                self.answer(fake.files[name], name)

        def answer(self, content: bytes, name: str) -> None:
            start = 0
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start = int(match[1])
            body = content[start:]
            if fake.corrupt and name != "api":
                body = body[:-1] + b"!"
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "HEAD":
                return
            if name != "api" and fake.cut_after is not None and len(body) > fake.cut_after:
                self.wfile.write(body[: fake.cut_after])
                fake.cut_after = None
                self.close_connection = True
                return
            if name != "api" and fake.stall_after is not None and len(body) > fake.stall_after:
                self.wfile.write(body[: fake.stall_after])
                self.wfile.flush()
                fake.released.wait(60)
                self.close_connection = True
                return
            self.wfile.write(body)

    return Handler


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": bytes(range(256)) * 12_000,
    "pytorch_model.bin": b"the same again, as pickles",
    "README.md": b"words",
    "code.py": b"print('hello')",
    "training_args.bin": b"no",
    "onnx/model.onnx": b"no",
}


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    state = FakeHub(dict(FILES))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    state.released.set()
    server.shutdown()
    server.server_close()


def run(fake: FakeHub, cache: Path, *argv: str, repo: str = "org/tiny", **environ: str) -> tuple[int, list[str]]:
    """(status, messages) of a download process."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tgi_launcher.download",
            repo,
            "--cache-dir",
            str(cache),
            "--retry-delay",
            "0.01",
            *argv,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(fake, **environ),
    )
    return done.returncode, [json.loads(line)["message"] for line in done.stdout.splitlines()]


def environment(fake: FakeHub, **environ: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **clean,
        "HF_ENDPOINT": fake.url,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN_PATH": "/nowhere",
        **environ,
    }


def snapshot(cache: Path) -> Path:
    return cache / "models--org--tiny" / "snapshots" / COMMIT


def test_a_model_arrives_in_the_hubs_own_layout(fake: FakeHub, tmp_path: Path) -> None:
    status, messages = run(fake, tmp_path)
    assert status == 0, messages
    names = {path.name for path in snapshot(tmp_path).iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    weights = snapshot(tmp_path) / "model.safetensors"
    assert weights.read_bytes() == FILES["model.safetensors"]
    assert weights.is_symlink()
    assert weights.resolve().name == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert (tmp_path / "models--org--tiny" / "refs" / "main").read_text() == COMMIT
    assert hub.find_cached(tmp_path, "org/tiny", "main") == hub.Found(snapshot(tmp_path), COMMIT, ())
    assert any(re.match(r"Download: .* of .*, .* MiB/s", message) for message in messages)


def test_huggingface_hub_itself_finds_what_was_fetched(fake: FakeHub, tmp_path: Path) -> None:
    run(fake, tmp_path)
    code = (
        "import sys; from huggingface_hub import hf_hub_download; "
        "print(open(hf_hub_download('org/tiny', 'config.json', cache_dir=sys.argv[1])).read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(fake, HF_HUB_OFFLINE="1"),
    )
    assert done.stdout.strip() == '{"model_type": "llama"}', done.stderr


def test_remote_code_and_weights_are_fetched_as_asked(fake: FakeHub, tmp_path: Path) -> None:
    assert run(fake, tmp_path, "--remote-code", "--no-weights")[0] == 0
    names = {path.name for path in snapshot(tmp_path).iterdir()}
    assert "code.py" in names
    assert "model.safetensors" not in names


def test_only_without_safetensors_are_pytorch_files_fetched(fake: FakeHub, tmp_path: Path) -> None:
    del fake.files["model.safetensors"]
    assert run(fake, tmp_path)[0] == 0
    names = {path.name for path in snapshot(tmp_path).iterdir()}
    assert "pytorch_model.bin" in names
    assert "training_args.bin" not in names
    assert hub.needs_conversion(snapshot(tmp_path))


def test_a_download_goes_on_where_a_killed_one_stopped(fake: FakeHub, tmp_path: Path) -> None:
    fake.stall_after = 2_500_000
    process = subprocess.Popen(
        [*DOWNLOAD, "org/tiny", "--cache-dir", str(tmp_path)],
        env=environment(fake),
        stdout=subprocess.DEVNULL,
    )
    blob = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    partial = tmp_path / "models--org--tiny" / "blobs" / f"{blob}.incomplete"
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size >= 2**21) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = partial.stat().st_size
    assert have >= 2**21
    fake.stall_after = None
    status, messages = run(fake, tmp_path)
    assert status == 0, messages
    assert fake.asked_for("model.safetensors")[-1] == f"bytes={have}-"
    assert any(message.startswith("Resuming: ") for message in messages)
    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_connection_that_breaks_is_resumed_in_the_same_run(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut_after = 1_500_000
    status, messages = run(fake, tmp_path)
    assert status == 0, messages
    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert len(fake.asked_for("model.safetensors")) == 2


def test_server_errors_are_tried_again(fake: FakeHub, tmp_path: Path) -> None:
    fake.fail_first = 3
    status, messages = run(fake, tmp_path)
    assert status == 0, messages


def test_a_server_that_stays_broken_is_named(fake: FakeHub, tmp_path: Path) -> None:
    fake.fail_first = 10_000
    status, messages = run(fake, tmp_path)
    assert status == 1
    assert "503" in messages[-1]


def test_a_file_that_arrives_damaged_is_thrown_away(fake: FakeHub, tmp_path: Path) -> None:
    fake.corrupt = True
    status, messages = run(fake, tmp_path)
    assert status == 1
    assert "its hash is not the one the Hub states" in messages[-1]
    assert not (snapshot(tmp_path) / "model.safetensors").exists()
    assert hub.find_cached(tmp_path, "org/tiny", "main").directory is None


def test_a_gated_model_says_what_to_accept_and_what_to_set(fake: FakeHub, tmp_path: Path) -> None:
    fake.gated = True
    status, messages = run(fake, tmp_path)
    assert status == 1
    assert messages[-1] == (
        f"`org/tiny` is gated: accept its licence at {fake.url}/org/tiny, then set HF_TOKEN to a token of that account "
        "(no token is set)"
    )
    assert "the token that is set has no access" in run(fake, tmp_path, HF_TOKEN="hf_other")[1][-1]
    assert run(fake, tmp_path, HF_TOKEN=TOKEN)[0] == 0


def test_a_private_or_unknown_model_says_what_to_check(fake: FakeHub, tmp_path: Path) -> None:
    fake.private = True
    assert "is not on the Hub, or it is private" in run(fake, tmp_path)[1][-1]
    assert run(fake, tmp_path, HF_TOKEN=TOKEN)[0] == 0
    assert "`org/other` is not on the Hub" in run(fake, tmp_path, repo="org/other")[1][-1]


def test_an_unknown_revision_is_named(fake: FakeHub, tmp_path: Path) -> None:
    status, messages = run(fake, tmp_path, "--revision", "v9")
    assert status == 1
    assert messages[-1].startswith("`org/tiny` has no revision 'v9'")


def test_a_revision_gets_a_ref_of_its_own(fake: FakeHub, tmp_path: Path) -> None:
    assert run(fake, tmp_path, "--revision", "v1")[0] == 0
    assert hub.find_cached(tmp_path, "org/tiny", "v1").missing == ()
    assert run(fake, tmp_path, "--revision", COMMIT)[0] == 0
    assert hub.find_cached(tmp_path, "org/tiny", COMMIT).missing == ()


def test_nobody_listening_is_one_sentence(fake: FakeHub, tmp_path: Path) -> None:
    status, messages = run(fake, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 1
    assert messages[-1].startswith("`org/tiny` could not be downloaded from http://127.0.0.1:9/org/tiny")


def test_without_hashes_huggingface_hub_downloads(fake: FakeHub, tmp_path: Path) -> None:
    fake.etag_metadata = False
    status, messages = run(fake, tmp_path)
    assert status == 0, messages
    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def arguments(cache: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model_id="org/tiny", revision="main", cache_dir=cache, no_weights=False, remote_code=False, retry_delay=0.01
    )


def make_job(folder: Path) -> download.Job:
    job = download.Job("org/tiny", "main", COMMIT, folder / "models--org--tiny", 0.01)
    job.snapshot.mkdir(parents=True)
    (job.folder / "blobs").mkdir()
    return job


def test_a_full_disk_is_noticed_before_the_download_with_both_figures(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    files = [download.RemoteFile("model.safetensors", 10 * 2**30, "a" * 64)]
    with pytest.raises(DownloadError) as info:
        download.check_space(job, files, lambda _: 2**30)
    assert "needs 10.0 GiB of disk" in info.value.sentence
    assert "only 1.0 GiB are free" in info.value.sentence
    job.partial_path(files[0]).write_bytes(b"")
    os.truncate(job.partial_path(files[0]), 10 * 2**30 - 100)
    download.check_space(job, files, lambda _: 2**30)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full while `org/tiny` is downloaded"),
        (
            OSError(errno.EACCES, "Permission denied"),
            "`org/tiny` could not be downloaded: [Errno 13] Permission denied",
        ),
        (ValueError("odd"), "`org/tiny` could not be downloaded from"),
    ],
)
def test_what_the_system_raises_becomes_a_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(DownloadError) as info, download.explained("org/tiny", "main"):
        raise error
    assert info.value.sentence.startswith(sentence)


def test_only_trouble_that_may_pass_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def action() -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        download.retried(action, 0.001)
    assert len(tries) == 1

    def flaky() -> int:
        tries.append(1)
        if len(tries) < 4:
            raise ConnectionResetError("reset")
        return 7

    with caplog.at_level(logging.WARNING):
        assert download.retried(flaky, 0.001) == 7
    assert "trying again (2 of 4)" in caplog.text


def test_files_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    file = download.RemoteFile("config.json", 2, "b" * 40)
    job.blob_path(file).write_text("{}")

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    download._link(job, file)
    assert (job.snapshot / "config.json").read_text() == "{}"


def test_durations_are_for_people() -> None:
    assert [download._duration(s) for s in (5, 65, 7300)] == ["5 s", "1 min 5 s", "2 h 1 min"]


# -- through the launcher


def test_the_launcher_downloads_shows_progress_and_then_starts_without_the_hub(
    fake: FakeHub, tmp_path: Path, model_dir: Path, launch: Callable[..., Any]
) -> None:
    fake.files |= {path.name: path.read_bytes() for path in model_dir.iterdir()}
    environ = {"HF_ENDPOINT": fake.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": "/nowhere"}
    first = launch("--model-id", "org/tiny", **environ)
    first.wait_for("download: Download: .* MiB/s")
    first.wait_for("Try: curl")
    assert f"--model-sha {COMMIT}" in first.output
    assert first.stop() == 0
    count = len(fake.requests)
    again = launch("--model-id", "org/tiny", HF_HUB_OFFLINE="1", **environ)
    again.wait_for("Files are already present on the host. Skipping download.")
    again.wait_for("Try: curl")
    assert again.stop() == 0
    assert len(fake.requests) == count


def test_offline_without_the_files_names_what_is_missing(tmp_path: Path, launch: Callable[..., Any]) -> None:
    run = launch("--model-id", "org/tiny", HF_HUB_CACHE=str(tmp_path / "cache"), TRANSFORMERS_OFFLINE="1")
    assert run.ends() == 1
    assert run.errors[-1].startswith('Error: DownloadError("offline mode is on')
    assert "`config.json`, `tokenizer.json`, `*.safetensors` of `org/tiny`" in run.errors[-1]


def test_a_refused_download_ends_the_launch_with_its_sentence(
    fake: FakeHub, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    fake.gated = True
    run = launch("--model-id", "org/tiny", HF_ENDPOINT=fake.url, HF_HUB_CACHE=str(tmp_path), HF_TOKEN_PATH="/nowhere")
    assert run.ends() == 1
    assert run.errors[-1].startswith('Error: DownloadError("`org/tiny` is gated')


def test_a_signal_during_the_download_is_status_0(fake: FakeHub, tmp_path: Path, launch: Callable[..., Any]) -> None:
    fake.stall_after = 1000
    run = launch("--model-id", "org/tiny", HF_ENDPOINT=fake.url, HF_HUB_CACHE=str(tmp_path), HF_TOKEN_PATH="/nowhere")
    run.wait_for("Starting download")
    assert run.stop() == 0


def test_a_stalled_download_is_killed_and_resumed(
    fake: FakeHub, tmp_path: Path, model_dir: Path, launch: Callable[..., Any]
) -> None:
    fake.files |= {path.name: path.read_bytes() for path in model_dir.iterdir() if path.suffix == ".json"}
    fake.stall_after = 2_500_000
    run = launch(
        "--model-id",
        "org/tiny",
        "--stall-timeout",
        "8",
        HF_ENDPOINT=fake.url,
        HF_HUB_CACHE=str(tmp_path),
        HF_TOKEN_PATH="/nowhere",
    )
    run.wait_for("Download: 2 MiB of 3 MiB")
    run.wait_for("download made no progress for 8.0 s")
    fake.stall_after = None
    run.wait_for("download: Resuming: ")
    run.wait_for("download: Downloaded org/tiny")
    run.ends()  # these weights are no safetensors
    assert "is no safetensors file" in run.errors[-1]
