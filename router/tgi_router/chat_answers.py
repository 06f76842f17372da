"""The answer to a chat: an object, or server-sent events. Both are made of the same `MessageEvent`s, so they agree.

Called by routes/chat.py, and through it by gRPC.
"""

import uuid
from collections.abc import Sequence

import msgspec

from .chat_requests import Reading
from .message import Message, MessageEvent, MessageParser, Reasoning
from .openai_answers import Identity, chat_logprob, finish_reason, usage
from .request import FinishReason
from .schemas import openai
from .server import Server
from .stream import Choice, GeneratedToken
from .tools.base import CallArguments, CallBegin, CallEnd, Text

_encode = msgspec.json.encode


class _Speaker:
    """What one choice has said so far."""

    __slots__ = ("message", "parser")

    def __init__(self, parser: MessageParser) -> None:
        self.parser = parser
        self.message = Message()

    def hear_all(self, tokens: Sequence[GeneratedToken]) -> None:
        """All that is said; the same as token by token, at a fraction of the time."""
        place = 0
        while place < len(tokens) and self.parser.counts_tokens:
            self._add(self.parser.feed(tokens[place].shown))
            place += 1
        self._add(self.parser.feed("".join([token.shown for token in tokens[place:]])))
        self._add(self.parser.end())

    def _add(self, events: Sequence[MessageEvent]) -> None:
        for event in events:
            self.message.add(event)

    def hear(self, token: GeneratedToken, *, last: bool) -> list[bytes]:
        """What the next token says, as the insides of OpenAI's deltas."""
        events = self.parser.feed(token.shown)
        if last:
            events += self.parser.end()
        deltas = []
        for event in events:
            self.message.add(event)
            if not isinstance(event, CallEnd):
                deltas.append(_delta(event, len(self.message.calls) - 1))
        return deltas


