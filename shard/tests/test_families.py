"""Every family computes what transformers computes: tiny random models of awkward shapes, in fp32.

Whole, in chunks, token by token, from a cached prefix and in a crowd. Two ranks: test_parallel.py.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_driver import Driver, load
from tgi_launcher.facts import Weights, parse_config
from tgi_shard.models import describe

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

# Families whose heads are hidden_size / num_attention_heads.
SQUARE: dict[str, Any] = {"hidden_size": 48, "head_dim": None}
# Plain MLPs are as wide as 32 divides, as in every published model: torch's vector and scalar tanh differ in the last
# bit, so that what is left over at the end of a step's rows would depend on their number.
PLAIN: dict[str, Any] = {**SQUARE, "intermediate_size": 96}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 3}
LONG: dict[str, Any] = {
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 60,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}

# name -> (transformers configuration class, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-one-kv-head": ("LlamaConfig", {"num_key_value_heads": 1, "num_attention_heads": 5}),
    "llama-multi-head": (
        "LlamaConfig",
        {"num_key_value_heads": 4, "num_attention_heads": 4, "hidden_size": 48, "head_dim": None},
    ),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("LlamaConfig", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("LlamaConfig", rope("linear", factor=3.0)),
    "llama-dynamic": ("LlamaConfig", {**rope("dynamic", factor=2.0), "max_position_embeddings": 32}),
    "llama-llama3": ("LlamaConfig", rope("llama3", **LLAMA3)),
    "llama-yarn": ("LlamaConfig", rope("yarn", **YARN)),
    "llama-yarn-mscale": (
        "LlamaConfig",
        rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.3, beta_fast=20, truncate=False),
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7}),
    "mistral-window-2": ("MistralConfig", {"sliding_window": 2}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "head_dim": None, "hidden_size": 48}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "hidden_size": 48, "head_dim": None},
    ),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-window": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "mixtral": ("MixtralConfig", {"sliding_window": 7, "num_local_experts": 5}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**SQUARE, **EXPERTS, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2, "num_hidden_layers": 3},
    ),
    "qwen2-moe-window": (
        "Qwen2MoeConfig",
        {
            **(SQUARE | EXPERTS | ALTERNATING),
            "shared_expert_intermediate_size": 28,
            "use_sliding_window": True,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "phimoe": ("PhimoeConfig", {**SQUARE, "num_local_experts": 5, "lm_head_bias": True, "attention_bias": True}),
    "granitemoe": (
        "GraniteMoeConfig",
        {**SQUARE, "num_local_experts": 5, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
    ),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {**ALTERNATING, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "Gemma2Config",
        {**ALTERNATING, "attn_logit_softcapping": "null", "final_logit_softcapping": "null"},
    ),
    "gemma3": ("Gemma3TextConfig", {**ALTERNATING, "query_pre_attn_scalar": 20}),
    "gemma3-ropes": (
        "Gemma3TextConfig",
        {
            **ALTERNATING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            },
        },
    ),
    "phi": ("PhiConfig", {**PLAIN, "hidden_act": "gelu_new"}),
    "phi-norms": ("PhiConfig", {**PLAIN, "qk_layernorm": True, "num_key_value_heads": 3}),
    "phi3": ("Phi3Config", {**SQUARE, "hidden_size": 72, "sliding_window": 9}),
    "phi3-long": ("Phi3Config", {**SQUARE, "hidden_size": 72, "sliding_window": None, **rope("longrope", **LONG)}),
    "stablelm": ("StableLmConfig", {**SQUARE, "use_qkv_bias": True, "num_key_value_heads": 6}),
    "stablelm-parallel": ("StableLmConfig", {**SQUARE, "use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", {**PLAIN, "sliding_window": 6, "hidden_act": "gelu_pytorch_tanh"}),
    "cohere": ("CohereConfig", {**SQUARE, "use_qk_norm": True, "logit_scale": 0.25}),
    "cohere-plain": (
        "CohereConfig",
        {**SQUARE, "attention_bias": True, "tie_word_embeddings": False, "logit_scale": 0.25},
    ),
    "cohere2": ("Cohere2Config", {**SQUARE, **ALTERNATING, "logit_scale": 0.5}),
    "granite": (
        "GraniteConfig",
        {
            **SQUARE,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.0,
            "mlp_bias": True,
        },
    ),
    "ernie4-5": ("Ernie4_5Config", {"use_bias": True}),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "olmo": ("OlmoConfig", {**SQUARE, "clip_qkv": 0.8}),
    "olmo2": ("Olmo2Config", {**SQUARE}),
    "olmo3": (
        "Olmo3Config",
        {
            **(SQUARE | ALTERNATING),
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "yarn", **YARN, "rope_theta": 5000.0},
            },
        },
    ),
    "seed-oss": ("SeedOssConfig", {}),
    "smollm3": ("SmolLM3Config", {**SQUARE, "no_rope_layers": [1, 0]}),
    "smollm3-window": (
        "SmolLM3Config",
        {**SQUARE, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 5},
    ),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox-sequential": (
        "GPTNeoXConfig",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "gptj": ("GPTJConfig", {"rotary_dim": 4}),
    "gpt2": ("GPT2Config", {}),
    "gpt2-inner": ("GPT2Config", {"n_inner": 96, "scale_attn_weights": False, "tie_word_embeddings": False}),
    "gpt-bigcode": ("GPTBigCodeConfig", {}),
    "gpt-bigcode-multi-head": ("GPTBigCodeConfig", {"multi_query": False}),
    "opt": ("OPTConfig", {}),
    "opt-after": ("OPTConfig", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-bare": (
        "OPTConfig",
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "falcon-7b": ("FalconConfig", {}),
    "falcon-40b": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": ("FalconConfig", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom": ("BloomConfig", {}),
    "mpt": ("MptConfig", {}),
    "mpt-clipped": ("MptConfig", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}, "n_heads": 8}),
}

# Configuration classes with other names for the sizes, or with fewer of them.
GPT2_SIZES = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
PLAIN_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "GPT2Config": GPT2_SIZES,
    "GPTJConfig": GPT2_SIZES,
    "GPTBigCodeConfig": GPT2_SIZES,
    "GPTNeoXConfig": {**PLAIN_SIZES, "intermediate_size": 96, "max_position_embeddings": 64},
    "OPTConfig": {**PLAIN_SIZES, "ffn_dim": 56, "max_position_embeddings": 64, "init_std": 0.2},
    "FalconConfig": {**PLAIN_SIZES, "max_position_embeddings": 64},
    "BloomConfig": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
    "MptConfig": {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64},
}
SHARED_SIZES = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


def make_reference(name: str) -> Any:
    return make_model(*MODELS[name])


def make_model(config_class: str, changes: dict[str, Any]) -> Any:
    """A random transformers model in fp32, biases and norms included."""
    sizes = SIZES
    if config_class in OTHER_SIZES:
        sizes = {key: SIZES[key] for key in SHARED_SIZES} | OTHER_SIZES[config_class]
    sizes = {key: value for key, value in {**sizes, **changes}.items() if value is not None or key.endswith("_id")}
    if changes.get("sliding_window", 0) is None:
        sizes["sliding_window"] = None
    sizes = {key: None if value == "null" else value for key, value in sizes.items()}
    torch.manual_seed(len(changes))
    # Falcon's eager attention adds ALiBi twice.
    implementation = "sdpa" if config_class == "FalconConfig" else "eager"
    config = getattr(transformers, config_class)(**sizes, attn_implementation=implementation)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model and the directory it was saved to."""
    model = make_reference(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(SIZES["vocab_size"]), k=length)


