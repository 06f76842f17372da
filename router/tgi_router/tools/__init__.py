"""The formats in which models write tool calls; `--tool-call-parser` names one. docs/adding/tool-parser.md

A new format is a file here and a line below. `auto` takes the first one that fits the model, so the order matters.
"""

from collections.abc import Sequence

from ..errors import StartupError
from . import hermes, llama3, mistral, plain_json, qwen3_xml
from .base import ToolFormat

FORMATS: dict[str, ToolFormat] = {
    "mistral": mistral.FORMAT,
    "qwen3_xml": qwen3_xml.FORMAT,
    "hermes": hermes.FORMAT,
    "llama3_json": llama3.FORMAT,
    "json": plain_json.FORMAT,
}


def choose(name: str, template: str, tokens: Sequence[str]) -> tuple[str, ToolFormat]:
    """The format called `name`, or for `auto` the one that fits. Raises StartupError when there is none of that name.

    template: the model's chat template for tools, "" when it has none. tokens: texts of its added tokens.
    """
    if name == "auto":
        return next((key, one) for key, one in FORMATS.items() if one.fits(template, tokens))
    if name not in FORMATS:
        raise StartupError(f"`--tool-call-parser` must be auto or one of {', '.join(FORMATS)}. Given: {name}")
    return name, FORMATS[name]
