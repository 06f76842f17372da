"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window on the upper layers when asked for.

Follows transformers' models/qwen2 (configuration and names only).
"""

from dataclasses import replace

from ..errors import StartError
from . import llama
from .hf_config import HfConfig, flag, integer
from .spec import DecoderSpec

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "attention_bias": False, "mlp_bias": False})
    return replace(
        base, model_type="qwen2", attention=replace(base.attention, qkv_bias=True), windows=windows(hf, base.layers)
    )


def windows(hf: HfConfig, layers: int) -> tuple[int | None, ...]:
    """`layer_types` where it is given, else `max_window_layers` full layers below sliding ones."""
    if not flag(hf, "use_sliding_window", False) or hf.get("sliding_window") is None:
        return (None,) * layers
    window = integer(hf, "sliding_window")
    full = integer(hf, "max_window_layers", 28, least=0)
    types = hf.get("layer_types") or ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if len(types) != layers or not {"full_attention", "sliding_attention"}.issuperset(types):
        raise StartError(f"config.json: `layer_types` must name {layers} layers, full_attention or sliding_attention.")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
