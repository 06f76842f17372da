"""Load generator for any server with TGI's or OpenAI's streaming routes.

    python -m benchmarks.load http://localhost:3000 --concurrency 16 --requests 200
    python -m benchmarks.load http://localhost:3000 --api chat --rate 5 --duration 60
    python -m benchmarks.load http://a:3000 --compare http://b:8000 --api completions --rounds 3

Closed loop (`--concurrency N`): N clients, each sends its next request when the last has ended. Open loop (`--rate R`):
Poisson arrivals, whatever the server does; latency counts from the time a request was due, so a stalled server cannot
hide its queue. Owns the loops, the prompts and the command line; apis.py reads streams, measure.py makes numbers.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import aiohttp
import uvloop

from benchmarks import measure, record
from benchmarks.apis import APIS, Api, Json, Sampling, Stream
from benchmarks.measure import CpuMeter, Outcome

# Common words and names of Python code: short enough that a prompt's length in words predicts its length in tokens.
WORDS = """
the a of and to in is for that as with this not def return self if else import from class list dict name value
index path file open read write line text code key item type int str print range len while try except raise
error result data time node tree set get update append pop sort min max sum map filter zip call test run start
"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of load. Exactly one of concurrency and rate is set, and at least one of requests and duration_s."""

    name: str
    api: str = "tgi"
    concurrency: int | None = 8
    rate: float | None = None  # requests per second
    requests: int | None = 64
    duration_s: float | None = None
    prompt_tokens: int = 64
    shared_prefix_tokens: int = 0  # of prompt_tokens, the same in every prompt
    output_tokens: int = 64
    prompts_file: str | None = None  # one prompt a line; a line may be a JSON string or an object with "prompt"
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


class Prompts:
    """An endless, repeatable sequence of prompts. words_per_token scales lengths to the server's tokenizer."""

    def __init__(self, scenario: Scenario, words_per_token: float = 1.0) -> None:
        self._scenario = scenario
        self._random = random.Random(scenario.seed)
        self._scale = words_per_token
        self._prefix = self._words(scenario.shared_prefix_tokens)

    def _words(self, tokens: int) -> str:
        return " ".join(self._random.choices(WORDS.split(), k=round(tokens * self._scale)))

    def __iter__(self) -> Iterator[str]:
        if self._scenario.prompts_file:
            prompts = read_prompts(Path(self._scenario.prompts_file))
            while True:
                yield from prompts
        while True:
            own = self._words(max(1, self._scenario.prompt_tokens - self._scenario.shared_prefix_tokens))
            yield f"{self._prefix} {own}".strip()


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, one a line: plain text, a JSON string, or a JSON object with "prompt"."""
    prompts = []
    for line in filter(None, path.read_text().splitlines()):
        value = json.loads(line) if line[0] in '"{' else line
        prompts.append(value["prompt"] if isinstance(value, dict) else value)
    if not prompts:
        raise SystemExit(f"{path} holds no prompts")
    return prompts


@dataclass(slots=True)
class Target:
    """A server under load."""

    url: str
    session: aiohttp.ClientSession
    model: str
    server_pid: int | None = None
    words_per_token: float = 1.0

    async def send(self, api: Api, body: bytes, start_s: float) -> Outcome:
        """One request from sending to its last byte. Every failure becomes the outcome's `error`."""
        stream = Stream(api)
        try:
            async with self.session.post(self.url + api.path, data=body) as response:
                if response.status != 200:
                    stream.error = f"http {response.status}"
                else:
                    async for chunk in response.content.iter_any():
                        stream.feed(chunk, time.perf_counter())
        except TimeoutError:
            stream.error = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            stream.error = type(error).__name__
        stream.close()
        return Outcome(
            start_s=start_s,
            end_s=time.perf_counter(),
            first_s=stream.first_s,
            gaps_s=stream.gaps_s,
            prompt_tokens=stream.prompt_tokens,
            output_tokens=stream.output_tokens,
            error=stream.error,
        )


@asynccontextmanager
async def connect(
    url: str, *, model: str, api_key: str | None, timeout_s: float, server_pid: int | None = None
) -> AsyncIterator[Target]:
    """A target with its connection pool."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers=headers,
        read_bufsize=2**20,
    ) as session:
        yield Target(url.rstrip("/"), session, model, server_pid)


def encode(scenario: Scenario, target: Target, prompt: str) -> bytes:
    api = APIS[scenario.api]
    return json.dumps(api.body(target.model, prompt, scenario.output_tokens, scenario.sampling)).encode()


async def calibrate(target: Target, scenario: Scenario) -> None:
    """Learns how many of our words make a token, from the server's own count; warms the connection up, too."""
    if scenario.prompts_file:
        return
    short = replace(scenario, output_tokens=1)
    words = 64
    prompt = " ".join(random.Random(scenario.seed + 1).choices(WORDS.split(), k=words))
    outcome = await target.send(APIS[scenario.api], encode(short, target, prompt), time.perf_counter())
    if outcome.error is not None:
        raise SystemExit(f"{target.url}{APIS[scenario.api].path} does not answer: {outcome.error}")
    target.words_per_token = words / outcome.prompt_tokens if outcome.prompt_tokens else 1.0


async def run(scenario: Scenario, target: Target) -> Json:
    """Runs one scenario and returns its summary."""
    await calibrate(target, scenario)
    prompts = iter(Prompts(scenario, target.words_per_token))
    meter = CpuMeter(target.server_pid)
    if scenario.rate is None:
        outcomes = await closed_loop(scenario, target, prompts)
    else:
        outcomes = await open_loop(scenario, target, prompts, scenario.rate)
    summary = measure.summarize(outcomes)
    summary["cpu"] = meter.read(summary["output_tokens"])
    return summary


