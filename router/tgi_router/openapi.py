"""The OpenAPI 3.1 document, made from what is there: routes, their docstrings, the structs and the tree of errors.

Owns nothing but the words between them. A route adds `@describe(...)` with the structs it reads and writes; the rest,
down to every field's type, range, default and help, is derived. Served by routes/docs.py; docs/generate.py makes the
reference page from it.
"""

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints

import msgspec
from aiohttp import web

from . import errors
from .errors import ApiError
from .parameters import ROWS, OpenAISampling
from .schemas import tgi
from .schemas.errors import OpenAIErrorResponse
from .server import OPEN_PATHS

Json = dict[str, Any]
H = TypeVar("H", bound=Callable[..., Any])

Speaks = Literal["tgi", "openai", "both"]

_REF = "#/components/schemas/{name}"
_BODY_ERRORS: tuple[type[ApiError], ...] = (
    errors.MalformedBody,
    errors.WrongShape,
    errors.UnknownFields,
    errors.UnsupportedMediaType,
    errors.PayloadTooLarge,
    errors.RequestTimeout,
    errors.ValidationError,
    errors.ShuttingDown,
    errors.InternalError,
)


@dataclass(frozen=True, slots=True)
class Operation:
    """What a handler says about itself; see `describe`."""

    tag: str
    body: tuple[tuple[type, ...], ...] = ()
    parts: tuple[type, ...] = ()
    answer: tuple[Any, ...] = ()
    media_type: str = "application/json"
    events: tuple[Any, ...] = ()
    generates: bool = False
    fails: tuple[type[ApiError], ...] = ()
    speaks: Speaks | None = None
    example: Any = None


def describe(
    tag: str,
    *,
    body: Sequence[type | tuple[type, ...]] = (),
    parts: Sequence[type] = (),
    answer: Sequence[Any] = (),
    media_type: str = "application/json",
    events: Sequence[Any] = (),
    generates: bool = False,
    fails: Sequence[type[ApiError]] = (),
    speaks: Speaks | None = None,
    example: Any = None,
) -> Callable[[H], H]:
    """Decorates a handler with what its docstring does not say.

    body: what its JSON body may be: structs, or tuples of structs whose fields it has all. parts: structs that the
    body's schema refers to without holding them. answer: what the 200 answer may be, nothing = empty. events: what an
    event may be, when it can stream. generates: any error of a generation can come. fails: errors of its own, which
    come only where they are named. speaks: whose errors it answers with, when the path does not say so. example: a body
    that works.
    """
    operation = Operation(
        tag,
        tuple(one if isinstance(one, tuple) else (one,) for one in body),
        tuple(parts),
        tuple(answer),
        media_type,
        tuple(events),
        generates,
        tuple(fails),
        speaks,
        example,
    )

    def mark(handler: H) -> H:
        handler.__dict__["operation"] = operation
        return handler

    return mark


def operation_of(handler: Any) -> Operation | None:
    """What `describe` said; None for a handler that is not part of the API (the pages)."""
    found = getattr(handler, "operation", None)
    return found if isinstance(found, Operation) else None


def document(routes: Sequence[web.RouteDef], version: str, base: str = "/") -> Json:
    """The document of `routes`, in their order. base: where the routes begin, relative to the document's place."""
    described = [(route, found) for route in routes if (found := operation_of(route.handler)) is not None]
    refs, components = _components([operation for _, operation in described])
    special = {error for _, operation in described for error in operation.fails} | {ApiError}
    special |= {error for error in all_errors() if error.status in (404, 405)}  # of paths that are no route's
    paths: dict[str, Json] = {}
    names: set[str] = set()
    for route, operation in described:
        item = _operation(route, operation, refs, special)
        if item["operationId"] in names:
            item["operationId"] += "_" + re.sub(r"\W+", "_", route.path.strip("/") or "root")
        names.add(item["operationId"])
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)  # aiohttp's patterns are no part of OpenAPI's
        paths.setdefault(path, {})[route.method.lower()] = item
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Text Generation Inference",
            "description": "TGI's own API and OpenAI's, as this server speaks them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "version": version,
        },
        "servers": [{"url": base}],
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "With `--api-key`."}},
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for _, operation in described)],
    }


def pretty(routes: Sequence[web.RouteDef], version: str) -> str:
    """The document as text for people and for files."""
    return json.dumps(document(routes, version), indent=2, ensure_ascii=False) + "\n"


def _types(operations: Sequence[Operation]) -> list[Any]:
    """Every type that needs a schema, once, in order."""
    types: dict[Any, None] = {tgi.ErrorResponse: None, OpenAIErrorResponse: None}
    for operation in operations:
        types.update(dict.fromkeys(struct for structs in operation.body for struct in structs))
        types.update(dict.fromkeys((*operation.parts, *operation.answer, *operation.events)))
    return list(types)


def _components(operations: Sequence[Operation]) -> tuple[dict[Any, Json], dict[str, Json]]:
    """(schema of each type, named schemas). Fields get their rows' help as description."""
    types = _types(operations)
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    for struct in _structs(types):
        named = components.get(struct.__name__, {})
        if named.pop("description", None) is not None and (whole := _paragraphs(struct)[0]):
            named["description"] = whole
        for name, help_ in _helps(struct).items():
            named["properties"][name].setdefault("description", help_)
    together = dict.fromkeys(structs for operation in operations for structs in operation.body)
    for first, *others in together:
        for other in others:
            components[first.__name__]["properties"].update(components[other.__name__]["properties"])
    for other in {other for structs in together for other in structs[1:]}:
        del components[other.__name__]
    return dict(zip(types, schemas, strict=True)), dict(sorted(components.items()))


