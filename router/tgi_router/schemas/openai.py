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


# What a message must have; the chat template may want more.
Messages = Annotated[
    list[dict[str, Any]],
    Meta(
        extra_json_schema={
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string"},
                    "content": {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]},
                    "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
                },
                "required": ["role"],
            },
        },
    ),
]


class StreamOptions(Struct, kw_only=True):
    """What a stream tells beside the choices.

    include_usage: a last event, without choices, has the usage; the others have null for it.
    continuous_usage_stats: every event has the usage so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(Struct, kw_only=True):
    """What chat and completions share. Lines that begin with a field's name are its description in the document.

    model: echoed in the answer. One model is served, whatever it is called here.
    max_tokens: most tokens to generate. Absent: as many as fit.
    n: choices for each prompt.
    stop: generation ends before one of these.
    stream: answer with server-sent events, one for each token.
    ignore_eos: do not end at the model's end-of-sequence token.
    include_stop_str_in_output: leave the stop string in the text, as TGI does.
    response_format: `text`, `json_object` or OpenAI's `json_schema`; TGI's `json` and `regex` with their `value`.
    user: accepted; means nothing here.
    """

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
    """Body of /v1/chat/completions.

    messages: the conversation. `content` is a text, or an array of parts of type `text`.
    max_completion_tokens: OpenAI's newer name of `max_tokens`; it wins.
    logprobs: report each token's log-probability.
    top_logprobs: with `logprobs`, so many of the most likely tokens at each place.
    tools: functions the model may call: `{"type": "function", "function": {"name", "description", "parameters"}}`.
    tool_choice: `none`, `auto`, `required`, a function's name, or an object that names one, or `allowed_tools`.
    tool_prompt: TGI's. Words about the tools, added to the last message.
    parallel_tool_calls: whether there may be several calls in one message.
    modalities: `["text"]`; anything else is refused.
    audio: refused.
    web_search_options: refused.
    functions: refused: replaced by `tools`.
    function_call: refused: replaced by `tool_choice`.
    add_generation_prompt: whether the template begins the assistant's message. Absent: unless the last is continued.
    continue_final_message: continue the last message. Absent: when it is the assistant's, as in TGI.
    documents: given to the chat template.
    chat_template_kwargs: further variables of the chat template.
    """

    messages: Messages
    max_completion_tokens: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Common, kw_only=True):
    """Body of /v1/completions.

    prompt: a text, texts, token ids, or arrays of token ids.
    best_of: generate so many for each prompt and return the `n` best.
    logprobs: report each token's log-probability, and so many of the most likely tokens at its place.
    echo: put the prompt before the text.
    suffix: refused: prepare the prompt instead.
    """

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


NullableLogprob = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": ["number", "null"]})]


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
    token_logprobs: list[NullableLogprob]
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
