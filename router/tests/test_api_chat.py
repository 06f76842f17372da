"""/v1/chat/completions: OpenAI's shapes, TGI's extras, and the `openai` client itself."""

from typing import Any

import openai
import pytest
from api_kit import Api, serving
from fake_shard import logprob

MESSAGES = [{"role": "user", "content": "hello"}]
RENDERED = "<s>[user]hello\n[assistant]"
CHUNK = ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]


def body(**values: Any) -> dict[str, Any]:
    return {"model": "tgi", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, **values}


def expected(api: Api, count: int = 6, seed: int | None = None, rendered: str = RENDERED) -> str:
    return api.expected_text(rendered, count, seed, special=False)


def deltas(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"]["content"] for choice in choices)


async def test_a_whole_answer_has_openais_shape() -> None:
    async with serving() as api:
        answer = await api.post("/v1/chat/completions", body())
        prompt = len(api.encode(RENDERED, special=False))
        assert list(answer.json) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
        assert answer.json["object"] == "chat.completion"
        assert answer.json["id"].startswith("chatcmpl-")
        assert answer.json["model"] == "tiny"
        assert answer.json["system_fingerprint"] == "4.0.0-native"
        assert answer.json["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": expected(api), "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ]
        assert answer.json["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": 6,
            "total_tokens": prompt + 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert answer.headers["x-prompt-tokens"] == str(prompt)
        assert answer.headers["x-compute-characters"] == str(len(RENDERED))
        again = await api.post("/v1/chat/completions", body())
        assert again.json["id"] != answer.json["id"]
        assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        await api.idle()


async def test_a_stream_has_the_role_once_and_one_identity_and_ends_with_done() -> None:
    async with serving() as api:
        events = (await api.post("/v1/chat/completions", body(stream=True))).events
        assert events[-1] == "[DONE]"
        chunks = events[:-1]
        assert all(list(chunk) == CHUNK for chunk in chunks)
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert not any("role" in chunk["choices"][0]["delta"] for chunk in chunks[1:])
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert deltas(events) == expected(api)


async def test_usage_comes_in_a_chunk_of_its_own_before_done_or_in_every_chunk() -> None:
    async with serving() as api:
        events = (
            await api.post("/v1/chat/completions", body(stream=True, stream_options={"include_usage": True}))
        ).events
        assert events[-2]["choices"] == []
        assert events[-2]["usage"]["completion_tokens"] == 6
        assert all(event["usage"] is None for event in events[:-2])
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = (await api.post("/v1/chat/completions", body(stream=True, stream_options=options))).events
        assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [1, 2, 3, 4, 5, 6, 6]


async def test_several_choices_stand_in_order_and_are_the_same_streamed() -> None:
    async with serving() as api:
        request = body(n=3, temperature=1.0, seed=42)
        whole = (await api.post("/v1/chat/completions", request)).json
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in whole["choices"]]
        assert texts[0] == expected(api, seed=42)
        assert len(set(texts)) == 3
        assert whole["usage"]["completion_tokens"] == 18
        assert whole["usage"]["prompt_tokens"] == len(api.encode(RENDERED, special=False))
        events = (await api.post("/v1/chat/completions", {**request, "stream": True})).events
        assert [deltas(events, index) for index in range(3)] == texts
        roles = [c["index"] for e in events[:-1] for c in e["choices"] if "role" in c["delta"]]
        assert sorted(roles) == [0, 1, 2]
        await api.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_removed_and_the_reason_is_stop(stream: bool) -> None:
    async with serving() as api:
        text = expected(api, 40)
        start = next(i for i in range(12, 35) if "\ufffd" not in text[i : i + 4] and i == text.find(text[i : i + 4]))
        stop = text[start : start + 4]

        async def run(**values: Any) -> tuple[str, str]:
            request = body(max_tokens=60, stop=stop, stream=stream, **values)
            answer = await api.post("/v1/chat/completions", request)
            if not stream:
                choice = answer.json["choices"][0]
                return choice["message"]["content"], choice["finish_reason"]
            return deltas(answer.events), answer.events[-2]["choices"][0]["finish_reason"]

        assert await run() == (text[:start], "stop")
        assert await run(include_stop_str_in_output=True) == (text[: start + 4], "stop")
        await api.idle()


async def test_a_stop_string_that_ends_with_the_last_allowed_token_is_removed_too() -> None:
    async with serving() as api:
        ids = api.expected_ids(api.encode(RENDERED, special=False), 12)
        count = next(n for n in range(4, 12) if "\ufffd" not in api.tokenizer.decode([ids[n]]) and ids[n] > 1)
        last = api.tokenizer.decode([ids[count]])
        text = api.tokenizer.decode(ids[: count + 1])
        answer = await api.post("/v1/chat/completions", body(max_tokens=count + 1, stop=[last]))
        choice = answer.json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.find(last)], "stop")


