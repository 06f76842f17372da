"""Swagger UI at GET /docs in a real browser, on the demo model: it shows every route, and tries one."""

from collections.abc import Iterator

import browser
import pytest
from browser import Chromium
from harness import Server

GENERATE = "document.getElementById('operations-Text_Generation_Inference-generate')"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium: `apt-get install chromium` gives one")
    running = Chromium(path)
    yield running
    running.stop()


async def test_the_api_can_be_read_and_tried_without_anything_from_outside(chromium: Chromium, server: Server) -> None:
    async with chromium.tab() as tab:
        await tab.goto(f"{server.url}/docs")
        paths = await tab.js("fetch('../openapi.json').then(answer => answer.json()).then(document => document.paths)")
        num_operations = sum(len(methods) for methods in paths.values())
        await tab.until(f"document.querySelectorAll('.opblock').length === {num_operations}")
        await tab.click(f"{GENERATE}.querySelector('.opblock-summary-control')")
        await tab.until(f"{GENERATE}.querySelector('button.execute')")
        await tab.click(f"{GENERATE}.querySelector('button.execute')")
        answered = f"{GENERATE}.querySelector('.live-responses-table tbody .response-col_status')"
        await tab.until(answered)
        assert (await tab.js(f"{answered}.innerText")).startswith("200")
        assert "generated_text" in await tab.js(f"{GENERATE}.querySelector('.live-responses-table').innerText")
        assert tab.errors == []
        assert f"{server.url}/generate" in tab.requests
        assert [address for address in tab.requests if not address.startswith((f"{server.url}/", "data:"))] == []
