"""What a chat request asks for: its prompt with the grammar of the answer, and how the answer's text is to be read.

`prompts` is the beginning of every chat (routes/chat.py, and through it gRPC, SageMaker and Vertex), `reading` of its
answer (chat_answers.py). Messages are put into plain form by chat_messages.py, tools are read by tools/offer.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from .chat_grammar import answer_grammar
from .chat_messages import plain_messages, with_tools_as_text
from .dialect import Dialect
from .errors import ToolError, ValidationError
from .grammars import Grammar, from_response_format
from .message import MessageParser
from .openai_answers import check_at_most
from .openai_requests import check_choices
from .parameters import from_openai
from .reasoning import ReasoningParser, is_open
from .schemas import openai
from .server import Server
from .tools import offer
from .tools.offer import Offer
from .validation import Prompt

# Template variables that a request's chat_template_kwargs may not replace.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)


def prompts(server: Server, body: openai.ChatRequest, sampling: msgspec.Struct) -> list[Prompt]:
    """What the request asks for, one prompt. Raises ValidationError, WrongShape or ToolError for what cannot be had."""
    limits = server.infer.validator.limits
    check_choices(server, body.n)
    check_at_most("top_logprobs", body.top_logprobs, limits.max_top_n_tokens, "--max-top-n-tokens", least=0)
    _refuse(body)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    parameters = from_openai(
        sampling,
        limits,
        max_new_tokens=asked,
        stop=body.stops,
        top_n_tokens=body.top_logprobs if body.logprobs else None,
    )
    tools = read_offer(server, body)
    rendering = _rendering(server, body, tools)
    return [Prompt(rendering, parameters, add_special_tokens=False, grammar=_grammar(server, body, tools))]


def _refuse(body: openai.ChatRequest) -> None:
    """Raises ToolError or ValidationError for what is part of OpenAI's API and not served here."""
    if body.functions or body.function_call is not None:
        name = "functions" if body.functions else "function_call"
        raise ToolError(f"`{name}` is not supported: it was replaced by `tools` and `tool_choice`", param=name)
    if body.modalities not in (None, [], ["text"]):
        raise ValidationError(
            f'`modalities` must be ["text"]: answers are text. Given: {body.modalities}', param="modalities"
        )
    for name in ("audio", "web_search_options"):
        if getattr(body, name) is not None:
            raise ValidationError(f"`{name}` is not supported: answers are text that the model writes", param=name)


def read_offer(server: Server, body: openai.ChatRequest) -> Offer | None:
    """The tools that may be called. Raises ToolError."""
    parallel = body.parallel_tool_calls is not False and server.dialect.parallel
    return offer.read(body.tools, body.tool_choice, parallel)


def _rendering(server: Server, body: openai.ChatRequest, tools: Offer | None) -> Callable[[], str]:
    """The chat template with its variables."""
    taste = server.dialect.taste
    messages = plain_messages(body.messages, taste)
    if tools is not None:
        messages = with_tools_as_text(messages, tools, body.tool_prompt, taste)
    given = set(body.chat_template_kwargs or ()) & _RESERVED
    if given:
        raise ValidationError(f"`chat_template_kwargs` may not contain `{min(given)}`", param="chat_template_kwargs")
    continues = continues_final_message(body)
    add_generation_prompt = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    if continues and add_generation_prompt:
        raise ValidationError(
            "`continue_final_message` and `add_generation_prompt` exclude each other", param="continue_final_message"
        )
    return lambda: server.template.render(
        messages,
        tools=tools.shown if tools is not None else None,
        documents=body.documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continues,
        variables=body.chat_template_kwargs,
    )


def _grammar(server: Server, body: openai.ChatRequest, tools: Offer | None) -> Callable[[str], Grammar | None] | None:
    """Makes what the answer must spell from the prompt, which may have begun the model's thoughts.

    Without grammars (`--disable-grammar-support`) tools can be offered all the same: calls that are none stay text.
    """
    if body.response_format is None and (tools is None or (server.config.disable_grammar_support and not tools.forced)):
        return None
    dialect, continues = server.dialect, continues_final_message(body)

    def made(prompt: str) -> Grammar | None:
        in_thoughts = dialect.marks is not None and is_open(dialect.marks, prompt, continues=continues)
        return answer_grammar(dialect, tools, from_response_format(body.response_format), in_thoughts=in_thoughts)

    return made


def continues_final_message(body: openai.ChatRequest) -> bool:
    """Whether the answer goes on with the final message: an assistant's is continued unless the request objects."""
    if body.continue_final_message is not None:
        return body.continue_final_message
    last: dict[str, Any] = body.messages[-1] if body.messages else {}
    return last.get("role") == "assistant" and bool(last.get("content")) and not body.add_generation_prompt


@dataclass(frozen=True, slots=True)
class Reading:
    """How the text of an answer is read."""

    dialect: Dialect
    tools: Offer | None
    continues: bool

    @property
    def is_plain(self) -> bool:
        """The text is the message's content as it is."""
        return self.tools is None and self.dialect.marks is None

    @property
    def visible_ids(self) -> frozenset[int]:
        """Special tokens whose text belongs to the generated text."""
        return self.dialect.visible if self.tools is None else self.dialect.visible_with_tools

    def parser(self, prompt: str) -> MessageParser:
        """For one choice. prompt: as it was rendered."""
        marks = self.dialect.marks
        thoughts = None
        if marks is not None:
            thoughts = ReasoningParser(marks, is_open=is_open(marks, prompt, continues=self.continues))
        if self.tools is None:
            return MessageParser(thoughts, None, None)
        calls = self.dialect.style.parser(self.tools.tools)
        return MessageParser(thoughts, calls, None if self.tools.parallel else 1)


def reading(server: Server, body: openai.ChatRequest) -> Reading:
    """Of the answer to `body`, which `prompts` has accepted."""
    return Reading(server.dialect, read_offer(server, body), continues_final_message(body))
