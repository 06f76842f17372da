"""POST /v1/chat/completions, streamed and not."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from aiohttp import web

from .. import sse
from ..bodies import json_response, timing_headers
from ..errors import ToolError, ValidationError, WrongShape
from ..openai_answers import Identity, chat_logprob, check_at_most, finish_reason, usage
from ..openai_requests import Understood, understand
from ..parameters import from_openai
from ..schemas import openai
from ..server import Server
from ..stream import Choice, GeneratedToken, Stream
from ..validation import Prompt

routes = web.RouteTableDef()

decoder = msgspec.json.Decoder(openai.ChatRequest)
_encode = msgspec.json.encode

# Template variables that a request's chat_template_kwargs may not replace.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)


@routes.post("/v1/chat/completions")
async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The assistant's next message."""
    asked = await understand(request, decoder, prompts)
    answer, opened = begin_answer(asked)
    if asked.body.stream:
        return await sse.respond(request, opened, answer)
    async with opened as stream:
        await stream.finish()
        choices = stream.choices
    return json_response(answer.whole(choices), timing_headers(request, choices[:1], asked.call))


def begin_answer(asked: Understood[openai.ChatRequest]) -> tuple["Answer", AbstractAsyncContextManager[Stream]]:
    """The answer to be made and the generations it is made of, not yet begun. gRPC's chat begins here, too."""
    copies = asked.body.n or 1
    opened = asked.server.infer.open(asked.prompts, asked.rules, asked.call, copies=copies)
    return Answer(asked.server, asked.body, copies), opened


def prompts(server: Server, body: openai.ChatRequest, sampling: msgspec.Struct) -> list[Prompt]:
    """What the request asks for. Raises ValidationError or ToolError for what cannot be had."""
    body.refuse()
    _refuse_tools(body)
    limits = server.infer.validator.limits
    check_at_most("n", body.n, limits.max_best_of, "--max-best-of", least=1)
    check_at_most("top_logprobs", body.top_logprobs, limits.max_top_n_tokens, "--max-top-n-tokens", least=0)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    parameters = from_openai(
        sampling,
        limits,
        max_new_tokens=asked,
        stop=body.stops,
        top_n_tokens=body.top_logprobs if body.logprobs else None,
    )
    return [Prompt(_rendering(server, body), parameters, add_special_tokens=False)]


def _rendering(server: Server, body: openai.ChatRequest) -> Callable[[], str]:
    """The chat template with its variables. An assistant's final message is continued unless the request objects."""
    messages = [_template_message(index, message) for index, message in enumerate(body.messages)]
    if not messages:
        raise ValidationError("`messages` cannot be empty", param="messages")
    given = set(body.chat_template_kwargs or ()) & _RESERVED
    if given:
        raise ValidationError(f"`chat_template_kwargs` may not contain `{min(given)}`", param="chat_template_kwargs")
    last = messages[-1]
    continues = body.continue_final_message
    if continues is None:
        continues = last["role"] == "assistant" and bool(last.get("content")) and not body.add_generation_prompt
    add_generation_prompt = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    if continues and add_generation_prompt:
        raise ValidationError(
            "`continue_final_message` and `add_generation_prompt` exclude each other", param="continue_final_message"
        )
    return lambda: server.template.render(
        messages,
        documents=body.documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continues,
        variables=body.chat_template_kwargs,
    )


def _refuse_tools(body: openai.ChatRequest) -> None:
    if body.tools and body.tool_choice != "none":
        raise ToolError('`tools` are not supported yet. Leave them out, or send `tool_choice`: "none"', param="tools")
    if body.functions:
        raise ToolError("`functions` are not supported: they were replaced by `tools`", param="functions")


def _template_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: text parts joined, arguments of tool calls as objects, nulls left out."""
    place = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise WrongShape(f"{place}.role: Expected `str`")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise WrongShape(f"{place}: missing field `content`")
    result = {name: value for name, value in message.items() if value is not None}
    result["content"] = _text(place, content)
    if "tool_calls" in result:
        result["tool_calls"] = _tool_calls(place, result["tool_calls"])
    return result


def _text(place: str, content: Any) -> str | None:
    """The text of a message's content; parts are joined without a separator, as in TGI."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise WrongShape(f"{place}.content: Expected `str | array | null`")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind in ("text", "input_text") else None
        if not isinstance(text, str):
            raise ValidationError(
                f"`{place}.content[{number}]` must be of type 'text': this model reads nothing else. Given: {kind!r}",
                param="messages",
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Clients send arguments as JSON text; templates were written for objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise WrongShape(f"{place}.tool_calls: Expected `array` of `object`")
    return [{**call, "function": _function(call["function"])} if "function" in call else call for call in calls]


def _function(function: Any) -> Any:
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:  # the model wrote it: shown as it is
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


class Answer:
    """Makes the answer to one request, whole or as events."""

    terminator = b"data: [DONE]\n\n"

    def __init__(self, server: Server, body: openai.ChatRequest, copies: int) -> None:
        self._identity = Identity(server, "chatcmpl", body.model)
        self._vocabulary = server.tokenizer.vocabulary
        self._logprobs = bool(body.logprobs)
        self._num_top = body.top_logprobs or 0
        self._copies = copies
        self._usage_at_end = body.include_usage
        self._usage_always = body.continuous_usage
        self._num_tokens = 0  # in chunks so far
        identity = self._identity
        self._head = (
            b'data: {"object":"chat.completion.chunk","id":%b,"created":%d,"model":%b,"system_fingerprint":%b,'
            % (
                _encode(identity.id),
                identity.created,
                _encode(identity.model),
                _encode(identity.system_fingerprint),
            )
        )

    def whole(self, choices: Sequence[Choice]) -> openai.ChatCompletion:
        """The answer of a request that does not stream."""
        identity = self._identity
        return openai.ChatCompletion(
            object="chat.completion",
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=[
                openai.ChatChoice(
                    index=choice.index,
                    message=openai.Message(role="assistant", content=choice.text),
                    logprobs=self._chat_logprobs(choice.tokens),
                    finish_reason=finish_reason(choice),
                )
                for choice in choices
            ],
            usage=usage(choices, self._copies),
        )

    def render(self, choice: Choice, token: GeneratedToken) -> bytes:
        """One chunk. The role stands in each choice's first only: OpenAI's clients concatenate it."""
        role = b""
        if not choice.started:
            choice.started = True
            role = b'"role":"assistant",'
        reason = _encode(finish_reason(choice)) if token is choice.last_token else b"null"
        logprobs = _encode(self._chat_logprobs([token])) if self._logprobs else b"null"
        self._num_tokens += 1
        so_far = b"null"
        if self._usage_always:
            so_far = _encode(usage(choice.siblings, self._copies, self._num_tokens))
        return (
            b'%b"choices":[{"index":%d,"delta":{%b"content":%b},"logprobs":%b,"finish_reason":%b}],"usage":%b}\n\n'
        ) % (self._head, choice.index, role, _encode(token.shown), logprobs, reason, so_far)

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage, when it was asked for."""
        if not self._usage_at_end:
            return b""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._head, _encode(usage(choices, self._copies)))

    def _chat_logprobs(self, tokens: Sequence[GeneratedToken]) -> openai.ChatLogprobs | None:
        if not self._logprobs:
            return None
        return openai.ChatLogprobs([chat_logprob(self._vocabulary, token, self._num_top) for token in tokens])
