"""Test help: tiny random checkpoints from transformers configs, and a driver that feeds a Decoder hand-made steps.

`Driver` is the engine in miniature: it hands out blocks, builds AttentionBatch and StepInput, and keeps the KV pool. It
works on any device, so that gpu-check uses it too. Nothing here is shared with the engine on purpose.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tgi_shard.attention.base import AttentionBatch
from tgi_shard.config import ShardConfig
from tgi_shard.models import Decoder, load_model
from tgi_shard.parallel import Parallel
from tgi_shard.step import StepInput
from torch import Tensor

CPU = torch.device("cpu")


def load(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    parallel: Parallel | None = None,
    attention: str | None = None,
    block_size: int = 4,
) -> Decoder:
    config = ShardConfig(model_dir=str(directory), model_id="tiny", attention=attention, block_size=block_size)
    return load_model(config, parallel or Parallel.single(), device, dtype, lambda done, total: None)


def batch_of(
    query_lengths: list[int], context_lengths: list[int], tables: list[list[int]], size: int, device: torch.device = CPU
) -> AttentionBatch:
    """The AttentionBatch of one step. tables: block ids of each request, at least as many as its context needs."""
    tables = [table[: -(-context // size)] for table, context in zip(tables, context_lengths, strict=True)]
    slots = [
        table[position // size] * size + position % size
        for table, queries, context in zip(tables, query_lengths, context_lengths, strict=True)
        for position in range(context - queries, context)
    ]
    width = max(map(len, tables))
    cu_query = [0]
    for queries in query_lengths:
        cu_query.append(cu_query[-1] + queries)
    return AttentionBatch(
        query_lengths=query_lengths,
        context_lengths=context_lengths,
        block_tables=tables,
        cu_query=torch.tensor(cu_query, dtype=torch.int32, device=device),
        context=torch.tensor(context_lengths, dtype=torch.int32, device=device),
        block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        block_size=size,
    )


class Driver:
    """Live requests on one decoder. A request is named by any string and begins with its first `step`."""

    def __init__(
        self, decoder: Decoder, *, num_blocks: int = 256, block_size: int = 4, scattered: bool = False
    ) -> None:
        """scattered: hand out blocks in random instead of rising order."""
        self.decoder, self._size = decoder, block_size
        shape = (num_blocks, block_size, decoder.num_kv_heads, decoder.head_dim)
        # NaN where nothing was written: whatever reads it shows.
        nan = float("nan")
        self.kv = [
            tuple(torch.full(shape, nan, dtype=decoder.dtype, device=decoder.device) for _ in range(2))
            for _ in range(decoder.num_layers)
        ]
        self._free = list(range(num_blocks))
        if scattered:
            random.Random(0).shuffle(self._free)
        self._tables: dict[str, list[int]] = {}
        self._computed: dict[str, int] = {}

    def share(self, name: str, other: str, num_blocks: int) -> None:
        """Begins a request with the first blocks of another one, as a hit in the prefix cache does."""
        self._tables[name] = self._tables[other][:num_blocks]
        self._computed[name] = num_blocks * self._size

    def step(self, tokens: dict[str, Sequence[int]]) -> dict[str, Tensor]:
        """Computes the next tokens of each request in one forward pass; logits `[number of tokens, V]` of each."""
        names = list(tokens)
        query = [len(tokens[name]) for name in names]
        context = [self._computed.get(name, 0) + len(tokens[name]) for name in names]
        for name, length in zip(names, context, strict=True):
            table = self._tables.setdefault(name, [])
            while len(table) * self._size < length:
                table.append(self._free.pop(0))
        device = self.decoder.device
        batch = batch_of(query, context, [self._tables[name] for name in names], self._size, device)
        ids = [token for name in names for token in tokens[name]]
        positions = [p for c, q in zip(context, query, strict=True) for p in range(c - q, c)]
        with torch.inference_mode():
            plan = self.decoder.backend.plan(batch, list(dict.fromkeys(self.decoder.attention_specs)))
            step = StepInput(torch.tensor(ids, device=device), torch.tensor(positions, device=device), batch, plan)
            logits = self.forward(step)
        self._computed.update(zip(names, context, strict=True))
        return dict(zip(names, torch.split(logits, query), strict=True))

    def forward(self, step: StepInput) -> Tensor:
        """Logits `[T, V]`."""
        return self.decoder.logits(self.decoder.forward(step, self.kv))

    def prompt(self, name: str, ids: Sequence[int], *, chunk: int | None = None) -> Tensor:
        """Logits `[len(ids), V]` of one request's prompt, computed at once or in chunks."""
        size = chunk or len(ids)
        return torch.cat([self.step({name: ids[i : i + size]})[name] for i in range(0, len(ids), size)])

    def greedy(self, name: str, ids: Sequence[int], count: int) -> list[int]:
        """`count` tokens after the prompt, one at a time."""
        generated = [int(self.prompt(name, ids)[-1].argmax())]
        while len(generated) < count:
            generated.append(int(self.step({name: generated[-1:]})[name][-1].argmax()))
        return generated
