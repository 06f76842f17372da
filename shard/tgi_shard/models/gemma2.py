"""Gemma 2: Gemma with norms around attention and MLP, soft caps, and a sliding window on every second layer.

Follows transformers' models/gemma2 (configuration and names only).
"""

from dataclasses import replace

from . import gemma
from .hf_config import HfConfig, nullable_number, number, windows
from .spec import DecoderSpec, SandwichNorm, with_windows

NAMES = replace(
    gemma.NAMES,
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def spec(hf: HfConfig) -> DecoderSpec:
    base = gemma.spec(hf)
    attention = replace(
        base.attention,
        scale=number(hf, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=nullable_number(hf, "attn_logit_softcapping", 50.0),
    )
    sliding = windows({"sliding_window": 4096, **hf}, base.num_layers, lambda layer: layer % 2 == 0)
    return replace(
        with_windows(base, sliding),
        model_type="gemma2",
        attention=attention,
        output=replace(base.output, softcap=nullable_number(hf, "final_logit_softcapping", 30.0)),
        residual=SandwichNorm(),
    )
