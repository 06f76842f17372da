"""Rotary frequencies are those of transformers, whatever the scaling and however config.json spells it."""

from typing import Any

import pytest
import torch
from tgi_shard.errors import StartError
from tgi_shard.layers.rotary import DynamicScaling, LinearScaling, Rope, RotaryEmbedding, YarnScaling, rotate
from tgi_shard.models import describe, hf_config
from transformers import LlamaConfig
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

CPU = torch.device("cpu")
SIZES = {"hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 4096, "num_hidden_layers": 1}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, "truncate": False},
    "yarn-betas": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 64.0, "beta_slow": 2.0},
}


def config_json(scaling: dict[str, Any], theta: float = 500000.0) -> dict[str, Any]:
    return {"model_type": "llama", **SIZES, "rope_parameters": {"rope_theta": theta, **scaling}}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=list(SCALINGS))
def test_rotated_heads_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    hf = config_json(scaling)
    reference = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"}))
    positions = torch.tensor([0, 1, 2, 700, 1023, 1024, 4095])
    q, k = torch.randn(1, 4, 7, 24), torch.randn(1, 2, 7, 24)
    expected = apply_rotary_pos_emb(q, k, *reference(q, positions[None]))
    table = RotaryEmbedding(hf_config.rope(hf, 24), CPU, torch.float32).table(positions)
    for heads, rotated in zip((q, k), expected, strict=True):
        torch.testing.assert_close(
            rotate(heads[0].transpose(0, 1), table), rotated[0].transpose(0, 1), atol=2e-5, rtol=1e-5
        )


