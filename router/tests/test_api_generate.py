"""/generate, /generate_stream and /: TGI's bytes."""

import json
from typing import Any

import huggingface_hub
import pytest
from api_kit import Answer, serving
from fake_shard import logprob
from huggingface_hub.errors import TextGenerationError

PROMPT = "hello world"


def parameters(**values: Any) -> dict[str, Any]:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": 5, **values}}


async def test_the_answer_is_the_models_continuation() -> None:
    async with serving() as api:
        answer = await api.post("/generate", parameters())
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert (
            answer.body
            == json.dumps(
                {"generated_text": api.expected_text(PROMPT, 5)}, ensure_ascii=False, separators=(",", ":")
            ).encode()
        )
        await api.idle()


async def test_details_have_tgis_fields_in_tgis_order() -> None:
    async with serving() as api:
        answer = await api.post("/generate", parameters(details=True, top_n_tokens=2, decoder_input_details=True))
        ids = api.expected_ids(api.encode(PROMPT), 5)
        details = answer.json["details"]
        assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"]
        assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 5, None)
        assert [list(token) for token in details["tokens"]] == [["id", "text", "logprob", "special"]] * 5
        assert [token["id"] for token in details["tokens"]] == ids
        assert "".join(token["text"] for token in details["tokens"]) == answer.json["generated_text"]
        assert [token["logprob"] for token in details["tokens"]] == [logprob(token_id) for token_id in ids]
        prompt = api.encode(PROMPT)
        assert details["prefill"] == [
            {"id": token_id, "text": api.tokenizer.decode([token_id], skip_special_tokens=False), "logprob": value}
            for token_id, value in zip(prompt, [None, *map(logprob, prompt[1:])], strict=True)
        ]
        assert [[top["id"] for top in tops] for tops in details["top_tokens"]] == [[i, (i + 1) % 511] for i in ids]
        await api.idle()


async def test_a_stream_has_one_event_per_token_and_ends_without_a_terminator() -> None:
    async with serving() as api:
        answer = await api.post("/generate_stream", parameters(details=True))
        whole = await api.post("/generate", parameters(details=True))
        tokens = whole.json["details"]["tokens"]
        expected = b""
        for index, token in enumerate(tokens, 1):
            last = index == len(tokens)
            event = {
                "index": index,
                "token": token,
                "generated_text": whole.json["generated_text"] if last else None,
                "details": {
                    "finish_reason": "length",
                    "generated_tokens": 5,
                    "seed": None,
                    "input_length": len(api.encode(PROMPT)),
                }
                if last
                else None,
            }
            expected += b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
        assert answer.body == expected
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-compute-characters"] == str(len(PROMPT))
        assert answer.headers["x-compute-type"] == "gpu+optimized"
        assert "x-total-time" not in answer.headers
        await api.idle()


async def test_the_headers_of_a_finished_request_say_where_the_time_went() -> None:
    async with serving(compute_type="1-test", step_ms=2.0) as api:
        headers = (await api.post("/generate", parameters())).headers
        assert headers["x-compute-type"] == "1-test"
        assert headers["x-prompt-tokens"] == str(len(api.encode(PROMPT)))
        assert headers["x-generated-tokens"] == "5"
        assert headers["x-compute-characters"] == str(len(PROMPT))
        assert float(headers["x-compute-time"]) * 1000 >= int(headers["x-inference-time"]) >= 8
        assert int(headers["x-total-time"]) >= int(headers["x-inference-time"]) >= int(headers["x-time-per-token"])
        for name in ("x-validation-time", "x-queue-time"):
            assert int(headers[name]) >= 0


async def test_without_parameters_it_samples_and_with_empty_ones_it_is_greedy() -> None:
    async with serving(max_total_tokens=24) as api:
        greedy = await api.post("/generate", {"inputs": PROMPT, "parameters": {}})
        sampled = [await api.post("/generate", {"inputs": PROMPT}) for _ in range(3)]
        length = 24 - len(api.encode(PROMPT))
        assert greedy.json["generated_text"] == api.expected_text(PROMPT, length)
        assert len({answer.body for answer in sampled} | {greedy.body}) == 4


