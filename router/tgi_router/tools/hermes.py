"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one tag for each call."""

from collections.abc import Callable, Sequence

from .base import Places, ToolFormat
from .shaped_calls import Shape, ShapedCalls

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


def _fits(template: str, tokens: Sequence[str]) -> bool:
    return _OPENING in template


def _places(marker: Callable[[str], str]) -> Places:
    opening, closing = marker(_OPENING), marker(_CLOSING)
    return Places(
        first=r'"\n"',
        call=r'"{\"name\": \"{name}\", \"arguments\": " {arguments} "}"',
        between=rf'"\n" {closing} "\n" {opening} "\n"',
        last=rf'"\n" {closing}',
    )


FORMAT = ToolFormat(
    fits=_fits,
    parser=lambda tools: ShapedCalls(Shape(openings=(_OPENING,), closing=_CLOSING), tools),
    places=_places,
    opening=_OPENING,
    markers=(_CLOSING,),
)
