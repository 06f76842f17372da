"""The public gRPC service gives REST's answers: same tokens, texts, log-probabilities, usage, errors and counts."""

import secrets
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from api_kit import Api
from grpc_kit import address, client, failure, serving
from test_api_validation import FLAGS
from test_validation import TABLE
from tgi_proto import inference_pb2 as pb

PARAMETERS: list[dict[str, Any]] = [
    {"max_new_tokens": 8},
    {"max_new_tokens": 8, "details": True, "decoder_input_details": True, "top_n_tokens": 3},
    {"max_new_tokens": 8, "do_sample": True, "seed": 2**64 - 1, "details": True, "return_full_text": True},
    {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3, "details": True},
    {"max_new_tokens": 30, "stop": ["er", "ing"], "details": True},
    {"max_new_tokens": 4, "truncate": 2, "details": True, "decoder_input_details": True},
    {"max_new_tokens": 8, "do_sample": True, "best_of": 2, "details": True, "top_n_tokens": 2},
    {"max_new_tokens": 8, "logit_bias": {5: 1.5}, "min_p": 0.1, "presence_penalty": 0.5, "seed": 9, "details": True},
]
STREAMED = [p for p in PARAMETERS if not {"decoder_input_details", "best_of"} & p.keys()]
INPUTS = "def hello wörld 😀"


def request(parameters: dict[str, Any] | None, inputs: str = INPUTS) -> pb.GenerateRequest:
    given = None if parameters is None else pb.GenerateParameters(**parameters)
    return pb.GenerateRequest(inputs=inputs, parameters=given)


def body(parameters: dict[str, Any] | None, inputs: str = INPUTS) -> dict[str, Any]:
    return {"inputs": inputs} if parameters is None else {"inputs": inputs, "parameters": parameters}


def token(message: pb.Token) -> dict[str, Any]:
    return {"id": message.id, "text": message.text, "logprob": message.logprob, "special": message.special}


def prefill(message: pb.PrefillToken) -> dict[str, Any]:
    return {
        "id": message.id,
        "text": message.text,
        "logprob": message.logprob if message.HasField("logprob") else None,
    }


def details(message: pb.Details | pb.BestOfSequence, rest: dict[str, Any]) -> dict[str, Any]:
    """As REST says it; what REST leaves out is left out when it is empty."""
    values: dict[str, Any] = {
        "finish_reason": message.finish_reason,
        "generated_tokens": message.generated_tokens,
        "seed": message.seed if message.HasField("seed") else None,
        "prefill": [prefill(one) for one in message.prefill],
        "tokens": [token(one) for one in message.tokens],
    }
    if message.top_tokens:
        values["top_tokens"] = [[token(one) for one in position.tokens] for position in message.top_tokens]
    if isinstance(message, pb.BestOfSequence):
        values["generated_text"] = message.generated_text
    elif message.best_of_sequences:
        sequences = rest["best_of_sequences"]
        values["best_of_sequences"] = [
            details(one, other) for one, other in zip(message.best_of_sequences, sequences, strict=True)
        ]
    return values


def generated(message: pb.GenerateResponse, rest: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"generated_text": message.generated_text}
    if message.HasField("details"):
        values["details"] = details(message.details, rest["details"])
    return values


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: " ".join(p))
async def test_generate_says_what_rest_says(parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda bits: 11)  # the seeds of best_of
    async with serving() as api, client(api) as stub:
        rest = (await api.post("/generate", body(parameters))).json
        assert generated(await stub.Generate(request(parameters)), rest) == rest
        await api.idle()


@pytest.mark.parametrize("parameters", STREAMED, ids=lambda p: " ".join(p))
async def test_a_stream_says_what_rests_stream_and_the_whole_say(parameters: dict[str, Any]) -> None:
    async with serving() as api, client(api) as stub:
        events = (await api.post("/generate_stream", body(parameters))).events
        messages = [message async for message in stub.GenerateStream(request(parameters))]
        for message, event in zip(messages, events, strict=True):
            assert message.index == event["index"]
            assert token(message.token) == event["token"]
            assert [token(one) for one in message.top_tokens] == event.get("top_tokens", [])
            assert (message.generated_text if message.HasField("generated_text") else None) == event["generated_text"]
            assert message.HasField("details") == (event["details"] is not None)
        last = messages[-1]
        whole = await stub.Generate(request({**parameters, "details": True}))
        assert last.generated_text == whole.generated_text
        assert [one.token for one in messages] == list(whole.details.tokens)
        if parameters.get("details"):
            assert last.details.finish_reason == events[-1]["details"]["finish_reason"] == whole.details.finish_reason
            assert last.details.generated_tokens == len(messages)
            assert last.details.input_length == events[-1]["details"]["input_length"]
            assert last.details.seed == whole.details.seed
        await api.idle()


