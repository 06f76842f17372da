"""Why a child died, and what to do about it. PURE: evidence in, sentences out. Called by the supervisor.

Of several ranks that die together only one is the cause; the others merely lost their peer. `first_cause` finds it.
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from .memory_fit import GIB, gib

_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|gloo|NCCL|socket closed|peer|process group", re.IGNORECASE
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|cannot allocate memory|MemoryError|DefaultCPUAllocator: can't allocate",
    re.IGNORECASE,
)
_SMALL_SHM = GIB


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about the machine at the time of a death."""

    oom_kills: int = 0  # of this cgroup, since the last death that was looked into
    memory_limit: int = 0  # bytes
    memory_limited_by: str = "machine"
    peak_rss: int = 0  # bytes, of the largest child that has ended so far
    shm_bytes: int | None = None
    cpu_flags: frozenset[str] = frozenset()
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Death:
    """How one child ended."""

    name: str  # "shard-0", "router", "download"
    returncode: int  # minus the signal's number when it was killed
    phase: str = "serving"
    last_error: str | None = None  # its last record at ERROR or above
    stderr: str = ""
    stopped_because: str | None = None  # the launcher's own reason for killing it


@dataclass(frozen=True, slots=True)
class Explanation:
    """cause: what happened, one sentence. advice: what to do, or "". detail: traceback or dump, or ""."""

    cause: str
    advice: str = ""
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.cause}; {self.advice}" if self.advice else self.cause
        return f"{text}\n{self.detail}" if self.detail else text


def first_cause(deaths: Sequence[Death]) -> Death:
    """The death that explains the others: in order of time, but a rank that only lost its peer comes last."""

    def rank(death: Death) -> int:
        if death.returncode < 0 or death.stopped_because:
            return 0
        return 2 if _LOST_PEER.search(last_line(death.last_error or death.stderr)) else 1

    return min(deaths, key=rank)  # min keeps the earliest of equals


def last_line(text: str) -> str:
    """The last line that is not empty: in a traceback, the exception."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def traceback_in(text: str) -> str:
    """The first Python traceback in `text` with everything after it, or ""."""
    start = text.find("Traceback (most recent call last)")
    return text[start:].strip() if start >= 0 else ""


def fatal_dump_in(text: str) -> str:
    """The dump faulthandler wrote, or ""."""
    match = re.search(r"^Fatal Python error:.*", text, re.MULTILINE | re.DOTALL)
    return match[0].strip() if match else ""


def explain(death: Death, evidence: Evidence) -> Explanation:
    """The cause of `death` in one sentence, and what to do."""
    where = f"{death.name} (in phase {death.phase})"
    if death.stopped_because:
        return Explanation(
            f"{where} was killed by the launcher: {death.stopped_because}", "", fatal_dump_in(death.stderr)
        )
    if death.returncode < 0:
        return _by_signal(where, -death.returncode, death, evidence)
    return _by_status(where, death, evidence)


def _by_signal(where: str, number: int, death: Death, evidence: Evidence) -> Explanation:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    dump = fatal_dump_in(death.stderr)
    if number == signal.SIGKILL:
        return _killed(where, evidence)
    if number == signal.SIGBUS:
        size = "absent" if evidence.shm_bytes is None else gib(evidence.shm_bytes)
        advice = f"/dev/shm is {size}: give the container more (docker run --shm-size 1g)"
        if evidence.shm_bytes is not None and evidence.shm_bytes >= _SMALL_SHM:
            advice = f"/dev/shm is {size}, so a mapped weight file was probably cut off or changed: check the disk"
        return Explanation(f"{where} died of SIGBUS (signal 7), a memory access without memory behind it", advice, dump)
    if number == signal.SIGILL:
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
        missing = [flag for flag in wanted if evidence.cpu_flags and flag not in evidence.cpu_flags]
        lacking = f"this CPU lacks {', '.join(missing)}: " if missing else ""
        return Explanation(
            f"{where} died of SIGILL (signal 4), an instruction this CPU does not have",
            f"{lacking}install a torch build for this CPU",
            dump,
        )
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE):
        return Explanation(
            f"{where} died of {name} (signal {number}), a crash in native code",
            "report it with the lines below" if dump else "run with LOG_LEVEL=debug and report it",
            dump,
        )
    return Explanation(f"{where} was ended by {name} (signal {number})", "somebody outside sent it", dump)


def _killed(where: str, evidence: Evidence) -> Explanation:
    if evidence.oom_kills == 0:
        return Explanation(
            f"{where} was killed with SIGKILL (signal 9)",
            "somebody outside sent it; if nobody did, the kernel ran out of memory (`dmesg` says so)",
        )
    at = f" at {gib(evidence.peak_rss)}" if evidence.peak_rss else ""
    return Explanation(
        f"{where} was killed by the kernel's OOM killer{at} of {gib(evidence.memory_limit)} "
        f"({evidence.memory_limited_by})",
        "give it more memory, or lower --max-batch-total-tokens or --max-batch-prefill-tokens, use --dtype bfloat16, "
        "or serve a smaller model",
    )


def _by_status(where: str, death: Death, evidence: Evidence) -> Explanation:
    said = death.last_error or ""
    detail = traceback_in(said) or traceback_in(death.stderr)
    sentence = said.splitlines()[0].strip() if said.strip() else last_line(detail or death.stderr)
    advice = ""
    if _OUT_OF_MEMORY.search(said) or _OUT_OF_MEMORY.search(detail):
        flags = "--max-batch-total-tokens or --max-batch-prefill-tokens"
        if evidence.device == "cuda":
            flags = f"--cuda-memory-fraction, {flags}"
        advice = f"out of memory: lower {flags}, or serve a smaller model"
    elif death.returncode == 2 and not sentence.startswith("Traceback"):
        advice = "it did not understand its command line: launcher and server are of different versions"
    elif death.returncode == 127:
        advice = "the program is not installed"
    elif death.returncode == 0:
        sentence = sentence or "nobody asked it to stop"
    cause = f"{where} exited with status {death.returncode}"
    return Explanation(f"{cause}: {sentence}" if sentence else cause, advice, detail)
