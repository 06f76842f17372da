"""How far a GPU step is from what the hardware allows: attention kernels, a model step, and the engine around it.

    python -m benchmarks.gpu_step                    about two minutes on one H200
    python -m benchmarks.gpu_step --sweep            also other tile shapes of the attention kernel
    python -m benchmarks.gpu_step --device cpu --tiny    that the program runs

The model has random weights in the shape of Llama-3-8B and is built on the device, without a checkpoint. Times are
medians; `graph` replays a captured CUDA graph (the device's own time), `eager` launches from Python as the engine does.
Floors are bytes over the copy bandwidth or operations over the matrix rate, both measured first in the same run.
"""

import argparse
import importlib.metadata
import statistics
import time
from pathlib import Path

import torch
from tgi_proto import generate_pb2 as pb
from tgi_shard import attention, warmup
from tgi_shard.attention import AttentionBackend
from tgi_shard.faults import Faults
from tgi_shard.kv_cache import KvCache, KvGeometry
from tgi_shard.layers.weights import WeightReader
from tgi_shard.models import llama
from tgi_shard.models.decoder import Decoder, Source
from tgi_shard.models.names import expected_tensors
from tgi_shard.parallel import Parallel
from tgi_shard.step import StepInput

from benchmarks import record
from benchmarks.apis import Json
from benchmarks.gpu_attention import (
    BLOCK_SIZE,
    Bench,
    attention_flops,
    make_batch,
    measure_attention,
    measure_ceilings,
    sweep_tiles,
    wall_ms,
)
from benchmarks.measure import table

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu",
}  # fmt: skip
TINY = LLAMA_8B | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
# For the 8B shape on an H200, milliseconds: what the first run must beat, and what is good. By streams at 1k context.
TARGETS_MS = {"1": (6.0, 4.7), "8": (6.3, 5.0), "32": (7.5, 6.0), "64": (9.0, 7.2), "256": (20.0, 16.5)}
PREFILL_TARGET_MS = (140.0, 105.0)  # 4096 tokens


class RandomCheckpoint:
    """Stands for a checkpoint: every tensor that a spec asks for, normal numbers made on the device when read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes, self._device, self._dtype = shapes, device, dtype

    def read(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        return tensor.normal_(0.0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)


def make_decoder(bench: Bench, backend: AttentionBackend) -> Decoder:
    spec = llama.spec(bench.config)
    checkpoint = RandomCheckpoint(
        expected_tensors(spec, llama.NAMES, range(spec.num_layers)), bench.device, bench.dtype
    )
    reader = WeightReader(checkpoint, bench.device, bench.dtype)  # type: ignore[arg-type]
    return Decoder(spec, Source(reader, llama.NAMES), Parallel.single(), backend)


def measure_model(bench: Bench, decoder: Decoder, lengths: list[tuple[int, int]]) -> Json:
    """One step of the whole model with the logits of each request's last token."""
    batch, num_blocks = make_batch(lengths, bench.device)
    geometry = KvGeometry(decoder.num_layers, decoder.num_kv_heads, decoder.head_dim, BLOCK_SIZE, bench.dtype)
    kv = KvCache(geometry, num_blocks, bench.device)
    for pools in kv.layers:
        for pool in pools:
            pool.normal_()
    total = sum(batch.query_lengths)
    positions = torch.cat([torch.arange(context - query, context) for query, context in lengths]).to(bench.device)
    ids = torch.randint(decoder.vocab_size, (total,), device=bench.device)
    last = (batch.cu_query[1:] - 1).long()

    def step() -> StepInput:
        return StepInput(ids, positions, batch, decoder.backend.plan(batch, [bench.spec]))

    def forward(planned: StepInput) -> None:
        decoder.logits(decoder.forward(planned, kv.layers)[last])

    planned = step()
    forward(planned)
    eager_ms = bench.milliseconds(lambda: forward(step()), graph=False)
    graph_ms = bench.milliseconds(lambda: forward(planned), graph=True)
    floor_ms = model_floor_ms(bench, decoder, lengths, num_blocks * geometry.block_bytes)
    return {"graph_ms": graph_ms, "eager_ms": eager_ms, "floor_ms": floor_ms, "floor_share": floor_ms / graph_ms}


def model_floor_ms(bench: Bench, decoder: Decoder, lengths: list[tuple[int, int]], kv_bytes: int) -> float:
    """Weights read once or multiplied with every token, whichever takes longer, plus attention likewise."""
    spec = decoder.spec
    embedding_bytes = spec.vocab * spec.hidden * bench.dtype.itemsize
    linear_bytes = decoder.num_bytes - embedding_bytes * (1 if spec.output.tied else 2)
    tokens, rows = sum(query for query, _ in lengths), len(lengths)
    flops = 2.0 * (linear_bytes * tokens + embedding_bytes * rows) / bench.dtype.itemsize
    weights_s = max((linear_bytes + embedding_bytes) / bench.copy_bytes_per_s, flops / bench.flops_per_s)
    attention_s = max(
        kv_bytes / bench.copy_bytes_per_s,
        decoder.num_layers * attention_flops(bench.spec, lengths) / bench.flops_per_s,
    )
    return 1e3 * (weights_s + attention_s)


