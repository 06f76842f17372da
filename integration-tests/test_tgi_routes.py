"""TGI's own routes, to the byte: key order, nulls, compact JSON, headers, errors and server-sent events.

Where TGI's sentence would be wrong here it differs: `top_p` of 1.0 is accepted, so the sentence says `<= 1.0`.
"""

import json
import re

import numpy as np
import pytest
from harness import Json, Server, Stream

PROMPT = "import os\nimport sys\n\ndef main("
COUNTED_HEADERS = (
    "x-compute-time",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
)

# The documented bytes with every value replaced by a pattern.
STRING = rb'"(?:[^"\\]|\\.)*"'
NUMBER = rb"-?\d+(?:\.\d+)?(?:e-?\d+)?"
TOKEN = rb'\{"id":\d+,"text":' + STRING + rb',"logprob":' + NUMBER + rb',"special":(?:true|false)\}'
FIRST_PREFILL = rb'\{"id":\d+,"text":' + STRING + rb',"logprob":null\}'
PREFILL = rb'\{"id":\d+,"text":' + STRING + rb',"logprob":' + NUMBER + rb"\}"
FINISH = rb'"finish_reason":"(?:length|eos_token|stop_sequence)"'


def listed(item: bytes) -> bytes:
    return rb"\[" + item + rb"(?:," + item + rb")*\]"


def generate_bytes(seed: bytes = rb"null", prefill: bytes = rb"\[\]", extra: bytes = b"") -> bytes:
    details = FINISH + rb',"generated_tokens":\d+,"seed":' + seed + rb',"prefill":' + prefill
    details += rb',"tokens":' + listed(TOKEN) + extra
    return rb'\{"generated_text":' + STRING + rb',"details":\{' + details + rb"\}\}"


# /generate ------------------------------------------------------------------------------------------------------------


def test_generate_without_details_is_the_text_alone(server: Server) -> None:
    response = server.post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}})
    assert response.status == 200
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(rb'\{"generated_text":' + STRING + rb"\}", response.body)


def test_generate_with_details_has_tgis_bytes(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "details": True}}
    assert re.fullmatch(generate_bytes(), server.post("/generate", body).body)


def test_the_seed_is_null_when_greedy_and_told_when_sampled(server: Server) -> None:
    sampled = {"max_new_tokens": 2, "details": True, "do_sample": True}
    chosen = server.post("/generate", {"inputs": PROMPT, "parameters": {**sampled, "seed": 2**64 - 1}})
    assert re.fullmatch(generate_bytes(seed=b"18446744073709551615"), chosen.body)
    assert isinstance(server.generate(PROMPT, **sampled)["details"]["seed"], int)
    assert server.generate(PROMPT, max_new_tokens=2, details=True, seed=7)["details"]["seed"] is None


def test_prefill_starts_with_a_null_logprob(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2, "decoder_input_details": True}}
    prefill = rb"\[" + FIRST_PREFILL + rb"(?:," + PREFILL + rb")+\]"
    response = server.post("/generate", body)
    assert re.fullmatch(generate_bytes(prefill=prefill), response.body)
    told = response.json["details"]["prefill"]
    tokens = server.post("/tokenize", {"inputs": PROMPT}).json
    assert [t["id"] for t in told] == [t["id"] for t in tokens]
    assert "".join(t["text"] for t in told) == PROMPT


def test_top_tokens_come_last_and_by_falling_logprob(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3, "details": True, "top_n_tokens": 4}}
    response = server.post("/generate", body)
    assert re.fullmatch(generate_bytes(extra=rb',"top_tokens":' + listed(listed(TOKEN))), response.body)
    details = response.json["details"]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) >= 4
        assert top[0] == token  # greedy chose the most likely one
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)


def test_best_of_tells_the_other_sequences(server: Server) -> None:
    parameters = {"max_new_tokens": 4, "best_of": 2, "do_sample": True, "details": True}
    sequence = rb'\{"generated_text":' + STRING + rb"," + FINISH + rb',"generated_tokens":\d+,"seed":\d+,"prefill":\[\]'
    sequence += rb',"tokens":' + listed(TOKEN) + rb"\}"
    response = server.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    pattern = generate_bytes(seed=rb"\d+", extra=rb',"best_of_sequences":' + listed(sequence))
    assert re.fullmatch(pattern, response.body)
    details = response.json["details"]
    (other,) = details["best_of_sequences"]
    assert details["seed"] != other["seed"]
    assert mean_logprob(details) >= mean_logprob(other)


