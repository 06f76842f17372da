"""What is found out about a model at the start: its format of calls, marks around thoughts, what its template takes."""

from typing import Any

import pytest
from api_kit import tiny_tokenizer
from tgi_proto import generate_pb2 as pb
from tgi_router import dialect
from tgi_router.chat_template import ChatTemplate
from tgi_router.config import RouterConfig
from tgi_router.errors import StartupError
from tgi_router.metrics import Metrics
from tgi_router.reasoning import MARKS
from tgi_router.request import Token
from tgi_router.stream import Choice, Rules, Shared, Stream
from tgi_router.tokenizer import Tokenizer
from tgi_router.tools import FORMATS
from tgi_router.validation import Validated, ValidRequest
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

# Written here after the shapes of public models' templates.
LLAMA = """
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}Format: {"name": function name, "parameters": {}}.{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length > 1 %}{{ raise_exception("one call at a time, please") }}{%- endif %}
        {{- '{"name": "' + message.tool_calls[0].function.name + '"}' }}
    {%- else %}{{ message.content | trim }}{%- endif %}
{%- endfor %}
"""
QWEN = "{% if tools %}<tool_call>{% endif %}{{ messages[-1].content.split('</think>')[-1] }}<think>"
MISTRAL = """{% if tools %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}{% for message in messages %}
{%- for call in message.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have 9 letters") }}{% endif %}[TOOL_CALLS]
{%- endfor %}{% endfor %}"""


def tokenizer(*tokens: str) -> Tokenizer:
    library = LibraryTokenizer.from_str(tiny_tokenizer())
    library.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return Tokenizer(library, {})


def find(template: str, *tokens: str, **config: Any) -> dialect.Dialect:
    options = RouterConfig(model_dir="m", model_id="m", **config)
    return dialect.find(options, ChatTemplate({"default": template}, {}), tokenizer(*tokens))


def test_llamas_template_takes_one_call_at_a_time() -> None:
    found = find(LLAMA, "<|python_tag|>")
    assert found.style is FORMATS["llama3_json"]
    assert (found.parallel, found.marks) == (False, None)


def test_qwens_template_has_tags_around_calls_and_thoughts() -> None:
    found = find(QWEN)
    assert found.style is FORMATS["hermes"]
    assert found.marks == MARKS["deepseek"]
    assert found.parallel
    assert not found.taste.knows_developer


def test_mistrals_template_gets_ids_of_nine_letters() -> None:
    found = find(MISTRAL, "[TOOL_CALLS]")
    assert found.style is FORMATS["mistral"]
    assert (found.parallel, found.taste.id_length) == (True, 9)


def test_a_template_that_knows_no_tools_leaves_plain_json() -> None:
    found = find("{% for m in messages %}{{ m.content }}{% endfor %}the developer said <tool_call>")
    assert found.style is FORMATS["json"]
    assert (found.taste.knows_tools, found.taste.knows_developer) == (False, True)
    assert find("{{ messages }}", tool_call_parser="hermes").style is FORMATS["hermes"]
    with pytest.raises(StartupError, match="--tool-call-parser"):
        find("", tool_call_parser="yaml")
    with pytest.raises(StartupError, match="--reasoning-parser"):
        find("", reasoning_parser="yaml")


def test_special_tokens_that_a_parser_must_see_are_part_of_the_text() -> None:
    model = tokenizer("[TOOL_CALLS]", "<|other|>")
    found = find(MISTRAL, "[TOOL_CALLS]", "<|other|>")
    opening, other = model.token_id("[TOOL_CALLS]"), model.token_id("<|other|>")
    assert opening is not None
    assert other is not None
    assert (found.visible_with_tools, found.visible) == ({opening}, frozenset())
    ids = [*model.encode("Hi", add_special_tokens=False), other, opening, *model.encode("[{", add_special_tokens=False)]
    assert text_of(model, ids, found.visible_with_tools) == "Hi[TOOL_CALLS][{"
    assert text_of(model, ids, found.visible) == "Hi[{"


def text_of(model: Tokenizer, ids: list[int], visible: frozenset[int]) -> str:
    """What a chat's choice makes of generated tokens."""
    request = ValidRequest(token_ids=(5,), max_new_tokens=len(ids), sampling=pb.SamplingParameters())
    stream = Stream(streaming=False)
    shared = Shared(model.vocabulary, frozenset(), Metrics())
    choice = Choice(Validated(request, "", (), None), stream, shared, Rules(keep_stop=False, visible_ids=visible))
    for token_id in ids:
        choice.token(Token(token_id, -1.0))
    return choice.text
