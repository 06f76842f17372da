"""SageMaker, Vertex AI and KServe as their platforms call us, on the demo model; and strictness."""

from collections.abc import Callable

from harness import Json, Server

PROMPT = "def fibonacci(n):"
GREEDY: Json = {"max_new_tokens": 8}


def test_every_platforms_route_gives_what_the_model_says(server: Server) -> None:
    expected = server.post("/generate", {"inputs": PROMPT, "parameters": GREEDY}).json["generated_text"]
    sagemaker = server.post("/invocations", {"inputs": PROMPT, "parameters": GREEDY})
    assert sagemaker.json == [{"generated_text": PROMPT + expected}]
    completion = server.post("/invocations", {"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    assert completion.json["choices"][0]["text"] == expected
    given = {"name": "in", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}
    kserve = server.post("/v2/models/demo/infer", {"id": "7", "inputs": [given], "parameters": GREEDY})
    assert kserve.json["outputs"] == [{"name": "in", "shape": [1], "datatype": "BYTES", "data": [expected]}]
    instance = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "seed": 3}}
    twice = [server.post("/vertex", {"instances": [instance, instance]}) for _ in range(2)]
    assert twice[0].json == twice[1].json
    assert len(set(twice[0].json["predictions"])) == 1
    chat = {"messages": [{"role": "user", "content": "What does os.path.join do?"}]}
    text = server.post("/chat_tokenize", chat).json["templated_text"]
    raw = server.post("/generate", {"inputs": text, "parameters": GREEDY}).json["generated_text"]
    answer = server.post("/v1/chat/completions", {**chat, "max_tokens": 8, "temperature": 0})
    assert answer.json["choices"][0]["message"]["content"] == raw


def test_vertex_ais_variables_and_strictness_reach_the_router(launch: Callable[..., Server]) -> None:
    predict, health = "/v1/endpoints/1/deployedModels/2:predict", "/v1/endpoints/1/deployedModels/2"
    environment = {"AIP_PREDICT_ROUTE": predict, "AIP_HEALTH_ROUTE": health, "STRICT_PARAMS": "true", "API_KEY": "k"}
    server = launch(env=environment)
    assert (server.get(health).status, server.get(health).body) == (200, b"")
    assert server.post(predict, {"instances": [{"inputs": PROMPT}]}).status == 401
    key = {"authorization": "Bearer k", "content-type": "application/json"}
    instance = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}
    answer = server.request("POST", predict, {"instances": [instance]}, headers=key)
    assert (answer.status, len(answer.json["predictions"])) == (200, 1)
    instance["parameters"]["temperature"] = 0.5
    answer = server.request("POST", predict, {"instances": [instance]}, headers=key)
    assert answer.status == 422
    assert "instances[0].parameters.temperature" in answer.json["error"]
    answer = server.request("POST", "/v1/completions", {"prompt": PROMPT, "max_token": 1}, headers=key)
    assert (answer.status, answer.json["error"]["param"]) == (400, "max_token")
