"""Everything that can go wrong for a user, as one tree of exceptions: HTTP status, TGI's `error_type` and a sentence.

Raised anywhere in the router, turned into a response or an SSE event by sse.py and app.py only. A `message` is shown
to the client as it is, so it names the parameter in backticks, the value, the limit and the flag that raises the limit,
and never a path, an address or a traceback. `Bug` is for our own mistakes and shows the client nothing.
"""

import logging
from typing import ClassVar, Literal

logger = logging.getLogger(__name__)

FailureLabel = Literal["validation", "overloaded", "template", "incomplete", "generation", "dropped", "timeout"]


class Bug(Exception):
    """Our mistake. The message ends with "This is a bug."; it goes to the log, not to the client."""


class ApiError(Exception):
    """A request's failure that its client may see.

    param: the request field at fault, in OpenAI's error object. retry_after_s: whole seconds for `Retry-After`.
    code: OpenAI's `error.code`, when the class' own is too general.
    """

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"  # TGI's
    openai_type: ClassVar[str] = "server_error"  # OpenAI's `error.type`
    openai_code: ClassVar[str | None] = None  # OpenAI's `error.code`
    openai_status: ClassVar[int | None] = None  # on /v1/*, when OpenAI's clients expect another one than TGI's
    prefix: ClassVar[str] = ""  # stands before the sentence, as in TGI
    failure: ClassVar[FailureLabel | None] = None  # label of tgi_request_failure; None = not counted

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None, code: str | None = None
    ) -> None:
        super().__init__(self.prefix + message)
        self.code = code or self.openai_code
        self.message = self.prefix + message
        self.param = param
        self.retry_after_s = retry_after_s
        self.logged = False  # infer.py has written its line; app.py does for the others


class ValidationError(ApiError):
    """The request is well formed and asks for something that is not allowed."""

    status = 422
    error_type = "validation"
    openai_type = "invalid_request_error"
    prefix = "Input validation error: "
    failure = "validation"


class TemplateError(ApiError):
    """The chat template is missing, broken, or refused the messages."""

    status = 422
    error_type = "template_error"
    openai_type = "invalid_request_error"
    prefix = "Template error: "
    failure = "template"


class ToolError(ApiError):
    """Tools were asked for in a way that cannot be served."""

    status = 422
    error_type = "tool_error"
    openai_type = "invalid_request_error"
    prefix = "Tool error: "
    failure = "validation"


class SuffixNotSupported(ApiError):
    """`suffix` on /v1/completions; TGI's own sentence and type."""

    status = 422
    error_type = "suffix not supported"
    openai_type = "invalid_request_error"
    failure = "validation"

    def __init__(self) -> None:
        super().__init__("Suffix is not supported and can be achieved by preprocessing the prompt.", param="suffix")


class BatchSizeExceeded(ApiError):
    """Too many prompts in one /v1/completions request; TGI's own sentence and type."""

    status = 422
    error_type = "batch size exceeded"
    openai_type = "invalid_request_error"
    failure = "validation"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"Number of prompts exceeds the maximum allowed batch size of {limit}. "
            "`--max-client-batch-size` raises the limit",
            param="prompt",
        )


class MalformedBody(ApiError):
    """The body is not JSON. TGI's sentence follows the prefix."""

    status = 400
    error_type = "validation"
    openai_type = "invalid_request_error"
    prefix = "Failed to parse the request body as JSON: "


class WrongShape(ApiError):
    """The body is JSON of another shape than the route takes."""

    status = 422
    error_type = "validation"
    openai_type = "invalid_request_error"
    prefix = "Failed to deserialize the JSON body into the target type: "


class UnknownFields(ApiError):
    """The body has fields that the route does not take, and `--strict-params` is on."""

    status = 422
    openai_status = 400
    error_type = "validation"
    openai_type = "invalid_request_error"
    openai_code = "unknown_parameter"

    def __init__(self, names: str, first: str, meant: str | None = None) -> None:
        """meant: a known name that the first is like."""
        guess = f" Did you mean `{meant}`?" if meant is not None else ""
        super().__init__(
            f"Unknown fields: `{names}`.{guess} Without `--strict-params` they are ignored and listed in "
            "`x-ignored-params`",
            param=first,
        )


class UnsupportedMediaType(ApiError):
    """The body is not announced as JSON."""

    status = 415
    error_type = "validation"
    openai_type = "invalid_request_error"

    def __init__(self) -> None:
        super().__init__("Expected request with `Content-Type: application/json`")


class PayloadTooLarge(ApiError):
    """The body is larger than `--payload-limit`."""

    status = 413
    error_type = "validation"
    openai_type = "invalid_request_error"

    def __init__(self, limit: int) -> None:
        super().__init__(
            "Failed to buffer the request body: length limit exceeded. "
            f"The limit is {limit} bytes; `--payload-limit` raises it."
        )


