"""GLM-4 9B and 32B (0414): GLM with norms before and after attention and MLP.

Follows transformers' models/glm4 (configuration and names only).
"""

from dataclasses import replace

from . import glm
from .hf_config import HfConfig
from .spec import DecoderSpec, SandwichNorm

NAMES = replace(glm.NAMES, attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm")


def spec(hf: HfConfig) -> DecoderSpec:
    return replace(glm.spec(hf), model_type="glm4", residual=SandwichNorm())
