"""How a failure looks over gRPC: a status code, TGI's sentence, and the rest in the trailing metadata. PURE.

Called by calls.py.
"""

from urllib.parse import quote

import grpc

from ..errors import ApiError, IncompleteGeneration, IncompleteGenerationStream

Metadata = tuple[tuple[str, str], ...]

MAX_MESSAGE_BYTES = 4096  # of a sentence, percent-encoded; clients take 8 KiB of metadata by default
_MAX_VALUE_CHARS = 256

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    424: grpc.StatusCode.INTERNAL,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class MalformedMessage(ApiError):
    """The bytes are no message of the method's type."""

    status = 400
    error_type = "validation"
    prefix = "Failed to parse the request message: "


class ClientTooSlow(ApiError):
    """So many tokens wait for the caller that the call was ended."""

    status = 429
    error_type = "overloaded"

    def __init__(self) -> None:
        super().__init__("The answer was not read: too many of its messages were waiting. Its generation was ended.")


def code(error: ApiError) -> grpc.StatusCode:
    """The status code of `error`; another server may do better when this one ends before the request does."""
    if isinstance(error, (IncompleteGeneration, IncompleteGenerationStream)):
        return grpc.StatusCode.UNAVAILABLE
    return _CODES.get(error.status, grpc.StatusCode.INTERNAL)


def trailing_metadata(error: ApiError) -> Metadata:
    """`error_type`, and what else is known. A value may come from the client, so it is made printable and short."""
    entries = [("error_type", error.error_type)]
    if error.param is not None:
        entries.append(("error_param", quote(error.param[:_MAX_VALUE_CHARS], safe=" []{}().,:;_#$@!?'`\"<>=+*/&|-")))
    if error.code is not None:
        entries.append(("error_code", error.code))
    if error.retry_after_s is not None:
        entries.append(("retry-after", str(error.retry_after_s)))
        entries.append(("grpc-retry-pushback-ms", str(1000 * error.retry_after_s)))
    return tuple(entries)


def sentence(error: ApiError) -> str:
    """Its message, cut where it would not fit into the metadata of a client with gRPC's defaults."""
    message = error.message
    size = 0
    for index, character in enumerate(message):
        size += 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode(errors="replace"))
        if size > MAX_MESSAGE_BYTES:
            return message[:index] + "…"
    return message
