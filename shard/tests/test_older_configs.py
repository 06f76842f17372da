"""Configurations from before a family was in transformers, or from its earlier versions, describe the same model."""

from typing import Any

import pytest
from tgi_shard.models import describe
from tgi_shard.models.spec import DecoderSpec

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 99}
LLAMA_SIZES = {**SIZES, "intermediate_size": 56, "max_position_embeddings": 4096}
FALCON = {"model_type": "falcon", **SIZES}
REFINED_WEB = {"hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 99}
GEMMA3 = {"model_type": "gemma3_text", **LLAMA_SIZES, "head_dim": 8, "num_key_value_heads": 2}
PHI3 = {"model_type": "phi3", **LLAMA_SIZES, "original_max_position_embeddings": 1024}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONG = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}}

# older, newer
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "falcon 7b": (
        {"model_type": "RefinedWebModel", **REFINED_WEB, "multi_query": True, "parallel_attn": True},
        FALCON,
    ),
    "falcon 40b": (
        {"model_type": "RefinedWeb", **REFINED_WEB, "n_head_kv": 2, "parallel_attn": True},
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "phi-3 su": ({**PHI3, "rope_scaling": {"type": "su", **FACTORS}}, PHI3 | LONG),
    "phi-3 yarn": ({**PHI3, "rope_scaling": {"type": "yarn", **FACTORS}}, PHI3 | LONG),
    "gemma 3": (
        {
            **GEMMA3,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "rope_theta": 5e5,
            "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            **GEMMA3,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "pythia": (
        {"model_type": "gpt_neox", **LLAMA_SIZES, "rotary_pct": 0.5, "rotary_emb_base": 5000},
        {
            "model_type": "gpt_neox",
            **LLAMA_SIZES,
            "rope_parameters": {"rope_theta": 5000, "partial_rotary_factor": 0.5},
        },
    ),
    "bloom": (
        {"model_type": "bloom", "n_embed": 48, "n_layer": 2, "num_attention_heads": 6, "vocab_size": 99},
        {"model_type": "bloom", "hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 99},
    ),
    "qwen3 moe": (
        {
            "model_type": "qwen3_moe",
            **LLAMA_SIZES,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "num_experts": 4,
        },
        {
            "model_type": "qwen3_moe",
            **LLAMA_SIZES,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "num_local_experts": 4,
        },
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_older_and_newer_spellings_describe_the_same_model(name: str) -> None:
    older, newer = SAME[name]
    assert describe(older) == describe(newer)


def kinds(spec: DecoderSpec) -> tuple[str, ...]:
    return tuple(type(layer.mlp).__name__ for layer in spec.layers)


def test_layers_that_stay_dense_among_experts_are_those_the_config_names() -> None:
    hf = {"model_type": "qwen2_moe", **LLAMA_SIZES, "num_hidden_layers": 4, "moe_intermediate_size": 8}
    hf |= {"num_experts_per_tok": 2, "num_experts": 4, "shared_expert_intermediate_size": 8}
    assert kinds(describe(hf)[0]) == ("MoeMlp",) * 4
    assert kinds(describe({**hf, "mlp_only_layers": [1, 2]})[0]) == ("MoeMlp", "GatedMlp", "GatedMlp", "MoeMlp")
    assert kinds(describe({**hf, "decoder_sparse_step": 2})[0]) == ("GatedMlp", "MoeMlp") * 2


def test_null_switches_gemma_2s_soft_caps_off_and_absence_does_not() -> None:
    gemma2 = {**GEMMA3, "model_type": "gemma2"}
    spec, _ = describe(gemma2)
    assert (spec.attention.softcap, spec.output.softcap) == (50.0, 30.0)
    spec, _ = describe({**gemma2, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (spec.attention.softcap, spec.output.softcap) == (None, None)
