"""The aiohttp application: route tables, and what holds for every request whatever its route.

That is: CORS, the request's id, deadline and trace, authentication, refusal while draining, and turning exceptions into
responses. A new route is a file in routes/ and its name in `route_table`. Called by cli.py and by tests.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from . import log_context, page
from .bodies import IGNORED_PARAMS, error_response, is_openai
from .config import RouterConfig
from .errors import (
    ApiError,
    NoSuchRoute,
    PayloadTooLarge,
    ShuttingDown,
    Unauthorized,
    ValidationError,
    WrongMethod,
    presentable,
)
from .infer import Deadline
from .routes import chat, completions, docs, generate, info, kserve, models, sagemaker, tokenize, vertex
from .server import DEADLINE, OPEN_PATHS, REQUEST_ID, SERVER, TRACE, Server, request_id

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+( *, *[\w!#$%&'*+.^`|~-]+){0,63}", re.ASCII)
_VARY = "origin, access-control-request-method, access-control-request-headers"


def build(server: Server) -> web.Application:
    """The application that serves `server`."""
    app = web.Application(client_max_size=server.config.payload_limit + 1, middlewares=[_around_every_request])
    app[SERVER] = server
    app[page.PAGE] = page.load()
    app[docs.ROUTES] = routes = route_table(server.config)
    app[docs.DOCUMENTS] = {}
    app.add_routes(routes)
    app.on_response_prepare.append(_add_common_headers)
    app.on_cleanup.append(_close)
    return app


def route_table(config: RouterConfig | None) -> list[web.RouteDef]:
    """Every route, in the order of the served document. config: None = without those that it adds."""
    modules = (generate, chat, completions, models, tokenize, info, sagemaker, vertex, kserve, docs)
    table = [route for module in modules for route in module.routes if isinstance(route, web.RouteDef)]
    if config is None:
        return table
    asked = ((config.aip_predict_route, web.post, vertex.vertex), (config.aip_health_route, web.get, info.health))
    for path, method, handler in asked:
        if path is not None:
            route = method(path, handler)
            if not any((route.method, path) == (there.method, there.path) for there in table):
                table.append(route)
    return table


def build_metrics(server: Server) -> web.Application:
    """The application of `--prometheus-port`: metrics and nothing else."""
    app = web.Application()
    app[SERVER] = server
    app.router.add_get("/metrics", info.metrics)
    return app


async def _close(app: web.Application) -> None:
    await app[SERVER].infer.validator.grammars.close()


@web.middleware
async def _around_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id and trace, and makes a response of whatever happens."""
    server = request.app[SERVER]
    request[REQUEST_ID] = request_id(request.headers.get("x-request-id", ""))
    response = await _traced(request, handler, server)
    if not request.content.is_eof():
        response.force_close()  # refused before its body was read: what follows on the connection is no head
        if request.content.exception() is not None:
            request.content.feed_eof()  # or aiohttp reads on, and logs what it meets
    return response


async def _traced(request: web.Request, handler: Handler, server: Server) -> web.StreamResponse:
    """`_respond`, within a span when tracing is on. Probes are left out: they come every second and say nothing."""
    resource = request.match_info.route.resource
    if server.tracing is None or request.method != "POST" or resource is None:
        log_context.enter(request_id=request[REQUEST_ID], path=request.path)
        return await _respond(request, handler, server)
    route = resource.canonical
    attributes = {"http.request.method": request.method, "url.path": request.path, "http.route": route}
    trace = request[TRACE] = server.tracing.begin(f"{request.method} {route}", request.headers, attributes)
    log_context.enter(request_id=request[REQUEST_ID], path=request.path, trace_id=trace.trace_id)
    status = None
    try:
        response = await _respond(request, handler, server)
        status = response.status
    finally:
        trace.end(status)
    return response