async def test_without_parameters_tgi_samples() -> None:
    async with serving(max_model_tokens=32) as api, client(api) as stub:
        answer = await stub.Generate(pb.GenerateRequest(inputs="h"))
        assert answer.generated_text
        call = api.server.metrics.request_success.get()
        assert call == 1
        last = [message async for message in stub.GenerateStream(request({"details": True}, "h"))][-1]
        assert not last.details.HasField("seed"), "`{}` is greedy"


# Chat -----------------------------------------------------------------------------------------------------------------

CHATS: list[dict[str, Any]] = [
    {"max_tokens": 8, "temperature": 0},
    {"max_tokens": 8, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"max_completion_tokens": 8, "temperature": 0, "model": "mine"},
    {"max_tokens": 20, "temperature": 0, "stop": ["er", "ing"]},
    {"max_tokens": 20, "temperature": 0, "stop": ["er", "ing"], "include_stop_str_in_output": True},
]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello 😀"}]


def chat(values: dict[str, Any], **others: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.ChatMessage(**message) for message in MESSAGES], **values, **others)


def logprobs(message: Any) -> Any:
    if not message.HasField("logprobs"):
        return None
    return [
        {
            "token": one.token,
            "logprob": one.logprob,
            "bytes": list(one.bytes),
            "top_logprobs": [
                {"token": top.token, "logprob": top.logprob, "bytes": list(top.bytes)} for top in one.top_logprobs
            ],
        }
        for one in message.logprobs.content
    ]


def content(value: dict[str, Any] | None) -> Any:
    return None if value is None else value["content"]


@pytest.mark.parametrize("values", CHATS, ids=lambda values: " ".join(values))
async def test_chat_says_what_rest_says(values: dict[str, Any]) -> None:
    async with serving() as api, client(api) as stub:
        await api.post("/v1/chat/completions", {"messages": MESSAGES, **values})  # so that both find the prompt cached
        rest = (await api.post("/v1/chat/completions", {"messages": MESSAGES, **values})).json
        answer = await stub.Chat(chat(values))
        assert (answer.object, answer.model, answer.system_fingerprint) == (
            rest["object"],
            rest["model"],
            rest["system_fingerprint"],
        )
        assert answer.id.startswith("chatcmpl-")
        for choice, other in zip(answer.choices, rest["choices"], strict=True):
            assert (choice.index, choice.finish_reason) == (other["index"], other["finish_reason"])
            assert (choice.message.role, choice.message.content) == (
                other["message"]["role"],
                other["message"]["content"],
            )
            assert logprobs(choice) == content(other["logprobs"])
        usage = answer.usage
        assert [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens] == [
            rest["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        ]
        assert usage.prompt_tokens_details.cached_tokens == rest["usage"]["prompt_tokens_details"]["cached_tokens"]
        await api.idle()


@pytest.mark.parametrize("values", CHATS, ids=lambda values: " ".join(values))
async def test_a_chats_stream_adds_up_to_the_whole(values: dict[str, Any]) -> None:
    async with serving() as api, client(api) as stub:
        whole = await stub.Chat(chat(values))
        options = pb.StreamOptions(include_usage=True)
        *pieces, usage = [message async for message in stub.ChatStream(chat(values, stream_options=options))]
        assert len({message.id for message in pieces}) == len({message.created for message in pieces}) == 1
        assert all(not message.HasField("usage") for message in pieces)
        assert list(usage.choices) == []
        assert usage.usage.completion_tokens == whole.usage.completion_tokens
        for choice in whole.choices:
            own = [message.choices[0] for message in pieces if message.choices[0].index == choice.index]
            assert [one.delta.role for one in own if one.delta.HasField("role")] == ["assistant"]
            assert "".join(one.delta.content for one in own) == choice.message.content
            assert [one.finish_reason for one in own if one.HasField("finish_reason")] == [choice.finish_reason]
            streamed = [one for piece in own for one in piece.logprobs.content]
            assert streamed == list(choice.logprobs.content)
        await api.idle()


async def test_tools_reach_the_prompt_as_over_rest() -> None:
    """What a model does with them: integration-tests/test_grpc.py."""
    function = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
    definition = pb.FunctionDefinition(
        name="weather", description="of a city", parameters_json='{"type": "object", "properties": {}}'
    )
    values = {"max_tokens": 8, "temperature": 0, "tool_choice": "auto"}
    async with serving(max_model_tokens=1000, num_blocks=300) as api, client(api) as stub:
        tools = [{"type": "function", "function": function}]
        rest = await api.post("/v1/chat/completions", {"messages": MESSAGES, "tools": tools, **values})
        answer = await stub.Chat(chat(values, tools=[pb.Tool(type="function", function=definition)]))
        assert answer.choices[0].message.content == rest.json["choices"][0]["message"]["content"]
        assert answer.usage.prompt_tokens == rest.json["usage"]["prompt_tokens"]
        without = await stub.Chat(chat({"max_tokens": 8, "temperature": 0}))
        assert without.usage.prompt_tokens < answer.usage.prompt_tokens


# Tokenize and Info ----------------------------------------------------------------------------------------------------


async def test_tokenize_says_what_rest_says() -> None:
    async with serving() as api, client(api) as stub:
        rest = (await api.post("/tokenize", {"inputs": INPUTS})).json
        answer = await stub.Tokenize(pb.TokenizeRequest(inputs=INPUTS))
        assert [{"id": t.id, "text": t.text, "start": t.start, "stop": t.stop} for t in answer.tokens] == rest


async def test_info_says_what_rest_says() -> None:
    async with serving() as api, client(api) as stub:
        rest = (await api.get("/info")).json
        answer = await stub.Info(pb.InfoRequest())
        said = {field.name: value for field, value in answer.ListFields()}
        assert said == {name: value for name, value in rest.items() if value is not None}


# Errors ---------------------------------------------------------------------------------------------------------------

Send = Callable[[Any], Any]
WRONG: list[tuple[str, dict[str, Any], Send]] = [
    ("/generate", body({}, ""), lambda stub: stub.Generate(request({}, ""))),
    ("/generate", body({"temperature": 0.0}), lambda stub: stub.Generate(request({"temperature": 0.0}))),
    ("/generate", body({"top_n_tokens": 99}), lambda stub: stub.Generate(request({"top_n_tokens": 99}))),
    ("/generate", body({"best_of": 3}), lambda stub: stub.Generate(request({"best_of": 3}))),
    ("/generate", body({"adapter_id": "x"}), lambda stub: stub.Generate(request({"adapter_id": "x"}))),
    ("/generate", body({"max_new_tokens": 9999}), lambda stub: stub.Generate(request({"max_new_tokens": 9999}))),
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 999}, lambda stub: stub.Chat(chat({"n": 999}))),
    ("/v1/chat/completions", {"messages": MESSAGES, "top_p": 2.0}, lambda stub: stub.Chat(chat({"top_p": 2.0}))),
]


