"""Compiles the Triton kernels for a GPU that need not be here and prints, as JSON lines, what the machine code takes.

Run by test_triton_compile.py in a process of its own, because that one interprets its kernels:
`python compile_triton.py MAJOR MINOR [full]`. `full` compiles every entry of the tile table with every feature.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from tgi_shard.kernels import kv_store, paged_attention
from tgi_shard.kernels.tiles import Tile, large_tile, padded_head_dim, small_tile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FEATURES = ("", "window", "alibi", "window softcap")
INTEGERS = ("table", "items", "groups", "cu_query", "context")


@dataclass(frozen=True)
class Report:
    name: str
    num_bytes: int  # of a number
    registers: int
    stack: int  # bytes a thread: spilled registers
    shared: int  # bytes a program
    instructions: list[str]  # of those that make the kernels fast


def compile_kernel(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: tuple[int, int], tile: Tile
) -> Report:
    """`types`: of the pointer arguments that hold numbers; the other arguments are recognised by name."""
    signature, aligned = {}, []
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in types:
            signature[argument] = types[argument]
            aligned.append(i)
        elif argument in INTEGERS:
            signature[argument] = "*i32"
        elif argument == "slots":
            signature[argument] = "*i64"
        elif argument in ("scale", "softcap"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument.startswith("stride") and argument != "stride_table":
                aligned.append(i)
    source = ASTSource(
        kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    instructions = [word for word in ("wgmma", "mma.sync", "cp.async", "ld.global.v4") if word in compiled.asm["ptx"]]
    num_bytes = 4 if "*fp32" in (types.get("queries"), types.get("keys")) else 2
    return Report(name, num_bytes, int(found[1]), int(found[2]), compiled.metadata.shared, instructions)


def attention(
    capability: tuple[int, int], tile: Tile, head_dim: int, group: int, number: str, features: str, kind: str
) -> Report:
    constants = {
        "K": 8, "G": group, "D": head_dim, "DP": padded_head_dim(head_dim), "S": 16,
        "ROWS": tile.rows, "KEYS": tile.keys,
        "WINDOW": "window" in features, "SOFTCAP": "softcap" in features, "ALIBI": "alibi" in features, "UPCAST": False,
    }  # fmt: skip
    types = dict.fromkeys(("out", "queries", "key_pool", "value_pool"), number)
    types |= dict.fromkeys(("part_out", "part_scale", "slopes"), "*fp32")
    name = " ".join(filter(None, (kind, f"D={head_dim}", number[1:], f"G={group}", features)))
    return compile_kernel(name, paged_attention._attention_kernel, types, constants, capability, tile)


def reports(capability: tuple[int, int], full: bool) -> Iterator[Report]:
    sample = {64: ("",), 128: ("", "window"), 256: ("", "window softcap")}
    for head_dim, features in dict.fromkeys((64, 80, 128, 192, 256), FEATURES).items() if full else sample.items():
        for feature in features:
            large = large_tile(capability, head_dim, 2)
            yield attention(capability, large, head_dim, 4, "*bf16", feature, "large")
            for group in (4, 32, 64) if full else (4,):
                small = small_tile(capability, head_dim, 2, group)
                yield attention(capability, small, head_dim, group, "*bf16", feature, "small")
            if full or feature:
                yield attention(capability, large_tile(capability, head_dim, 4), head_dim, 4, "*fp32", feature, "any")

    plain = Tile(128, 16, 4, 3, 1)
    combine = {"K": 8, "G": 4, "D": 128, "DP": 128, "ROWS": 16, "PARTS": 16}
    types = {"out": "*bf16", "part_out": "*fp32", "part_scale": "*fp32"}
    yield compile_kernel("combine", paged_attention._combine_kernel, types, combine, capability, plain)
    types = dict.fromkeys(("keys", "values", "key_pool", "value_pool"), "*bf16")
    store = {"K": 8, "D": 128, "WIDTH": 1024}
    yield compile_kernel("store", kv_store._store_kernel, types, store, capability, plain)


if __name__ == "__main__":
    for report in reports((int(sys.argv[1]), int(sys.argv[2])), full="full" in sys.argv):
        print(json.dumps(asdict(report)), flush=True)