def measure_models(bench: Bench, decoder: Decoder, tiny: bool) -> list[Json]:
    results = []
    unit = 64 if tiny else 1024
    for streams, (must, good) in list(TARGETS_MS.items())[: 2 if tiny else None]:
        found = measure_model(bench, decoder, [(1, unit)] * int(streams))
        results.append({"step": f"decode {streams} x {unit}", **found, "must_beat_ms": must, "good_ms": good})
    found = measure_model(bench, decoder, [(4 * unit, 4 * unit)])
    must, good = PREFILL_TARGET_MS
    return [*results, {"step": f"prefill {4 * unit}", **found, "must_beat_ms": must, "good_ms": good}]


def measure_engine(bench: Bench, decoder: Decoder, streams: int, tiny: bool) -> Json:
    """`Engine.step` from plan to answer, greedy, the answer read before the next step: no overlap."""
    prompt = 63 if tiny else 1000
    steps = bench.repeats + 2
    geometry = KvGeometry(decoder.num_layers, decoder.num_kv_heads, decoder.head_dim, BLOCK_SIZE, bench.dtype)
    shape = warmup.Shape(
        geometry=geometry, max_rows=streams, max_step_tokens=streams * prompt, max_total_tokens=prompt + steps + 1,
        vocab_size=decoder.vocab_size, hidden_size=decoder.spec.hidden, device=bench.device,
        watermark_gamma=0.5, watermark_delta=2.0,
    )  # fmt: skip
    each = shape.blocks_for(prompt + steps + 1)
    engine = warmup.build_engine(decoder, shape, each * streams, Faults(), rank=0)
    sampling = pb.SamplingParameters(temperature=1.0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0)
    admissions = [
        pb.Admission(
            request_id=i + 1, token_ids=[(i + k) % decoder.vocab_size for k in range(prompt)], num_prompt_tokens=prompt,
            blocks=range(each * i, each * (i + 1)), sampling=sampling,
        )
        for i in range(streams)
    ]  # fmt: skip
    times = []
    for number in range(1, steps + 1):
        plan = pb.StepPlan(step=number)
        computed = prompt + number - 2 if number > 1 else 0
        for i in range(streams):
            plan.scheduled.add(request_id=i + 1, num_tokens=1 if computed else prompt, num_computed_tokens=computed)
        times.append(wall_ms(lambda plan=plan: engine.step(admissions if plan.step == 1 else [], plan)))
    return {"step": f"engine decode {streams} x {prompt}", "ms": statistics.median(times[2:]), "prefill_ms": times[0]}


def show(results: list[Json]) -> str:
    """One table; a column for every figure that any row has."""
    columns = list(dict.fromkeys(key for row in results for key in row))
    return table(columns, [[_cell(row.get(column, "")) for column in columns] for row in results])


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--attention", choices=list(attention.BACKENDS), help="default: the first that can")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that the program runs")
    parser.add_argument("--sweep", action="store_true", help="try other tiles of the Triton kernel")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu --tiny shows that the program runs")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.inference_mode():
        result = measure_all(device, dtype, options)
    print("saved", record.save("gpu-step", result, options.out))


def measure_all(device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> Json:
    """Prints each table as soon as it is known, so that a run cut short has shown what it had."""
    started = time.perf_counter()

    def progress(title: str) -> None:
        print(f"\n[{time.perf_counter() - started:.0f} s] {title}", flush=True)

    progress("ceilings")
    bandwidth, flops = measure_ceilings(device, dtype, options.tiny)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, matrix product {flops / 1e12:.0f} TFLOP/s", flush=True)
    bench = Bench(device, dtype, TINY if options.tiny else LLAMA_8B, options.repeats, bandwidth, flops)
    backend = attention.choose(options.attention, [bench.spec], device, dtype, BLOCK_SIZE)
    result: Json = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "triton": _version("triton"), "attention_backend": backend.name, "config": bench.config,
        "copy_bytes_per_s": bandwidth, "matmul_flops_per_s": flops,
    }  # fmt: skip
    progress(f"attention by {backend.name}, one layer")
    result["attention"] = measure_attention(bench, backend, options.tiny)
    print(show(result["attention"]), flush=True)
    progress("model step, random weights")
    decoder = make_decoder(bench, backend)
    result["model"] = measure_models(bench, decoder, options.tiny)
    print(show(result["model"]), flush=True)
    progress("engine step")
    result["engine"] = [measure_engine(bench, decoder, n, options.tiny) for n in ((1, 4) if options.tiny else (1, 64))]
    print(show(result["engine"]), flush=True)
    if options.sweep:
        progress("tiles")
        result["tiles"] = sweep_tiles(bench, backend)
        print(show([{"tile": tuple(row["tile"].values()), **row["ms"]} for row in result["tiles"]]), flush=True)
    progress("done")
    return result


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
