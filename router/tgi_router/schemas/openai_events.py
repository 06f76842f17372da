"""Events of the streams of /v1/*, for the served document.

The bytes are put together by hand where they are sent (chat_answers.py, routes/completions.py), once per token; tests
hold them to these structs.
"""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from .openai import ChatFinishReason, ChatLogprobs, CompletionLogprobs, FinishReasonName, Usage


class FunctionDelta(Struct, forbid_unknown_fields=True):
    """arguments: the next piece of JSON text."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct, forbid_unknown_fields=True):
    """id, type and name stand in a call's first delta only."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, forbid_unknown_fields=True):
    """role: in a choice's first delta only."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, forbid_unknown_fields=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatChunk(Struct, forbid_unknown_fields=True):
    """One event. usage: in the last one, whose choices are empty, when `stream_options` asks for it."""

    object: Literal["chat.completion.chunk"]
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None


class CompletionChunkChoice(Struct, forbid_unknown_fields=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None


class CompletionChunk(Struct, forbid_unknown_fields=True):
    """One event. usage: as in TGI in the last event of each choice, or as `stream_options` asks for it."""

    object: Literal["text_completion"]
    id: str
    created: int
    choices: list[CompletionChunkChoice]
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