async def test_logprobs_name_tokens_bytes_and_alternatives_equally_streamed_and_not() -> None:
    async with serving() as api:
        ids = api.expected_ids(api.encode(RENDERED, special=False), 6)
        request = body(logprobs=True, top_logprobs=2)
        whole = (await api.post("/v1/chat/completions", request)).json["choices"][0]["logprobs"]["content"]
        assert [item["logprob"] for item in whole] == [logprob(token_id) for token_id in ids]
        assert [len(item["top_logprobs"]) for item in whole] == [2] * 6
        assert list(whole[0]) == ["token", "logprob", "bytes", "top_logprobs"]
        assert bytes(byte for item in whole for byte in item["bytes"]).decode(errors="replace") == expected(api)
        events = (await api.post("/v1/chat/completions", {**request, "stream": True})).events
        streamed = [item for e in events[:-1] for item in e["choices"][0]["logprobs"]["content"]]
        assert streamed == whole
        refused = await api.post("/v1/chat/completions", body(logprobs=True, top_logprobs=6))
        assert "`top_logprobs` must be >= 0 and <= 5. Given: 6" in refused.json["error"]["message"]


async def test_end_of_sequence_ends_with_stop_unless_it_is_ignored() -> None:
    async with serving() as api:
        ids = api.expected_ids(api.encode(RENDERED, special=False), 8)
    async with serving(eos=ids[3]) as api:
        answer = (await api.post("/v1/chat/completions", body(max_tokens=8))).json
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 4
        answer = (await api.post("/v1/chat/completions", body(max_tokens=8, ignore_eos=True))).json
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 8


async def test_null_is_absent_and_max_completion_tokens_wins() -> None:
    names = [
        "stop",
        "n",
        "seed",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "response_format",
        "user",
        "stream",
    ]
    names += ["stream_options", "logit_bias", "top_p", "frequency_penalty", "presence_penalty", "max_tokens", "top_k"]
    async with serving() as api:
        request = body(**dict.fromkeys(names), max_completion_tokens=3)
        answer = await api.post("/v1/chat/completions", request)
        assert answer.status == 200, answer.body
        assert answer.json["usage"]["completion_tokens"] == 3
        both = (await api.post("/v1/chat/completions", body(max_tokens=5, max_completion_tokens=2))).json
        assert both["usage"]["completion_tokens"] == 2


async def test_without_a_temperature_it_samples_and_the_seed_decides() -> None:
    async with serving() as api:
        request = body(seed=9)
        del request["temperature"]
        answer = (await api.post("/v1/chat/completions", request)).json
        assert answer["choices"][0]["message"]["content"] == expected(api, seed=9)


async def test_a_final_assistant_message_is_continued() -> None:
    async with serving() as api:
        messages = [*MESSAGES, {"role": "assistant", "content": "this is"}]
        continued = "<s>[user]hello\n[assistant]this is"
        answer = (await api.post("/v1/chat/completions", body(messages=messages))).json
        assert answer["choices"][0]["message"]["content"] == expected(api, rendered=continued)
        fresh = body(messages=messages, add_generation_prompt=True)
        answer = (await api.post("/v1/chat/completions", fresh)).json
        assert answer["choices"][0]["message"]["content"] == expected(api, rendered=f"{continued}\n[assistant]")
        bare = body(messages=MESSAGES, add_generation_prompt=False)
        answer = (await api.post("/v1/chat/completions", bare)).json
        assert answer["choices"][0]["message"]["content"] == expected(api, rendered="<s>[user]hello\n")
        both = body(messages=messages, add_generation_prompt=True, continue_final_message=True)
        assert "exclude each other" in (await api.post("/v1/chat/completions", both)).json["error"]["message"]


