"""The text side of generations: a `Choice` is the batcher's sink for one request, a `Stream` what one handler reads.

A choice makes text of its tokens, decides when to stop, and puts each token into its stream's buffer. Sinks and reader
run in turns of one event loop, so nothing here locks. Made by infer.py, read by routes/*. The hot path of the router:
`Choice.token` runs once per token.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .detokenizer import Vocabulary
from .errors import Bug, IncompleteGeneration, IncompleteGenerationStream
from .metrics import Metrics
from .request import FinishReason, Request, Token, Top
from .stopping import StopStrings
from .validation import Validated

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
# Tokens a stream holds for a client that does not read, beside the socket's own buffers; then it is cut.
MAX_UNREAD_TOKENS = 4096


class GeneratedToken(NamedTuple):
    """A token as routes see it; a named tuple because one is made per token.

    text: its text as TGI shows it, "" inside a character. shown: what it adds to the generated text, which leaves out
    special tokens and, on OpenAI's routes, stop strings (so that text may be shown later than its token).
    """

    id: int
    logprob: float
    text: str
    special: bool
    shown: str
    top: Top


@dataclass(frozen=True, slots=True)
class Shared:
    """What all choices of a server use."""

    vocabulary: Vocabulary
    eos_token_ids: frozenset[int]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Rules:
    """How a route wants its choices ended and shown."""

    streaming: bool = False  # wake the reader for every token, else only at the end
    keep_stop: bool = True  # the stop string stays in the text (TGI)
    ignore_eos: bool = False
    visible_ids: frozenset[int] = frozenset()  # special tokens that are part of the generated text all the same


class Stream:
    """The events of one handler's choices, in the order they happened. One task reads it."""

    def __init__(self, *, streaming: bool, copies: int = 1) -> None:
        """copies: choices of each prompt."""
        self.choices: list[Choice] = []  # prompt 0's first
        self.on_stall: Callable[[], None] | None = None  # called once when the client does not read
        # Set by the reader: writes a token at once, without waking it; False when that cannot be done now. Waking a
        # task for every token would cost a fifth of the router's time.
        self.write_now: Callable[[Choice, GeneratedToken], bool] | None = None
        self.streaming = streaming
        self._copies = copies
        self._error: Exception | None = None
        self._unread: list[tuple[Choice, GeneratedToken]] = []
        self._waiter: asyncio.Future[bool] | None = None
        self._num_open = 0
        self._waiting_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def first_choices(self) -> "list[Choice]":
        """One choice for each prompt."""
        return self.choices[:: self._copies]

    async def next(self) -> list[tuple["Choice", GeneratedToken]] | None:
        """The tokens that came since the last call and were not written at once; None when all choices are over.

        [] after 15 s without a token.

        Raises the first failure of a choice, after the tokens before it were read.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._num_open == 0:
                return None
            if await self._wait():
                break
        unread, self._unread = self._unread, []
        return unread

    async def finish(self) -> None:
        """Waits for the end of every choice. Raises the first failure."""
        while self._error is None and self._num_open > 0:
            await self._wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """No more waiting."""
        if self._timer is not None:
            self._timer.cancel()

    # The choices' side

    def opened(self, choice: "Choice") -> None:
        self.choices.append(choice)
        self._num_open += 1

    def put(self, choice: "Choice", token: GeneratedToken) -> None:
        """One more token of `choice`."""
        unread = self._unread
        if self.write_now is not None and not unread and self.write_now(choice, token):
            self._waiting_since_s = time.monotonic()
            return
        unread.append((choice, token))
        if len(unread) > MAX_UNREAD_TOKENS and self.on_stall is not None:
            on_stall, self.on_stall = self.on_stall, None
            name = {} if choice.request is None else {"request_id": choice.request.label}
            logger.info("Ended: %d tokens wait for a client that does not read", len(unread), extra=name)
            on_stall()
        if self._waiter is not None:
            self._wake()

    def closed(self) -> None:
        """A choice has ended."""
        self._num_open -= 1
        if self.streaming or self._num_open == 0:
            self._wake()

    def fail(self, error: Exception) -> None:
        """A choice has failed; the first failure is the stream's."""
        if isinstance(error, IncompleteGeneration) and self.streaming:
            error = IncompleteGenerationStream()
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self, *, idle: bool = False) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(idle)

    async def _wait(self) -> bool:
        """Waits for a wake-up; True when it is the keep-alive timer's.

        One timer per stream, moved on lazily: starting and cancelling one per token would cost as much as the token.
        """
        loop = asyncio.get_running_loop()
        self._waiting_since_s = time.monotonic()
        if self._timer is None and self.streaming:
            self._timer = loop.call_later(KEEP_ALIVE_S, self._keep_alive, loop)
        self._waiter = loop.create_future()
        return await self._waiter

    def _keep_alive(self, loop: asyncio.AbstractEventLoop) -> None:
        left_s = self._waiting_since_s + KEEP_ALIVE_S - time.monotonic()
        if left_s <= 0:
            self._wake(idle=True)
            left_s = KEEP_ALIVE_S
        self._timer = loop.call_later(left_s, self._keep_alive, loop)


