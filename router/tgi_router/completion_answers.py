"""The answer of /v1/completions: an object, or server-sent events whose parts add up to that object.

With `echo` the prompt stands before the generated text, with its own log-probabilities when `logprobs` is given.
Called by routes/completions.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from .detokenizer import Vocabulary
from .openai_answers import Identity, finish_reason, logprob, usage
from .request import Top
from .schemas import openai
from .server import Server
from .stream import Choice, GeneratedToken

_encode = msgspec.json.encode
_NULL = msgspec.Raw(b"null")


class _Scored(NamedTuple):
    """A token with its log-probability. start: characters of the answer's text before it."""

    id: int
    start: int
    logprob: float | None  # None: nothing precedes the token
    top: Top


class _Echo(NamedTuple):
    """A prompt as it is echoed."""

    text: str
    logprobs: openai.CompletionLogprobs | None


class Answer:
    """Makes the answer to one request, whole or as events."""

    terminator = b"data: [DONE]\n\n"

    def __init__(self, server: Server, body: openai.CompletionRequest, wanted: int, copies: int) -> None:
        """wanted: choices shown for each prompt, the best of `copies`."""
        identity = self._identity = Identity(server, "cmpl", body.model)
        self._vocabulary = server.tokenizer.vocabulary
        self._num_top = body.logprobs
        self._echo = bool(body.echo)
        self._wanted = wanted
        self._copies = copies
        self._usage_at_end = body.include_usage
        self._usage_always = body.continuous_usage
        self._num_tokens = 0  # generated, in chunks so far
        self._offsets: dict[int, int] = {}  # choice -> characters sent
        self._echoes: dict[int, _Echo] = {}  # by prompt: it is the same for all of its choices
        start = b'data: {"object":"text_completion","id":%b,"created":%d,' % (_encode(identity.id), identity.created)
        names = b'"model":%b,"system_fingerprint":%b' % (_encode(identity.model), _encode(identity.system_fingerprint))
        # As in TGI, the identity stands after the choices, except in a chunk with usage.
        self._plain = start, b",%b%b}\n\n" % (names, b',"usage":null' if self._usage_at_end else b"")
        self._with_usage = start + names + b","

    # Whole

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
            choices=[self._choice(index, choice) for index, choice in enumerate(shown)],
            usage=usage(choices, self._copies),
        )

    def _choice(self, index: int, choice: Choice) -> openai.CompletionChoice:
        before = self._echoed(choice) if self._echo else _Echo("", None)
        logprobs = self._logprobs(self._scored(choice.tokens, len(before.text)))
        if before.logprobs is not None and logprobs is not None:
            logprobs = _together(before.logprobs, logprobs)
        return openai.CompletionChoice(
            index=index,
            text=before.text + choice.text,
            logprobs=logprobs,
            finish_reason=finish_reason(choice),
        )

    # Events

    def render(self, choice: Choice, token: GeneratedToken) -> bytes:
        """The chunk of one token; a prompt to be echoed is a chunk before the first."""
        is_last = token is choice.last_token
        reason = _encode(finish_reason(choice)) if is_last else b"null"
        echoed = b""
        if self._echo and not choice.started:
            choice.started = True
            prompt = self._echoed(choice)
            self._offsets[choice.index] = len(prompt.text)
            if not choice.validated.generates:
                return self._chunk(choice, *prompt, reason, is_last=True)
            echoed = self._chunk(choice, *prompt, b"null", is_last=False)
        self._num_tokens += 1
        logprobs = None
        if self._num_top is not None:
            offset = self._offsets.get(choice.index, 0)
            logprobs = self._logprobs(self._scored([token], offset))
            self._offsets[choice.index] = offset + _length(token)
        return echoed + self._chunk(choice, token.shown, logprobs, reason, is_last=is_last)

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage, when it was asked for."""
        if not self._usage_at_end:
            return b""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._with_usage, _encode(usage(choices, self._copies)))

    def _chunk(
        self, choice: Choice, text: str, logprobs: openai.CompletionLogprobs | None, reason: bytes, *, is_last: bool
    ) -> bytes:
        body = b'"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}]' % (
            choice.index,
            _encode(text),
            b"null" if logprobs is None else _encode(logprobs),
            reason,
        )
        if self._usage_always:
            numbers = usage(choice.siblings, self._copies, self._num_tokens)
        elif is_last and not self._usage_at_end:  # TGI's: the last chunk of a prompt has its usage
            numbers = usage([choice], 1)
        else:
            return body.join(self._plain)
        return b'%b%b,"usage":%b}\n\n' % (self._with_usage, body, _encode(numbers))

    # Both

    def _echoed(self, choice: Choice) -> _Echo:
        """A prompt the client gave as text is echoed as it is, token ids as the text they stand for."""
        number = choice.index // self._copies
        if number not in self._echoes:
            validated = choice.validated
            ids, text, starts = validated.request.token_ids, validated.text, validated.token_starts or ()
            if not text:
                text, starts = _decoded(self._vocabulary, ids)
            scored = []
            if self._num_top is not None:
                values = [None, *choice.prompt_logprob_values]
                top = [(), *(choice.prompt_top or [()] * (len(ids) - 1))]
                scored = [_Scored(*token) for token in zip(ids, starts, values, top, strict=True)]
            self._echoes[number] = _Echo(text, self._logprobs(scored))
        return self._echoes[number]

    @staticmethod
    def _scored(tokens: Sequence[GeneratedToken], offset: int) -> list[_Scored]:
        """offset: characters of the text before the first of `tokens`."""
        scored = []
        for token in tokens:
            scored.append(_Scored(token.id, offset, token.logprob, token.top))
            offset += _length(token)
        return scored

    def _logprobs(self, scored: Sequence[_Scored]) -> openai.CompletionLogprobs | None:
        if self._num_top is None:
            return None
        return openai.CompletionLogprobs(
            tokens=[_name(self._vocabulary, token.id) for token in scored],
            token_logprobs=[_NULL if token.logprob is None else logprob(token.logprob) for token in scored],
            top_logprobs=[None if token.logprob is None else self._top(token) for token in scored],
            text_offset=[token.start for token in scored],
        )

    def _top(self, token: _Scored) -> dict[str, msgspec.Raw]:
        """The likeliest tokens, best first, and in any case the token itself: so there may be one more than asked for.

        Of tokens with the same text the likeliest counts. Ties beyond the number asked for are left out.
        """
        found: dict[str, msgspec.Raw] = {}
        for token_id, value in (*token.top[: self._num_top], (token.id, token.logprob or 0.0)):
            found.setdefault(_name(self._vocabulary, token_id), logprob(value))
        return found


def _together(a: openai.CompletionLogprobs, b: openai.CompletionLogprobs) -> openai.CompletionLogprobs:
    return openai.CompletionLogprobs(
        tokens=a.tokens + b.tokens,
        token_logprobs=a.token_logprobs + b.token_logprobs,
        top_logprobs=a.top_logprobs + b.top_logprobs,
        text_offset=a.text_offset + b.text_offset,
    )


def _length(token: GeneratedToken) -> int:
    """Characters by which a token makes the text longer."""
    return 0 if token.special else len(token.text)


def _name(vocabulary: Vocabulary, token_id: int) -> str:
    """A token as text; what is only a part of a character as its bytes, as OpenAI writes them."""
    if token_id in vocabulary.special_ids:
        return vocabulary.text(token_id)
    data = vocabulary.bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _decoded(vocabulary: Vocabulary, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """The text of token ids, without special tokens, and the characters at which they begin."""
    detokenizer = vocabulary.detokenizer(())
    pieces: list[str] = []
    starts, length = [], 0
    for token_id in ids:
        starts.append(length)
        piece = "" if token_id in vocabulary.special_ids else detokenizer.add(token_id)
        pieces.append(piece)
        length += len(piece)
    pieces.append(detokenizer.end())
    return "".join(pieces), tuple(starts)
