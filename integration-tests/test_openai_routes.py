"""OpenAI's routes as OpenAI's clients expect them: objects, deltas, finish reasons, usage and errors."""

import json
from typing import Any

import pytest
from harness import Json, Server

PROMPT = "import os\n\ndef read("
MESSAGES = [{"role": "user", "content": "What does os.path.join do?"}]


def chat(server: Server, **fields: Any) -> Json:
    response = server.post("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, **fields})
    assert response.status == 200, response.text
    answer: Json = response.json
    return answer


def complete(server: Server, **fields: Any) -> Json:
    response = server.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, **fields})
    assert response.status == 200, response.text
    answer: Json = response.json
    return answer


def streamed(server: Server, path: str, **fields: Any) -> list[Json]:
    """The parsed events of a stream that must end with `[DONE]`."""
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
    body = {**prompt, "temperature": 0, "max_tokens": 12, "stream": True, **fields}
    with server.stream(path, body) as stream:
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream"
        *events, done = stream
    assert done == b"[DONE]"
    return [json.loads(event) for event in events]


def test_chat_answers_one_complete_object(server: Server) -> None:
    answer = chat(server)
    assert list(answer)[:5] == ["object", "id", "created", "model", "system_fingerprint"]
    assert answer["object"] == "chat.completion"
    assert answer["id"]
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["logprobs"] is None
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 12
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


def test_the_chat_stream_adds_up_to_the_answer(server: Server) -> None:
    events = streamed(server, "/v1/chat/completions")
    answer = chat(server)
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    assert len({e["created"] for e in events}) == 1
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(d.get("content") or "" for d in deltas) == answer["choices"][0]["message"]["content"]
    reasons = [e["choices"][0]["finish_reason"] for e in events]
    assert reasons == [None] * (len(events) - 1) + [answer["choices"][0]["finish_reason"]]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_is_one_more_event_before_done_when_asked_for(server: Server, path: str) -> None:
    *events, last = streamed(server, path, stream_options={"include_usage": True})
    assert last["choices"] == []
    whole = chat(server) if "chat" in path else complete(server)
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert all(e.get("usage") is None for e in events)


def test_completions_answer_one_complete_object(server: Server) -> None:
    answer = complete(server)
    assert list(answer)[:5] == ["object", "id", "created", "model", "system_fingerprint"]
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["text"] == server.generate(PROMPT, max_new_tokens=12)["generated_text"]
    assert choice["finish_reason"] in ("stop", "length")


def test_the_completions_stream_adds_up_to_the_answer(server: Server) -> None:
    events = streamed(server, "/v1/completions")
    answer = complete(server)
    assert {e["object"] for e in events} == {"text_completion"}
    assert "".join(e["choices"][0]["text"] for e in events) == answer["choices"][0]["text"]
    reasons = [e["choices"][0]["finish_reason"] for e in events]
    assert reasons == [None] * (len(events) - 1) + [answer["choices"][0]["finish_reason"]]


def test_several_prompts_are_answered_in_order(server: Server) -> None:
    prompts = ["import os", "def main(", "class Node:"]
    answer = complete(server, prompt=prompts, max_tokens=5)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        assert choice["text"] == complete(server, prompt=prompt, max_tokens=5)["choices"][0]["text"]
    texts = {0: "", 1: "", 2: ""}
    for event in streamed(server, "/v1/completions", prompt=prompts, max_tokens=5):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [c["text"] for c in answer["choices"]]


def test_a_stop_string_is_removed_and_finishes_with_stop(server: Server) -> None:
    whole = complete(server, max_tokens=30)["choices"][0]["text"]
    stop = whole[4:7]
    expected = whole[: whole.index(stop)]
    for value in (stop, [stop]):
        choice = complete(server, max_tokens=30, stop=value)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    events = streamed(server, "/v1/completions", max_tokens=30, stop=stop)
    assert "".join(e["choices"][0]["text"] for e in events) == expected


def test_chat_logprobs_have_openais_shape(server: Server) -> None:
    choice = chat(server, logprobs=True, top_logprobs=2, max_tokens=3)["choices"][0]
    content = choice["logprobs"]["content"]
    assert 1 <= len(content) <= 3
    for token in content:
        assert token["logprob"] <= 0
        assert token["top_logprobs"][0]["token"] == token["token"]


def test_the_model_list_names_the_model(server: Server) -> None:
    answer = server.get("/v1/models").json
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert model["object"] == "model"
    assert model["id"] == server.get("/info").json["model_id"] == chat(server)["model"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_has_openais_object_and_tgis_type(server: Server, path: str, stream: bool) -> None:
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
    response = server.post(path, {**prompt, "top_p": 7, "stream": stream})
    assert response.status in (400, 422)
    body = response.json
    assert {"message", "type", "param", "code"} <= set(body["error"])
    assert body["error"]["type"] == "invalid_request_error"
    assert "`top_p`" in body["error"]["message"]
    assert body["error_type"] == "validation"


def test_null_means_absent(server: Server) -> None:
    nulls = dict.fromkeys(("stop", "seed", "n", "top_p", "logit_bias", "stream_options", "logprobs", "tools", "user"))
    assert chat(server, **nulls)["choices"] == chat(server)["choices"]


def test_an_assistant_message_at_the_end_is_continued(server: Server) -> None:
    start = chat(server, max_tokens=4)["choices"][0]["message"]["content"]
    whole = chat(server, max_tokens=8)["choices"][0]["message"]["content"]
    more = chat(server, messages=[*MESSAGES, {"role": "assistant", "content": start}], max_tokens=4)
    assert start + more["choices"][0]["message"]["content"] == whole
