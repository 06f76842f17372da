"""Mistral: Llama without biases, with a sliding window on every layer.

Follows transformers' models/mistral (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, integer
from .spec import DecoderSpec

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "attention_bias": False, "mlp_bias": False})
    window = integer(hf, "sliding_window") if hf.get("sliding_window") is not None else None
    return replace(base, model_type="mistral", windows=(window,) * base.layers)
