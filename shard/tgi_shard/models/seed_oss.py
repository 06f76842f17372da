"""Seed-OSS: Llama with biases on q, k and v.

Follows transformers' models/seed_oss (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, flag
from .spec import DecoderSpec

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({"head_dim": 128, **hf})
    attention = replace(
        base.attention,
        qkv_bias=flag(hf, "attention_bias", True),
        out_bias=flag(hf, "attention_out_bias", False),
    )
    return replace(base, model_type="seed_oss", attention=attention)
