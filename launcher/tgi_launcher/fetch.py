"""From `--model-id` to a directory that shards can load: looks in the cache, runs the download and the conversion.

Both run as child processes, so that a signal ends them at once and a stalled download can be killed and resumed. Where
files are is `hub.py`'s knowledge, how they come over the network `download.py`'s. Called by launch.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from . import hub
from .child_configs import ModelSource
from .children import Programs, convert_command, download_command
from .console import Console
from .errors import ArgumentValidation, DownloadError
from .explain import Death, Evidence, explain
from .flags import Flags
from .guard import Guard
from .process import Child, Command, Exited, Record
from .supervisor import Event, Signalled, next_event

_ATTEMPTS = 3
_STOP_S = 5.0

_log = logging.getLogger("tgi_launcher")


class Stopped(Exception):
    """A signal came while something was fetched."""


class Fetcher:
    """Brings one model to this machine."""

    def __init__(
        self,
        flags: Flags,
        environ: Mapping[str, str],
        programs: Programs,
        console: Console,
        guard: Guard,
        queue: "asyncio.Queue[Event]",
        runtime_dir: Path,
    ) -> None:
        self._flags = flags
        self._environ = environ
        self._programs = programs
        self._console = console
        self._guard = guard
        self._queue = queue
        self._runtime_dir = runtime_dir

    async def model(self) -> ModelSource | None:
        """The model; None when a signal came first. Raises DownloadError or ArgumentValidation with a sentence."""
        model_id = self._flags.model_id or ""
        local = hub.local_directory(model_id)
        try:
            if local is not None:
                directory, commit = local, None
                self._check_complete(local)
                if self._flags.revision is not None:
                    _log.warning("`revision` has no effect: `model_id` is a directory, not an id on the Hub")
            else:
                directory, commit = await self._from_hub(model_id, self._flags.revision or "main")
            if self._override is not None:
                directory = hub.with_weights_from(directory, self._override, self._runtime_dir / "model")
            if hub.needs_conversion(directory):
                directory = await self._converted(directory)
        except Stopped:
            return None
        finally:
            self._console.status("")
        return ModelSource(str(directory), model_id, self._flags.reason("model_id"), commit)

    @property
    def _override(self) -> Path | None:
        if not self._flags.weights_cache_override:
            return None
        path = Path(self._flags.weights_cache_override)
        if not path.is_dir():
            raise ArgumentValidation(f"`weights_cache_override` is '{path}', but there is no such directory")
        return path.resolve()

    def _check_complete(self, directory: Path) -> None:
        missing = hub.missing_files(directory, need_weights=self._override is None)
        if missing:
            names = ", ".join(f"`{name}`" for name in missing)
            raise ArgumentValidation(f"the model directory {directory} lacks {names}")

    async def _from_hub(self, model_id: str, revision: str) -> tuple[Path, str | None]:
        settings = hub.hub_settings(self._flags, self._environ)
        weights = self._override is None
        found = hub.find_cached(settings.cache, model_id, revision, need_weights=weights)
        if found.directory is not None and not found.missing:
            _log.info("Files are already present on the host. Skipping download. (%s)", found.directory)
            return found.directory, found.commit
        if settings.offline:
            raise hub.offline_error(model_id, revision, found, settings)
        command = download_command(
            model_id,
            revision,
            settings,
            self._programs,
            self._environ,
            weights=weights,
            remote_code=self._flags.trust_remote_code,
        )
        await self._run(command, DownloadError, self._flags.stall_timeout)
        found = hub.find_cached(settings.cache, model_id, revision, need_weights=weights)
        if found.directory is None or found.missing:
            names = ", ".join(f"`{name}`" for name in found.missing)
            raise DownloadError(f"`{model_id}` at revision '{revision}' has no {names} on the Hub: it cannot be served")
        return found.directory, found.commit

    async def _converted(self, directory: Path) -> Path:
        """The directory with safetensors: itself where it can be written, else a view beside the cache."""
        if os.access(directory, os.W_OK):
            await self._run(convert_command(directory, directory, self._programs, self._environ), DownloadError, None)
            return directory
        out = self._runtime_dir / "converted"
        out.mkdir()
        _log.warning("%s cannot be written: the converted weights are kept for this run only", directory)
        await self._run(convert_command(directory, out, self._programs, self._environ), DownloadError, None)
        return hub.with_weights_from(directory, out, self._runtime_dir / "converted-view")

    async def _run(self, command: Command, error: type[DownloadError], stall_s: float | None) -> None:
        """Runs `command` to its good end. One that makes no progress for `stall_s` is killed and run again."""
        for attempt in range(1, _ATTEMPTS + 1):
            _log.info("Starting %s: %s", command.name, command.shown)
            child = Child.start(command, self._console, self._queue.put_nowait, self._guard)
            try:
                stalled = not await self._follow(child, stall_s)
            finally:
                await child.stop(_STOP_S, "the launcher is stopping")
            if not stalled:
                break
            _log.warning("%s made no progress for %s s (attempt %d of %d)", command.name, stall_s, attempt, _ATTEMPTS)
        else:
            raise error(f"{command.name} made no progress for {stall_s:g} s, {_ATTEMPTS} times: check the connection")
        if child.returncode:
            death = Death(command.name, child.returncode, command.name, child.last_error, child.stderr_tail)
            said = (child.last_error or "").splitlines()
            if said:
                raise error(said[0])
            why = explain(death, Evidence())
            _log.error("%s", why)
            raise error(why.cause)

    async def _follow(self, child: Child, stall_s: float | None) -> bool:
        """Whether `child` ended by itself before it stalled. Raises Stopped at a signal."""
        moved_s, done = time.monotonic(), -1.0
        while True:
            match await next_event(self._queue, moved_s + (math.inf if stall_s is None else stall_s)):
                case None:
                    child.kill("no progress")
                    return False
                case Signalled(number):
                    _log.info("signal %d: stopping %s", number, child.name)
                    raise Stopped
                case Exited(ended) if ended is child:
                    return True
                case Record(sender, record) if sender is child and record.get("event") == "progress":
                    if record.get("done", 0) > done:
                        done, moved_s = record["done"], time.monotonic()
                    self._show(record)
                case Record(sender, _) if sender is child:
                    moved_s = time.monotonic()
                case _:
                    pass

    def _show(self, record: Mapping[str, object]) -> None:
        if self._console.is_terminal:
            self._console.status(str(record["message"]))
        else:
            self._console.show("download", record)
