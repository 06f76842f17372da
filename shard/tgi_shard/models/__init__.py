"""Model families by `model_type`, and the one way to load a model.

To add a family: a file with `spec(hf_config) -> DecoderSpec` and `NAMES`, and one line in `FAMILIES`.
"""

import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import torch

from .. import attention
from ..checkpoint import Checkpoint
from ..config import ShardConfig
from ..errors import StartError
from ..layers.rotary import DynamicScaling, LinearScaling, Rope, RopeScaling
from ..layers.weights import WeightReader
from ..parallel import Parallel
from . import hf_config
from .decoder import Decoder, HeadSplit, Source
from .hf_config import HfConfig
from .names import Names, expected_tensors, resolve
from .spec import DecoderSpec, with_scaling

__all__ = ["FAMILIES", "Decoder", "DecoderSpec", "describe", "load_model"]

logger = logging.getLogger(__name__)

# config.json `model_type` -> module of this package
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi": "phi",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "cohere": "cohere",
    "cohere2": "cohere2",
    "ernie4_5": "ernie4_5",
    "glm": "glm",
    "glm4": "glm4",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "falcon": "falcon",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "gpt_neox": "gpt_neox",
    "gptj": "gptj",
    "gpt_bigcode": "gpt_bigcode",
    "gpt2": "gpt2",
    "opt": "opt",
    "bloom": "bloom",
    "mpt": "mpt",
}


class Family(Protocol):
    """What a family's module has."""

    # A function of config.json where that decides the names.
    NAMES: Names | Callable[[HfConfig], Names]

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
    specs = [heads.attention_spec(spec, number, dtype) for number in range(spec.num_layers)]
    backend = attention.choose(config.attention, specs, device, dtype, config.block_size)
    checkpoint = Checkpoint.open(directory, progress)
    names = resolve(spec, names, checkpoint)
    ignorable = names.ignorable + ((rf"{re.escape(names.head)}\.weight",) if spec.output.tied else ())
    checkpoint.check(expected_tensors(spec, names, range(spec.num_layers)), ignorable)
    decoder = Decoder(spec, Source(WeightReader(checkpoint, device, dtype), names), parallel, backend)
    checkpoint.release()
    logger.info(
        "Loaded %s: %d layers, %.2f GiB of weights", spec.model_type, spec.num_layers, decoder.num_bytes / 2**30
    )
    return decoder


def describe(
    hf: HfConfig, rope_scaling: str | None = None, rope_factor: float | None = None
) -> tuple[DecoderSpec, Names]:
    """Spec and names of the model that a config.json describes, under `--rope-scaling` and `--rope-factor`."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        own = " The repository's own code (`auto_map`) is not run." if hf.get("auto_map") else ""
        raise StartError(f"config.json: `model_type` is {model_type!r}; supported are {', '.join(FAMILIES)}.{own}")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method") if isinstance(hf["quantization_config"], dict) else None
        raise StartError(f"config.json: checkpoints quantized with {method!r} are not supported yet; use the original.")
    family = cast(Family, importlib.import_module(f".{FAMILIES[model_type]}", __name__))
    spec = family.spec(hf)
    if rope_scaling is not None or rope_factor is not None:  # a factor alone means linear, as in TGI
        spec = _rescaled(spec, rope_scaling or "linear", 1.0 if rope_factor is None else rope_factor, hf)
    return spec, family.NAMES if isinstance(family.NAMES, Names) else family.NAMES(hf)


def _rescaled(spec: DecoderSpec, kind: str, factor: float, hf: HfConfig) -> DecoderSpec:
    """The model with its rope scaling replaced and its positions extended by it."""
    if factor < 1:
        raise StartError(f"`--rope-factor` is {factor}, but must be at least 1.")
    if not any(isinstance(layer.position, Rope) for layer in spec.layers):
        raise StartError(f"`--rope-scaling` {kind} needs rotary positions, which {spec.model_type} does not have.")
    positions = hf_config.positions(hf)
    scaling: RopeScaling = LinearScaling(factor) if kind == "linear" else DynamicScaling(factor, positions)
    return with_scaling(spec, scaling, int(positions * factor))
