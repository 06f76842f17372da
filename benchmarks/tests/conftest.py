"""A stand-in server to measure."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web


@dataclass
class StandIn:
    """Speaks the three streaming routes; every word of the prompt is a token, `behaviour` says what goes wrong."""

    url: str = ""
    behaviour: str = "well"  # well | overloaded | failing | truncated
    first_token_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.behaviour == "overloaded":
            return web.json_response({"error": "Model is overloaded", "error_type": "overloaded"}, status=429)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.first_token_s)
        for event in (self.tgi if "inputs" in body else self.openai)(body):
            await response.write(b"data: " + event + b"\n\n")
        await response.write_eof()
        return response

    def tgi(self, body: dict[str, Any]) -> list[bytes]:
        count = body["parameters"]["max_new_tokens"]
        words = len(body["inputs"].split())
        events = [
            {
                "index": i,
                "token": {"id": i, "text": " w", "logprob": -1.0, "special": False},
                "generated_text": None if i < count else " w" * count,
                "details": None if i < count else {"generated_tokens": count, "input_length": words},
            }
            for i in range(1, count + 1)
        ]
        if self.behaviour == "failing":
            events[1:] = [{"error": "boom", "error_type": "generation"}]
        if self.behaviour == "truncated":
            del events[-1]
        return [json.dumps(event, separators=(",", ":")).encode() for event in events]

    def openai(self, body: dict[str, Any]) -> list[bytes]:
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": body["max_tokens"]}
        deltas: list[dict[str, Any]] = [
            {"delta": {"content": text}} if chat else {"text": text} for text in ["", *[" w"] * body["max_tokens"]]
        ]
        deltas.append({"delta": {}, "finish_reason": "length"} if chat else {"text": "", "finish_reason": "length"})
        events = [{"choices": [delta], "usage": None} for delta in deltas] + [{"choices": [], "usage": usage}]
        return [*(json.dumps(event, separators=(",", ":")).encode() for event in events), b"[DONE]"]


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    server = StandIn()
    app = web.Application()
    for route in ("/generate_stream", "/v1/completions", "/v1/chat/completions"):
        app.router.add_post(route, server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()
