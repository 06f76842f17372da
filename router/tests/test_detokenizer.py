"""Text that comes in pieces is the text that comes at once, for every kind of tokenizer."""

import json
from collections.abc import Callable
from functools import cache

import pytest
from api_kit import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tgi_router.detokenizer import Vocabulary, WindowDetokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["hello world, what a day. ", "日本語 😀😃👍🏽 é über ", "one two three "] * 10


@cache
def byte_level() -> Tokenizer:
    return Tokenizer.from_str(tiny_tokenizer())


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2's: U+2581 for spaces, bytes for what is unknown, the first space of a text is dropped."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in ["\u2581", "\u2581hello", "\u2581world", *"abcdefghijklmnopqrstuvwxyz.,", "é", "日", "\u2581日"]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in ["\u2581a", "\u2581b", "c", "é"])], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    """As BERT's: continuation pieces start with ##, so a token's text depends on its neighbours."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    return tokenizer


def streamed(vocabulary: Vocabulary, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    """The pieces, special tokens left out as choices leave them out."""
    detokenizer = vocabulary.detokenizer(prompt or [])
    pieces = [detokenizer.add(token_id) for token_id in ids if token_id not in vocabulary.special_ids]
    return [*pieces, detokenizer.end()]


@given(st.lists(st.integers(0, 510), max_size=40))
def test_byte_level_pieces_concatenate_to_the_librarys_decode_for_any_ids(ids: list[int]) -> None:
    vocabulary = Vocabulary(byte_level())
    assert vocabulary.is_bytes
    assert "".join(streamed(vocabulary, ids)) == byte_level().decode(ids)


@given(st.text(max_size=20))
def test_no_piece_of_a_text_has_a_replacement_character_that_the_text_has_not(text: str) -> None:
    for library in (byte_level(), byte_fallback()):
        vocabulary = Vocabulary(library)
        ids = library.encode(text, add_special_tokens=False).ids
        pieces = streamed(vocabulary, ids)
        assert "".join(pieces) in (library.decode(ids), " " + library.decode(ids))  # Strip takes a text's first space
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(3, 290), min_size=1, max_size=30))
def test_byte_fallback_pieces_concatenate_to_the_librarys_decode_where_that_is_valid(ids: list[int]) -> None:
    library = byte_fallback()
    vocabulary = Vocabulary(library)
    assert vocabulary.is_bytes
    # decoded as the continuation of a text: what follows the first space of a text keeps its own
    theirs = library.decode([library.token_to_id("\u2581hello"), *ids]).removeprefix("hello")
    ours = "".join(streamed(vocabulary, ids, library.encode("hello").ids))
    assert ours == theirs or "\ufffd" in theirs


@given(st.data())
def test_a_windowed_decode_concatenates_to_the_librarys(data: st.DataObject) -> None:
    library = word_piece()
    vocabulary = Vocabulary(library)
    assert not vocabulary.is_bytes
    ids = data.draw(st.lists(st.integers(0, library.get_vocab_size() - 1), max_size=30))
    prompt = library.encode("hello world").ids
    whole = library.decode([*prompt, *(i for i in ids if i not in vocabulary.special_ids)])
    assert library.decode(prompt) + "".join(streamed(vocabulary, ids, prompt)) == whole


@given(st.text(max_size=20))
def test_the_window_agrees_with_the_table_on_real_text(text: str) -> None:
    library = byte_level()
    ids = library.encode(text, add_special_tokens=False).ids
    window = WindowDetokenizer(library, [])
    assert "".join([*(window.add(token_id) for token_id in ids), window.end()]) == text


@pytest.mark.parametrize("library", [byte_level, byte_fallback])
def test_a_text_that_ends_inside_a_character_ends_in_one_replacement_character(
    library: Callable[[], Tokenizer],
) -> None:
    tokenizer = library()
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode("\U0001f9ff", add_special_tokens=False).ids
    assert len(ids) >= 3
    for length in range(1, len(ids)):
        pieces = streamed(vocabulary, ids[:length])
        assert "".join(pieces).strip() in ("", "\ufffd")
        assert "\ufffd" not in "".join(pieces[:-1])
    window = WindowDetokenizer(tokenizer, [])
    assert [window.add(token_id) for token_id in ids[:-1]][-1] == ""
    assert window.end().endswith("\ufffd")
    assert window.end().count("\ufffd") == 1


def test_a_window_that_never_completes_a_character_gives_up() -> None:
    broken = byte_level().encode("\U0001f9ff", add_special_tokens=False).ids[-1]  # a continuation byte
    window = WindowDetokenizer(byte_level(), [])
    pieces = [window.add(broken) for _ in range(130)]
    assert "".join(pieces) == "\ufffd" * 128


def test_single_tokens_are_shown_as_the_library_decodes_them_alone() -> None:
    for library in (byte_level(), byte_fallback(), word_piece()):
        vocabulary = Vocabulary(library)
        for token_id in range(0, library.get_vocab_size(), 7):
            assert vocabulary.text(token_id) == library.decode([token_id], skip_special_tokens=False)


def test_bytes_of_a_token_are_its_own() -> None:
    assert Vocabulary(byte_level()).bytes(byte_level().encode("hello", add_special_tokens=False).ids[0]) == b"hello"
    assert Vocabulary(byte_fallback()).bytes(byte_fallback().token_to_id("<0xE6>")) == b"\xe6"
    assert Vocabulary(word_piece()).bytes(word_piece().token_to_id("hello")) == b"hello"


def test_an_added_token_outside_the_byte_alphabet_stands_for_itself() -> None:
    library = Tokenizer.from_str(byte_level().to_str())
    library.add_tokens([AddedToken("<two words>", special=False), AddedToken("日本", special=False)])
    vocabulary = Vocabulary(library)
    ids = [library.token_to_id("<two words>"), library.token_to_id("日本")]
    assert "".join(streamed(vocabulary, ids)) == library.decode(ids) == "<two words>日本"


def test_special_tokens_are_those_of_the_tokenizer_and_those_its_configuration_names() -> None:
    library = byte_level()
    assert {0, 1} <= Vocabulary(library).special_ids
    named = library.token_to_id("!")
    assert named in Vocabulary(library, ["!", "not in the vocabulary"]).special_ids


def test_a_decoder_that_does_more_than_the_table_knows_is_not_trusted() -> None:
    for decoder in (
        decoders.Sequence([decoders.Replace("\u2581", "_"), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip("!", 1, 1)]),
        decoders.CTC(),
        None,
    ):
        library = Tokenizer.from_str(byte_level().to_str())
        if decoder is None:
            description = json.loads(library.to_str())
            description["decoder"] = None
            library = Tokenizer.from_str(json.dumps(description))
        else:
            library.decoder = decoder
        assert not Vocabulary(library).is_bytes
    assert Vocabulary(metaspace()).is_bytes
    library = Tokenizer.from_str(metaspace().to_str())
    library.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Replace(Regex("c"), "d")])
    assert not Vocabulary(library).is_bytes


def test_a_table_that_disagrees_with_the_library_is_found_out() -> None:
    library = Tokenizer.from_str(byte_fallback().to_str())
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip("a", 0, 1)])
    assert not Vocabulary(library).is_bytes
