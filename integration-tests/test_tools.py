"""Tools on the demo model, which was trained to call them, through the clients people use.

It calls one whenever there are tools and no result yet, and copies the word from the question more or less well. So
tests look at which function is called, at shape and validity, and at streamed = not streamed; not at cleverness.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from harness import Json, Server
from huggingface_hub import InferenceClient
from pydantic import BaseModel

QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


def tool(name: str, argument: str, **schema: Any) -> Any:
    parameters = {"type": "object", "properties": {argument: {"type": "string", **schema}}, "required": [argument]}
    description = f"{name.replace('_', ' ').capitalize()}."
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: list[Any] = [tool("get_weather", "city"), tool("get_time", "timezone")]
OPTIONS: Json = {"model": "tgi", "temperature": 0, "max_tokens": 120}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def calls_of(message: Any) -> list[tuple[str, Json]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def streamed(client: openai.OpenAI, **options: Any) -> tuple[Any, str | None]:
    """What OpenAI's own helper makes of the stream."""
    with client.chat.completions.stream(**{**OPTIONS, "messages": QUESTION, **options}) as stream:
        choice = stream.get_final_completion().choices[0]
    return choice.message, choice.finish_reason


def test_a_question_a_call_its_result_and_an_answer(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**OPTIONS, messages=QUESTION, tools=TOOLS).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    assert calls_of(first.message) == [("get_weather", {"city": "Paris"})]
    assert first.message.tool_calls is not None
    message, reason = streamed(client, tools=TOOLS)
    assert (calls_of(message), message.content, reason) == (calls_of(first.message), None, "tool_calls")
    assert message.tool_calls[0].id != first.message.tool_calls[0].id
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": '{"result": "sunny"}'}
    messages = [*QUESTION, first.message, result]
    second = client.chat.completions.create(**OPTIONS, messages=messages, tools=TOOLS).choices[0]
    assert second.finish_reason == "stop"
    assert "sunny" in (second.message.content or "")


def test_under_auto_it_may_answer_in_text(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages: Any = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"result": "42"}'},
    ]
    choice = client.chat.completions.create(**OPTIONS, messages=messages, tools=TOOLS).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert choice.message.content
    message, reason = streamed(client, messages=messages, tools=TOOLS)
    assert (message.content, reason) == (choice.message.content, "stop")


CHOICES = ["required", {"type": "function", "function": {"name": "get_time"}}, "get_time"]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("temperature", [0, 1.3])
def test_a_forced_call_is_made_and_valid_whatever_was_asked(
    client: openai.OpenAI, choice: Any, temperature: float
) -> None:
    tools = [TOOLS[0], tool("get_time", "timezone", enum=["UTC", "CET"])]
    messages: Any = [{"role": "user", "content": "What does os.path.join do?"}]
    options = {**OPTIONS, "temperature": temperature, "seed": 4, "messages": messages, "tools": tools}
    answer = client.chat.completions.create(**options, tool_choice=choice).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    calls = calls_of(answer.message)
    assert calls
    for name, arguments in calls:
        if name == "get_time":
            assert arguments["timezone"] in ("UTC", "CET")
        else:
            assert choice == "required"
            assert list(arguments) == ["city"]
    message, reason = streamed(client, **options, tool_choice=choice)
    assert (calls_of(message), reason) == (calls, "tool_calls")


def test_with_none_no_call_is_made(client: openai.OpenAI) -> None:
    options = {**OPTIONS, "messages": QUESTION, "max_tokens": 20}
    answer = client.chat.completions.create(**options, tools=TOOLS, tool_choice="none").choices[0]
    assert answer.message.tool_calls is None
    assert answer.message.content == client.chat.completions.create(**options).choices[0].message.content


def test_parallel_calls_can_be_forbidden(client: openai.OpenAI) -> None:
    for seed in range(3):
        choice = client.chat.completions.create(
            **{**OPTIONS, "temperature": 1.5, "seed": seed, "messages": QUESTION},
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
        ).choices[0]
        assert len(choice.message.tool_calls or []) == 1 or choice.finish_reason == "length"


class City(BaseModel):
    name: Literal["Paris", "Rome"]  # a model that small does not always find the end of a text
    size: Literal["small", "large"]


class GetWeather(BaseModel):
    city: str


def test_openai_parses_pydantic_models(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**OPTIONS, messages=QUESTION, response_format=City).choices[0].message
    assert isinstance(answer.parsed, City)
    weather: Any = openai.pydantic_function_tool(GetWeather, name="get_weather")
    called = client.chat.completions.parse(
        **{**OPTIONS, "max_tokens": 400}, messages=QUESTION, tools=[weather], tool_choice="required"
    )
    assert called.choices[0].message.tool_calls is not None
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)
    with client.chat.completions.stream(**OPTIONS, messages=QUESTION, response_format=City) as stream:
        final: Any = stream.get_final_completion().choices[0].message
    assert final.parsed == answer.parsed


async def test_openai_async_streams_calls(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        stream = await client.chat.completions.create(
            **OPTIONS, messages=QUESTION, tools=TOOLS, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    pieces = [call for delta in deltas for call in delta.tool_calls or []]
    assert (pieces[0].index, pieces[0].type, pieces[0].id is not None) == (0, "function", True)
    assert all(piece.id is None for piece in pieces[1:])
    functions = [piece.function for piece in pieces if piece.function is not None]
    assert functions[0].name == "get_weather"
    assert "".join(function.arguments or "" for function in functions) == '{"city": "Paris"}'
    assert len(functions) > 2  # as they come
    assert chunks[-1].usage is not None


def test_hub_chat_completion_with_tools(server: Server) -> None:
    hub = InferenceClient(server.url)
    answer = hub.chat_completion(QUESTION, tools=TOOLS, tool_choice="auto", max_tokens=120, temperature=0).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls
    function = answer.message.tool_calls[0].function
    assert (function.name, json.loads(function.arguments)) == ("get_weather", {"city": "Paris"})
    chunks = hub.chat_completion(QUESTION, tools=TOOLS, max_tokens=120, temperature=0, stream=True)
    pieces = [call.function for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(piece.arguments or "" for piece in pieces) == function.arguments
    forced = hub.chat_completion(QUESTION, tools=TOOLS, tool_choice="required", max_tokens=120, temperature=0)
    assert forced.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tool_choice": "get_rich"}, "Tool with name get_rich not found"),
        ({"tools": [tool("f", "a", pattern="(")], "tool_choice": "required"}, "of the tool f"),
        ({"tools": [tool("a b", "a")]}, "`tools[0].function.name` must have 1 to 64"),
    ],
)
def test_wrong_tools_raise_typed_errors(client: openai.OpenAI, fields: Json, sentence: str) -> None:
    options: Json = {**OPTIONS, "messages": QUESTION, "tools": TOOLS, **fields}
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(**options)
    assert sentence in caught.value.message
    assert caught.value.param is not None
