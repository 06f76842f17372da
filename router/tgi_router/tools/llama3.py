"""Llama 3: a message is `{"name": ..., "parameters": {...}}`, calls are separated by `;`.

`<|python_tag|>` may stand before a call, and then free text before that.
"""

from collections.abc import Callable, Sequence

from .base import Places, ToolFormat
from .shaped_calls import Shape, ShapedCalls

_OPENING = "<|python_tag|>"


def _fits(template: str, tokens: Sequence[str]) -> bool:
    return _OPENING in template or (_OPENING in tokens and '"parameters"' in template)


def _places(marker: Callable[[str], str]) -> Places:
    return Places(
        first="",
        call=r'"{\"name\": \"{name}\", \"parameters\": " {arguments} "}"',
        between='"; "',
        last="",
    )


FORMAT = ToolFormat(
    fits=_fits,
    parser=lambda tools: ShapedCalls(Shape(openings=(_OPENING,), bare=True, separators=";"), tools),
    places=_places,
    opening=_OPENING,
    starts=r'\{[ \n]*"name"[ \n]*:',
)
