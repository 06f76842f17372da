"""Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`; newer models: `[TOOL_CALLS]name[ARGS]{...}`."""

from collections.abc import Callable, Sequence

from .base import Places, ToolFormat
from .shaped_calls import Shape, ShapedCalls

_OPENING = "[TOOL_CALLS]"
_CALL_ID, _ARGS = "[CALL_ID]", "[ARGS]"


def _fits(template: str, tokens: Sequence[str]) -> bool:
    return _OPENING in template


def _places(marker: Callable[[str], str]) -> Places:
    opening, args = marker(_OPENING), marker(_ARGS)
    if args.startswith("<"):  # the vocabulary has it
        return Places(first="", call=rf'"{{name}}" {args} {{arguments}}', between=opening, last="")
    return Places(
        first='" ["',
        call=r'"{\"name\": \"{name}\", \"arguments\": " {arguments} "}"',
        between='", "',
        last='"]"',
    )


FORMAT = ToolFormat(
    fits=_fits,
    parser=lambda tools: ShapedCalls(
        Shape(openings=(_OPENING,), lists=True, separators=",", after_name=(_CALL_ID, _ARGS)), tools
    ),
    places=_places,
    opening=_OPENING,
    markers=(_CALL_ID, _ARGS),
    id_length=9,
)
