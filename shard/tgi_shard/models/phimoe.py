"""Phi-3.5-MoE: Mixtral's layout with LayerNorms, biases, and a router of its own.

Follows transformers' models/phimoe (configuration and names only), except beyond the original positions: there the long
factors apply, as the model was trained and as transformers itself did before version 5.
"""

from dataclasses import replace

from ..layers.moe import SparseMixer
from . import llama, mixtral
from .hf_config import HfConfig, RopeDefaults, activation, flag, integer, number, refuse, window
from .spec import DecoderSpec, LayerNorm, MoeMlp

NAMES = mixtral.NAMES


def spec(hf: HfConfig) -> DecoderSpec:
    refuse(hf, "num_experts_per_tok", 2)
    base = llama.spec({**hf, "mlp_bias": False}, RopeDefaults(theta=1e6))
    norm = LayerNorm(number(hf, "rms_norm_eps", 1e-5))
    mlp = MoeMlp(
        experts=integer(hf, "num_local_experts", 16),
        active=2,
        size=integer(hf, "intermediate_size"),
        activation=activation(hf),
        router=SparseMixer(number(hf, "router_jitter_noise", 0.01)),
    )
    return replace(
        base,
        model_type="phimoe",
        norm=norm,
        layers=tuple(replace(layer, mlp=mlp, window=window(hf)) for layer in base.layers),
        output=replace(base.output, norm=norm, bias=flag(hf, "lm_head_bias", False)),
    )
