"""The page at GET /, in a real browser (browser.py), on the demo model. Its headers: router/tests/test_page.py."""

import json
import math
import re
import shlex
from collections.abc import AsyncIterator, Callable, Iterator

import browser
import pytest
from browser import Chromium, Tab
from harness import Json, Server, wait_until

# The element with the focus: its name, and whether one sees that it has it. null: none has.
FOCUS = """(() => {
  const node = document.activeElement;
  if (node === document.body) return null;
  const marked = (one) => getComputedStyle(one).outlineStyle !== 'none' || getComputedStyle(one).boxShadow !== 'none';
  const place = node.closest('label, #box') ?? node;
  const seen = node.getClientRects().length > 0 && (marked(node) || marked(place));
  return { name: node.id || node.textContent.trim().slice(0, 40), seen };
})()"""

# Text whose contrast to what is behind it is below 4.5 to 1 (large text: 3 to 1), WCAG 2.2, 1.4.3.
POOR_CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    const color = rgba(getComputedStyle(node).backgroundColor);
    return color[3] === 255 || !node.parentElement ? color : behind(node.parentElement);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = [];
  let checked = 0;
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    const shown = node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
    if (!text.data.trim() || !shown || node.closest('.sr, script, option, :disabled')) continue;
    const style = getComputedStyle(node);
    const [light, dark] = [rgba(style.color), behind(node)].map(luminance).sort((x, y) => y - x);
    const ratio = (light + 0.05) / (dark + 0.05);
    checked += 1;
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) poor.push(`${text.data}: ${ratio.toFixed(2)}`);
  }
  return { checked, poor };
})()"""

# What reaches beyond the right edge of a screen of 360 pixels.
OUTSIDE = """[...document.querySelectorAll('body *')]
  .filter((one) => one.checkVisibility() && !one.closest('.sr, .skip, svg, .fence'))
  .filter((one) => one.getBoundingClientRect().right > 361)
  .map((one) => `${one.tagName} ${one.className}`)"""

QUESTION = "What does os.path.join do?"
ENDLESS = "import json\nimport"  # greedy, the model goes on to import until the limit


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium: `apt-get install chromium` gives one")
    running = Chromium(path)
    yield running
    running.stop()


@pytest.fixture
async def tab(chromium: Chromium, server: Server) -> AsyncIterator[Tab]:
    """The page, serving, greedy. At the end nothing may have gone wrong unseen, nor any request elsewhere."""
    async with chromium.tab() as opened:
        await enter(opened, server)
        await set_field(opened, "temperature", 0)
        yield opened
        assert opened.errors == []
        assert [address for address in opened.requests if not address.startswith((f"{server.url}/", "data:"))] == []


async def enter(tab: Tab, server: Server, status: str = "Serving") -> None:
    await tab.goto(f"{server.url}/")
    await tab.until(f"document.getElementById('status').textContent === '{status}'")


async def set_field(tab: Tab, name: str, value: object) -> None:
    """As typing does; sections that are closed need not be opened."""
    await tab.js(
        f"(() => {{ const field = document.getElementById('{name}'); field.value = {json.dumps(value)};"
        " for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, { bubbles: true })); })()"
    )


async def send(tab: Tab, text: str) -> None:
    await tab.js("(() => { const field = document.getElementById('prompt'); field.focus(); field.select(); })()")
    await tab.type(text)
    await tab.press("Enter", "Control")


async def ask(tab: Tab, text: str) -> str:
    """The answer, when it is complete."""
    await send(tab, text)
    await ended(tab)
    return await answer(tab)


async def ended(tab: Tab) -> None:
    await tab.until("document.getElementById('go').textContent === 'Send'")


async def answer(tab: Tab) -> str:
    """The text of the last turn as a person reads it: line by line."""
    lines = "[...[...document.querySelectorAll('.turn')].at(-1).querySelectorAll('.ln')]"
    return "\n".join(await tab.js(f"{lines}.map((line) => line.textContent)"))


async def completion(tab: Tab, **fields: object) -> None:
    await tab.click("document.querySelector('input[value=text]').parentNode")
    for name, value in fields.items():
        await set_field(tab, name, value)


def chat(server: Server, *messages: str, **fields: object) -> Json:
    """What the API answers to the conversation: user, assistant, user, ..."""
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)]
    response = server.post("/v1/chat/completions", {"messages": said, "temperature": 0, "max_tokens": 400, **fields})
    assert response.status == 200, response.text
    choice: Json = response.json["choices"][0]
    return choice


async def texts(tab: Tab, selector: str) -> list[str]:
    """What the elements say."""
    found: list[str] = await tab.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.textContent)")
    return found


def action(name: str) -> str:
    """The button of that name below the last turn."""
    buttons = "[...[...document.querySelectorAll('.turn')].at(-1).querySelectorAll('footer button')]"
    return f"{buttons}.find((button) => button.textContent === '{name}')"


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


# What everyone must be able to do


async def test_the_keyboard_is_enough_and_the_focus_is_always_seen(tab: Tab) -> None:
    await tab.js("document.querySelector('.skip').focus()")  # the first
    seen: list[str] = []
    while (place := await tab.js(FOCUS)) is not None and len(seen) < 60:
        assert place["seen"], f"the focus on {place['name']!r} is not to be seen"
        seen.append(place["name"])
        await tab.press("Tab")
    for name in (
        "prompt",
        "probs",
        "go",
        "theme",
        "opener",
        "system",
        "temperature",
        "seed",
        "Output format and tools",
        "log",
    ):
        assert name in seen
    await tab.js("document.getElementById('prompt').focus()")
    await tab.type(QUESTION)
    await tab.press("Enter", "Control")
    await tab.until("document.querySelectorAll('.t').length > 3")
    await ended(tab)
    await tab.js("document.getElementById('log').focus()")
    while not await tab.js("document.activeElement.matches('.assistant .body')"):
        await tab.press("Tab")
    for _ in range(3):
        await tab.press("ArrowRight")
    assert await tab.js("document.querySelector('.t.at') === document.querySelectorAll('.t')[2]")
    await tab.until("!document.getElementById('inspector').hidden")
    assert "%" in await tab.js("document.getElementById('spoken').lastChild.textContent")
    await tab.press("Escape")
    assert await tab.js("document.getElementById('inspector').hidden") is True


async def test_an_answer_is_spoken_in_sentences_not_tokens(tab: Tab) -> None:
    text = await ask(tab, QUESTION)
    spoken = await tab.js("[...document.querySelectorAll('#spoken p')].map((p) => p.textContent)")
    assert spoken[-1] == "Model finished."
    assert "".join(spoken[:-1]) == text
    assert len(spoken) <= 4
    assert await tab.js("document.querySelector('#log').closest('[aria-live]')") is None


async def test_every_control_has_a_name(tab: Tab) -> None:
    await ask(tab, QUESTION)
    await tab.js("for (const group of document.querySelectorAll('details')) group.open = true")
    await set_field(tab, "format", "json")
    nodes = (await tab.send("Accessibility.getFullAXTree"))["nodes"]
    controls = {
        "button",
        "textbox",
        "spinbutton",
        "combobox",
        "checkbox",
        "radio",
        "slider",
        "link",
        "region",
        "dialog",
        "searchbox",
    }
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in controls]
    assert len(found) > 35
    assert [node["role"]["value"] for node in found if not node.get("name", {}).get("value")] == []


async def test_text_can_be_read_in_light_and_dark(chromium: Chromium, server: Server) -> None:
    for theme in ("light", "dark"):
        async with chromium.tab(prefers_color_scheme=theme) as tab:
            await enter(tab, server)
            color = await tab.js("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", color))) > 384) is (theme == "light")
            assert (await tab.js(POOR_CONTRAST))["poor"] == []
            await set_field(tab, "temperature", -1)
            await ask(tab, QUESTION)
            await tab.until("document.querySelector('.problem')")
            await completion(tab, max=25, temperature=2)
            await ask(tab, "def ")
            await tab.js("for (const group of document.querySelectorAll('details')) group.open = true")
            for _ in range(2):
                result = await tab.js(POOR_CONTRAST)
                assert result["checked"] > 60
                assert result["poor"] == []
                await tab.click("document.getElementById('theme')")
            assert await tab.js("getComputedStyle(document.body).backgroundColor") == color


async def test_a_phone_shows_everything_without_scrolling_sideways(chromium: Chromium, server: Server) -> None:
    async with chromium.tab(width=360, height=740, mobile=True) as tab:
        await enter(tab, server)
        fits = "document.documentElement.scrollWidth === 360 && document.body.scrollWidth === 360"
        await set_field(tab, "temperature", 0)
        assert await tab.js(fits)
        assert await tab.js(OUTSIDE) == []
        await ask(tab, QUESTION)
        await ask(tab, "x" * 120)
        assert await tab.js(fits)
        assert await tab.js(OUTSIDE) == []
        await tab.click("document.querySelectorAll('.t')[1]")
        await tab.until("!document.getElementById('inspector').hidden")
        assert await tab.js(OUTSIDE) == []
        await tab.click("document.getElementById('opener')")
        assert await tab.js("document.getElementById('settings').matches(':modal')")
        assert await tab.js(OUTSIDE) == []
        await tab.press("Escape")
        assert await tab.js("document.getElementById('settings').open") is False
        assert await tab.js("document.getElementById('go').getBoundingClientRect().bottom <= 740")
        small = await tab.js(
            "[...document.querySelectorAll('header button, #composer button, footer button')]"
            ".map((b) => [b.textContent || b.ariaLabel, b.getBoundingClientRect().height]).filter((b) => b[1] < 24)"
        )
        assert small == []  # WCAG 2.5.8: targets of at least 24 pixels


async def test_who_wants_no_motion_gets_none(chromium: Chromium, server: Server) -> None:
    async with chromium.tab(prefers_reduced_motion="reduce") as tab:
        await enter(tab, server)
        await send(tab, QUESTION)
        await tab.until("document.querySelector('.busy')")
        assert await tab.js("document.getAnimations().length") == 0
        await ended(tab)
