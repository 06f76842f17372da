"""POST /tokenize and /chat_tokenize: a prompt's tokens, with nothing generated. No permit is needed, as in TGI."""

import msgspec
from aiohttp import web

from ..bodies import JSON, begin, decode, parse, read, report_unknown
from ..errors import TemplateError, ToolError
from ..openai_requests import prepare
from ..openapi import describe
from ..parameters import OpenAISampling
from ..schemas import openai, tgi
from ..server import SERVER
from ..tokenizer import TextToken, Tokenizer
from ..validation import Prompt
from . import chat

routes = web.RouteTableDef()

_decoder = msgspec.json.Decoder(tgi.GenerateRequest)
_TAG = "Text Generation Inference"


@routes.post("/tokenize")
@describe(_TAG, body=[tgi.GenerateRequest], answer=[list[tgi.SimpleToken]], example={"inputs": "def fibonacci(n):"})
async def tokenize(request: web.Request) -> web.Response:
    """Tokenize a prompt as it would be for a generation; `truncate` plays no part."""
    server = request.app[SERVER]
    body = await parse(request, _decoder)

    def work() -> bytes:  # all of it on a worker thread: a long text makes millions of objects
        return msgspec.json.encode(_simple(server.tokenizer.tokens(body.inputs, add_special_tokens=True)))

    return web.Response(body=await server.tokenizer.run(work), content_type=JSON)


@routes.post("/chat_tokenize")
@describe(
    _TAG,
    body=[(openai.ChatRequest, OpenAISampling)],
    answer=[tgi.ChatTokenizeResponse],
    fails=[TemplateError, ToolError],
    example={"messages": [{"role": "user", "content": "What does os.path.join do?"}]},
)
async def chat_tokenize(request: web.Request) -> web.Response:
    """Render a chat with the model's template and tokenize it."""
    server = request.app[SERVER]
    data = await read(request, server.config.payload_limit)
    body = decode(data, chat.decoder)
    report_unknown(request, data, openai.ChatRequest, OpenAISampling)
    (prompt,) = prepare(server, body, data, begin(request), chat.prompts).prompts
    return web.Response(
        body=await server.tokenizer.run(lambda: _chat_answer(server.tokenizer, prompt)), content_type=JSON
    )


def _chat_answer(tokenizer: Tokenizer, prompt: Prompt) -> bytes:
    """The body. On a worker thread. Raises TemplateError."""
    text = prompt.text() if callable(prompt.text) else prompt.text
    tokens = _simple(tokenizer.tokens(text, add_special_tokens=prompt.add_special_tokens))
    return msgspec.json.encode(tgi.ChatTokenizeResponse(tokens, text))


def _simple(tokens: list[TextToken]) -> list[tgi.SimpleToken]:
    return [tgi.SimpleToken(token.id, token.text, token.start, token.stop) for token in tokens]
