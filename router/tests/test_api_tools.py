"""Tools and thoughts on /v1/chat/completions: what the model says is scripted, what clients see is checked."""

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from api_kit import EOS, Api, serving, tiny_tokenizer
from tokenizers import Tokenizer

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> calls: <tool_call>{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = TEMPLATE.replace("[assistant]{%", "[assistant]<think>\n{%") + "{# </think> #}"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ARGUMENTS = '{"city": "Paris"}'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "get_time"}}


@asynccontextmanager
async def saying(text: str, *, template: str = TEMPLATE, **changes: Any) -> AsyncIterator[Api]:
    """A server whose model says `text` whatever it is asked."""
    ids = Tokenizer.from_str(tiny_tokenizer()).encode(text, add_special_tokens=False).ids
    script = " ".join(map(str, ids))
    defaults = {"eos": EOS, "max_model_tokens": 1000, "model": {"chat_template": template, "eos_token": "</s>"}}
    async with serving(script=script, **{**defaults, **changes}) as api:
        yield api


def body(**values: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Weather in Paris?"}]
    return {"messages": messages, "max_tokens": 300, "temperature": 0, "tools": [TOOL, TIME], **values}


def added_up(events: list[Any], index: int = 0) -> tuple[dict[str, Any], str | None]:
    """The message of a stream's choice, and why it ended; checks OpenAI's rules for deltas."""
    message: dict[str, Any] = {"content": None, "calls": [], "reasoning": None}
    reason = None
    for event in events[:-1]:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            assert reason is None, "a chunk after the last"
            reason = choice["finish_reason"]
            delta = choice["delta"]
            for name, key in (("content", "content"), ("reasoning_content", "reasoning")):
                if name in delta:
                    message[key] = (message[key] or "") + delta[name]
            for call in delta.get("tool_calls", []):
                if call["index"] == len(message["calls"]):
                    assert list(call) == ["index", "id", "type", "function"]
                    assert (call["type"], call["function"]["arguments"]) == ("function", "")
                    message["calls"].append((call["id"], call["function"]["name"], ""))
                else:
                    assert list(call) == ["index", "function"]
                    assert call["index"] == len(message["calls"]) - 1
                    assert list(call["function"]) == ["arguments"]
                    call_id, name, arguments = message["calls"][-1]
                    message["calls"][-1] = (call_id, name, arguments + call["function"]["arguments"])
    return message, reason


async def both(api: Api, **values: Any) -> tuple[dict[str, Any], str]:
    """The choice's message and reason, the same whether streamed or not (ids of calls aside)."""
    answer = await api.post("/v1/chat/completions", body(**values))
    assert answer.status == 200, answer.body
    choice = answer.json["choices"][0]
    events = (await api.post("/v1/chat/completions", body(stream=True, **values))).events
    assert events[-1] == "[DONE]"
    message, reason = added_up(events)
    calls = choice["message"].get("tool_calls", [])
    assert message["content"] == (choice["message"]["content"] or None)
    assert message["reasoning"] == choice["message"].get("reasoning_content")
    assert [call[1:] for call in message["calls"]] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in calls
    ]
    assert reason == choice["finish_reason"]
    ids = [call["id"] for call in calls] + [call[0] for call in message["calls"]]
    assert len(set(ids)) == len(ids)
    assert all(one.startswith("call_") for one in ids)
    return choice["message"], choice["finish_reason"]


async def test_a_call_is_an_object_with_its_arguments_as_json_text() -> None:
    async with saying(CALL) as api:
        message, reason = await both(api)
        assert reason == "tool_calls"
        assert list(message) == ["role", "content", "tool_calls", "refusal"]
        (call,) = message["tool_calls"]
        assert list(call) == ["id", "type", "function"]
        assert (message["content"], call["type"]) == (None, "function")
        assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
        await api.idle()


async def test_text_before_a_call_is_content_and_several_calls_are_numbered() -> None:
    async with saying(f"Let me look.\n{CALL}\n{CALL.replace('Paris', 'Rome')}") as api:
        message, reason = await both(api)
        assert (message["content"], reason) == ("Let me look.", "tool_calls")
        arguments = [call["function"]["arguments"] for call in message["tool_calls"]]
        assert arguments == [ARGUMENTS, '{"city": "Rome"}']
        message, _ = await both(api, parallel_tool_calls=False)
        assert len(message["tool_calls"]) == 1


async def test_under_auto_the_model_may_answer_in_text() -> None:
    async with saying("It is  sunny. \n") as api:
        message, reason = await both(api)
        assert (message["content"], reason) == ("It is  sunny. \n", "stop")
        assert "tool_calls" not in message


