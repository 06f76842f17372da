"""The API's description: /openapi.json, also where TGI had it, and Swagger UI at /docs.

Swagger UI's files come from an installed package; the page loads nothing from elsewhere, and its headers see to that.
"""

import asyncio
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from ..bodies import JSON
from ..errors import Bug
from ..openapi import document
from ..server import SERVER

routes = web.RouteTableDef()

# The routes the document describes; given by app.py, which alone knows them all.
ROUTES: web.AppKey[Sequence[web.RouteDef]] = web.AppKey("routes", list)
# Made documents, by the base of their paths; app.py gives an empty dictionary.
DOCUMENTS: web.AppKey[dict[str, bytes]] = web.AppKey("documents", dict)

_ASSETS = frozenset({"swagger-ui.css", "swagger-ui-bundle.js", "favicon-16x16.png", "favicon-32x32.png"})
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
)
_INDEX = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>API of this server</title>
<link rel="icon" href="favicon-32x32.png">
<link rel="stylesheet" href="swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="swagger-ui-bundle.js"></script>
<script src="start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "../openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, tryItOutEnabled: true,
});
"""


@routes.get("/openapi.json")
async def openapi_document(request: web.Request) -> web.Response:
    """The OpenAPI document."""
    return await _document(request, "./")


@routes.get("/api-doc/openapi.json")
async def openapi_document_at_tgis_place(request: web.Request) -> web.Response:
    """The OpenAPI document."""
    return await _document(request, "../")


async def _document(request: web.Request, base: str) -> web.Response:
    app, made = request.app, request.app[DOCUMENTS]
    if base not in made:  # off the event loop: it takes longer than a token may wait
        parsed = await asyncio.to_thread(document, app[ROUTES], app[SERVER].version, base)
        made[base] = msgspec.json.encode(parsed)
    return web.Response(body=made[base], content_type=JSON)


@routes.get("/docs")
async def docs(request: web.Request) -> web.Response:
    """Where the page is. Relative, so that it holds behind a proxy that adds a path."""
    return web.Response(status=303, headers={"location": "docs/"})


@routes.get("/docs/{file:.*}")
async def docs_page(request: web.Request) -> web.StreamResponse:
    """Swagger UI and its files."""
    name = request.match_info["file"]
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
    if name in ("", "index.html"):
        return web.Response(text=_INDEX, content_type="text/html", headers=headers)
    if name == "start.js":
        return web.Response(text=_START, content_type="text/javascript", headers=headers)
    if name not in _ASSETS:
        raise web.HTTPNotFound()
    return web.FileResponse(_folder() / name, headers=headers)


def _folder() -> Path:
    """Where the installed package keeps Swagger UI; it is not imported."""
    found = importlib.util.find_spec("swagger_ui")
    if found is None or not found.submodule_search_locations:
        raise Bug("swagger-ui-py is not installed, but the server's package requires it. This is a bug.")
    return Path(found.submodule_search_locations[0]) / "static"
