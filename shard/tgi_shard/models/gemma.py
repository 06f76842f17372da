"""Gemma: Llama with 1 + w norms, a scaled embedding, tanh GELU and a tied head.

Follows transformers' models/gemma (configuration and names only). Old configurations say `hidden_act` "gelu" and mean
the tanh approximation, which every Gemma was trained with.
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig
from .spec import DecoderSpec, GatedMlp, Input, OffsetRmsNorm

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    given = {key: value for key, value in hf.items() if value is not None}
    base = llama.spec({"head_dim": 256, "tie_word_embeddings": True, **given, "mlp_bias": False})
    norm = OffsetRmsNorm(base.norm.eps)
    mlp = GatedMlp(base.layers[0].mlp.size, "gelu_tanh")
    return replace(
        base,
        model_type="gemma",
        norm=norm,
        layers=tuple(replace(layer, mlp=mlp) for layer in base.layers),
        input=Input(scale=base.hidden**0.5),
        output=replace(base.output, norm=norm),
    )
