"""What the page makes of answers that the demo model never gives, in headless Chromium (integration-tests/browser.py).

A scripted server sends the real page and, to every chat request, the chunks of the test.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import browser
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from browser import Chromium, Tab
from tgi_router import page

Script = Callable[[web.StreamResponse], Awaitable[None]]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium: `apt-get install chromium` gives one")
    running = Chromium(path)
    yield running
    running.stop()


def event(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], "usage": None}).encode() + b"\n\n"


def text(*pieces: str, finish: str = "stop") -> list[bytes]:
    return [*(event({"content": piece}) for piece in pieces), event({"content": ""}, finish)]


def chunks(*parts: bytes) -> Script:
    """Sends the parts, each by itself."""

    async def send(response: web.StreamResponse) -> None:
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0)
        await response.write_eof(b"data: [DONE]\n\n")

    return send


@asynccontextmanager
async def asked(
    chromium: Chromium, script: Script | web.Response, meanwhile: Callable[[Tab], Awaitable[None]] | None = None
) -> AsyncIterator[Tab]:
    """A tab in which a question was asked, at the end of the answer. meanwhile: what is done before that."""
    shown = page.load()

    async def root(request: web.Request) -> web.Response:
        return page.respond(request, shown, 200)

    async def chat(request: web.Request) -> web.StreamResponse:
        if isinstance(script, web.Response):
            return script
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await script(response)
        return response

    async def empty(request: web.Request) -> web.Response:
        return web.Response()

    async def facts(request: web.Request) -> web.Response:
        return web.json_response({"model_id": "scripted", "router": "script", "version": "1", "max_stop_sequences": 4})

    app = web.Application()
    app.add_routes([web.get("/", root), web.post("/v1/chat/completions", chat), web.get("/info", facts)])
    app.add_routes([web.get(path, empty) for path in ("/health", "/metrics")])
    async with TestServer(app) as server, chromium.tab() as tab:
        await tab.goto(str(server.make_url("/")))
        await tab.until("document.getElementById('status').textContent === 'Serving'")
        await tab.type("Question")
        await tab.press("Enter", "Control")
        if meanwhile is not None:
            await meanwhile(tab)
        await tab.until("document.querySelector('.turn') && document.getElementById('go').textContent === 'Send'")
        yield tab


async def texts(tab: Tab, selector: str) -> list[str]:
    found: list[str] = await tab.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.textContent)")
    return found


async def test_code_between_fences_stands_in_a_block_wherever_the_pieces_end(chromium: Chromium) -> None:
    script = chunks(*text("So:\n``", "`py", "thon\nx = 1\n", "\ny = `2`\n``", "`\nDone", "."))
    async with asked(chromium, script) as tab:
        assert await texts(tab, ".assistant .body > .ln") == ["So:", "Done."]
        assert await texts(tab, ".assistant .fence > .ln") == ["```python", "x = 1", "", "y = `2`", "```"]
        await tab.js("getSelection().selectAllChildren(document.querySelector('.fence'))")
        assert await tab.js("getSelection().toString()") == "```python\nx = 1\n\ny = `2`\n```"  # as it is copied


async def test_a_character_in_several_tokens_is_one_word_with_several_probabilities(chromium: Chromium) -> None:
    def token(shown: str, logprob: float) -> dict[str, Any]:
        return {"content": [{"token": shown, "logprob": logprob, "bytes": [], "top_logprobs": []}]}

    parts = [
        event({"content": ""}, logprobs=token("\ufffd", -0.01)),
        event({"content": "😀"}, logprobs=token("\ufffd", -9999.0)),
        event({"content": "!"}, "stop", logprobs=token("!", -0.02)),
    ]
    async with asked(chromium, chunks(*parts)) as tab:
        assert await texts(tab, ".t") == ["😀", "!"]
        assert await tab.js("document.querySelectorAll('.t')[0].className") == " t p4"  # the least likely of its tokens
        await tab.hover("document.querySelectorAll('.t')[0]")
        assert await texts(tab, "#inspector .head b") == ["99.0%", "< 0.01%"]


async def test_reasoning_stands_apart_from_the_answer(chromium: Chromium) -> None:
    parts = [event({"reasoning_content": "Let me"}), event({"reasoning_content": " think.\n"}), *text("Yes.")]
    async with asked(chromium, chunks(*parts)) as tab:
        assert await texts(tab, ".think .ln") == ["Let me think."]
        assert await texts(tab, ".assistant .body") == ["Yes."]


async def test_two_tool_calls_are_put_together_from_pieces(chromium: Chromium) -> None:
    def call(index: int, arguments: str, **more: Any) -> bytes:
        function = {"arguments": arguments, **({"name": more["name"]} if "name" in more else {})}
        return event({"tool_calls": [{"index": index, "function": function, **({"id": more["id"]} if more else {})}]})

    parts = [
        call(0, "", id="a", name="add"),
        call(0, '{"x"'),
        call(0, ": 1}"),
        call(1, "{}", id="b", name="now"),
        event({"content": ""}, "tool_calls"),
    ]
    async with asked(chromium, chunks(*parts)) as tab:
        assert await texts(tab, ".call b") == ["add", "now"]
        assert await texts(tab, ".call pre") == ['{"x": 1}', "{}"]
        assert len(await texts(tab, ".call textarea")) == 2
        assert await texts(tab, ".call .result") == ["Send results"]


async def test_a_long_answer_is_shown_whole_and_its_end_stays_in_sight(chromium: Chromium) -> None:
    words = [f"word{n}{chr(10) if n % 20 == 19 else ' '}" for n in range(5000)]
    events = text(*words)
    async with asked(chromium, chunks(b"".join(events[:4000]), *events[4000:])) as tab:
        assert "\n".join(await texts(tab, ".assistant .ln")) == "".join(words).rstrip("\n")
        assert await tab.js("log.scrollHeight - log.scrollTop - log.clientHeight < 60")


async def test_who_reads_further_up_is_not_pulled_down(chromium: Chromium) -> None:
    go_on = asyncio.Event()

    async def script(response: web.StreamResponse) -> None:
        await response.write(b"".join(text(*(f"line {n}\n" for n in range(200)))[:-1]))
        await go_on.wait()
        await chunks(*text("the end"))(response)

    async def scroll_up(tab: Tab) -> None:
        await tab.until("document.querySelectorAll('.ln').length === 201")  # and the question's
        await tab.js("log.scrollTop = 100")
        go_on.set()

    async with asked(chromium, script, scroll_up) as tab:
        assert (await texts(tab, ".assistant .ln"))[-1] == "the end"
        assert await tab.js("log.scrollTop") == 100


async def test_an_error_within_a_stream_leaves_what_was_said(chromium: Chromium) -> None:
    error = {"error": {"message": "Request failed", "http_status_code": 500}, "error_type": "generation"}
    parts = [*text("Half an ans")[:-1], b"data: " + json.dumps(error).encode() + b"\n\n"]
    async with asked(chromium, chunks(*parts)) as tab:
        assert await texts(tab, ".assistant .body") == ["Half an ans"]
        assert await texts(tab, ".problem p") == ["generation · 500Request failed"]
        assert await texts(tab, ".facts") == ["incomplete"]


async def test_a_connection_that_breaks_is_no_complete_answer(chromium: Chromium) -> None:
    async def script(response: web.StreamResponse) -> None:
        await response.write(b"".join(text("Half")[:-1]))
        transport = response._req.transport
        transport.close()

    async with asked(chromium, script) as tab:
        (said,) = await texts(tab, ".problem p")
        assert said.startswith("connection lost")


async def test_what_a_proxy_says_is_shown_as_text(chromium: Chromium) -> None:
    answer = web.Response(status=502, text="<h1>Bad Gateway</h1>", content_type="text/html")
    async with asked(chromium, answer) as tab:
        assert await texts(tab, ".problem p") == ["status 502<h1>Bad Gateway</h1>"]
        assert await tab.js("document.querySelector('.problem h1')") is None
