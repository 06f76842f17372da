"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 whose feed-forward layers are experts beside one that all tokens share.

Follows transformers' models/qwen2_moe (configuration and names only).
"""

from dataclasses import replace

from ..layers.moe import SoftmaxRouter
from . import hf_config, llama
from .hf_config import HfConfig, activation, flag, integer
from .names import Concat, MoeNames, SplitExperts
from .spec import DecoderSpec, MoeMlp, SharedExpert, with_windows

EXPERTS = SplitExperts(gate="mlp.experts.{}.gate_proj", up="mlp.experts.{}.up_proj", down="mlp.experts.{}.down_proj")
NAMES = replace(
    llama.NAMES,
    moe=MoeNames(
        router="mlp.gate",
        experts=EXPERTS,
        shared_gate_up=Concat(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
        shared_down="mlp.shared_expert.down_proj",
        shared_gate="mlp.shared_expert_gate",
    ),
)


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "attention_bias": False, "mlp_bias": False})
    base = with_windows(base, windows(hf, base.num_layers))
    shared = SharedExpert(integer(hf, "shared_expert_intermediate_size", 5632))
    base = replace(base, attention=replace(base.attention, qkv_bias=flag(hf, "qkv_bias", True)))
    return replace(with_experts(base, hf, 60, shared), model_type="qwen2_moe")


def windows(hf: HfConfig, layers: int) -> tuple[int | None, ...]:
    """`layer_types` where it is given, else every second layer below `max_window_layers`."""
    if not flag(hf, "use_sliding_window", False):
        return (None,) * layers
    below = integer(hf, "max_window_layers", 28, least=0)
    return hf_config.windows(hf, layers, lambda layer: (layer + 1) % 2 == 1 and layer < below)


def with_experts(base: DecoderSpec, hf: HfConfig, experts: int, shared: SharedExpert | None) -> DecoderSpec:
    """Experts (so many, unless config.json says otherwise) in every `decoder_sparse_step`-th layer, except those that
    `mlp_only_layers` lists."""
    mlp = MoeMlp(
        experts=integer(hf, "num_experts", integer(hf, "num_local_experts", experts)),
        active=integer(hf, "num_experts_per_tok"),
        size=integer(hf, "moe_intermediate_size"),
        activation=activation(hf),
        router=SoftmaxRouter(normalized=flag(hf, "norm_topk_prob", False)),
        shared=shared,
    )
    step, dense = integer(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    layers = (
        layer if number in dense or (number + 1) % step else replace(layer, mlp=mlp)
        for number, layer in enumerate(base.layers)
    )
    return replace(base, layers=tuple(layers))
