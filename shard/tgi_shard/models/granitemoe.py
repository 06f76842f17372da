"""Granite 3 MoE: Granite whose feed-forward layers are experts, stacked in one tensor each.

Follows transformers' models/granitemoe (configuration and names only).
"""

from dataclasses import replace

from ..layers.moe import SoftmaxRouter
from . import granite
from .hf_config import HfConfig, activation, integer
from .names import MoeNames, StackedExperts
from .spec import DecoderSpec, MoeMlp

EXPERTS = StackedExperts("block_sparse_moe.input_linear", "block_sparse_moe.output_linear")
NAMES = replace(granite.NAMES, moe=MoeNames(router="block_sparse_moe.router.layer", experts=EXPERTS))


def spec(hf: HfConfig) -> DecoderSpec:
    base = granite.spec({**hf, "mlp_bias": False})
    mlp = MoeMlp(
        experts=integer(hf, "num_local_experts", 8),
        active=integer(hf, "num_experts_per_tok", 2),
        size=integer(hf, "intermediate_size"),
        activation=activation(hf),
        # A softmax over the chosen experts' logits is that over all of them, normalized.
        router=SoftmaxRouter(normalized=True),
    )
    return replace(base, model_type="granitemoe", layers=tuple(replace(layer, mlp=mlp) for layer in base.layers))