class Choice:
    """One generated sequence: while it runs the TokenSink of its request, afterwards its result."""

    def __init__(self, validated: Validated, stream: Stream, shared: Shared, rules: Rules) -> None:
        self.validated = validated
        self.index = len(stream.choices)
        self.request: Request | None = None  # set as soon as it was submitted
        self.tokens: list[GeneratedToken] = []  # empty when streaming
        self.prompt_logprob_values: list[float] = []  # of prompt tokens 1, 2, ...
        self.prompt_top: list[Top] = []  # of the same, when asked for
        self.num_tokens = 0
        self.started = False  # for the route: the first event was written
        self.finish_reason: FinishReason | None = None
        self.last_token: GeneratedToken | None = None  # set with the finish reason
        self._shown: list[str] = []
        self._stream = stream
        self._rules = rules
        self._metrics = shared.metrics
        self._vocabulary = shared.vocabulary
        self._special_ids = shared.vocabulary.special_ids
        self._visible_ids = rules.visible_ids
        self._eos_token_ids = frozenset[int]() if rules.ignore_eos else shared.eos_token_ids
        self._detokenizer = shared.vocabulary.detokenizer(validated.request.token_ids)
        self._stop = StopStrings(validated.stop, keep=rules.keep_stop) if validated.stop else None
        self._max_new_tokens = validated.request.max_new_tokens
        self._created_s = self._last_token_s = time.monotonic()
        stream.opened(self)

    # TokenSink

    def prompt_logprobs(self, start: int, logprobs: list[float], top: list[Top]) -> None:
        """See TokenSink."""
        self.prompt_logprob_values[start - 1 :] = logprobs  # what is computed again replaces itself
        self.prompt_top[start - 1 :] = top

    def token(self, token: Token) -> FinishReason | None:
        """See TokenSink."""
        token_id, logprob, top = token
        self._record_time()
        self.num_tokens += 1
        special = token_id in self._special_ids
        if special:
            text = self._vocabulary.text(token_id)
            shown = text if token_id in self._visible_ids else ""
        else:
            text = shown = self._detokenizer.add(token_id)
        stop = self._stop
        if stop is not None:
            shown = stop.add(shown, counts=self._may_stop)
        reason = self._reason(token_id)
        if reason is not None and (stop is None or not stop.found):
            shown += self._rest()
        if self._rules.keep_stop and not special:
            text = shown
        self._shown.append(shown)
        event = GeneratedToken(token_id, logprob, text, special, shown, top)
        if reason is not None:
            self.finish_reason, self.last_token = reason, event
        if self._rules.streaming:
            self._stream.put(self, event)
        else:
            self.tokens.append(event)
        if reason is not None:
            self._stream.closed()
        return reason

    def failed(self, error: Exception) -> None:
        """See TokenSink."""
        self._stream.fail(error)

    def _record_time(self) -> None:
        now_s = time.monotonic()
        if self.num_tokens:
            self._metrics.request_inter_token_duration.observe(now_s - self._last_token_s)
        else:
            self._metrics.request_time_to_first_token_duration.observe(now_s - self._created_s)
        self._last_token_s = now_s

    def _reason(self, token_id: int) -> FinishReason | None:
        """TGI's order: length, end of sequence, stop string. A stop string that is removed always counts."""
        found = self._stop is not None and self._stop.found
        if found and not self._rules.keep_stop:
            return FinishReason.STOP_SEQUENCE
        if self.num_tokens >= self._max_new_tokens:
            return FinishReason.LENGTH
        if token_id in self._eos_token_ids:
            return FinishReason.EOS_TOKEN
        return FinishReason.STOP_SEQUENCE if found else None

    def _rest(self) -> str:
        """What the detokenizer and the stop strings still hold when the generation ends."""
        rest = self._detokenizer.end()
        return rest if self._stop is None else self._stop.add(rest, counts=self._may_stop) + self._stop.end()

    @property
    def _may_stop(self) -> bool:
        """The minimum length is passed."""
        return self.num_tokens > self.validated.min_new_tokens

    # Results

    @property
    def siblings(self) -> "list[Choice]":
        """All choices of the same handler, this one included."""
        return self._stream.choices

    @property
    def finished_for(self) -> FinishReason:
        """Why it ended; only of a choice that has."""
        if self.finish_reason is None:
            raise Bug("the reason of a choice was asked for before its end. This is a bug.")
        return self.finish_reason

    @property
    def text(self) -> str:
        """The generated text so far."""
        return "".join(self._shown)

    @property
    def mean_logprob(self) -> float:
        """By which `best_of` chooses; a mean that is not finite is the worst."""
        mean = sum(token.logprob for token in self.tokens) / max(1, len(self.tokens))
        return mean if math.isfinite(mean) else -math.inf


class Scoring(Choice):
    """Of a request that only wants its prompt's log-probabilities: the one token that is sampled is not shown."""

    def token(self, token: Token) -> FinishReason | None:
        """See TokenSink."""
        self._record_time()
        self.finish_reason = FinishReason.LENGTH
        self.last_token = GeneratedToken(token.id, token.logprob, text="", special=False, shown="", top=())
        if self._rules.streaming:
            self._stream.put(self, self.last_token)
        self._stream.closed()
        return self.finish_reason