def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def reference_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """transformers' own loop with its own cache: the prompt at once, then token by token."""
    generated, cache, new = [], None, ids
    with torch.no_grad():
        for _ in range(count):
            result = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache, new = result.past_key_values, [int(result.logits[0, -1].argmax())]
            generated += new
    return generated


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_logits_of_a_prompt_are_those_of_transformers(pair: tuple[Any, Path], device: torch.device) -> None:
    model, directory = pair
    ids = prompt(30)
    expected = reference_logits(model, ids)
    assert expected.std() > 0.1  # the model says something
    decoder = load(directory, device=device)
    close(Driver(decoder).prompt("whole", ids), expected)
    close(Driver(decoder, scattered=True).prompt("chunks", ids, chunk=7), expected)
    close(Driver(decoder).prompt("one by one", ids, chunk=1), expected)


def test_greedy_tokens_are_those_of_transformers(pair: tuple[Any, Path], device: torch.device) -> None:
    model, directory = pair
    ids = prompt(21, seed=1)
    assert Driver(load(directory, device=device)).greedy("a", ids, 24) == reference_greedy(model, ids, 24)


def test_a_request_in_a_crowd_computes_what_it_computes_alone(pair: tuple[Any, Path], device: torch.device) -> None:
    model, directory = pair
    driver = Driver(load(directory, device=device), scattered=True)
    prompts = {str(length): prompt(length, seed=length) for length in (1, 2, 3, 8, 9, 13, 21, 30)}
    expected = {name: reference_logits(model, ids) for name, ids in prompts.items()}
    got: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}
    done = dict.fromkeys(prompts, 0)
    sizes = random.Random(5)
    while any(done[name] < len(ids) for name, ids in prompts.items()):
        waiting = [name for name, ids in prompts.items() if done[name] < len(ids)]
        chosen = waiting[: sizes.randint(1, len(waiting))]
        step = {name: prompts[name][done[name] : done[name] + sizes.choice([1, 1, 4, 9])] for name in chosen}
        for name, logits in driver.step(step).items():
            got[name].append(logits)
            done[name] += len(step[name])
    for name in prompts:
        close(torch.cat(got[name]), expected[name])


