"""GET /v1/models and /v1/models/{id}: what can be asked for by name, in OpenAI's shape."""

from aiohttp import web

from ..bodies import json_response
from ..errors import ModelNotFound
from ..openapi import describe
from ..schemas.models import Model, ModelList
from ..server import SERVER, Server

routes = web.RouteTableDef()


@routes.get("/v1/models")
@describe("OpenAI", answer=[ModelList])
async def models(request: web.Request) -> web.Response:
    """The one model."""
    return json_response(ModelList("list", _models(request.app[SERVER])))


@routes.get(r"/v1/models/{model:[\s\S]+}")
@describe("OpenAI", answer=[Model], fails=[ModelNotFound])
async def model(request: web.Request) -> web.Response:
    """A model by its id, which may contain slashes."""
    name = request.match_info["model"]
    for found in _models(request.app[SERVER]):
        if found.id == name:
            return json_response(found)
    raise ModelNotFound(name)


def _models(server: Server) -> list[Model]:
    model_id = server.config.model_id
    return [Model(model_id, "model", 0, model_id)]
