"""The grammar of a chat's answer, followed by llguidance itself: what it lets a model say, the parsers can read."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from api_kit import EOS, VOCAB, tiny_tokenizer
from llguidance import LLMatcher, LLTokenizer
from tgi_proto.grammar import load_tokenizer, make_matcher
from tgi_router.chat_grammar import answer_grammar
from tgi_router.chat_messages import Taste
from tgi_router.dialect import Dialect
from tgi_router.errors import ValidationError
from tgi_router.grammars import Grammar, from_json_schema, from_regex
from tgi_router.message import Message, MessageParser
from tgi_router.reasoning import MARKS, Marks, ReasoningParser
from tgi_router.tools import FORMATS
from tgi_router.tools import offer as offers
from tgi_router.tools.offer import Offer
from tokenizers import AddedToken, Tokenizer

MARKERS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<think>", "</think>")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["city"],
    "$defs": {"city": {"type": "string", "maxLength": 6}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
RESPONSE = from_json_schema({"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]})
CALLS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    "qwen3_xml": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call>",
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    "json": '{"name": "get_weather", "parameters": {"city": "Paris"}}',
}


class Vocabulary:
    """The tiny tokenizer, with or without the markers as tokens."""

    def __init__(self, folder: Path, markers: Sequence[str]) -> None:
        self.library = Tokenizer.from_str(tiny_tokenizer())
        self.library.add_tokens([AddedToken(marker, special=index % 2 == 0) for index, marker in enumerate(markers)])
        self.library.save(str(folder / "tokenizer.json"))
        self.guide: LLTokenizer = load_tokenizer(folder, VOCAB + len(markers), [EOS])

    def follow(self, grammar: Grammar, text: str) -> LLMatcher | None:
        """The state after `text`, None when it is not allowed."""
        matcher = make_matcher(self.guide, json.dumps({"grammars": [{"lark_grammar": grammar.text}]}))
        assert not matcher.is_error(), matcher.get_error()
        ids = self.library.encode(text, add_special_tokens=False).ids
        return matcher if matcher.try_consume_tokens(ids) == len(ids) else None

    def allows(self, grammar: Grammar, text: str, *, whole: bool = True) -> bool:
        matcher = self.follow(grammar, text)
        return matcher is not None and (not whole or matcher.is_accepting())

    def wander(self, grammar: Grammar, seed: int, most: int = 400) -> str | None:
        """What a model says that knows nothing but the mask; None when it does not end."""
        chance = random.Random(seed)
        matcher = self.follow(grammar, "")
        ids: list[int] = []
        while matcher is not None and len(ids) < most:
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(VOCAB + 6) if i // 8 < len(mask) and mask[i // 8] >> i % 8 & 1]
            token = EOS if EOS in allowed and chance.random() < 0.3 else chance.choice(allowed)
            if token == EOS:
                return str(self.library.decode(ids, skip_special_tokens=False))
            ids.append(token)
            matcher.consume_token(token)
        return None


@pytest.fixture(scope="module", params=[MARKERS, ()], ids=["markers are tokens", "markers are text"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("model"), request.param)


def offer(choice: Any = "auto", *, parallel: bool = True) -> Offer:
    result = offers.read(TOOLS, choice, parallel)
    assert result is not None
    return result


def grammar(
    vocabulary: Vocabulary,
    style: str,
    tools: Offer | None,
    *,
    response: Grammar | None = None,
    marks: Marks | None = None,
    in_thoughts: bool = False,
) -> Grammar:
    nothing = frozenset[int]()
    dialect = Dialect(
        FORMATS[style], True, marks, Taste(True, True, None), vocabulary.library.token_to_id, nothing, nothing
    )
    result = answer_grammar(dialect, tools, response, in_thoughts=in_thoughts)
    assert result is not None
    return result


@pytest.mark.parametrize("style", sorted(FORMATS))
def test_a_forced_answer_is_a_valid_call_and_nothing_else(vocabulary: Vocabulary, style: str) -> None:
    call = CALLS[style]
    forced = grammar(vocabulary, style, offer("required"))
    assert vocabulary.allows(forced, call)
    assert not vocabulary.allows(forced, "Hello", whole=False)
    assert not vocabulary.allows(forced, "")
    if style != "qwen3_xml":  # text that stands in tags may have any length
        assert not vocabulary.allows(forced, call.replace("Paris", "Constantinople"), whole=False)
    assert not vocabulary.allows(forced, call.replace("city", "town"), whole=False)
    assert not vocabulary.allows(forced, call.replace("get_weather", "get_time"), whole=False)
    named = grammar(vocabulary, style, offer("stop"))
    assert not vocabulary.allows(named, call, whole=False)
    stop = call.replace("get_weather", "stop").replace('{"city": "Paris"}', "{}")
    assert vocabulary.allows(named, stop.replace("<parameter=city>\nParis\n</parameter>\n", ""))


@pytest.mark.parametrize("style", sorted(FORMATS))
def test_under_auto_any_text_is_allowed_until_a_call_begins(vocabulary: Vocabulary, style: str) -> None:
    call = CALLS[style]
    free = grammar(vocabulary, style, offer())
    for text in ("", "Hello, {you}: [1] <b>\n\n日本", '{"x": 1}', call):
        assert vocabulary.allows(free, text), text
    assert not vocabulary.allows(free, call.replace("get_weather", "get_time"), whole=False)
    assert not vocabulary.allows(free, call.replace("city", "town"), whole=False)
    if style in ("hermes", "mistral", "qwen3_xml"):
        assert vocabulary.allows(free, f"Let me see. {call}")
        assert not vocabulary.allows(free, f"Let me see. {call} And then", whole=False)


@pytest.mark.parametrize("style", sorted(FORMATS))
def test_several_calls_only_where_they_may_be(vocabulary: Vocabulary, style: str) -> None:
    between = {"hermes": "\n", "llama3_json": "; ", "json": "\n", "qwen3_xml": "\n"}.get(style)
    twice = (
        f"{CALLS[style]}{between}{CALLS[style]}" if between else CALLS[style].replace("}]", "}, ") + CALLS[style][14:]
    )
    for choice in ("auto", "required"):
        assert vocabulary.allows(grammar(vocabulary, style, offer(choice)), twice)
        assert not vocabulary.allows(grammar(vocabulary, style, offer(choice, parallel=False)), twice, whole=False)


@pytest.mark.parametrize("style", sorted(FORMATS))
def test_a_model_that_only_knows_the_mask_makes_calls_with_valid_arguments(vocabulary: Vocabulary, style: str) -> None:
    forced = grammar(vocabulary, style, offer("required"))
    num_calls = 0
    for seed in range(4):
        text = vocabulary.wander(forced, seed)
        if text is None:
            continue
        said = Message()
        parser = MessageParser(None, FORMATS[style].parser(offer().tools), None)
        for event in [*parser.feed(text), *parser.end()]:
            said.add(event)
        assert said.content == ""
        assert said.calls
        for call in said.calls:
            assert call.complete
            schema: dict[str, Any] = SCHEMA if call.name == "get_weather" else {"type": "object", "maxProperties": 0}
            if style == "qwen3_xml":
                schema = {**schema, "$defs": {"city": {"type": "string"}}}
            jsonschema.validate(json.loads(call.arguments), schema)
            num_calls += 1
    assert num_calls


def test_a_response_format_stands_beside_tools(vocabulary: Vocabulary) -> None:
    both = grammar(vocabulary, "hermes", offer(), response=RESPONSE)
    assert vocabulary.allows(both, '{"x": true}')
    assert vocabulary.allows(both, CALLS["hermes"])
    assert not vocabulary.allows(both, "Hello", whole=False)
    regex = grammar(vocabulary, "hermes", offer(), response=from_regex("a/b+"))
    assert vocabulary.allows(regex, "a/bb")


def test_the_grammar_applies_after_the_thoughts(vocabulary: Vocabulary) -> None:
    marks = MARKS["deepseek"]
    opened = grammar(vocabulary, "hermes", None, response=RESPONSE, marks=marks, in_thoughts=True)
    assert vocabulary.allows(opened, 'Well, {"y".</think>\n\n{"x": true}')
    assert not vocabulary.allows(opened, '{"x": true}')
    assert not vocabulary.allows(opened, 'Well.</think>\n\n{"y"', whole=False)
    closed = grammar(vocabulary, "hermes", offer("required"), marks=marks)
    assert vocabulary.allows(closed, CALLS["hermes"])
    assert vocabulary.allows(closed, f"<think>\nWell.\n</think>\n\n{CALLS['hermes']}")
    assert not vocabulary.allows(closed, "<think>\nWell.\n</think>\n\nHello", whole=False)
    free = grammar(vocabulary, "hermes", offer(), marks=marks, in_thoughts=True)
    assert vocabulary.allows(free, f"Shall I {CALLS['json']}?</think>Hello. {CALLS['hermes']}")
    parser = ReasoningParser(marks, is_open=True)
    assert parser.feed('Well.</think>\n\n{"x": true}') == ("Well.", '{"x": true}')


def test_without_tools_and_thoughts_a_response_format_stays_as_it_is(vocabulary: Vocabulary) -> None:
    assert grammar(vocabulary, "json", None, response=RESPONSE) is RESPONSE


def test_tools_that_are_too_large_are_refused(vocabulary: Vocabulary) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}}
    large = {"type": "object", "properties": {"a": {"enum": ["x" * 300_000]}}}
    for schema, sentence in ((deep, "`tools` is nested more than"), (large, "`tools` must have at most")):
        tools = offers.read([{"function": {"name": "f", "parameters": schema}}], None)
        with pytest.raises(ValidationError, match=sentence) as caught:
            grammar(vocabulary, "hermes", tools)
        assert caught.value.param == "tools"
