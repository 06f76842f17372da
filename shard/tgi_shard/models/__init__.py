"""Model families by `model_type`, and the one way to load a model.

To add a family: a file with `spec(hf_config) -> DecoderSpec` and `NAMES`, and one line in `FAMILIES`.
"""

import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import torch

from .. import attention
from ..checkpoint import Checkpoint
from ..config import ShardConfig
from ..errors import StartError
from ..layers.rotary import DynamicScaling, LinearScaling, RopeScaling
from ..layers.weights import WeightReader
from ..parallel import Parallel
from . import hf_config
from .decoder import Decoder, HeadSplit, Source
from .hf_config import HfConfig
from .names import Names, expected_tensors
from .spec import DecoderSpec

__all__ = ["FAMILIES", "Decoder", "DecoderSpec", "describe", "load_model"]

logger = logging.getLogger(__name__)

# config.json `model_type` -> module of this package
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


class Family(Protocol):
    """What a family's module has."""

    NAMES: Names

    def spec(self, hf: HfConfig) -> DecoderSpec:
        """The model that a config.json describes. Pure; raises StartError."""


def load_model(
    config: ShardConfig,
    parallel: Parallel,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> Decoder:
    """This rank's part of the model in config.model_dir, ready to compute.

    progress: called with (bytes read, bytes in all) of the checkpoint. Raises StartError, before anything is allocated,
    when the model is not supported or the checkpoint is not exactly what config.json describes.
    """
    directory = Path(config.model_dir)
    spec, names = describe(hf_config.read(directory), config.rope_scaling, config.rope_factor)
    heads = HeadSplit.of(spec, parallel)
    specs = [heads.attention_spec(spec, number, dtype) for number in range(spec.layers)]
    backend = attention.choose(config.attention, specs, device, dtype, config.block_size)
    checkpoint = Checkpoint.open(directory, progress)
    ignorable = names.ignorable + ((rf"{re.escape(names.head)}\.weight",) if spec.tied_head else ())
    checkpoint.check(expected_tensors(spec, names, range(spec.layers)), ignorable)
    decoder = Decoder(spec, Source(WeightReader(checkpoint, device, dtype), names), parallel, backend)
    checkpoint.release()
    logger.info("Loaded %s: %d layers, %.2f GiB of weights", spec.model_type, spec.layers, decoder.num_bytes / 2**30)
    return decoder


def describe(
    hf: HfConfig, rope_scaling: str | None = None, rope_factor: float | None = None
) -> tuple[DecoderSpec, Names]:
    """Spec and names of the model that a config.json describes, under `--rope-scaling` and `--rope-factor`."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise StartError(f"config.json: `model_type` is {model_type!r}; supported are {', '.join(FAMILIES)}.")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method") if isinstance(hf["quantization_config"], dict) else None
        raise StartError(f"config.json: checkpoints quantized with {method!r} are not supported yet; use the original.")
    family = cast(Family, importlib.import_module(f".{FAMILIES[model_type]}", __name__))
    spec = family.spec(hf)
    if rope_scaling is not None or rope_factor is not None:  # a factor alone means linear, as in TGI
        spec = _rescaled(spec, rope_scaling or "linear", 1.0 if rope_factor is None else rope_factor, hf)
    return spec, family.NAMES


def _rescaled(spec: DecoderSpec, kind: str, factor: float, hf: HfConfig) -> DecoderSpec:
    """The model with its rope scaling replaced and its positions extended by it."""
    if factor < 1:
        raise StartError(f"`--rope-factor` is {factor}, but must be at least 1.")
    positions = hf_config.integer(hf, "max_position_embeddings")
    scaling: RopeScaling = LinearScaling(factor) if kind == "linear" else DynamicScaling(factor, positions)
    return replace(spec, position=replace(spec.position, scaling=scaling), max_positions=int(positions * factor))
