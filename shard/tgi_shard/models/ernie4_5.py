"""ERNIE 4.5 (dense): Llama with a rope of neighbouring pairs.

Follows transformers' models/ernie4_5 (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, RopeDefaults, flag
from .spec import DecoderSpec

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    bias = flag(hf, "use_bias", False)
    defaults = {"head_dim": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    fields = {**defaults, **hf, "attention_bias": bias, "mlp_bias": bias}
    return replace(llama.spec(fields, RopeDefaults(500_000.0, pairing="neighbours")), model_type="ernie4_5")
