"""Every family computes what transformers computes: tiny random models of awkward shapes, in fp32."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_driver import Driver, load

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
}


def make_reference(name: str) -> Any:
    return make_model(*MODELS[name])


def make_model(config_class: str, changes: dict[str, Any]) -> Any:
    """A random transformers model in fp32 and eager attention, biases and norms included."""
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if value is not None or key.endswith("_id")}
    if changes.get("sliding_window", 0) is None:
        sizes["sliding_window"] = None
    torch.manual_seed(len(changes))
    config = getattr(transformers, config_class)(**sizes, attn_implementation="eager")
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
    prompts = {str(length): prompt(length, seed=length) for length in (1, 3, 8, 13, 30)}
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
