"""Qwen3 (dense): Qwen2 without those biases, but with a norm on every query and key head.

Follows transformers' models/qwen3 (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig
from .qwen2 import windows
from .spec import DecoderSpec, HeadNorm, RmsNorm, with_windows

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({"head_dim": 128, **hf, "mlp_bias": False})
    base = with_windows(base, windows(hf, base.num_layers))
    qk_norm = HeadNorm(RmsNorm(base.norm.eps))
    return replace(base, model_type="qwen3", attention=replace(base.attention, qk_norm=qk_norm))
