"""GLM-4 9B (2024): Llama with biases on q, k and v, packed gate and up, and half of each head rotated, in neighbouring
pairs.

Follows transformers' models/glm (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, RopeDefaults, flag
from .names import Packed
from .spec import DecoderSpec

NAMES = replace(llama.NAMES, gate_up=Packed("mlp.gate_up_proj"))


def spec(hf: HfConfig) -> DecoderSpec:
    defaults = {"head_dim": 128, "rms_norm_eps": 1.5625e-07}
    base = llama.spec({**defaults, **hf, "mlp_bias": False}, RopeDefaults(partial=0.5, pairing="neighbours"))
    attention = replace(base.attention, qkv_bias=flag(hf, "attention_bias", True), out_bias=False)
    return replace(base, model_type="glm", attention=attention)
