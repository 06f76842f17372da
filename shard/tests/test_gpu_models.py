"""Models, sampler and engine on a GPU compute what they compute on the CPU, at sizes that matter and in half precision.

What can run on the CPU as well takes the `device` fixture; the rest needs a GPU.
"""

from dataclasses import replace
from pathlib import Path

import driving
import pytest
import torch
from driving import SAMPLED, Driver, ShardGroup
from model_driver import Driver as ModelDriver
from model_driver import batch_of, load
from test_families import make_reference, prompt, reference_logits
from test_sampling import MIXED, VOCAB, make_batch, random_logits
from tgi_shard import attention
from tgi_shard.attention.base import AttentionSpec
from tgi_shard.attention.reference import ReferenceAttention
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.sampling.watermark import Watermark
from tgi_shard.step import StepInput

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

LLAMA_8B = AttentionSpec(32, 8, 128, scale=128**-0.5, dtype=torch.bfloat16)
SPECS = {
    "llama-8b": LLAMA_8B,
    "window": replace(LLAMA_8B, window=512),
    "softcap-256": AttentionSpec(8, 4, 256, scale=256**-0.5, softcap=50.0, dtype=torch.bfloat16),
    "alibi": AttentionSpec(8, 8, 64, 0.125, alibi_slopes=tuple(2.0**-i for i in range(1, 9)), dtype=torch.float16),
    "multi-query-80": AttentionSpec(71, 1, 80, scale=80**-0.5, dtype=torch.bfloat16),
    "float32": replace(LLAMA_8B, dtype=torch.float32),
}
STEPS = {
    "decode": [(1, 1 + 61 * i) for i in range(64)],
    "one long": [(1, 30_000)],
    "prompts": [(1500, 1500), (33, 33), (1, 1)],
    "mixed": [(512, 4000), (1, 2500), (1, 17), (5, 900), (300, 300)],
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "step", "block_size"),
    [*((name, step, 16) for name in SPECS for step in STEPS), ("llama-8b", "mixed", 256), ("window", "mixed", 32)],
)
def test_every_usable_backend_is_the_reference_at_full_size(name: str, step: str, block_size: int) -> None:
    spec, lengths = SPECS[name], STEPS[step]
    counts = [-(-context // block_size) for _, context in lengths]
    free = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[free.pop() for _ in range(count)] for count in counts]
    batch = batch_of([q for q, _ in lengths], [c for _, c in lengths], tables, block_size, CUDA)
    torch.manual_seed(0)
    shape = (sum(counts), block_size, spec.num_kv_heads, spec.head_dim)
    kv = tuple(torch.randn(shape, dtype=spec.dtype, device=CUDA) for _ in range(2))
    width = spec.num_heads + 2 * spec.num_kv_heads
    heads = torch.randn(sum(batch.query_lengths), width, spec.head_dim, dtype=spec.dtype, device=CUDA)
    q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)

    def run(backend: attention.AttentionBackend) -> torch.Tensor:
        with torch.inference_mode():
            plan = backend.plan(batch, [spec])
            return backend.forward(q, k, v, (kv[0].clone(), kv[1].clone()), batch, plan, spec).float()

    expected = run(ReferenceAttention())
    usable = [attention.create(other) for other in attention.BACKENDS if other != "reference"]
    usable = [b for b in usable if not b.objections(spec, CUDA, spec.dtype, block_size)]
    assert usable, "no backend but the reference can serve this"
    for backend in usable:
        error = (run(backend) - expected).norm() / expected.norm()
        assert error < {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[spec.dtype], backend.name


@pytest.mark.parametrize(
    "name", ["llama", "mistral-window", "qwen3", "gemma2", "gpt-neox", "bloom", "olmo2", "cohere2"]
)
def test_bfloat16_is_as_close_to_float32_as_transformers(name: str, device: torch.device, tmp_path: Path) -> None:
    """Not for experts: in half precision now and then another one is chosen, which is no matter of closeness."""
    model = make_reference(name)
    model.save_pretrained(tmp_path)
    ids = prompt(30)
    exact = reference_logits(model, ids)
    model.to(device, torch.bfloat16)
    with torch.no_grad():
        theirs = model(torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
    decoder = load(tmp_path, dtype=torch.bfloat16, device=device)
    for chunk in (None, 7, 1):
        ours = ModelDriver(decoder, scattered=True).prompt("a", ids, chunk=chunk).cpu()
        assert (ours - exact).norm() < 1.3 * (theirs - exact).norm()


@pytest.mark.gpu
def test_the_sampler_draws_the_same_tokens_on_both_devices() -> None:
    logits = random_logits(len(MIXED))
    sampler = Sampler(VOCAB, Watermark(VOCAB, 0.5, 2.0))
    batch = make_batch(MIXED)
    on_cpu = sampler(logits.clone(), batch)
    on_gpu = sampler(logits.to(CUDA), replace(batch, tokens=batch.tokens.to(CUDA)))
    assert on_gpu.ids.tolist() == on_cpu.ids.tolist()
    torch.testing.assert_close(on_gpu.logprobs.cpu(), on_cpu.logprobs, atol=1e-4, rtol=1e-4)
    assert {row: [token for token, _ in top] for row, top in on_gpu.top.items()} == {
        row: [token for token, _ in top] for row, top in on_cpu.top.items()
    }


def generate(step: driving.Step) -> list[driving.Live]:
    d = Driver(step)
    tokens = [7, 11, 13, 17, 19, 23, 29, 31, 37]
    lives = [d.add(tokens, prompt_logprobs=True, top_n=2), d.add(tokens[:3], **SAMPLED), d.add(tokens * 3, top_k=5)]
    d.step({lives[0]: 4})
    d.run(10)
    return lives


def same(on_gpu: list[driving.Live], on_cpu: list[driving.Live]) -> None:
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.generated == b.generated
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
        assert a.prompt_logprobs == pytest.approx(b.prompt_logprobs, abs=1e-3)
        assert a.top == b.top


@pytest.mark.gpu
def test_the_engine_generates_the_same_tokens_on_both_devices(tmp_path: Path) -> None:
    directory = driving.save_tiny_llama(tmp_path)
    on_gpu = driving.load_tiny(directory, CUDA)
    assert on_gpu.backend.name in ("triton", "flash-attn")
    same(generate(driving.make_engine(on_gpu).step), generate(driving.make_engine(driving.load_tiny(directory)).step))


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
def test_shard_processes_on_gpus_are_the_engine_on_the_cpu(world_size: int, tmp_path: Path) -> None:
    """Start, measured warm-up, KV pool, gRPC; with two GPUs also NCCL."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    directory = driving.save_tiny_llama(tmp_path / "model")
    with ShardGroup(directory, tmp_path, world_size, device="cuda", dtype="float32") as group:
        on_gpu = generate(group.step)
    same(on_gpu, generate(driving.make_engine(driving.load_tiny(directory)).step))


@pytest.mark.gpu
def test_the_model_never_waits_for_the_device(tmp_path: Path) -> None:
    """Planning and computing a step only enqueue work; reading the answer is the engine's one wait."""
    decoder = driving.load_tiny(driving.save_tiny_llama(tmp_path), CUDA)
    driver = ModelDriver(decoder)
    warm = {"a": list(range(20)), "b": [5]}
    driver.step(warm)
    driver.step({"a": [1], "b": [2]})
    batch = batch_of([1, 9], [22, 9], [list(range(6)), list(range(6, 9))], 4, CUDA)
    ids, positions = torch.arange(10, device=CUDA), torch.tensor([21, *range(9)], device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            plan = decoder.backend.plan(batch, list(dict.fromkeys(decoder.attention_specs)))
            decoder.logits(decoder.forward(StepInput(ids, positions, batch, plan), driver.kv))
    finally:
        torch.cuda.set_sync_debug_mode("default")
