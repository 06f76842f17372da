"""Grammars are compiled in a process of their own: kept, tried, and stopped when they cost too much."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import VOCAB, write_model
from tgi_proto.grammar import load_tokenizer, make_matcher
from tgi_router import grammars
from tgi_router.errors import ApiError, InternalError, ValidationError
from tgi_router.grammar_compiler import GrammarCompiler, Trial
from tgi_router.grammars import Grammar


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def compiling(model_dir: Path) -> AsyncIterator[GrammarCompiler]:
    compiler = GrammarCompiler(Trial(model_dir, VOCAB, (1,)))
    try:
        yield compiler
    finally:
        await compiler.close()


def schema(value: Any) -> Grammar:
    return grammars.from_json_schema(value)


async def refusal(compiler: GrammarCompiler, grammar: Grammar) -> str:
    with pytest.raises(ValidationError) as caught:
        await compiler.compile(grammar)
    assert caught.value.param == grammar.param
    return caught.value.message.removeprefix("Input validation error: ")


def accepts(model_dir: Path, compiled: str, text: str) -> bool:
    tokenizer = load_tokenizer(model_dir, VOCAB, [1])
    matcher = make_matcher(tokenizer, compiled)
    assert not matcher.is_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


async def test_what_is_compiled_is_what_was_asked_for(model_dir: Path) -> None:
    person = {
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
    }
    async with compiling(model_dir) as compiler:
        compiled = await compiler.compile(schema(person))
        regex = await compiler.compile(grammars.from_regex(r'\d+/"\n'))
        lark = await compiler.compile(grammars.from_lark('start: "a" /b+/'))
    assert accepts(model_dir, compiled, '{"name":"é","age":3}')
    assert accepts(model_dir, compiled, '{ "name" : "é" }')
    assert not accepts(model_dir, compiled, '{"age":3}')
    assert not accepts(model_dir, compiled, '{"name":"é","more":3}')  # closed, as in TGI
    assert not accepts(model_dir, compiled, '{  "name":"é"}')  # one space at most, as in TGI
    assert not accepts(model_dir, compiled, "3")  # an object, as in TGI, though the schema does not say so
    assert accepts(model_dir, regex, '12/"\n')
    assert not accepts(model_dir, regex, '٣/"\n')  # digits are ASCII, as in TGI
    assert accepts(model_dir, lark, "abb")


async def test_a_schema_cannot_change_how_it_is_compiled(model_dir: Path) -> None:
    lenient = {"type": "string", "not": {"const": "x"}, "x-guidance": {"lenient": True}}
    async with compiling(model_dir) as compiler:
        assert "not" in await refusal(compiler, schema(lenient))


BAD = [
    (Grammar("regex", "(a"), "grammar is not valid: "),
    (Grammar("regex", "(?=a)b"), "grammar is not valid: "),
    (Grammar("regex", "[z-a]"), "grammar is not valid: "),
    (Grammar("lark", 'start: "a" | b'), "grammar is not valid: "),
    (schema({"type": "nothing"}), "grammar is not valid: Invalid type: nothing"),
    (schema({"properties": 3}), ""),
    (schema({"pattern": "(?!x)["}), "grammar is not valid: regex parse error"),
    (schema({"$ref": "https://example.com/schema"}), "cannot compile regex from schema: "),
    (schema({"$ref": "#/$defs/missing"}), "cannot compile regex from schema: "),
    (schema({"$ref": "#"}), "cannot compile regex from schema: no text is possible under it"),
    (schema({"type": "integer", "minimum": 2, "maximum": 1}), "cannot compile regex from schema: Unsatisfiable"),
    (schema({"uniqueItems": True, "type": "array"}), "cannot compile regex from schema: Unimplemented keys"),
    (schema({"enum": []}), ""),
    (Grammar("regex", "a\ud800"), "grammar is not valid: "),
    # What costs too much, past the checks of its size:
    (Grammar("regex", "(((a{100}){100}){100}){100}"), "grammar is not valid: compiling it takes more than 0.6 s"),
    (schema({"type": "integer", "multipleOf": 1_000_003}), "grammar is not valid: compiling it takes more than"),
    (schema({"properties": {f"p{i}": {} for i in range(5000)}}), ""),
    (schema({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(20)]}), ""),
]


async def test_a_bad_grammar_is_refused_with_its_reason(model_dir: Path) -> None:
    async with compiling(model_dir) as compiler:  # one, because a process takes long to start
        for grammar, sentence in BAD:
            reason = await refusal(compiler, grammar)
            assert reason.startswith(sentence), grammar
            assert len(reason) < 500
            assert "\n" not in reason


async def test_a_costly_grammar_gets_a_second_try(model_dir: Path) -> None:
    async with compiling(model_dir) as compiler:
        costly = await compiler.compile(schema({"type": "integer", "multipleOf": 1003}))
    assert accepts(model_dir, costly, "2006")
    assert not accepts(model_dir, costly, "2007")


async def test_a_crowd_of_hostile_grammars_neither_stops_the_loop_nor_the_others(model_dir: Path) -> None:
    hostile = [schema({"type": "integer", "multipleOf": 1_000_003 + i}) for i in range(50)]
    honest = [schema({"properties": {f"p{i}": {"type": "integer"}}}) for i in range(5)]
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()  # of this thread alone, so that a busy machine does not matter
            longest, last = max(longest, now - last), now

    async with compiling(model_dir) as compiler:
        watching = asyncio.create_task(watch())
        outcomes = await asyncio.gather(*(compiler.compile(one) for one in (*hostile, *honest)), return_exceptions=True)
        watching.cancel()
    assert all(isinstance(outcome, ValidationError) for outcome in outcomes[:50])
    assert all(isinstance(outcome, str) for outcome in outcomes[50:])
    assert longest < 0.05


async def test_equal_grammars_are_compiled_once_and_kept(model_dir: Path) -> None:
    bad, good = Grammar("regex", "(a"), Grammar("regex", "a+")
    async with compiling(model_dir) as compiler:
        first = await asyncio.gather(*(compiler.compile(good) for _ in range(20)))
        await refusal(compiler, bad)
        process = compiler._process
        assert process is not None
        asked = next(process._numbers) - 1
        assert asked == 2
        assert await compiler.compile(Grammar("regex", "a+", "response_format")) == first[0]
        await refusal(compiler, bad)
        assert next(process._numbers) == asked + 2
    assert len(set(first)) == 1


async def test_what_was_not_used_for_long_is_forgotten(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi_router.grammar_compiler.CACHE_BYTES", 1000)
    async with compiling(model_dir) as compiler:
        for text in ("a", "b", "a", "c", "d"):
            await compiler.compile(Grammar("regex", text))
        kept = [text for _, text in compiler._cache]
        assert kept[-1] == "d"
        assert "b" not in kept
        assert compiler._cached_bytes <= 1000


async def test_one_who_leaves_does_not_take_the_grammar_from_the_others(model_dir: Path) -> None:
    grammar = Grammar("regex", "a+")
    async with compiling(model_dir) as compiler:
        leaving = asyncio.create_task(compiler.compile(grammar))
        staying = asyncio.create_task(compiler.compile(grammar))
        await asyncio.sleep(0)
        leaving.cancel()
        assert accepts(model_dir, await staying, "aa")


async def test_a_process_that_dies_is_started_again(model_dir: Path) -> None:
    async with compiling(model_dir) as compiler:
        await compiler.compile(Grammar("regex", "a"))
        process = compiler._process
        assert process is not None
        os.kill(trial_pid(), signal.SIGKILL)
        lost = [compiler.compile(Grammar("regex", text)) for text in "bc"]
        outcomes = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(outcome, InternalError | str) for outcome in outcomes)
        await process.close()
        assert await compiler.compile(Grammar("regex", "d"))


def trial_pid() -> int:
    """Of the trial process this one has started."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"grammar_trial" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("no trial process")


async def test_a_tokenizer_that_llguidance_cannot_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "nothing"}}))
    async with compiling(tmp_path) as compiler:
        with pytest.raises(ApiError, match="grammar is not supported: llguidance cannot use the model's"):
            await compiler.compile(Grammar("regex", "a"))


async def test_grammars_can_be_switched_off() -> None:
    compiler = GrammarCompiler(None)
    assert await refusal(compiler, Grammar("regex", "a")) == (
        "grammar is not supported: the server was started with `--disable-grammar-support`"
    )
    await compiler.close()
