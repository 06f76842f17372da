"""Launches the Triton backend on random steps without a GPU, and prints which kernels had to be compiled, and when.

Run by test_triton_compile.py in a process of its own. Everything is real up to the compiler: argument binding,
specialisation, cache keys. A stand-in for the driver says "Hopper", compiling only takes note, launching does nothing.
"""

import json
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from model_driver import batch_of
from tgi_shard.attention import triton as backend_module
from tgi_shard.attention.base import AttentionSpec
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BLOCK_SIZE = 16


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def note_compilations() -> list[str]:
    """From now on kernels are neither compiled nor launched; the list grows by the name of each that would be."""
    compiled: list[str] = []
    run = JITFunction.run

    def note(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        compiled.append(self.fn.__name__)
        kernel = SimpleNamespace()
        self.device_caches[device][0][key] = kernel
        return kernel

    def bind_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction._do_compile, JITFunction.run = note, bind_only
    return compiled


def step(backend: backend_module.TritonAttention, spec: AttentionSpec, lengths: list[tuple[int, int]]) -> None:
    free = iter(range(10_000))
    tables = [[next(free) for _ in range(-(-context // BLOCK_SIZE))] for _, context in lengths]
    batch = batch_of([query for query, _ in lengths], [context for _, context in lengths], tables, BLOCK_SIZE)
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    fused = torch.zeros(sum(batch.query_lengths), sum(heads), spec.head_dim, dtype=spec.dtype)
    q, k, v = fused.split(heads, 1)
    pool = torch.zeros(4, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype=spec.dtype)
    plan = replace(backend.plan(batch, [spec]), interpreted=False)
    backend.forward(q, k, v, (pool, pool), batch, plan, spec)


def main() -> None:
    driver.set_active(Hopper())
    backend_module.INTERPRETED = ((9, 0), 132)
    compiled = note_compilations()
    spec = AttentionSpec(32, 8, 128, scale=0.1, window=1000, dtype=torch.bfloat16)
    backend = backend_module.TritonAttention(compile_early=False)
    warm = backend_module._long_batch(spec, torch.device("cpu"), BLOCK_SIZE)
    step(backend, spec, list(zip(warm.query_lengths, warm.context_lengths, strict=True)))
    in_warm_up = list(compiled)
    compiled.clear()
    choose = random.Random(0)
    for _ in range(40):
        queries = [choose.choice([1, 1, 1, 2, 5, 33, 200]) for _ in range(choose.randint(1, 40))]
        step(backend, spec, [(query, query + choose.choice([0, 1, 15, 100, 700, 3000])) for query in queries])
    print(json.dumps({"warm-up": sorted(in_warm_up), "later": compiled}))


if __name__ == "__main__":
    main()
