"""Which request a log line belongs to: its `request_id` and path, and its `trace_id` while tracing is on.

app.py sets the context when a request begins; every record logged by its task, or by a task made from it, carries the
fields. The batcher's loop serves all requests at once, so it passes `extra={"request_id": ...}` itself, which wins.
"""

import logging
from contextvars import ContextVar

_fields: ContextVar[dict[str, str] | None] = ContextVar("tgi_log_fields", default=None)


def enter(**fields: str) -> None:
    """From here on every log record of this task has `fields`."""
    _fields.set(fields)


class ContextFilter(logging.Filter):
    """Adds the fields of the current request to a record; for the handlers of the root logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (_fields.get() or {}).items():
            vars(record).setdefault(name, value)
        return True


def install() -> None:
    """Makes every handler of the root logger add them."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(ContextFilter())
