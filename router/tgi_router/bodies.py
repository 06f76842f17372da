"""HTTP bodies: JSON in, with TGI's errors for what is not; JSON out; errors in TGI's or OpenAI's shape; TGI's headers.

Called by routes/*, sse.py and app.py.
"""

import asyncio
import math
import re
import time
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from .errors import (
    ApiError,
    DeadlineExceeded,
    MalformedBody,
    PayloadTooLarge,
    RequestTimeout,
    UnknownFields,
    UnsupportedMediaType,
    WrongShape,
)
from .infer import Call, Timings
from .schemas.errors import OpenAIError, OpenAIErrorResponse
from .schemas.tgi import ErrorResponse
from .server import DEADLINE, REQUEST_ID, SERVER, TRACE
from .stream import Choice
from .unknown_fields import header_value, known, similar, unknown

T = TypeVar("T")

JSON = "application/json"
_JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json$", re.IGNORECASE)
READ_DEADLINE_S = 60.0  # for a body, and a second more for each so many bytes of it:
_SLOWEST_BYTES_S = 100_000
_PATH = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_encode = msgspec.json.encode
# Parameters that OpenAI's clients know by another name: they are told that one.
_OPENAI_NAMES = (("max_new_tokens", "max_tokens"), ("min_new_tokens", "min_tokens"))

# Names of the body's fields that were ignored, as the header `x-ignored-params` tells them; see app.py.
IGNORED_PARAMS: web.RequestKey[str] = web.RequestKey("ignored_params", str)
# Set by routes that take both APIs, or TGI's under a path like OpenAI's.
SPEAKS_OPENAI: web.RequestKey[bool] = web.RequestKey("speaks_openai", bool)


async def read(request: web.Request, limit: int) -> bytes:
    """The body. Checks in TGI's order: content type (415), size (413). Raises ApiError."""
    if not _JSON_TYPE.match(request.content_type):
        raise UnsupportedMediaType()
    if (request.content_length or 0) > limit:
        raise PayloadTooLarge(limit)
    size = limit if request.content_length is None else request.content_length
    seconds = READ_DEADLINE_S + size / _SLOWEST_BYTES_S
    deadline = request.get(DEADLINE)
    left_s = math.inf if deadline is None else deadline.at_s - time.monotonic()
    try:
        async with asyncio.timeout(min(seconds, left_s)):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise PayloadTooLarge(limit) from error
    except web.RequestPayloadError as error:  # broken chunks, or not compressed as `content-encoding` says
        raise MalformedBody(str(error)) from error
    except TimeoutError as error:
        if deadline is not None and left_s < seconds:
            raise DeadlineExceeded(deadline.timeout_s, deadline.name) from error
        raise RequestTimeout(f"The body did not arrive within {seconds:.0f} seconds.") from error


async def parse(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as a struct; fields it does not declare are reported, or refused with `--strict-params`."""
    data = await read(request, request.app[SERVER].config.payload_limit)
    body = decode(data, decoder)
    report_unknown(request, data, decoder.type)
    return body


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The struct in `body`. Raises MalformedBody (400) or WrongShape (422)."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise WrongShape(_with_path_first(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBody(str(error)) from error


def report_unknown(request: web.Request, data: bytes, *types: type) -> None:
    """Names the fields of `data` that none of the structs `types` declares. `data` was decoded as each of them.

    Raises UnknownFields with `--strict-params`.
    """
    if names := unknown_names(data, *types):
        report_ignored(request, names, similar(names[0], known(*types)))


def unknown_names(data: bytes, *types: type) -> list[str]:
    """Fields of `data` that none of the structs `types` declares. Raises MalformedBody when a name is no text."""
    try:
        return unknown(data, known(*types))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # what decoding skips, it does not check
        raise MalformedBody(str(error)) from error


def report_ignored(request: web.Request, names: list[str], meant: str | None = None) -> None:
    """The response will list `names` in `x-ignored-params`. Raises UnknownFields with `--strict-params`.

    meant: the known name that the first of them is like.
    """
    shown = header_value(names)
    if request.app[SERVER].config.strict_params:
        raise UnknownFields(shown, names[0], meant)
    request[IGNORED_PARAMS] = shown


def _with_path_first(message: str) -> str:
    """ "Expected X - at `$.a.b`" -> "a.b: Expected X", as TGI writes it."""
    match = _PATH.match(message)
    return f"{match['path']}: {match['what']}" if match is not None and match["path"] else message


def begin(request: web.Request) -> Call:
    """The call that `request` is from now on; app.py has given it its id."""
    return Call(request[REQUEST_ID], deadline=request.get(DEADLINE), trace=request.get(TRACE))


def json_response(answer: Any, headers: dict[str, str] | None = None) -> web.Response:
    """200 with `answer`, a struct or plain data."""
    return web.Response(body=_encode(answer), content_type=JSON, headers=headers)


def is_openai(request: web.Request) -> bool:
    """Whether the client speaks OpenAI's API rather than TGI's: by its path, unless a route found out otherwise."""
    return bool(request.get(SPEAKS_OPENAI, request.path.startswith("/v1/")))


def error_object(error: ApiError, *, openai: bool) -> ErrorResponse | OpenAIErrorResponse:
    """The JSON of `error`."""
    if not openai:
        return ErrorResponse(error.message, error.error_type)
    message, param = error.message, error.param
    for ours, theirs in _OPENAI_NAMES:
        message = message.replace(f"`{ours}`", f"`{theirs}`")
        param = theirs if param == ours else param
    status = http_status(error, openai=True)
    return OpenAIErrorResponse(OpenAIError(message, error.openai_type, param, error.code, status), error.error_type)


def http_status(error: ApiError, *, openai: bool) -> int:
    return error.openai_status if openai and error.openai_status is not None else error.status


def error_response(request: web.Request, error: ApiError) -> web.Response:
    """`error` as a whole response."""
    openai = is_openai(request)
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 504 or (openai and error.status == 424):
        # OpenAI's clients repeat these; a poisonous request must not come back, and a deadline was the client's own
        headers["x-should-retry"] = "false"
    return web.Response(
        status=http_status(error, openai=openai),
        body=_encode(error_object(error, openai=openai)),
        content_type=JSON,
        headers=headers,
    )


def compute_headers(request: web.Request, num_characters: int) -> dict[str, str]:
    """TGI's headers that are known before the first token."""
    return {
        "x-compute-type": request.app[SERVER].config.compute_type,
        "x-compute-characters": str(num_characters),
    }


def timing_headers(request: web.Request, choices: list[Choice], call: Call) -> dict[str, str]:
    """TGI's headers of a finished request. choices: one for each prompt; their numbers are added up."""
    times = [Timings.of(choice, call) for choice in choices]

    def milliseconds(seconds: list[float]) -> str:
        return str(int(sum(seconds) * 1000))

    return {
        "x-compute-type": request.app[SERVER].config.compute_type,
        "x-compute-time": f"{max(one.total for one in times):.9f}".rstrip("0").rstrip("."),
        "x-compute-characters": str(sum(len(choice.validated.text) for choice in choices)),
        "x-total-time": milliseconds([one.total for one in times]),
        "x-validation-time": milliseconds([one.validation for one in times]),
        "x-queue-time": milliseconds([one.queue for one in times]),
        "x-inference-time": milliseconds([one.inference for one in times]),
        "x-time-per-token": milliseconds([one.per_token for one in times]),
        "x-prompt-tokens": str(sum(len(choice.validated.request.token_ids) for choice in choices)),
        "x-generated-tokens": str(sum(choice.num_tokens for choice in choices)),
    }
