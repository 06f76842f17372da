"""Drives the text-generation 0.7 client and prints what it saw as JSON. Run by test_clients.py in its own environment.

.venv-clients/bin/python integration-tests/old_client.py URL PROMPT

Its streamed chat is left out: it wants `tool_calls` in every delta, which TGI's never had, so it failed there, too.
"""

import asyncio
import json
import sys
from typing import Any

from text_generation import AsyncClient, Client  # type: ignore[import-not-found]
from text_generation.errors import ValidationError  # type: ignore[import-not-found]
from text_generation.types import Message  # type: ignore[import-not-found]


def plain(value: Any) -> Any:
    return value.model_dump(mode="json")


def error_of(call: Any) -> str | None:
    try:
        call()
    except ValidationError as error:
        return type(error).__name__
    return None


async def use_async(url: str, prompt: str) -> dict[str, Any]:
    client = AsyncClient(url, timeout=60)
    answer = await client.generate(prompt, max_new_tokens=8)
    texts = [r.token.text async for r in client.generate_stream(prompt, max_new_tokens=8) if not r.token.special]
    error = None
    try:
        await client.generate(prompt, max_new_tokens=8, top_n_tokens=1000)
    except ValidationError as raised:
        error = type(raised).__name__
    return {"async_generate": answer.generated_text, "async_stream": "".join(texts), "async_error": error}


def main(url: str, prompt: str) -> None:
    client = Client(url, timeout=60)
    message = Message(role="user", content="What does os.path.join do?")
    seen = {
        "generate": plain(client.generate(prompt, max_new_tokens=8, decoder_input_details=True)),
        "stream": [plain(r) for r in client.generate_stream(prompt, max_new_tokens=8)],
        "all": plain(
            client.generate(
                prompt,
                do_sample=True,
                max_new_tokens=6,
                best_of=2,
                repetition_penalty=1.1,
                frequency_penalty=0.1,
                return_full_text=True,
                stop_sequences=["\n\n\n"],
                temperature=0.8,
                top_k=20,
                top_p=0.9,
                truncate=50,
                typical_p=0.95,
                watermark=True,
                decoder_input_details=True,
                top_n_tokens=2,
            )
        ),
        "chat": plain(client.chat([message], max_tokens=8, temperature=0.0)),
        "error": error_of(lambda: client.generate(prompt, max_new_tokens=8, top_n_tokens=1000)),
        **asyncio.run(use_async(url, prompt)),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
