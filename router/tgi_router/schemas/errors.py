"""The error of /v1/*: OpenAI's object, from which its clients raise typed exceptions, beside it TGI's `error_type`.

That of TGI's own routes is tgi.ErrorResponse.
"""

from msgspec import Struct


class OpenAIError(Struct):
    message: str
    type: str
    param: str | None
    code: str | None
    http_status_code: int


class OpenAIErrorResponse(Struct):
    error: OpenAIError
    error_type: str
