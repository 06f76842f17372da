"""Whatever the served document allows, and much that it forbids, is answered as it says, and never with a 5xx.

Schemathesis makes the requests; with `-m slow` ten times as many, and other ones each time.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_kit import Api, serving
from hypothesis import HealthCheck, Phase, given, settings

# Schemathesis' own name for what an event is differs from ours: a whole event, where we describe its data.
# A body that its schema allows may still be refused, by a limit or a rule that no schema can say.
LEFT_OUT = ("positive_data_acceptance",)
# TGI's, on Vertex AI's and KServe's routes: whatever is wrong with a generation, the client's mistakes included.
MASKED = {"error": "Incomplete generation", "error_type": "Incomplete generation"}


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """A router on a loop in a thread of its own: Schemathesis is synchronous."""
    started: list[tuple[Api, Callable[[], object]]] = []
    ready = threading.Event()

    async def serve() -> None:
        async with serving(max_total_tokens=48) as running:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            started.append((running, lambda: loop.call_soon_threadsafe(stop.set)))
            ready.set()
            await stop.wait()
            await running.idle()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(300)
    running, stop = started[0]
    yield running
    stop()
    thread.join(300)
    assert not thread.is_alive()


def storm(api: Api, *, max_examples: int, derandomize: bool) -> int:
    """How many requests were answered, all of them rightly."""
    import schemathesis  # here: it takes seconds
    from schemathesis.checks import CHECKS
    from schemathesis.generation import GenerationMode

    document = schemathesis.openapi.from_url(f"{api.url}/openapi.json")  # which also makes the checks known
    left_out = [CHECKS.get_one(name) for name in LEFT_OUT]
    of_events = [*left_out, CHECKS.get_one("response_schema_conformance")]
    num_answers = 0

    for found in document.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):

            @settings(
                max_examples=max_examples,
                derandomize=derandomize,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal num_answers
                num_answers += 1
                answer = case.call(timeout=300)
                if answer.status_code == 500 and answer.json() == MASKED:
                    return
                streams = "text/event-stream" in answer.headers.get("content-type", [""])
                case.validate_response(answer, excluded_checks=of_events if streams else left_out)

            ask()
    return num_answers


@pytest.mark.timeout(900)  # eight seconds, on a core of its own
def test_no_request_that_the_document_suggests_finds_a_mistake_of_ours(api: Api) -> None:
    assert storm(api, max_examples=5, derandomize=True) > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nor_do_many_others(api: Api) -> None:
    assert storm(api, max_examples=60, derandomize=False) > 1000
