"""OLMo 2: Llama whose norms come after attention and MLP, with norms over all query and all key heads.

Follows transformers' models/olmo2 (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig
from .spec import DecoderSpec, OutputNorm, RmsNorm, WideNorm

NAMES = replace(llama.NAMES, attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({"rms_norm_eps": 1e-5, **hf, "mlp_bias": False})
    attention = replace(base.attention, qk_norm=WideNorm(RmsNorm(base.norm.eps)))
    return replace(base, model_type="olmo2", attention=attention, residual=OutputNorm())
