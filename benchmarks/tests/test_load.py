"""The load generator against a stand-in server whose numbers are known."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load, measure
from benchmarks.apis import APIS, Stream
from benchmarks.load import Scenario

ROOT = Path(__file__).resolve().parents[2]


async def run(stand_in: Any, **scenario: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": "test", "requests": 6, "output_tokens": 5, "concurrency": 2, **scenario}
    async with load.connect(stand_in.url, model="tgi", api_key=None, timeout_s=10) as target:
        return await load.run(Scenario(**settings), target)


@pytest.mark.parametrize("api", ["tgi", "completions", "chat"])
async def test_every_api_counts_the_tokens_the_server_reports(stand_in: Any, api: str) -> None:
    summary = await run(stand_in, api=api, prompt_tokens=20)
    assert (summary["requests"], summary["errors"]) == (6, {})
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (6 * 20, 6 * 5)


async def test_time_to_first_token_is_the_servers_delay(stand_in: Any) -> None:
    stand_in.first_token_s = 0.05
    summary = await run(stand_in, requests=2)
    assert summary["ttft_ms"]["p50"] >= 50
    assert summary["inter_token_ms"]["p50"] < summary["ttft_ms"]["p50"]


async def test_a_slow_server_cannot_hide_its_queue_from_the_open_loop(stand_in: Any) -> None:
    stand_in.first_token_s = 0.3
    summary = await run(stand_in, requests=10, concurrency=None, rate=200.0)
    assert summary["wall_s"] < 1.5  # ten requests of 0.3 s each did not wait for each other
    assert summary["ttft_ms"]["max"] >= 300


async def test_a_duration_ends_the_load(stand_in: Any) -> None:
    stand_in.first_token_s = 0.01
    summary = await run(stand_in, requests=None, duration_s=0.2)
    assert 1 <= summary["requests"] <= 42


@pytest.mark.parametrize(
    ("behaviour", "kind"), [("overloaded", "http 429"), ("failing", "generation"), ("truncated", "truncated stream")]
)
async def test_failures_are_counted_by_kind(stand_in: Any, behaviour: str, kind: str) -> None:
    async with load.connect(stand_in.url, model="tgi", api_key=None, timeout_s=10) as target:
        stand_in.behaviour = behaviour
        outcomes = await load.closed_loop(Scenario("test", requests=3, output_tokens=5), target, iter(["a", "b", "c"]))
    assert measure.summarize(outcomes)["errors"] == {kind: 3}


async def test_the_shared_prefix_is_the_same_in_every_prompt(stand_in: Any) -> None:
    await run(stand_in, prompt_tokens=30, shared_prefix_tokens=20)
    prompts = [body["inputs"].split() for body in stand_in.bodies[1:]]  # the first one calibrates
    assert len({tuple(words[:20]) for words in prompts}) == 1
    assert len({tuple(words[20:]) for words in prompts}) == len(prompts)


async def test_prompts_come_from_a_file(stand_in: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('plain text\n"a\\nstring"\n{"prompt": "an object"}\n')
    await run(stand_in, requests=3, concurrency=1, prompts_file=str(path))
    assert [body["inputs"] for body in stand_in.bodies] == ["plain text", "a\nstring", "an object"]


def test_an_event_split_over_two_reads_is_one_event() -> None:
    stream = Stream(APIS["tgi"])
    stream.feed(b'data:{"index":1,"token":{"id":1},"details":', 1.0)
    stream.feed(b'null}\r\n\r\ndata:{"index":2,"token":{},"details":{"input_length":3,"generated_tokens":2}}\n\n', 1.5)
    stream.close()
    assert (stream.first_s, list(stream.gaps_s), stream.output_tokens, stream.error) == (1.5, [0.0], 2, None)


def test_percentiles_interpolate_between_ranks() -> None:
    assert measure.percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert measure.percentile([7.0], 99) == 7.0


async def test_compare_alternates_and_writes_json(stand_in: Any, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.load",
        stand_in.url,
        "--compare",
        stand_in.url,
        "--compare-api",
        "chat",
    ]
    command += ["--requests", "4", "--output-tokens", "3", "--rounds", "2", "--out", str(out)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    assert "A / B" in printed.decode()
    apis = ["inputs" in body for body in stand_in.bodies]
    assert apis == [True] * 5 + [False] * 5 + [True] * 5 + [False] * 5
    result = json.loads(out.read_text())
    assert result["environment"]["commit"]
    assert result["comparison"][0]["metric"] == "output tokens/s"
    assert len(result["a"]) == len(result["b"]) == 2
