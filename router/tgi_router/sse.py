"""Server-sent events: the response's headers, keep-alive comments, and what happens to a client that does not read.

What the events say is the routes' business: they give the bytes. Called by routes/*.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec
from aiohttp import HttpVersion11, web

from .bodies import compute_headers, error_object, is_openai
from .errors import ApiError, presentable
from .stream import Choice, GeneratedToken, Stream

KEEP_ALIVE = b":\n\n"
MAX_UNSENT_BYTES = 64 * 1024  # of one client, in our buffers; beyond it tokens wait in the stream


class Events(Protocol):
    """How a route writes its events."""

    terminator: bytes  # the very end, after an error too

    def render(self, choice: Choice, token: GeneratedToken) -> bytes:
        """The events of one token, perhaps none; `token is choice.last_token` when the choice ends with it."""

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
    if request.version >= HttpVersion11:
        response.enable_chunked_encoding()
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
    if response.chunked:
        stream.write_now = _chunk_writer(transport, render)
    while (batch := await stream.next()) is not None:
        if len(batch) == 1:
            await response.write(render(*batch[0]))
        elif batch:
            await response.write(b"".join([render(choice, token) for choice, token in batch]))
        else:
            await response.write(KEEP_ALIVE)


def _chunk_writer(
    transport: asyncio.Transport, render: Callable[[Choice, GeneratedToken], bytes]
) -> Callable[[Choice, GeneratedToken], bool]:
    """Writes the event of a token as an HTTP chunk; does nothing while the client does not read, or has left."""

    def write(choice: Choice, token: GeneratedToken) -> bool:
        if transport.is_closing() or transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            return False
        event = render(choice, token)
        if event:  # an empty chunk would end the response
            transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        return True

    return write


async def respond(
    request: web.Request,
    opened: AbstractAsyncContextManager[Stream],
    events: Events,
    *,
    num_characters: int | None = None,
) -> web.StreamResponse:
    """A whole streamed answer; it ends with an event that says how it ended.

    num_characters: of the prompt, when the response is to start before anything is checked, as TGI's own routes do:
    every error is then an event. Otherwise an error before the first token is an HTTP status.
    """
    response = None if num_characters is None else await start(request, num_characters)
    try:
        async with opened as stream:
            if response is None:
                response = await start(request, sum(len(choice.validated.text) for choice in stream.first_choices))
            await pump(request, response, stream, events)
            last = events.last(stream.choices)
    except (ConnectionError, asyncio.CancelledError):
        raise  # nobody reads any more
    except Exception as error:
        if response is None:
            raise
        last = error_event(request, presentable(error))
    await response.write_eof(last + events.terminator)
    return response


def error_event(request: web.Request, error: ApiError) -> bytes:
    """`error` as an event."""
    return b"data: " + msgspec.json.encode(error_object(error, openai=is_openai(request))) + b"\n\n"
