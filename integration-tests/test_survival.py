"""A shard dies or hangs while streams are open: they end with exactly the tokens of an undisturbed run."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness
import pytest
from harness import MODEL_DIR, Json, Process, Server, wait_until
from tokenizers import Tokenizer

Launch = Callable[..., Server]
STEP_DEADLINE_S = 2
RECOVERY_S = 60.0
LONG_PROMPT = "".join(f"value_{i} = {i * 7919 % 1000}\n" for i in range(150))


@dataclass(frozen=True)
class Case:
    inputs: str
    parameters: Json


def sampled(seed: int) -> Case:
    """Hot enough that the end of the text does not come before max_new_tokens, mostly."""
    parameters = {"max_new_tokens": 250, "do_sample": True, "temperature": 1.5, "seed": seed, "details": True}
    return Case(f"# part {seed}\nimport os\n\n\nclass Reader{seed}:\n", parameters)


CASES = [
    Case(
        "import os\nimport sys\n\n\nclass Reader:\n",
        {"max_new_tokens": 250, "details": True, "repetition_penalty": 1.3},
    ),
    Case("def main(argv):\n", {"max_new_tokens": 250, "details": True, "top_n_tokens": 3}),
    sampled(1),
    sampled(2),
    Case(sampled(3).inputs, {**sampled(3).parameters, "frequency_penalty": 0.5, "watermark": True, "top_p": 0.98}),
]


class Client(threading.Thread):
    """Reads one stream to its end, in the background."""

    def __init__(self, server: Server, case: Case) -> None:
        super().__init__(daemon=True)
        self._server, self._case = server, case
        self.events: list[Json] = []
        self.start()

    def run(self) -> None:
        body = {"inputs": self._case.inputs, "parameters": self._case.parameters}
        with self._server.stream("/generate_stream", body) as stream:
            for event in stream.events():
                self.events.append(event)

    def end(self) -> list[Json]:
        self.join(RECOVERY_S)
        assert not self.is_alive(), (
            f"a stream is still open after {len(self.events)} events\n{self._server.log()[-4000:]}"
        )
        return self.events


def tokens(events: list[Json]) -> list[Any]:
    assert "error" not in events[-1], events[-1]
    return [(e["token"]["id"], e["token"]["text"]) for e in events] + [events[-1]["generated_text"]]


def undisturbed(server: Server) -> list[list[Any]]:
    """What CASES end with when nothing happens. All at once: faster, and it changes no token (test_generation.py)."""
    return [tokens(client.end()) for client in [Client(server, case) for case in CASES]]


@dataclass(frozen=True)
class Group:
    """A server that may lose its shards often, and what it answers when it does not."""

    server: Server
    expected: list[list[Any]]


@pytest.fixture(scope="module", params=["1", "2"], ids=["one shard", "two shards"])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    with lasting_server("--num-shard", request.param) as server:
        yield Group(server, undisturbed(server))


@pytest.fixture(scope="module")
def survivor() -> Iterator[Server]:
    with lasting_server() as server:
        yield server


@contextmanager
def lasting_server(*flags: str) -> Iterator[Server]:
    server = harness.start("--step-deadline", str(STEP_DEADLINE_S), "--restart-budget", "100", *flags)
    try:
        yield server
        server.stop()
    finally:
        server.destroy()


def after_events(clients: list[Client], count: int) -> None:
    """Returns when every stream has delivered `count` tokens or ended."""
    wait_until(
        lambda: all(len(c.events) >= count or not c.is_alive() for c in clients),
        within_s=30,
        what=f"{count} tokens each",
    )


def expect_outage(server: Server, within_s: float) -> None:
    """/health says 503 within the time, and 200 again later."""
    wait_until(lambda: server.health() == 503, within_s=within_s, what="/health says 503")
    server.wait_ready(RECOVERY_S)


def victim(server: Server) -> Process:
    """The last rank: with two shards, the one the router's answers do not come from."""
    return server.shards()[-1]


def test_a_killed_shard_changes_no_token(group: Group) -> None:
    """Killed while it decodes; what comes while it is down is served later."""
    server = group.server
    clients = [Client(server, case) for case in CASES]
    after_events(clients, 10)
    shard = victim(server)
    shard.signal(signal.SIGKILL)
    wait_until(lambda: server.health() == 503, within_s=20, what="/health says 503")
    late = [Client(server, case) for case in CASES]
    server.wait_ready(RECOVERY_S)
    assert [tokens(c.end()) for c in clients] == group.expected
    assert [tokens(c.end()) for c in late] == group.expected
    assert shard.pid not in [p.pid for p in server.shards()]
    assert "SIGKILL" in server.log()


