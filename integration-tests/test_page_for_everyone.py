"""The page with a keyboard, a screen reader, a phone, in light and dark, without motion. What it does: test_page.py."""

import re

from browser import Chromium, Tab
from harness import Server
from page_kit import QUESTION, ask, completion, ended, enter, send, set_field

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
