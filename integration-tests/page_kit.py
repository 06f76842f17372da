"""What a person does on the page at GET /, for test_page.py and test_page_for_everyone.py. Fixtures: conftest.py."""

import json

from browser import Tab
from harness import Server

QUESTION = "What does os.path.join do?"


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


async def texts(tab: Tab, selector: str) -> list[str]:
    """What the elements say."""
    found: list[str] = await tab.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.textContent)")
    return found


def action(name: str) -> str:
    """The button of that name below the last turn."""
    buttons = "[...[...document.querySelectorAll('.turn')].at(-1).querySelectorAll('footer button')]"
    return f"{buttons}.find((button) => button.textContent === '{name}')"
