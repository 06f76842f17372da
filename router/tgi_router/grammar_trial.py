"""The process in which grammars are compiled and tried: `python -m tgi_router.grammar_trial`. It may be killed.

It loads llguidance and the model's vocabulary once, then forks a child for each grammar. A child has little processor
time and memory: what exceeds them ends the child, nobody else. Children are tried with very little time first, so that
a crowd of costly grammars cannot keep a cheap one waiting, then once more with enough for the largest sensible ones.

Talks in frames (length, JSON) over stdin and stdout with grammar_compiler.py, which starts it. Imports no asyncio.
"""

import contextlib
import json
import os
import random
import re
import resource
import select
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgi_proto.grammar import first_line, load_tokenizer, make_matcher

from .json_schemas import closed, lark_regex

if TYPE_CHECKING:
    from llguidance import LLTokenizer

ROUNDS_S = (0.04, 0.6)  # processor time of the first try and of the second
# After its arrival, when others wait: a second try is not begun any more, and one under way is ended.
PATIENCE_S, DEADLINE_S = 1.5, 1.9
_MEMORY_BYTES = 1 << 30  # address space beyond what the process has at its start
_WALK = 16  # tokens followed on trial
_HEADER = struct.Struct("<I")
_PLACE = re.compile(r"at (?P<line>\d+)\(\d+\): (?P<reason>.*?)(?: \d+ \| .*)?$")  # of llguidance's errors about Lark


class Refused(Exception):
    """The grammar cannot be used; the message is for the client."""


def compiled(kind: str, text: str) -> str:
    """llguidance's JSON for a grammar. Raises Refused."""
    from llguidance import LLMatcher

    if kind == "lark":
        return json.dumps({"grammars": [{"lark_grammar": text}]})
    if kind == "regex":
        return json.dumps({"grammars": [{"lark_grammar": f"start: {lark_regex(text)}"}]})
    schema = closed(json.loads(text))
    schema.pop("x-guidance", None)
    # At most one space between tokens, as in TGI: a model that likes space cannot go on for ever.
    grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": "[ ]?"})
    return grammar


def tried(tokenizer: "LLTokenizer", kind: str, text: str) -> str:
    """What the shards get, after a walk of some tokens at random has met no obstacle. Raises Refused."""
    grammar = compiled(kind, text)
    matcher = make_matcher(tokenizer, grammar)
    if matcher.is_error():
        raise Refused(_sentence(kind, text, matcher.get_error()))
    chance = random.Random(0)
    for _ in range(_WALK):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise Refused(_sentence(kind, text, matcher.get_error()))
        if matcher.is_stopped() or not matcher.consume_token(_some_token(mask, chance)):
            break
    return grammar


def _some_token(mask: bytes, chance: random.Random) -> int:
    """One of the tokens in the mask, which has one."""
    places = [place for place, byte in enumerate(mask) if byte]
    place = chance.choice(places)
    return place * 8 + chance.choice([bit for bit in range(8) if mask[place] >> bit & 1])


def _sentence(kind: str, text: str, error: str) -> str:
    """TGI's sentence, with llguidance's reason."""
    reason = first_line(error)
    if kind != "json_schema" and (place := _PLACE.match(reason)) is not None:  # in our Lark, which nobody sees
        reason = place["reason"] + (_about(text, int(place["line"])) if kind == "lark" else "")
    if "NoExtension" in reason:
        reason = "no text is possible under it"
    if kind == "json_schema" and not reason.lower().startswith(("invalid", "expected", "missing", "regex parse")):
        return f"cannot compile regex from schema: {reason}"
    return f"grammar is not valid: {reason}"


def _about(text: str, line: int) -> str:
    """What the comment before a line of Lark says it is about; our grammars have one before what a client wrote."""
    before = text.split("\n")[max(0, line - 2) : line - 1]
    return f" ({before[0].removeprefix('// ')})" if before and before[0].startswith("// ") else ""


@dataclass(slots=True)
class Job:
    """One grammar."""

    number: int
    kind: str
    text: str
    arrived_s: float
    round: int = 0
    crowded: bool = False  # others waited when its second try began
    pid: int = 0
    answer: bytearray = field(default_factory=bytearray)  # from its child, so far


