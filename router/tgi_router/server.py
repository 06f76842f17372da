"""What every route needs, in one object: built by cli.py when the shards are ready, kept in the aiohttp application."""

import hmac
import re
import uuid
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from aiohttp import web

from .batcher import Batcher
from .chat_template import ChatTemplate
from .config import RouterConfig
from .dialect import Dialect
from .infer import Deadline, Infer
from .metrics import Metrics
from .tokenizer import Tokenizer

if TYPE_CHECKING:  # it imports opentelemetry, which only `--otlp-endpoint` needs
    from .tracing import Trace, Tracing

ROUTER_NAME = "text-generation-router"
# GET on these says only whether the server is well, so it needs no key.
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/v2/health/live", "/v2/health/ready"})
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(slots=True)
class Server:
    """One per process. `draining` is the only field that changes."""

    config: RouterConfig
    api_key: str | None
    batcher: Batcher
    infer: Infer
    metrics: Metrics
    tokenizer: Tokenizer
    template: ChatTemplate
    dialect: Dialect
    version: str
    draining: bool = False
    tracing: "Tracing | None" = None

    @property
    def healthy(self) -> bool:
        return self.batcher.healthy and not self.draining

    def admits(self, authorization: str) -> bool:
        """Whether this header allows the call. Compared in constant time; the scheme's case does not matter."""
        if self.api_key is None:
            return True
        scheme, _, key = authorization.partition(" ")
        given = sha256(key.strip().encode(errors="surrogateescape")).digest()  # so that the length tells nothing
        return hmac.compare_digest(given, sha256(self.api_key.encode()).digest()) and scheme.lower() == "bearer"

    @property
    def system_fingerprint(self) -> str:
        return f"{self.version}-native"


SERVER: web.AppKey[Server] = web.AppKey("server", Server)
# Given by app.py to a request: its id always, a deadline when the client asked for one, a trace when tracing is on.
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
DEADLINE: web.RequestKey[Deadline] = web.RequestKey("deadline", Deadline)
TRACE: "web.RequestKey[Trace]" = web.RequestKey("trace", object)  # type: ignore[arg-type]


def request_id(given: str) -> str:
    """A request's id: `given` by its client, when that can stand in headers and logs, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