async def closed_loop(scenario: Scenario, target: Target, prompts: Iterator[str]) -> list[Outcome]:
    """`concurrency` clients take from one supply until it ends or time is up."""
    outcomes: list[Outcome] = []
    stop_s = time.perf_counter() + (scenario.duration_s or float("inf"))
    left = iter(range(scenario.requests)) if scenario.requests is not None else iter(int, 1)
    api = APIS[scenario.api]

    async def client() -> None:
        for _ in left:
            if time.perf_counter() >= stop_s:
                return
            body = encode(scenario, target, next(prompts))
            outcomes.append(await target.send(api, body, time.perf_counter()))

    async with asyncio.TaskGroup() as group:
        for _ in range(scenario.concurrency or 1):
            group.create_task(client())
    return outcomes


async def open_loop(scenario: Scenario, target: Target, prompts: Iterator[str], rate: float) -> list[Outcome]:
    """`rate` requests per second at exponentially distributed intervals, none waiting for another."""
    arrivals = random.Random(scenario.seed)
    begin_s = due_s = time.perf_counter()
    api = APIS[scenario.api]
    tasks: list[asyncio.Task[Outcome]] = []
    async with asyncio.TaskGroup() as group:
        while scenario.requests is None or len(tasks) < scenario.requests:
            due_s += arrivals.expovariate(rate)
            if scenario.duration_s is not None and due_s - begin_s >= scenario.duration_s:
                break
            body = encode(scenario, target, next(prompts))
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(group.create_task(target.send(api, body, due_s)))
    return [task.result() for task in tasks]


async def compare(scenario: Scenario, a: Target, b: Target, *, b_api: str, rounds: int) -> Json:
    """A B A B …: what changes over time on the machine falls on both. Every round has its own prompts."""
    runs: dict[str, list[Json]] = {"a": [], "b": []}
    for round_number in range(rounds):
        for side, target, api in (("a", a, scenario.api), ("b", b, b_api)):
            runs[side].append(await run(replace(scenario, api=api, seed=scenario.seed + round_number), target))
            print(
                f"round {round_number + 1}, " + measure.describe(f"{side.upper()} {target.url}", runs[side][-1]) + "\n"
            )
    return {**runs, "comparison": measure.compare(runs["a"], runs["b"])}


# Command line ---------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.load", description=(__doc__ or "").split("\n")[0])
    result.add_argument("url", help="base URL of the server")
    result.add_argument("--compare", metavar="OTHER_URL", help="measure this server, too, in alternation")
    result.add_argument("--rounds", type=int, default=2, help="rounds of --compare")
    result.add_argument("--api", choices=sorted(APIS), default="tgi")
    result.add_argument("--compare-api", choices=sorted(APIS), help="the other server's API; default: the same")
    loop = result.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=int, default=8, help="closed loop with so many clients")
    loop.add_argument("--rate", type=float, help="open loop with so many requests per second")
    result.add_argument("--requests", type=int, help="how many requests (64 unless --duration is given)")
    result.add_argument("--duration", type=float, help="send requests for so many seconds")
    result.add_argument("--prompt-tokens", type=int, default=64)
    result.add_argument("--shared-prefix-tokens", type=int, default=0, help="of the prompt, the same in every request")
    result.add_argument("--prompts", help="file with one prompt a line, instead of random words")
    result.add_argument("--output-tokens", type=int, default=64)
    result.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    result.add_argument("--ignore-eos", action="store_true", help="send OpenAI-style servers `ignore_eos`")
    result.add_argument("--seed", type=int, help="of prompts and arrivals; default: new ones, not in any prefix cache")
    result.add_argument("--model", default="tgi", help="`model` field of OpenAI requests")
    result.add_argument("--api-key")
    result.add_argument("--timeout", type=float, default=600.0, help="of one request, seconds")
    result.add_argument("--server-pid", type=int, help="measure this process tree's CPU time")
    result.add_argument("--out", type=Path, help="JSON file; default: a new one in benchmarks/results/")
    return result


def scenario_of(arguments: argparse.Namespace) -> Scenario:
    requests = arguments.requests
    if requests is None and arguments.duration is None:
        requests = 64
    seed = arguments.seed if arguments.seed is not None else time.time_ns() % 2**31
    return Scenario(
        name="load",
        api=arguments.api,
        concurrency=None if arguments.rate else arguments.concurrency,
        rate=arguments.rate,
        requests=requests,
        duration_s=arguments.duration,
        prompt_tokens=arguments.prompt_tokens,
        shared_prefix_tokens=arguments.shared_prefix_tokens,
        output_tokens=arguments.output_tokens,
        prompts_file=arguments.prompts,
        sampling=Sampling(arguments.temperature, seed, arguments.ignore_eos),
        seed=seed,
    )


async def _main(arguments: argparse.Namespace) -> Json:
    scenario = scenario_of(arguments)
    common = {"model": arguments.model, "api_key": arguments.api_key, "timeout_s": arguments.timeout}
    async with connect(arguments.url, server_pid=arguments.server_pid, **common) as target:
        if not arguments.compare:
            summary = await run(scenario, target)
            print(measure.describe(target.url, summary))
            return {"scenario": asdict(scenario), "url": target.url, "summary": summary}
        async with connect(arguments.compare, **common) as other:
            b_api = arguments.compare_api or arguments.api
            result = await compare(scenario, target, other, b_api=b_api, rounds=arguments.rounds)
            print(measure.describe_comparison(result["comparison"]))
            return {"scenario": asdict(scenario), "a_url": target.url, "b_url": other.url, "b_api": b_api, **result}


def main() -> None:
    arguments = parser().parse_args()
    result = uvloop.run(_main(arguments))
    print(f"\nwritten to {record.save('load', result, arguments.out)}")


if __name__ == "__main__":
    main()
