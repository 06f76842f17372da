"""The page at GET /, in a real browser (browser.py), on the demo model. Its headers: router/tests/test_page.py."""

import json
import math
import re
import shlex
from collections.abc import Callable

import pytest
from browser import Chromium, Tab
from harness import Json, Server, wait_until
from page_kit import QUESTION, action, answer, ask, completion, ended, enter, send, set_field, texts

ENDLESS = "import json\nimport"  # greedy, the model goes on to import until the limit


def chat(server: Server, *messages: str, **fields: object) -> Json:
    """What the API answers to the conversation: user, assistant, user, ..."""
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)]
    response = server.post("/v1/chat/completions", {"messages": said, "temperature": 0, "max_tokens": 400, **fields})
    assert response.status == 200, response.text
    choice: Json = response.json["choices"][0]
    return choice


async def test_an_answer_is_the_api_s_and_the_conversation_goes_on(tab: Tab, server: Server) -> None:
    first = await ask(tab, QUESTION)
    assert first == chat(server, QUESTION)["message"]["content"]
    assert re.fullmatch(
        r"\d+ tokens( · \d+/s)? · first after [\d.]+ m?s", await tab.js("document.querySelector('.facts').textContent")
    )
    second = await ask(tab, "And textwrap.dedent?")
    assert second == chat(server, QUESTION, first, "And textwrap.dedent?")["message"]["content"]
    await tab.goto(f"{server.url}/")
    await tab.until("document.querySelectorAll('.turn').length === 4")
    assert await answer(tab) == second


async def test_a_completion_keeps_every_line_of_the_text(tab: Tab, server: Server) -> None:
    await completion(tab, max=60)
    prompt = "import os\n\ndef ma"
    text = await ask(tab, prompt)
    generated = server.generate(prompt, max_new_tokens=60)["generated_text"]
    assert text == (prompt + generated).rstrip("\n")
    assert "\n" in generated
    assert "".join(await texts(tab, ".given")) == prompt.replace("\n", "")


async def test_streaming_only_appends_and_moves_nothing(tab: Tab) -> None:
    await completion(tab, max=120)
    await tab.js(
        "globalThis.seen = { removed: 0, shift: 0, counts: [] };"
        "new PerformanceObserver((list) => { for (const e of list.getEntries()) seen.shift += e.value; })"
        ".observe({ type: 'layout-shift' });"
    )
    await send(tab, ENDLESS)
    await tab.until("document.querySelectorAll('.t').length > 1")
    await tab.js(
        "new MutationObserver((list) => { for (const m of list) seen.removed += m.removedNodes.length; })"
        ".observe(document.querySelector('.turn .body'), { childList: true, subtree: true }); undefined"
    )
    await tab.until("document.querySelectorAll('.t').length > 30")
    assert await tab.js("document.getElementById('go').textContent") == "Stop"
    await ended(tab)
    seen = await tab.js("seen")
    assert seen["removed"] == 0
    assert seen["shift"] < 0.02
    assert await tab.js("log.scrollHeight - log.scrollTop - log.clientHeight") < 60


@pytest.mark.parametrize("how", ["button", "Escape"])
async def test_stop_ends_the_request_on_the_server(tab: Tab, server: Server, how: str) -> None:
    await completion(tab, max=1900)
    await send(tab, ENDLESS)
    await tab.until("document.querySelectorAll('.t').length > 5")
    assert server.metric("tgi_batch_current_size") == 1
    if how == "button":
        await tab.click("document.getElementById('go')")
    else:
        await tab.press("Escape")
    await ended(tab)
    wait_until(lambda: server.metric("tgi_batch_current_size") == 0, within_s=60, what="the server runs nothing")
    assert (await tab.js("document.querySelector('.facts').textContent")).endswith("stopped")
    assert await tab.js("document.querySelector('.problem')") is None


