"""Thoughts are separated from the answer, wherever the template puts the first mark and however the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tgi_router.errors import StartupError
from tgi_router.message import Message, MessageParser
from tgi_router.reasoning import MARKS, ReasoningParser, choose, is_open
from tgi_router.tools import FORMATS
from tgi_router.tools.base import Tool

THINK = MARKS["deepseek"]


def split(pieces: list[str], *, opened: bool) -> tuple[str, str]:
    parser = ReasoningParser(THINK, is_open=opened)
    parts = [parser.feed(piece) for piece in pieces]
    parts.append(parser.end())
    return "".join(part.reasoning for part in parts), "".join(part.text for part in parts)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("<think>\nHm, well.\n</think>\n\nYes.", False, "Hm, well.", "Yes."),
        ("\n <think>a</think>b", False, "a", "b"),
        ("Hm.\n</think>\n\nYes. \n", True, "Hm.", "Yes. \n"),
        ("Yes.", False, "", "Yes."),
        (" Yes </think> no", False, "", " Yes </think> no"),
        ("<thin", False, "", "<thin"),
        ("<think></think>Yes", False, "", "Yes"),
        ("\n\n</think>\n\nYes", True, "", "Yes"),
        ("cut off </thi", True, "cut off </thi", ""),
        ("<think>cut off\n\n", False, "cut off\n\n", ""),
        ("a < b</think>x<think>y", True, "a < b", "x<think>y"),
        ("<think>a</think>  ", False, "a", ""),
        ("", True, "", ""),
    ],
)
def test_thoughts_and_answer(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split(list(text), opened=opened) == (reasoning, answer)
    assert split([text], opened=opened) == (reasoning, answer)


PIECES = ["<think>", "</think>", "<th", "</", "ink>", "\n", " ", "hello", "<", "é"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans(), st.data())
def test_no_cut_changes_the_result_and_only_white_space_and_marks_are_lost(
    parts: list[str], opened: bool, data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    reasoning, answer = split(pieces, opened=opened)
    assert (reasoning, answer) == split([text], opened=opened)
    kept = "".join((reasoning + answer).split())
    lost = "".join(text.split())
    assert kept in (lost, lost.replace("</think>", "", 1), lost.replace("<think>", "", 1)) or kept == lost.replace(
        "<think>", "", 1
    ).replace("</think>", "", 1)


@pytest.mark.parametrize(
    ("prompt", "continues", "opened"),
    [
        ("<|assistant|><think>\n", False, True),
        ("<|assistant|>", False, False),
        ("<|user|>what is <think>?<|assistant|>", False, False),
        ("<think>\n\n</think>\n\n", False, False),
        ("<|assistant|><think>so far", True, True),
        ("<|assistant|><think>done</think>so far", True, False),
    ],
)
def test_the_prompt_says_whether_thoughts_have_begun(prompt: str, continues: bool, opened: bool) -> None:
    assert is_open(THINK, prompt, continues=continues) is opened


def test_auto_looks_into_the_template_and_none_means_none() -> None:
    assert choose("auto", "{{ content.split('</think>') }}") == THINK
    assert choose("auto", "[THINK]{{ x }}[/THINK]") == MARKS["mistral"]
    assert choose("auto", "{{ messages }}") is None
    assert choose("none", "</think>") is None
    assert choose("mistral", "") == MARKS["mistral"]
    with pytest.raises(StartupError, match="must be auto, none or one of deepseek, mistral, seed_oss"):
        choose("r1", "")


def message(text: str, *, opened: bool, max_calls: int | None = None) -> tuple[Message, int]:
    parser = MessageParser(
        ReasoningParser(THINK, is_open=opened), FORMATS["hermes"].parser([Tool("f", {}), Tool("g", {})]), max_calls
    )
    result = Message()
    for character in text:
        for event in parser.feed(character):
            result.add(event)
    for event in parser.end():
        result.add(event)
    return result, parser.num_reasoning_tokens


def test_a_call_in_the_thoughts_is_a_thought_and_one_after_them_a_call() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    said, tokens = message(f"Use {call}.</think>\n{call}", opened=True)
    assert said.reasoning == f"Use {call}."
    assert (said.content, [one.name for one in said.calls]) == ("", ["f"])
    assert tokens == len(f"Use {call}.</think>")
    assert message("Hello", opened=False)[1] == 0


def test_calls_that_are_too_many_are_left_out() -> None:
    calls = "".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in "fgf")
    said, _ = message(f"Hi. {calls} Bye.", opened=False, max_calls=1)
    assert [(call.name, call.arguments, call.complete) for call in said.calls] == [("f", "{}", True)]
    assert said.content == "Hi. Bye."
