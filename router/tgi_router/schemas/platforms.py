"""Requests and responses of the platforms TGI runs on: Vertex AI and KServe (Open Inference Protocol, version 2)."""

from collections.abc import Sequence
from typing import Annotated

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ..parameters import U32, USIZE, GenerateParameters

Byte = Annotated[int, Meta(ge=0, le=255)]


class VertexParameters(Struct, kw_only=True):
    """All that TGI honours here; sampling is always on."""

    max_new_tokens: U32 | None = None
    seed: USIZE | None = None


class VertexInstance(Struct, kw_only=True):
    """A prompt to continue. A body of /v1/chat/completions may stand in its place."""

    inputs: str
    parameters: VertexParameters | None = None


_INSTANCES = [{"$ref": f"#/components/schemas/{name}"} for name in ("VertexInstance", "ChatRequest")]
Instance = Annotated[Raw, Meta(extra_json_schema={"anyOf": _INSTANCES})]


class VertexRequest(Struct, kw_only=True):
    """Body of /vertex. instances: each a `VertexInstance` or a `ChatRequest`."""

    instances: list[Instance]


class VertexResponse(Struct):
    """The generated texts, in the order of the instances."""

    predictions: list[str]


class KServeInput(Struct, kw_only=True):
    """A prompt.

    data: the bytes of its UTF-8 text, or the text itself as the only element.
    """

    name: str
    shape: list[USIZE]
    datatype: str
    data: list[Byte | str]


class KServeRequestedOutput(Struct, kw_only=True):
    name: str


class KServeRequest(Struct, kw_only=True):
    """Body of .../infer.

    id: echoed.
    outputs: as many as inputs. Absent: each is named like its input.
    """

    id: str | None = None
    parameters: GenerateParameters | None = None
    inputs: list[KServeInput]
    outputs: list[KServeRequestedOutput] | None = None


class KServeOutput(Struct):
    """A generated text, in the form of its input."""

    name: str
    shape: list[int]
    datatype: str
    data: Sequence[int | str]


class KServeResponse(Struct, kw_only=True):
    id: str | UnsetType = UNSET
    outputs: list[KServeOutput]


class KServeLive(Struct):
    live: bool


class KServeMetadata(Struct):
    name: str
    version: str
    extensions: list[str]
