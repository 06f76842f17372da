"""/health, /info, /metrics, /tokenize: what the server says about itself."""

import re
from typing import Any

from api_kit import Api, serving
from prometheus_client.parser import text_string_to_metric_families


async def test_health_is_empty_and_follows_the_shards() -> None:
    async with serving() as api:
        for path in ("/", "/health", "/ping"):
            answer = await api.get(path)
            assert (answer.status, answer.body) == (200, b"")
        await api.group.kill()
        while api.server.batcher.healthy:
            await api.get("/health")
        for path in ("/", "/health", "/ping"):
            answer = await api.get(path)
            assert (answer.status, answer.json) == (503, {"error": "unhealthy", "error_type": "healthcheck"})


async def test_info_has_tgis_fields_in_order() -> None:
    async with serving(model_sha="abc", max_total_tokens=100, max_input_tokens=60, max_concurrent_requests=7) as api:
        assert list((await api.get("/info")).json.items()) == [
            ("model_id", "tiny"),
            ("model_sha", "abc"),
            ("model_pipeline_tag", None),
            ("max_concurrent_requests", 7),
            ("max_best_of", 2),
            ("max_stop_sequences", 4),
            ("max_input_tokens", 60),
            ("max_total_tokens", 100),
            ("validation_workers", 2),
            ("max_client_batch_size", 4),
            ("router", "text-generation-router"),
            ("version", "4.0.0"),
            ("sha", None),
            ("docker_label", None),
        ]


async def test_tokenize_gives_ids_texts_and_byte_places() -> None:
    async with serving() as api:
        text = "hello 日本 😀!"
        tokens = (await api.post("/tokenize", {"inputs": text, "parameters": {"truncate": 1}})).json
        assert [token["id"] for token in tokens] == api.encode(text)
        assert tokens[0] == {"id": 0, "text": "", "start": 0, "stop": 0}
        for token in tokens[1:]:
            assert text.encode()[token["start"] : token["stop"]].decode() == token["text"]
        assert tokens[-1]["stop"] == len(text.encode())


def values(exposition: str) -> dict[str, float]:
    """Sample name with labels -> value."""
    lines = [line for line in exposition.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def scrape(api: Api) -> dict[str, float]:
    return values((await api.get("/metrics")).body.decode())


async def test_every_metric_of_a_request_moves_once() -> None:
    async with serving(step_ms=1.0) as api:
        body: dict[str, Any] = {"inputs": "hello world", "parameters": {"max_new_tokens": 5}}
        before = await scrape(api)
        await api.post("/generate", body)
        await api.post("/generate_stream", body)
        await api.post("/generate", {"inputs": ""})
        after = await scrape(api)
        moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        assert moved["tgi_request_count"] == 3
        assert moved["tgi_request_success"] == 2
        assert moved['tgi_request_failure{err="validation"}'] == 1
        for name in (
            "request_duration",
            "request_validation_duration",
            "request_queue_duration",
            "request_inference_duration",
            "request_mean_time_per_token_duration",
            "request_generated_tokens",
            "request_input_length",
            "request_max_new_tokens",
            "request_time_to_first_token_duration",
        ):
            assert moved[f"tgi_{name}_count"] == 2, name
        assert moved["tgi_request_generated_tokens_sum"] == 10
        assert moved["tgi_request_inter_token_duration_count"] == 8
        assert moved["tgi_request_input_length_sum"] == 2 * len(api.encode("hello world"))
        assert moved["tgi_request_inference_duration_sum"] >= 0.008
        assert moved['tgi_batch_inference_count{method="prefill"}'] == 2
        assert moved['tgi_batch_inference_count{method="decode"}'] >= 8


async def test_chat_and_completions_are_counted_twice_as_in_tgi() -> None:
    async with serving() as api:
        await api.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
        await api.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2})
        found = await scrape(api)
        assert found["tgi_request_count"] == 2 + 3
        assert found["tgi_request_success"] == 1 + 2


async def test_the_exposition_is_what_prometheus_reads() -> None:
    async with serving(max_input_tokens=100, max_total_tokens=200) as api:
        answer = await api.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        families = list(text_string_to_metric_families(answer.body.decode()))
        assert len(families) > 25
        bounds = re.findall(r'tgi_request_input_length_bucket\{le="([^"]+)"\}', answer.body.decode())
        assert bounds == [str(n) for n in range(1, 101)] + ["+Inf"]