@pytest.mark.parametrize(("path", "wrong", "send"), WRONG, ids=[f"{path} {list(b)}" for path, b, _ in WRONG])
async def test_a_refused_request_gets_tgis_sentence(path: str, wrong: dict[str, Any], send: Send) -> None:
    async with serving() as api, client(api) as stub:
        rest = (await api.post(path, wrong)).json
        error, trailing = await failure(send(stub))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == (rest["error"]["message"] if path.startswith("/v1") else rest["error"])
        assert trailing["error_type"] == rest["error_type"] == "validation"
        if path.startswith("/v1"):
            assert trailing["error_param"] == rest["error"]["param"]
        assert trailing["x-request-id"]
        assert api.server.metrics.request_failure.get("validation") == 2
        await api.idle()


async def test_every_row_of_the_validation_table_gets_its_sentence_whole_and_streamed() -> None:
    told = 0
    async with serving(**FLAGS) as api, client(api) as stub:
        for values, sentence in TABLE:
            parameters = dict(values)
            try:
                wrong = request(parameters, parameters.pop("inputs", "hello"))
            except (TypeError, ValueError):  # a negative token id, a seed beyond 64 bits: protobuf cannot say it
                continue
            told += 1
            for method in (stub.Generate, stub.GenerateStream)[: 1 if "best_of" in values else 2]:
                error, _ = await failure(method(wrong))
                assert (error.code(), error.details()) == (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"Input validation error: {sentence}",
                )
        await api.idle()
    assert told >= len(TABLE) - 2


async def test_what_a_stream_cannot_show_is_refused_as_over_rest() -> None:
    async with serving() as api, client(api) as stub:
        rest = await api.post("/generate_stream", body({"decoder_input_details": True}))
        error, _ = await failure(stub.GenerateStream(request({"decoder_input_details": True})))
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, rest.events[-1]["error"])


async def test_bytes_that_are_no_message_are_the_callers_mistake() -> None:
    async with serving() as api, grpc.aio.insecure_channel(address(api)) as channel:
        call = channel.unary_unary("/tgi.inference.v1.Inference/Generate")
        error, trailing = await failure(call(b"\x0a\xff"))
        assert (error.code(), trailing["error_type"]) == (grpc.StatusCode.INVALID_ARGUMENT, "validation")
        assert error.details().startswith("Failed to parse the request message: ")
        error, _ = await failure(channel.unary_unary("/tgi.inference.v1.Inference/Nothing")(b""))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_overloaded_server_says_when_to_come_back() -> None:
    async with serving(max_concurrent_requests=1) as api, client(api) as stub:
        error, trailing = await failure(stub.Generate(request({"best_of": 2, "do_sample": True})))
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Model is overloaded")
        assert trailing["error_type"] == "overloaded"
        assert int(trailing["grpc-retry-pushback-ms"]) == 1000 * int(trailing["retry-after"]) > 0