@pytest.mark.parametrize("said", [CALL.replace("get_weather", "rm"), CALL[:-60], "<tool_call>\nno"])
async def test_what_is_no_call_is_text_and_nothing_is_lost(said: str) -> None:
    async with saying(said) as api:
        message, reason = await both(api)
        assert (message["content"], reason) == (said, "stop")


async def test_a_call_that_is_cut_off_finishes_with_length() -> None:
    async with saying(CALL) as api:
        count = len(api.encode(CALL[: CALL.index("Par")], special=False))
        message, reason = await both(api, max_tokens=count)
        assert reason == "length"
        assert ARGUMENTS.startswith(message["tool_calls"][0]["function"]["arguments"])
        done = len(api.encode(CALL[:-5], special=False))
        assert (await both(api, max_tokens=done))[1] == "tool_calls"


async def test_with_tool_choice_none_tools_are_neither_shown_nor_called() -> None:
    async with saying(CALL) as api:
        message, reason = await both(api, tool_choice="none")
        assert (message["content"], reason) == (CALL, "stop")
        plain = await api.post("/v1/chat/completions", body(tools=None))
        shown = await api.post("/v1/chat/completions", body())
        none = await api.post("/v1/chat/completions", body(tool_choice="none"))
        assert none.headers["x-compute-characters"] == plain.headers["x-compute-characters"]
        assert int(shown.headers["x-compute-characters"]) > int(none.headers["x-compute-characters"])


async def test_every_choice_is_read_by_itself() -> None:
    async with saying(f"Now: {CALL}") as api:
        request = body(n=3, temperature=1.0, seed=1)
        whole = (await api.post("/v1/chat/completions", request)).json
        assert [choice["finish_reason"] for choice in whole["choices"]] == ["tool_calls"] * 3
        events = (await api.post("/v1/chat/completions", {**request, "stream": True})).events
        ids = set()
        for index in range(3):
            message, reason = added_up(events, index)
            assert (message["content"], reason) == ("Now:", "tool_calls")
            ids |= {call[0] for call in message["calls"]}
        assert len(ids) == 3


async def test_logprobs_and_usage_count_every_token_though_some_say_nothing() -> None:
    async with saying(CALL) as api:
        request = body(logprobs=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
        whole = (await api.post("/v1/chat/completions", body(logprobs=True))).json
        events = (await api.post("/v1/chat/completions", {**request, "stream": True})).events
        streamed = [
            item
            for event in events[:-1]
            for choice in event["choices"]
            if choice["logprobs"] is not None
            for item in choice["logprobs"]["content"]
        ]
        assert streamed == whole["choices"][0]["logprobs"]["content"]
        assert len(streamed) == whole["usage"]["completion_tokens"] == events[-2]["usage"]["completion_tokens"]
        assert whole["choices"][0]["logprobs"]["refusal"] is None
        numbers = [event["usage"]["completion_tokens"] for event in events[:-1]]
        assert numbers == sorted(numbers)


async def test_a_template_that_knows_no_tools_is_told_in_the_last_message() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    async with saying('{"name": "get_weather", "parameters": {"city": "Paris"}}', template=template) as api:
        message, reason = await both(api)
        assert (message["tool_calls"][0]["function"]["arguments"], reason) == (ARGUMENTS, "tool_calls")
        ours = (await api.post("/v1/chat/completions", body())).headers["x-compute-characters"]
        theirs = await api.post("/v1/chat/completions", body(tool_prompt="Use them."))
        assert int(theirs.headers["x-compute-characters"]) < int(ours)


async def test_thoughts_have_a_field_of_their_own_and_are_counted() -> None:
    async with saying(f"I need the weather.\n</think>\n\nOne moment.\n{CALL}", template=THINKING) as api:
        message, reason = await both(api)
        assert list(message) == ["role", "content", "reasoning_content", "tool_calls", "refusal"]
        assert message["reasoning_content"] == "I need the weather."
        assert (message["content"], reason) == ("One moment.", "tool_calls")
        whole = (await api.post("/v1/chat/completions", body(tools=None))).json
        thoughts = len(api.encode("I need the weather.\n</think>", special=False))
        details = whole["usage"]["completion_tokens_details"]
        assert abs(details["reasoning_tokens"] - thoughts) <= 1
        options = {"include_usage": True}
        events = (await api.post("/v1/chat/completions", body(tools=None, stream=True, stream_options=options))).events
        assert events[-2]["usage"] == {
            **whole["usage"],
            "prompt_tokens_details": events[-2]["usage"]["prompt_tokens_details"],
        }


PIECES = [
    *(CALL, "\n", " ", "Hello", "<tool_call>", "</tool_call>", '{"name": "get_time"', "}", "<", "</think>", "<think>"),
    *('<tool_call>{"name": "get_time", "arguments": {}}</tool_call>', "é日", '", "arguments": {"a": [1, "}"]}'),
]


@pytest.mark.parametrize("seed", range(10))
async def test_whatever_the_model_says_the_stream_adds_up_to_the_answer(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices(PIECES, k=chance.randint(1, 9)))
    template = chance.choice([TEMPLATE, THINKING])
    async with saying(text, template=template) as api:
        for count in (300, chance.randint(1, 40)):
            await both(api, max_tokens=count, parallel_tool_calls=chance.random() < 0.7)
        await both(api, tools=None)
        await api.idle()


async def test_thoughts_are_left_alone_when_told_so() -> None:
    async with saying("Hm.</think>Yes.", template=THINKING, reasoning_parser="none") as api:
        message, _ = await both(api, tools=None)
        assert message["content"] == "Hm.</think>Yes."
        assert "reasoning_content" not in message


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "rm"}, "Tool with name rm not found", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "Tool with name rm not found", "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "`tool_choice` must be ", "tool_choice"),
    ({"tool_choice": 3}, "`tool_choice` must be ", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "`tool_choice.allowed_tools` must be ", "tool_choice"),
    ({"tools": None, "tool_choice": "required"}, "`tool_choice` needs `tools`", "tool_choice"),
    ({"tools": [{"type": "custom"}]}, "`tools[0].type` must be 'function'. Given: 'custom'", "tools[0]"),
    ({"tools": [TIME, TIME]}, "`tools[1].function.name` is used twice. Given: 'get_time'", "tools[1]"),
    (
        {"tools": [{"function": {"name": "a b"}}]},
        "`tools[0].function.name` must have 1 to 64",
        "tools[0].function.name",
    ),
    ({"tools": [{"function": {"name": ""}}]}, "`tools[0].function.name` must have 1 to 64", "tools[0].function.name"),
    (
        {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
        "`tools[0].function.parameters` must be a JSON schema of an object",
        "tools[0].function.parameters",
    ),
    ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "at most 128 entries. Given: 129", "tools"),
]