def _structs(types: Sequence[Any]) -> Iterator[type[msgspec.Struct]]:
    """All structs that `types` are made of."""
    seen: dict[type, None] = {}
    waiting = [msgspec.inspect.type_info(one) for one in types]
    while waiting:
        place = waiting.pop()
        if isinstance(place, msgspec.inspect.UnionType):
            waiting += place.types
        elif isinstance(place, msgspec.inspect.CollectionType):
            waiting.append(place.item_type)
        elif isinstance(place, msgspec.inspect.DictType):
            waiting.append(place.value_type)
        elif isinstance(place, msgspec.inspect.StructType) and place.cls not in seen:
            seen[place.cls] = None
            yield place.cls
            waiting += [field.type for field in place.fields]


def _helps(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The descriptions of fields: from a table's rows (parameters.py), else from lines `field: text` of docstrings."""
    if struct is OpenAISampling:
        return {row.openai: row.help for row in ROWS.values() if row.openai is not None}
    found: dict[str, str] = {}
    for base in struct.__mro__:
        described = _paragraphs(base)[1]
        found = {name: text for name, text in described.items() if name in struct.__struct_fields__} | found
    for name, hint in get_type_hints(struct, include_extras=True).items():
        for item in getattr(hint, "__metadata__", ()):
            if isinstance(text := getattr(item, "help", None), str):
                found[name] = text
    return found


def _paragraphs(struct: type) -> tuple[str, dict[str, str]]:
    """(what the docstring says of the whole, what it says of the fields)."""
    whole: list[str] = []
    fields: dict[str, list[str]] = {}
    into = whole
    own = struct.__dict__.get("__doc__") or ""
    for line in inspect.cleandoc(own).splitlines():
        begins = re.match(r"(\w+): (.*)", line)
        if begins is not None and begins[1] in getattr(struct, "__struct_fields__", ()):
            into = fields[begins[1]] = []
            line = begins[2][0].upper() + begins[2][1:]
        elif not line:
            into = whole
        into.append(line)
    return " ".join(whole).strip(), {name: " ".join(lines) for name, lines in fields.items()}


def _operation(
    route: web.RouteDef, operation: Operation, refs: dict[Any, Json], special: Collection[type[ApiError]]
) -> Json:
    """The operation object of one route. special: errors that come only where they are named."""
    summary, _, rest = inspect.cleandoc(route.handler.__doc__ or "").partition("\n")
    item: Json = {"tags": [operation.tag], "summary": summary.strip(), "operationId": route.handler.__name__}
    if rest.strip():
        item["description"] = rest.strip()
    placeholders = re.findall(r"\{(\w+)", route.path)
    if placeholders:
        item["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in placeholders
        ]
    if operation.body:
        content: Json = {"schema": _any_of([refs[structs[0]] for structs in operation.body])}
        if operation.example is not None:
            content["example"] = operation.example
        item["requestBody"] = {"required": True, "content": {"application/json": content}}
    if _is_open(route):
        item["security"] = []
    item["responses"] = {"200": _success(operation, refs), **_failures(route, operation, refs, special)}
    return item


def _is_open(route: web.RouteDef) -> bool:
    """Whether it needs no key."""
    return route.method == "GET" and route.path in OPEN_PATHS


def _any_of(schemas: Sequence[Json]) -> Json:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _success(operation: Operation, refs: dict[Any, Json]) -> Json:
    content: Json = {}
    if operation.answer:
        content[operation.media_type] = {"schema": _any_of([refs[one] for one in operation.answer])}
    if operation.events:
        content["text/event-stream"] = {"schema": _any_of([refs[one] for one in operation.events])}
    answer: Json = {"description": "Success; a stream has one such object in each event." if operation.events else "OK"}
    return {**answer, "content": content} if content else answer


def all_errors() -> list[type[ApiError]]:
    """What errors.py declares, in its order."""
    return [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ApiError)]


def _failures(
    route: web.RouteDef, operation: Operation, refs: dict[Any, Json], special: Collection[type[ApiError]]
) -> Json:
    """Responses by status; which errors they are is said by their classes' docstrings."""
    possible: dict[type[ApiError], None] = dict.fromkeys(operation.fails)
    if not _is_open(route):
        possible[errors.Unauthorized] = None
    if operation.body:
        possible.update(dict.fromkeys(_BODY_ERRORS))
    if operation.generates:
        possible.update((error, None) for error in all_errors() if error not in special)
    speaks = operation.speaks or ("openai" if route.path.startswith("/v1/") else "tgi")
    by_status: dict[int, list[str]] = {}
    for error in possible:
        statuses = {
            "tgi": [error.status],
            "openai": [error.openai_status or error.status],
            "both": [error.status, error.openai_status or error.status],
        }
        first_line = inspect.cleandoc(error.__doc__ or error.__name__).partition("\n")[0]
        for status in statuses[speaks]:
            by_status.setdefault(status, []).append(f"`{error.error_type}`: {first_line}")
    objects: dict[Speaks, list[type]] = {
        "tgi": [tgi.ErrorResponse],
        "openai": [OpenAIErrorResponse],
        "both": [tgi.ErrorResponse, OpenAIErrorResponse],
    }
    schema = _any_of([refs[one] for one in objects[speaks]])
    return {
        str(status): {
            "description": "\n\n".join(dict.fromkeys(lines)),
            "content": {"application/json": {"schema": schema}},
        }
        for status, lines in sorted(by_status.items())
    }
