"""The router as a process: start, what it reports, signals, exit codes; and how the limits are derived."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from api_kit import EOS, VOCAB, write_model
from fake_shard import FakeConfig, FakeGroup
from tgi_proto.argv import to_argv
from tgi_router.batcher import Batcher
from tgi_router.cli import derive_limits, start
from tgi_router.config import RouterConfig
from tgi_router.errors import StartupError
from tgi_router.metrics import Metrics

CONFIG = RouterConfig(model_dir="/m", model_id="m")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Router:
    """A router process and its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.records: list[dict[str, Any]] = []

    async def read_until(self, **fields: Any) -> dict[str, Any]:
        """The first further record that has `fields`. Fails when the process ends before."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := await self.process.stdout.readline():
                self.records.append(json.loads(line))
                if fields.items() <= self.records[-1].items():
                    return self.records[-1]
        raise AssertionError(f"the router ended: {self.records}")

    async def exit_code(self) -> int:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := await self.process.stdout.readline():
                self.records.append(json.loads(line))
            return await self.process.wait()

    def messages(self) -> str:
        return "\n".join(record["message"] for record in self.records)


@contextlib.asynccontextmanager
async def router(
    folder: Path, shard: FakeConfig | None = None, **changes: Any
) -> AsyncIterator[tuple[Router, FakeGroup]]:
    """A router process on a fake shard in this process. shard: None = there is none yet."""
    config = replace(
        RouterConfig(model_dir=str(write_model(folder / "model")), model_id="tiny", hostname="127.0.0.1"), **changes
    )
    group = FakeGroup(str(folder / "shard"), shard or FakeConfig(vocab=VOCAB - 1, eos=EOS, num_blocks=256))
    if shard is not None:
        await group.start()
    config = replace(
        config, master_shard_uds_path=group.master_path, port=config.port if changes.get("port") else free_port()
    )
    command = [sys.executable, "-c", "from tgi_router.cli import main; main()", *to_argv(config)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        yield Router(process), group
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await group.stop()


@contextlib.asynccontextmanager
async def stream(address: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """A stream that has begun."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{address}/generate_stream", json={"inputs": "hello"}) as response,
    ):
        await response.content.readline()
        yield response


SHARD = FakeConfig(vocab=VOCAB - 1, eos=VOCAB + 7, num_blocks=256, max_model_tokens=256)


async def test_it_reports_serving_and_drains_on_a_signal(tmp_path: Path) -> None:
    metrics_port = free_port()
    async with router(tmp_path, replace(SHARD, step_ms=5.0), prometheus_port=metrics_port) as (process, _):
        address = (await process.read_until(event="serving"))["address"]
        assert "Connected" in process.messages()
        async with aiohttp.ClientSession() as http:
            assert (await http.get(f"{address}/health")).status == 200
            metrics = f"http://127.0.0.1:{metrics_port}"
            assert "tgi_request_count 0" in await (await http.get(f"{metrics}/metrics")).text()
            assert (await http.get(f"{metrics}/health")).status == 404
            body = {"inputs": "hello", "parameters": {"max_new_tokens": 60}}
            async with http.post(f"{address}/generate_stream", json=body) as response:
                await response.content.readline()
                process.process.send_signal(signal.SIGTERM)
                await process.read_until(message="signal received, starting graceful shutdown")
                assert (await http.get(f"{address}/health")).status == 503
                rest = await response.text()
            assert rest.count("data: ") == 59
        assert await process.exit_code() == 0
        assert "Success" in process.messages()


async def test_after_the_grace_period_open_streams_get_an_error_event(tmp_path: Path) -> None:
    changes = {"graceful_termination_timeout_s": 0.2}
    async with router(tmp_path, replace(SHARD, step_ms=20.0), **changes) as (process, _):
        address = (await process.read_until(event="serving"))["address"]
        async with stream(address) as response:
            process.process.send_signal(signal.SIGTERM)
            rest = await response.text()
        assert "incomplete_generation_stream" in rest
        assert await process.exit_code() == 0


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    async with router(tmp_path, replace(SHARD, step_ms=20.0)) as (process, _):
        address = (await process.read_until(event="serving"))["address"]
        async with stream(address) as response:
            process.process.send_signal(signal.SIGINT)
            await process.read_until(message="signal received, starting graceful shutdown")
            process.process.send_signal(signal.SIGINT)
            rest = await response.text()
        assert "incomplete_generation_stream" in rest
        assert await process.exit_code() == 0


