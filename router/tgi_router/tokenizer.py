"""The model's tokenizer: text to ids on threads, ids to text through its vocabulary, and what its config file says.

Reads `tokenizer.json` and `tokenizer_config.json` of the model's directory with the `tokenizers` library; never imports
transformers. Encoding happens on `--validation-workers` threads (the library releases the interpreter lock), so a long
prompt does not stop the event loop. Called by validation.py, /tokenize and, for its vocabulary, by infer.py.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tgi_proto.model_files import read_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from .detokenizer import Vocabulary
from .errors import StartupError

T = TypeVar("T")

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token of a text. start, stop: byte offsets in the text's UTF-8; 0, 0 for tokens the tokenizer added."""

    id: int
    text: str
    start: int
    stop: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when the file is not there. Raises StartupError when it is not a JSON object."""
    try:
        content = json.loads(read_file(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StartupError(f"`{path.name}` of the model cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StartupError(f"`{path.name}` of the model is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise StartupError(f"`{path.name}` of the model is not a JSON object")
    return content


def read_config(model_dir: Path, replacement: Path | None) -> dict[str, Any]:
    """What the model says about its tokenizer. replacement: of --tokenizer-config-path. Raises StartupError.

    special_tokens_map.json is older: as in transformers it plays no part beside `added_tokens_decoder`, and comes first
    otherwise; what the replacement says comes before it all the same.
    """
    config = read_json(replacement or model_dir / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    map_of_names = read_json(model_dir / "special_tokens_map.json")
    return map_of_names | config if replacement is not None else config | map_of_names


def token_name(value: Any) -> str | None:
    """The token in a field such as `bos_token`: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def special_names(config: dict[str, Any]) -> list[str]:
    """Every token that a tokenizer_config.json names as special."""
    values = [config.get(name) for name in SPECIAL_NAMES]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(field) or []
        values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    return [name for value in values if (name := token_name(value)) is not None]


class Tokenizer:
    """One per server."""

    def __init__(self, library: LibraryTokenizer, config: dict[str, Any], num_workers: int = 2) -> None:
        """config: tokenizer_config.json. num_workers: threads that encode and render."""
        library.no_truncation()
        library.no_padding()
        self._library = library
        self.config = config
        self.vocabulary = Vocabulary(library, special_names(config))
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="validation")
        vocabulary = library.get_vocab(with_added_tokens=True)
        self._longest_token = max((len(token) for token in vocabulary), default=1)

    @classmethod
    def load(cls, model_dir: Path, config: dict[str, Any], num_workers: int) -> "Tokenizer":
        """Reads tokenizer.json. Raises StartupError when there is none or it cannot be read."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise StartupError(
                "The model has no `tokenizer.json`; models that only have a slow tokenizer are not supported yet."
            )
        try:
            library = LibraryTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise StartupError(f"`tokenizer.json` of the model cannot be read: {error}") from error
        _add_tokens(library, config)
        return cls(library, config, num_workers)

    def eos_token_ids(self, named: Sequence[int]) -> frozenset[int]:
        """Ids that end a generation: `named` by the model's own configuration, and the tokenizer's."""
        name = token_name(self.config.get("eos_token"))
        own = self._library.token_to_id(name) if name is not None else None
        return frozenset(named) | ({own} if own is not None else frozenset())

    def token_id(self, text: str) -> int | None:
        """The token that is written so in the vocabulary."""
        token_id: int | None = self._library.token_to_id(text)
        return token_id

    @property
    def added_tokens(self) -> list[str]:
        """Texts of the tokens that were added to the vocabulary, special ones among them, by their ids."""
        return [token.content for _, token in sorted(self._library.get_added_tokens_decoder().items())]

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, without tokenizing it; 0 when nothing can be said."""
        if self._library.normalizer is not None:  # may make the text shorter by any factor
            return 0
        return len(text) // self._longest_token

    async def run(self, function: Callable[[], T]) -> T:
        """Runs `function` on one of the worker threads."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)

    # On a worker thread

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Ids of `text`."""
        return tuple(self._library.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_with_starts(self, text: str, *, add_special_tokens: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of `text`, and the character at which each begins; a token the tokenizer added begins where it stands."""
        encoding = self._library.encode(text, add_special_tokens=add_special_tokens)
        starts, at = [], 0
        for start, end in encoding.offsets:
            starts.append(start if end else at)
            at = max(at, end)
        return tuple(encoding.ids), tuple(starts)

    def tokens(self, text: str, *, add_special_tokens: bool) -> list[TextToken]:
        """Tokens of `text` with their places, as /tokenize shows them."""
        encoding = self._library.encode(text, add_special_tokens=add_special_tokens)
        at_byte = _byte_offsets(text)
        return [
            TextToken(token_id, text[start:stop], at_byte(start), at_byte(stop))
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]


def _add_tokens(library: LibraryTokenizer, config: dict[str, Any]) -> None:
    """Adds the tokens of `added_tokens_decoder`, and of the special names, that tokenizer.json does not list as added.

    Unlike in transformers nothing gets an id that its file does not name: it would be one the model has no row for.
    Raises StartupError when an entry is malformed.
    """
    decoder = config.get("added_tokens_decoder") or {}
    try:
        added = {int(token_id): AddedToken(**token) for token_id, token in decoder.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise StartupError(f"`added_tokens_decoder` of the model's tokenizer cannot be read: {error}") from error
    for token_id, token in sorted(added.items()):
        known = library.token_to_id(token.content)
        if known == token_id or (known is None and token_id == library.get_vocab_size(with_added_tokens=True)):
            library.add_tokens([token])
    listed = {token.content for token in library.get_added_tokens_decoder().values()}
    for name in special_names(config):
        if name not in listed and library.token_to_id(name) is not None:
            library.add_tokens([AddedToken(name, special=True)])
    library.encode_special_tokens = bool(config.get("split_special_tokens", False))


def _byte_offsets(text: str) -> Callable[[int], int]:
    """Character offset -> byte offset in UTF-8."""
    if text.isascii():
        return lambda index: index
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode()))
    return offsets.__getitem__
