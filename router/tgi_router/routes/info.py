"""What the server says about itself: /, /health, /ping, /info, /metrics."""

from aiohttp import web

from .. import page
from ..bodies import json_response
from ..errors import Unhealthy
from ..metrics import CONTENT_TYPE
from ..openapi import describe
from ..schemas import tgi
from ..server import ROUTER_NAME, SERVER, Server

routes = web.RouteTableDef()

_TAG = "Server"


@routes.get("/")
@describe(_TAG, fails=[Unhealthy])
async def root(request: web.Request) -> web.StreamResponse:
    """The page for a browser; for everyone else, as in TGI, the health. Its status is the health's in either case."""
    if not page.wants_page(request.headers.get("accept", "")):
        return await health(request)
    return page.respond(request, request.app[page.PAGE], 200 if request.app[SERVER].healthy else 503)


@routes.get("/health")
@routes.get("/ping")
@describe(_TAG, fails=[Unhealthy])
async def health(request: web.Request) -> web.Response:
    """200 without a body while the server can serve, else 503."""
    if not request.app[SERVER].healthy:
        raise Unhealthy()
    return web.Response()


@routes.get("/info")
@describe(_TAG, answer=[tgi.Info])
async def info(request: web.Request) -> web.Response:
    """The model and the limits."""
    return json_response(facts(request.app[SERVER]))


def facts(server: Server) -> tgi.Info:
    """What /info and gRPC's Info say."""
    config, limits = server.config, server.infer.validator.limits
    return tgi.Info(
        model_id=config.model_id,
        model_sha=config.model_sha,
        model_pipeline_tag=config.model_pipeline_tag,
        max_concurrent_requests=config.max_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=config.validation_workers,
        max_client_batch_size=config.max_client_batch_size,
        router=ROUTER_NAME,
        version=server.version,
        sha=None,
        docker_label=None,
    )


@routes.get("/metrics")
@describe(_TAG, answer=[str], media_type="text/plain")
async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    return web.Response(body=request.app[SERVER].metrics.exposition().encode(), headers={"content-type": CONTENT_TYPE})
