"""The request as the core of the router knows it: token ids, limits and where the tokens go. No text, no HTTP.

`ValidRequest` is what validation promises; `Request` is the one mutable record of its life, owned by the scheduler.
Everything textual (detokenization, stop strings, SSE) hangs behind `TokenSink`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from tgi_proto import generate_pb2 as pb


class FinishReason(Enum):
    """Why a request ended, in TGI's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


Top = tuple[tuple[int, float], ...]  # (id, log-probability) of the most likely tokens, best first


class Token(NamedTuple):
    """One generated token. `top`: (id, logprob) by falling logprob, empty unless asked for. Logprobs are float32.

    A named tuple because one is made per token, and a frozen dataclass costs three times as much to make.
    """

    id: int
    logprob: float
    top: Top = ()


class ShardWork(NamedTuple):
    """What the shards have done since the router began, as of some moment: sums over the steps answered by then."""

    num_steps: int = 0
    forward_ns: int = 0  # model and sampling


class TokenSink(Protocol):
    """Where the batcher delivers what happens to a request. Called from the event loop; must not block or raise."""

    def prompt_logprobs(self, start: int, logprobs: list[float], top: list[Top]) -> None:
        """Log-probabilities of prompt tokens [start, start + len); comes before the first token, possibly in parts.

        top: the most likely tokens in the place of each; [] unless asked for.
        """

    def token(self, token: Token) -> FinishReason | None:
        """The next token. Returns the reason when the request ends with it, else None."""

    def failed(self, error: Exception) -> None:
        """The request ended without finishing; `error` is one of tgi_router.errors. Called at most once, last."""


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that has passed validation. prompt + max_new_tokens fits the configured limits."""

    token_ids: tuple[int, ...]  # prompt, never empty
    max_new_tokens: int  # >= 1
    sampling: pb.SamplingParameters  # made from parameters.py's table; opaque here
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    prompt_top_n_tokens: int = 0  # only with prompt_logprobs
    grammar: str = ""  # as the wire carries it; empty = any output
    cache_salt: str = ""  # requests share prefix-cache entries only within a salt (adapter, API key)


# (id of the parent entry or root, the block's tokens): the prefix cache's key
CacheKey = tuple[int, tuple[int, ...]]


class Phase(Enum):
    WAITING = "waiting"  # not admitted yet, or preempted, or interrupted by a crash
    RUNNING = "running"  # has blocks, and a row on the shards from its first step on
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One request's life. Changed only by the scheduler; times are the clock values handed to it, in seconds.

    token_ids:      p p p p p p g g g       prompt, then generated tokens whose ids the router has received
    scheduled:      |--------------->       tokens sent to the shards for computing, ahead of the answers
    acknowledged:   |----------->           by up to max_steps_in_flight steps
    pending:                          ? ?   sampled in steps not yet answered: known to the shards only
    """

    id: int  # unique for the life of the router, never reused
    valid: ValidRequest
    sink: TokenSink
    arrived_s: float
    label: str = ""  # what log lines call it: the id that its client knows
    phase: Phase = Phase.WAITING
    token_ids: list[int] = field(init=False)
    max_tokens: int = field(init=False)  # prompt and output at its longest
    num_scheduled_tokens: int = 0  # tokens with KV once every sent step is done (cached prefix included)
    num_acknowledged_tokens: int = 0  # the same, for answered steps only
    num_pending_tokens: int = 0  # tokens sampled in unanswered steps
    num_unanswered_steps: int = 0  # steps it takes part in that have been sent and not answered
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first admission (usage, metrics)
    blocks: list[int] = field(default_factory=list)  # block table, owned by the block manager
    num_committed_blocks: int = 0  # its first so many blocks are in the prefix cache; owned by the block manager
    cache_entry: int = 0  # id of the prefix cache's entry for the last of them (or the root); likewise
    computing: CacheKey | None = None  # running: the block it is computing; waiting: the one it waits for; likewise
    num_prompt_logprobs: int = 0  # handed to the sink so far
    row: bool = False  # the shards have a row for it, or will have when every sent step is done
    num_preemptions: int = 0
    num_crashes: int = 0  # crashes of the shard group while a step of this request was unanswered
    admitted_s: float | None = None  # first time it got a row
    first_token_s: float | None = None
    finished_s: float | None = None
    work: list[ShardWork] = field(default_factory=list)  # at each of these three moments, as far as they have come
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.valid.token_ids)
        self.max_tokens = len(self.token_ids) + self.valid.max_new_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.valid.token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Prompt log-probabilities are asked for and not all here; then the whole prompt has to be computed."""
        return self.valid.prompt_logprobs and self.num_prompt_logprobs < len(self.valid.token_ids) - 1

    @property
    def num_generated_tokens(self) -> int:
        """Generated tokens whose ids the router has received."""
        return len(self.token_ids) - len(self.valid.token_ids)
