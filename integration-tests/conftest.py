"""Fixtures: one `server` shared by most tests, and `launch` for those that need their own flags or break things."""

from collections.abc import Callable, Iterator

import harness
import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[harness.Server]:
    """The demo model with the defaults a user gets. Tests must leave it idle and alive."""
    running = harness.start()
    try:
        yield running
        running.stop()
    finally:
        running.destroy()


@pytest.fixture
def launch() -> Iterator[Callable[..., harness.Server]]:
    """`launch("--flag", ..., env={...})`: a server for one test; destroyed at its end whatever happened."""
    started: list[harness.Server] = []

    def run(*flags: str, **options: object) -> harness.Server:
        started.append(harness.start(*flags, wait=False, **{k: v for k, v in options.items() if k != "wait"}))  # type: ignore[arg-type]
        if options.get("wait", True):
            started[-1].wait_ready()
        return started[-1]

    yield run
    for running in started:
        running.destroy()
