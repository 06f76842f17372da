"""Drives headless Chromium through its DevTools protocol, for the tests of the page: no driver, no package but aiohttp.

`Chromium` is one browser process with a profile of its own. `Chromium.tab()` is a fresh tab with its own storage, in
which a test types, points and looks. What the tab logged and requested is recorded: `errors`, `requests`.
Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

WAIT_S = 120.0  # for whatever a test waits for; the machine may be busy
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--force-color-profile=srgb",
    "--lang=en",
    "--remote-debugging-port=0",
)
_KEYS = {  # name -> (code, windowsVirtualKeyCode, text)
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    " ": ("Space", 32, " "),
}
_MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}


def find() -> str | None:
    """The browser's path, None when there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """A browser process; ended, with its profile, by `stop`."""

    def __init__(self, path: str) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="tgi-chromium-"))
        command = [path, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        with (self._profile / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _endpoint(self) -> str:
        """Where it listens: it writes that into its profile when it is ready."""
        file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        log = (self._profile / "log").read_text(errors="replace")
        raise AssertionError(f"Chromium did not start, exit status {self._process.poll()}:\n{log[-3000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def tab(
        self, *, width: int = 1280, height: int = 860, mobile: bool = False, **media: str
    ) -> AsyncIterator["Tab"]:
        """media: CSS media features, such as prefers_color_scheme="dark"."""
        endpoint = await asyncio.to_thread(self._endpoint)
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(endpoint, max_msg_size=0, heartbeat=None) as socket,
        ):
            tab = Tab(socket)
            reading = asyncio.create_task(tab.read())
            try:
                await tab.open(width, height, mobile, {name.replace("_", "-"): value for name, value in media.items()})
                yield tab
            finally:
                await tab.close()
                reading.cancel()
                await asyncio.wait([reading])


class Tab:
    """A page in a browser context of its own, so that storage and cookies are empty."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._context = ""
        self.errors: list[str] = []  # exceptions, console.error, refused by policy, failed loads
        self.requests: list[str] = []  # addresses

    async def send(self, method: str, **parameters: Any) -> Any:
        """A protocol command and its result."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        content = await asyncio.wait_for(answer, WAIT_S)
        assert "error" not in content, f"{method}: {content['error']}"
        return content["result"]

    async def read(self) -> None:
        """Takes in answers and events until the connection ends."""
        async for message in self._socket:
            content = json.loads(message.data)
            if "id" in content:
                self._answers.pop(content["id"]).set_result(content)
            else:
                self._note(content["method"], content.get("params", {}))

    def _note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            exception = details["exceptionDetails"]
            self.errors.append(exception.get("exception", {}).get("description") or exception["text"])
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in details["args"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] == "error":
            self.errors.append(f"{details['entry']['text']} ({details['entry'].get('url', '')})")

    async def open(self, width: int, height: int, mobile: bool, media: dict[str, str]) -> None:
        self._context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=self._context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.send(f"{domain}.enable")
        await self.size(width, height, mobile)
        features = [{"name": name, "value": value} for name, value in media.items()]
        await self.send("Emulation.setEmulatedMedia", features=features)
        await self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    async def close(self) -> None:
        self._session = None
        await self.send("Target.disposeBrowserContext", browserContextId=self._context)

    async def size(self, width: int, height: int, mobile: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )
        await self.send("Emulation.setTouchEmulationEnabled", enabled=mobile)

    async def goto(self, address: str) -> None:
        await self.send("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        result = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        details = result.get("exceptionDetails")
        assert details is None, f"{expression}: {(details or {}).get('exception', {}).get('description')}"
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until the expression is true."""
        deadline = time.monotonic() + WAIT_S
        while not await self.js(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                text = await self.js("document.body.innerText.slice(0, 1500)")
                raise AssertionError(f"not within {WAIT_S} s: {expression}\nthe page says: {text}\n{self.errors}")
            await asyncio.sleep(0.02)

    async def type(self, text: str) -> None:
        """Into whatever has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, *modifiers: str) -> None:
        """A key down and up, as a person presses it."""
        code, number, text = _KEYS[key]
        bits = sum(_MODIFIERS[name] for name in modifiers)
        event: dict[str, Any] = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": bits}
        down = {"type": "keyDown", "text": text} if text and not bits else {"type": "rawKeyDown"}
        await self.send("Input.dispatchKeyEvent", **event, **down)
        await self.send("Input.dispatchKeyEvent", **event, type="keyUp")

    async def place(self, element: str) -> tuple[float, float]:
        """The middle of the first line of an element given as a JavaScript expression, scrolled into view."""
        x, y = await self.js(
            f"(() => {{ const node = {element}; node.scrollIntoView({{ block: 'nearest' }});"
            " const box = node.getClientRects()[0]; return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return float(x), float(y)

    async def hover(self, element: str) -> None:
        x, y = await self.place(element)
        await self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def click(self, element: str) -> None:
        x, y = await self.place(element)
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def screenshot(self, kind: str = "png") -> bytes:
        """The visible part. kind: "png" or "webp"."""
        quality = {} if kind == "png" else {"quality": 85}
        return base64.b64decode((await self.send("Page.captureScreenshot", format=kind, **quality))["data"])