class Trials:
    """The loop: frames in, children forked, frames out."""

    def __init__(self, tokenizer: "LLTokenizer", max_children: int) -> None:
        self._tokenizer = tokenizer
        self._max_children = max_children
        self._waiting: tuple[deque[Job], deque[Job]] = (deque(), deque())  # by round
        self._children: dict[int, Job] = {}  # by the pipe's end that is read here
        self._buffer = bytearray()

    def run(self) -> None:
        """Until stdin ends, which is when the router does."""
        while True:
            self._start()
            timeout = 0.05 if self._waiting[1] or self._children else None
            ready, _, _ = select.select([0, *self._children], [], [], timeout)
            for descriptor in ready:
                if descriptor == 0:
                    if not self._read():
                        return
                else:
                    self._collect(descriptor)
            self._end_late_ones(time.monotonic())

    def _read(self) -> bool:
        data = os.read(0, 1 << 20)
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            end = _HEADER.size + _HEADER.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            number, kind, text = json.loads(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            self._waiting[0].append(Job(number, kind, text, time.monotonic()))
        return bool(data)

    def _start(self) -> None:
        for queue in self._waiting:
            while queue and len(self._children) < self._max_children:
                self._fork(queue.popleft())

    def _fork(self, job: Job) -> None:
        job.crowded = job.round > 0 and any(self._waiting)
        mine, its = os.pipe()
        job.pid = os.fork()
        if job.pid == 0:
            os.close(mine)
            _be_child(self._tokenizer, job, its)
        os.close(its)
        self._children[mine] = job

    def _collect(self, descriptor: int) -> None:
        """Takes what a child says; when it has said everything, or is dead, answers or tries again."""
        job = self._children[descriptor]
        data = os.read(descriptor, 1 << 20)
        job.answer += data
        if data:
            return
        del self._children[descriptor]
        os.close(descriptor)
        _, status = os.waitpid(job.pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            _send(job.number, *json.loads(job.answer))
        elif not os.WIFSIGNALED(status) or os.WTERMSIG(status) not in (signal.SIGPROF, signal.SIGKILL):
            _send(job.number, None, "grammar is not valid: compiling it takes too much memory or fails")
        elif job.round == 0:
            job.round = 1
            job.answer.clear()
            self._waiting[1].append(job)
        else:
            _refuse_slow(job, late=os.WTERMSIG(status) == signal.SIGKILL)

    def _end_late_ones(self, now: float) -> None:
        if len(self._children) == self._max_children:
            late = self._waiting[1]
            while late and now - late[0].arrived_s > PATIENCE_S:
                _refuse_slow(late.popleft(), late=True)
        for job in self._children.values():
            if job.crowded and now - job.arrived_s > DEADLINE_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(job.pid, signal.SIGKILL)


def _refuse_slow(job: Job, *, late: bool) -> None:
    """late: it may take less; there was no time to find out, and there may be next time."""
    limit = ROUNDS_S[0] if late else ROUNDS_S[1]
    busy = ", which is all there is while others wait" if late else ""
    reason = f"grammar is not valid: compiling it takes more than {limit} s of processor time{busy}"
    _send(job.number, None, reason, keep=not late)


def _be_child(tokenizer: "LLTokenizer", job: Job, pipe: int) -> None:
    """Never returns. SIGPROF, which the timer sends, ends the process."""
    code = 1
    try:
        signal.setitimer(signal.ITIMER_PROF, ROUNDS_S[job.round])
        if job.round:
            os.nice(10)
        _limit_memory()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # the parent's, to end with it; 2: the last words of who runs out of memory
            os.dup2(nowhere, descriptor)
        try:
            answer: tuple[str | None, str | None] = tried(tokenizer, job.kind, job.text), None
        except Refused as refused:
            answer = None, str(refused)
        except (ValueError, RecursionError) as error:  # of llguidance's own parsing
            answer = None, _sentence(job.kind, job.text, str(error))
        for part in _parts(json.dumps(answer).encode()):
            os.write(pipe, part)
        code = 0
    finally:
        os._exit(code)


def _limit_memory() -> None:
    limit = _address_space() + _MEMORY_BYTES
    with contextlib.suppress(ValueError, OSError):  # not every system can; then there is the timer alone
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _parts(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), select.PIPE_BUF):
        yield data[start : start + select.PIPE_BUF]


def _address_space() -> int:
    """Bytes this process has mapped."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        return 16 << 30
    return pages * resource.getpagesize()


def _send(number: int, grammar: str | None, error: str | None, *, keep: bool = True) -> None:
    """keep: the same grammar will always get this answer."""
    data = json.dumps([number, grammar, error, keep]).encode()
    sys.stdout.buffer.write(_HEADER.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def main() -> None:
    """Arguments, as one JSON object: model_dir, vocab_size, eos_token_ids, max_children."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the router's to handle: it finishes its requests, then closes stdin
    try:
        tokenizer = load_tokenizer(Path(arguments["model_dir"]), arguments["vocab_size"], arguments["eos_token_ids"])
    except Exception as error:
        _send(0, None, f"llguidance cannot use the model's `tokenizer.json`: {first_line(str(error))}")
        return
    _send(0, None, None)
    Trials(tokenizer, arguments["max_children"]).run()


if __name__ == "__main__":
    main()
