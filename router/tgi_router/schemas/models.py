"""GET /v1/models."""

from typing import Literal

from msgspec import Struct


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Struct):
    object: Literal["list"]
    data: list[Model]
