"""OLMo: Llama with norms that learn nothing, and clipped q, k and v in some.

Follows transformers' models/olmo (configuration and names only).
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, nullable_number
from .spec import BareLayerNorm, DecoderSpec

NAMES = llama.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "mlp_bias": False})
    norm = BareLayerNorm(1e-5)
    return replace(
        base,
        model_type="olmo",
        attention=replace(base.attention, qkv_clip=nullable_number(hf, "clip_qkv")),
        norm=norm,
        output=replace(base.output, norm=norm),
    )