def mean_logprob(sequence: Json) -> float:
    return float(np.mean([t["logprob"] for t in sequence["tokens"]]))


def test_logprobs_are_the_shortest_float32(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "details": True, "top_n_tokens": 5}}
    texts = re.findall(r'"logprob":(-?\d+\.\d+)\b(?!e)', server.post("/generate", body).text)
    assert len(texts) > 12
    for text in texts:
        assert text == np.format_float_positional(np.float32(text), unique=True, trim="0")


def test_headers_tell_what_the_request_cost(server: Server) -> None:
    headers = server.post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}).headers
    assert headers["x-compute-type"]
    assert headers["x-compute-characters"] == str(len(PROMPT))
    assert headers["x-prompt-tokens"] == str(len(server.post("/tokenize", {"inputs": PROMPT}).json))
    assert 1 <= int(headers["x-generated-tokens"]) <= 4
    assert float(headers["x-compute-time"]) > 0
    for name in COUNTED_HEADERS[1:]:
        assert headers[name].isdigit(), name
    assert headers["access-control-allow-origin"] == "*"


# /generate_stream -----------------------------------------------------------------------------------------------------


def test_a_stream_has_tgis_bytes_and_no_done(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3, "details": True}}
    response = server.post("/generate_stream", body)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-compute-characters"] == str(len(PROMPT))
    event = rb'data: \{"index":%d,"token":' + TOKEN + rb',"generated_text":null,"details":null\}\n\n'
    last = rb'data: \{"index":\d,"token":' + TOKEN + rb',"generated_text":' + STRING + rb',"details":\{' + FINISH
    last += rb',"generated_tokens":\d,"seed":null,"input_length":\d+\}\}\n\n'
    assert re.fullmatch(
        event.replace(b"%d", b"1") + rb"(?:" + event.replace(b"%d", rb"\d") + rb")*" + last, response.body
    )


def test_stream_details_are_null_unless_asked_for(server: Server) -> None:
    events = server.generate_stream(PROMPT, max_new_tokens=2)
    assert events[-1]["generated_text"] is not None
    assert events[-1]["details"] is None
    assert [e["index"] for e in events] == list(range(1, len(events) + 1))


def test_stream_top_tokens_stand_between_token_and_text(server: Server) -> None:
    events = server.generate_stream(PROMPT, max_new_tokens=2, top_n_tokens=2)
    assert list(events[0]) == ["index", "token", "top_tokens", "generated_text", "details"]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ],
)
def test_stream_errors_are_events_after_status_200(server: Server, parameters: Json, sentence: str) -> None:
    with server.stream("/generate_stream", {"inputs": PROMPT, "parameters": parameters}) as stream:
        assert stream.status == 200
        (data,) = stream
    error = {"error": f"Input validation error: {sentence}", "error_type": "validation"}
    assert data == json.dumps(error, separators=(",", ":")).encode()


# / --------------------------------------------------------------------------------------------------------------------


def test_the_compatible_route_answers_a_list_with_the_full_text(server: Server) -> None:
    response = server.post("/", {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}})
    (answer,) = response.json
    assert answer["generated_text"] == PROMPT + server.generate(PROMPT, max_new_tokens=3)["generated_text"]
    assert response.body.startswith(b'[{"generated_text":"')


def test_the_compatible_route_streams_when_told(server: Server) -> None:
    with Stream(server.port, "/", {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}, "stream": True}) as stream:
        assert stream.headers["content-type"] == "text/event-stream"
        events = list(stream.events())
    assert [e["token"] for e in events] == [e["token"] for e in server.generate_stream(PROMPT, max_new_tokens=3)]


# The other routes -----------------------------------------------------------------------------------------------------


def test_tokenize_tells_ids_texts_and_offsets(server: Server) -> None:
    inputs = "déjà = 1"
    response = server.post("/tokenize", {"inputs": inputs})
    assert re.fullmatch(listed(rb'\{"id":\d+,"text":' + STRING + rb',"start":\d+,"stop":\d+\}'), response.body)
    for token in response.json:
        assert token["text"] == inputs.encode()[token["start"] : token["stop"]].decode()
    assert response.json[-1]["stop"] == len(inputs.encode())


