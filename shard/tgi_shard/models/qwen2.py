"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window on the upper layers when asked for.

Follows transformers' models/qwen2 (configuration and names only).
"""

from dataclasses import replace

from . import hf_config, llama
from .hf_config import HfConfig, flag, integer
from .spec import DecoderSpec, with_windows

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "attention_bias": False, "mlp_bias": False})
    base = with_windows(base, windows(hf, base.num_layers))
    return replace(base, model_type="qwen2", attention=replace(base.attention, qkv_bias=True))


def windows(hf: HfConfig, layers: int) -> tuple[int | None, ...]:
    """`layer_types` where it is given, else `max_window_layers` full layers below sliding ones."""
    if not flag(hf, "use_sliding_window", False):
        return (None,) * layers
    full = integer(hf, "max_window_layers", 28, least=0)
    return hf_config.windows(hf, layers, lambda layer: layer >= full)
