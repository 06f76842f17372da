"""Fixtures: a `server` shared by most tests, `launch` for those that need flags or break things, a browser."""

from collections.abc import AsyncIterator, Callable, Iterator

import browser
import harness
import page_kit
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


@pytest.fixture(scope="session")
def chromium() -> Iterator[browser.Chromium]:
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium: `apt-get install chromium` gives one")
    running = browser.Chromium(path)
    yield running
    running.stop()


@pytest.fixture
async def tab(chromium: browser.Chromium, server: harness.Server) -> AsyncIterator[browser.Tab]:
    """The page, serving, greedy. At the end nothing may have gone wrong unseen, nor any request elsewhere."""
    async with chromium.tab() as opened:
        await page_kit.enter(opened, server)
        await page_kit.set_field(opened, "temperature", 0)
        yield opened
        assert opened.errors == []
        assert [address for address in opened.requests if not address.startswith((f"{server.url}/", "data:"))] == []
