"""TGI's own generation routes: POST /generate, /generate_stream and / (which is either, chosen by `stream`)."""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from .. import sse
from ..bodies import begin, json_response, parse, timing_headers
from ..float32 import raw, shortest
from ..openapi import describe
from ..parameters import GenerateParameters
from ..schemas import tgi
from ..server import SERVER, Server
from ..stream import Choice, GeneratedToken, Rules
from ..validation import Prompt

routes = web.RouteTableDef()

_generate_decoder = msgspec.json.Decoder(tgi.GenerateRequest)
compat_decoder = msgspec.json.Decoder(tgi.CompatGenerateRequest)
_encode = msgspec.json.encode
_TAG = "Text Generation Inference"
_EXAMPLE = {"inputs": "def fibonacci(n):", "parameters": {"max_new_tokens": 20}}


@routes.post("/generate")
@describe(_TAG, body=[tgi.GenerateRequest], answer=[tgi.GenerateResponse], generates=True, example=_EXAMPLE)
async def generate(request: web.Request) -> web.StreamResponse:
    """Generate tokens and answer when all are there."""
    server = request.app[SERVER]
    body = await parse(request, _generate_decoder)
    answer, headers = await generate_whole(request, server, body.inputs, body.given_parameters())
    return json_response(answer, headers)


@routes.post("/generate_stream")
@describe(
    _TAG, body=[tgi.GenerateRequest], events=[tgi.StreamResponse, tgi.ErrorResponse], generates=True, example=_EXAMPLE
)
async def generate_stream(request: web.Request) -> web.StreamResponse:
    """Generate a stream of tokens, each a server-sent event.

    The status is 200 once the body was understood; a later error is an event with the error's object.
    """
    server = request.app[SERVER]
    body = await parse(request, _generate_decoder)
    return await _generate_stream(request, server, body.inputs, body.given_parameters())


@routes.post("/")
@describe(
    _TAG,
    body=[tgi.CompatGenerateRequest],
    answer=[list[tgi.GenerateResponse]],
    events=[tgi.StreamResponse, tgi.ErrorResponse],
    generates=True,
    example=_EXAMPLE,
)
async def compat_generate(request: web.Request) -> web.StreamResponse:
    """Generate tokens, streamed when `stream` is true.

    The whole prompt is returned too when the model is one for text generation, or of an unknown kind.
    """
    server = request.app[SERVER]
    body = await parse(request, compat_decoder)
    parameters = body.given_parameters()
    if parameters.return_full_text is None:
        parameters.return_full_text = server.config.model_pipeline_tag in (None, "text-generation")
    if body.stream:
        return await _generate_stream(request, server, body.inputs, parameters)
    answer, headers = await generate_whole(request, server, body.inputs, parameters)
    return json_response([answer], headers)


async def generate_whole(
    request: web.Request, server: Server, inputs: str, parameters: GenerateParameters
) -> tuple[tgi.GenerateResponse, dict[str, str]]:
    """The answer and its headers. Raises ApiError. Other routes that generate in TGI's way end here, too."""
    call = begin(request)
    server.metrics.request_count.inc()
    copies = parameters.best_of or 1
    async with server.infer.open([Prompt(inputs, parameters)], Rules(), call, copies=copies) as stream:
        await stream.finish()
        choices = stream.choices
    best = best_of(choices)
    return whole_answer(server, inputs, parameters, choices), timing_headers(request, [best], call)


def best_of(choices: Sequence[Choice]) -> Choice:
    """The one to answer with; the first of equals."""
    return max(choices, key=lambda choice: choice.mean_logprob)


def whole_answer(
    server: Server, inputs: str, parameters: GenerateParameters, choices: Sequence[Choice]
) -> tgi.GenerateResponse:
    """The answer made of the finished `choices`, over HTTP or gRPC."""
    best = best_of(choices)
    before = inputs if parameters.return_full_text else ""
    answer = tgi.GenerateResponse(generated_text=before + best.text)
    if parameters.details or parameters.decoder_input_details:
        answer.details = _details(server, best)
        if len(choices) > 1:
            others = [choice for choice in choices if choice is not best]
            answer.details.best_of_sequences = [_sequence(server, choice, before) for choice in others]
    return answer


