"""POST /v1/completions, streamed and not."""

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from .. import sse
from ..bodies import json_response, timing_headers
from ..errors import BatchSizeExceeded, SuffixNotSupported, ValidationError, WrongShape
from ..openai_answers import Identity, check_at_most, completion_logprobs, finish_reason, usage
from ..openai_requests import understand
from ..openapi import describe
from ..parameters import GenerateParameters, OpenAISampling, from_openai
from ..schemas import openai
from ..server import Server
from ..stream import Choice, GeneratedToken
from ..validation import Prompt

routes = web.RouteTableDef()

decoder = msgspec.json.Decoder(openai.CompletionRequest)
_encode = msgspec.json.encode


@routes.post("/v1/completions")
@describe(
    "OpenAI",
    body=[(openai.CompletionRequest, OpenAISampling)],
    answer=[openai.Completion],
    events=[Any],
    generates=True,
    fails=[SuffixNotSupported, BatchSizeExceeded],
    example={"prompt": "def fibonacci(n):", "max_tokens": 20, "temperature": 0},
)
async def completions(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts, streamed when `stream` is true."""
    asked = await understand(request, decoder, _prompts)
    server, body, call = asked.server, asked.body, asked.call
    wanted = body.n or 1
    copies = max(wanted, body.best_of or 1)
    answer = _Answer(server, body, wanted, copies)
    opened = server.infer.open(asked.prompts, asked.rules, call, copies=copies)
    if body.stream:
        return await sse.respond(request, opened, answer)
    async with opened as stream:
        await stream.finish()
        choices = stream.choices
    headers = timing_headers(request, choices[::copies], call)
    del headers["x-compute-time"]  # TGI has it on its other routes only
    return json_response(answer.whole(choices), headers)


def _prompts(server: Server, body: openai.CompletionRequest, sampling: msgspec.Struct) -> list[Prompt]:
    """What the request asks for. Raises ApiError for what cannot be had."""
    if body.suffix is not None:
        raise SuffixNotSupported()
    body.refuse()
    if body.echo:
        raise ValidationError("`echo` is not supported yet", param="echo")
    limits = server.infer.validator.limits
    check_at_most("n", body.n, limits.max_best_of, "--max-best-of", least=1)
    check_at_most("best_of", body.best_of, limits.max_best_of, "--max-best-of", least=body.n or 1)
    check_at_most("logprobs", body.logprobs, limits.max_top_n_tokens, "--max-top-n-tokens", least=0)
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise ValidationError("`best_of` > `n` is not supported when streaming tokens", param="best_of")
    texts = _several(body.prompt)
    if len(texts) > server.config.max_client_batch_size:
        raise BatchSizeExceeded(server.config.max_client_batch_size)
    vocab_size = server.batcher.info.vocab_size
    return [
        _prompt(
            text,
            vocab_size,
            from_openai(sampling, limits, max_new_tokens=body.max_tokens, stop=body.stops, top_n_tokens=body.logprobs),
        )
        for text in texts
    ]


def _several(prompt: str | list[Any]) -> list[str | tuple[int, ...]]:
    """The prompts: a text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise WrongShape("prompt: Empty array detected. Do not use an empty array for the prompt.")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if _are_ids(prompt):
        return [tuple(prompt)]
    if all(isinstance(item, list) and _are_ids(item) for item in prompt):
        return [tuple(item) for item in prompt]
    raise WrongShape("prompt: Expected `str`, or an `array` of `str`, of `int`, or of arrays of `int`")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _prompt(prompt: str | tuple[int, ...], vocab_size: int, parameters: GenerateParameters) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(prompt, parameters)
    wrong = next((token_id for token_id in prompt if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise ValidationError(
            f"`prompt` must contain token ids >= 0 and < {vocab_size}. Given: {wrong}", param="prompt"
        )
    return Prompt("", parameters, ids=prompt)


class _Answer:
    """Makes the answer to one request, whole or as events."""

    terminator = b"data: [DONE]\n\n"

    def __init__(self, server: Server, body: openai.CompletionRequest, wanted: int, copies: int) -> None:
        """wanted: choices shown for each prompt, the best of `copies`."""
        identity = self._identity = Identity(server, "cmpl", body.model)
        self._vocabulary = server.tokenizer.vocabulary
        self._num_top = body.logprobs
        self._wanted = wanted
        self._copies = copies
        self._usage_at_end = body.include_usage
        self._usage_always = body.continuous_usage
        self._num_tokens = 0  # in chunks so far
        self._offsets: dict[int, int] = {}  # choice -> characters sent
        start = b'data: {"object":"text_completion","id":%b,"created":%d,' % (_encode(identity.id), identity.created)
        names = b'"model":%b,"system_fingerprint":%b' % (_encode(identity.model), _encode(identity.system_fingerprint))
        # As in TGI, the identity stands after the choices, except in a chunk with usage.
        self._plain = start, b"," + names + b"}\n\n"
        self._with_usage = start + names + b","

    def whole(self, choices: Sequence[Choice]) -> openai.Completion:
        """The answer of a request that does not stream, choices in the order of the prompts."""
        identity = self._identity
        shown: list[Choice] = []
        for first in range(0, len(choices), self._copies):
            group = sorted(choices[first : first + self._copies], key=lambda choice: -choice.mean_logprob)
            best = group if self._copies == self._wanted else group[: self._wanted]
            shown += sorted(best, key=lambda choice: choice.index)
        return openai.Completion(
            object="text_completion",
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=[
                openai.CompletionChoice(
                    index=index,
                    text=choice.text,
                    logprobs=self._logprobs(choice, choice.tokens),
                    finish_reason=finish_reason(choice),
                )
                for index, choice in enumerate(shown)
            ],
            usage=usage(choices, self._copies),
        )

    def render(self, choice: Choice, token: GeneratedToken) -> bytes:
        """One chunk."""
        is_last = token is choice.last_token
        body = b'"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}]' % (
            choice.index,
            _encode(token.shown),
            b"null" if self._num_top is None else _encode(self._logprobs(choice, [token])),
            _encode(finish_reason(choice)) if is_last else b"null",
        )
        self._num_tokens += 1
        if self._usage_always:
            numbers = usage(choice.siblings, self._copies, self._num_tokens)
        elif is_last and not self._usage_at_end:  # TGI's: the last chunk of a prompt has its usage
            numbers = usage([choice], 1)
        else:
            return body.join(self._plain)
        return b'%b%b,"usage":%b}\n\n' % (self._with_usage, body, _encode(numbers))

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage, when it was asked for."""
        if not self._usage_at_end:
            return b""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._with_usage, _encode(usage(choices, self._copies)))

    def _logprobs(self, choice: Choice, tokens: Sequence[GeneratedToken]) -> openai.CompletionLogprobs | None:
        if self._num_top is None:
            return None
        offset = self._offsets.get(choice.index, 0)
        self._offsets[choice.index] = offset + sum(len(token.text) for token in tokens)
        return completion_logprobs(self._vocabulary, tokens, self._num_top, offset)