class RequestTimeout(ApiError):
    """The client did not send its body in time."""

    status = 408
    error_type = "validation"
    openai_type = "invalid_request_error"


class DeadlineExceeded(ApiError):
    """The time that the client gave (`x-request-timeout`, or a gRPC call's deadline) is over."""

    status = 504
    error_type = "timeout"
    openai_type = "timeout"
    openai_code = "request_timeout"
    failure = "timeout"

    def __init__(self, timeout_s: float, name: str) -> None:
        """name: where the client gave it."""
        super().__init__(f"The request was not finished within {timeout_s:g} seconds, its {name}.")


class Unauthorized(ApiError):
    """`--api-key` is set and the request has another one, or none."""

    status = 401
    error_type = "authentication"
    openai_code = "invalid_api_key"
    openai_type = "authentication_error"

    def __init__(self) -> None:
        super().__init__("The API key is missing or wrong. Send it as `Authorization: Bearer <key>`.")


class ModelNotFound(ApiError):
    """GET /v1/models/{id} with an id that no model has."""

    status = 404
    error_type = "not_found"
    openai_type = "invalid_request_error"
    openai_code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model {name!r} does not exist. GET /v1/models lists what there is.", param="model")


class NoSuchRoute(ApiError):
    """A path under /v1/ that this server does not have; elsewhere there is no body, as in TGI."""

    status = 404
    error_type = "not_found"
    openai_type = "invalid_request_error"
    openai_code = "unknown_url"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Unknown request URL: {method} {path[:200]}. GET /docs shows what there is.")


class WrongMethod(ApiError):
    """A path under /v1/ asked for with a method it does not take."""

    status = 405
    error_type = "not_found"
    openai_type = "invalid_request_error"
    openai_code = "method_not_supported"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"{path[:200]} does not take {method}. GET /docs shows what there is.")


class Overloaded(ApiError):
    """No permit left of `--max-concurrent-requests`."""

    status = 429
    error_type = "overloaded"
    openai_type = "rate_limit_error"
    openai_code = "rate_limit_exceeded"
    failure = "overloaded"

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__("Model is overloaded", retry_after_s=retry_after_s)


class GenerationError(ApiError):
    """A shard could not compute this request: its row failed, or it was in flight at too many crashes."""

    status = 424
    openai_status = 500
    error_type = "generation"
    prefix = "Request failed during generation: "
    failure = "generation"


class IncompleteGeneration(ApiError):
    """The server ended before the request did."""

    status = 500
    error_type = "incomplete_generation"
    failure = "incomplete"

    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class IncompleteGenerationStream(ApiError):
    """The same in a stream."""

    status = 500
    error_type = "incomplete_generation_stream"
    failure = "incomplete"

    def __init__(self) -> None:
        super().__init__("Incomplete generation stream")


class IncompletePrediction(ApiError):
    """A generation failed; Vertex AI's and KServe's routes do not say why, as in TGI. The log does."""

    status = 500
    error_type = "Incomplete generation"

    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class NoInstances(ApiError):
    """`instances` of a Vertex AI request is empty; TGI's own sentence and type."""

    status = 422
    error_type = "Input validation error"

    def __init__(self) -> None:
        super().__init__("Input validation error", param="instances")


class LengthMismatch(ApiError):
    """A KServe request has not as many outputs as inputs; TGI's own sentence and type."""

    status = 422
    error_type = "length mismatch"

    def __init__(self) -> None:
        super().__init__("Inputs and outputs length mismatch", param="outputs")


class NotUtf8(ApiError):
    """The data of a KServe input is no text."""

    status = 422
    error_type = "utf8"


class Unhealthy(ApiError):
    """GET /health while the shards are not answering, or while the server drains."""

    status = 503
    error_type = "healthcheck"

    def __init__(self) -> None:
        super().__init__("unhealthy")


class ShuttingDown(ApiError):
    """A new request while the server drains."""

    status = 503
    error_type = "overloaded"
    openai_type = "service_unavailable"
    failure = "overloaded"

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__("The server is shutting down. Send the request again.", retry_after_s=retry_after_s)


class InternalError(ApiError):
    """What a client sees of a `Bug` or of an exception nobody expected."""

    status = 500
    error_type = "internal"
    failure = "generation"

    def __init__(self) -> None:
        super().__init__("Internal error. The server's log has the details under this request's id.")


class StartupError(Exception):
    """The router cannot start with this configuration and model: one sentence for the operator, exit code 1."""


def presentable(error: Exception) -> ApiError:
    """`error` as its client may see it. What is no ApiError is our mistake: it is logged with its traceback."""
    if isinstance(error, ApiError):
        return error
    logger.error("%s", "A bug" if isinstance(error, Bug) else "An unexpected error", exc_info=error)
    return InternalError()