def _details(server: Server, choice: Choice) -> tgi.Details:
    details = tgi.Details(
        finish_reason=_reason(choice),
        generated_tokens=choice.num_tokens,
        seed=choice.validated.seed,
        prefill=_prefill(server, choice),
        tokens=[tgi.Token(t.id, t.text, raw(t.logprob), t.special) for t in choice.tokens],
    )
    if choice.validated.request.top_n_tokens:
        details.top_tokens = [_top_tokens(server, token) for token in choice.tokens]
    return details


def _sequence(server: Server, choice: Choice, before: str) -> tgi.BestOfSequence:
    details = _details(server, choice)
    return tgi.BestOfSequence(
        generated_text=before + choice.text,
        finish_reason=details.finish_reason,
        generated_tokens=details.generated_tokens,
        seed=details.seed,
        prefill=details.prefill,
        tokens=details.tokens,
        top_tokens=details.top_tokens,
    )


def _reason(choice: Choice) -> tgi.FinishReasonName:
    return choice.finished_for.value


def _prefill(server: Server, choice: Choice) -> list[tgi.PrefillToken]:
    """The prompt's tokens; nothing precedes the first, so its log-probability is null."""
    if not choice.validated.request.prompt_logprobs:
        return []
    vocabulary = server.tokenizer.vocabulary
    logprobs = [float("nan"), *choice.prompt_logprob_values]
    return [
        tgi.PrefillToken(token_id, vocabulary.text(token_id), raw(logprob))
        for token_id, logprob in zip(choice.validated.request.token_ids, logprobs, strict=True)
    ]


def _top_tokens(server: Server, token: GeneratedToken) -> list[tgi.Token]:
    vocabulary = server.tokenizer.vocabulary
    return [
        tgi.Token(token_id, vocabulary.text(token_id), raw(logprob), token_id in vocabulary.special_ids)
        for token_id, logprob in token.top
    ]


async def _generate_stream(
    request: web.Request, server: Server, inputs: str, parameters: GenerateParameters
) -> web.StreamResponse:
    """The status is 200 whatever happens: TGI's clients look for errors among the events."""
    server.metrics.request_count.inc()
    events = _Events(server, parameters, inputs if parameters.return_full_text else "")
    opened = server.infer.open([Prompt(inputs, parameters)], Rules(streaming=True), begin(request))
    return await sse.respond(request, opened, events, num_characters=len(inputs))


class _Events:
    """Makes the events of one stream. Bytes are put together by hand: it happens once per token."""

    terminator = b""  # TGI's own streams just end

    def __init__(self, server: Server, parameters: GenerateParameters, before: str) -> None:
        self._server = server
        self._details = bool(parameters.details)
        self._before = before
        self._index = 0

    def render(self, choice: Choice, token: GeneratedToken) -> bytes:
        self._index += 1
        text = details = b"null"
        if token is choice.last_token:
            text = _encode(self._before + choice.text)
            details = self._stream_details(choice)
        top = b""
        if token.top:
            top = b'"top_tokens":%b,' % _encode(_top_tokens(self._server, token))
        return (
            b'data: {"index":%d,"token":{"id":%d,"text":%b,"logprob":%b,"special":%b},%b'
            b'"generated_text":%b,"details":%b}\n\n'
        ) % (
            self._index,
            token.id,
            _encode(token.text),
            shortest(token.logprob).encode(),
            b"true" if token.special else b"false",
            top,
            text,
            details,
        )

    def last(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def _stream_details(self, choice: Choice) -> bytes:
        if not self._details:
            return b"null"
        return _encode(
            tgi.StreamDetails(
                finish_reason=_reason(choice),
                generated_tokens=choice.num_tokens,
                seed=choice.validated.seed,
                input_length=len(choice.validated.request.token_ids),
            )
        )
