"""The aiohttp application: route tables, and what holds for every request whatever its route.

That is: CORS, the request's id, authentication, refusal while draining, and turning exceptions into responses. A new
route is a file in routes/ and a line in `build`. Called by cli.py and by tests.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from . import page
from .bodies import IGNORED_PARAMS, error_response
from .errors import ApiError, PayloadTooLarge, ShuttingDown, Unauthorized, presentable
from .routes import chat, completions, generate, info
from .server import REQUEST_ID, SERVER, Server, request_id

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# GET on these says only whether the server is well, so it needs no key.
_OPEN_PATHS = frozenset({"/", "/health", "/ping"})
_VARY = "origin, access-control-request-method, access-control-request-headers"


def build(server: Server) -> web.Application:
    """The application that serves `server`."""
    app = web.Application(client_max_size=server.config.payload_limit + 1, middlewares=[_around_every_request])
    app[SERVER] = server
    app[page.PAGE] = page.load()
    for module in (generate, chat, completions, info):
        app.add_routes(module.routes)
    app.on_response_prepare.append(_add_common_headers)
    return app


def build_metrics(server: Server) -> web.Application:
    """The application of `--prometheus-port`: metrics and nothing else."""
    app = web.Application()
    app[SERVER] = server
    app.router.add_get("/metrics", info.metrics)
    return app


@web.middleware
async def _around_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    server = request.app[SERVER]
    request[REQUEST_ID] = request_id(request.headers.get("x-request-id", ""))
    try:
        if request.method == "OPTIONS":
            return _preflight(request)
        _authenticate(request, server)
        if server.draining and request.method == "POST":
            raise ShuttingDown()
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        return _refusal(request, server, PayloadTooLarge(server.config.payload_limit))
    except web.HTTPException as error:  # no such path or method: TGI answers without a body
        headers = {"allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return web.Response(status=error.status, headers=headers)
    except asyncio.CancelledError:
        raise
    except ConnectionError:  # the client has left; aiohttp notices when it tries to send this
        return web.Response(status=499)
    except Exception as error:
        return _refusal(request, server, presentable(error))


def _refusal(request: web.Request, server: Server, error: ApiError) -> web.Response:
    response = error_response(request, error)
    if server.draining:
        response.force_close()
    return response


def _authenticate(request: web.Request, server: Server) -> None:
    """Raises Unauthorized."""
    if request.method in ("GET", "HEAD") and request.path in _OPEN_PATHS:
        return
    if not server.admits(request.headers.get("authorization", "")):
        raise Unauthorized()


def _preflight(request: web.Request) -> web.Response:
    """Any OPTIONS request."""
    return web.Response(
        headers={
            "access-control-allow-methods": "GET,POST",
            "access-control-allow-headers": "content-type,authorization",
        }
    )


async def _add_common_headers(request: web.Request, response: web.StreamResponse) -> None:
    origins = request.app[SERVER].config.cors_allow_origin
    origin = request.headers.get("origin")
    if not origins or "*" in origins:
        response.headers["access-control-allow-origin"] = "*"
    elif origin in origins:
        response.headers["access-control-allow-origin"] = origin
    own = response.headers.get("vary")
    response.headers["vary"] = _VARY if own is None else f"{own}, {_VARY}"
    response.headers["x-request-id"] = request[REQUEST_ID]
    if IGNORED_PARAMS in request:
        response.headers["x-ignored-params"] = request[IGNORED_PARAMS]
    response.headers.popall("server", None)
