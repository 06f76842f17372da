"""POST /v1/chat/completions, streamed and not."""

from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import msgspec
from aiohttp import web

from .. import sse
from ..bodies import json_response, timing_headers
from ..chat_answers import Answer
from ..chat_requests import prompts, reading
from ..errors import TemplateError, ToolError
from ..openai_requests import Understood, understand
from ..openapi import describe
from ..parameters import OpenAISampling
from ..schemas import openai
from ..schemas.errors import OpenAIErrorResponse
from ..schemas.openai_events import ChatChunk
from ..stream import Stream

__all__ = ["Answer", "begin_answer", "chat_completions", "decoder", "prompts", "routes"]

routes = web.RouteTableDef()

decoder = msgspec.json.Decoder(openai.ChatRequest)


@routes.post("/v1/chat/completions")
@describe(
    "OpenAI",
    body=[(openai.ChatRequest, OpenAISampling)],
    answer=[openai.ChatCompletion],
    events=[ChatChunk, OpenAIErrorResponse],
    generates=True,
    fails=[TemplateError, ToolError],
    example={"messages": [{"role": "user", "content": "What does os.path.join do?"}], "max_tokens": 40},
)
async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Give the assistant's next message, streamed when `stream` is true."""
    asked = await understand(request, decoder, prompts)
    answer, opened = begin_answer(asked)
    if asked.body.stream:
        return await sse.respond(request, opened, answer)
    async with opened as stream:
        await stream.finish()
        choices = stream.choices
    return json_response(answer.whole(choices), timing_headers(request, choices[:1], asked.call))


def begin_answer(asked: Understood[openai.ChatRequest]) -> tuple[Answer, AbstractAsyncContextManager[Stream]]:
    """The answer to be made and the generations it is made of, not yet begun. gRPC's chat begins here, too."""
    copies = asked.body.n or 1
    how = reading(asked.server, asked.body)
    rules = replace(asked.rules, visible_ids=how.visible_ids)
    opened = asked.server.infer.open(asked.prompts, rules, asked.call, copies=copies)
    return Answer(asked.server, asked.body, how, copies), opened