async def test_a_message_beyond_the_payload_limit_is_refused() -> None:
    async with serving(payload_limit=1000) as api, client(api) as stub:
        error, _ = await failure(stub.Generate(request({}, "x" * 2000)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1000" in error.details()


async def test_a_row_that_fails_on_the_shard_is_our_error_and_names_its_type() -> None:
    async with serving() as api, client(api) as stub:
        token_id = api.encode("h", special=False)[0]
        async with serving(error_token=token_id) as broken, client(broken) as other:
            error, trailing = await failure(other.Generate(request({"max_new_tokens": 2}, "h")))
            assert (error.code(), trailing["error_type"]) == (grpc.StatusCode.INTERNAL, "generation")
            assert error.details().startswith("Request failed during generation: ")
        assert (await stub.Generate(request({"max_new_tokens": 1}, "h"))).generated_text


async def test_a_long_sentence_from_the_client_fits_into_the_metadata() -> None:
    async with serving() as api, client(api) as stub:
        error, trailing = await failure(stub.Generate(request({"adapter_id": "ü" * 100_000})))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("Input validation error: `adapter_id` 'ü")
        assert error.details().endswith("…")
        assert trailing["error_type"] == "validation"


async def test_an_error_of_ours_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as api, client(api) as stub:
        monkeypatch.setattr(api.server.infer.validator, "validate", None)
        error, trailing = await failure(stub.Generate(request({})))
        assert (error.code(), trailing["error_type"]) == (grpc.StatusCode.INTERNAL, "internal")
        assert "not callable" not in error.details()
        assert "not callable" in caplog.text


# Metadata, unknown fields, counts -------------------------------------------------------------------------------------


async def test_a_calls_id_is_the_clients_or_a_new_one_and_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving() as api, client(api) as stub:
        call = stub.Generate(request({"max_new_tokens": 1}), metadata=(("x-request-id", "mine"),))
        await call
        assert dict(await call.initial_metadata())["x-request-id"] == "mine"
        (line,) = [vars(record) for record in caplog.records if record.message == "Success"]
        assert line["request_id"] == "mine"
        strange = stub.Generate(request({"max_new_tokens": 1}), metadata=(("x-request-id", "a b"),))
        await strange
        assert len(dict(await strange.initial_metadata())["x-request-id"]) == 32
        _, trailing = await failure(stub.Generate(request({}, ""), metadata=(("x-request-id", "wrong"),)))
        assert trailing["x-request-id"] == "wrong"


async def test_fields_of_a_newer_client_are_listed_or_refused() -> None:
    newer = request({"max_new_tokens": 1}).SerializeToString() + b"\xf8\x06\x01"  # field 111
    for strict in (False, True):
        async with serving(strict_params=strict) as api, grpc.aio.insecure_channel(address(api)) as channel:
            call = channel.unary_unary("/tgi.inference.v1.Inference/Generate")(newer)
            if strict:
                error, trailing = await failure(call)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "`111`" in error.details()
                assert trailing["error_param"] == "111"
            else:
                await call
                assert dict(await call.initial_metadata())["x-ignored-params"] == "111"


async def test_calls_count_as_rest_requests_do_and_by_method() -> None:
    def counts(api: Api) -> list[float]:
        metrics = api.server.metrics
        return [
            metrics.request_count.get(),
            metrics.request_success.get(),
            metrics.request_duration.count(),
            metrics.request_input_length.count(),
            metrics.request_generated_tokens.count(),
            metrics.request_time_to_first_token_duration.count(),
        ]

    small = {"max_new_tokens": 3}
    async with serving() as api, client(api) as stub:
        await api.post("/generate", body(small))
        await api.post("/generate_stream", body(small))
        await api.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3})
        await api.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "stream": True})
        rest = counts(api)
        await stub.Generate(request(small))
        assert len([one async for one in stub.GenerateStream(request(small))]) == 3
        await stub.Chat(chat({"max_tokens": 3}))
        assert len([one async for one in stub.ChatStream(chat({"max_tokens": 3}))]) == 3
        assert counts(api) == [2 * count for count in rest]
        await stub.Info(pb.InfoRequest())
        await stub.Tokenize(pb.TokenizeRequest(inputs="x"))
        exposition = api.server.metrics.exposition()
        for method in pb.DESCRIPTOR.services_by_name["Inference"].methods:
            assert f'tgi_grpc_request_count{{method="{method.name}"}} 1\n' in exposition