async def test_messages_reach_the_template_with_parts_joined_and_arguments_parsed() -> None:
    template = "{% if tools %}{% endif %}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ flavour }}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{"}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [call, broken], "refusal": None},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]
    rendered = (
        '{"role": "system", "content": "ab", "name": "n"}'
        '{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '
        '{"a": [1]}}}, {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{"}}]}'
        '{"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}sweet'
    )
    async with serving(model={"chat_template": template}, max_model_tokens=1000) as api:
        request = body(messages=messages, chat_template_kwargs={"flavour": "sweet"})
        answer = await api.post("/v1/chat/completions", request)
        assert answer.headers["x-compute-characters"] == str(len(rendered))
        assert answer.json["choices"][0]["message"]["content"] == expected(api, rendered=rendered)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "`tools[0].function` must be an object"),
    ({"functions": [{}]}, "`functions` is not supported: it was replaced by `tools`"),
    ({"function_call": "auto"}, "`function_call` is not supported"),
    ({"modalities": ["text", "audio"]}, '`modalities` must be ["text"]'),
    ({"audio": {"voice": "ash"}}, "`audio` is not supported"),
    ({"web_search_options": {}}, "`web_search_options` is not supported"),
    ({"response_format": {"type": "xml"}}, '`response_format` must have the type "text", "json_object"'),
    ({"response_format": {"type": "json_schema"}}, "needs an object `json_schema`"),
    ({"presence_penalty": 2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"min_tokens": 7}, "`min_tokens` must be <= `max_tokens`. Given: 7 and 6"),
    ({"logit_bias": {"511": 1}}, "`logit_bias` must name token ids >= 0 and < 511. Given: 511"),
    ({"top_p": -0.5}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"max_tokens": 0}, "`max_tokens` must be strictly positive"),
    ({"n": 0}, "`n` must be >= 1 and <= 128. Given: 0"),
    ({"n": 129}, "`n` must be >= 1 and <= 128. Given: 129"),
    ({"messages": []}, "`messages` cannot be empty"),
    ({"chat_template_kwargs": {"messages": 1}}, "`chat_template_kwargs` may not contain `messages`"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "`messages[0].content[0]` must be of type 'text'",
    ),
    ({"messages": [{"role": "user"}]}, "messages[0]: missing field `content`"),
    ({"messages": [{"content": "x"}]}, "messages[0].role: Expected `str`"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: Expected `str | array | null`"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls: Expected `array` of `object`"),
    ({"stream": "yes"}, "stream: Expected `bool | null`, got `str`"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=[str(values) for values, _ in REFUSED])
async def test_what_is_not_built_or_wrong_is_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    async with serving() as api:
        answer = await api.post("/v1/chat/completions", body(**values))
        assert answer.status == 422
        assert sentence in answer.json["error"]["message"]
        assert answer.json["error"]["type"] == "invalid_request_error"
        await api.idle()


@pytest.mark.parametrize(
    "values",
    [
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"presence_penalty": 0},
        {"logit_bias": {}},
        {"parallel_tool_calls": True},
        {"top_k": 5, "typical_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "user": "me"},
    ],
    ids=str,
)
async def test_neutral_and_known_fields_pass(values: dict[str, Any]) -> None:
    async with serving() as api:
        assert (await api.post("/v1/chat/completions", body(**values))).status == 200


async def test_a_template_that_refuses_is_a_422() -> None:
    async with serving(model={"chat_template": "{{ raise_exception('no system role') }}"}) as api:
        answer = await api.post("/v1/chat/completions", body())
        assert (answer.status, answer.json["error_type"]) == (422, "template_error")
        assert answer.json["error"]["message"] == "Template error: no system role"
        assert api.server.metrics.request_failure.get("template") == 1
        streamed = await api.post("/v1/chat/completions", body(stream=True))
        assert streamed.status == 422  # before the first token an error is a status


async def test_the_model_that_was_asked_for_is_echoed() -> None:
    async with serving() as api:
        assert (await api.post("/v1/chat/completions", body(model="gpt-x"))).json["model"] == "gpt-x"
        assert (await api.post("/v1/chat/completions", body(model=None))).json["model"] == "tiny"


async def test_the_openai_client_reads_answers_streams_and_errors() -> None:
    async with serving(max_concurrent_requests=8) as api:
        client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="-", max_retries=0)
        options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
        answer = await client.chat.completions.create(**options)
        assert answer.choices[0].message.content == expected(api)
        stream = await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected(api)
        assert chunks[-1].usage is not None
        async with client.chat.completions.stream(**options) as helper:
            async for _ in helper:
                final = helper.current_completion_snapshot
        assert final.choices[0].message.content == expected(api)
        assert final.choices[0].message.role == "assistant"
        with pytest.raises(openai.UnprocessableEntityError, match="top_p") as caught:
            await client.chat.completions.create(**options, top_p=2)
        assert caught.value.param == "top_p"
        with pytest.raises(openai.RateLimitError):
            await overload(api, client, options)
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="tiny", input="x")
        await client.close()


async def overload(api: Api, client: openai.AsyncOpenAI, options: dict[str, Any]) -> None:
    api.server.infer.num_running += 8
    try:
        await client.chat.completions.create(**options)
    finally:
        api.server.infer.num_running -= 8
