"""Parsers of tool calls: what is a call, what stays text, and that no cut of the text into pieces changes either."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tgi_router.errors import StartupError
from tgi_router.tools import FORMATS, choose
from tgi_router.tools.base import CallArguments, CallBegin, CallEnd, Event, Text, Tool, merged

TYPES = {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}, "any": {}}
TOOLS = [Tool(name, {"type": "object", "properties": TYPES}) for name in ("f", "get_weather", "get")]
NAMES = {tool.name for tool in TOOLS}
PARIS = '{"city": "Paris"}'


def parse(name: str, pieces: list[str]) -> list[Event]:
    parser = FORMATS[name].parser(TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged([*events, *parser.end()])


def read(name: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls, each as (name, arguments); read a character at a time."""
    content, calls = "", []
    for event in parse(name, list(text)):
        if isinstance(event, Text):
            content += event.text
        elif isinstance(event, CallBegin):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls


CALLS = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>', "", [("f", PARIS)]),
    ("hermes", 'Let me see.\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n', "Let me see.", [("f", "{}")]),
    (
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>{\\""}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"b": [1, {}]}, "name": "get"}\n</tool_call>',
        "",
        [("f", '{"a": "}</tool_call>{\\""}'), ("get", '{"b": [1, {}]}')],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", [("f", PARIS)]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null, "id": 3}</tool_call> Done.', " Done.", [("f", "{}")]),
    ("hermes", '<tool_call><tool_call>{"name": "f"}', "<tool_call>", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"ci', "", [("f", '{"ci')]),  # cut off
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n</tool_', "", [("f", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {"city": "Paris"}}', "", [("f", PARIS)]),
    ("llama3_json", '\n{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "get", "parameters": {}}\n{"name": "f"}',
        "",
        [("f", "{}"), ("get", "{}"), ("f", "{}")],
    ),
    ("llama3_json", 'Sure: <|python_tag|>{"name": "f", "parameters": {}}', "Sure:", [("f", "{}")]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {PARIS}}}]', "", [("f", PARIS)]),
    (
        "mistral",
        'Hm.[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "get", "arguments": {}, "id": "a1"}] ',
        "Hm.",
        [("f", "{}"), ("get", "{}")],
    ),
    (
        "mistral",
        f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]get[CALL_ID]abc123XYZ[ARGS]{{}}[TOOL_CALLS]f{{}}",
        "",
        [("get_weather", PARIS), ("get", "{}"), ("f", "{}")],
    ),
    (
        "qwen3_xml",
        "Sure.\n<tool_call>\n<function=f>\n<parameter=city>\nNew\n\nYork\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=get>\n</function>\n</tool_call>",
        "Sure.",
        [("f", '{"city": "New\\n\\nYork", "days": 3}'), ("get", "{}")],
    ),
    (
        "qwen3_xml",
        '<tool_call><function=f><parameter=tags>["a"]</parameter><parameter=any>5</parameter><parameter=city>5'
        "</parameter><parameter=days>soon</parameter><parameter=new>x</parameter></function></tool_call>",
        "",
        [("f", '{"tags": ["a"], "any": 5, "city": "5", "days": "soon", "new": "x"}')],
    ),
    ("qwen3_xml", "<tool_call><function=f><parameter=city>Par", "", [("f", "{")]),  # cut off
    ("qwen3_xml", "<tool_call><function=f>oh</function>", "oh</function>", [("f", "{}")]),
    ("json", '{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    ("json", '[{"name": "f", "arguments": {}},\n {"name": "get"}]', "", [("f", "{}"), ("get", "{}")]),
    ("json", '{"name": "f"}\n{"name": "get"}', "", [("f", "{}"), ("get", "{}")]),
    ("json", 'Here:\n```json\n{"name": "f", "parameters": {}}\n```\n', "Here:", [("f", "{}")]),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CALLS, ids=[text for _, text, _, _ in CALLS])
