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


class _Text(NamedTuple):
    """A prompt as it is echoed: its text, and the characters at which its tokens begin."""

    text: str
    starts: Sequence[int]


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
        before, scored = "", []
        if self._echo:
            prompt = self._prompt(choice)
            before = prompt.text
            scored = self._scored_prompt(choice, prompt)
        scored += self._scored(choice.tokens, len(before))
        return openai.CompletionChoice(
            index=index,
            text=before + choice.text,
            logprobs=None if self._num_top is None else self._logprobs(scored),
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
            prompt = self._prompt(choice)
            self._offsets[choice.index] = len(prompt.text)
            scored = self._scored_prompt(choice, prompt)
            if not choice.validated.generates:
                return self._chunk(choice, prompt.text, scored, reason, is_last=True)
            echoed = self._chunk(choice, prompt.text, scored, b"null", is_last=False)
        self._num_tokens += 1
        scored = []
        if self._num_top is not None:
            offset = self._offsets.get(choice.index, 0)
            scored = self._scored([token], offset)
            self._offsets[choice.index] = offset + _length(token)
        return echoed + self._chunk(choice, token.shown, scored, reason, is_last=is_last)

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage, when it was asked for."""
        if not self._usage_at_end:
            return b""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._with_usage, _encode(usage(choices, self._copies)))

    def _chunk(self, choice: Choice, text: str, scored: list[_Scored], reason: bytes, *, is_last: bool) -> bytes:
        body = b'"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}]' % (
            choice.index,
            _encode(text),
            b"null" if self._num_top is None else _encode(self._logprobs(scored)),
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

    def _prompt(self, choice: Choice) -> _Text:
        """A prompt the client gave as text is echoed as it is, token ids as the text they stand for."""
        validated = choice.validated
        if validated.text:
            return _Text(validated.text, validated.token_starts or ())
        return _decoded(self._vocabulary, validated.request.token_ids)

    def _scored_prompt(self, choice: Choice, prompt: _Text) -> list[_Scored]:
        if self._num_top is None:
            return []
        ids = choice.validated.request.token_ids
        values = [None, *choice.prompt_logprob_values]
        top = [(), *(choice.prompt_top or [()] * (len(ids) - 1))]
        return [_Scored(*token) for token in zip(ids, prompt.starts, values, top, strict=True)]

    @staticmethod
    def _scored(tokens: Sequence[GeneratedToken], offset: int) -> list[_Scored]:
        """offset: characters of the text before the first of `tokens`."""
        scored = []
        for token in tokens:
            scored.append(_Scored(token.id, offset, token.logprob, token.top))
            offset += _length(token)
        return scored

    def _logprobs(self, scored: Sequence[_Scored]) -> openai.CompletionLogprobs:
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


def _decoded(vocabulary: Vocabulary, ids: Sequence[int]) -> _Text:
    """The text of token ids, without special tokens."""
    detokenizer = vocabulary.detokenizer(())
    pieces: list[str] = []
    starts, length = [], 0
    for token_id in ids:
        starts.append(length)
        piece = "" if token_id in vocabulary.special_ids else detokenizer.add(token_id)
        pieces.append(piece)
        length += len(piece)
    pieces.append(detokenizer.end())
    return _Text("".join(pieces), starts)
