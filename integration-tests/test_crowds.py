"""Many clients at once, and clients that leave: limits, fairness, cancellation, and nothing left over."""

import contextlib
import random
import threading
import time
from collections.abc import Callable

import pytest
from harness import Json, Server, Stream, together, wait_until

PROMPT = "import os\n\n\nclass Reader:\n"
LONG: Json = {"max_new_tokens": 1000, "do_sample": True, "temperature": 1.2, "seed": 1}


def idle(server: Server) -> bool:
    """Nothing runs, nothing waits, no block is held."""
    names = ("tgi_batch_current_size", "tgi_queue_size", "tgi_kv_blocks_used")
    return all(server.metric(name) == 0 for name in names)


def open_stream(server: Server, seed: int) -> Stream:
    return server.stream("/generate_stream", {"inputs": PROMPT, "parameters": {**LONG, "seed": seed}})


def leave_before_the_answer(server: Server, after_s: float, seed: int) -> None:
    body = {"inputs": PROMPT, "parameters": {**LONG, "seed": seed}}
    with pytest.raises(TimeoutError):
        server.request("POST", "/generate", body, timeout_s=after_s)


def test_more_than_the_limit_is_a_429_with_retry_after(launch: Callable[..., Server]) -> None:
    server = launch("--max-concurrent-requests", "2", "--max-best-of", "3")
    streams = [open_stream(server, seed) for seed in (1, 2)]
    for stream in streams:
        next(iter(stream))
    response = server.post("/generate", {"inputs": PROMPT, "parameters": {"temperature": 0.0}})  # before validation
    assert response.status == 429
    assert response.body == b'{"error":"Model is overloaded","error_type":"overloaded"}'
    assert int(response.headers["retry-after"]) >= 1
    with server.stream("/generate_stream", {"inputs": PROMPT}) as refused:
        assert refused.status == 200  # TGI answers a stream's overload inside the stream
        assert list(refused.events()) == [{"error": "Model is overloaded", "error_type": "overloaded"}]
    message = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    assert server.post("/v1/chat/completions", message).status == 429
    for stream in streams:
        stream.close()
    wait_until(lambda: idle(server), within_s=20, what="the closed streams are cancelled")
    assert server.generate(PROMPT, max_new_tokens=2)
    # every copy of best_of takes a permit, so three can never be served here
    body = {"inputs": PROMPT, "parameters": {"best_of": 3, "do_sample": True, "max_new_tokens": 2}}
    assert server.post("/generate", body).status == 429
    server.stop()


def test_a_client_that_leaves_a_stream_frees_its_place(server: Server) -> None:
    cancelled = server.metric("tgi_request_cancelled")
    stream = open_stream(server, 3)
    next(iter(stream))
    assert server.metric("tgi_batch_current_size") == 1
    stream.close()
    wait_until(lambda: idle(server), within_s=20, what="the row and its blocks are free")
    assert server.metric("tgi_request_cancelled") == cancelled + 1


def test_a_client_that_leaves_before_the_answer_frees_its_place(server: Server) -> None:
    cancelled = server.metric("tgi_request_cancelled")
    running = threading.Thread(target=leave_before_the_answer, args=(server, 0.5, 3))
    running.start()
    wait_until(lambda: server.metric("tgi_batch_current_size") == 1, within_s=30, what="the request runs")
    running.join()
    wait_until(lambda: idle(server), within_s=20, what="the row and its blocks are free")
    assert server.metric("tgi_request_cancelled") == cancelled + 1


def test_a_storm_of_leaving_clients_leaves_nothing_behind(server: Server) -> None:
    before = server.generate(PROMPT, max_new_tokens=8)
    chances = random.Random(0)
    plans = [(seed, chances.choice([0, 0, 1, 3, 8])) for seed in range(60)]

    def client(plan: tuple[int, int]) -> None:
        seed, events = plan
        with open_stream(server, seed) as stream:
            for _, _event in zip(range(events), stream, strict=False):
                pass

    together(client, plans)
    wait_until(lambda: idle(server), within_s=30, what="every row and block is free")
    assert server.generate(PROMPT, max_new_tokens=8) == before


@pytest.mark.slow
def test_a_storm_of_200_clients_at_random_times(launch: Callable[..., Server]) -> None:
    server = launch("--max-concurrent-requests", "200")
    before = server.generate(PROMPT, max_new_tokens=8)
    chances = random.Random(1)
    plans = [(seed, chances.random() * 4, chances.random() < 0.3) for seed in range(200)]

    def client(plan: tuple[int, float, bool]) -> None:
        seed, leave_after_s, streaming = plan
        if not streaming:
            body = {"inputs": PROMPT, "parameters": {**LONG, "seed": seed}}
            with contextlib.suppress(TimeoutError):  # a short answer may come before
                server.request("POST", "/generate", body, timeout_s=leave_after_s + 0.01)
            return
        deadline = time.monotonic() + leave_after_s
        with open_stream(server, seed) as stream:
            for _event in stream:
                if time.monotonic() > deadline:
                    break

    together(client, plans)
    wait_until(lambda: idle(server), within_s=20, what="every row and block is free")
    assert server.generate(PROMPT, max_new_tokens=8) == before
    server.stop()


def test_a_long_prompt_does_not_stop_running_streams(launch: Callable[..., Server]) -> None:
    """With a budget of 128 tokens a step, a prompt of 1500 takes a dozen steps; the stream gets a token in each."""
    server = launch("--max-batch-prefill-tokens", "128")
    prompt = "".join(f"value_{i} = {i * 7919 % 1000}\n" for i in range(2000))
    length = 1500
    done = threading.Event()

    def prefill() -> None:
        server.generate(prompt, max_new_tokens=1, truncate=length)
        done.set()

    with open_stream(server, 1) as stream:
        events = iter(stream)
        for _ in range(4):
            next(events)
        thread = threading.Thread(target=prefill)
        thread.start()
        during = 0
        for _event in events:
            if done.is_set():
                break
            during += 1
        thread.join()
    assert during >= 8
    server.stop()


def test_all_of_many_requests_are_answered(server: Server) -> None:
    """More requests than steps can hold at once wait their turn; none is lost, and the queue is empty in the end."""
    prompts = [f"def function_{i}(" for i in range(96)]
    answers = together(lambda prompt: server.generate(prompt, max_new_tokens=6, details=True), prompts)
    assert all(a["details"]["generated_tokens"] >= 1 for a in answers)
    assert idle(server)


def test_timing_metrics_move_with_requests(server: Server) -> None:
    names = ("tgi_request_time_to_first_token_duration_count", "tgi_request_inter_token_duration_count")
    before = [server.metric(name) for name in names]
    server.generate_stream(PROMPT, max_new_tokens=5)
    assert all(server.metric(name) > value for name, value in zip(names, before, strict=True))
