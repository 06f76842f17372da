"""`--grpc-port` of the launcher on the demo model: REST's tokens, tools, a killed shard, draining, docs/grpc.md."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import harness
import pytest
from grpc_client import SERVICE, Client, run_grpcurl
from harness import ROOT, Json, free_port, together, wait_until

DOCUMENT = (ROOT / "docs" / "grpc.md").read_text()
PROMPT = "import os\nimport sys\n\n\nclass Reader:\n"
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
        },
    },
}


class Both:
    """A server with both ports."""

    def __init__(self, *flags: str) -> None:
        self.port = free_port()
        self.http = harness.start("--grpc-port", str(self.port), *flags)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self) -> Client:
        return Client(self.target)


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    running = Both("--step-deadline", "2", "--restart-budget", "100")
    try:
        yield running
        running.http.stop()
    finally:
        running.http.destroy()


def tokens(details: Json) -> list[Any]:
    return [(token["id"], token["text"], token.get("logprob")) for token in details["tokens"]]


def ids_and_text(messages: list[Json]) -> tuple[list[int], str]:
    """A proto3 zero is left out in JSON."""
    return [message["token"].get("id", 0) for message in messages], messages[-1].get("generated_text", "")


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 30, "details": True},
        {"max_new_tokens": 30, "details": True, "do_sample": True, "temperature": 1.5, "seed": 7, "top_n_tokens": 2},
        {"max_new_tokens": 60, "details": True, "stop": ["self"]},
    ],
)
def test_the_tokens_are_rests(both: Both, parameters: Json) -> None:
    rest = both.http.generate(PROMPT, **parameters)
    with both.client() as client:
        request = {"inputs": PROMPT, "parameters": parameters}
        whole = client.whole("Generate", request)
        assert whole["generated_text"] == rest["generated_text"]
        assert whole["details"]["finish_reason"] == rest["details"]["finish_reason"]
        for (one, text, logprob), other in zip(tokens(whole["details"]), tokens(rest["details"]), strict=True):
            assert (one, text) == other[:2]
            assert logprob == pytest.approx(other[2], rel=1e-6)
        assert ids_and_text(list(client.stream("GenerateStream", request))) == (
            [token["id"] for token in rest["details"]["tokens"]],
            rest["generated_text"],
        )


def test_a_forced_tool_call_is_rests_whole_and_streamed(both: Both) -> None:
    values: Json = {"max_tokens": 60, "temperature": 0, "messages": [{"role": "user", "content": "1+2?"}]}
    choice: Json = {"type": "function", "function": {"name": "add"}}
    rest = both.http.post("/v1/chat/completions", {**values, "tools": [TOOL], "tool_choice": choice})
    assert rest.status == 200, rest.text
    expected = rest.json["choices"][0]
    function = {"name": "add", "parameters_json": json.dumps(TOOL["function"]["parameters"])}
    request = {**values, "tools": [{"type": "function", "function": function}], "tool_choice_json": json.dumps(choice)}
    with both.client() as client:
        (answer,) = client.whole("Chat", request)["choices"]
        assert answer["finish_reason"] == expected["finish_reason"]
        (call,) = answer["message"]["tool_calls"]
        assert call["function"] == expected["message"]["tool_calls"][0]["function"]
        pieces = [message["choices"][0] for message in client.stream("ChatStream", request)]
        deltas = [one for piece in pieces for one in piece.get("delta", {}).get("tool_calls", [])]
        assert "".join(one["function"].get("name", "") for one in deltas) == "add"
        assert "".join(one["function"].get("arguments", "") for one in deltas) == call["function"]["arguments"]
        assert pieces[-1]["finish_reason"] == expected["finish_reason"]


def test_a_killed_shard_changes_no_token(both: Both) -> None:
    """Streams pause and go on; health follows; what comes meanwhile is answered later."""
    cases = [
        {"max_new_tokens": 200, "repetition_penalty": 1.3},
        {"max_new_tokens": 200, "do_sample": True, "temperature": 1.5, "seed": 5},
    ]
    requests: list[Json] = [{"inputs": PROMPT, "parameters": parameters} for parameters in cases]
    with both.client() as client:
        expected = [ids_and_text(list(client.stream("GenerateStream", request))) for request in requests]
        received: list[list[Json]] = [[] for _ in requests]

        def read(number: int) -> None:
            for message in client.stream("GenerateStream", requests[number]):
                received[number].append(message)

        threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(len(messages) > 5 for messages in received), within_s=60, what="five tokens each")
        both.http.shards()[-1].signal(signal.SIGKILL)
        wait_until(lambda: both.http.health() == 503, within_s=10, what="/health says 503")
        health = client.whole("Check", {}, "grpc.health.v1.Health")
        assert health in ({"status": "NOT_SERVING"}, {"status": "SERVING"})  # it may be back by now
        late = client.whole("Generate", requests[0])
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert [ids_and_text(messages) for messages in received] == expected
        assert late["generated_text"] == expected[0][1]
        assert client.whole("Check", {}, "grpc.health.v1.Health") == {"status": "SERVING"}


def test_a_cancelled_call_and_a_deadline_free_the_memory(both: Both) -> None:
    long: Json = {"inputs": "x", "parameters": {"max_new_tokens": 1500, "min_new_tokens": 1500}}
    with both.client() as client:
        call = client.call("GenerateStream", long)
        next(call)
        call.cancel()
        wait_until(lambda: both.http.metric("tgi_batch_current_size") == 0, within_s=30, what="nothing runs")
        with pytest.raises(grpc.RpcError) as info:
            client.call("Generate", long, timeout_s=0.3)
        assert info.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        wait_until(lambda: both.http.metric("tgi_batch_current_size") == 0, within_s=30, what="nothing runs")
        client.whole("Generate", {"inputs": "x", "parameters": {"max_new_tokens": 1}})
        wait_until(lambda: both.http.metric("tgi_kv_blocks_used") == 0, within_s=30, what="no block is used")


def test_64_streams_at_once_are_each_their_own(both: Both) -> None:
    requests: list[Json] = [
        {"inputs": f"def f{i}(x):", "parameters": {"max_new_tokens": 12, "do_sample": True, "seed": i}}
        for i in range(64)
    ]
    with both.client() as client:
        streams = together(lambda request: ids_and_text(list(client.stream("GenerateStream", request))), requests)
        rest = together(lambda r: both.http.generate(r["inputs"], **r["parameters"], details=True), requests[:8])
        for (ids, text), answer in zip(streams, rest, strict=False):
            assert (ids, text) == ([t["id"] for t in answer["details"]["tokens"]], answer["generated_text"])
        assert all(1 <= len(ids) <= 12 for ids, _ in streams)


def test_a_terminated_server_answers_what_it_has_accepted() -> None:
    running = Both()
    try:
        with running.client() as client:
            request = {"inputs": PROMPT, "parameters": {"max_new_tokens": 150, "repetition_penalty": 1.3}}
            expected = ids_and_text(list(client.stream("GenerateStream", request)))
            stream = client.stream("GenerateStream", request)
            first = next(stream)
            running.http.process.send_signal(signal.SIGTERM)
            assert ids_and_text([first, *stream]) == expected
        assert running.http.wait_exit(60) == 0
        assert running.http.leftovers() == []
    finally:
        running.http.destroy()


# docs/grpc.md ---------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{number}" for number in range(len(COMMANDS))])
def test_a_grpcurl_command_of_the_document_works(both: Both, command: str) -> None:
    answers = run_grpcurl(command, both.target)
    assert answers
    if command.endswith("list"):
        assert SERVICE in answers
    if "grammar" in command:
        (answer,) = answers
        assert isinstance(answer, dict)
        assert 0 <= json.loads(answer["generated_text"])["n"] <= 9


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_program_of_the_document_works(both: Both, number: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(blocks("python")[number].replace("localhost:50051", both.target))
    result = subprocess.run(
        [sys.executable, str(program)],
        env=harness.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_document_has_examples_of_both_kinds() -> None:
    assert len(COMMANDS) > 5
    assert len(blocks("python")) == 3
