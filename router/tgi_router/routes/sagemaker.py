"""POST /invocations, SageMaker's one route: the body's shape says which of the other routes is meant."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from ..bodies import SPEAKS_OPENAI, decode, read
from ..errors import BatchSizeExceeded, SuffixNotSupported, TemplateError, ToolError, WrongShape
from ..openapi import describe
from ..parameters import OpenAISampling
from ..schemas import openai, tgi
from ..schemas.errors import OpenAIErrorResponse
from ..schemas.openai_events import ChatChunk, CompletionChunk
from ..server import SERVER
from . import chat, completions, generate

routes = web.RouteTableDef()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_NO_MATCH = "data did not match any variant of untagged enum SagemakerRequest"
# In TGI's order: the first that fits is taken. The field tells which one was meant when none fits.
_SHAPES: tuple[tuple[str, msgspec.json.Decoder[Any], Handler, bool], ...] = (
    ("inputs", generate.compat_decoder, generate.compat_generate, False),
    ("messages", chat.decoder, chat.chat_completions, True),
    ("prompt", completions.decoder, completions.completions, True),
)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


@routes.post("/invocations")
@describe(
    "SageMaker",
    body=[
        tgi.CompatGenerateRequest,
        (openai.ChatRequest, OpenAISampling),
        (openai.CompletionRequest, OpenAISampling),
    ],
    answer=[list[tgi.GenerateResponse], openai.ChatCompletion, openai.Completion],
    events=[tgi.StreamResponse, ChatChunk, CompletionChunk, tgi.ErrorResponse, OpenAIErrorResponse],
    generates=True,
    speaks="both",
    fails=[TemplateError, ToolError, SuffixNotSupported, BatchSizeExceeded],
    example={"inputs": "def fibonacci(n):", "parameters": {"max_new_tokens": 20}},
)
async def invocations(request: web.Request) -> web.StreamResponse:
    """Generate in the way the body asks for: as POST /, /v1/chat/completions or /v1/completions."""
    data = await read(request, request.app[SERVER].config.payload_limit)
    handler, request[SPEAKS_OPENAI] = _route_of(data)
    return await handler(request)  # which finds the body read


def _route_of(data: bytes) -> tuple[Handler, bool]:
    """(the handler of the first shape that `data` has, whether it is OpenAI's). Raises MalformedBody, WrongShape."""
    reasons = {}
    for field, decoder, handler, speaks_openai in _SHAPES:
        try:
            decode(data, decoder)
        except WrongShape as error:
            reasons[field] = error.message.removeprefix(error.prefix)
        else:
            return handler, speaks_openai
    given = decode(data, _fields)
    reason = next((text for field, text in reasons.items() if field in given), None)
    raise WrongShape(_NO_MATCH if reason is None else f"{_NO_MATCH}: {reason}")
