"""Fetches a model from the Hub into its cache: `python -m tgi_launcher.download MODEL_ID`. A process of its own.

huggingface_hub answers what a repository holds and speaks HTTP; the files are written here, because they must resume
after this process was killed, be checked against the hashes the Hub states, and report progress. Cache layout and file
names are the Hub's own, so that every other program finds the files. Ends with status 0, or with 1 and one sentence.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tgi_proto import logs

from .errors import DownloadError
from .hub import repo_folder, wanted_files
from .memory_fit import gib

_WORKERS = 4
_TRIES = 5
_PROGRESS_S = 2.0
_HTTP_LIMIT = 50 * 10**9  # the Hub serves larger files through its own protocol only
_CHUNK_BYTES = 2**20
_SPARE_BYTES = 64 * 2**20

_log = logging.getLogger("tgi_launcher")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the repository. `blob`: its name in the cache, a sha256 or git's sha1; None unknown."""

    name: str
    size: int | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """One download."""

    repo: str
    revision: str
    commit: str
    folder: Path  # models--org--name
    retry_delay_s: float

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit

    def blob_path(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / str(file.blob)

    def partial_path(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / f"{file.blob}.incomplete"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tgi_launcher.download", description=__doc__)
    parser.add_argument("model_id")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--no-weights", action="store_true", help="only configuration and tokenizer")
    parser.add_argument("--remote-code", action="store_true", help="the repository's *.py too")
    parser.add_argument("--retry-delay", type=float, default=1.0, help="seconds before the first retry")
    args = parser.parse_args(argv)
    logs.setup("tgi_launcher", "WARNING").setLevel("INFO")  # HTTP libraries report every request at INFO
    try:
        download(args)
    except DownloadError as error:
        _log.error("%s", error.sentence)
        sys.exit(1)


def download(args: argparse.Namespace, disk_free: Callable[[Path], int] | None = None) -> Path:
    """The snapshot's directory. disk_free: free bytes where a path lies (tests). Raises DownloadError."""
    from huggingface_hub import HfApi, constants

    # What is read but not written yet is lost when the process is killed, and not seen as progress: write often.
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    started = time.monotonic()
    with explained(args.model_id, args.revision):
        info = retried(
            lambda: HfApi().model_info(args.model_id, revision=args.revision, files_metadata=True), args.retry_delay
        )
    files = {file.rfilename: _remote_file(file) for file in info.siblings or []}
    names = wanted_files(files, weights=not args.no_weights, remote_code=args.remote_code)
    folder = repo_folder(args.cache_dir, args.model_id)
    job = Job(args.model_id, args.revision, str(info.sha), folder, args.retry_delay)
    wanted = [files[name] for name in names]
    missing = [file for file in wanted if not (job.snapshot / file.name).is_file()]
    with explained(args.model_id, args.revision):
        _prepare(job)
        check_space(job, missing, disk_free or (lambda path: shutil.disk_usage(path).free))
        fetch_all(job, wanted, missing)
        _write_ref(job)
    seconds = time.monotonic() - started
    _log.info("Downloaded %s (%d files) in %.1f s", args.model_id, len(missing), seconds)
    return job.snapshot


def _remote_file(sibling: Any) -> RemoteFile:
    blob = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
    known = isinstance(blob, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob)  # it becomes a file's name
    return RemoteFile(sibling.rfilename, sibling.size, blob if known else None)


def _prepare(job: Job) -> None:
    for path in (job.snapshot, job.folder / "blobs", job.folder / "refs"):
        path.mkdir(parents=True, exist_ok=True)


def _write_ref(job: Job) -> None:
    """Last of all, so that a revision is known only when its files are there."""
    if job.revision != job.commit:
        ref = job.folder / "refs" / job.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f"{ref.name}.{os.getpid()}")
        temporary.write_text(job.commit)
        temporary.replace(ref)


def check_space(job: Job, missing: Sequence[RemoteFile], disk_free: Callable[[Path], int]) -> None:
    """Raises DownloadError when the files that are missing would not fit on the disk."""
    need = sum(file.size or 0 for file in missing) - sum(_size(job.partial_path(file)) for file in missing if file.blob)
    free = disk_free(job.folder)
    if need + _SPARE_BYTES > free:
        raise DownloadError(
            f"`{job.repo}` needs {gib(need)} of disk in {job.folder.parent}, but only {gib(free)} are free: make room, "
            "or choose another place with --huggingface-hub-cache or HF_HOME"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def fetch_all(job: Job, wanted: Sequence[RemoteFile], missing: Sequence[RemoteFile]) -> None:
    """Fetches `missing` of `wanted`, a few at a time, while progress is reported."""
    total = sum(file.size or 0 for file in wanted)
    present = total - sum(file.size or 0 for file in missing)

    def done() -> int:
        return present + sum(
            max(_size(job.blob_path(file)), _size(job.partial_path(file))) for file in missing if file.blob
        )

    with _progress(done, total), ThreadPoolExecutor(_WORKERS) as pool:
        futures = [pool.submit(fetch, job, file) for file in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _progress(done: Callable[[], int], total: int) -> Iterator[None]:
    """Reports `done()` every two seconds, from a thread, with rate and time left; once more at the end."""
    over = threading.Event()
    started, before = time.monotonic(), done()

    def report() -> None:
        now = done()
        seconds = time.monotonic() - started
        rate = (now - before) / seconds if seconds > 0 else 0.0
        left = f", {_duration((total - now) / rate)} left" if now - before > 0 and now < total else ""
        message = f"Download: {gib(now)} of {gib(total)}, {rate / 2**20:.1f} MiB/s{left}"
        logs.event(_log, "progress", message, phase="download", done=now, total=total, unit="bytes")

    def repeat() -> None:
        while not over.wait(_PROGRESS_S):
            report()

    if before:
        _log.info("Resuming: %s of %s are here already", gib(before), gib(total))
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    report()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def fetch(job: Job, file: RemoteFile) -> None:
    """Brings one file into the snapshot."""
    if file.blob is None or file.size is None or file.size > _HTTP_LIMIT:
        from huggingface_hub import hf_hub_download

        hf_hub_download(job.repo, file.name, revision=job.commit, cache_dir=job.folder.parent)
        return
    with _locked(job.folder.parent / ".locks" / job.folder.name / f"{file.blob}.lock"):
        if not job.blob_path(file).is_file():
            retried(lambda: fetch_blob(job, file), job.retry_delay_s)
        _link(job, file)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock that huggingface_hub holds too while it writes the same blob."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_blob(job: Job, file: RemoteFile) -> None:
    """Downloads to `<blob>.incomplete`, going on where an earlier run stopped; checks the hash; moves it into place."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    partial = job.partial_path(file)
    have = _size(partial)
    if file.size is not None and have > file.size:
        partial.unlink()
        have = 0
    with partial.open("ab") as out:
        http_get(
            hf_hub_url(job.repo, file.name, revision=job.commit),
            out,
            resume_size=have,
            headers=build_hf_headers(),
            expected_size=file.size,
        )
    if blob_hash(partial, str(file.blob)) != file.blob:
        partial.unlink()
        raise OSError(f"{file.name} arrived damaged: its hash is not the one the Hub states")
    partial.replace(job.blob_path(file))


def blob_hash(path: Path, like: str) -> str:
    """sha256 of a file, or git's sha1 when `like` is as long as one."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _link(job: Job, file: RemoteFile) -> None:
    """Makes the blob appear under its name in the snapshot; a copy where links are not possible."""
    pointer, blob = job.snapshot / file.name, job.blob_path(file)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        shutil.copyfile(blob, pointer)


def retried(action: Callable[[], T], delay_s: float) -> T:
    """`action()`, tried again when the trouble may pass: connections, time-outs, the server's own errors."""
    attempt = 1
    while True:
        try:
            return action()
        except Exception as error:
            if attempt == _TRIES or not may_pass(error):
                raise
            what = f"{type(error).__name__}: {_first_line(error)}"
        _log.warning("%s; trying again (%d of %d)", what, attempt, _TRIES - 1)
        time.sleep(delay_s * 2 ** (attempt - 1))
        attempt += 1


def may_pass(error: Exception) -> bool:
    """Whether trying again may help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


@contextlib.contextmanager
def explained(repo: str, revision: str) -> Iterator[None]:
    """Turns what huggingface_hub and the system raise into a DownloadError with a sentence that says what to do."""
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{repo}"
    token = "the token that is set has no access" if get_token() else "no token is set"
    try:
        yield
    except DownloadError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"`{repo}` is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account ({token})"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"`{repo}` has no revision '{revision}': see {page}/tree/main for its branches") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"`{repo}` is not on the Hub, or it is private: check the name at {page}; for a private model set HF_TOKEN "
            f"to a token that may read it ({token})"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise DownloadError(f"the Hub refused `{repo}` with {status}: set HF_TOKEN ({token})") from error
        raise DownloadError(f"the Hub answered {status} for `{repo}`: {_first_line(error)}") from error
    except Exception as error:  # the system's errors, and requests' or httpx', whichever huggingface_hub uses
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk is full while `{repo}` is downloaded: what came so far is kept") from error
        if number is not None:
            raise DownloadError(f"`{repo}` could not be downloaded: {_first_line(error)}") from error
        raise DownloadError(
            f"`{repo}` could not be downloaded from {page}: {type(error).__name__}: {_first_line(error)}"
        ) from error


if __name__ == "__main__":
    main()
