"""Granite 3: Llama with multipliers on the embedding, the scores, the residuals and the logits.

Follows transformers' models/granite (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, number
from .spec import DecoderSpec, Input, PreNorm

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec(hf)
    return replace(
        base,
        model_type="granite",
        attention=replace(base.attention, scale=number(hf, "attention_multiplier", 1.0)),
        input=Input(scale=number(hf, "embedding_multiplier", 1.0)),
        output=replace(base.output, scale=1 / number(hf, "logits_scaling", 1.0)),
        residual=PreNorm(multiplier=number(hf, "residual_multiplier", 1.0)),
    )
