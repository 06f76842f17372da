"""Grammars compiled off the event loop, in a process of their own (grammar_trial.py), and kept.

Called by validation.py with what grammars.py understood. The process is started by the first grammar; when it dies it
is started again.
"""

import asyncio
import contextlib
import json
import logging
import os
import struct
import sys
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from .errors import ApiError, Bug, InternalError, Overloaded, ValidationError
from .grammars import Grammar

logger = logging.getLogger(__name__)

CACHE_BYTES = 16 << 20
_MAX_WAITING = 256  # grammars that are being compiled
_MAX_CHILDREN = 4  # grammars compiled at the same time
_ANSWER_DEADLINE_S = 60.0  # the process ends every trial after 2 s of its own accord; a busy machine may need more
_END_S = 2.0
_HEADER = struct.Struct("<I")

# What the shards get, or the reason why the grammar is refused; and whether it will always be so.
_Outcome = tuple[str | None, str | None, bool]


@dataclass(frozen=True, slots=True)
class Trial:
    """What the process is told. eos_token_ids: as the shards know them."""

    model_dir: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class GrammarCompiler:
    """One per server. trial: None = `--disable-grammar-support`."""

    def __init__(self, trial: Trial | None) -> None:
        self._trial = trial
        self._cache: OrderedDict[tuple[str, str], _Outcome] = OrderedDict()
        self._cached_bytes = 0
        self._waiting: dict[tuple[str, str], asyncio.Future[_Outcome]] = {}
        self._process: _Process | None = None

    async def compile(self, grammar: Grammar) -> str:
        """The grammar as the wire carries it. Raises ValidationError when it cannot be used."""
        if self._trial is None:
            raise ValidationError(
                "grammar is not supported: the server was started with `--disable-grammar-support`",
                param=grammar.param,
            )
        key = grammar.kind, grammar.text
        outcome = self._cache.get(key)
        if outcome is not None:
            self._cache.move_to_end(key)
        else:
            # Several requests may wait for one; one that leaves does not take it from the others.
            task = self._waiting.get(key) or self._begin(self._trial, key)
            outcome = await asyncio.shield(task)
        text, error, _ = outcome
        if text is None:
            raise ValidationError(error or "grammar is not valid", param=grammar.param)
        return text

    async def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            await self._process.close()

    def _begin(self, trial: Trial, key: tuple[str, str]) -> "asyncio.Future[_Outcome]":
        if len(self._waiting) >= _MAX_WAITING:
            raise Overloaded()
        future = asyncio.create_task(self._compile(trial, key))
        self._waiting[key] = future
        future.add_done_callback(lambda done: self._over(key, done))
        return future

    def _over(self, key: tuple[str, str], done: "asyncio.Future[_Outcome]") -> None:
        del self._waiting[key]
        if not done.cancelled():
            done.exception()  # seen, even when everyone who waited has left

    async def _compile(self, trial: Trial, key: tuple[str, str]) -> _Outcome:
        if self._process is None or self._process.ended:
            self._process = _Process(trial)
        outcome = await self._process.ask(*key)
        if outcome[2]:
            self._keep(key, outcome)
        return outcome

    def _keep(self, key: tuple[str, str], outcome: _Outcome) -> None:
        self._cache[key] = outcome
        self._cached_bytes += _size(key, outcome)
        while self._cached_bytes > CACHE_BYTES:
            self._cached_bytes -= _size(*self._cache.popitem(last=False))


def _size(key: tuple[str, str], outcome: _Outcome) -> int:
    return 200 + sum(len(text) for text in (*key, *outcome[:2]) if text is not None)


class _Process:
    """grammar_trial.py, running."""

    def __init__(self, trial: Trial) -> None:
        self.ended = False  # it takes nothing any more
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[_Outcome]] = {}
        self._ready: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(trial), name="grammars")

    async def ask(self, kind: str, text: str) -> _Outcome:
        """Raises ApiError when the process cannot start, dies or hangs."""
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE_S):
                stdin = await asyncio.shield(self._ready)
                number = next(self._numbers)
                answer: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
                self._asked[number] = answer
                stdin.write(_frame([number, kind, text]))
                return await answer
        except TimeoutError:
            logger.error("compiling a grammar has not ended after %.0f s", _ANSWER_DEADLINE_S)
            self._running.cancel()
            raise InternalError() from None

    async def close(self) -> None:
        if not self.ended:
            self._running.cancel()
        await asyncio.wait([self._running])

    async def _run(self, trial: Trial) -> None:
        """Starts the process and hands out its answers until it ends or is told to."""
        error: ApiError = InternalError()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tgi_router.grammar_trial", _arguments(trial),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            if process.stdin is None or process.stdout is None:
                raise Bug("a process was started without its pipes. This is a bug.")
            _, _, problem, _ = await _read(process.stdout)
            if problem is not None:
                error = ValidationError(f"grammar is not supported: {problem}")
                return
            self._ready.set_result(process.stdin)
            while True:
                number, *outcome = await _read(process.stdout)
                answer = self._asked.pop(number)
                if not answer.done():
                    answer.set_result((outcome[0], outcome[1], outcome[2]))
        except asyncio.IncompleteReadError:
            logger.error("the process that compiles grammars has ended with status %s", await process.wait())
        finally:
            self.ended = True
            waiting: list[asyncio.Future[Any]] = [self._ready, *self._asked.values()]
            for future in waiting:
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # seen, whether or not somebody waits
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """It ends with its stdin; if not, it is made to. Reads its pipes to their end, else asyncio complains."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_END_S):
            await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def _arguments(trial: Trial) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return json.dumps(
        {
            "model_dir": str(trial.model_dir),
            "vocab_size": trial.vocab_size,
            "eos_token_ids": trial.eos_token_ids,
            "max_children": min(_MAX_CHILDREN, cores),
        }
    )


def _frame(message: list[object]) -> bytes:
    data = json.dumps(message).encode()
    return _HEADER.pack(len(data)) + data


async def _read(stdout: asyncio.StreamReader) -> list[Any]:
    header = await stdout.readexactly(_HEADER.size)
    message: list[Any] = json.loads(await stdout.readexactly(*_HEADER.unpack(header)))
    return message
