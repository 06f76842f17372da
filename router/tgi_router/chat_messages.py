"""A chat request's messages as chat templates expect them. Templates were written for transformers' plain form.

That is: content is text, arguments of tool calls are objects, what is null or empty is left out. A template that
cannot show tools gets them as text. Pure. Called by chat_requests.py; chat_template.py renders.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ValidationError, WrongShape
from .tools.offer import Offer

Message = dict[str, Any]

_TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal"}  # type of a part -> its field
_TOOL_PROMPT = (
    "You may call these functions. To call one, answer with nothing but a JSON object of the form "
    '{"name": its name, "parameters": an object with its arguments}. If none of them helps, answer in words.'
)


@dataclass(frozen=True, slots=True)
class Taste:
    """What the model's chat template can be given.

    knows_tools: it shows `tools` and tool calls. knows_developer: the role. id_length: see ToolFormat.
    """

    knows_tools: bool
    knows_developer: bool
    id_length: int | None


def plain_messages(messages: Sequence[Message], taste: Taste) -> list[Message]:
    """The messages of a request. Raises WrongShape or ValidationError."""
    if not messages:
        raise ValidationError("`messages` cannot be empty", param="messages")
    names: dict[str, str] = {}  # of called functions, by the call's id
    result = []
    for index, given in enumerate(messages):
        message = _plain(f"messages[{index}]", given, taste)
        for call in message.get("tool_calls", ()):
            names[str(call.get("id"))] = str(call.get("function", {}).get("name"))
        if message["role"] == "tool" and "name" not in message and str(message.get("tool_call_id")) in names:
            message["name"] = names[str(message["tool_call_id"])]
        result.append(message if taste.knows_tools else _without_tools(message))
    return result


def with_tools_as_text(messages: list[Message], offer: Offer, tool_prompt: str | None, taste: Taste) -> list[Message]:
    """`messages` with what the template does not say about tools, in the last one that is not the assistant's (TGI's).

    tool_prompt: the client's own words. Nothing is added when there are none and the template shows tools.
    """
    if taste.knows_tools and not tool_prompt:
        return messages
    places = [i for i, one in enumerate(messages) if one["role"] != "assistant" and isinstance(one["content"], str)]
    if not places:
        return messages
    tools = "" if taste.knows_tools else json.dumps([tool["function"] for tool in offer.shown], ensure_ascii=False)
    added = "\n".join(part for part in (tools, tool_prompt or _TOOL_PROMPT) if part)
    last = messages[places[-1]]
    told = {**last, "content": f"{last['content']}\n---\n{added}"}
    return [*messages[: places[-1]], told, *messages[places[-1] + 1 :]]


def _plain(place: str, given: Message, taste: Taste) -> Message:
    role = given.get("role")
    if not isinstance(role, str):
        raise WrongShape(f"{place}.role: Expected `str`")
    content = given.get("content")
    if content is None and not given.get("tool_calls"):
        raise WrongShape(f"{place}: missing field `content`")
    message = {name: value for name, value in given.items() if value is not None}
    message["content"] = _text(place, content)
    if role == "developer" and not taste.knows_developer:
        message["role"] = "system"
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    if "tool_calls" in message:
        message["tool_calls"] = [_call(place, call, taste) for call in _list(place, message["tool_calls"])]
    if "tool_call_id" in message:
        message["tool_call_id"] = _id(message["tool_call_id"], taste)
    return message


def _text(place: str, content: Any) -> str | None:
    """The text of a message's content; parts are joined without a separator, as in TGI."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise WrongShape(f"{place}.content: Expected `str | array | null`")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise ValidationError(
                f"`{place}.content[{number}]` must be of type 'text': this model reads nothing else. Given: {kind!r}",
                param="messages",
            )
        texts.append(text)
    return "".join(texts)


def _list(place: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise WrongShape(f"{place}.tool_calls: Expected `array` of `object`")
    if not all(isinstance(call.get("function", {}), dict) for call in calls):
        raise WrongShape(f"{place}.tool_calls: Expected `object` as `function`")
    return calls


def _call(place: str, call: dict[str, Any], taste: Taste) -> dict[str, Any]:
    """A tool call. Clients send its arguments as JSON text; templates were written for objects."""
    result = dict(call)
    if "id" in call:
        result["id"] = _id(call["id"], taste)
    if "function" in call:
        function = dict(call["function"])
        if "arguments" not in function and "parameters" in function:
            function["arguments"] = function.pop("parameters")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"])
        result["function"] = function
    return result


def _arguments(text: str) -> Any:
    if not text.strip():
        return {}
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):  # the model wrote it: shown as it is
        return text
    return arguments if isinstance(arguments, dict) else text


def _id(given: Any, taste: Taste) -> Any:
    """`given`, or what stands for it where the template demands ids of a certain length."""
    if not isinstance(given, str) or taste.id_length is None:
        return given
    if len(given) == taste.id_length and given.isascii() and given.isalnum():
        return given
    return hashlib.sha256(given.encode(errors="surrogatepass")).hexdigest()[: taste.id_length]


def _without_tools(message: Message) -> Message:
    """For templates that show neither calls nor results: both as text."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of {message.get('name', 'the call')}: {message['content']}"}
    if "tool_calls" not in message:
        return message
    functions = [call.get("function", {}) for call in message["tool_calls"]]
    calls = [
        json.dumps({"name": function.get("name"), "parameters": function.get("arguments")}, ensure_ascii=False)
        for function in functions
    ]
    text = "\n".join([*([message["content"]] if message["content"] else []), *calls])
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}
