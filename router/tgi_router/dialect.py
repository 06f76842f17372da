"""How the model writes and reads what is more than text: tool calls, thoughts. Found out once, when the router starts.

`--tool-call-parser` and `--reasoning-parser` decide, or with `auto` the chat template and the vocabulary. Built by
cli.py, used by chat_requests.py and chat_answers.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from . import reasoning, tools
from .chat_messages import Message, Taste, plain_messages
from .chat_template import ChatTemplate
from .config import RouterConfig
from .errors import TemplateError
from .reasoning import Marks
from .tokenizer import Tokenizer
from .tools.base import ToolFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dialect:
    """One per server.

    style: of tool calls. parallel: the template takes several of them in a message. marks: around thoughts; None = the
    model does not think aloud. taste: of the chat template.
    token_id: of the vocabulary's token with a text, if there is one. The visible ids are those of special tokens that
    belong to the generated text all the same, because a parser must see them: when there are tools, and when not.
    """

    style: ToolFormat
    parallel: bool
    marks: Marks | None
    taste: Taste
    token_id: Callable[[str], int | None]
    visible_with_tools: frozenset[int]
    visible: frozenset[int]


def find(config: RouterConfig, template: ChatTemplate, tokenizer: Tokenizer) -> Dialect:
    """The model's. Raises StartupError for a parser nobody knows."""
    source = template.source(with_tools=True)
    knows_tools = template.knows("tools", with_tools=True)
    name, style = tools.choose(config.tool_call_parser, source if knows_tools else "", tokenizer.added_tokens)
    marks = reasoning.choose(config.reasoning_parser, template.source(with_tools=False))
    if config.tool_call_parser == "auto" or config.reasoning_parser == "auto":
        logger.info(
            "Tool calls are read as %r, thoughts between %s", name, " and ".join(marks) if marks else "no marks"
        )

    def special(*texts: str) -> frozenset[int]:
        ids = (tokenizer.token_id(text) for text in texts if text)
        return frozenset(one for one in ids if one is not None) & tokenizer.vocabulary.special_ids

    thoughts = special(*(marks or ()))
    taste = Taste(knows_tools, knows_developer="developer" in source, id_length=style.id_length)
    return Dialect(
        style=style,
        parallel=_shows_calls(template, taste, 2) or not _shows_calls(template, taste, 1),
        marks=marks,
        taste=taste,
        token_id=tokenizer.token_id,
        visible_with_tools=thoughts | special(style.opening, *style.markers),
        visible=thoughts,
    )


def _shows_calls(template: ChatTemplate, taste: Taste, count: int) -> bool:
    """Whether the template takes a message with so many calls; Llama 3's refuses more than one."""
    tool = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = [{"id": f"abcdefgh{number}", **call} for number in range(count)]
    messages: list[Message] = [{"role": "user", "content": "a"}]
    messages.append({"role": "assistant", "content": None, "tool_calls": calls})
    messages += [{"role": "tool", "content": "b", "tool_call_id": call["id"]} for call in calls]
    try:
        template.render(plain_messages(messages, taste), tools=[{"type": "function", "function": tool}])
    except TemplateError:
        return False
    return True
