"""inference.proto says everything that REST's structs and the table of parameters say, and nothing else."""

import math
import types
import typing
from typing import Any

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tgi_proto import inference_pb2 as pb
from tgi_router.errors import ValidationError, WrongShape
from tgi_router.grpc_service import messages
from tgi_router.metrics import GRPC_METHODS
from tgi_router.parameters import ROWS, GenerateParameters, OpenAISampling
from tgi_router.schemas import openai, tgi

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]

# Fields of REST that a message does not need, and why.
NOT_IN_CHAT = {
    "stream": "the method says it",
    "functions": "refused: replaced by tools",
    "function_call": "refused: replaced by tools",
    "modalities": "refused: answers are text",
    "audio": "refused: answers are text",
    "web_search_options": "refused: answers are text",
}


def plain_name(field: FieldDescriptor) -> str:
    return field.name.removesuffix("_json")


def names(descriptor: Descriptor) -> set[str]:
    return {plain_name(field) for field in descriptor.fields}


# Requests -------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_of_parameters_is_a_field_and_every_field_is_a_row() -> None:
    """A new row fails here until inference.proto has a field for it, with the row's name."""
    assert names(pb.GenerateParameters.DESCRIPTOR) == set(ROWS)


def test_every_field_of_a_chat_request_is_in_both() -> None:
    fields = {field.name for struct in (openai.ChatRequest, OpenAISampling) for field in msgspec.structs.fields(struct)}
    assert names(pb.ChatRequest.DESCRIPTOR) == fields - set(NOT_IN_CHAT)


EXAMPLES = {
    FieldDescriptor.TYPE_STRING: "x",
    FieldDescriptor.TYPE_FLOAT: 0.5,
    FieldDescriptor.TYPE_BOOL: True,
    FieldDescriptor.TYPE_INT32: 7,
    FieldDescriptor.TYPE_INT64: 7,
    FieldDescriptor.TYPE_UINT32: 7,
    FieldDescriptor.TYPE_UINT64: 7,
}
GRAMMAR = {"type": "json", "value": {"type": "object", "properties": {"b": {}, "a": {}}}}
SPECIAL: dict[str, tuple[Any, Any]] = {  # field -> what is set, what REST reads
    "stop": (["x", "y"], ["x", "y"]),
    "logit_bias": ({5: 0.5}, {5: 0.5}),
    "grammar": ({"type": "json", "value_json": msgspec.json.encode(GRAMMAR["value"])}, GRAMMAR),
}


@pytest.mark.parametrize("field", list(pb.GenerateParameters.DESCRIPTOR.fields), ids=lambda field: field.name)
def test_a_parameter_arrives_as_rest_would_read_it(field: FieldDescriptor) -> None:
    given, read = SPECIAL.get(field.name) or (EXAMPLES[field.type],) * 2
    request = pb.GenerateRequest(inputs="hi", parameters=pb.GenerateParameters(**{field.name: given}))
    body = msgspec.json.decode(messages.body(request), type=tgi.GenerateRequest)
    assert body.parameters is not None
    for name in ROWS:
        found = getattr(body.parameters, name)
        assert (msgspec.to_builtins(found) if name == field.name else found) == (read if name == field.name else None)


def test_a_chat_request_arrives_as_rest_would_read_it() -> None:
    request = pb.ChatRequest(
        messages=[
            pb.ChatMessage(role="user", content="weather?"),
            pb.ChatMessage(role="user", content_json='[{"type": "text", "text": "in Oslo"}]', name="ann"),
            pb.ChatMessage(
                role="assistant",
                tool_calls=[
                    pb.ToolCall(
                        id="c1", type="function", function=pb.FunctionCall(name="w", arguments='{"city":"Oslo"}')
                    )
                ],
            ),
            pb.ChatMessage(role="tool", content="", tool_call_id="c1"),
        ],
        tools=[
            pb.Tool(
                type="function",
                function=pb.FunctionDefinition(name="w", parameters_json='{"z": 1, "a": {"k": [1.5, null]}}'),
            )
        ],
        tool_choice_json='{"type": "function", "function": {"name": "w"}}',
        response_format=pb.ResponseFormat(
            type="json_schema", json_schema=pb.JsonSchema(name="s", schema_json='{"type": "object"}', strict=True)
        ),
        chat_template_kwargs_json='{"think": false}',
        documents_json='[{"title": "t"}]',
        logit_bias={3: -100},
        seed=-1,
        n=2,
    )
    assert msgspec.json.decode(messages.body(request, stream=True)) == {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "user", "content": [{"type": "text", "text": "in Oslo"}], "name": "ann"},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"city":"Oslo"}'}}
                ],
            },
            {"role": "tool", "content": "", "tool_call_id": "c1"},
        ],
        "tools": [{"type": "function", "function": {"name": "w", "parameters": {"z": 1, "a": {"k": [1.5, None]}}}}],
        "tool_choice": {"type": "function", "function": {"name": "w"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
        },
        "chat_template_kwargs": {"think": False},
        "documents": [{"title": "t"}],
        "logit_bias": {"3": -100.0},
        "seed": -1,
        "n": 2,
        "stream": True,
    }


