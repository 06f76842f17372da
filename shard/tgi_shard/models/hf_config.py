"""Reads a Hugging Face config.json: typed fields, and the rope description in both of its spellings.

The config is a plain dict; transformers is not imported. A field that is absent and one that is null are the same.
Errors are StartError naming the field. Used by the family files.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StartError
from ..layers.mlp import Activation
from ..layers.rotary import DynamicScaling, LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling

HfConfig = Mapping[str, Any]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def read(model_dir: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StartError(f"{model_dir}: there is no config.json.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StartError(f"{path}: cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise StartError(f"{path}: not a JSON object.")
    return config


def integer(hf: HfConfig, name: str, default: int | None = None, *, least: int = 1) -> int:
    value = hf.get(name)
    if value is None:
        value = default
    if value is None:
        raise StartError(f"config.json: `{name}` is missing.")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StartError(f"config.json: `{name}` is {value!r}, expected an integer of at least {least}.")
    return value


def number(hf: HfConfig, name: str, default: float | None = None) -> float:
    value = hf.get(name)
    if value is None:
        value = default
    if value is None:
        raise StartError(f"config.json: `{name}` is missing.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise StartError(f"config.json: `{name}` is {value!r}, expected a positive number.")
    return float(value)


def flag(hf: HfConfig, name: str, default: bool) -> bool:
    value = hf.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise StartError(f"config.json: `{name}` is {value!r}, expected true or false.")
    return value


def activation(hf: HfConfig) -> Activation:
    value = hf.get("hidden_act") or "silu"
    if value not in ACTIVATIONS:
        raise StartError(f"config.json: `hidden_act` is {value!r}; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[value]


def rope(hf: HfConfig, head_dim: int) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` beside `rope_scaling` (before)."""
    if head_dim % 2:
        raise StartError(f"config.json: rotary positions need an even head size, but it is {head_dim}.")
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise StartError(f"config.json: the rope parameters are {parameters!r}, expected an object.")
    theta = number(parameters, "rope_theta", number(hf, "rope_theta", 10000.0))
    return Rope(theta, head_dim, _scaling(hf, parameters))


def _scaling(hf: HfConfig, parameters: Mapping[str, Any]) -> RopeScaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    positions = integer(hf, "max_position_embeddings")
    original = integer(
        hf, "original_max_position_embeddings", integer(parameters, "original_max_position_embeddings", positions)
    )
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(number(parameters, "factor"))
        case "dynamic":
            return DynamicScaling(number(parameters, "factor"), positions)
        case "llama3":
            low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
            return Llama3Scaling(number(parameters, "factor"), low, high, original)
        case "yarn":
            return _yarn(parameters, positions, original)
        case _:
            raise StartError(
                f"config.json: rope type {kind!r} is not supported; known are default, linear, dynamic, llama3, yarn."
            )


def _yarn(parameters: Mapping[str, Any], positions: int, original: int) -> YarnScaling:
    factor = number(parameters, "factor", positions / original)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = magnitude(1.0)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention_factor = magnitude(number(parameters, "mscale")) / magnitude(number(parameters, "mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original_positions=original,
        attention_factor=number(parameters, "attention_factor", attention_factor),
        beta_fast=number(parameters, "beta_fast", 32.0),
        beta_slow=number(parameters, "beta_slow", 1.0),
        truncate=flag(parameters, "truncate", True),
    )


def max_positions(hf: HfConfig, scaling: RopeScaling | None) -> int:
    """The longest context. `max_position_embeddings` already counts the scaling, except where the scaling's own
    definition starts from it: dynamic, and YaRN over the original positions (as Qwen's model cards describe)."""
    positions = integer(hf, "max_position_embeddings")
    match scaling:
        case DynamicScaling(factor=factor):
            return int(positions * factor)
        case YarnScaling(factor=factor, original_positions=original):
            return max(positions, int(original * factor))
        case _:
            return positions
