"""POST /v1/completions, streamed and not."""

import msgspec
from aiohttp import web

from .. import sse
from ..bodies import json_response, timing_headers
from ..completion_answers import Answer
from ..completion_requests import prompts
from ..errors import BatchSizeExceeded, SuffixNotSupported
from ..openai_requests import understand
from ..openapi import describe
from ..parameters import OpenAISampling
from ..schemas import openai
from ..schemas.errors import OpenAIErrorResponse
from ..schemas.openai_events import CompletionChunk

routes = web.RouteTableDef()

decoder = msgspec.json.Decoder(openai.CompletionRequest)


@routes.post("/v1/completions")
@describe(
    "OpenAI",
    body=[(openai.CompletionRequest, OpenAISampling)],
    answer=[openai.Completion],
    events=[CompletionChunk, OpenAIErrorResponse],
    generates=True,
    fails=[SuffixNotSupported, BatchSizeExceeded],
    example={"prompt": "def fibonacci(n):", "max_tokens": 20, "temperature": 0},
)
async def completions(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts, streamed when `stream` is true."""
    asked = await understand(request, decoder, prompts)
    server, body, call = asked.server, asked.body, asked.call
    wanted = body.n or 1
    copies = max(wanted, body.best_of or 1)
    answer = Answer(server, body, wanted, copies)
    opened = server.infer.open(asked.prompts, asked.rules, call, copies=copies)
    if body.stream:
        return await sse.respond(request, opened, answer)
    async with opened as stream:
        await stream.finish()
        choices = stream.choices
    headers = timing_headers(request, choices[::copies], call)
    del headers["x-compute-time"]  # TGI has it on its other routes only
    if body.echo and body.logprobs is not None:  # 10 µs for each token of the prompts: not while everybody waits
        whole = await server.tokenizer.run(lambda: msgspec.json.encode(answer.whole(choices)))
        return json_response(msgspec.Raw(whole), headers)
    return json_response(answer.whole(choices), headers)