def test_a_schemas_properties_keep_their_order() -> None:
    """The order decides in which order the model writes them; a map of protobuf would lose it."""
    grammar = pb.Grammar(type="json", value_json='{"properties": {"z": {}, "a": {}, "m": {}}}')
    request = pb.GenerateRequest(inputs="x", parameters=pb.GenerateParameters(grammar=grammar))
    read = msgspec.json.decode(messages.body(request))["parameters"]["grammar"]["value"]
    assert list(read["properties"]) == ["z", "a", "m"]


def test_an_empty_text_was_given_and_an_absent_parameter_was_not() -> None:
    assert messages.body(pb.GenerateRequest()) == b'{"inputs":""}'
    given = messages.body(pb.GenerateRequest(parameters=pb.GenerateParameters()))
    assert given == b'{"inputs":"","parameters":{}}'
    zero = messages.body(pb.GenerateRequest(parameters=pb.GenerateParameters(top_n_tokens=0, do_sample=False)))
    assert msgspec.json.decode(zero)["parameters"] == {"top_n_tokens": 0, "do_sample": False}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_cannot_say_is_refused_by_name(value: float) -> None:
    request = pb.GenerateRequest(inputs="x", parameters=pb.GenerateParameters(temperature=value))
    with pytest.raises(ValidationError, match=r"`temperature` must be a 32-bit number\. Given: -?(inf|nan)"):
        messages.body(request)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1} , "inputs": "other"', "[" * 100_000])
def test_json_text_that_is_none_is_refused_with_its_place(text: str) -> None:
    tool = pb.Tool(type="function", function=pb.FunctionDefinition(name="f", parameters_json=text))
    with pytest.raises(WrongShape, match=r"tools\[0\]\.function\.parameters_json: "):
        messages.body(pb.ChatRequest(tools=[tool]))


def test_fields_of_a_newer_inference_proto_are_named_by_their_numbers() -> None:
    newer = pb.Details(finish_reason="x", generated_tokens=3, top_tokens=[pb.TopTokens()])
    older = pb.GenerateRequest.FromString(newer.SerializeToString())
    assert older.inputs == "x"
    assert messages.unknown_fields(older) == ["2", "7"]
    message = pb.ChatMessage.FromString(b"\xf8\x06\x01")  # field 111
    assert messages.unknown_fields(pb.ChatRequest(messages=[pb.ChatMessage(role="a"), message])) == ["messages[1].111"]
    assert messages.unknown_fields(pb.ChatRequest(logit_bias={1: 2.0})) == []


# Answers --------------------------------------------------------------------------------------------------------------


def members(annotation: Any) -> list[Any]:
    """The types of a union, through lists."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in members(part)]
    if typing.get_origin(annotation) is list:
        return members(typing.get_args(annotation)[0])
    return [annotation]


def check_same(struct: type[msgspec.Struct], descriptor: Descriptor) -> None:
    """Every field of `struct` that can be more than null is one of the message, and likewise below."""
    for field in msgspec.structs.fields(struct):
        kinds = [kind for kind in members(field.type) if kind is not type(None)]
        if all(kind is msgspec.UnsetType for kind in kinds):
            continue
        assert field.name in descriptor.fields_by_name, f"{descriptor.full_name} lacks {field.name}"
        below = descriptor.fields_by_name[field.name].message_type
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                if below.name == "TopTokens":  # a list of lists
                    below = below.fields_by_name["tokens"].message_type
                check_same(kind, below)


@pytest.mark.parametrize(
    ("struct", "message"),
    [
        (tgi.GenerateResponse, pb.GenerateResponse),
        (tgi.StreamResponse, pb.GenerateStreamResponse),
        (tgi.SimpleToken, pb.SimpleToken),
        (tgi.Info, pb.InfoResponse),
        (openai.ChatCompletion, pb.ChatResponse),
    ],
)
def test_everything_that_rest_answers_has_its_place_in_the_message(struct: Any, message: Any) -> None:
    check_same(struct, message.DESCRIPTOR)


def test_chunks_become_messages_whatever_their_number() -> None:
    head = b'data: {"object":"chat.completion.chunk","id":"i","created":1,"model":"m","system_fingerprint":"f",'
    tail = b'"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    first = head + b'"choices":[{"index":0,"delta":{"role":"assistant","reasoning_content":"hm"},' + tail
    call = b'"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"w","arguments":""}}]'
    second = head + b'"choices":[{"index":1,"delta":{%b},' % call + tail
    assert list(messages.chat_pieces(b"")) == []
    one, two = messages.chat_pieces(first + second)
    assert (one.choices[0].delta.role, one.choices[0].delta.reasoning_content) == ("assistant", "hm")
    assert not one.choices[0].delta.HasField("content")
    assert not one.choices[0].HasField("finish_reason")
    assert two.choices[0].index == 1
    assert two.choices[0].delta.tool_calls[0].function.name == "w"


def test_the_metrics_label_is_the_name_of_a_method() -> None:
    assert tuple(method.name for method in SERVICE.methods) == GRPC_METHODS


def test_the_parameters_of_a_request_without_any_are_absent() -> None:
    """`parameters` absent means sampling, `{}` means greedy."""
    absent = msgspec.json.decode(messages.body(pb.GenerateRequest(inputs="x")), type=tgi.GenerateRequest)
    assert absent.given_parameters() == GenerateParameters(do_sample=True)
