"""KServe's Open Inference Protocol, version 2, as far as TGI speaks it: /v2/*.

Every model name and version answers: one model is served. Like TGI's, liveness never looks at the shards and a failed
generation is a 500 that does not say why; unlike TGI's, readiness is the truth.
"""

import asyncio

import msgspec
from aiohttp import web
from msgspec import UNSET

from ..bodies import begin, json_response, parse
from ..errors import ApiError, IncompletePrediction, LengthMismatch, NotUtf8, Unhealthy, WrongShape
from ..openapi import describe
from ..parameters import GenerateParameters
from ..schemas.platforms import (
    KServeInput,
    KServeLive,
    KServeMetadata,
    KServeOutput,
    KServeRequest,
    KServeRequestedOutput,
    KServeResponse,
)
from ..server import SERVER
from .generate import generate_whole

routes = web.RouteTableDef()

_decoder = msgspec.json.Decoder(KServeRequest)
_TAG = "KServe"
_MODEL = "/v2/models/{model_name}"
_VERSION = _MODEL + "/versions/{model_version}"


@routes.get("/v2")
@describe(_TAG, answer=[KServeMetadata])
async def kserve_server_metadata(request: web.Request) -> web.Response:
    """Name and version of the server."""
    version = request.app[SERVER].version
    return json_response(KServeMetadata("text-generation-inference", version, ["health", "models", "metrics"]))


@routes.get("/v2/health/live")
@describe(_TAG, answer=[KServeLive])
async def kserve_health_live(request: web.Request) -> web.Response:
    """Whether the process answers."""
    return json_response(KServeLive(True))


@routes.get("/v2/health/ready")
@routes.get(_MODEL + "/ready")
@routes.get(_VERSION + "/ready")
@describe(_TAG, answer=[KServeLive], fails=[Unhealthy])
async def kserve_ready(request: web.Request) -> web.Response:
    """Whether the model can serve."""
    if not request.app[SERVER].healthy:
        raise Unhealthy()
    return json_response(KServeLive(True))


@routes.get(_MODEL)
@routes.get(_VERSION)
@describe(_TAG, answer=[KServeMetadata])
async def kserve_model_metadata(request: web.Request) -> web.Response:
    """What can be asked of the model."""
    name, version = request.match_info["model_name"], request.match_info.get("model_version", "1")
    return json_response(KServeMetadata(name, version, ["infer", "ready"]))


@routes.post(_MODEL + "/infer")
@routes.post(_VERSION + "/infer")
@describe(
    _TAG,
    body=[KServeRequest],
    answer=[KServeResponse],
    fails=[LengthMismatch, NotUtf8, IncompletePrediction],
    example={
        "id": "1",
        "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["def fibonacci(n):"]}],
        "outputs": [{"name": "text"}],
        "parameters": {"max_new_tokens": 20},
    },
)
async def kserve_model_infer(request: web.Request) -> web.Response:
    """Generate one text for each of several prompts."""
    body = await parse(request, _decoder)
    server = request.app[SERVER]
    try:
        server.infer.refuse_endless(len(body.inputs), begin(request))
    except ApiError as error:
        raise IncompletePrediction() from error
    prompts = [_text(index, given) for index, given in enumerate(body.inputs)]
    outputs = body.outputs
    if outputs is None:
        outputs = [KServeRequestedOutput(name=given.name) for given in body.inputs]
    if len(prompts) != len(outputs):
        raise LengthMismatch()
    parameters = body.parameters or GenerateParameters(do_sample=True)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(generate_whole(request, server, prompt, parameters)) for prompt in prompts]
    except ExceptionGroup as failed:  # the first ended the others; it was counted and logged
        first = failed.exceptions[0]
        if isinstance(first, ApiError):
            raise IncompletePrediction() from first
        raise first from None
    texts = [task.result()[0].generated_text for task in tasks]
    identity = UNSET if body.id is None else body.id
    return json_response(KServeResponse(id=identity, outputs=list(map(_output, texts, body.inputs, outputs))))


def _text(index: int, given: KServeInput) -> str:
    """The prompt in `given`. Raises NotUtf8, WrongShape."""
    numbers = [item for item in given.data if isinstance(item, int)]
    texts = [item for item in given.data if isinstance(item, str)]
    if texts:
        if len(given.data) == 1:
            return texts[0]
        raise WrongShape(f"inputs[{index}].data: Expected an array of bytes, or of one `str`")
    try:
        return bytes(numbers).decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(f"`inputs[{index}].data` is not UTF-8: {error.reason} at byte {error.start}") from error


def _output(text: str, given: KServeInput, wanted: KServeRequestedOutput) -> KServeOutput:
    if given.data and isinstance(given.data[0], str):
        return KServeOutput(wanted.name, [1], "BYTES", [text])
    data = list(text.encode())
    return KServeOutput(wanted.name, [1, len(data)], "BYTES", data)
