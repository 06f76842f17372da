"""The routes of SageMaker, Vertex AI and KServe, and /chat_tokenize: TGI's shapes, sentences and statuses."""

from typing import Any

import pytest
from api_kit import CHAT_TEMPLATE, serving
from jinja2 import Template

PROMPT = "hello world"
PARAMETERS = {"max_new_tokens": 5}
MESSAGES = [{"role": "user", "content": "hello"}]
RENDERED = Template(CHAT_TEMPLATE).render(messages=MESSAGES, bos_token="<s>", add_generation_prompt=True)


async def test_sagemakers_route_answers_as_the_route_whose_body_it_gets() -> None:
    async with serving() as api:
        for path, body in [
            ("/", {"inputs": PROMPT, "parameters": PARAMETERS}),
            ("/", {"inputs": PROMPT, "parameters": PARAMETERS, "messages": MESSAGES}),
            ("/", {"inputs": PROMPT, "parameters": PARAMETERS, "stream": True}),
            ("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "temperature": 0}),
        ]:
            expected, answer = await api.post(path, body), await api.post("/invocations", body)
            assert answer.status == 200
            if path == "/":
                assert answer.body == expected.body
            else:
                assert answer.json["choices"] == expected.json["choices"]
            assert answer.headers["content-type"] == expected.headers["content-type"]
            assert answer.headers["x-compute-type"] == "gpu+optimized"
        body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "stream": True}
        expected, answer = await api.post("/v1/chat/completions", body), await api.post("/invocations", body)
        assert answer.events[-1] == "[DONE]"
        deltas = [[event["choices"] for event in one.events[:-1]] for one in (expected, answer)]
        assert deltas[0] == deltas[1]
        # what is wrong beside `inputs` does not matter when `messages` fit
        odd = {"inputs": 7, "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
        assert (await api.post("/invocations", odd)).json["object"] == "chat.completion"
        await api.idle()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, ""),
        ({"text": "x"}, ""),
        ({"inputs": 1}, ": inputs: Expected `str`, got `int`"),
        ({"inputs": "x", "parameters": {"top_k": "x"}}, ": parameters.top_k: Expected `int | null`, got `str`"),
        ({"messages": "x"}, ": messages: Expected `array`, got `str`"),
    ],
    ids=str,
)
async def test_a_body_of_no_shape_is_refused_with_tgis_sentence(body: dict[str, Any], reason: str) -> None:
    async with serving() as api:
        answer = await api.post("/invocations", body)
        prefix = "Failed to deserialize the JSON body into the target type: "
        sentence = "data did not match any variant of untagged enum SagemakerRequest"
        assert answer.status == 422
        assert answer.json == {"error": prefix + sentence + reason, "error_type": "validation"}


async def test_sagemakers_errors_have_the_shape_of_the_api_that_was_spoken() -> None:
    async with serving() as api:
        answer = await api.post("/invocations", {"inputs": PROMPT, "parameters": {"temperature": 0.0}})
        assert answer.json["error"] == "Input validation error: `temperature` must be strictly positive"
        answer = await api.post("/invocations", {"messages": [], "max_tokens": 5})
        assert answer.json["error"]["message"] == "Input validation error: `messages` cannot be empty"
        answer = await api.post("/invocations", {"prompt": PROMPT, "best": 1, "max_tokens": 1})
        assert answer.headers["x-ignored-params"] == "best"


async def test_vertex_predicts_every_instance_in_order() -> None:
    async with serving() as api:
        instances = [
            {"inputs": PROMPT, "parameters": {"max_new_tokens": 5, "seed": 7}},
            {"messages": MESSAGES, "max_tokens": 4, "temperature": 0},
            {"inputs": "x", "parameters": {"max_new_tokens": 2, "seed": 8}},
        ]
        answer = await api.post("/vertex", {"instances": instances})
        assert answer.json == {
            "predictions": [
                api.expected_text(PROMPT, 5, 7),
                api.expected_text(RENDERED, 4, special=False),
                api.expected_text("x", 2, 8),
            ]
        }
        assert answer.headers["content-type"] == "application/json"
        assert "x-compute-type" not in answer.headers
        assert api.server.metrics.request_count.get() == 1 + 3
        await api.idle()


