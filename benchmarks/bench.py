"""The default set of scenarios against the server on the embedded demo model: what `make bench` runs.

    python -m benchmarks.bench                        about two minutes
    python -m benchmarks.bench --url http://host:3000     against a server that already runs

Owns the choice of scenarios; load.py runs them.
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import load, measure, record
from benchmarks.load import Scenario
from benchmarks.serving import Serving, serving

Json = dict[str, Any]

SCENARIOS = (
    Scenario("one client", concurrency=1, requests=8, output_tokens=128),
    Scenario("8 clients", concurrency=8, requests=48, output_tokens=128),
    Scenario("64 clients", concurrency=64, requests=192, output_tokens=64),
    Scenario("long prompts", concurrency=4, requests=24, prompt_tokens=1024, output_tokens=16),
    Scenario(
        "shared prefix", concurrency=4, requests=24, prompt_tokens=1024, shared_prefix_tokens=960, output_tokens=16
    ),
    Scenario("chat, 8 clients", api="chat", concurrency=8, requests=48, output_tokens=64),
    Scenario("2 requests per second", concurrency=None, rate=2.0, requests=30, output_tokens=64),
)


async def run_all(url: str, server_pid: int | None, seed: int, model: str) -> list[Json]:
    results = []
    async with load.connect(url, model=model, api_key=None, timeout_s=600, server_pid=server_pid) as target:
        warm_up = Scenario("warm-up", concurrency=8, requests=8, output_tokens=16, seed=seed - 1)
        await load.run(warm_up, target)
        for number, scenario in enumerate(SCENARIOS):
            scenario = replace(scenario, seed=seed + number)
            summary = await load.run(scenario, target)
            print(measure.describe(scenario.name, summary) + "\n", flush=True)
            results.append({"scenario": asdict(scenario), "summary": summary})
    return results


def overview(results: list[Json]) -> str:
    """One line per scenario."""

    def cell(summary: Json, key: str, name: str) -> str:
        return f"{summary[key][name]:.1f}" if summary[key] else "-"

    rows = [
        [
            result["scenario"]["name"],
            f"{(s := result['summary'])['output_tokens_per_s']:.0f}",
            cell(s, "ttft_ms", "p50"),
            cell(s, "ttft_ms", "p99"),
            cell(s, "inter_token_ms", "p50"),
            cell(s, "inter_token_ms", "p99"),
            str(sum(s["errors"].values())),
        ]
        for result in results
    ]
    header = ["scenario", "tokens/s", "TTFT p50", "TTFT p99", "token gap p50", "token gap p99", "errors"]
    return measure.table(header, rows) + "\n(times in ms)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", help="measure this server instead of starting one")
    parser.add_argument("--model", default="tgi", help="`model` field of OpenAI requests")
    parser.add_argument("--seed", type=int, help="of prompts and arrivals; default: new ones, not in any prefix cache")
    parser.add_argument("--out", type=Path)
    parser.add_argument("flags", nargs="*", help="more launcher flags, after --")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else time.time_ns() % 2**31
    server: AbstractContextManager[Serving | None] = nullcontext() if arguments.url else serving(*arguments.flags)
    with server as started:
        url = started.url if started else arguments.url
        pid = started.process.pid if started else None
        results = uvloop.run(run_all(url, pid, seed, arguments.model))
    print(overview(results))
    print(
        f"written to {record.save('bench', {'url': url, 'flags': arguments.flags, 'results': results}, arguments.out)}"
    )


if __name__ == "__main__":
    main()
