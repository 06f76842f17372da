"""Requests and responses of TGI's own routes: field order and nulls are TGI's, byte for byte.

Declared once: parsing, encoding and the served document derive from these. A field of type `Float32` holds the digits
of a 32-bit float, made with float32.raw.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..parameters import GenerateParameters

Float32 = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "number", "format": "float"})]
NullableFloat32 = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": ["number", "null"], "format": "float"})]
FinishReasonName = Literal["length", "eos_token", "stop_sequence"]


class GenerateRequest(Struct, kw_only=True):
    """Body of /generate, /generate_stream and /tokenize. Without `parameters` TGI samples."""

    inputs: str
    parameters: GenerateParameters | None = None

    def given_parameters(self) -> GenerateParameters:
        return GenerateParameters(do_sample=True) if self.parameters is None else self.parameters


class CompatGenerateRequest(GenerateRequest, kw_only=True):
    """Body of POST /."""

    stream: bool | None = None


class PrefillToken(Struct):
    id: int
    text: str
    logprob: NullableFloat32  # null for the first


class Token(Struct):
    id: int
    text: str
    logprob: Float32
    special: bool


class BestOfSequence(Struct):
    """One of the sequences that were not the best."""

    generated_text: str
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct):
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(Struct):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct):
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct):
    """One event of a stream."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(Struct):
    """A token of /tokenize; start and stop are byte offsets."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct):
    """Body of /chat_tokenize. templated_text: what the model would be given."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(Struct):
    """Body of GET /info."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class ErrorResponse(Struct):
    error: str
    error_type: str