def test_a_stopped_shard_is_a_dead_shard(group: Group) -> None:
    clients = [Client(group.server, case) for case in CASES]
    after_events(clients, 10)
    shard = victim(group.server)
    shard.signal(signal.SIGSTOP)
    expect_outage(group.server, within_s=10 * STEP_DEADLINE_S)
    assert [tokens(c.end()) for c in clients] == group.expected
    assert not shard.is_alive()


def test_a_killed_shard_mid_prefill_changes_no_token(survivor: Server) -> None:
    expected = tokens(Client(survivor, CASES[2]).end())
    streaming = Client(survivor, CASES[2])
    after_events([streaming], 5)
    fresh = f"# {time.time_ns()}\n{LONG_PROMPT}"  # in no prefix cache
    prefill = Client(survivor, Case(fresh, {"max_new_tokens": 20, "details": True}))
    wait_until(lambda: survivor.metric("tgi_batch_current_size") == 2, within_s=30, what="the prompt is being computed")
    victim(survivor).signal(signal.SIGKILL)
    expect_outage(survivor, within_s=20)
    assert tokens(streaming.end()) == expected
    interrupted = tokens(prefill.end())
    assert interrupted == tokens(Client(survivor, Case(fresh, {"max_new_tokens": 20, "details": True})).end())


def test_an_idle_server_notices_and_recovers(survivor: Server) -> None:
    before = survivor.generate("import os\n", max_new_tokens=5)
    victim(survivor).signal(signal.SIGKILL)
    expect_outage(survivor, within_s=20)
    assert survivor.generate("import os\n", max_new_tokens=5) == before


@pytest.mark.slow
def test_shards_killed_at_ten_random_moments_change_no_token(group: Group) -> None:
    chances = random.Random(5)
    for round_number in range(10):
        clients = [Client(group.server, case) for case in CASES]
        after_events(clients[:1], chances.randrange(1, 100))
        chances.choice(group.server.shards()).signal(chances.choice([signal.SIGKILL, signal.SIGSTOP]))
        assert [tokens(c.end()) for c in clients] == group.expected, f"round {round_number}"
        group.server.wait_ready(RECOVERY_S)


# Faults of single requests --------------------------------------------------------------------------------------------


def test_a_poisoned_request_fails_alone(launch: Launch) -> None:
    """Three kinds: an exception when its row is made, logits that are not numbers, one that kills the shard."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    letters = "ΨΩЖ"
    raising, nan, deadly = (tokenizer.encode(letter).ids[-1] for letter in letters)
    faults = f"row.apply:raise:token={raising};row.logits:nan:token={nan};row.apply:kill:token={deadly}"
    server = launch("--restart-budget", "100", env={"TGI_FAULTS": faults})
    expected = undisturbed(server)
    clients = [Client(server, case) for case in CASES]
    after_events(clients, 5)
    poisoned = [Client(server, Case(letter, {"max_new_tokens": 20})) for letter in letters]
    assert [tokens(c.end()) for c in clients] == expected
    for client in poisoned:
        (only,) = client.end()
        assert only["error_type"] == "generation"
        assert only["error"].startswith("Request failed during generation: ")
    server.wait_ready(RECOVERY_S)
    assert tokens(Client(server, CASES[0]).end()) == expected[0]
    server.stop()


def test_a_request_in_flight_at_two_crashes_fails_alone(launch: Launch) -> None:
    server = launch("--restart-budget", "100")
    case = CASES[2]
    whole = tokens(Client(server, case).end())
    guilty = Client(server, sampled(7))
    after_events([guilty], 3)
    server.shards()[0].signal(signal.SIGKILL)
    wait_until(lambda: server.health() == 503, within_s=20, what="/health says 503")
    count = len(guilty.events)
    wait_until(lambda: len(guilty.events) > count + 2 or not guilty.is_alive(), within_s=RECOVERY_S, what="it goes on")
    innocent = Client(server, case)  # in flight at the second crash only
    after_events([innocent], 3)
    server.shards()[0].signal(signal.SIGKILL)
    assert tokens(innocent.end()) == whole
    last = guilty.end()[-1]
    assert last["error_type"] == "generation", last
    assert "not tried again" in last["error"]
    server.wait_ready(RECOVERY_S)
    assert tokens(Client(server, case).end()) == whole
    server.stop()


def test_a_spent_budget_exits_1_with_the_first_cause(launch: Launch) -> None:
    server = launch("--restart-budget", "1")
    client = Client(server, sampled(1))
    after_events([client], 2)
    server.shards()[0].signal(signal.SIGKILL)
    expect_outage(server, within_s=20)
    server.shards()[0].signal(signal.SIGSEGV)
    assert server.wait_exit(30) == 1
    assert client.end()[-1].get("error_type"), "an open stream ends with an error event, never silently"
    assert server.leftovers() == []
    last_words = server.log().strip().splitlines()[-12:]
    assert any("SIGKILL" in line for line in last_words), last_words
