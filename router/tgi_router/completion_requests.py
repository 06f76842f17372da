"""What a request to /v1/completions asks for: one or several prompts, as text or as token ids, to continue or to score.

Called by routes/completions.py.
"""

from typing import Any

import msgspec

from .errors import BatchSizeExceeded, SuffixNotSupported, ValidationError, WrongShape
from .grammars import from_response_format
from .openai_answers import check_at_most
from .openai_requests import check_choices
from .parameters import from_openai
from .schemas import openai
from .server import Server
from .validation import Prompt


def prompts(server: Server, body: openai.CompletionRequest, sampling: msgspec.Struct) -> list[Prompt]:
    """One for each prompt. Raises ApiError for what cannot be had."""
    if body.suffix:
        raise SuffixNotSupported()
    given = _several(body.prompt)
    if len(given) > server.config.max_client_batch_size:
        raise BatchSizeExceeded(server.config.max_client_batch_size)
    check_choices(server, body.n, best_of=body.best_of, num_prompts=len(given))
    limits = server.infer.validator.limits
    check_at_most("logprobs", body.logprobs, limits.max_top_n_tokens, "--max-top-n-tokens", least=0)
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise ValidationError("`best_of` > `n` is not supported when streaming tokens", param="best_of")
    grammar = from_response_format(body.response_format)
    generates = not (body.echo and body.max_tokens == 0)
    wanted = {"stop": body.stops, "top_n_tokens": body.logprobs, "max_new_tokens": body.max_tokens if generates else 1}
    return [
        Prompt(
            text="" if isinstance(prompt, tuple) else prompt,
            parameters=from_openai(sampling, limits, **wanted),
            ids=_known(prompt, limits.vocab_size) if isinstance(prompt, tuple) else None,
            score=body.logprobs if body.echo else None,
            grammar=grammar,
            generates=generates,
        )
        for prompt in given
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


def _known(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """`ids`, all of them in the vocabulary."""
    wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise ValidationError(
            f"`prompt` must contain token ids >= 0 and < {vocab_size}. Given: {wrong}", param="prompt"
        )
    return ids
