"""StableLM 2 and StableLM 3B: Llama with LayerNorms and a partial rope; the larger ones with head norms and attention
and MLP side by side.

Follows transformers' models/stablelm (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, RopeDefaults, flag, number
from .spec import DecoderSpec, LayerNorm, OwnHeadNorm, SharedNormParallel

NAMES = replace(llama.NAMES, q_norm="self_attn.q_layernorm.norms.{}", k_norm="self_attn.k_layernorm.norms.{}")


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "head_dim": None, "attention_bias": False, "mlp_bias": False}, RopeDefaults(partial=0.25))
    norm = LayerNorm(number(hf, "layer_norm_eps", 1e-5))
    attention = replace(
        base.attention,
        qkv_bias=flag(hf, "use_qkv_bias", False),
        qk_norm=OwnHeadNorm(LayerNorm(norm.eps, bias=False)) if flag(hf, "qk_layernorm", False) else None,
    )
    return replace(
        base,
        model_type="stablelm",
        attention=attention,
        norm=norm,
        output=replace(base.output, norm=norm),
        residual=SharedNormParallel() if flag(hf, "use_parallel_residual", False) else base.residual,
    )