def test_a_cached_prefix_is_as_good_as_a_computed_one(pair: tuple[Any, Path], device: torch.device) -> None:
    model, directory = pair
    driver, shared = Driver(load(directory, device=device), scattered=True), prompt(16)
    driver.prompt("first", [*shared, 1, 2, 3], chunk=8)
    ids = [*shared, *prompt(11, seed=3)]
    driver.share("second", "first", num_blocks=4)
    close(driver.prompt("second", ids[16:]), reference_logits(model, ids)[16:])


def test_the_launcher_plans_with_the_numbers_of_the_shard(pair: tuple[Any, Path]) -> None:
    """Both read config.json on their own: one to estimate memory, the other to build the model."""
    hf = json.loads((pair[1] / "config.json").read_text())
    spec, _ = describe(hf)
    facts = parse_config(hf, Weights(1, 4, "float32"))
    attention = spec.attention
    assert (facts.num_heads, facts.num_kv_heads, facts.head_dim) == (
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
    )
    assert (facts.num_layers, facts.hidden_size, facts.vocab_size) == (spec.num_layers, spec.hidden, spec.vocab)
    if "factor" not in (hf.get("rope_parameters") or {}):  # the shard stretches, the launcher takes config.json's word
        assert facts.max_positions in (None, spec.max_positions)


def test_on_cpu_company_changes_no_bit(pair: tuple[Any, Path]) -> None:
    """What the other rows of a step are makes no difference at all, whatever their number."""
    _, directory = pair
    decoder = load(directory)
    if any(type(layer.attention._qkv).__name__ != "PackedMatmul" for layer in decoder._layers):
        pytest.skip("only oneDNN's packed product promises this")
    prompts = {str(length): prompt(length, seed=length) for length in (1, 9, 30)}
    together = Driver(decoder)
    crowd = [together.step(prompts), *(together.step({key: [token] for key in prompts}) for token in (5, 6, 7))]
    for name, ids in prompts.items():
        alone = Driver(decoder)
        steps = [alone.step({name: ids}), *(alone.step({name: [token]}) for token in (5, 6, 7))]
        assert all(torch.equal(a[name], b[name]) for a, b in zip(steps, crowd, strict=True))