async def test_a_seed_makes_sampling_repeatable_and_is_reported() -> None:
    async with serving() as api:
        seed = 2**64 - 1
        body = parameters(do_sample=True, seed=seed, details=True)
        first, second = await api.post("/generate", body), await api.post("/generate", body)
        assert first.body == second.body
        assert first.json["details"]["seed"] == seed
        assert first.json["generated_text"] == api.expected_text(PROMPT, 5, seed)
        drawn = await api.post("/generate", parameters(temperature=0.5, details=True))
        again = drawn.json["details"]["seed"]
        assert drawn.json["generated_text"] == api.expected_text(PROMPT, 5, again)
        greedy = await api.post("/generate", parameters(seed=seed, details=True))
        assert greedy.json["details"]["seed"] is None


async def test_the_compatible_route_wraps_its_answer_and_returns_the_prompt_too() -> None:
    async with serving() as api:
        text = api.expected_text(PROMPT, 5)
        assert (await api.post("/", parameters())).json == [{"generated_text": PROMPT + text}]
        assert (await api.post("/", parameters(return_full_text=False))).json == [{"generated_text": text}]
        streamed = await api.post("/", {**parameters(), "stream": True})
        assert streamed.events[-1]["generated_text"] == PROMPT + text
    async with serving(model_pipeline_tag="text2text-generation") as api:
        assert (await api.post("/", parameters())).json == [{"generated_text": text}]
    async with serving(model_pipeline_tag="text-generation") as api:
        assert (await api.post("/", parameters())).json == [{"generated_text": PROMPT + text}]


async def test_return_full_text_puts_the_prompt_before_every_text() -> None:
    async with serving() as api:
        answer = await api.post("/generate", parameters(return_full_text=True, best_of=2, do_sample=True, details=True))
        assert answer.json["generated_text"].startswith(PROMPT)
        others = answer.json["details"]["best_of_sequences"]
        assert [other["generated_text"].startswith(PROMPT) for other in others] == [True]


async def test_best_of_returns_the_sequence_with_the_highest_mean_logprob() -> None:
    async with serving(max_best_of=4) as api:
        answer = await api.post("/generate", parameters(best_of=4, temperature=0.7, details=True))
        best = answer.json["details"]
        others = best["best_of_sequences"]
        assert list(others[0]) == ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]

        def mean(details: dict[str, Any]) -> float:
            return sum(token["logprob"] for token in details["tokens"]) / len(details["tokens"])

        assert len(others) == 3
        assert all(mean(best) >= mean(other) for other in others)
        seeds = {details["seed"] for details in (best, *others)}
        assert len(seeds) == 4
        for details, text in [(best, answer.json["generated_text"])] + [(o, o["generated_text"]) for o in others]:
            assert text == api.expected_text(PROMPT, 5, details["seed"])
        await api.idle()


async def test_truncate_keeps_the_last_tokens() -> None:
    async with serving() as api:
        answer = await api.post("/generate", parameters(truncate=2, decoder_input_details=True))
        kept = api.encode(PROMPT)[-2:]
        assert [token["id"] for token in answer.json["details"]["prefill"]] == kept
        assert [token["id"] for token in answer.json["details"]["tokens"]] == api.expected_ids(kept, 5)


async def test_generation_ends_with_the_end_of_sequence_token_and_shows_it_as_special() -> None:
    async with serving() as api:
        ids = api.expected_ids(api.encode(PROMPT), 8)
    async with serving(eos=ids[5]) as api:
        answer = await api.post("/generate", parameters(max_new_tokens=50, details=True))
        details = answer.json["details"]
        assert details["finish_reason"] == "eos_token"
        assert [token["id"] for token in details["tokens"]] == ids[:6]
        at_limit = await api.post("/generate", parameters(max_new_tokens=6, details=True))
        assert at_limit.json["details"]["finish_reason"] == "length"  # TGI looks at the length first


async def test_special_tokens_are_shown_as_tokens_and_not_in_the_text() -> None:
    async with serving(vocab=2) as api:
        answer = await api.post("/generate", parameters(details=True))
        tokens = answer.json["details"]["tokens"]
        assert [token["text"] for token in tokens] == [["<s>", "</s>"][token["id"]] for token in tokens]
        assert all(token["special"] for token in tokens)
        assert answer.json["generated_text"] == ""


