"""The served document: complete, true to what is sent, and no less than TGI's own; and the page that shows it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, serving
from jsonschema import Draft202012Validator
from tgi_router import app
from tgi_router.openapi import document, operation_of

Json = dict[str, Any]
TGIS = Path(__file__).parents[3] / "shared" / "reference" / "tgi-openapi.json"
TABLE = app.route_table(None)
DESCRIBED = [(route, found) for route in TABLE if (found := operation_of(route.handler)) is not None]
DOCUMENT = document(TABLE, "0")
EXAMPLES = [(route.path, found.example) for route, found in DESCRIBED if found.body]
STREAMING = [(route.path, found.example) for route, found in DESCRIBED if found.events]


def tgis_document() -> Json:
    if not TGIS.is_file():
        pytest.skip("TGI's own document lies beside the repository, not in it, and is not there")
    read: Json = json.loads(TGIS.read_text())
    for schema in nested(read):  # it is OpenAPI 3.0's dialect of JSON schema
        if schema.pop("nullable", False):
            before = {name: schema.pop(name) for name in ("type", "allOf", "enum", "$ref") if name in schema}
            schema["anyOf"] = [before, {"type": "null"}]
    return read


def conforms(answer: Any, schema: Json, whole: Json = DOCUMENT) -> None:
    """Raises when `answer` is not what `schema`, a part of the document `whole`, says."""
    Draft202012Validator({**schema, "components": whole["components"]}).validate(answer)


def nested(value: Any) -> list[Json]:
    """Every object within `value`."""
    if isinstance(value, list):
        return [found for item in value for found in nested(item)]
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in nested(item))]
    return []


def test_every_reference_leads_somewhere_and_every_schema_is_one() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    referred = {one["$ref"].rpartition("/")[2] for one in nested(DOCUMENT) if isinstance(one.get("$ref"), str)}
    assert referred == set(schemas)
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_every_route_but_the_pages_is_described() -> None:
    missing = [route.path for route in TABLE if operation_of(route.handler) is None]
    assert missing == ["/openapi.json", "/api-doc/openapi.json", "/docs", "/docs/{file:.*}"]
    for route, operation in DESCRIBED:
        assert route.handler.__doc__, route.path
        assert bool(operation.body) == bool(operation.example) == (route.method == "POST"), route.path
    operations = [item for methods in DOCUMENT["paths"].values() for item in methods.values()]
    assert all(item["summary"].endswith(".") for item in operations)
    assert len({item["operationId"] for item in operations}) == len(operations)


def test_rows_of_the_parameter_table_explain_themselves() -> None:
    for name in ("GenerateParameters", "ChatRequest", "CompletionRequest"):
        assert DOCUMENT["components"]["schemas"][name]["properties"]["top_p"]["description"].startswith("Sample from")


@pytest.mark.parametrize(("path", "example"), EXAMPLES, ids=[path for path, _ in EXAMPLES])
async def test_every_example_works_and_is_answered_as_described(path: str, example: Json) -> None:
    async with serving(strict_params=True) as api:
        answer = await api.post(re.sub(r"\{\w+\}", "x", path), example)
        assert answer.status == 200, answer.body
        described = DOCUMENT["paths"][path]["post"]
        conforms(example, described["requestBody"]["content"]["application/json"]["schema"])
        if answer.headers["content-type"] == "application/json":
            conforms(answer.json, described["responses"]["200"]["content"]["application/json"]["schema"])
        await api.idle()


@pytest.mark.parametrize("path", [path for path, methods in DOCUMENT["paths"].items() if "get" in methods])
async def test_what_is_got_is_as_described(path: str) -> None:
    async with serving() as api:
        answer = await api.get(re.sub(r"\{\w+\}", "tiny", path))
        assert answer.status == 200
        content = DOCUMENT["paths"][path]["get"]["responses"]["200"].get("content")
        if content is None:
            assert answer.body == b""
        elif "application/json" in content:
            conforms(answer.json, content["application/json"]["schema"])


@pytest.mark.parametrize(("path", "example"), STREAMING, ids=[path for path, _ in STREAMING])
async def test_every_event_of_a_stream_is_as_described(path: str, example: Json) -> None:
    schema = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    async with serving() as api:
        body = example if path == "/generate_stream" else {**example, "stream": True}
        for event in (await api.post(path, body)).events:
            if event != "[DONE]":
                conforms(event, schema)


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"continuous_usage_stats": True}], ids=str)
async def test_chunks_have_the_fields_that_are_declared_and_no_others(options: Json | None) -> None:
    async with serving() as api:
        common = {"max_tokens": 3, "stream": True, "stream_options": options}
        answer = await api.post(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2, **common},
        )
        assert len(answer.events[:-1]) == 3 + bool(options and "include_usage" in options)
        for event in answer.events[:-1]:
            conforms(event, {"$ref": "#/components/schemas/ChatChunk"})
        answer = await api.post("/v1/completions", {"prompt": ["x", "y"], "logprobs": 2, **common})
        assert len(answer.events[:-1]) >= 6
        for event in answer.events[:-1]:
            conforms(event, {"$ref": "#/components/schemas/CompletionChunk"})


ERRORS = [
    ("/generate", {"inputs": ""}, 422),
    ("/generate", {}, 422),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, 422),
    ("/v1/chat/completions", {"messages": []}, 422),
    ("/invocations", {}, 422),
    ("/vertex", {"instances": []}, 422),
]


@pytest.mark.parametrize(("path", "body", "status"), ERRORS, ids=[path for path, _, _ in ERRORS])
async def test_every_error_is_as_described(path: str, body: Json, status: int) -> None:
    async with serving() as api:
        answer = await api.post(path, body)
        assert answer.status == status
        described = DOCUMENT["paths"][path]["post"]["responses"][str(status)]
        conforms(answer.json, described["content"]["application/json"]["schema"])


def test_our_document_has_all_that_tgis_has() -> None:
    tgis = tgis_document()
    for path, methods in tgis["paths"].items():
        for method, operation in methods.items():
            ours = DOCUMENT["paths"][path][method]
            missing = set(operation["responses"]) - set(ours["responses"])
            # ours are OpenAI's on /v1/*: a failed generation is no 424 there; nothing of TGI's answers 404
            assert missing <= {"404"} | ({"424"} if path.startswith("/v1/") else set()), path
    for name in ("GenerateRequest", "GenerateParameters", "CompletionRequest", "CompatGenerateRequest", "ChatRequest"):
        fields = set(DOCUMENT["components"]["schemas"][name]["properties"])
        assert set(tgis["components"]["schemas"][name]["properties"]) <= fields, name


async def test_our_answers_are_what_tgis_document_says() -> None:
    tgis = tgis_document()

    async def check(api: Api, path: str, body: Json | None, name: str, within: str | None = None) -> None:
        answer = await (api.get(path) if body is None else api.post(path, body))
        assert answer.status == 200, answer.body
        found = answer.json if within is None else answer.json[within]
        for one in found if isinstance(found, list) else [found]:
            conforms(one, {"$ref": f"#/components/schemas/{name}"}, tgis)

    parameters = {"max_new_tokens": 3, "details": True, "best_of": 2, "do_sample": True, "top_n_tokens": 2}
    async with serving() as api:
        await check(api, "/generate", {"inputs": "x", "parameters": parameters}, "GenerateResponse")
        await check(api, "/", {"inputs": "x", "parameters": parameters}, "GenerateResponse")
        await check(api, "/tokenize", {"inputs": "x y"}, "SimpleToken")
        await check(api, "/info", None, "Info")
        await check(api, "/v1/models", None, "ModelInfo", within="data")
        messages = [{"role": "user", "content": "x"}]
        await check(api, "/chat_tokenize", {"messages": messages}, "ChatTokenizeResponse")
        chat = {"messages": messages, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
        await check(api, "/v1/chat/completions", chat, "ChatCompletion")
        await check(api, "/v1/completions", {"prompt": "x", "max_tokens": 3}, "CompletionFinal")
        stream = await api.post("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 3}})
        for event in stream.events:
            conforms(event, {"$ref": "#/components/schemas/StreamResponse"}, tgis)
        stream = await api.post("/v1/chat/completions", {**chat, "stream": True})
        # the first alone: in the others we leave out the role, which OpenAI's clients would concatenate
        conforms(stream.events[0], {"$ref": "#/components/schemas/ChatCompletionChunk"}, tgis)
        error = await api.post("/generate", {"inputs": ""})
        conforms(error.json, {"$ref": "#/components/schemas/ErrorResponse"}, tgis)


async def test_the_document_is_served_at_our_place_and_at_tgis() -> None:
    async with serving() as api:
        for path, base in (("/openapi.json", "./"), ("/api-doc/openapi.json", "../")):
            answer = await api.get(path)
            assert answer.headers["content-type"] == "application/json"
            assert answer.json["servers"] == [{"url": base}]
            assert answer.json["paths"] == DOCUMENT["paths"]


async def test_the_page_is_whole_and_loads_nothing_from_elsewhere() -> None:
    async with serving() as api:
        answer = await api.get("/docs")  # the client follows the redirection
        assert answer.status == 200
        page = answer.body.decode()
        files = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert files == ["favicon-32x32.png", "swagger-ui.css", "swagger-ui-bundle.js", "start.js"]
        for name in files:
            answer = await api.get(f"/docs/{name}")
            assert (answer.status, len(answer.body) > 100) == (200, True)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        for name in ("../app.py", "%2e%2e/__init__.py", "swagger-ui.js", "nope"):
            assert (await api.get(f"/docs/{name}")).status == 404


def test_the_router_prints_the_document_as_tgis_does() -> None:
    script = Path(sys.executable).with_name("text-generation-router")
    done = subprocess.run([script, "print-schema"], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["paths"] == DOCUMENT["paths"]
    assert done.stdout.startswith('{\n  "openapi"')


async def test_the_page_can_be_opened_to_those_without_a_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    wanted = ("/docs", "/docs/", "/docs/swagger-ui.css", "/openapi.json")
    async with serving(api_key_file=str(tmp_path / "key")) as api:
        assert [(await api.get(path)).status for path in wanted] == [401] * 4
    opened = ("/docs", "/docs/", "/openapi.json", "/")
    async with serving(api_key_file=str(tmp_path / "key"), open_path=opened) as api:
        assert [(await api.get(path)).status for path in wanted] == [200] * 4
        for path in ("/info", "/docsx", "/docs/../info", "/docs/%2e%2e/info"):
            assert (await api.get(path)).status in (401, 404), path
        assert (await api.post("/docs/", {})).status == 401
