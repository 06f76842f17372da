"""`text-generation-router`: argv -> RouterConfig -> a server that runs until it is told to stop.

Owns the order of start and end. Start: the tokenizer loads while the shards do; their Info gives the limits; then the
port is bound and `serving` reported. End (SIGTERM, SIGINT): health says 503 at once, new requests are refused, running
and queued ones are answered, within the grace period. Usually started by the launcher; imports no torch.
"""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from tgi_proto import logs
from tgi_proto.argv import from_argv

from . import app, chat_template, dialect, log_context, openapi
from .batcher import Batcher
from .chat_template import ChatTemplate
from .config import RouterConfig
from .connections import Runner
from .errors import StartupError
from .grammar_compiler import GrammarCompiler, Trial
from .infer import Infer
from .metrics import Metrics
from .parameters import Limits
from .server import ROUTER_NAME, Server
from .stream import Shared
from .tokenizer import Tokenizer, read_config
from .validation import Validator

if TYPE_CHECKING:
    from .tracing import Tracing

logger = logging.getLogger("tgi_router")


def main() -> None:
    """Exit code 0 after a signal, 1 when the configuration or the model does not allow to serve, 2 for wrong flags.

    `text-generation-router print-schema` writes the OpenAPI document instead, as TGI's does.
    """
    if sys.argv[1:] == ["print-schema"]:
        sys.stdout.write(openapi.pretty(app.route_table(None), _version()))
        return
    config = from_argv(RouterConfig, sys.argv[1:], prog=ROUTER_NAME)
    logs.setup("tgi_router", config.log_level)
    log_context.install()
    try:
        _run(config)
    except StartupError as error:
        logger.error("%s", error)
        sys.exit(1)


def _version() -> str:
    return version("text-generation-inference")


def _run(config: RouterConfig) -> None:
    try:
        import uvloop
    except ImportError:  # there is none for this platform: asyncio's own loop works, more slowly
        asyncio.run(serve(config))
    else:
        uvloop.run(serve(config))