async def _respond(request: web.Request, handler: Handler, server: Server) -> web.StreamResponse:
    try:
        if request.method == "OPTIONS":
            return _preflight(request)
        _authenticate(request, server)
        _take_deadline(request)
        if server.draining and request.method == "POST":
            raise ShuttingDown(server.infer.drained_in_s)
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        return _refusal(request, server, PayloadTooLarge(server.config.payload_limit))
    except web.HTTPException as error:
        return _nothing_here(request, error)
    except asyncio.CancelledError:
        raise
    except ConnectionError:  # the client has left; aiohttp notices when it tries to send this
        return web.Response(status=499)
    except Exception as error:
        return _refusal(request, server, presentable(error))


def _nothing_here(request: web.Request, error: web.HTTPException) -> web.Response:
    """No such path or method: TGI answers without a body, on OpenAI's routes its clients show the sentence."""
    if is_openai(request) and error.status in (404, 405):
        kind = NoSuchRoute if error.status == 404 else WrongMethod
        response = error_response(request, kind(request.method, request.path))
    else:
        response = web.Response(status=error.status)
    if "Allow" in error.headers:
        response.headers["allow"] = error.headers["Allow"]
    return response


def _take_deadline(request: web.Request) -> None:
    """`x-request-timeout`, in seconds from now. Raises ValidationError."""
    given = request.headers.get("x-request-timeout")
    if given is None:
        return
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise ValidationError(f"the header `x-request-timeout` must be a number of seconds > 0. Given: {given[:64]!r}")
    request[DEADLINE] = Deadline(timeout_s, time.monotonic() + timeout_s)


def _refusal(request: web.Request, server: Server, error: ApiError) -> web.Response:
    response = error_response(request, error)
    if not error.logged and error.error_type != "healthcheck":  # infer.py's have their line; probes need none
        fields = {"status": response.status, "method": request.method, "client": request.remote}
        logger.info("Refused: %s", error.message, extra=fields)
    if server.draining:
        response.force_close()
    return response


def _authenticate(request: web.Request, server: Server) -> None:
    """Raises Unauthorized."""
    if request.method in ("GET", "HEAD") and _is_open(request.path, server.config):
        return
    if not server.admits(request.headers.get("authorization", "")):
        raise Unauthorized()


def _is_open(path: str, config: RouterConfig) -> bool:
    """Whether GET needs no key. An `--open-path` that ends in a slash opens what is below it, too; `/` does not."""
    if path in OPEN_PATHS or path == config.aip_health_route:
        return True
    return any(path == one or (one != "/" and one.endswith("/") and path.startswith(one)) for one in config.open_path)


def _preflight(request: web.Request) -> web.Response:
    """Any OPTIONS request. A page may send whatever headers it likes: none of them gives it a right it has not got."""
    headers = {
        "access-control-allow-methods": "GET,POST",
        "access-control-allow-headers": "content-type,authorization",
    }
    asked = request.headers.get("access-control-request-headers", "").lower()
    if _HEADER_NAMES.fullmatch(asked):
        headers["access-control-allow-headers"] = asked
    if "origin" in request.headers:
        headers["access-control-max-age"] = "600"
    return web.Response(headers=headers)


async def _add_common_headers(request: web.Request, response: web.StreamResponse) -> None:
    headers = response.headers
    origins = request.app[SERVER].config.cors_allow_origin
    origin = request.headers.get("origin")
    if not origins or "*" in origins:
        headers["access-control-allow-origin"] = "*"
    elif origin in origins:
        headers["access-control-allow-origin"] = origin
    if origin is not None and request.method != "OPTIONS":
        headers["access-control-expose-headers"] = "*"  # a page may read x-request-id, retry-after and the like
    own = headers.get("vary")  # of the page, which depends on `accept`
    headers["vary"] = _VARY if own is None else f"{own}, {_VARY}"
    if REQUEST_ID in request:  # aiohttp refuses an unknown `expect` before the middleware runs
        headers["x-request-id"] = request[REQUEST_ID]
    if IGNORED_PARAMS in request:
        headers["x-ignored-params"] = request[IGNORED_PARAMS]
    if TRACE in request:
        headers["traceresponse"] = request[TRACE].response_header
    headers.popall("server", None)
