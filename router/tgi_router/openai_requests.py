"""How a request to /v1/chat/completions or /v1/completions begins: body in, prompts and rules out, counted as in TGI.

What the prompts are is each route's business. Called by routes/chat.py and routes/completions.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from .bodies import begin, decode, read, report_unknown
from .errors import ApiError, ValidationError
from .infer import Call
from .parameters import OpenAISampling
from .schemas import openai
from .server import SERVER, Server
from .stream import Rules
from .validation import Prompt

Body = TypeVar("Body", bound=openai.Common)

MAX_CHOICES = 128  # for one prompt: what OpenAI's clients may ask for; `--max-best-of` is about TGI's routes

_sampling_decoder = msgspec.json.Decoder(OpenAISampling)


@dataclass(frozen=True, slots=True)
class Understood(Generic[Body]):
    """A request that its route can serve; its prompts are not validated yet."""

    server: Server
    body: Body
    call: Call
    prompts: list[Prompt]
    rules: Rules


def check_choices(server: Server, n: int | None, *, best_of: int | None = None, num_prompts: int = 1) -> None:
    """Raises ValidationError for too few or too many choices, also when so many can never run at once."""
    for name, value, least in (("n", n, 1), ("best_of", best_of, n or 1)):
        if value is not None and not least <= value <= MAX_CHOICES:
            raise ValidationError(f"`{name}` must be >= {least} and <= {MAX_CHOICES}. Given: {value}", param=name)
    copies, most = best_of or n or 1, server.config.max_concurrent_requests
    if num_prompts * copies > most:
        raise ValidationError(
            f"`{'n' if best_of is None else 'best_of'}` times the number of prompts must be <= {most}. "
            f"Given: {copies} for {num_prompts} prompts. `--max-concurrent-requests` raises the limit",
            param="n" if best_of is None else "best_of",
        )


async def understand(
    request: web.Request,
    decoder: msgspec.json.Decoder[Body],
    prompts_of: Callable[[Server, Body, msgspec.Struct], list[Prompt]],
) -> Understood[Body]:
    """Reads and decodes the body. Raises ApiError.

    prompts_of: makes the prompts from the body and its sampling parameters (parameters.OpenAISampling); the ApiErrors
    it raises are counted as failures of this call.
    """
    server = request.app[SERVER]
    server.metrics.request_count.inc()
    data = await read(request, server.config.payload_limit)
    body = decode(data, decoder)
    report_unknown(request, data, decoder.type, OpenAISampling)
    return prepare(server, body, data, begin(request), prompts_of)


def prepare(
    server: Server,
    body: Body,
    data: bytes,
    call: Call,
    prompts_of: Callable[[Server, Body, msgspec.Struct], list[Prompt]],
) -> Understood[Body]:
    """What follows once `data` is decoded, over HTTP or gRPC. Raises ApiError."""
    try:
        prompts = prompts_of(server, body, decode(data, _sampling_decoder))
    except ApiError as error:
        server.infer.count_failure(error, call)
        raise
    server.metrics.request_count.inc(amount=len(prompts))  # TGI counts each generation within, too
    rules = Rules(
        streaming=bool(body.stream),
        keep_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
    )
    return Understood(server, body, call, prompts, rules)
