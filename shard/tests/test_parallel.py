"""Two ranks compute what one computes: real processes over gloo, every sharding rule; and a pipeline of two stages.

All cases run in one spawn of two processes, because starting a process that imports torch costs seconds.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from model_driver import Driver, load
from test_families import MODELS, SIZES, make_model
from tgi_shard.attention.reference import ReferenceAttention
from tgi_shard.checkpoint import Checkpoint
from tgi_shard.errors import Bug, StartError
from tgi_shard.layers.weights import WeightReader
from tgi_shard.models import describe, hf_config
from tgi_shard.models.decoder import Decoder, HeadSplit, Source
from tgi_shard.parallel import Parallel

torch.set_num_threads(1)

# Models that are split as another one is.
SPLIT_ALIKE = {
    "llama-gelu", "llama-linear", "llama-dynamic", "llama-llama3", "llama-yarn", "llama-yarn-mscale",
    "mistral-window-2", "qwen2-moe-window", "qwen3-window", "gemma2-uncapped", "gemma3-ropes", "phi3-long",
    "cohere-plain", "smollm3-window", "gpt-neox-sequential", "gpt-bigcode-multi-head", "mpt-clipped",
}  # fmt: skip


def can_be_halved(changes: dict[str, Any]) -> bool:
    kv_heads = changes.get("num_key_value_heads", changes.get("num_kv_heads", 2))
    return changes.get("num_attention_heads", 6) % 2 == 0 and (kv_heads % 2 == 0 or kv_heads == 1)


# Every family, and what only matters here.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: case for name, case in MODELS.items() if can_be_halved(case[1]) and name not in SPLIT_ALIKE},
    "small vocabulary": ("LlamaConfig", {"vocab_size": 20}),  # the second rank has none of it
    "one kv head for two ranks": ("LlamaConfig", {"num_key_value_heads": 1}),
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 19, 3, 2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {}
    for name, case in CASES.items():
        directories[name] = tmp_path_factory.mktemp("model")
        make_model(*case).save_pretrained(directories[name])
    return directories


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


RANKS = """
    import json, sys
    from pathlib import Path
    import torch
    from model_driver import Driver, load
    from tgi_shard.errors import StartError
    from tgi_shard.parallel import Parallel

    rank, out = int(sys.argv[1]), sys.argv[2]
    ports, models, prompt = map(json.loads, sys.argv[3:])
    torch.set_num_threads(1)
    cpu = torch.device("cpu")

    parallel = Parallel.connect(rank, 2, "127.0.0.1", ports[0], cpu)
    results = {}
    for name, directory in models.items():
        decoder = load(Path(directory), parallel=parallel)
        driver = Driver(decoder)
        results[name] = driver.prompt("chunks", prompt, chunk=6), driver.greedy("greedy", prompt, 8), decoder.num_bytes
    for dtype in (torch.bfloat16, torch.float16):
        results[str(dtype)] = Driver(load(Path(models["llama"]), parallel=parallel, dtype=dtype)).prompt("a", prompt)
    results["smallest"] = parallel.min_int(7 - rank)
    parallel.barrier()

    results["problems"] = []
    for world, port in ((3, ports[1]), (2, ports[2 + rank])):
        try:
            Parallel.connect(rank, world, "127.0.0.1", port, cpu, timeout_s=3.0)
        except StartError as error:
            results["problems"].append(str(error))
    torch.save(results, f"{out}/rank{rank}.pt")
    parallel.close()
"""


@pytest.fixture(scope="module")
def ranks(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks computed."""
    out = tmp_path_factory.mktemp("ranks")
    directories = {name: str(directory) for name, directory in models.items()}
    arguments = [json.dumps(value) for value in (free_ports(4), directories, PROMPT)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANKS), str(rank), str(out), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_computes(name: str, models: dict[str, Path], ranks: list[dict[str, Any]]) -> None:
    decoder = load(models[name])
    driver = Driver(decoder)
    expected, greedy = driver.prompt("a", PROMPT), driver.greedy("b", PROMPT, 8)
    for logits, tokens, num_bytes in (rank[name] for rank in ranks):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert tokens == greedy
        assert num_bytes < 0.8 * decoder.num_bytes  # a share, not a copy
    assert torch.equal(ranks[0][name][0], ranks[1][name][0])  # ranks must sample alike, so to the bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_ranks_agree_in_half_precision(
    dtype: torch.dtype, models: dict[str, Path], ranks: list[dict[str, Any]]
) -> None:
    expected = Driver(load(models["llama"])).prompt("a", PROMPT)
    assert torch.equal(ranks[0][str(dtype)], ranks[1][str(dtype)])
    torch.testing.assert_close(ranks[0][str(dtype)], expected, atol=expected.std().item() * 0.2, rtol=0.1)


