"""What the launcher writes to stdout: readable lines, coloured on a terminal, or JSON lines with `--json-output`.

Every record passes through here, the launcher's own (through `logging`) and the children's (through `process`). On a
terminal one line at the bottom may show progress; it is replaced in place and never part of a log file.
"""

import json
import logging
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from tgi_proto import logs

_STANDARD = frozenset(("timestamp", "level", "message", "target", "rank", "event"))
_EVENT_FIELDS = frozenset(name for fields in logs.EVENTS.values() for name in fields)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLORS = {"DEBUG": "34", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "31"}
_LEVELS = {
    "trace": "DEBUG",
    "debug": "DEBUG",
    "info": "INFO",
    "warn": "WARNING",
    "warning": "WARNING",
    "error": "ERROR",
    "off": "ERROR",
}
_ORDER = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class LogLevels:
    """What LOG_LEVEL asked for, per process."""

    launcher: str = "INFO"
    router: str = "INFO"
    shard: str = "INFO"
    not_understood: tuple[str, ...] = ()


def parse_log_level(text: str | None) -> LogLevels:
    """LOG_LEVEL: a level, or TGI's list of directives such as `info,text_generation_router=debug`.

    Shards get the most verbose level that is asked for anywhere, as in TGI.
    """
    overall, per_target, bad = "INFO", {}, []
    for part in (part.strip() for part in (text or "info").split(",")):
        target, equals, name = part.rpartition("=")
        level = _LEVELS.get(name.lower())
        if level is None:
            bad.append(part)
        elif equals:
            per_target[target.partition("::")[0]] = level
        else:
            overall = level
    router = per_target.get("text_generation_router", overall)
    launcher = per_target.get("text_generation_launcher", overall)
    return LogLevels(launcher, router, min((overall, router, launcher), key=_ORDER.index), tuple(bad))


def wants_color(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """NO_COLOR and LOG_COLORIZE decide, else whether `stream` is a terminal."""
    if environ.get("NO_COLOR"):
        return False
    if "LOG_COLORIZE" in environ:
        return environ["LOG_COLORIZE"].lower() in ("1", "true", "on", "yes", "always")
    return stream.isatty()


def now_text() -> str:
    """The current time as the records spell it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Console:
    """Writes records. Used from the event loop and, through `logging`, from anywhere in the launcher."""

    def __init__(self, stream: TextIO = sys.stdout, *, json_output: bool = False, color: bool = False) -> None:
        self._stream = stream
        self._json = json_output
        self._color = color
        self._terminal = stream.isatty() and not json_output
        self._status = ""
        self._gone = False

    @property
    def is_terminal(self) -> bool:
        """Whether a person is watching."""
        return self._terminal

    def show(self, tag: str, record: Mapping[str, Any]) -> None:
        """Writes one record. tag: "launcher", "router", "download" or "shard-N"."""
        if self._json:
            self._write(json.dumps(record, default=str) + "\n")
        else:
            self._write(self._format(tag, record) + "\n")

    def text(self, tag: str, level: str, message: str, **fields: Any) -> None:
        """Writes a line that came without a record around it."""
        self.show(tag, {"timestamp": now_text(), "level": level, "message": message, "target": tag, **fields})

    def status(self, text: str) -> None:
        """Replaces the progress line at the bottom of the terminal; "" removes it. Nothing elsewhere."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._status = _clean(text)[:width]
            self._raw("\r\x1b[2K" + self._status)

    def plain(self, text: str) -> None:
        """Writes `text` as it is, without time and level; for people at a terminal."""
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        if self._status:
            text = f"\r\x1b[2K{text}{self._status}"
        self._raw(text)

    def _raw(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # EPIPE from a pipe, EIO from a terminal that was closed
            # Whoever read our output is gone. Serving goes on; there is nobody to tell.
            self._gone = True

    def _format(self, tag: str, record: Mapping[str, Any]) -> str:
        level = str(record.get("level", "INFO"))
        extra = [
            f"{key}={value}"
            for key, value in record.items()
            if key not in _STANDARD and not ("event" in record and key in _EVENT_FIELDS)
        ]
        message = _clean(" ".join((str(record.get("message", "")).rstrip(), *extra)))
        time = str(record.get("timestamp", ""))
        if self._terminal:
            time = time[11:23]
        if self._color:
            code = _COLORS.get(level, "0")
            return f"\x1b[2m{time}\x1b[0m \x1b[{code}m{level:>7}\x1b[0m \x1b[1m{tag}\x1b[0m: {message}"
        return f"{time} {level:>7} {tag}: {message}"


def _clean(text: str) -> str:
    """`text` without control characters, which could move the cursor or forge lines; newlines and tabs stay."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class ConsoleHandler(logging.Handler):
    """Sends the launcher's own log records to the console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logs.JsonFormatter("tgi_launcher"))

    def emit(self, record: logging.LogRecord) -> None:
        self._console.show("launcher", json.loads(self.format(record)))


def setup(console: Console, level: str) -> logging.Logger:
    """Routes this process' logging to `console`; returns the launcher's logger."""
    root = logging.getLogger()
    root.handlers[:] = [ConsoleHandler(console)]
    root.setLevel(level)
    return logging.getLogger("tgi_launcher")
