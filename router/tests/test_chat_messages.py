"""Messages as templates get them, and tools for templates that know none."""

from typing import Any

import pytest
from tgi_router.chat_messages import Taste, plain_messages, with_tools_as_text
from tgi_router.errors import ValidationError, WrongShape
from tgi_router.tools import offer as offers

KNOWING = Taste(knows_tools=True, knows_developer=False, id_length=None)
PLAIN = Taste(knows_tools=False, knows_developer=False, id_length=None)
USER = {"role": "user", "content": "Hi"}


def called(arguments: Any, call_id: str = "call_1") -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result(call_id: str = "call_1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "sunny"}


def first_arguments(message: dict[str, Any]) -> Any:
    return plain_messages([message], KNOWING)[0]["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [('{"a": 1}', {"a": 1}), ("", {}), ({"a": 1}, {"a": 1}), ("{", "{"), ("[1]", "[1]"), ("{}", {})],
)
def test_arguments_are_objects_unless_they_are_none(given: Any, shown: Any) -> None:
    assert first_arguments(called(given)) == shown


def test_tgis_parameters_are_arguments() -> None:
    call = {"id": "0", "type": "function", "function": {"name": "f", "parameters": {"a": 1}}}
    assert first_arguments({"role": "assistant", "tool_calls": [call]}) == {"a": 1}


def test_developers_are_systems_where_the_template_knows_no_better() -> None:
    messages = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]}]
    assert plain_messages(messages, KNOWING) == [{"role": "system", "content": "Be brief"}]
    knowing = Taste(knows_tools=True, knows_developer=True, id_length=None)
    assert plain_messages(messages, knowing)[0]["role"] == "developer"


def test_results_carry_the_name_of_their_function_and_empty_calls_are_left_out() -> None:
    messages = [called("{}"), result(), result("call_2"), {"role": "assistant", "content": "ok", "tool_calls": []}]
    _, first, second, last = plain_messages(messages, KNOWING)
    assert first == {"role": "tool", "tool_call_id": "call_1", "content": "sunny", "name": "f"}
    assert "name" not in second
    assert last == {"role": "assistant", "content": "ok"}


def test_ids_are_as_long_as_the_template_demands_and_still_match() -> None:
    taste = Taste(knows_tools=True, knows_developer=False, id_length=9)
    messages = [called("{}", "call_0123456789"), result("call_0123456789"), called("{}", "abcdef123")]
    call, answer, other = plain_messages(messages, taste)
    short = call["tool_calls"][0]["id"]
    assert (len(short), short.isalnum()) == (9, True)
    assert answer["tool_call_id"] == short
    assert other["tool_calls"][0]["id"] == "abcdef123"


def test_a_template_that_knows_no_tools_gets_calls_and_results_as_text() -> None:
    messages = plain_messages([USER, called('{"a": 1}'), result()], PLAIN)
    assert messages == [
        USER,
        {"role": "assistant", "content": '{"name": "f", "parameters": {"a": 1}}'},
        {"role": "user", "content": "Result of f: sunny"},
    ]


def test_tools_are_told_in_the_last_message_that_is_not_the_assistants() -> None:
    tools = offers.read([{"type": "function", "function": {"name": "f", "description": "F."}}], None)
    assert tools is not None
    messages = [USER, {"role": "assistant", "content": "Well"}]
    told = with_tools_as_text(messages, tools, None, PLAIN)
    assert told[1:] == messages[1:]
    content = told[0]["content"]
    assert content.startswith('Hi\n---\n[{"name": "f", "description": "F.", "parameters": {"type": "object"')
    assert '{"name": its name, "parameters":' in content
    theirs = with_tools_as_text(messages, tools, "Use tools.", PLAIN)[0]["content"]
    assert theirs.endswith("]\nUse tools.")
    assert with_tools_as_text(messages, tools, "Use tools.", KNOWING)[0]["content"] == "Hi\n---\nUse tools."
    assert with_tools_as_text(messages, tools, None, KNOWING) == messages


@pytest.mark.parametrize(
    ("message", "error", "sentence"),
    [
        ({"content": "x"}, WrongShape, r"messages\[0\].role: Expected `str`"),
        ({"role": "user"}, WrongShape, r"messages\[0\]: missing field `content`"),
        ({"role": "assistant", "tool_calls": [{"function": 3}]}, WrongShape, "Expected `object` as `function`"),
        ({"role": "user", "content": [{"type": "image_url"}]}, ValidationError, "must be of type 'text'"),
        ({"role": "user", "content": [{"type": ["text"]}]}, ValidationError, "must be of type 'text'"),
    ],
)
def test_messages_of_another_shape_are_refused(message: dict[str, Any], error: Any, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        plain_messages([message], KNOWING)