async def test_vertex_names_what_it_ignores() -> None:
    async with serving() as api:
        instances = [
            {"inputs": PROMPT, "parameters": {"max_new_tokens": 1, "temperature": 0.5}},
            {"messages": MESSAGES, "max_tokens": 1, "n": 2, "what": 1},
        ]
        answer = await api.post("/vertex", {"instances": instances, "parameters": {}})
        assert answer.status == 200
        ignored = "parameters, instances[0].parameters.temperature, instances[1].n, instances[1].what"
        assert answer.headers["x-ignored-params"] == ignored
    async with serving(strict_params=True) as api:
        answer = await api.post("/vertex", {"instances": instances})
        assert answer.status == 422
        assert "instances[0].parameters.temperature" in answer.json["error"]


async def test_vertexs_failures_are_tgis() -> None:
    async with serving(max_concurrent_requests=2) as api:
        answer = await api.post("/vertex", {"instances": []})
        assert answer.status == 422
        assert answer.body == b'{"error":"Input validation error","error_type":"Input validation error"}'
        wrong = [{"inputs": "x"}, {"inputs": "x", "parameters": {"max_new_tokens": 0}}]
        for instances in (wrong, [{"inputs": "x"}] * 3):
            answer = await api.post("/vertex", {"instances": instances})
            assert answer.status == 500
            assert answer.body == b'{"error":"Incomplete generation","error_type":"Incomplete generation"}'
            await api.idle()
        for instance in ({}, {"inputs": 1}, {"messages": 1}, 5, "x"):
            answer = await api.post("/vertex", {"instances": [{"inputs": "x"}, instance]})
            assert answer.status == 422
            assert (
                "instances[1]: data did not match any variant of untagged enum VertexInstance" in answer.json["error"]
            )


async def test_vertex_ai_says_where_it_predicts_and_looks_for_health() -> None:
    path = "/v1/endpoints/1/deployedModels/2:predict"
    async with serving(aip_predict_route=path, aip_health_route="/v1/endpoints/1/deployedModels/2") as api:
        answer = await api.post(
            path, {"instances": [{"inputs": PROMPT, "parameters": {"max_new_tokens": 5, "seed": 1}}]}
        )
        assert answer.json == {"predictions": [api.expected_text(PROMPT, 5, 1)]}
        answer = await api.post(path, {"instances": []})
        assert answer.json == {"error": "Input validation error", "error_type": "Input validation error"}
        answer = await api.get("/v1/endpoints/1/deployedModels/2")
        assert (answer.status, answer.body) == (200, b"")
    async with serving(aip_predict_route="/generate", aip_health_route="/health") as api:  # there already
        answer = await api.post("/generate", {"inputs": PROMPT, "parameters": PARAMETERS})
        assert answer.json == {"generated_text": api.expected_text(PROMPT, 5)}


async def test_kserve_says_what_is_served_and_whether_it_can() -> None:
    async with serving() as api:
        version = api.server.version
        answer = await api.get("/v2")
        assert answer.json == {
            "name": "text-generation-inference",
            "version": version,
            "extensions": ["health", "models", "metrics"],
        }
        for path in ("/v2/models/m/versions/3", "/v2/models/m"):
            answer = await api.get(path)
            number = "3" if "versions" in path else "1"
            assert answer.json == {"name": "m", "version": number, "extensions": ["infer", "ready"]}
        ready = ("/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/versions/1/ready")
        for path in ("/v2/health/live", *ready):
            answer = await api.get(path)
            assert (answer.status, answer.body) == (200, b'{"live":true}')
        api.server.draining = True
        assert (await api.get("/v2/health/live")).status == 200
        for path in ready:
            answer = await api.get(path)
            assert (answer.status, answer.json) == (503, {"error": "unhealthy", "error_type": "healthcheck"})


