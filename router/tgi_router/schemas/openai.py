"""Requests and responses of /v1/*: OpenAI's API with TGI's extra fields. `null` means absent everywhere.

Sampling parameters are not listed here: they come from the table in parameters.py (`OpenAISampling`), decoded from the
same body.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..parameters import U32

FinishReasonName = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class StreamOptions(Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(Struct, kw_only=True):
    """What chat and completions share. response_format: see grammars.from_response_format."""

    model: str | None = None
    max_tokens: U32 | None = None
    n: U32 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str] | None:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """A last chunk with the usage is wanted."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Every chunk shall carry the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class ChatRequest(Common, kw_only=True):
    """Body of /v1/chat/completions. messages: as the chat template gets them; see routes/chat.py."""

    messages: list[dict[str, Any]]
    max_completion_tokens: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Common, kw_only=True):
    """Body of /v1/completions. prompt: one or several, as text or as token ids."""

    prompt: str | list[Any]
    best_of: U32 | None = None
    logprobs: U32 | None = None
    echo: bool | None = None
    suffix: str | None = None


# The digits of a 32-bit float, made with float32.raw.
Logprob = Annotated[
    msgspec.Raw,
    Meta(description="Natural logarithm; -9999.0 stands for minus infinity.", extra_json_schema={"type": "number"}),
]


class TopLogprob(Struct):
    token: str
    logprob: Logprob
    bytes: list[int]


class ChatLogprob(Struct):
    token: str
    logprob: Logprob
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    """Of `echo`ed prompts, too; nothing precedes the first token, so it has null for both. text_offset: characters."""

    tokens: list[str]
    token_logprobs: list[Logprob]
    top_logprobs: list[dict[str, Logprob] | None]
    text_offset: list[int]


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # of reasoning models


class CalledFunction(Struct):
    """arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Struct, kw_only=True):
    """content: null when the message only calls tools. A field that does not apply is left out."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(Struct):
    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName


class Completion(Struct):
    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
