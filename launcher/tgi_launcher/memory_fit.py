"""How much memory a model needs, estimated before it is loaded. PURE arithmetic on `ModelFacts`.

The shard measures again at warm-up and has the last word on the size of the KV pool; this estimate is there so that a
start that cannot succeed is refused in a second and with numbers, and so that a default never runs out of memory.
"""

from dataclasses import dataclass

from .facts import DTYPE_BYTES, ModelFacts

GIB = 2**30
# What a shard process holds before any weight: interpreter, torch and its libraries (host), the CUDA context (device).
_BASE_BYTES = {"cpu": int(0.35 * GIB), "cuda": int(0.75 * GIB)}
_WEIGHTS_MARGIN = 1.05  # buffers, packing, fragmentation


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes one rank needs on its device."""

    base: int
    weights: int
    kv_per_token: int
    step_per_token: int  # activations of one token of a step
    logits: int  # sampling, for as many rows as may sample in one step

    @property
    def fixed(self) -> int:
        """What is needed whatever the step budget and the KV pool are."""
        return self.base + self.weights + self.logits


def estimate(facts: ModelFacts, dtype: str, world_size: int, device: str, max_rows: int) -> Estimate:
    """Memory of one of `world_size` ranks computing in `dtype` on a "cpu" or "cuda" device."""
    size = DTYPE_BYTES[dtype]
    kv_heads = max(1, -(-facts.num_kv_heads // world_size))
    heads = -(-facts.num_heads // world_size)
    ffn = -(-facts.ffn_size // world_size)
    per_token = 6 * facts.hidden_size + 3 * ffn + 3 * (heads + 2 * kv_heads) * facts.head_dim
    return Estimate(
        base=_BASE_BYTES[device],
        weights=int(facts.weights.num_parameters * size * _WEIGHTS_MARGIN / world_size),
        kv_per_token=2 * facts.num_layers * kv_heads * facts.head_dim * size,
        step_per_token=per_token * size,
        logits=4 * max_rows * facts.vocab_size * 4,
    )


def gib(num_bytes: float) -> str:
    """`num_bytes` for people."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.0f} MiB"
