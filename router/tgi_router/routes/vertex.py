"""POST /vertex, and the same under the path that Vertex AI gives in `AIP_PREDICT_ROUTE`.

TGI's quirks stand: a prompt honours only `max_new_tokens` and `seed` and is always sampled, every failure of a
generation is a 500 that does not say which. What an instance asks for in vain is listed in `x-ignored-params`.
"""

import asyncio
from dataclasses import replace

import msgspec
from aiohttp import web

from ..bodies import SPEAKS_OPENAI, begin, decode, json_response, read, report_ignored, unknown_names
from ..errors import ApiError, IncompletePrediction, NoInstances, TemplateError, ToolError, WrongShape
from ..infer import Call
from ..openai_requests import prepare
from ..openapi import describe
from ..parameters import GenerateParameters, OpenAISampling
from ..schemas import openai
from ..schemas.platforms import VertexInstance, VertexParameters, VertexRequest, VertexResponse
from ..server import SERVER, Server
from ..stream import Rules
from ..validation import Prompt
from . import chat

routes = web.RouteTableDef()

_decoder = msgspec.json.Decoder(VertexRequest)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_instance_decoder = msgspec.json.Decoder(VertexInstance)
# Of a chat these change nothing here: there is one prediction, as text, and nothing is streamed.
_CHAT_IN_VAIN = ("stream", "stream_options", "n", "logprobs", "top_logprobs", "include_stop_str_in_output")


@routes.post("/vertex")
@describe(
    "Vertex AI",
    body=[VertexRequest],
    parts=[VertexInstance, openai.ChatRequest],
    answer=[VertexResponse],
    speaks="tgi",
    fails=[NoInstances, IncompletePrediction, TemplateError, ToolError],
    example={"instances": [{"inputs": "def fibonacci(n):", "parameters": {"max_new_tokens": 20}}]},
)
async def vertex(request: web.Request) -> web.Response:
    """Generate one text for each of several prompts or chats, all at once."""
    request[SPEAKS_OPENAI] = False
    server = request.app[SERVER]
    server.metrics.request_count.inc()
    data = await read(request, server.config.payload_limit)
    body = decode(data, _decoder)
    call = begin(request)
    try:
        server.infer.refuse_endless(len(body.instances), call)
    except ApiError as error:
        raise IncompletePrediction() from error
    in_vain = unknown_names(data, VertexRequest)
    asked = []
    for index, raw in enumerate(body.instances):
        prompt, rules, ignored = _understand(server, bytes(raw), call, f"instances[{index}]")
        asked.append((prompt, rules))
        in_vain += [f"instances[{index}].{name}" for name in ignored]
    if in_vain:
        report_ignored(request, in_vain)
    if not asked:
        raise NoInstances()
    return json_response(VertexResponse(await _predictions(server, asked, call)))


def _understand(server: Server, data: bytes, call: Call, place: str) -> tuple[Prompt, Rules, list[str]]:
    """(prompt, rules, fields that change nothing) of one instance. Raises ApiError."""
    try:
        instance = decode(data, _instance_decoder)
    except WrongShape as error:
        return _understand_chat(server, data, call, place, error)
    given = instance.parameters or VertexParameters()
    parameters = GenerateParameters(do_sample=True, max_new_tokens=given.max_new_tokens, seed=given.seed)
    server.metrics.request_count.inc()
    return Prompt(instance.inputs, parameters), Rules(), unknown_names(data, VertexInstance)


def _understand_chat(
    server: Server, data: bytes, call: Call, place: str, not_a_prompt: WrongShape
) -> tuple[Prompt, Rules, list[str]]:
    try:
        body = decode(data, chat.decoder)
    except WrongShape as error:
        meant = error if data.startswith(b"{") and "messages" in decode(data, _fields) else not_a_prompt
        reason = meant.message.removeprefix(meant.prefix)
        raise WrongShape(f"{place}: data did not match any variant of untagged enum VertexInstance: {reason}") from None
    asked = prepare(server, body, data, call, chat.prompts)
    in_vain = [name for name in _CHAT_IN_VAIN if getattr(body, name) is not None]
    in_vain += unknown_names(data, openai.ChatRequest, OpenAISampling)
    return asked.prompts[0], replace(asked.rules, streaming=False, keep_stop=True), in_vain


async def _predictions(server: Server, asked: list[tuple[Prompt, Rules]], call: Call) -> list[str]:
    """The texts; the first failure ends the others. Raises IncompletePrediction."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_predict(server, prompt, rules, call)) for prompt, rules in asked]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _predict(server: Server, prompt: Prompt, rules: Rules, call: Call) -> str:
    try:
        async with server.infer.open([prompt], rules, call) as stream:
            await stream.finish()
            return stream.choices[0].text
    except ApiError as error:  # counted and logged with its reason
        raise IncompletePrediction() from error
