"""Which tools a request offers, and whether one of them must be called: `tools`, `tool_choice`, `parallel_tool_calls`.

Takes OpenAI's forms and TGI's (a function's bare name; `arguments` instead of `parameters`). Every mistake is a
ToolError that names the parameter. Called by chat_requests.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ToolError
from .base import Tool

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FORMS = '"none", "auto", "required", the name of a function, or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True, slots=True)
class Offer:
    """What the model may call.

    tools: callable ones. shown: all tools of the request, as the chat template shows them. forced: at least one call
    must be made. parallel: there may be several.
    """

    tools: tuple[Tool, ...]
    shown: list[dict[str, Any]]
    forced: bool
    parallel: bool


def read(tools: Sequence[dict[str, Any]] | None, choice: Any, parallel: bool = True) -> Offer | None:
    """The offer, None when nothing may be called. Raises ToolError."""
    offered, shown = _tools(tools or [])
    mode, names = _choice(choice)
    if mode == "none":
        return None
    if not offered:
        if mode == "auto":
            return None
        raise ToolError(f"`tool_choice` needs `tools`. Given: {choice!r} and no tools", param="tool_choice")
    for name in names or ():
        if name not in offered:
            raise ToolError(f"Tool with name {name} not found", param="tool_choice")
    callable_tools = [tool for name, tool in offered.items() if names is None or name in names]
    named = mode == "named"
    return Offer(
        tools=tuple(callable_tools),
        shown=shown,
        forced=named or mode == "required",
        parallel=parallel and not named,
    )


def _tools(tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Tool], list[dict[str, Any]]]:
    if len(tools) > MAX_TOOLS:
        raise ToolError(f"`tools` must have at most {MAX_TOOLS} entries. Given: {len(tools)}", param="tools")
    offered: dict[str, Tool] = {}
    shown = []
    for index, given in enumerate(tools):
        place = f"tools[{index}]"
        function = _function(given, place)
        tool = _tool(function, place)
        if tool.name in offered:
            raise ToolError(f"`{place}.function.name` is used twice. Given: {tool.name!r}", param=place)
        offered[tool.name] = tool
        others = {key: value for key, value in function.items() if key not in ("parameters", "arguments")}
        shown.append({**given, "function": {**others, "parameters": tool.parameters}})
    return offered, shown


def _function(given: dict[str, Any], place: str) -> dict[str, Any]:
    kind = given.get("type", "function")
    if kind != "function":
        raise ToolError(f"`{place}.type` must be 'function'. Given: {kind!r}", param=place)
    function = given.get("function")
    if not isinstance(function, dict):
        raise ToolError(f"`{place}.function` must be an object", param=place)
    return function


def _tool(function: dict[str, Any], place: str) -> Tool:
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolError(
            f"`{place}.function.name` must have 1 to 64 letters, digits, `_`, `-` or `.`. Given: {name!r}",
            param=f"{place}.function.name",
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = function.get("arguments")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ToolError(
            f"`{place}.function.parameters` must be a JSON schema of an object", param=f"{place}.function.parameters"
        )
    return Tool(name, parameters, strict=function.get("strict") is True)


def _choice(choice: Any) -> tuple[str, list[str] | None]:
    """`none`, `auto`, `required` or `named`, and the names that may be called (None: all)."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        return (choice, None) if choice in ("none", "auto", "required") else ("named", [choice])
    if isinstance(choice, dict):
        kind = choice.get("type", "function")
        if kind == "allowed_tools":
            return _allowed(choice.get("allowed_tools"))
        name = _name(choice)
        if kind == "function" and name is not None:
            return "named", [name]
    raise ToolError(f"`tool_choice` must be {_FORMS}. Given: {choice!r}", param="tool_choice")


def _allowed(allowed: Any) -> tuple[str, list[str] | None]:
    """OpenAI's subset of tools, with a mode of its own."""
    mode = allowed.get("mode") if isinstance(allowed, dict) else None
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    names = [_name(tool) if isinstance(tool, dict) else None for tool in tools] if isinstance(tools, list) else []
    known = [name for name in names if name is not None]
    if mode not in ("auto", "required") or not known or len(known) < len(names):
        raise ToolError(
            '`tool_choice.allowed_tools` must be {"mode": "auto" or "required", "tools": [{"type": "function", '
            '"function": {"name": ...}}, ...]}',
            param="tool_choice",
        )
    return mode, known


def _name(choice: dict[str, Any]) -> str | None:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