async def test_pointing_at_a_token_shows_what_else_was_likely(tab: Tab, server: Server) -> None:
    await ask(tab, QUESTION)
    tokens = chat(server, QUESTION, logprobs=True, top_logprobs=5)["logprobs"]["content"]
    await tab.hover("document.querySelectorAll('.t')[2]")
    await tab.until("!document.getElementById('inspector').hidden")
    top = tokens[2]["top_logprobs"]
    assert await texts(tab, "#inspector li span:first-of-type") == [one["token"].replace(" ", "·") for one in top]
    for shown, one in zip(await texts(tab, "#inspector li span:last-of-type"), top, strict=True):
        assert shown == "< 0.01%" or float(shown.rstrip("%")) == pytest.approx(100 * math.exp(one["logprob"]), abs=0.06)
    classes = await tab.js("[...document.querySelectorAll('.t')].map((token) => token.className.match(/p(\\d)/)[1])")
    likely = [math.exp(one["logprob"]) for one in tokens][: len(classes)]
    assert [int(c) for c in classes] == [sum(p < bound for bound in (0.9, 0.5, 0.2, 0.05)) for p in likely]
    await tab.js("document.getElementById('probs').click()")
    await tab.hover("document.querySelectorAll('.t')[3]")
    assert await tab.js("document.getElementById('inspector').hidden") is True


async def test_a_refusal_is_shown_and_can_be_put_right(tab: Tab) -> None:
    tab.errors.append("expected")
    await set_field(tab, "temperature", -1)
    await send(tab, QUESTION)
    await tab.until("document.querySelector('.problem[role=alert]')")
    assert await tab.js("document.querySelector('.problem p').textContent") == (
        "validation · 422Input validation error: `temperature` must be strictly positive".replace("`", "")
    )
    assert await tab.js("document.querySelector('.problem code').textContent") == "temperature"
    await set_field(tab, "temperature", 0)
    await tab.click("document.querySelector('.problem button')")
    await tab.until("document.querySelectorAll('.t').length > 5")
    await ended(tab)
    assert await tab.js("document.querySelector('.problem')") is None
    assert await tab.js("document.querySelectorAll('.turn').length") == 2
    tab.errors[:] = [error for error in tab.errors if error != "expected" and "422" not in error]


async def test_json_with_a_mistake_is_not_sent(tab: Tab) -> None:
    await set_field(tab, "tools", '[{"type": ')
    sent = len(tab.requests)
    await send(tab, QUESTION)
    await tab.until("document.querySelector('.problem')")
    assert await tab.js("document.getElementById('tools').getAttribute('aria-invalid')") == "true"
    assert await tab.js("document.getElementById('guidance').open")
    assert [address for address in tab.requests[sent:] if "/v1/" in address] == []


async def test_markup_is_text(tab: Tab) -> None:
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    await completion(tab, max=2)
    await ask(tab, attack)
    assert await tab.js("document.querySelector('.given').textContent") == attack
    assert await tab.js("document.querySelector('main img, main script')") is None


async def test_a_tool_is_called_answered_and_the_model_goes_on(tab: Tab) -> None:
    await tab.js("document.querySelector('[data-example=tools]').click()")
    await ask(tab, "What is the weather in Paris?")
    assert await tab.js("document.querySelector('.call b').textContent") == "get_weather"
    assert json.loads(await tab.js("document.querySelector('.call pre').textContent")) == {"city": "Paris"}
    await tab.js("document.querySelector('.call textarea').value = '21 degrees'")
    await tab.click("document.querySelector('.call .result')")
    await tab.until("document.querySelectorAll('.turn').length === 4")
    await ended(tab)
    assert await answer(tab) != ""
    assert await tab.js("document.querySelector('.turn.tool .body').textContent") == "21 degrees"


@pytest.mark.parametrize("mode", ["chat", "text"])
async def test_the_server_knows_every_parameter_that_is_set(tab: Tab, server: Server, mode: str) -> None:
    fractions = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.1}
    penalties = {"frequency_penalty": 0.1, "presence_penalty": 0.2}
    values = {**fractions, **penalties, "max": 3, "seed": 7, "top_k": 9, "min_tokens": 2, "top": 1}
    await set_field(tab, "stop", "xyz\\n\nuvw")
    if mode == "text":
        await completion(tab, truncate=5)
    for name, value in values.items():
        await set_field(tab, name, value)
    await ask(tab, "def main():")
    assert await tab.js("document.querySelector('.problem')") is None
    await tab.click(action("curl"))
    words = shlex.split(await tab.js("document.getElementById('curl').value"))
    body = json.loads(words[words.index("-d") + 1])
    sent = body["parameters"] if mode == "text" else body
    assert sent["stop"] == ["xyz\n", "uvw"]
    response = server.post(words[2].removeprefix(server.url), body)
    assert response.status == 200
    assert "x-ignored-params" not in response.headers
    numbers = [value for value in sent.values() if type(value) in (int, float)]
    assert sorted(numbers) == sorted([*values.values(), *([5] if mode == "text" else [])])