class Answer:
    """Makes the answer to one request, whole or as events."""

    terminator = b"data: [DONE]\n\n"

    def __init__(self, server: Server, body: openai.ChatRequest, reading: Reading, copies: int) -> None:
        """copies: choices."""
        self._identity = Identity(server, "chatcmpl", body.model)
        self._vocabulary = server.tokenizer.vocabulary
        self._reading = reading
        self._speakers: dict[int, _Speaker] = {}  # by the choice's index; empty when text is just text
        self._logprobs = bool(body.logprobs)
        self._num_top = body.top_logprobs or 0
        self._copies = copies
        self._usage_at_end = body.include_usage
        self._usage_always = body.continuous_usage
        self._num_tokens = 0  # in chunks so far
        identity = self._identity
        self._head = (
            b'data: {"object":"chat.completion.chunk","id":%b,"created":%d,"model":%b,"system_fingerprint":%b,'
            % (
                _encode(identity.id),
                identity.created,
                _encode(identity.model),
                _encode(identity.system_fingerprint),
            )
        )

    # Whole

    def whole(self, choices: Sequence[Choice]) -> openai.ChatCompletion:
        """The answer of a request that does not stream."""
        identity = self._identity
        read = [self._choice(choice) for choice in choices]
        return openai.ChatCompletion(
            object="chat.completion",
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=read,
            usage=self._usage(choices),
        )

    def _choice(self, choice: Choice) -> openai.ChatChoice:
        message = openai.Message(content=choice.text)
        reason: openai.ChatFinishReason = finish_reason(choice)
        if not self._reading.is_plain:
            speaker = self._speaker(choice)
            speaker.hear_all(choice.tokens)
            message = _message(speaker.message)
            reason = _reason(choice, speaker.message)
        return openai.ChatChoice(
            index=choice.index,
            message=message,
            logprobs=self._chat_logprobs(choice.tokens),
            finish_reason=reason,
        )

    # Events

    def render(self, choice: Choice, token: GeneratedToken) -> bytes:
        """The chunks of one token: one, when text is just text; else as many as it says things, perhaps none."""
        self._num_tokens += 1
        last = token is choice.last_token
        if self._reading.is_plain:
            reason = _encode(finish_reason(choice)) if last else b"null"
            return self._chunk(choice, b'"content":%b' % _encode(token.shown), self._token_logprobs(token), reason)
        speaker = self._speaker(choice)
        deltas = speaker.hear(token, last=last)
        if not deltas and (last or self._logprobs):
            deltas = [b""]
        chunks = []
        for number, delta in enumerate(deltas, start=1):
            final = number == len(deltas)
            reason = _encode(_reason(choice, speaker.message)) if last and final else b"null"
            chunks.append(self._chunk(choice, delta, self._token_logprobs(token) if final else b"null", reason))
        return b"".join(chunks)

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage, when it was asked for."""
        if not self._usage_at_end:
            return b""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._head, _encode(self._usage(choices)))

    def _chunk(self, choice: Choice, delta: bytes, logprobs: bytes, reason: bytes) -> bytes:
        """One event. The role stands in each choice's first only: OpenAI's clients concatenate it."""
        if not choice.started:
            choice.started = True
            delta = b'"role":"assistant",%b' % delta if delta else b'"role":"assistant"'
        so_far = b"null"
        if self._usage_always:
            so_far = _encode(self._usage(choice.siblings, self._num_tokens))
        return b'%b"choices":[{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":%b}],"usage":%b}\n\n' % (
            self._head,
            choice.index,
            delta,
            logprobs,
            reason,
            so_far,
        )

    # Both

    def _speaker(self, choice: Choice) -> _Speaker:
        speaker = self._speakers.get(choice.index)
        if speaker is None:
            speaker = self._speakers[choice.index] = _Speaker(self._reading.parser(choice.validated.text))
        return speaker

    def _usage(self, choices: Sequence[Choice], so_far: int | None = None) -> openai.Usage:
        result = usage(choices, self._copies, so_far)
        if self._reading.dialect.marks is not None:
            thoughts = sum(speaker.parser.num_reasoning_tokens for speaker in self._speakers.values())
            result.completion_tokens_details = openai.CompletionTokensDetails(thoughts)
        return result

    def _token_logprobs(self, token: GeneratedToken) -> bytes:
        return _encode(self._chat_logprobs([token])) if self._logprobs else b"null"

    def _chat_logprobs(self, tokens: Sequence[GeneratedToken]) -> openai.ChatLogprobs | None:
        if not self._logprobs:
            return None
        return openai.ChatLogprobs([chat_logprob(self._vocabulary, token, self._num_top) for token in tokens])


def _message(said: Message) -> openai.Message:
    message = openai.Message(content=said.content)
    if said.reasoning:
        message.reasoning_content = said.reasoning
    if said.calls:
        message.content = said.content or None
        message.tool_calls = [
            openai.ToolCall(id=_call_id(), function=openai.CalledFunction(call.name, call.arguments))
            for call in said.calls
        ]
    return message


def _reason(choice: Choice, said: Message) -> openai.ChatFinishReason:
    """A called tool always finishes as such, unless the call was cut off."""
    cut_off = choice.finished_for is FinishReason.LENGTH and not (said.calls and said.calls[-1].complete)
    return "tool_calls" if said.calls and not cut_off else finish_reason(choice)


def _delta(event: Text | Reasoning | CallBegin | CallArguments, index: int) -> bytes:
    """The inside of OpenAI's `delta`. index: of the call that began last."""
    if isinstance(event, Text):
        return b'"content":%b' % _encode(event.text)
    if isinstance(event, Reasoning):
        return b'"reasoning_content":%b' % _encode(event.text)
    if isinstance(event, CallArguments):
        return b'"tool_calls":[{"index":%d,"function":{"arguments":%b}}]' % (index, _encode(event.text))
    return b'"tool_calls":[{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":""}}]' % (
        index,
        _encode(_call_id()),
        _encode(event.name),
    )


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex}"