def test_info_has_tgis_fields_in_order(server: Server) -> None:
    assert list(server.get("/info").json) == [
        "model_id",
        "model_sha",
        "model_pipeline_tag",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "max_input_tokens",
        "max_total_tokens",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
    ]


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
def test_health_is_an_empty_200(server: Server, path: str) -> None:
    response = server.get(path)
    assert (response.status, response.body) == (200, b"")


def test_metrics_are_prometheus_text_and_count(server: Server) -> None:
    before = server.metric("tgi_request_success")
    server.generate(PROMPT, max_new_tokens=2)
    assert server.metric("tgi_request_success") == before + 1
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for name in ("tgi_request_count", "tgi_queue_size", "tgi_batch_current_size", "tgi_request_duration_bucket"):
        assert re.search(rf"^{name}[ {{]", response.text, re.MULTILINE), name


# Errors ---------------------------------------------------------------------------------------------------------------


REFUSALS = (
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": -1.0}, "`typical_p` must be > 0.0 and <= 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"seed": 1, "best_of": 2, "do_sample": True}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
)


@pytest.mark.parametrize(
    ("parameters", "sentence"), REFUSALS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_a_wrong_parameter_is_a_422_in_tgis_words(server: Server, parameters: Json, sentence: str) -> None:
    response = server.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert response.status == 422
    assert list(response.json) == ["error", "error_type"]
    assert response.json["error_type"] == "validation"
    assert response.json["error"].startswith(f"Input validation error: {sentence}")


def test_an_empty_prompt_is_refused(server: Server) -> None:
    response = server.post("/generate", {"inputs": ""})
    assert response.status == 422
    assert response.json["error"].startswith("Input validation error: `inputs` cannot be empty")


def test_a_prompt_that_is_too_long_is_refused_with_the_limit_and_its_flag(server: Server) -> None:
    limit = server.get("/info").json["max_total_tokens"]
    response = server.post("/generate", {"inputs": "word " * (2 * limit), "parameters": {"max_new_tokens": 1}})
    assert response.status == 422
    assert f"`inputs` tokens + `max_new_tokens` must be <= {limit}. Given: " in response.json["error"]
    assert "--max-total-tokens" in response.json["error"]


@pytest.mark.parametrize("value", [1.0, None])
def test_top_p_and_typical_p_of_one_are_off(server: Server, value: float | None) -> None:
    plain = server.generate(PROMPT, max_new_tokens=5, do_sample=True, seed=3)
    assert server.generate(PROMPT, max_new_tokens=5, do_sample=True, seed=3, top_p=value, typical_p=value) == plain


@pytest.mark.parametrize(
    ("body", "headers", "status", "start"),
    [
        (b"{", {}, 400, "Failed to parse the request body as JSON: "),
        (b'{"inputs": 1}', {}, 422, "Failed to deserialize the JSON body into the target type: "),
        (b'{"parameters": {}}', {}, 422, "Failed to deserialize the JSON body into the target type: "),
        (b'{"inputs": "a", "parameters": {"max_new_tokens": -1}}', {}, 422, "Failed to deserialize the JSON body"),
        (b'{"inputs": "a", "parameters": {"max_new_tokens": "20"}}', {}, 422, "Failed to deserialize the JSON body"),
        (
            b'{"inputs": "a"}',
            {"content-type": "text/plain"},
            415,
            "Expected request with `Content-Type: application/json`",
        ),
        (
            b'{"inputs": "' + b"a" * 2_000_000 + b'"}',
            {},
            413,
            "Failed to buffer the request body: length limit exceeded",
        ),
    ],
    ids=["not JSON", "inputs not a string", "no inputs", "negative", "number as text", "content type", "too large"],
)
def test_a_wrong_body_is_a_json_error(
    server: Server, body: bytes, headers: dict[str, str], status: int, start: str
) -> None:
    response = server.request("POST", "/generate", body, headers)
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    assert response.json["error"].startswith(start)


def test_what_is_not_built_yet_is_refused_by_name(server: Server) -> None:
    response = server.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "nobody"}})
    assert response.status == 422
    assert "`adapter_id`" in response.json["error"]


def test_unknown_paths_and_methods(server: Server) -> None:
    assert server.get("/nowhere").status == 404
    response = server.get("/generate")
    assert response.status == 405
    assert "POST" in response.headers["allow"]
    assert server.request("HEAD", "/health").status == 200
    preflight = server.request(
        "OPTIONS", "/generate", headers={"origin": "http://a", "access-control-request-method": "POST"}
    )
    assert preflight.status == 200
    assert "POST" in preflight.headers["access-control-allow-methods"]