def kserve_request(*data: list[Any], outputs: int | None = None, **parameters: Any) -> dict[str, Any]:
    return {
        "id": "42",
        "inputs": [
            {"name": f"in{i}", "shape": [1, len(one)], "datatype": "BYTES", "data": one} for i, one in enumerate(data)
        ],
        "outputs": [{"name": f"out{i}"} for i in range(len(data) if outputs is None else outputs)],
        "parameters": parameters,
    }


async def test_kserve_infers_from_bytes_and_from_texts() -> None:
    async with serving() as api:
        text = api.expected_text(PROMPT, 5)
        body = kserve_request(list(PROMPT.encode()), [PROMPT], max_new_tokens=5)
        for path in ("/v2/models/m/versions/1/infer", "/v2/models/m/infer"):
            answer = await api.post(path, body)
            data = list(text.encode())
            assert list(answer.json) == ["id", "outputs"]
            assert answer.json == {
                "id": "42",
                "outputs": [
                    {"name": "out0", "shape": [1, len(data)], "datatype": "BYTES", "data": data},
                    {"name": "out1", "shape": [1], "datatype": "BYTES", "data": [text]},
                ],
            }
        assert api.server.metrics.request_count.get() == 4
        bare = {name: value for name, value in body.items() if name not in ("id", "outputs")}
        answer = await api.post("/v2/models/m/infer", bare)
        assert list(answer.json) == ["outputs"]
        assert [output["name"] for output in answer.json["outputs"]] == ["in0", "in1"]
        await api.idle()


@pytest.mark.parametrize(
    ("body", "status", "error", "error_type"),
    [
        (kserve_request([104], outputs=2), 422, "Inputs and outputs length mismatch", "length mismatch"),
        (kserve_request([255]), 422, "`inputs[0].data` is not UTF-8: invalid start byte at byte 0", "utf8"),
        (kserve_request([104], max_new_tokens=0), 500, "Incomplete generation", "Incomplete generation"),
        (kserve_request([]), 500, "Incomplete generation", "Incomplete generation"),
    ],
    ids=["length", "utf8", "validation", "empty"],
)
async def test_kserves_failures_are_tgis(body: Any, status: int, error: str, error_type: str) -> None:
    async with serving() as api:
        answer = await api.post("/v2/models/m/versions/1/infer", body)
        assert (answer.status, answer.json) == (status, {"error": error, "error_type": error_type})
        mixed = await api.post("/v2/models/m/versions/1/infer", kserve_request(["a", "b"]))
        assert mixed.status == 422
        assert "inputs[0].data: " in mixed.json["error"]
        await api.idle()


async def test_a_list_that_could_never_run_costs_nothing() -> None:
    async with serving(max_concurrent_requests=3) as api:
        for path, body in [
            ("/vertex", {"instances": [{}] * 4}),
            ("/v2/models/m/infer", kserve_request(*[[255]] * 4)),
        ]:
            answer = await api.post(path, body)
            assert (answer.status, answer.json["error"]) == (500, "Incomplete generation")
        assert api.server.metrics.request_failure.get("overloaded") == 2
        await api.idle()


async def test_a_chat_is_tokenized_as_the_template_renders_it() -> None:
    async with serving() as api:
        answer = await api.post("/chat_tokenize", {"messages": MESSAGES})
        assert list(answer.json) == ["tokenize_response", "templated_text"]
        assert answer.json["templated_text"] == RENDERED
        tokens = answer.json["tokenize_response"]
        assert [token["id"] for token in tokens] == api.encode(RENDERED, special=False)
        assert [list(token) for token in tokens] == [["id", "text", "start", "stop"]] * len(tokens)
        raw = RENDERED.encode()
        assert all(raw[t["start"] : t["stop"]].decode(errors="replace") == t["text"] for t in tokens[1:])
        assert "x-compute-type" not in answer.headers
        assert api.server.metrics.request_count.get() == 1
        answer = await api.post("/chat_tokenize", {"messages": []})
        assert (answer.status, answer.json["error_type"]) == (422, "validation")
    async with serving(model={"chat_template": None}) as api:
        answer = await api.post("/chat_tokenize", {"messages": MESSAGES})
        assert (answer.status, answer.json["error_type"]) == (422, "template_error")
        assert answer.json["error"] == "Template error: template not found"
