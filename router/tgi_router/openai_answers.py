"""What answers on /v1/* have in common: identity, usage, finish reasons, log-probabilities, limits with OpenAI's names.

Called by routes/chat.py and routes/completions.py.
"""

import math
import time
import uuid
from collections.abc import Sequence

import msgspec

from .detokenizer import Vocabulary
from .errors import ValidationError
from .float32 import raw
from .request import FinishReason
from .schemas import openai
from .server import Server
from .stream import Choice, GeneratedToken

_MINUS_INFINITY = msgspec.Raw(b"-9999.0")  # OpenAI's own stand-in: its clients parse no null here


class Identity:
    """What is the same in every chunk of an answer."""

    def __init__(self, server: Server, prefix: str, model: str | None) -> None:
        """prefix: "chatcmpl" or "cmpl". model: as the client called it; echoed, as TGI does."""
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = server.config.model_id if model in (None, "", "tgi") else model
        self.system_fingerprint = server.system_fingerprint


def finish_reason(choice: Choice) -> openai.FinishReasonName:
    """TGI's reason in OpenAI's words."""
    return "length" if choice.finished_for is FinishReason.LENGTH else "stop"


def usage(choices: Sequence[Choice], copies: int, completion: int | None = None) -> openai.Usage:
    """A prompt counts once, however many choices continue it. completion: tokens so far; None = of the whole answer."""
    prompt = sum(len(choice.validated.request.token_ids) for choice in choices[::copies])
    cached = sum(choice.request.num_cached_tokens for choice in choices[::copies] if choice.request is not None)
    if completion is None:
        completion = sum(choice.num_tokens for choice in choices)
    return openai.Usage(prompt, completion, prompt + completion, openai.PromptTokensDetails(cached))


def logprob(value: float) -> msgspec.Raw:
    return raw(value) if math.isfinite(value) else _MINUS_INFINITY


def chat_logprob(vocabulary: Vocabulary, token: GeneratedToken, num_top: int) -> openai.ChatLogprob:
    """One token of `logprobs.content`. Ties beyond num_top are left out."""
    return openai.ChatLogprob(
        token=token.text,
        logprob=logprob(token.logprob),
        bytes=list(vocabulary.bytes(token.id)),
        top_logprobs=[
            openai.TopLogprob(vocabulary.text(token_id), logprob(value), list(vocabulary.bytes(token_id)))
            for token_id, value in token.top[:num_top]
        ],
    )


def check_at_most(name: str, value: int | None, limit: int, flag: str, *, least: int) -> None:
    """Raises ValidationError when `value` is outside [least, limit]."""
    if value is not None and not least <= value <= limit:
        raise ValidationError(
            f"`{name}` must be >= {least} and <= {limit}. Given: {value}. `{flag}` raises the limit", param=name
        )
