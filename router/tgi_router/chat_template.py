"""Chat templates: messages to the prompt's text, rendered as transformers' `apply_chat_template` renders them.

A template comes with the model, so it is untrusted code: it runs in Jinja's immutable sandbox, sees plain JSON values
only, and is stopped when its output grows beyond any prompt or it takes too long. Sources, first found wins:
`--tokenizer-config-path`, chat_template.jinja, chat_template.json, tokenizer_config.json (a string, or a list of named
templates of which `default` is used, `tool_use` when there are tools). additional_chat_templates/
adds to each but the flag's. Called by chat_requests.py, on a worker thread.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.utils import Namespace
from tgi_proto.model_files import read_file

from .errors import StartupError, TemplateError
from .template_sandbox import BoundedSandbox
from .tokenizer import SPECIAL_NAMES, read_json, token_name

_MAX_SECONDS = 3.0  # a long chat takes some 10 ms
_TAG = "<<<the final message continues here>>> "  # found again after rendering; the space shows whether it was trimmed
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """The template's `dict`: can be called, has no attributes that lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """The template's `namespace`: refuses names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escaping for HTML, which is not what models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> BoundedSandbox:
    environment = BoundedSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


class ChatTemplate:
    """The compiled templates of a model."""

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any], max_chars: int = 4_000_000) -> None:
        """sources: name -> text, with `default`. variables: what every rendering sees, e.g. bos_token.

        max_chars: longest output. Raises StartupError when a template does not compile.
        """
        environment = self._environment = _environment()
        self._sources = dict(sources)
        self._names: dict[str, frozenset[str]] = {}  # variables each template reads
        self._variables = dict(variables)
        self._max_chars = max_chars
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_timed(source)
                self._names[name] = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            except jinja2.TemplateSyntaxError as error:
                raise StartupError(
                    f"The model's chat template {name!r} does not compile: {error.message} (line {error.lineno})"
                ) from error
            except RecursionError as error:
                raise StartupError(f"The model's chat template {name!r} is nested too deeply") from error

    def source(self, *, with_tools: bool) -> str:
        """The template's own text, "" when there is none. with_tools: of requests that offer tools."""
        return self._sources.get(self._name(with_tools=with_tools), "")

    def knows(self, variable: str, *, with_tools: bool) -> bool:
        """Whether the template reads `variable`."""
        return variable in self._names.get(self._name(with_tools=with_tools), ())

    def _name(self, *, with_tools: bool) -> str:
        return "tool_use" if with_tools and "tool_use" in self._templates else "default"

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. continue_final_message: it ends within the last message. Raises TemplateError.

        All values are plain JSON ones (str, int, float, bool, None, list, dict).
        """
        name = self._name(with_tools=tools is not None)
        if name not in self._templates:
            raise TemplateError("template not found")
        messages = [_with_reasoning(_without_nulls(message)) for message in messages]
        if continue_final_message:
            messages, final = _tagged(messages)
        rendered = self._guarded(
            self._templates[name],
            {
                **self._variables,
                **(variables or {}),
                "messages": messages,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_at_tag(rendered, final) if continue_final_message else rendered

    def _guarded(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Renders piece by piece, within the limits."""
        pieces: list[str] = []
        room = self._max_chars
        self._environment.start_clock(_MAX_SECONDS)
        try:
            for piece in _pieces(template, variables):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateError(f"the rendered prompt is longer than {self._max_chars} characters")
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
            # what a template's own operations raise on messages it was not written for
            raise TemplateError(f"the messages do not suit the model's chat template: {error}") from error
        return "".join(pieces)


def _pieces(template: jinja2.Template, variables: dict[str, Any]) -> Iterator[str]:
    return template.generate(variables)


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Templates take a missing key for nothing; a null, such as the content beside tool calls, they write out."""
    return {name: value for name, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning comes under several names; templates read `reasoning_content`, some `thinking`."""
    reasoning = next((message[name] for name in _REASONING_NAMES if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tagged(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """`messages` with the tag after the last one's text, and that text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return [*messages[:-1], {**messages[-1], "content": content + _TAG}], content
    content = content if isinstance(content, list) else []
    for index in range(len(content) - 1, -1, -1):
        text = content[index].get("text")
        if text is not None:
            parts = [*content[:index], {**content[index], "text": text + _TAG}, *content[index + 1 :]]
            return [*messages[:-1], {**messages[-1], "content": parts}], text
    raise TemplateError("the final message has no text that could be continued")


def _cut_at_tag(rendered: str, final: str) -> str:
    """What stands before the tag; trimmed when the template trimmed the message."""
    place = rendered.rfind(_TAG.strip())
    if place < 0 or final.strip() not in rendered:
        raise TemplateError("the final message cannot be continued: the chat template does not show it as it is")
    before = rendered[:place]
    return before if rendered[place : place + len(_TAG)] == _TAG else before.rstrip()


def _named_templates(value: Any) -> dict[str, str] | None:
    """The templates in a `chat_template` field: a string, or a list of {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return None
    for item in value:
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("name", "template")):
            raise StartupError("`chat_template` of the model must be a text, or a list of objects {name, template}")
    return {item["name"]: item["template"] for item in value}


def load(model_dir: Path, tokenizer_config: dict[str, Any], *, replaced: bool) -> ChatTemplate:
    """The model's templates; without any, rendering raises TemplateError.

    tokenizer_config: the parsed file; replaced: it is the one of --tokenizer-config-path, which then comes first.
    """
    own = _named_templates(tokenizer_config.get("chat_template"))
    variables = {name: token for name in SPECIAL_NAMES if (token := token_name(tokenizer_config.get(name))) is not None}
    readers: list[Callable[[], dict[str, str] | None]] = [
        lambda: own if replaced else None,
        lambda: _jinja_file(model_dir),
        lambda: _named_templates(read_json(model_dir / "chat_template.json").get("chat_template")),
        lambda: own,
    ]
    sources = next((found for reader in readers if (found := reader())), {})
    if not (replaced and own):
        sources = sources | _additional_files(model_dir)
    return ChatTemplate(sources, variables)


def _jinja_file(model_dir: Path) -> dict[str, str] | None:
    main = model_dir / "chat_template.jinja"
    return {"default": _read_template(main)} if main.is_file() else None


def _additional_files(model_dir: Path) -> dict[str, str]:
    """additional_chat_templates/NAME.jinja. Beside a `default` of another source, which transformers would forget."""
    folder = model_dir / "additional_chat_templates"
    return {path.name.removesuffix(".jinja"): _read_template(path) for path in sorted(folder.glob("*.jinja"))}


def _read_template(path: Path) -> str:
    try:
        return read_file(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"The chat template `{path.name}` of the model cannot be read: {error}") from error
