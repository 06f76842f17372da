"""Mistral: Llama without biases, with a sliding window on every layer.

Follows transformers' models/mistral (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, window
from .spec import DecoderSpec, with_windows

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "attention_bias": False, "mlp_bias": False})
    return replace(with_windows(base, (window(hf),) * base.num_layers), model_type="mistral")
