"""Fields nobody knows: found by name at any depth, told in `x-ignored-params`, refused with `--strict-params`."""

import json
from typing import Any

import msgspec
import pytest
from api_kit import serving
from hypothesis import given
from hypothesis import strategies as st
from tgi_router.unknown_fields import header_value, known, similar, unknown


class Leaf(msgspec.Struct):
    x: int = 0


class Tagged(msgspec.Struct, tag="t", tag_field="kind"):
    y: int = 0


class Body(msgspec.Struct):
    text: str = ""
    leaf: Leaf | None = None
    leaves: list[Leaf] | str = ""
    deep: list[list[Leaf]] | None = None
    tagged: Tagged | None = None
    renamed: int = msgspec.field(default=0, name="class")
    anything: Any = None
    dictionary: dict[str, Any] | None = None


class Other(msgspec.Struct):
    more: int = 0


def names(body: Any, *types: type) -> list[str]:
    return unknown(json.dumps(body).encode(), known(*(types or (Body,))))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, []),
        ({"text": "a", "leaf": {"x": 1}, "leaves": [{"x": 1}], "class": 1}, []),
        ({"a": 1, "text": "", "b": {"text": 1}}, ["a", "b"]),
        ({"renamed": 1}, ["renamed"]),
        ({"leaf": {"x": 1, "y": 2}, "z": 1}, ["z", "leaf.y"]),
        ({"leaf": None, "leaves": "text", "deep": None}, []),
        ({"leaves": [{}, {"q": 1}, {"x": 1, "r": 2}]}, ["leaves[1].q", "leaves[2].r"]),
        ({"deep": [[{"w": 1}], []]}, ["deep[0][0].w"]),
        ({"tagged": {"kind": "t", "y": 1, "z": 1}}, ["tagged.z"]),
        ({"anything": {"a": {"b": 1}}, "dictionary": {"c": {"d": 1}}}, []),
        ({"more": 1}, ["more"]),
    ],
    ids=str,
)
def test_a_field_is_unknown_when_no_struct_declares_it_there(body: Any, expected: list[str]) -> None:
    assert names(body) == expected


def test_a_field_that_one_of_several_structs_declares_is_known() -> None:
    assert names({"more": 1, "text": "", "less": 2}, Body, Other) == ["less"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("leafs", "leaf"),
        ("txet", None),
        ("dictionnary", "dictionary"),
        ("leaf.xx", None),
        ("tagged.kinds", "kind"),
        ("deep[0][3].w", None),
        ("with.dots.in.it", None),
        ("leaves[2].", None),
    ],
)
def test_a_name_that_is_like_a_known_one_is_guessed(path: str, meant: str | None) -> None:
    assert similar(path, known(Body)) == meant


def test_space_around_a_body_changes_nothing() -> None:
    assert unknown(b' \n{ "q" : 1 , "leaf" :\t{"p":2} } ', known(Body)) == ["q", "leaf.p"]


@given(st.lists(st.text(max_size=200), min_size=1, max_size=200))
def test_a_header_is_short_and_holds_no_character_that_could_end_it(given_names: list[str]) -> None:
    value = header_value(given_names)
    assert len(value) < 1100
    assert value.isascii()
    assert value.isprintable()


BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 1, "topp": 1}, "what": 2}, "what, parameters.topp"),
    ("/generate_stream", {"inputs": "h", "parameters": {"max_new_tokens": 1}, "what": 2}, "what"),
    ("/", {"inputs": "h", "parameters": {"max_new_tokens": 1}, "evil\r\nname": 2}, "evil%0D%0Aname"),
    ("/tokenize", {"inputs": "h", "stream": True}, "stream"),
    ("/v1/completions", {"prompt": "h", "max_tokens": 1, "max_token": 3}, "max_token"),
    ("/v1/completions", {"prompt": "h", "max_tokens": 1, "stream": True, "topp": 0}, "topp"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "h", "mood": 1}], "max_tokens": 1, "stream_options": {"usage": 1}},
        "stream_options.usage",
    ),
]


@pytest.mark.parametrize(("path", "body", "ignored"), BODIES, ids=[f"{path} {name}" for path, _, name in BODIES])
async def test_unknown_fields_are_told_in_a_header_and_refused_when_asked(
    path: str, body: dict[str, Any], ignored: str
) -> None:
    async with serving() as api:
        answer = await api.post(path, body)
        assert (answer.status, answer.headers.get("x-ignored-params")) == (200, ignored)
        await api.idle()
    async with serving(strict_params=True) as api:
        answer = await api.post(path, body)
        error = answer.json["error"]
        assert answer.status == (400 if path.startswith("/v1/") else 422)
        assert answer.json["error_type"] == "validation"
        sentence = error["message"] if path.startswith("/v1/") else error
        assert f"Unknown fields: `{ignored}`." in sentence
        assert ("Did you mean `max_tokens`?" in sentence) == (ignored == "max_token")


async def test_what_is_known_is_never_listed() -> None:
    async with serving(strict_params=True) as api:
        answer = await api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 1, "top_p": 0.5}})
        assert answer.status == 200
        assert "x-ignored-params" not in answer.headers
        body = {"prompt": "h", "max_tokens": 1, "temperature": 0, "top_k": 5, "stop": None}
        answer = await api.post("/v1/completions", body)
        assert answer.status == 200, answer.body
        assert "x-ignored-params" not in answer.headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", b'{"inputs": "x", "\xff": 1}'),
        ("/generate", b'{"inputs": "x", "parameters": {"\xff": 1}}'),
        ("/v1/completions", b'{"prompt": "x", "\xff": 1}'),
        ("/invocations", b'{"\xff": "x"}'),
        ("/vertex", b'{"instances": [{"inputs": "x", "\xff": 1}]}'),
        ("/vertex", b'{"instances": [{"\xff": "x"}]}'),
        ("/v2/models/m/infer", b'{"inputs": [], "\xff": 1}'),
    ],
    ids=str,
)
async def test_a_name_that_is_no_text_makes_a_body_malformed(path: str, body: bytes) -> None:
    async with serving() as api:
        answer = await api.request("POST", path, data=body, headers={"content-type": "application/json"})
        assert (answer.status, answer.json["error_type"]) == (400, "validation")
        await api.idle()