def test_calls_are_found(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(name, text) == (content, calls)


TEXTS = [
    ("hermes", "Hello, how are you? "),
    ("hermes", "  "),
    ("hermes", "a" + "\n" * 5000),
    ("hermes", "a <b> <tool <tool_call> no"),
    ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>\n'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "f" "arguments": {}}'),
    ("hermes", '<tool_call>\n{"name": "f", '),
    ("hermes", '{"name": "f", "arguments": {}}'),  # not in the model's format
    ("hermes", "<tool_ca"),
    ("qwen3_xml", "<tool_call>\n<function=fx>\n</function>"),
    ("qwen3_xml", '<tool_call>\n{"name": "f"}'),
    ("qwen3_xml", "<tool_call><func"),
    ("llama3_json", '{"answer": {"name": "f", "parameters": {}}}'),
    ("llama3_json", 'It is {"name": "f", "parameters": {}}'),
    ("llama3_json", '[{"name": "f", "parameters": {}}]'),
    ("llama3_json", '{"name": "fx", "parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("mistral", '[TOOL_CALLS] [{"name": "fx", "arguments": {}}]'),
    ("mistral", "[TOOL_CALLS]get_[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]getx{}"),
    ("mistral", "[a] [b]"),
    ("json", "```json\n{}\n```"),
    ("json", '```python\n{"name": "f"}\n```'),
    ("json", "[1, 2]"),
    ("json", '{"name": "\\ud800", "parameters": {}}'),
    ("json", "{" * 2000),
]


@pytest.mark.parametrize(("name", "text"), TEXTS, ids=[text[:40] for _, text in TEXTS])
def test_what_is_no_call_of_an_offered_tool_stays_text_to_the_letter(name: str, text: str) -> None:
    assert read(name, text) == (text, [])


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.feed('{"city": "Par') == [CallBegin("f"), CallArguments('{"city": "Par')]
    assert parser.feed('is"') == [CallArguments('is"')]
    assert parser.feed("}}\n</tool_call>") == [CallArguments("}"), CallEnd()]


def test_an_answer_in_json_is_not_held_back() -> None:
    assert FORMATS["json"].parser(TOOLS).feed('{"answer":') == [Text('{"answer":')]


PIECES = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "```json", "```"),
    *("<function=", "<function=f>", "</function>", "<parameter=city>", "</parameter>", ">"),
    *('{"name": "f", "arguments": ', '{"name": "get"', ', "parameters": ', '{"a": 1}', '{"b": "}"}', "}", "{", '"'),
    *("[", "]", ",", ";", ":", "\\", "\n", " ", "f", "get_weather", "hello", "<", "null", "1.5", "é", "\u2003"),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(PIECES), max_size=14), st.data())
def test_no_cut_changes_the_result_and_nothing_is_lost(name: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    whole = parse(name, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(name, pieces) == whole == parse(name, list(text))
    calls = [event for event in whole if isinstance(event, CallBegin)]
    assert {call.name for call in calls} <= NAMES
    if not calls:
        assert "".join(event.text for event in whole if isinstance(event, Text)) == text
    place = 0
    for event in whole:  # content and arguments stand in the text, in this order
        if isinstance(event, Text):
            place = text.index(event.text, place) + len(event.text)
    assert_calls_are_whole(whole)


def assert_calls_are_whole(events: list[Event]) -> None:
    """Each call begins, has arguments, and ends; only the last one may be cut off."""
    kinds = [type(event) for event in events if not isinstance(event, Text)]
    while kinds:
        assert kinds[:2] == [CallBegin, CallArguments]
        assert kinds[2:3] in ([CallEnd], [])
        kinds = kinds[3:]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.booleans(), st.sampled_from([None, 2]))
def test_any_arguments_come_out_as_they_were_written(value: dict[str, object], ascii: bool, indent: int | None) -> None:
    arguments = json.dumps(value, ensure_ascii=ascii, indent=indent)
    forms = {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>',
        "llama3_json": f'{{"name": "f", "parameters": {arguments}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {arguments}}}]',
        "json": f'```json\n{{"name": "f", "parameters": {arguments}}}\n```',
    }
    for name, text in forms.items():
        assert read(name, text) == ("", [("f", arguments)])


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        ("{% if tools %}<tool_call>", [], "hermes"),
        ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", [], "mistral"),
        ('{{ tools }}{"name": function name, "parameters": {}}', ["<|python_tag|>"], "llama3_json"),
        ('{{ tools }}{"name": ..., "parameters": {}}', [], "json"),
        ("{{ tools }}<tool_call><function=name><parameter=a>", [], "qwen3_xml"),
        ("", [], "json"),
    ],
)
def test_auto_takes_the_format_of_the_chat_template(template: str, tokens: list[str], name: str) -> None:
    assert choose("auto", template, tokens)[0] == name


def test_a_format_can_be_named_and_a_wrong_name_is_refused() -> None:
    assert choose("mistral", "<tool_call>", [])[0] == "mistral"
    with pytest.raises(StartupError, match="must be auto or one of mistral, qwen3_xml, hermes, llama3_json, json"):
        choose("xml", "", [])