def test_beyond_the_original_positions_dynamic_scaling_grows_with_each_position() -> None:
    """As transformers computes the newest token of a sequence of that length."""
    hf = config_json({"rope_type": "dynamic", "factor": 2.0})
    reference = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"}))
    positions = torch.tensor([4000, 4096, 5000, 8191])
    table = RotaryEmbedding(hf_config.rope(hf, 24), CPU, torch.float32).table(positions)
    for row, position in enumerate(positions):
        expected_cos, expected_sin = reference(table.cos, position[None, None])
        torch.testing.assert_close(table.cos[row], expected_cos[0], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(table.sin[row, :, 12:], expected_sin[0, :, 12:], atol=2e-4, rtol=1e-4)


def test_long_scaling_changes_its_factors_and_magnitude_beyond_the_original_positions() -> None:
    """Within, as transformers computes a short sequence; beyond, as it computes the newest token of a long one."""
    factors = {"short_factor": [1.0 + i / 4 for i in range(12)], "long_factor": [2.0 + i for i in range(12)]}
    hf = config_json({"rope_type": "longrope", **factors, "original_max_position_embeddings": 1024})
    reference = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"}))
    positions = torch.tensor([0, 5, 1023, 1024, 3000])
    table = RotaryEmbedding(hf_config.rope(hf, 24), CPU, torch.float32).table(positions)
    for row, position in enumerate(positions):
        expected_cos, expected_sin = reference(table.cos, position[None, None])
        torch.testing.assert_close(table.cos[row], expected_cos[0], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(table.sin[row, :, 12:], expected_sin[0, :, 12:], atol=2e-4, rtol=1e-4)
    hf["rope_parameters"] |= {"short_mscale": 1.25, "long_mscale": 1.5}
    table = RotaryEmbedding(hf_config.rope(hf, 24), CPU, torch.float32).table(positions)
    assert [round(value, 2) for value in table.cos.square().add(table.sin.square()).sqrt()[:, 0, 0].tolist()] == [
        1.25, 1.25, 1.25, 1.5, 1.5,
    ]  # fmt: skip


def test_neighbouring_pairs_are_rotated_as_gptj_does() -> None:
    heads, positions = torch.randn(3, 2, 24), torch.tensor([0, 7, 300])
    table = RotaryEmbedding(Rope(10000.0, 8, None, "neighbours"), CPU, torch.float32).table(positions)
    sin, cos = gptj.create_sinusoidal_positions(301, 8)[positions].chunk(2, -1)
    expected = gptj.apply_rotary_pos_emb(heads[None, ..., :8], sin[None], cos[None])[0]
    rotated = rotate(heads, table)
    torch.testing.assert_close(rotated[..., :8], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(rotated[..., 8:], heads[..., 8:])


def test_a_rope_narrower_than_the_head_leaves_the_rest_alone() -> None:
    rope = hf_config.rope(config_json({"rope_type": "default", "partial_rotary_factor": 8 / 24}), 24)
    heads = torch.randn(3, 2, 24)
    rotated = rotate(heads, RotaryEmbedding(rope, CPU, torch.float32).table(torch.tensor([5, 6, 7])))
    assert torch.equal(rotated[..., 8:], heads[..., 8:])
    assert not torch.equal(rotated[..., :8], heads[..., :8])


def test_the_older_spelling_of_the_rope_parameters_means_the_same() -> None:
    old = {"model_type": "llama", **SIZES, "rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
    assert hf_config.rope(old, 24) == hf_config.rope(config_json(SCALINGS["llama3"]), 24)
    assert hf_config.rope({**old, "rope_scaling": None}, 24).scaling is None
    assert hf_config.rope({"model_type": "llama", **SIZES}, 24).theta == 10000.0


FULL = {**SIZES, "model_type": "llama", "vocab_size": 10, "intermediate_size": 8}


def test_the_flags_replace_the_scaling_and_extend_the_positions() -> None:
    hf = {**FULL, "rope_scaling": {"type": "llama3", **LLAMA3}}
    for kind, factor, scaling in [
        ("linear", 2.0, LinearScaling(2.0)),
        ("dynamic", 4.0, DynamicScaling(4.0, 4096)),
        (None, 2.0, LinearScaling(2.0)),  # as TGI reads a factor alone
    ]:
        spec, _ = describe(hf, kind, factor)
        assert spec.layers[0].position.scaling == scaling
        assert spec.max_positions == 4096 * factor
    with pytest.raises(StartError, match=r"`--rope-factor` is 0.5, but must be at least 1"):
        describe(hf, "linear", 0.5)
    with pytest.raises(StartError, match=r"`--rope-scaling` linear needs rotary positions, which gpt2 does not have"):
        describe({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9}, "linear", 2.0)


def test_the_longest_context_counts_the_scaling_where_the_config_does_not() -> None:
    assert describe(FULL)[0].max_positions == 4096
    assert describe({**FULL, "rope_scaling": {"type": "dynamic", "factor": 2.0}})[0].max_positions == 8192
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert describe({**FULL, "rope_scaling": yarn})[0].max_positions == 16384
    extended = describe({**FULL, "max_position_embeddings": 16384, "rope_scaling": yarn})[0]
    assert extended.max_positions == 16384
    assert isinstance(extended.layers[0].position.scaling, YarnScaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "`model_type` is 'mamba'; supported are llama, mistral, mixtral"),
        ({"model_type": None}, "`model_type` is None"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"vocab_size": "10"}, "`vocab_size` is '10', expected an integer of at least 1"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        ({"num_attention_heads": True}, "`num_attention_heads` is True"),
        ({"rms_norm_eps": "small"}, "`rms_norm_eps` is 'small', expected a positive number"),
        ({"tie_word_embeddings": 1}, "`tie_word_embeddings` is 1, expected true or false"),
        ({"hidden_act": "mish"}, "`hidden_act` is 'mish'; known are silu"),
        ({"rope_scaling": {"type": "proportional"}}, "rope type 'proportional' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "`short_factor` must be a list of 12 numbers"),
        ({"rope_scaling": {"type": "linear"}}, "`factor` is missing"),
        ({"rope_scaling": "linear"}, "the rope parameters are 'linear'"),
        ({"head_dim": 7}, "need an even head size, but it is 7"),
        ({"partial_rotary_factor": 0.3}, "but it is 7 (`partial_rotary_factor` 0.3 of 24)"),
        ({"model_type": "phimoe", "num_experts_per_tok": 3}, "`num_experts_per_tok` is 3; only 2 is supported"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "`no_rope_layers` must hold 1 numbers"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "only False is supported"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "`alibi` is False; only True is supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq' are not supported yet"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 0}, "`sliding_window` is 0"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": []}, None),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["x"]},
            "`layer_types`",
        ),
    ],
)
def test_a_config_that_cannot_be_served_is_explained_in_one_line(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        describe({**FULL, **changes})
        return
    with pytest.raises(StartError) as caught:
        describe({**FULL, **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
