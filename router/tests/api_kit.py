"""A whole router for tests of the API: tiny real tokenizer, fake shard over real gRPC, the real aiohttp application.

    async with serving() as api:
        status, answer = await api.post("/generate", {"inputs": "hello"})

The fake shard's tokens are a function of prompt and seed (`fake_shard.generate`), so what an answer must be is known
without a server: `api.expected(...)`.
"""

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.test_utils import TestServer
from fake_shard import FakeConfig, FakeGroup, generate
from tgi_proto import generate_pb2 as pb
from tgi_router import app, cli
from tgi_router.batcher import Batcher
from tgi_router.config import RouterConfig
from tgi_router.connections import Patience, Runner
from tgi_router.metrics import Metrics
from tgi_router.server import Server
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 512
BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_CORPUS = ["hello world, this is a test of a tokenizer. ", "def f(x): return x\n", "日本語 emoji 😀😃 é è ü über "]


@cache
def tiny_tokenizer() -> str:
    """tokenizer.json of a byte-level BPE with 512 tokens, `<s>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{a}{b} " for a in "abcdefghijk" for b in ("ing", "ed", "er", "est", "ly", "ness", "ment")]
    tokenizer.train_from_iterator([text * 20 for text in (*_CORPUS, *words)], trainer)
    tokenizer.add_tokens([AddedToken(f"<|filler {i}|>") for i in range(VOCAB - tokenizer.get_vocab_size())])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return str(tokenizer.to_str())


def write_model(folder: Path, **tokenizer_config: Any) -> Path:
    """A model's directory as far as the router looks into it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer())
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE, **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream: parsed JSON, or the string "[DONE]"."""
        assert self.body.endswith(b"\n\n"), self.body
        blocks = self.body.decode()[:-2].split("\n\n")
        assert all(block.startswith("data: ") for block in blocks if not block.startswith(":")), blocks
        datas = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]


@dataclass
class Api:
    """The running server and a client of it."""

    server: Server
    group: FakeGroup
    http: aiohttp.ClientSession
    url: str
    tokenizer: Tokenizer
    send_buffer: Callable[[int], None]  # limits what the kernel holds for a client of a later connection, bytes

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        async with self.http.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.request("POST", path, json=body, **options)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    def expected_ids(self, prompt: list[int], count: int, seed: int | None = None) -> list[int]:
        """What the fake shard generates undisturbed. seed: None = greedy."""
        sampling = pb.SamplingParameters(do_sample=seed is not None, seed=seed or 0)
        return generate(prompt, count, sampling, self.group.config.vocab)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def expected_text(self, text: str, count: int, seed: int | None = None, *, special: bool = True) -> str:
        """The text generated after `text`, when no end-of-sequence comes."""
        return str(self.tokenizer.decode(self.expected_ids(self.encode(text, special=special), count, seed)))

    async def idle(self) -> None:
        """Waits until nothing runs; nothing may have leaked then, and the router must have kept the contract."""
        core = self.server.batcher._core
        async with asyncio.timeout(60):
            while self.server.infer.num_running or not core.is_idle:  # noqa: ASYNC110  nothing announces idleness
                await asyncio.sleep(0.002)
        core.check_integrity()
        assert self.group.violations == []


class _Host(TestServer):
    """aiohttp's test server with the connections that cli.py makes."""

    patience = Patience()

    async def _make_runner(self, **options: Any) -> Runner:
        return Runner(self.app, self.patience)


@contextlib.asynccontextmanager
async def serving(
    *, model: dict[str, Any] | None = None, patience: Patience | None = None, **changes: Any
) -> AsyncIterator[Api]:
    """changes: fields of RouterConfig or of FakeConfig. model: fields of tokenizer_config.json."""
    shard_names = {field.name for field in fields(FakeConfig)}
    shard = {name: value for name, value in changes.items() if name in shard_names}
    router = {"model_id": "tiny"} | {name: value for name, value in changes.items() if name not in shard_names}
    with tempfile.TemporaryDirectory(prefix="tgi-") as folder:
        # no end of sequence unless a test asks for one: the fake draws every id
        defaults = FakeConfig(vocab=VOCAB - 1, eos=VOCAB + 7, num_blocks=256, max_model_tokens=256)
        group = FakeGroup(f"{folder}/shard", replace(defaults, **shard))
        await group.start()
        config = RouterConfig(
            model_dir=str(write_model(Path(folder) / "model", **{"eos_token": None, **(model or {})})),
            master_shard_uds_path=group.master_path,
            **router,
        )
        metrics = Metrics()
        batcher = Batcher(config, metrics)
        server = await cli.start(config, batcher, metrics)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        host = _Host(app.build(server), socket_factory=lambda *_: listener)
        host.patience = patience or Patience()
        await host.start_server(shutdown_timeout=1.0)
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                yield Api(
                    server,
                    group,
                    http,
                    url=str(host.make_url("")).rstrip("/"),
                    tokenizer=Tokenizer.from_str(tiny_tokenizer()),
                    send_buffer=lambda size: listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size),
                )
        finally:
            if server.tracing is not None:
                await asyncio.to_thread(server.tracing.stop)
            await batcher.stop()
            await host.close()
            await group.stop()


@contextlib.contextmanager
def one_server(**changes: Any) -> Iterator[Callable[[Callable[[Api], Coroutine[Any, Any, None]]], None]]:
    """Runs coroutines on one Api in an event loop of its own: for tests that hypothesis calls many times."""
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        server = serving(**changes)
        api = runner.run(server.__aenter__())
        stack.callback(lambda: runner.run(server.__aexit__(None, None, None)))
        yield lambda work: runner.run(work(api))
