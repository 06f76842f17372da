"""llguidance as both ends use it: one vocabulary and one set of limits, so that the shard can follow what was tried.

The router compiles a request's grammar and walks into it on trial, in a process that may be killed; the shard follows
it token by token. llguidance is imported by the first call, never before.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# What one grammar may cost. Fuel bounds work, not time; what it does not bound the router's trial does.
_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # 1 or 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # else they tell the whole schema
}


def load_tokenizer(model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> "LLTokenizer":
    """The vocabulary in tokenizer.json as llguidance knows it. 40 ms for 6,000 tokens, and more for more.

    vocab_size: rows of the model's output head. eos_token_ids: what ends a text; empty = as the tokenizer says.
    Holds the interpreter lock. Raises an Exception with llguidance's reason.
    """
    from llguidance import LLTokenizer

    path = str(model_dir / "tokenizer.json")
    ends = [token_id for token_id in eos_token_ids if token_id < vocab_size] or None
    own = LLTokenizer(path, eos_token=ends)
    return own if own.vocab_size >= vocab_size else LLTokenizer(path, n_vocab=vocab_size, eos_token=ends)


def make_matcher(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    """A matcher at the beginning of `grammar` (llguidance's JSON), which may be in an error state already.

    Releases the interpreter lock, as everything a matcher does.
    """
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))  # type: ignore[arg-type]


def first_line(error: str) -> str:
    """An error of llguidance as one short line."""
    text = error.strip().split("\n<state>", 1)[0]
    return " ".join(text.split())[:300]
