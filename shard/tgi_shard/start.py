"""From a ShardConfig to an engine that is ready to serve: devices, threads, load, warm-up, pool. Called by cli.py.

Importing this imports torch; cli.py does so after its first event.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tgi_proto import generate_pb2 as pb
from tgi_proto import logs
from tgi_proto.grammar import load_tokenizer
from tgi_proto.model_files import read_file

from . import warmup
from .config import ShardConfig
from .engine import Engine
from .errors import StartError
from .faults import Faults
from .grammar.masks import GrammarMasks
from .host import usable_cores
from .kv_cache import KvGeometry
from .models import load_model
from .parallel import Parallel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROGRESS_INTERVAL_S = 0.25


def prepare(config: ShardConfig, logger: logging.Logger) -> tuple[Engine, pb.InfoResponse]:
    """Loads the model, measures, allocates. Raises StartError with one sentence when that cannot be."""
    faults = Faults(config.faults, config.rank)
    device = choose_device(config)
    threads = set_threads(config) if device.type == "cpu" else torch.get_num_threads()
    hf_config = read_json(Path(config.model_dir) / "config.json")
    dtype = choose_dtype(config, hf_config, device)
    logs.event(logger, "phase", f"loading {config.model_id} as {config_name(dtype)} on {device}", phase="load")
    faults.hit("load")
    parallel = Parallel.connect(config.rank, config.world_size, config.master_addr, config.master_port, device)
    progress = Progress(logger)
    model = load_model(config, parallel, device, dtype, progress)
    progress.finish()

    logs.event(logger, "phase", f"warming up with {threads} threads", phase="warmup")
    faults.hit("warmup")
    max_total_tokens = config.max_total_tokens or model.max_positions
    if max_total_tokens > model.max_positions:
        raise StartError(
            f"`--max-total-tokens` {max_total_tokens} is more than the {model.max_positions} positions of the model"
        )
    geometry = KvGeometry(model.num_layers, model.num_kv_heads, model.head_dim, config.block_size, dtype)
    shape = warmup.Shape(
        geometry=geometry,
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        max_total_tokens=max_total_tokens,
        vocab_size=model.vocab_size,
        hidden_size=model.spec.hidden,
        device=device,
        watermark_gamma=config.watermark_gamma,
        watermark_delta=config.watermark_delta,
    )
    step_bytes = warmup.measure(model, shape, config.rank)
    free = warmup.free_memory(device, config.world_size)
    num_blocks = parallel.min_int(warmup.pool_blocks(config, shape, free, step_bytes))
    ends = eos_token_ids(Path(config.model_dir), hf_config)
    load = partial(load_tokenizer, Path(config.model_dir), model.vocab_size, ends)
    grammars = GrammarMasks(load, model.vocab_size, parallel)
    engine = warmup.build_engine(model, shape, num_blocks, faults, config.rank, grammars)
    info = pb.InfoResponse(
        model_type=hf_config["model_type"],
        dtype=config_name(dtype),
        device_type=device.type,
        attention=model.backend.name,
        block_size=config.block_size,
        num_blocks=num_blocks,
        vocab_size=model.vocab_size,
        max_model_tokens=model.max_positions,
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        max_steps_in_flight=config.max_steps_in_flight,
        eos_token_ids=ends,
        rank=config.rank,
        world_size=config.world_size,
        pid=os.getpid(),
        weight_bytes=model.num_bytes,
        kv_bytes=num_blocks * geometry.block_bytes,
    )
    logger.info(
        "KV pool of %d tokens (%d MiB); attention by %s; a step takes %d MiB",
        num_blocks * config.block_size, info.kv_bytes >> 20, info.attention, step_bytes >> 20,
    )  # fmt: skip
    return engine, info


class Progress:
    """Bytes loaded, as `progress` events a few times a second."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._shown_s = 0.0
        self.done = 0
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if self._clock() - self._shown_s >= _PROGRESS_INTERVAL_S:
            self._show()

    def finish(self) -> None:
        """Shows the final figure."""
        self._show()

    def _show(self) -> None:
        self._shown_s = self._clock()
        message = f"loaded {self.done / 2**30:.2f} of {self.total / 2**30:.2f} GiB"
        logs.event(self._logger, "progress", message, phase="load", done=self.done, total=self.total, unit="bytes")


def choose_device(config: ShardConfig) -> torch.device:
    """The device of this rank: rank r's GPU is number r of the visible ones."""
    cuda = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not cuda):
        return torch.device("cpu")
    if not cuda:
        raise StartError("`--device` cuda was asked for, but torch sees no GPU; check the driver, or use cpu")
    count = torch.cuda.device_count()
    if config.rank >= count:
        raise StartError(f"rank {config.rank} has no GPU: {count} are visible; lower `--num-shard`")
    device = torch.device("cuda", config.rank)
    torch.cuda.set_device(device)
    return device


def set_threads(config: ShardConfig) -> int:
    """Sets torch's compute threads; returns their number."""
    threads = config.num_threads or max(1, usable_cores() // config.world_size)
    torch.set_num_threads(threads)
    return threads


def choose_dtype(config: ShardConfig, hf_config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The flag's, else on CUDA the checkpoint's (float16 when it is float32 or unknown, as TGI), else float32."""
    if config.dtype is not None:
        return _DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    name = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return _DTYPES["bfloat16" if name == "bfloat16" else "float16"]


def config_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def eos_token_ids(model_dir: Path, hf_config: dict[str, Any]) -> list[int]:
    """End-of-sequence ids of generation_config.json, else of config.json; none when neither names one."""
    path = model_dir / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ids = generation.get("eos_token_id", hf_config.get("eos_token_id"))
    if ids is None:
        return []
    ids = ids if isinstance(ids, list) else [ids]
    if any(type(token_id) is not int or not 0 <= token_id < 2**31 for token_id in ids):
        source = path if "eos_token_id" in generation else model_dir / "config.json"
        raise StartError(f"{source}: `eos_token_id` is {ids!r}, expected token ids")
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model. Raises StartError naming the file."""
    try:
        value = json.loads(read_file(path))
    except FileNotFoundError:
        raise StartError(f"{path.parent} has no {path.name}: it is not a model directory") from None
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StartError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StartError(f"{path} is not a JSON object")
    return value