def test_the_smallest_number_of_the_ranks_is_known_to_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["smallest"] for rank in ranks] == [6, 6]


def test_a_group_of_one_needs_no_torch_distributed() -> None:
    parallel = Parallel.connect(0, 1, "nowhere", 1, torch.device("cpu"))
    x = torch.ones(2, 3)
    assert parallel.all_reduce(x) is x
    assert parallel.all_gather(x) is x
    assert parallel.min_int(5) == 5
    parallel.barrier()
    parallel.close()


def test_a_rank_that_does_not_come_is_named(ranks: list[dict[str, Any]]) -> None:
    """Ranks 0 and 1 of three find each other but no third; then rank 1 of two looks where nobody listens."""
    (first, lonely), (second, lost) = (rank["problems"] for rank in ranks)
    assert first.startswith("Rank 2 of 3 did not join the group at 127.0.0.1:")
    assert first.endswith("within 3 s; its own log says why.")
    assert second == first
    assert lonely.startswith("Rank 1 of 2 did not join")
    assert lost.startswith("Rank 1 cannot reach rank 0 at 127.0.0.1:")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world", "shares"),
    [
        (8, 4, 2, [(0, 4, 0, 2), (4, 8, 2, 4)]),
        (8, 2, 4, [(0, 2, 0, 1), (2, 4, 0, 1), (4, 6, 1, 2), (6, 8, 1, 2)]),
        (6, 1, 3, [(0, 2, 0, 1), (2, 4, 0, 1), (4, 6, 0, 1)]),
    ],
)
def test_every_rank_has_the_kv_heads_of_its_query_heads(
    heads: int, kv_heads: int, world: int, shares: list[tuple[int, ...]]
) -> None:
    spec, _ = describe({"model_type": "llama", **SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads})
    got = [HeadSplit.of(spec, Parallel(rank, world)) for rank in range(world)]
    assert [(s.heads.start, s.heads.stop, s.kv_heads.start, s.kv_heads.stop) for s in got] == shares


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world", "message"),
    [
        (6, 3, 4, r"`--num-shard` 4 does not divide the number of attention heads \(6\)"),
        (12, 4, 3, r"`--num-shard` 3 does not divide the number of key/value heads \(4\)"),
        (12, 4, 6, r"`--num-shard` 6 is not a multiple of the number of key/value heads \(4\)"),
        (6, 4, 2, "`num_key_value_heads` 4 does not divide `num_attention_heads` 6"),
    ],
)
def test_heads_that_cannot_be_shared_name_the_flag(heads: int, kv_heads: int, world: int, message: str) -> None:
    spec, _ = describe({"model_type": "llama", **SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads})
    with pytest.raises(StartError, match=message):
        HeadSplit.of(spec, Parallel(0, world))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_two_stages_of_a_pipeline_compute_what_the_whole_decoder_computes(name: str, models: dict[str, Path]) -> None:
    """The layers are cut in two decoders; hidden states are handed over by hand."""
    spec, names = describe(hf_config.read(models[name]))
    source = Source(WeightReader(Checkpoint.open(models[name]), torch.device("cpu"), torch.float32), names)
    first, second = (
        Decoder(spec, source, Parallel.single(), ReferenceAttention(), layers) for layers in (range(1), range(1, 2))
    )

    class Pipeline(Driver):
        second_kv = Driver(second).kv

        def forward(self, step: Any) -> torch.Tensor:
            hidden = first.forward(step, self.kv)
            return second.logits(second.forward(step, self.second_kv, hidden))

    expected = Driver(load(models[name])).prompt("a", PROMPT)
    torch.testing.assert_close(Pipeline(first).prompt("a", PROMPT), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(Bug):
        Driver(second).prompt("a", PROMPT)
    with pytest.raises(Bug):
        first.logits(torch.zeros(1, SIZES["hidden_size"]))
