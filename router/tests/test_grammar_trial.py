"""What a child of the trial process does, done here: compiling, the walk, and its sentences."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from api_kit import VOCAB, write_model
from tgi_proto.grammar import load_tokenizer, make_matcher
from tgi_router.grammar_trial import Refused, _some_token, tried


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_model(Path(tmp_path_factory.mktemp("model"))), VOCAB, [1])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "[a-z]{3}"),
        ("regex", ""),
        ("lark", 'start: "a" b\nb: /[0-9]+/ | %json {"type": "null"}'),
        ("json_schema", '{"type": "object"}'),
        ("json_schema", '{"const": ["é", {"a": null}]}'),
        ("json_schema", "{}"),
    ],
)
def test_what_a_walk_survives_can_be_followed(tokenizer: Any, kind: str, text: str) -> None:
    grammar = tried(tokenizer, kind, text)
    assert json.loads(grammar)["grammars"]
    assert not make_matcher(tokenizer, grammar).is_error()


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("regex", "(a", "grammar is not valid: "),
        ("lark", 'start: "a" | b', "grammar is not valid: "),
        ("json_schema", '{"type": "nothing"}', "grammar is not valid: Invalid type: nothing"),
        ("json_schema", '{"not": {}}', "cannot compile regex from schema: Unimplemented keys"),
        # compiles, and leads nowhere
        ("json_schema", '{"$ref": "#"}', "cannot compile regex from schema: no text is possible under it"),
    ],
)
def test_what_cannot_be_followed_is_refused(tokenizer: Any, kind: str, text: str, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        tried(tokenizer, kind, text)
    assert str(caught.value).startswith(sentence)


def test_a_walk_takes_any_of_the_allowed_tokens() -> None:
    mask = bytes([0, 0b00100001, 0, 0b10000000])
    chance = random.Random(1)
    assert {_some_token(mask, chance) for _ in range(50)} == {8, 13, 31}
