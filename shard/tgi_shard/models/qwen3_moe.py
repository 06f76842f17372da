"""Qwen3-MoE: Qwen3 whose feed-forward layers are experts.

Follows transformers' models/qwen3_moe (configuration and names only).
"""

from dataclasses import replace

from . import llama, qwen2_moe
from .hf_config import HfConfig, flag, window
from .names import MoeNames
from .spec import DecoderSpec, HeadNorm, RmsNorm, with_windows

NAMES = replace(llama.NAMES, moe=MoeNames(router="mlp.gate", experts=qwen2_moe.EXPERTS))


def spec(hf: HfConfig) -> DecoderSpec:
    base = llama.spec({**hf, "mlp_bias": False})
    base = with_windows(base, (window(hf) if flag(hf, "use_sliding_window", False) else None,) * base.num_layers)
    attention = replace(base.attention, qk_norm=HeadNorm(RmsNorm(base.norm.eps)))
    return replace(qwen2_moe.with_experts(base, hf, 128, shared=None), model_type="qwen3_moe", attention=attention)