@pytest.mark.parametrize("whole", [True, False])
async def test_a_stop_sequence_ends_the_text_and_stays_in_it(whole: bool) -> None:
    async with serving() as api:
        text = api.expected_text(PROMPT, 40)
        start = next(i for i in range(10, 30) if "\ufffd" not in text[i : i + 3])
        stop = text[start : start + 3]
        body = parameters(max_new_tokens=60, stop=["never in there", stop], details=True)
        if whole:
            answer = (await api.post("/generate", body)).json
            generated, details = answer["generated_text"], answer["details"]
            assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == generated
        else:
            last = (await api.post("/generate_stream", body)).events[-1]
            generated, details = last["generated_text"], last["details"]
        assert details["finish_reason"] == "stop_sequence"
        assert generated.removesuffix("\n").endswith(stop)
        assert text.startswith(generated.removesuffix("\n"))
        await api.idle()


async def test_a_stream_and_a_whole_answer_agree_on_any_prompt() -> None:
    async with serving() as api:
        for prompt in ("é", "日本語のテスト", "😀😃", 'a\nb\t"quoted\\"', "\u0000\u001b", "x" * 100):
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 30, "details": True, "top_n_tokens": 1}}
            whole = (await api.post("/generate", body)).json
            events = (await api.post("/generate_stream", body)).events
            assert [event["token"] for event in events] == whole["details"]["tokens"]
            assert [event["top_tokens"] for event in events] == whole["details"]["top_tokens"]
            assert events[-1]["generated_text"] == whole["generated_text"]
            assert [event["index"] for event in events] == list(range(1, 31))


async def test_errors_of_a_stream_are_events_and_the_status_is_200() -> None:
    async with serving(max_concurrent_requests=1) as api:

        async def error(**values: Any) -> Answer:
            answer = await api.post("/generate_stream", parameters(**values))
            assert answer.status == 200
            return answer

        answer = await error(temperature=0.0)
        assert answer.body == (
            b'data: {"error":"Input validation error: `temperature` must be strictly positive",'
            b'"error_type":"validation"}\n\n'
        )
        (event,) = (await error(best_of=2)).events
        assert event["error"] == "Input validation error: `best_of` != 1 is not supported when streaming tokens"
        (event,) = (await error(best_of=0)).events
        assert event["error"] == "Input validation error: `best_of` != 1 is not supported when streaming tokens"
        (event,) = (await error(decoder_input_details=True)).events
        assert event["error"].endswith("`decoder_input_details` == true is not supported when streaming tokens")
        await api.idle()


async def test_more_tokens_than_fit_end_with_length_and_just_too_many_are_refused() -> None:
    async with serving(max_model_tokens=2048, num_blocks=1024, max_total_tokens=1100) as api:
        length = len(api.encode(PROMPT))
        answer = await api.post("/generate", parameters(max_new_tokens=5000, details=True))
        details = answer.json["details"]
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 1100 - length)
        long = {"inputs": "hello " * 90, "parameters": {"max_new_tokens": 5000}}
        given = len(api.encode(long["inputs"]))
        refused = await api.post("/generate", long)
        assert refused.status == 422
        assert refused.json["error"].startswith(
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1100. "
            f"Given: {given} `inputs` tokens and 1024 `max_new_tokens`"
        )


async def test_the_hubs_client_reads_answers_streams_and_errors() -> None:
    async with serving() as api:
        client = huggingface_hub.AsyncInferenceClient(base_url=api.url)
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        text = api.expected_text(PROMPT, 5)
        assert await client.text_generation(PROMPT, **options, return_full_text=False) == text
        detailed = await client.text_generation(PROMPT, **options, details=True, decoder_input_details=True)
        assert detailed.details.generated_tokens == 5
        assert len(detailed.details.prefill) == len(api.encode(PROMPT))
        tokens = [token async for token in await client.text_generation(PROMPT, **options, stream=True)]
        assert "".join(tokens) == text
        with pytest.raises(TextGenerationError, match="strictly positive"):
            await client.text_generation(PROMPT, max_new_tokens=5, temperature=0.0)
        with pytest.raises(TextGenerationError, match="strictly positive"):
            async for _ in await client.text_generation(PROMPT, max_new_tokens=5, temperature=0.0, stream=True):
                pass
        chat = await client.chat_completion([{"role": "user", "content": "hello"}], max_tokens=5, temperature=0)
        assert chat.choices[0].finish_reason == "length"
        messages = [{"role": "user", "content": "hello"}]
        stream = await client.chat_completion(messages, max_tokens=5, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content async for chunk in stream]
        assert "".join(pieces) == chat.choices[0].message.content
        await client.close()
