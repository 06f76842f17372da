"""The tokenizer's files and what is made of them."""

import json
from pathlib import Path

import pytest
from api_kit import tiny_tokenizer, write_model
from hypothesis import given
from hypothesis import strategies as st
from tgi_router.errors import StartupError
from tgi_router.tokenizer import Tokenizer, read_json, special_names
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import normalizers

LIBRARY = LibraryTokenizer.from_str(tiny_tokenizer())
TOKENIZER = Tokenizer(LibraryTokenizer.from_str(tiny_tokenizer()), {})


@given(st.text(max_size=30))
def test_places_of_tokens_are_bytes_and_cover_the_text(text: str) -> None:
    data = text.encode()
    tokens = TOKENIZER.tokens(text, add_special_tokens=True)
    assert [token.id for token in tokens] == LIBRARY.encode(text).ids
    assert (tokens[0].text, tokens[0].start, tokens[0].stop) == ("", 0, 0)
    for token in tokens[1:]:
        assert data[token.start : token.stop].decode() == token.text
    assert {place for token in tokens for place in range(token.start, token.stop)} == set(range(len(data)))


def test_truncation_and_padding_written_in_the_file_play_no_part() -> None:
    library = LibraryTokenizer.from_str(tiny_tokenizer())
    library.enable_truncation(3)
    library.enable_padding(length=50)
    assert len(Tokenizer(library, {}).encode("hello world " * 3, add_special_tokens=False)) > 3


def test_a_lower_bound_of_the_number_of_tokens_is_known_from_the_characters_alone() -> None:
    text = "hello world " * 50
    assert 0 < TOKENIZER.fewest_tokens(text) <= len(LIBRARY.encode(text).ids)
    library = LibraryTokenizer.from_str(tiny_tokenizer())
    library.normalizer = normalizers.Strip()
    assert Tokenizer(library, {}).fewest_tokens(text) == 0


def test_end_of_sequence_is_what_the_model_and_the_tokenizer_name() -> None:
    def eos(config: object, named: list[int]) -> set[int]:
        return set(Tokenizer(LibraryTokenizer.from_str(tiny_tokenizer()), {"eos_token": config}).eos_token_ids(named))

    assert eos("</s>", []) == {1}
    assert eos({"content": "</s>", "lstrip": False}, [7]) == {1, 7}
    assert eos(None, [7]) == {7}
    assert eos("<not there>", [7]) == {7}


def test_special_names_come_in_every_spelling() -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": None,
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
    }
    assert special_names(config) == ["<s>", "</s>", "<a>", "<b>"]
    assert special_names({}) == []


def test_files_that_are_missing_or_broken_stop_the_start_with_their_name(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no `tokenizer.json`"):
        Tokenizer.load(tmp_path, {}, 1)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match=r"`tokenizer.json` of the model cannot be read"):
        Tokenizer.load(tmp_path, {}, 1)
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(StartupError, match=r"`a.json` of the model is not valid JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps([]))
    with pytest.raises(StartupError, match="not a JSON object"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "not there.json") == {}


def test_a_models_directory_loads(tmp_path: Path) -> None:
    write_model(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, read_json(tmp_path / "tokenizer_config.json"), 1)
    assert tokenizer.encode("hello", add_special_tokens=True)[0] == 0
    assert tokenizer.vocabulary.is_bytes
    tokenizer.close()