async def test_an_output_format_is_kept_to(tab: Tab) -> None:
    await tab.js("document.querySelector('[data-example=schema]').click()")
    await set_field(tab, "format", "json")
    found = json.loads(await ask(tab, "What a day!"))
    assert found["mood"] in ("good", "bad", "neither")
    assert found["sure"] in (True, False)
    await completion(tab, regex="[0-9]{2}-[a-c]{3}", format="regex")
    await ask(tab, "The code is ")
    assert re.fullmatch("[0-9]{2}-[a-c]{3}", "".join(await texts(tab, ".t")))


async def test_a_conversation_can_be_edited_regenerated_and_cleared(tab: Tab, server: Server) -> None:
    await ask(tab, "What does os.getcwd do?")
    await tab.click("[...document.querySelectorAll('.turn.user footer button')].find((b) => b.textContent === 'Edit')")
    await tab.js("document.activeElement.select()")
    await tab.type(QUESTION)
    await tab.press("Enter", "Control")
    await tab.until("document.querySelectorAll('.turn').length === 2 && document.querySelector('.t')")
    await ended(tab)
    expected = chat(server, QUESTION)["message"]["content"]
    assert await answer(tab) == expected
    await tab.click(action("Regenerate"))
    await tab.until("document.getElementById('go').textContent === 'Stop'")
    await ended(tab)
    assert await answer(tab) == expected
    await tab.click("document.getElementById('clear')")
    assert await tab.js("document.querySelectorAll('.turn').length") == 0
    assert await tab.js("document.getElementById('empty').hidden") is False
    await tab.click("document.querySelector('#toast button')")
    assert await answer(tab) == expected


async def test_the_curl_command_is_the_request(tab: Tab, server: Server) -> None:
    question = """What's "os.path" for? $HOME `x` \\n"""
    shown = await ask(tab, question)
    await tab.click(action("curl"))
    words = shlex.split(await tab.js("document.getElementById('curl').value"))
    assert words[:3] == ["curl", "-N", f"{server.url}/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == [{"role": "user", "content": question}]
    with server.stream("/v1/chat/completions", body) as stream:
        pieces = [choice["delta"].get("content") or "" for event in stream.events() for choice in event["choices"]]
    assert "".join(pieces) == shown


async def test_the_live_numbers_are_those_of_metrics(tab: Tab) -> None:
    number = "document.querySelectorAll('.cell b')[{}].textContent"
    await completion(tab, max=1900)
    await send(tab, ENDLESS)
    await tab.until(f"{number.format(0)} === '1'")
    await tab.until(f"Number({number.format(3)}) > 0")
    for place in (4, 5):
        await tab.until(f"/^[\\d.]+ m?s$/.test({number.format(place)})")
    await tab.press("Escape")
    await tab.until(f"{number.format(0)} === '0'")


async def test_a_key_is_asked_for_kept_for_the_tab_and_never_shown(
    chromium: Chromium, launch: Callable[..., Server]
) -> None:
    guarded = launch("--api-key", "sesame")
    async with chromium.tab() as tab:
        await enter(tab, guarded, "API key needed")
        await send(tab, QUESTION)
        await tab.until("document.querySelector('.problem')")
        assert "401" in await tab.js("document.querySelector('.problem strong').textContent")
        await tab.click("document.querySelector('.problem button')")
        assert await tab.js("document.activeElement.id") == "key"
        await tab.type("sesame")
        await tab.press("Tab")
        await tab.until("document.getElementById('status').textContent === 'Serving'")
        await tab.js("[...document.querySelectorAll('.problem button')].at(-1).click()")
        await tab.until("document.querySelectorAll('.t').length > 5")
        await ended(tab)
        await tab.click(action("curl"))
        command = await tab.js("document.getElementById('curl').value")
        assert "Bearer $API_KEY" in command
        assert "sesame" not in command
        assert await tab.js("[localStorage.length, document.cookie]") == [0, ""]