@pytest.mark.parametrize(("values", "sentence", "param"), REFUSED, ids=[sentence for _, sentence, _ in REFUSED])
async def test_wrong_tools_are_refused_by_name(values: dict[str, Any], sentence: str, param: str) -> None:
    async with saying(CALL) as api:
        answer = await api.post("/v1/chat/completions", body(**values))
        assert (answer.status, answer.json["error_type"]) == (422, "tool_error")
        assert answer.json["error"]["message"].startswith("Tool error: ")
        assert sentence in answer.json["error"]["message"]
        assert answer.json["error"]["param"] == param
        await api.idle()


async def test_without_grammars_calls_are_read_but_cannot_be_forced() -> None:
    async with saying(CALL, disable_grammar_support=True) as api:
        assert (await both(api))[1] == "tool_calls"
        answer = await api.post("/v1/chat/completions", body(tool_choice="required"))
        assert (answer.status, answer.json["error"]["param"]) == (422, "tools")
        assert "`--disable-grammar-support`" in answer.json["error"]["message"]


async def test_a_schema_that_cannot_be_used_is_refused_with_the_tools_name() -> None:
    wrong = {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "nonsense"}}}}}
    async with saying(CALL) as api:
        for choice in ("auto", "required"):
            answer = await api.post("/v1/chat/completions", body(tools=[TOOL, wrong], tool_choice=choice))
            assert (answer.status, answer.json["error"]["param"]) == (422, "tools")
            assert answer.json["error"]["message"].endswith("nonsense (`parameters` of the tool f)")


async def test_the_openai_client_reads_calls_whole_and_streamed() -> None:
    async with saying(f"Sure.\n{CALL}") as api:
        client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="-", max_retries=0)
        options: dict[str, Any] = {"model": "tiny", **body()}
        answer = await client.chat.completions.create(**options)
        calls = answer.choices[0].message.tool_calls
        assert calls is not None
        assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
        async with client.chat.completions.stream(**options) as helper:
            kinds = [event.type async for event in helper]
            final = await helper.get_final_completion()
        assert kinds.count("tool_calls.function.arguments.done") == 1
        assert "tool_calls.function.arguments.delta" in kinds
        message = final.choices[0].message
        assert message.content == "Sure."
        assert message.tool_calls is not None
        assert (message.tool_calls[0].function.name, message.tool_calls[0].function.arguments) == (
            "get_weather",
            ARGUMENTS,
        )
        assert final.choices[0].finish_reason == "tool_calls"
        await client.close()
