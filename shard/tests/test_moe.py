"""Experts: routing is that of transformers, and visiting the chosen ones is the grouped product of all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_driver import load
from test_families import EXPERTS, make_model
from tgi_shard.errors import StartError
from tgi_shard.layers.linear import PlainMatmul
from tgi_shard.layers.moe import GroupedExperts, MoeLayer, SoftmaxRouter, SparseMixer, VisitedExperts, route
from tgi_shard.parallel import Parallel
from transformers.models.phimoe.modeling_phimoe import sparsemixer

torch.set_num_threads(1)
NUM_EXPERTS, HIDDEN, SIZE = 7, 24, 16


def make_experts() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(NUM_EXPERTS, 2 * SIZE, HIDDEN) / 4, torch.randn(NUM_EXPERTS, HIDDEN, SIZE) / 4


def visited(gate_up: torch.Tensor, down: torch.Tensor) -> VisitedExperts:
    return VisitedExperts([PlainMatmul(w, None) for w in gate_up], [PlainMatmul(w, None) for w in down], "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_visiting_the_chosen_experts_is_the_grouped_product_of_all(
    tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    weights = [weight.to(device, dtype) for weight in make_experts()]
    x = torch.randn(tokens, HIDDEN).to(device, dtype)
    gate = PlainMatmul(torch.randn(NUM_EXPERTS, HIDDEN).to(device, dtype), None)
    results = []
    for experts in (visited(*weights), GroupedExperts(*weights, "silu")):
        layer = MoeLayer(gate, SoftmaxRouter(normalized=True), 2, experts, None, Parallel.single())
        results.append(layer(x))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


def test_the_layer_is_the_weighted_sum_of_each_tokens_experts() -> None:
    gate_up, down = make_experts()
    x, router = torch.randn(5, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN)
    layer = MoeLayer(
        PlainMatmul(router, None), SoftmaxRouter(normalized=False), 3, visited(gate_up, down), None, Parallel.single()
    )
    got = layer(x)
    for row, token in enumerate(x):
        probabilities = (router @ token).softmax(-1)
        expected = torch.zeros(HIDDEN)
        for expert in probabilities.topk(3).indices:
            gate, up = (gate_up[expert] @ token).chunk(2)
            expected += probabilities[expert] * (down[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_the_sparse_mixer_is_that_of_transformers(jitter: float) -> None:
    torch.manual_seed(1)
    scores = torch.randn(400, 6) * torch.tensor([0.3, 1.0, 3.0, 1.0]).repeat(100)[:, None]
    expected_weights, expected = sparsemixer(scores, jitter_eps=jitter, training=False)
    weights, experts = route(SparseMixer(jitter), scores, 2)
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert (weights < 1).any()  # some were weighed against others


@pytest.mark.parametrize(
    ("config_class", "changes"), [("Qwen3MoeConfig", EXPERTS), ("GraniteMoeConfig", {"num_local_experts": 5})]
)
def test_other_devices_hold_the_experts_of_a_layer_in_two_tensors(
    config_class: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    make_model(config_class, changes).save_pretrained(tmp_path)
    decoder = load(tmp_path, device=torch.device("meta"), attention="reference")
    assert all(isinstance(layer.mlp._experts, GroupedExperts) for layer in decoder._layers)
    experts = [layer.mlp._experts.num_bytes for layer in load(tmp_path)._layers]
    assert [layer.mlp._experts.num_bytes for layer in decoder._layers] == experts


def test_experts_a_grouped_product_cannot_read_are_refused(tmp_path: Path) -> None:
    """Only CPUs visit experts one by one."""
    make_model("Qwen3MoeConfig", EXPERTS | {"moe_intermediate_size": 18}).save_pretrained(tmp_path)
    with pytest.raises(StartError, match="on meta the experts' size on each rank has to be a multiple of 4; it is 18"):
        load(tmp_path, device=torch.device("meta"), attention="reference")
