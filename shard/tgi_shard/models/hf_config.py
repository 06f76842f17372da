"""Reads a Hugging Face config.json: typed fields, and the rope description in both of its spellings.

The config is a plain dict; transformers is not imported. A field that is absent and one that is null are the same.
Errors are StartError naming the field. Used by the family files.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgi_proto.model_files import read_file

from ..errors import StartError
from ..layers.mlp import Activation
from ..layers.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Pairing,
    Rope,
    RopeScaling,
    YarnScaling,
)

HfConfig = Mapping[str, Any]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# Some hundred times what models have: what is made per layer, head or expert must not fill the memory.
_MOST = dict.fromkeys(
    (
        *("num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads"),
        *("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_experts", "num_local_experts"),
    ),
    10_000,
)
_MOST_OF_ALL = 2**31 - 1
_LARGEST = 1e15


def read(model_dir: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    path = model_dir / "config.json"
    try:
        config = json.loads(read_file(path))
    except FileNotFoundError as error:
        raise StartError(f"{model_dir}: there is no config.json.") from error
    except OSError as error:
        raise StartError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
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
    most = _MOST.get(name, _MOST_OF_ALL)
    if value > most:
        raise StartError(f"config.json: `{name}` is {value!r}, expected an integer of at most {most}.")
    return value


def number(hf: HfConfig, name: str, default: float | None = None) -> float:
    value = hf.get(name)
    if value is None:
        value = default
    if value is None:
        raise StartError(f"config.json: `{name}` is missing.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise StartError(f"config.json: `{name}` is {value!r}, expected a positive number of at most {_LARGEST:g}.")
    return float(value)


def flag(hf: HfConfig, name: str, default: bool) -> bool:
    value = hf.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise StartError(f"config.json: `{name}` is {value!r}, expected true or false.")
    return value


def nullable_number(hf: HfConfig, name: str, default: float | None = None) -> float | None:
    """A number that config.json can switch off with null; `default` where it does not say."""
    if name not in hf:
        return default
    return None if hf[name] is None else number(hf, name)


def activation(hf: HfConfig, name: str = "hidden_act", default: str = "silu") -> Activation:
    value = hf.get(name) or default
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise StartError(f"config.json: `{name}` is {value!r}; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[value]


def refuse(hf: HfConfig, name: str, allowed: object) -> None:
    """Raises StartError when a field that is not supported has another value than the one that is."""
    value = hf.get(name)
    if value is not None and value != allowed:
        raise StartError(f"config.json: `{name}` is {value!r}; only {allowed!r} is supported.")


def window(hf: HfConfig) -> int | None:
    """`sliding_window`; None when there is none."""
    return integer(hf, "sliding_window") if hf.get("sliding_window") is not None else None


def windows(hf: HfConfig, layers: int, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """One per layer: `sliding_window` where `layer_types` says so, or without it where `slides(layer)`."""
    size = window(hf)
    if size is None:
        return (None,) * layers
    types = hf.get("layer_types") or ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise StartError(f"config.json: `layer_types` must name {layers} layers, full_attention or sliding_attention.")
    return tuple(size if kind == "sliding_attention" else None for kind in types)


@dataclass(frozen=True, slots=True)
class RopeDefaults:
    """What a family's configuration means by what it leaves out."""

    theta: float = 10000.0
    partial: float = 1.0  # the part of each head that is rotated
    pairing: Pairing = "halves"


PLAIN_ROPE = RopeDefaults()


def rope(hf: HfConfig, head_dim: int, defaults: RopeDefaults = PLAIN_ROPE) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` beside `rope_scaling` (before)."""
    return rope_of(hf, hf.get("rope_parameters") or hf.get("rope_scaling") or {}, head_dim, defaults)


def rope_of(hf: HfConfig, parameters: Any, head_dim: int, defaults: RopeDefaults) -> Rope:
    """The rope that `parameters` describe, where a model has several."""
    if not isinstance(parameters, dict):
        raise StartError(f"config.json: the rope parameters are {parameters!r}, expected an object.")
    theta = number(parameters, "rope_theta", number(hf, "rope_theta", defaults.theta))
    partial = number(parameters, "partial_rotary_factor", number(hf, "partial_rotary_factor", defaults.partial))
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise StartError(
            f"config.json: rotary positions need an even head size, but it is {dim}"
            + (f" (`partial_rotary_factor` {partial} of {head_dim})." if partial != 1 else ".")
        )
    return Rope(theta, dim, _scaling(hf, parameters, dim), defaults.pairing)


def two_ropes(hf: HfConfig, head_dim: int, full_theta: float, sliding_theta: float) -> tuple[Rope, Rope]:
    """Of full and of sliding layers: two entries of `rope_parameters`, or (before transformers 5) `rope_theta` with
    `rope_scaling` for the full ones. The thetas hold where config.json does not say."""
    both = hf.get("rope_parameters") or {"full_attention": hf.get("rope_scaling")}
    if not isinstance(both, dict):
        raise StartError(f"config.json: the rope parameters are {both!r}, expected an object.")
    full = {"rope_theta": number(hf, "rope_theta", full_theta), **(both.get("full_attention") or {})}
    sliding = {"rope_theta": sliding_theta, **(both.get("sliding_attention") or {})}
    return rope_of(hf, full, head_dim, PLAIN_ROPE), rope_of(hf, sliding, head_dim, PLAIN_ROPE)


def _scaling(hf: HfConfig, parameters: Mapping[str, Any], dim: int) -> RopeScaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    positions = integer(hf, "max_position_embeddings")
    original = integer(
        hf, "original_max_position_embeddings", integer(parameters, "original_max_position_embeddings", positions)
    )
    match kind:
        case "linear":
            return LinearScaling(number(parameters, "factor"))
        case "dynamic":
            return DynamicScaling(number(parameters, "factor"), positions)
        case "llama3":
            low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
            return Llama3Scaling(number(parameters, "factor"), low, high, original)
        case "yarn":
            return _yarn(parameters, positions, original)
        case "longrope" | "su":
            return _long(parameters, positions, original, dim)
        case _:
            raise StartError(
                f"config.json: rope type {kind!r} is not supported; known are default, linear, dynamic, llama3, yarn, "
                "longrope."
            )


def _long(parameters: Mapping[str, Any], positions: int, original: int, dim: int) -> LongScaling:
    factors = []
    for name in ("short_factor", "long_factor"):
        values = parameters.get(name)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise StartError(f"config.json: `{name}` must be a list of {dim // 2} numbers, one per rotated pair.")
        factors.append(tuple(number({name: value}, name) for value in values))
    factor = number(parameters, "factor", positions / original)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    magnitude = number(parameters, "attention_factor", magnitude)
    short, long = (number(parameters, name, magnitude) for name in ("short_mscale", "long_mscale"))
    return LongScaling(factors[0], factors[1], original, short, long)


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


def positions(hf: HfConfig) -> int:
    """The positions that config.json names, under either spelling."""
    return integer(hf, "max_position_embeddings", hf.get("n_positions"))


def max_positions(hf: HfConfig, scaling: RopeScaling | None) -> int:
    """The longest context. `max_position_embeddings` already counts the scaling, except where the scaling's own
    definition starts from it: dynamic, and YaRN over the original positions (as Qwen's model cards describe)."""
    configured = positions(hf)
    match scaling:
        case DynamicScaling(factor=factor):
            return int(configured * factor)
        case YarnScaling(factor=factor, original_positions=original):
            return max(configured, int(original * factor))
        case _:
            return configured
