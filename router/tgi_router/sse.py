"""Server-sent events: the response's headers, keep-alive comments, and what happens to a client that does not read.

What the events say is the routes' business: they give the bytes. Called by routes/*.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec
from aiohttp import web

from .bodies import compute_headers, error_object, is_openai
from .errors import ApiError
from .stream import Choice, GeneratedToken, Stream

KEEP_ALIVE = b":\n\n"
DONE = b"data: [DONE]\n\n"


class Events(Protocol):
    """How a route writes its events."""

    def render(self, choice: Choice, token: GeneratedToken) -> bytes:
        """The event of one token; `token is choice.last_token` when the choice ends with it."""

    def last(self, choices: Sequence[Choice]) -> bytes:
        """What follows the last token's event."""


async def start(request: web.Request, num_characters: int) -> web.StreamResponse:
    """Sends status 200 and the headers at once, before any event is known. num_characters: of the prompt."""
    response = web.StreamResponse(
        headers={
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **compute_headers(request, num_characters),
        }
    )
    await response.prepare(request)
    await response.write(b"")
    return response


async def pump(request: web.Request, response: web.StreamResponse, stream: Stream, events: Events) -> None:
    """Writes every token of `stream` as it comes, what came together in one write. Raises the stream's failure."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    stream.on_stall = transport.abort  # which cancels this handler
    render = events.render
    while (batch := await stream.next()) is not None:
        if len(batch) == 1:
            await response.write(render(*batch[0]))
        elif batch:
            await response.write(b"".join([render(choice, token) for choice, token in batch]))
        else:
            await response.write(KEEP_ALIVE)


async def respond(
    request: web.Request, opened: AbstractAsyncContextManager[Stream], events: Events
) -> web.StreamResponse:
    """A whole streamed answer of OpenAI's routes: an error before the first token is an HTTP status, later an event."""
    response = None
    try:
        async with opened as stream:
            characters = sum({id(c.validated.text): len(c.validated.text) for c in stream.choices}.values())
            response = await start(request, characters)
            await pump(request, response, stream, events)
    except ApiError as error:
        if response is None:
            raise
        return await finish(response, error_event(request, error) + DONE)
    return await finish(response, events.last(stream.choices) + DONE)


def error_event(request: web.Request, error: ApiError) -> bytes:
    """`error` as an event."""
    return b"data: " + msgspec.json.encode(error_object(error, openai=is_openai(request))) + b"\n\n"


async def finish(response: web.StreamResponse, last: bytes = b"") -> web.StreamResponse:
    """Writes the last bytes and ends the response."""
    await response.write_eof(last)
    return response
