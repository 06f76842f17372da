"""Chat templates render what transformers' `apply_chat_template` renders, and cannot do harm."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from api_kit import tiny_tokenizer
from tgi_router import chat_template
from tgi_router.chat_template import ChatTemplate, load
from tgi_router.errors import StartupError, TemplateError

# Written here after the shapes that public models use; each exercises something else.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 2: system prompt folded into the first turn, roles must alternate": """
{%- if messages[0]['role'] == 'system' -%}
    {%- set rest = messages[1:] -%}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- else -%}
    {%- set rest = messages -%}
    {%- set system = '' -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set content = system + message['content'] if loop.first else message['content'] -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
    "llama 3: headers, trimmed content, date": """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- message.content | tojson + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "qwen: namespace, tools, reverse search, reasoning cut off": """
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last_user < 0 and message.role == 'user' %}
        {%- set ns.last_user = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last_user %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""",
    "blocks on their own lines: trim_blocks and lstrip_blocks decide": """
{% for message in messages %}
    {% if message['role'] == 'system' %}
    {% continue %}
    {% endif %}
    {% generation %}
<|{{ message['role'] }}|>
{{ message['content'] }}
    {% endgeneration %}
    {% if loop.index > 5 %}
        {% break %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
""",
    "gemma: model instead of assistant, first system message prefixed": """
{{ bos_token }}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else 'user' %}
{{ '<start_of_turn>' + role + '\n' + (message.content or '') | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
""",
    "mistral tools: dictionaries, sorting, selectattr, macros, documents": """
{%- macro show(value) %}{{ value | tojson(indent=2) }}{% endmacro %}
{{- bos_token }}
{%- for document in documents or [] %}[DOC]{{ document.title }}: {{ document.text }}{% endfor %}
{%- for message in messages | selectattr('role', 'ne', 'system') | list %}
{%- set parts = dict(role=message.role) %}
{{- '[' + parts.role | upper + ']' + show(message.content) }}
{%- for key, value in message.items() | sort %}{{ key }}={{ value | string | length }};{% endfor %}
{%- endfor %}
{%- if tools is not none %}{{ '[TOOLS]' + tools | map(attribute='function.name') | join(', ') }}{% endif %}
""",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "länge",
            "description": "a <b> & 'c'",
            "parameters": {"type": "object", "b": 1, "a": [1.5]},
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "ü", "y": [1, None, True]}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "  Hi there\n"}],
    "system": [{"role": "system", "content": "Be <brief> & 'kind'"}, {"role": "user", "content": "é 日本"}],
    "several turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm</think>\nb "},
        {"role": "user", "content": "c"},
    ],
    "tools": [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"r": 1}', "tool_call_id": "1", "name": "f"},
        {"role": "user", "content": "and?"},
    ],
    "reasoning": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "answer", "reasoning": "because"},
    ],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tokenizer of transformers."""
    import transformers
    from tokenizers import Tokenizer

    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tiny_tokenizer()), **SPECIAL)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_it_renders_what_transformers_renders(
    theirs: Any, template: str, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool
) -> None:
    documents = [{"title": "t", "text": "some text"}]
    options = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    ours = ChatTemplate({"default": template}, SPECIAL)
    try:
        expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError):  # the template refuses these messages
        with pytest.raises(TemplateError, match=r"Template error: "):
            ours.render(messages, **options)
    else:
        assert ours.render(messages, **options) == expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("final", ["The answer is", "ends with space ", "  begins so", "x"])
def test_a_final_message_continues_as_in_transformers(theirs: Any, template: str, final: str) -> None:
    messages = [{"role": "user", "content": "The answer?"}, {"role": "assistant", "content": final}]
    ours = ChatTemplate({"default": template}, SPECIAL)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    try:
        expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except ValueError:
        with pytest.raises(TemplateError):
            ours.render(messages, **options)
    else:
        assert ours.render(messages, **options) == expected


def test_a_final_message_in_parts_continues_in_its_last_text() -> None:
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text or '' }}|{% endfor %}{% endfor %}"
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    ours = ChatTemplate({"default": template}, {})
    assert ours.render(messages, add_generation_prompt=False, continue_final_message=True) == "a|b"
    with pytest.raises(TemplateError, match="no text"):
        ours.render([{"role": "assistant", "content": None}], continue_final_message=True)
    hides = ChatTemplate({"default": "nothing"}, {})
    with pytest.raises(TemplateError, match="does not show it"):
        hides.render(messages, continue_final_message=True)


