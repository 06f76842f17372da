"""Command R and Aya: one LayerNorm without bias, attention and MLP side by side, neighbouring rotary pairs.

Follows transformers' models/cohere (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, RopeDefaults, flag, number
from .spec import DecoderSpec, LayerNorm, OwnHeadNorm, SharedNormParallel

NAMES = replace(llama.NAMES, mlp_norm="")


def spec(hf: HfConfig) -> DecoderSpec:
    return replace(parallel(hf, 500_000.0), model_type="cohere")


def parallel(hf: HfConfig, theta: float) -> DecoderSpec:
    """What Command R and its successor share. theta: the rope's, where config.json does not say."""
    defaults = RopeDefaults(theta, pairing="neighbours")
    base = llama.spec({"tie_word_embeddings": True, **hf, "mlp_bias": False}, defaults)
    norm = LayerNorm(number(hf, "layer_norm_eps", 1e-5), bias=False)
    qk_norm = OwnHeadNorm(norm) if flag(hf, "use_qk_norm", False) else None
    return replace(
        base,
        attention=replace(base.attention, qk_norm=qk_norm),
        norm=norm,
        output=replace(base.output, norm=norm, scale=number(hf, "logit_scale", 0.0625)),
        residual=SharedNormParallel(),
    )