async def serve(config: RouterConfig) -> None:
    """Serves until a signal. Raises StartupError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    logger.info("Waiting for shards at %s", config.master_shard_uds_path)
    metrics = Metrics()
    batcher = Batcher(config, metrics)
    starting = asyncio.create_task(start(config, batcher, metrics))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            logger.info("signal received before the start was done")
            return
        server = starting.result()
        try:
            async with _listening(server):
                await stop.wait()
                stop.clear()
                await _drain(server, stop)
        finally:
            if server.tracing is not None:
                await asyncio.to_thread(server.tracing.stop)
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.wait((starting, stopping))
        await batcher.stop()


async def start(config: RouterConfig, batcher: Batcher, metrics: Metrics) -> Server:
    """Everything that must be there before the port is bound. The tokenizer loads while the shards do."""
    api_key = _read_api_key(config.api_key_file)
    connecting = asyncio.create_task(batcher.start())
    try:
        tokenizer, template = await asyncio.to_thread(_load_texts, config)
        model_dialect = dialect.find(config, template, tokenizer)
        tracing = await asyncio.to_thread(_start_tracing, config)
        await connecting
    finally:
        connecting.cancel()
    limits = derive_limits(config, batcher.max_total_tokens, batcher.info.vocab_size)
    metrics.set_limits(limits.max_input_tokens, limits.max_total_tokens)
    eos_token_ids = tokenizer.eos_token_ids(batcher.info.eos_token_ids)
    infer = Infer(
        batcher,
        Validator(tokenizer, limits, eos_token_ids, _grammars(config, batcher)),
        Shared(tokenizer.vocabulary, eos_token_ids, metrics),
        config.max_concurrent_requests,
    )
    if not tokenizer.vocabulary.is_bytes:
        logger.info("The tokenizer's ids are not bytes: text is decoded in a window, which costs more per token")
    if tracing is not None:
        logger.info("Traces go to %s as %s", config.otlp_endpoint, config.otlp_service_name)
    release = _version()
    server = Server(config, api_key, batcher, infer, metrics, tokenizer, template, model_dialect, release)
    server.tracing = tracing
    return server


def _start_tracing(config: RouterConfig) -> "Tracing | None":
    """Raises StartupError."""
    if config.otlp_endpoint is None:
        return None
    from .tracing import Tracing  # half a second of imports that nobody else needs

    release = _version()
    return Tracing(config.otlp_endpoint, config.otlp_service_name, release, config.model_id)


def _grammars(config: RouterConfig, batcher: Batcher) -> GrammarCompiler:
    if config.disable_grammar_support:
        return GrammarCompiler(None)
    info = batcher.info
    return GrammarCompiler(Trial(Path(config.model_dir), info.vocab_size, tuple(info.eos_token_ids)))


def _load_texts(config: RouterConfig) -> tuple[Tokenizer, ChatTemplate]:
    """The tokenizer and the chat template. Raises StartupError."""
    model_dir = Path(config.model_dir)
    replacement = Path(config.tokenizer_config_path) if config.tokenizer_config_path is not None else None
    if replacement is not None and not replacement.is_file():
        raise StartupError(f"`--tokenizer-config-path` is no file: {replacement}")
    tokenizer_config = read_config(model_dir, replacement)
    tokenizer = Tokenizer.load(model_dir, tokenizer_config, config.validation_workers)
    return tokenizer, chat_template.load(model_dir, tokenizer_config, replaced=replacement is not None)


def _read_api_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"`--api-key-file` cannot be read: {error}") from error
    if not key:
        raise StartupError("`--api-key-file` is empty")
    return key


def derive_limits(config: RouterConfig, fits: int, vocab_size: int) -> Limits:
    """The limits requests are validated against. fits: tokens that model and KV pool can hold. Raises StartupError."""
    if config.validation_workers < 1:
        raise StartupError("Argument validation error: `validation_workers` must be > 0")
    if config.max_batch_size == 0:
        raise StartupError("Argument validation error: `max_batch_size` must be > 0")
    total = fits if config.max_total_tokens is None else min(fits, config.max_total_tokens)
    if config.max_total_tokens is None:
        logger.info("Maximum total tokens defaulted to %d", total)
    elif total < config.max_total_tokens:
        logger.warning(
            "`max_total_tokens` is reduced from %d to %d: more does not fit into the model's context and the KV pool",
            config.max_total_tokens,
            total,
        )
    if config.max_batch_total_tokens is not None and total > config.max_batch_total_tokens:
        raise StartupError(
            "Argument validation error: `max_total_tokens` must be <= `max_batch_total_tokens`. "
            f"Given: {total} and {config.max_batch_total_tokens}"
        )
    if config.max_input_tokens is None:
        logger.info("Maximum input tokens defaulted to %d", total - 1)
    elif config.max_input_tokens >= total:
        raise StartupError(
            "Argument validation error: `max_input_tokens` must be < `max_total_tokens`. "
            f"Given: {config.max_input_tokens} and {total}"
        )
    return Limits(
        max_input_tokens=total - 1 if config.max_input_tokens is None else config.max_input_tokens,
        max_total_tokens=total,
        max_best_of=config.max_best_of,
        max_stop_sequences=config.max_stop_sequences,
        max_top_n_tokens=config.max_top_n_tokens,
        vocab_size=vocab_size,
    )


@contextlib.asynccontextmanager
async def _listening(server: Server) -> AsyncIterator[None]:
    """Binds the port, and the one for metrics when asked; on leaving, lets open responses be written out."""
    config = server.config
    host = _address(config.hostname)
    logger.info("Connected")
    runners = [(Runner(app.build(server)), config.port)]
    if config.prometheus_port not in (0, config.port):
        runners.append((Runner(app.build_metrics(server)), config.prometheus_port))
    try:
        for runner, port in runners:
            await runner.setup()
            try:
                await web.TCPSite(runner, host, port, backlog=1024).start()
            except OSError as error:
                raise StartupError(f"Port {port} of {host} cannot be bound: {error.strerror or error}") from error
        async with _grpc(server, host):
            bound = runners[0][0].addresses[0]
            shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
            logs.event(logger, "serving", "Serving", address=f"http://{shown}:{bound[1]}")
            yield
    finally:
        for runner, _ in runners:
            await runner.cleanup()


def _grpc(server: Server, host: str) -> contextlib.AbstractAsyncContextManager[None]:
    """The public gRPC service, when it is asked for."""
    if server.config.grpc_port == 0:
        return contextlib.nullcontext()
    from .grpc_service.listening import listening  # imports that nobody else needs

    return listening(server, host)


def _address(hostname: str) -> str:
    """An IP address to bind. Containers export their name as HOSTNAME, which TGI did not take for one either."""
    if hostname == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(hostname))
    except ValueError:
        logger.warning("Invalid hostname, defaulting to 0.0.0.0")
        return "0.0.0.0"


async def _drain(server: Server, again: asyncio.Event) -> None:
    """Answers what was accepted. After the grace period, or at a second signal, what is left gets an error event."""
    grace_s = server.config.graceful_termination_timeout_s
    logger.info("signal received, starting graceful shutdown")
    server.draining = True
    drained = asyncio.create_task(server.batcher.drain())
    second = asyncio.create_task(again.wait())
    await asyncio.wait((drained, second), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        logger.warning("%d requests are ended before they are done", server.infer.num_running)
        await server.batcher.stop()
    for task in (drained, second):
        task.cancel()
    await asyncio.wait((drained, second))