async def test_a_signal_before_the_shards_are_there_ends_it_at_once(tmp_path: Path) -> None:
    async with router(tmp_path) as (process, _):
        await process.read_until(target="tgi_router")
        process.process.send_signal(signal.SIGTERM)
        assert await process.exit_code() == 0


async def test_it_waits_for_shards_that_come_later(tmp_path: Path) -> None:
    async with router(tmp_path) as (process, group):
        await group.start()
        assert await process.read_until(event="serving")


async def test_what_makes_serving_impossible_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    async with router(tmp_path, SHARD, max_input_tokens=300) as (process, _):
        assert await process.exit_code() == 1
        assert process.records[-1]["level"] == "ERROR"
        sentence = "Argument validation error: `max_input_tokens` must be < `max_total_tokens`. Given: 300 and 256"
        assert process.records[-1]["message"] == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"api_key_file": "nowhere"}, "`--api-key-file` cannot be read"),
        ({"api_key_file": "empty"}, "`--api-key-file` is empty"),
        ({"tokenizer_config_path": "nowhere"}, "`--tokenizer-config-path` is no file"),
    ],
    ids=str,
)
async def test_files_that_cannot_be_used_are_told(tmp_path: Path, changes: dict[str, str], sentence: str) -> None:
    (tmp_path / "empty").write_text("\n")
    group = FakeGroup(str(tmp_path / "shard"), SHARD)
    await group.start()
    files = {name: str(tmp_path / value) for name, value in changes.items()}
    model_dir = str(write_model(tmp_path / "model"))
    config = replace(CONFIG, model_dir=model_dir, master_shard_uds_path=group.master_path, **files)
    metrics = Metrics()
    batcher = Batcher(config, metrics)
    with pytest.raises(StartupError, match=sentence):
        await start(config, batcher, metrics)
    await batcher.stop()
    await group.stop()


async def test_a_model_without_a_tokenizer_is_told_without_waiting_for_shards(tmp_path: Path) -> None:
    config = replace(CONFIG, model_dir=str(tmp_path), master_shard_uds_path=str(tmp_path / "none-0"))
    metrics = Metrics()
    batcher = Batcher(config, metrics)
    with pytest.raises(StartupError, match=r"no `tokenizer.json`"):
        await asyncio.wait_for(start(config, batcher, metrics), 30)
    await batcher.stop()


async def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with router(tmp_path, SHARD, port=taken.getsockname()[1]) as (process, _):
            assert await process.exit_code() == 1
            assert "cannot be bound" in process.messages()


def test_limits_are_the_smaller_of_the_flag_and_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    limits = derive_limits(CONFIG, fits=1000, vocab_size=500)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (1000, 999)
    assert "Maximum total tokens defaulted to 1000" in caplog.text
    assert "Maximum input tokens defaulted to 999" in caplog.text
    limits = derive_limits(replace(CONFIG, max_total_tokens=500, max_input_tokens=100), fits=1000, vocab_size=500)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (500, 100)
    limits = derive_limits(replace(CONFIG, max_total_tokens=5000), fits=1000, vocab_size=500)
    assert limits.max_total_tokens == 1000
    assert "`max_total_tokens` is reduced from 5000 to 1000" in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_total_tokens": 10, "max_input_tokens": 10}, r"`max_input_tokens` must be < `max_total_tokens`"),
        (
            {"max_batch_total_tokens": 500},
            r"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 1000 and 500",
        ),
        ({"validation_workers": 0}, r"`validation_workers` must be > 0"),
        ({"max_batch_size": 0}, r"`max_batch_size` must be > 0"),
    ],
    ids=str,
)
def test_limits_that_contradict_each_other_are_told_in_tgis_words(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StartupError, match=f"Argument validation error: {sentence}"):
        derive_limits(replace(CONFIG, **changes), fits=1000, vocab_size=500)


def test_it_starts_without_torch_and_transformers() -> None:
    code = "import sys, tgi_router.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_wrong_flags_exit_with_2() -> None:
    command = [sys.executable, "-c", "from tgi_router.cli import main; main()", "--nonsense"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2
