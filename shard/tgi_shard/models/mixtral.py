"""Mixtral: Mistral with experts in place of every feed-forward layer.

Follows transformers' models/mixtral (configuration and names only).
"""

from dataclasses import replace

from ..layers.moe import SoftmaxRouter
from . import llama
from .hf_config import HfConfig, RopeDefaults, activation, integer, number, window
from .names import MoeNames, SplitExperts
from .spec import DecoderSpec, MoeMlp, RmsNorm

EXPERTS = SplitExperts(
    gate="block_sparse_moe.experts.{}.w1",
    up="block_sparse_moe.experts.{}.w3",
    down="block_sparse_moe.experts.{}.w2",
)
NAMES = replace(llama.NAMES, moe=MoeNames(router="block_sparse_moe.gate", experts=EXPERTS))


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "attention_bias": False, "mlp_bias": False}, RopeDefaults(theta=1e6))
    norm = RmsNorm(number(hf, "rms_norm_eps", 1e-5))
    mlp = MoeMlp(
        experts=integer(hf, "num_local_experts", 8),
        active=integer(hf, "num_experts_per_tok", 2),
        size=integer(hf, "intermediate_size"),
        activation=activation(hf),
        router=SoftmaxRouter(normalized=True),
    )
    return replace(
        base,
        model_type="mixtral",
        norm=norm,
        layers=tuple(replace(layer, mlp=mlp, window=window(hf)) for layer in base.layers),
        output=replace(base.output, norm=norm),
    )
