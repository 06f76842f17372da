"""Models that were not taught any format: the message is a call as JSON, or an array of them, perhaps fenced."""

from collections.abc import Callable, Sequence

from .base import Places, ToolFormat
from .shaped_calls import Shape, ShapedCalls

_FENCE = "```json"


def _fits(template: str, tokens: Sequence[str]) -> bool:
    return True


def _places(marker: Callable[[str], str]) -> Places:
    return Places(
        first="",
        call=r'"{\"name\": \"{name}\", \"parameters\": " {arguments} "}"',
        between=r'"\n"',
        last="",
    )


FORMAT = ToolFormat(
    fits=_fits,
    parser=lambda tools: ShapedCalls(
        Shape(openings=(_FENCE,), closing="```", bare=True, lists=True, separators=",;"), tools
    ),
    places=_places,
    starts=r'\{[ \n]*"name"[ \n]*:',
)
