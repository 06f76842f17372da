"""Templates in the manner of every family served render what transformers renders, whatever the conversation."""

from typing import Any

import jinja2
import pytest
from api_kit import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_shapes import SHAPES
from tgi_router.chat_template import ChatTemplate
from tgi_router.errors import TemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
OURS = {name: ChatTemplate({"default": shape}, SPECIAL) for name, shape in SHAPES.items()}
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)

Message = dict[str, Any]


def call(name: str, arguments: Any, call_id: str = "abcdef123") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def says(role: str, content: Any, **others: Any) -> Message:
    return {"role": role, "content": content, **others}


WEATHER = {
    "type": "function",
    "function": {
        "name": "météo",
        "description": "Weather <now>\n& 'then'",
        "parameters": {
            "type": "object",
            "properties": {"where": {"type": "string"}, "days": {"type": "array", "items": {"type": "int"}}},
            "required": ["where"],
        },
    },
}
NOTHING = {"type": "function", "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}}}
ASKED = says("user", "Is it <b>warm</b> in \U0001f5fc?")
CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [says("user", "  hello \n")],
    "system": [says("system", " Be brief. "), ASKED],
    "empty texts": [says("system", ""), says("user", ""), says("assistant", "")],
    "turns": [says("user", "a"), says("assistant", "<think>\nhm\n</think>\n\nb"), says("user", "c\u2028\ufffd")],
    "two users in a row": [says("user", "a"), says("user", "b")],
    "special characters": [says("user", "{{ bos_token }}{% if %}</s><|eot|>\\n\t\x00 \u200b"), says("assistant", "ß")],
    "call and result": [
        ASKED,
        says("assistant", None, tool_calls=[call("météo", {"where": "Zürich", "days": [1, 2.5], "x": None})]),
        says("tool", '{"t": 21}', tool_call_id="abcdef123", name="météo"),
        says("assistant", "Yes.", tool_calls=None),
        says("user", "Thanks"),
    ],
    "two calls, ids of other lengths, arguments as text": [
        ASKED,
        says("assistant", "Wait", tool_calls=[call("météo", "{}", "1"), call("nothing", {}, "call_2")]),
        says("tool", "1", tool_call_id="1"),
        says("tool", {"deep": [True, None]}, tool_call_id="call_2"),
    ],
    "reasoning": [says("user", "q"), says("assistant", "a", reasoning_content="\nbecause\n")],
    "reasoning under another name, null under the first": [
        says("user", "q"),
        says("assistant", "a", reasoning="r", reasoning_content=None),
    ],
    "another role": [says("user", "q"), says("ipython", [1, "é"]), says("narrator", "x")],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {"tools": [WEATHER, NOTHING]},
    "no tools in the list": {"tools": []},
    "documents": {"documents": [{"title": "T", "text": "two\nlines", "n": 1}]},
    "variables": {"variables": {"enable_thinking": False, "date_string": "today", "bos_token": "<other>"}},
    "built-in": {"tools": [NOTHING], "variables": {"builtin_tools": ["météo"], "tools_in_user_message": False}},
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tokenizer of transformers."""
    import transformers
    from tokenizers import Tokenizer

    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tiny_tokenizer()), **SPECIAL)


def compare(theirs: Any, name: str, messages: list[Message], **options: Any) -> None:
    """Both render the same, or both refuse."""
    told = {key: value for key, value in options.items() if key != "variables"} | options.get("variables", {})
    try:
        expected = theirs.apply_chat_template(messages, chat_template=SHAPES[name], tokenize=False, **told)
    except REFUSALS:
        with pytest.raises(TemplateError):
            OURS[name].render(messages, **options)
    else:
        assert OURS[name].render(messages, **options) == expected


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_family_renders_as_in_transformers(theirs: Any, name: str, messages: list[Message], options: Any) -> None:
    compare(theirs, name, messages, add_generation_prompt=True, **options)
    compare(theirs, name, messages, add_generation_prompt=False, **options)


def test_most_of_the_matrix_is_rendered_and_not_refused(theirs: Any) -> None:
    rendered = 0
    for template in OURS.values():
        for messages in CONVERSATIONS.values():
            try:
                rendered += bool(template.render(messages, tools=[WEATHER]))
            except TemplateError:
                continue
    assert rendered > len(OURS) * len(CONVERSATIONS) * 0.6


UNHURRIED = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])

TEXTS = st.one_of(st.none(), st.text(max_size=12), st.sampled_from(["<think>x</think> y", " a\n", "</s>", "{{ 1 }}"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CALLS = st.builds(call, st.text(max_size=5), VALUES, st.sampled_from(["abcdef123", "1"]))
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS},
    optional={
        "tool_calls": st.none() | st.lists(CALLS, max_size=2),
        "reasoning_content": TEXTS,
        "thinking": TEXTS,
        "tool_call_id": st.just("abcdef123"),
        "name": st.text(max_size=3),
    },
)


@UNHURRIED
@given(
    name=st.sampled_from(sorted(SHAPES)),
    messages=st.lists(MESSAGES, min_size=1, max_size=5),
    tools=st.sampled_from([None, [WEATHER], [NOTHING, WEATHER]]),
    add_generation_prompt=st.booleans(),
)
def test_any_conversation_renders_as_in_transformers(
    theirs: Any, name: str, messages: list[Message], tools: Any, add_generation_prompt: bool
) -> None:
    compare(theirs, name, messages, tools=tools, add_generation_prompt=add_generation_prompt)


@UNHURRIED
@given(
    name=st.sampled_from(sorted(SHAPES)),
    before=st.lists(MESSAGES, max_size=3),
    final=st.text(min_size=1, max_size=10),
)
def test_any_final_message_continues_as_in_transformers(
    theirs: Any, name: str, before: list[Message], final: str
) -> None:
    messages = [*before, says("assistant", final)]
    compare(theirs, name, messages, add_generation_prompt=False, continue_final_message=True)
