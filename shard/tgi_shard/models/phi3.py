"""Phi-3, Phi-3.5 and Phi-4: Llama with packed q, k, v and packed gate, up; long ropes beyond the original positions.

Follows transformers' models/phi3 (configuration and names only). Early ones call the long rope "su" or "yarn".
"""

from dataclasses import replace

from . import llama
from .hf_config import HfConfig, window
from .names import Packed
from .spec import DecoderSpec, with_windows

NAMES = replace(llama.NAMES, qkv=Packed("self_attn.qkv_proj"), gate_up=Packed("mlp.gate_up_proj"))


def spec(hf: HfConfig) -> DecoderSpec:
    fixed = {"attention_bias": False, "mlp_bias": False}
    base = llama.spec({"rms_norm_eps": 1e-5, **hf, **fixed, "rope_parameters": _rope_parameters(hf)})
    return replace(with_windows(base, (window(hf),) * base.num_layers), model_type="phi3")


def _rope_parameters(hf: HfConfig) -> object:
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if isinstance(parameters, dict) and "yarn" in (parameters.get("rope_type"), parameters.get("type")):
        return {**parameters, "rope_type": "longrope"}
    return parameters