def test_variables_of_the_request_reach_the_template_and_the_clock_is_there() -> None:
    ours = ChatTemplate({"default": "{{ enable_thinking }} {{ strftime_now('%Y') }} {{ bos_token }}"}, SPECIAL)
    rendered = ours.render([{"role": "user", "content": ""}], variables={"enable_thinking": False})
    assert rendered.startswith("False 2")
    assert rendered.endswith("<s>")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__class__ }}{{ dict.fromkeys('ab').__class__.__base__ }}",
        "{{ range(10000000) | list }}",
        "{{ ('%s' | format(messages)).__init__.__globals__.x }}",
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    ours = ChatTemplate({"default": attack}, {})
    with pytest.raises(TemplateError):
        ours.render([{"role": "user", "content": "x"}])


def test_output_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="longer than 1000 characters"):
        ChatTemplate({"default": endless}, {}, max_chars=1000).render([{"role": "user", "content": "x"}])
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.05)
    with pytest.raises(TemplateError, match="longer than"):
        ChatTemplate({"default": endless}, {}, max_chars=10**9).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}{% endset %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{% set x = m(40) %}",
    ],
    ids=["loops", "a block", "macros"],
)
def test_work_without_end_that_writes_nothing_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.05)
    with pytest.raises(TemplateError, match="rendering takes longer than"):
        ChatTemplate({"default": template}, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "expression",
    ["'a' * 9999999999", "9999999999 * [1]", "9 ** (9 ** 9)", "2 ** 99999", "messages * 9999999"],
)
def test_huge_values_are_refused_before_they_are_made(expression: str) -> None:
    ours = ChatTemplate({"default": "{{ " + expression + " }}"}, {})
    with pytest.raises(TemplateError, match="would be too large"):
        ours.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("operator", ["+", "~"])
def test_texts_that_double_are_stopped(operator: str) -> None:
    doubling = (
        f"{{% set n = namespace(s='ab') %}}{{% for i in range(60) %}}{{% set n.s = n.s {operator} n.s %}}{{% endfor %}}"
    )
    with pytest.raises(TemplateError, match="would be too large"):
        ChatTemplate({"default": doubling}, {}).render([{"role": "user", "content": "x"}])


def test_small_sums_and_products_are_jinjas() -> None:
    ours = ChatTemplate(
        {"default": "{{ 'ab' * 2 }}{{ 'a' + 'b' }}{{ 'a' ~ 1 ~ x }}{{ [1] + [2] }}{{ 2 ** 3 }}{{ 2.5 * 2 }}"}, {}
    )
    assert ours.render([]) == "abababa1[1, 2]85.0"


def test_messages_the_template_was_not_written_for_are_the_requests_fault() -> None:
    ours = ChatTemplate({"default": "{{ messages[0]['content'] + 1 }}"}, {})
    with pytest.raises(TemplateError, match="do not suit"):
        ours.render([{"role": "user", "content": "x"}])


def test_without_a_template_tgis_sentence_is_told() -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate({}, {}).render([{"role": "user", "content": "x"}])
    assert (caught.value.message, caught.value.status) == ("Template error: template not found", 422)


def test_a_template_that_does_not_compile_stops_the_start() -> None:
    with pytest.raises(StartupError, match="does not compile"):
        ChatTemplate({"default": "{% if %}"}, {})


def render(template: ChatTemplate, **options: Any) -> str:
    return template.render([{"role": "user", "content": "x"}], **options)


def test_sources_are_looked_for_in_order(tmp_path: Path) -> None:
    config: dict[str, Any] = {"chat_template": "config", "bos_token": {"content": "<b>"}}
    assert render(load(tmp_path, config, replaced=False)) == "config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert render(load(tmp_path, config, replaced=False)) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ bos_token }}")
    assert render(load(tmp_path, config, replaced=False)) == "jinja <b>"
    assert render(load(tmp_path, config, replaced=True)) == "config"
    assert render(load(tmp_path, {}, replaced=True)) == "jinja "
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    assert render(load(tmp_path, config, replaced=False), tools=TOOLS) == "with tools"


def test_a_list_of_templates_is_used_by_name(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = load(tmp_path, {"chat_template": templates}, replaced=False)
    assert render(template) == "plain"
    assert render(template, tools=TOOLS) == "tools"
    with pytest.raises(TemplateError, match="template not found"):
        render(load(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}]}, replaced=False))


def test_additional_templates_join_whatever_the_default_comes_from(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    config: dict[str, Any] = {"chat_template": "config"}
    assert render(load(tmp_path, config, replaced=False)) == "config"
    assert render(load(tmp_path, config, replaced=False), tools=TOOLS) == "with tools"
    assert render(load(tmp_path, config, replaced=True), tools=TOOLS) == "config"


def test_a_template_file_that_is_no_text_stops_the_start_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match=r"`chat_template.jinja` of the model cannot be read"):
        load(tmp_path, {}, replaced=False)
