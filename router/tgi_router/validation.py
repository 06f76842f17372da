"""A prompt and its parameters become a `ValidRequest`, or a ValidationError with TGI's sentence: parse, don't validate.

Owns the order of the checks and everything that needs the prompt's length; what a single parameter may be stands in
parameters.py. Called by infer.py after it has taken a permit.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import ValidationError
from .grammar_compiler import GrammarCompiler
from .grammars import Grammar, from_tgi
from .parameters import U64_MAX, GenerateParameters, Limits, check, round_to_f32, to_proto
from .request import ValidRequest
from .tokenizer import Tokenizer

# TGI generated in pieces of so many tokens; what it refused is still decided with it.
_TGI_PIECE = 1024
# Seeds of further choices lie this far apart (2^64 / golden ratio), so that no two of nearby seeds coincide.
_SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a route made of its request.

    text: the prompt, or a function that makes it (a chat template), which runs on a worker thread together with the
    tokenizer. ids: tokens the client gave instead of a text.
    grammar: what the output must spell, when the route decides that (`response_format`, tools), perhaps by the prompt's
    text (which may begin the output's thoughts) and then made on a worker thread; else `parameters.grammar` does.
    score: the prompt's own log-probabilities are wanted, each with so many alternatives. generates: false when nothing
    else is wanted; the parameters' `max_new_tokens` is 1 then, because a shard's step over a whole prompt samples.
    """

    text: str | Callable[[], str]
    parameters: GenerateParameters
    add_special_tokens: bool = True
    ids: tuple[int, ...] | None = None
    grammar: Grammar | Callable[[str], Grammar | None] | None = None
    score: int | None = None
    generates: bool = True


@dataclass(frozen=True, slots=True)
class Validated:
    """A request that may be submitted, and what its answer needs. seed: None when decoding is greedy."""

    request: ValidRequest
    text: str  # the whole prompt, as tokenized before truncation
    stop: tuple[str, ...]
    seed: int | None
    min_new_tokens: int = 0  # before so many tokens nothing but the length ends it
    generates: bool = True  # see Prompt
    token_starts: tuple[int, ...] | None = None  # characters of `text` at which the prompt's tokens begin, when scored


class Validator:
    """Holds the limits and the tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        eos_token_ids: Iterable[int] = (),
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """grammars: None = every grammar is refused."""
        self.grammars = grammars or GrammarCompiler(None)
        self._tokenizer = tokenizer
        self._end_token_ids = sorted(token_id for token_id in eos_token_ids if token_id < limits.vocab_size)
        self.limits = limits

    async def validate(self, prompt: Prompt, copies: int = 1) -> list[Validated]:
        """`copies` requests that differ in their seeds. Raises ValidationError."""
        parameters = prompt.parameters
        round_to_f32(parameters)
        check(parameters, self.limits, after_inputs=False)
        starts: tuple[int, ...] | None = None
        if prompt.ids is None:
            text, ids, starts = await self._tokenizer.run(lambda: self._tokenize(prompt))
        else:
            check(parameters, self.limits, after_inputs=True)
            text, ids = "", prompt.ids
        if parameters.truncate is not None:
            ids = ids[-parameters.truncate :]
        if not ids:
            raise ValidationError("`inputs` must have at least one token. Given: 0", param="inputs")
        max_new_tokens = self._max_new_tokens(parameters, len(ids))
        grammar = await self._compiled(prompt, text)
        samples = parameters.samples
        first_seed = 0
        if samples:
            first_seed = secrets.randbits(64) if parameters.seed is None else parameters.seed
        seeds = [(first_seed + copy * _SEED_STRIDE) & U64_MAX if samples else 0 for copy in range(copies)]
        return [
            Validated(
                ValidRequest(
                    token_ids=ids,
                    max_new_tokens=max_new_tokens,
                    sampling=to_proto(parameters, seed, self._end_token_ids),
                    top_n_tokens=parameters.top_n_tokens or 0,
                    prompt_logprobs=bool(parameters.decoder_input_details) or prompt.score is not None,
                    prompt_top_n_tokens=prompt.score or 0,
                    grammar=grammar,
                ),
                text=text,
                stop=tuple(parameters.stop or ()),
                seed=seed if samples else None,
                min_new_tokens=parameters.min_new_tokens or 0,
                generates=prompt.generates,
                token_starts=starts,
            )
            for seed in seeds
        ]

    async def _compiled(self, prompt: Prompt, text: str) -> str:
        """The grammar as the shards take it, empty when there is none."""
        make = prompt.grammar
        grammar = await self._tokenizer.run(lambda: make(text)) if callable(make) else make
        if grammar is None and prompt.parameters.grammar is not None:
            grammar = from_tgi(prompt.parameters.grammar)
        return "" if grammar is None else await self.grammars.compile(grammar)

    def _tokenize(self, prompt: Prompt) -> tuple[str, tuple[int, ...], tuple[int, ...] | None]:
        """The prompt's text and tokens, and where these begin when it is to be scored. On a worker thread."""
        text = prompt.text() if callable(prompt.text) else prompt.text
        if not text:
            raise ValidationError("`inputs` cannot be empty", param="inputs")
        check(prompt.parameters, self.limits, after_inputs=True)
        if prompt.parameters.truncate is None:
            self._refuse_endless(text)
        if prompt.score is not None:
            ids, starts = self._tokenizer.encode_with_starts(text, add_special_tokens=prompt.add_special_tokens)
            return text, ids, starts
        return text, self._tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens), None

    def _refuse_endless(self, text: str) -> None:
        """Refuses what cannot fit by its number of characters alone, before any work is spent on it."""
        fewest = self._tokenizer.fewest_tokens(text)
        if fewest > self.limits.max_input_tokens:
            raise _too_long(self.limits.max_input_tokens, f"at least {fewest}")

    def _max_new_tokens(self, parameters: GenerateParameters, num_input_tokens: int) -> int:
        """How many tokens to generate: what was asked for, at most what fits."""
        total = self.limits.max_total_tokens
        room = total - num_input_tokens
        asked = parameters.max_new_tokens
        piece = min(max(room, 0) if asked is None else asked, _TGI_PIECE)
        if num_input_tokens + piece > total:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {num_input_tokens} `inputs` tokens "
                f"and {piece} `max_new_tokens`. `--max-total-tokens` raises the limit",
                param="max_new_tokens",
                code="context_length_exceeded",
            )
        if num_input_tokens > self.limits.max_input_tokens:
            raise _too_long(self.limits.max_input_tokens, str(num_input_tokens))
        return room if asked is None else min(asked, room)


def check_copies(parameters: GenerateParameters, limits: Limits) -> None:
    """Raises ValidationError for a `best_of` that is never allowed, before it takes permits: no wait would help."""
    check(
        GenerateParameters(best_of=parameters.best_of, do_sample=parameters.asks_for_sampling),
        limits,
        after_inputs=False,
    )


def check_streamable(parameters: GenerateParameters) -> None:
    """Raises ValidationError for what a stream cannot show. TGI checks this before it takes a permit."""
    if parameters.best_of not in (None, 1):
        raise ValidationError("`best_of` != 1 is not supported when streaming tokens", param="best_of")
    if parameters.decoder_input_details:
        raise ValidationError(
            "`decoder_input_details` == true is not supported when streaming tokens", param="decoder_input_details"
        )


def _too_long(limit: int, given: str) -> ValidationError:
    return ValidationError(
        f"`inputs` must have less than {limit} tokens. Given: {given}. `--max-input-tokens` raises the limit",
        param="inputs",
        code="context_length_exceeded",
    )
