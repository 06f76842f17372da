"""The log record: one JSON object a line. Children write it to stdout, the launcher reads and shows it.

Fields, in this order: `timestamp` (RFC 3339, UTC, microseconds), `level` (upper case), `message`, `target` (the import
package), then `rank` for shards, then any extra fields. Control characters cannot break a line because JSON escapes
them. A record with an `event` field is also a message to the launcher: see `EVENTS`.
"""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

# event -> fields that come with it. The launcher acts on these, whatever else the record says.
EVENTS: dict[str, tuple[str, ...]] = {
    # shard → launcher: entered a phase of its start. phase: import | load | warmup | ready
    "phase": ("phase",),
    # shard → launcher: work done within the phase, for progress display and stall detection. Bytes, or steps.
    "progress": ("phase", "done", "total", "unit"),
    # router → launcher: a shard did not answer within the step deadline and must be killed.
    "shard_hung": ("rank", "deadline_s"),
    # router → launcher: serving (the port is bound, the model is warm). address: "http://host:port"
    "serving": ("address",),
}

_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as described above. `extra={...}` fields of a logging call become fields of the object."""

    def __init__(self, target: str, fields: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._target = target
        self._fields = fields or {}

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        obj: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="microseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "message": message,
            "target": self._target,
            **self._fields,
        }
        obj.update((key, value) for key, value in vars(record).items() if key not in _RESERVED)
        return json.dumps(obj, default=str)


def setup(target: str, level: str = "INFO", *, stream: TextIO | None = None, **fields: Any) -> logging.Logger:
    """Sends every log record of this process to `stream` (stdout) as JSON lines; returns the logger named `target`.

    target: the import package, e.g. "tgi_shard". fields: added to every record, e.g. rank=0.
    """
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter(target, fields))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    return logging.getLogger(target)


def event(logger: logging.Logger, name: str, message: str, **fields: Any) -> None:
    """Logs `message` at INFO with the event `name` (one of EVENTS) and its fields."""
    logger.info(message, extra={"event": name, **fields})


def parse(line: str) -> dict[str, Any] | None:
    """The record a child wrote, or None when the line is not one (a library printed something)."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "message" in record and "level" in record else None
