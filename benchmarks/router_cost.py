"""CPU time that the router process itself spends per generated token, on a fake shard that costs it nothing.

    python -m benchmarks.router_cost --runs 5
    python -m benchmarks.router_cost --profile
    python -m benchmarks.router_cost --grpc

Real gRPC, real HTTP, real tokenizer; the shard (router/tests/fake_shard.py) answers at once with made-up tokens, so
every step carries all streams. The figure is user + system time of the router's process from /proc, divided by tokens.
The router has a core for itself: every write to a client on the same machine otherwise wakes the load generator on the
router's core, and the figure is the price of their switching (`--no-pin` shows it), which remote clients do not cause.
"""

import argparse
import http.client
import os
import pstats
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import grpc_target, load, record
from benchmarks.apis import APIS
from benchmarks.load import Scenario
from benchmarks.measure import percentile, process_times_s, reference_loop_ms, table
from benchmarks.serving import free_port

Json = dict[str, Any]
TARGET_US = 40.0
FAKE_SHARD = record.ROOT / "router" / "tests" / "fake_shard.py"
# The pool and vocabulary of the demo model, no end of sequence (no token has its id), and none of a test's checks.
FAKE_FLAGS = """
--vocab 6144 --eos 100000 --block-size 16 --num-blocks 4096 --max-rows 128 --max-step-tokens 4096
--max-model-tokens 2048 --no-check
"""
MODEL_DIR = record.ROOT / "demo" / "tgi_demo" / "model"


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def router(profile: Path | None, *, pin: bool, grpc: bool = False) -> Iterator[tuple[int, str]]:
    """A router on a fake shard: (its pid, its URL, or the address of its gRPC port).

    profile: where cProfile writes. pin: it gets a core for itself.
    """
    cores = sorted(os.sched_getaffinity(0))
    pin = pin and len(cores) > 1
    with tempfile.TemporaryDirectory(prefix="tgi-router-") as folder:
        port = free_port()
        script = str(Path(sys.executable).with_name("text-generation-router"))
        command = [script, "--model-dir", str(MODEL_DIR), "--model-id", "demo", "--hostname", "127.0.0.1"]
        command += ["--port", str(port), "--master-shard-uds-path", f"{folder}/s-0"]
        grpc_port = free_port()
        command += ["--grpc-port", str(grpc_port)] if grpc else []
        if profile:
            command = [sys.executable, "-m", "cProfile", "-o", str(profile), *command]
        log = (Path(folder) / "log").open("wb")
        fake = [sys.executable, str(FAKE_SHARD), "--uds-path", f"{folder}/s", *FAKE_FLAGS.split()]
        shard = subprocess.Popen(fake, stdout=log, stderr=log)
        if pin:
            os.sched_setaffinity(shard.pid, cores[:-1])
            os.sched_setaffinity(0, cores[-1:])  # the router inherits it
        process = subprocess.Popen(command, stdout=log, stderr=log)
        if pin:
            os.sched_setaffinity(0, cores[:-1])
        try:
            deadline = time.monotonic() + 60
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the router did not start:\n{Path(log.name).read_text()[-4000:]}")
                time.sleep(0.05)
            yield process.pid, f"127.0.0.1:{grpc_port}" if grpc else f"http://127.0.0.1:{port}"
        finally:
            for child in (process, shard):
                child.send_signal(signal.SIGTERM)
                child.wait(30)
            log.close()


async def measure_run(pid: int, url: str, scenario: Scenario) -> Json:
    """One run of the scenario: tokens, the router's CPU time, µs per token."""
    if "://" in url:
        connected = load.connect(url, model="demo", api_key=None, timeout_s=120, server_pid=pid)
    else:
        connected = grpc_target.connect(url, model="demo", server_pid=pid)
    async with connected as target:
        reference_ms = sorted(reference_loop_ms() for _ in range(9))
        before = process_times_s(pid)
        summary = await load.run(scenario, target)
        user_s, system_s = (after - then for after, then in zip(process_times_s(pid), before, strict=True))
    if summary["errors"]:
        raise SystemExit(f"requests failed: {summary['errors']}")
    tokens = summary["output_tokens"]
    return {
        "tokens": tokens,
        "us_per_token": round((user_s + system_s) / tokens * 1e6, 2),
        "user_us_per_token": round(user_s / tokens * 1e6, 2),
        "system_us_per_token": round(system_s / tokens * 1e6, 2),
        "reference_loop_ms": round(percentile(reference_ms, 50), 2),
        **summary,
    }


def hot_spots(path: Path, tokens: int, count: int = 30) -> None:
    """Prints the functions that cost most by themselves, in µs per token; cProfile more than doubles them."""
    stats: Any = pstats.Stats(str(path))
    entries = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:count]
    rows = [
        [
            f"{Path(file).parent.name}/{Path(file).name}:{line} {name}",
            f"{own / tokens * 1e6:.2f}",
            f"{whole / tokens * 1e6:.2f}",
            f"{calls / tokens:.3f}",
        ]
        for (file, line, name), (_, calls, own, whole, _callers) in entries
    ]
    print(table(["function (profiled)", "own µs/token", "with callees", "calls/token"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--api", choices=sorted(APIS), default="tgi")
    parser.add_argument(
        "--pin", action=argparse.BooleanOptionalAction, default=True, help="give the router a core for itself"
    )
    parser.add_argument("--grpc", action="store_true", help="over gRPC instead of HTTP; --api tgi or chat")
    parser.add_argument("--profile", action="store_true", help="run once under cProfile and print the hot spots")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.grpc and arguments.api not in ("tgi", "chat"):
        parser.error(f"--grpc has no method for --api {arguments.api}")
    scenario = Scenario(
        "router cost",
        api=arguments.api,
        concurrency=arguments.streams,
        requests=4 * arguments.streams,
        prompt_tokens=32,
        output_tokens=arguments.output_tokens,
    )
    profile = Path(tempfile.gettempdir()) / f"router-{os.getpid()}.prof" if arguments.profile else None
    with router(profile, pin=arguments.pin, grpc=arguments.grpc) as (pid, url):
        uvloop.run(measure_run(pid, url, replace(scenario, requests=arguments.streams)))  # warm-up
        runs = [
            uvloop.run(measure_run(pid, url, replace(scenario, seed=seed)))
            for seed in range(1, 2 if profile else arguments.runs + 1)
        ]
    if profile:
        hot_spots(profile, sum(run["tokens"] for run in runs) + arguments.streams * arguments.output_tokens)
        print(f"profile: {profile}")
        return
    median = percentile(sorted(run["us_per_token"] for run in runs), 50)
    rows = [
        [
            str(i),
            *(f"{run[key]:.1f}" for key in ("us_per_token", "user_us_per_token", "system_us_per_token")),
            f"{run['output_tokens_per_s']:.0f}",
            f"{run['reference_loop_ms']:.1f}",
        ]
        for i, run in enumerate(runs, 1)
    ]
    print(table(["run", "router µs/token", "user", "system", "tokens/s", "reference loop, ms"], rows))
    result = {
        "wire": "grpc" if arguments.grpc else "http",
        "target_us_per_token": TARGET_US,
        "median_us_per_token": median,
        "scenario": asdict(scenario),
        "runs": runs,
    }
    print(f"median {median:.1f} µs per token, target {TARGET_US:.0f}")
    print(f"written to {record.save('router-cost', result, arguments.out)}")


if __name__ == "__main__":
    main()
