"""Token ids to text, one token at a time, never splitting a character.

`Vocabulary` knows the text of single tokens, once per model; a `Detokenizer` is the state of one generation. For
byte-level and byte-fallback tokenizers every id is some bytes, so a token costs one table look-up and one incremental
UTF-8 step; whether that is so is read from the tokenizer's decoder and then verified against the library's own decode.
Every other tokenizer is decoded in a window that moves along (prefix and read offset). A text that ends inside a
character ends in one U+FFFD. Special tokens have a text of their own but are no part of the generated text.

Invalid UTF-8 becomes one U+FFFD per maximal invalid part. The library does the same for byte-level tokenizers; for
byte-fallback it replaces every byte of a run that is not valid as a whole, which no stream can reproduce.
"""

import codecs
import json
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer as LibraryTokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT = 5  # prompt tokens before the output that a windowed decode sees, so that it knows it is not at a start
_MAX_WINDOW = 64  # tokens after which an unfinished character is given up


class Detokenizer(Protocol):
    """State of one generation."""

    def add(self, token_id: int) -> str:
        """The text that is complete with this token; "" inside a character. Not for special tokens."""

    def end(self) -> str:
        """What is left: "" or one U+FFFD."""


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _ByteLevelPieces(dict[int, bytes]):
    """id -> bytes of a byte-level tokenizer, computed when first asked for."""

    def __init__(self, library: LibraryTokenizer) -> None:
        super().__init__()
        self._library = library
        self._alphabet = _byte_level_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = self._library.id_to_token(token_id) or ""
        try:
            piece = bytes([self._alphabet[character] for character in token])
        except KeyError:  # an added token with characters outside the alphabet stands for itself
            piece = token.encode()
        self[token_id] = piece
        return piece


class _SentencePiecePieces(dict[int, bytes]):
    """id -> bytes of a sentencepiece-like tokenizer: U+2581 is a space, `<0xAB>` a byte."""

    def __init__(self, library: LibraryTokenizer) -> None:
        super().__init__()
        self._library = library

    def __missing__(self, token_id: int) -> bytes:
        token = self._library.id_to_token(token_id) or ""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            piece = bytes([int(token[3:5], 16)])
        else:
            piece = token.replace("\u2581", " ").encode()
        self[token_id] = piece
        return piece


Pieces = _ByteLevelPieces | _SentencePiecePieces


class ByteDetokenizer:
    """For tokenizers whose ids are bytes."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token_id: int) -> str:
        return self._decode(self._pieces[token_id])

    def end(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For all others: decodes [prefix, end) and [prefix, read) and takes the difference.

    ids:      c c c c c g g g g g
                        ^prefix ^read      text of [prefix, read) has been shown
    """

    __slots__ = ("_ids", "_library", "_prefix", "_read")

    def __init__(self, library: LibraryTokenizer, context: Sequence[int]) -> None:
        self._library = library
        self._ids = list(context[-_CONTEXT:])
        self._prefix = 0
        self._read = len(self._ids)

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        shown, text = self._texts()
        if len(text) <= len(shown) or (text.endswith(_REPLACEMENT) and len(self._ids) - self._read < _MAX_WINDOW):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text[len(shown) :]

    def end(self) -> str:
        shown, text = self._texts()
        return text[len(shown) :].rstrip(_REPLACEMENT) + _REPLACEMENT if len(text) > len(shown) else ""

    def _texts(self) -> tuple[str, str]:
        return self._library.decode(self._ids[: self._read]), self._library.decode(self._ids)


class Vocabulary:
    """What is known about single tokens."""

    def __init__(self, library: LibraryTokenizer, special_names: Sequence[str] = ()) -> None:
        """special_names: tokens that tokenizer_config.json names as special, whatever tokenizer.json says."""
        self._library = library
        self._texts: dict[int, str] = {}
        special = {token_id for token_id, added in library.get_added_tokens_decoder().items() if added.special}
        special.update(token_id for name in special_names if (token_id := library.token_to_id(name)) is not None)
        self.special_ids = frozenset(special)
        self._pieces = _byte_pieces(library, self.special_ids)

    @property
    def is_bytes(self) -> bool:
        """Whether ids are bytes, so that detokenization is a table look-up."""
        return self._pieces is not None

    def text(self, token_id: int) -> str:
        """The token decoded alone, special or not, as TGI shows prompt tokens and alternatives."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._library.decode([token_id], skip_special_tokens=False)
        return text

    def bytes(self, token_id: int) -> bytes:
        """The token's own bytes, for OpenAI's `logprobs.bytes`."""
        return self._pieces[token_id] if self._pieces is not None else self.text(token_id).encode()

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """For a generation that follows `prompt`."""
        if self._pieces is not None:
            return ByteDetokenizer(self._pieces)
        return WindowDetokenizer(self._library, prompt)


def _decoder_steps(library: LibraryTokenizer) -> list[dict[str, object]]:
    """The tokenizer's decoder as a flat list of steps, as they are written in tokenizer.json."""
    if library.decoder is None:
        return []
    state = json.loads(library.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_pieces(library: LibraryTokenizer, special_ids: frozenset[int]) -> Pieces | None:
    """The table for `library` when its ids are bytes, verified on a sample; else None."""
    steps = _decoder_steps(library)
    kinds = [step["type"] for step in steps]
    pieces: Pieces
    if kinds == ["ByteLevel"]:
        pieces = _ByteLevelPieces(library)
    elif kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and _spaces(steps):
        pieces = _SentencePiecePieces(library)
    else:
        return None
    return pieces if _verified(library, pieces, special_ids) else None


def _spaces(steps: list[dict[str, object]]) -> bool:
    """Whether the replacing steps do nothing but turn U+2581 into a space."""
    return all(
        (step["type"] != "Replace" or (step["pattern"] == {"String": "\u2581"} and step["content"] == " "))
        and (step["type"] != "Metaspace" or step["replacement"] == "\u2581")
        for step in steps
    )


def _verified(library: LibraryTokenizer, pieces: Pieces, special_ids: frozenset[int]) -> bool:
    """Whether table and library agree on ids spread over the vocabulary, a few at a time."""
    size = library.get_vocab_size()
    sample = [token_id for token_id in range(0, size, max(1, size // 512)) if token_id not in special_ids]
    for start in range(0, len(sample), 4):
        ids = sample[start : start + 4]
        theirs = library.decode(ids, skip_special_tokens=False)
        ours = b"".join(pieces[token_id] for token_id in ids).decode(errors="replace")
        if theirs not in (ours, ours.removeprefix(" ")) and _REPLACEMENT not in theirs:
            return False
    return True
