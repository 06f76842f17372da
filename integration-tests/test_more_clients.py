"""More of what people point at TGI, unmodified: langchain-huggingface, litellm, and guidellm, which loads a server.

Their packages are many and disagree with ours, so they live in `.venv-more-clients`, which `make test-clients` makes.
The programs of the first two are in more_clients.py, run there, which prints what it saw as JSON.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import MODEL_DIR, ROOT, Json, Server

pytestmark = pytest.mark.slow  # the imports of these clients alone take many seconds

VENV = ROOT / ".venv-more-clients"
PROMPT = "import os\n\n\nclass Reader:\n"
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
NOWHERE = "http://127.0.0.1:9"


def run(*command: str) -> str:
    """stdout of a program of the clients' environment, which must succeed and cannot reach the Hub."""
    if not (VENV / ".done").exists():
        pytest.skip("`make test-clients` installs these clients")
    environment = harness.environment(HF_ENDPOINT=NOWHERE, LITELLM_LOCAL_MODEL_COST_MAP="True")
    path = [str(VENV / "bin" / command[0]), *command[1:]]
    result = subprocess.run(path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    return result.stdout


def seen_by(client: str, server: Server) -> Json:
    program = str(Path(__file__).with_name("more_clients.py"))
    last_line = run("python", program, client, server.url, PROMPT).strip().splitlines()[-1]  # litellm prints hints
    seen: Json = json.loads(last_line)
    return seen


def chat(server: Server) -> Json:
    body = {"model": "tgi", "messages": QUESTION, "temperature": 0, "max_tokens": 60}
    answer: Json = server.post("/v1/chat/completions", body).json
    return answer


# langchain-huggingface ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def langchain(server: Server) -> Json:
    return seen_by("langchain", server)


def test_langchain_generates_streams_and_stops(langchain: Json, server: Server) -> None:
    expected = server.generate(PROMPT, max_new_tokens=12)["generated_text"]
    assert langchain["text"] == langchain["async"] == "".join(langchain["stream"]) == expected
    assert len(langchain["stream"]) > 1
    assert langchain["stopped"] == expected[: expected.index(langchain["stop"])]


def test_langchain_samples_with_its_own_defaults(langchain: Json) -> None:
    assert langchain["sampled"] == langchain["sampled_stream"] != ""


def test_langchain_chats_and_calls_tools(langchain: Json, server: Server) -> None:
    answer = chat(server)
    assert langchain["chat"] == "".join(langchain["chat_stream"]) == answer["choices"][0]["message"]["content"]
    assert langchain["usage"]["input_tokens"] == answer["usage"]["prompt_tokens"]
    assert [call["name"] for call in langchain["tool_calls"]] == ["get_weather"]
    assert list(langchain["tool_calls"][0]["args"]) == ["city"]


def test_langchain_shows_why_a_request_was_refused(langchain: Json) -> None:
    assert "`top_p` must be" in langchain["error"][1]


# litellm --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm(server: Server) -> Json:
    return seen_by("litellm", server)


@pytest.mark.parametrize("provider", ["openai/tgi", "huggingface/tgi"])
def test_litellm_chats_streams_and_calls_tools(litellm: Json, provider: str, server: Server) -> None:
    seen, answer = litellm[provider], chat(server)
    assert seen["content"] == "".join(seen["stream"]) == answer["choices"][0]["message"]["content"]
    assert seen["stream_finish_reason"] == answer["choices"][0]["finish_reason"]
    assert seen["usage"] == {k: answer["usage"][k] for k in ("prompt_tokens", "completion_tokens")}
    [(name, arguments)] = seen["tool_calls"]
    assert (name, list(arguments)) == ("get_weather", ["city"])
    assert seen["streamed_tool_calls"] == seen["tool_calls"]


@pytest.mark.parametrize(("provider", "error"), [("openai/tgi", "BadRequestError"), ("huggingface/tgi", "APIError")])
def test_litellm_raises_its_typed_errors(litellm: Json, provider: str, error: str) -> None:
    kind, message = litellm[provider]["error"]
    assert kind == error
    assert "`top_p` must be" in message


def test_litellm_completes_text(litellm: Json, server: Server) -> None:
    assert litellm["text"] == server.generate(PROMPT, max_new_tokens=8)["generated_text"]


# guidellm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_loads_the_server_and_finds_no_error(server: Server, tmp_path: Path, path: str) -> None:
    report = tmp_path / "report.json"
    run(
        *("guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={server.url},request_format={path}"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", "kind=max_requests,count=12", "--constraint", "kind=max_duration,seconds=60"),
        *("--tokenizer", f"kind=hf_auto,model={MODEL_DIR}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", "--output", f"kind=json,path={report}"),
    )
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {"successful": 12, "errored": 0, "incomplete": 0, "total": 12}
    # It asks for `ignore_eos`, counts by the `usage` of the stream, and times the first token.
    for request in benchmark["requests"]["successful"]:
        assert request["output_tokens"] == 16
        assert request["prompt_tokens"] >= 32
        assert 0 < request["time_to_first_token_ms"] < 1000 * request["request_latency"]
