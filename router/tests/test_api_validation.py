"""Every row of the validation table over HTTP: sentence, status and `error_type`, as whole bodies and as events."""

import json
from typing import Any

import pytest
from api_kit import Api, serving
from test_validation import LIMITS, TABLE

STREAMED = [
    ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
]
FLAGS = {
    "max_input_tokens": LIMITS.max_input_tokens,
    "max_total_tokens": LIMITS.max_total_tokens,
    "max_best_of": LIMITS.max_best_of,
    "max_stop_sequences": LIMITS.max_stop_sequences,
    "max_top_n_tokens": LIMITS.max_top_n_tokens,
    "vocab": LIMITS.vocab_size,
}


def compact(sentence: str) -> bytes:
    error = {"error": f"Input validation error: {sentence}", "error_type": "validation"}
    return json.dumps(error, ensure_ascii=False, separators=(",", ":")).encode()


async def refuse(api: Api, values: dict[str, Any], sentence: str, *, stream: bool) -> None:
    """Asserts that all of TGI's own routes answer with `sentence`, to the byte."""
    parameters = dict(values)
    body = {"inputs": parameters.pop("inputs", "hello"), "parameters": parameters}
    if not stream:
        for path in ("/generate", "/", "/invocations"):
            answer = await api.post(path, body)
            assert (answer.status, answer.body) == (422, compact(sentence)), path
            assert answer.headers["content-type"] == "application/json"
        return
    for path in ("/generate_stream", "/", "/invocations"):
        answer = await api.post(path, body if path == "/generate_stream" else {**body, "stream": True})
        assert (answer.status, answer.body) == (200, b"data: %b\n\n" % compact(sentence)), path
        assert answer.headers["content-type"] == "text/event-stream"


async def test_every_row_of_the_table_is_a_422_with_its_sentence() -> None:
    async with serving(**FLAGS) as api:
        for values, sentence in TABLE:
            await refuse(api, values, sentence, stream=False)
        await api.idle()


async def test_every_row_of_the_table_is_an_event_when_streaming() -> None:
    async with serving(**FLAGS) as api:
        for values, sentence in [row for row in TABLE if "best_of" not in row[0]] + STREAMED:
            await refuse(api, values, sentence, stream=True)
        await api.idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_rows_that_openais_routes_have_too_are_told_in_openais_shape(path: str) -> None:
    async with serving(**FLAGS) as api:
        prompt = {"prompt": "a"} if "chat" not in path else {"messages": [{"role": "user", "content": ""}]}
        told = 0
        for values, sentence in TABLE:
            if len(values) != 1 or not values.keys() <= {"presence_penalty", "frequency_penalty", "min_p", "typical_p"}:
                continue
            told += 1
            (name,) = values
            answer = await api.post(path, {**prompt, **values, "max_tokens": 1})
            assert answer.status == 422
            assert answer.json == {
                "error": {
                    "message": f"Input validation error: {sentence}",
                    "type": "invalid_request_error",
                    "param": name,
                    "code": None,
                    "http_status_code": 422,
                },
                "error_type": "validation",
            }
        assert told >= 6
