"""The clients people use, unmodified: openai, huggingface_hub, and the text-generation client of TGI's own days.

text-generation 0.7 pins an old huggingface_hub, so it lives in its own virtual environment, `.venv-clients`, made on
first use; its program is `old_client.py`, run there, which prints what it saw as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import openai
import pytest
from harness import ROOT, Json, Server
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError

MESSAGES: list[Any] = [{"role": "user", "content": "What does os.path.join do?"}]
PROMPT = "import os\n\n\nclass Reader:\n"


# openai ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_openai_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tgi", messages=MESSAGES, temperature=0, max_tokens=16)
    text = answer.choices[0].message.content
    assert text
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16
    chunks = list(
        client.chat.completions.create(
            model="tgi",
            messages=MESSAGES,
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == answer.usage


def test_openai_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tgi", messages=MESSAGES, temperature=0, max_tokens=8) as stream:
        text = "".join([event.delta for event in stream if event.type == "content.delta"])
        message = stream.current_completion_snapshot.choices[0].message
    assert message.role == "assistant"
    assert message.content == text != ""


def test_openai_completions_and_their_stream_agree(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tgi", prompt=PROMPT, temperature=0, max_tokens=16)
    chunks = client.completions.create(model="tgi", prompt=PROMPT, temperature=0, max_tokens=16, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text


def test_openai_lists_the_model(client: openai.OpenAI, server: Server) -> None:
    assert [m.id for m in client.models.list()] == [server.get("/info").json["model_id"]]


async def test_openai_async(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        stream = await client.chat.completions.create(
            model="tgi", messages=MESSAGES, temperature=0, max_tokens=8, stream=True
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        answer = await client.chat.completions.create(model="tgi", messages=MESSAGES, temperature=0, max_tokens=8)
    assert text == answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_openai_raises_its_typed_errors(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as caught:
        client.chat.completions.create(model="tgi", messages=MESSAGES, top_p=7, stream=stream)
    assert "`top_p`" in caught.value.message
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.post("/nowhere", cast_to=object)


def test_openai_raises_for_a_wrong_key_and_for_overload(launch: Any) -> None:
    server = launch("--api-key", "right", "--max-concurrent-requests", "1")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model="tgi", messages=MESSAGES)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0) as client:
        long = client.completions.create(model="tgi", prompt=PROMPT, max_tokens=1500, temperature=1.5, stream=True)
        next(iter(long))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tgi", messages=MESSAGES)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        long.close()
    server.stop()


# huggingface_hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(server: Server) -> InferenceClient:
    return InferenceClient(server.url)


def test_hub_text_generation(hub: InferenceClient, server: Server) -> None:
    expected = server.generate(PROMPT, max_new_tokens=8)["generated_text"]
    assert hub.text_generation(PROMPT, max_new_tokens=8, return_full_text=False) == expected
    assert "".join(hub.text_generation(PROMPT, max_new_tokens=8, stream=True)) == expected


def test_hub_text_generation_with_details(hub: InferenceClient) -> None:
    parameters: Json = {"max_new_tokens": 6, "details": True, "top_n_tokens": 2, "return_full_text": False}
    answer: Any = hub.text_generation(PROMPT, decoder_input_details=True, **parameters)
    assert answer.details is not None
    assert answer.details.prefill[0].logprob is None
    assert len(answer.details.tokens) == answer.details.generated_tokens
    assert answer.details.top_tokens is not None
    events: Any = hub.text_generation(PROMPT, stream=True, **parameters)
    *_, last = events
    assert last.generated_text == answer.generated_text
    assert last.details is not None
    assert last.details.finish_reason == answer.details.finish_reason


def test_hub_chat_completion_and_its_stream_agree(hub: InferenceClient) -> None:
    answer = hub.chat_completion(MESSAGES, max_tokens=8, temperature=0)
    chunks = hub.chat_completion(MESSAGES, max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


def test_hub_raises_its_typed_errors(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
        list(hub.text_generation(PROMPT, temperature=0.0, stream=True))


def test_hub_raises_for_overload(launch: Any) -> None:
    server = launch("--max-concurrent-requests", "1")
    hub = InferenceClient(server.url)
    long: Any = hub.text_generation(PROMPT, max_new_tokens=1500, temperature=1.5, do_sample=True, stream=True)
    next(long)
    with pytest.raises(OverloadedError):
        list(hub.text_generation(PROMPT, stream=True))
    long.close()
    server.stop()


# text-generation 0.7 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def old_python() -> Path:
    """The interpreter that has the old client."""
    venv = ROOT / ".venv-clients"
    python = venv / "bin" / "python"
    if not list(venv.glob("lib/*/site-packages/text_generation-0.7.0.dist-info")):
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "text-generation==0.7.0"]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            pytest.skip(f"text-generation 0.7.0 cannot be installed here: {result.stderr.strip()[-300:]}")
    return python


@pytest.fixture(scope="session")
def old_client(old_python: Path, server: Server) -> Json:
    """What the old client saw."""
    command = [str(old_python), str(Path(__file__).with_name("old_client.py")), server.url, PROMPT]
    result = subprocess.run(
        command, env=harness.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    seen: Json = json.loads(result.stdout)
    return seen


def test_the_old_client_generates_with_details(old_client: Json, server: Server) -> None:
    answer = old_client["generate"]
    assert answer["generated_text"] == server.generate(PROMPT, max_new_tokens=8)["generated_text"]
    assert answer["details"]["prefill"][0]["logprob"] is None
    assert len(answer["details"]["tokens"]) == answer["details"]["generated_tokens"]


def test_the_old_client_streams(old_client: Json) -> None:
    events = old_client["stream"]
    assert events[-1]["generated_text"] == old_client["generate"]["generated_text"]
    assert [e["token"] for e in events] == old_client["generate"]["details"]["tokens"]


def test_the_old_client_reads_every_detail(old_client: Json) -> None:
    details = old_client["all"]["details"]
    assert len(details["best_of_sequences"]) == 1
    assert len(details["top_tokens"]) == len(details["tokens"])
    assert old_client["all"]["generated_text"].startswith(PROMPT)


def test_the_old_client_chats(old_client: Json) -> None:
    assert old_client["chat"]["choices"][0]["message"]["content"]
    assert old_client["chat"]["usage"]["completion_tokens"] <= 8


def test_the_old_client_raises_its_own_errors(old_client: Json) -> None:
    assert old_client["error"] == "ValidationError"
    assert old_client["async_error"] == "ValidationError"


def test_the_old_async_client_agrees(old_client: Json) -> None:
    assert old_client["async_generate"] == old_client["generate"]["generated_text"]
    assert old_client["async_stream"] == old_client["generate"]["generated_text"]
