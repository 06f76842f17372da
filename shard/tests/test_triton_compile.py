"""The Triton kernels compile for GPUs that are not here; their tiles fit the registers and the shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton comes with torch for CUDA, or: pip install triton")

from tgi_shard.kernels.tiles import LEAST_SHARED_BYTES, SHARED_BYTES  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MAX_SPILL_BYTES = {2: 32, 4: 64}  # a thread, by size of a number: a few loop variables, not the tile
FAST = {(8, 0): "mma.sync", (8, 6): "mma.sync", (9, 0): "wgmma", (10, 0): "tcgen05", (12, 0): "mma.sync"}

pytestmark = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")),
    reason="this build of triton brings no ptxas and cuobjdump",
)


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a script beside this file prints, in a process that does not interpret its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(capability: tuple[int, int], reports: list[dict[str, Any]]) -> None:
    limit = SHARED_BYTES.get(capability, LEAST_SHARED_BYTES)
    for report in reports:
        assert report["stack"] <= MAX_SPILL_BYTES[report["num_bytes"]], report
        assert report["shared"] <= limit, report
        assert "ld.global.v4" in report["instructions"], report
        if report["name"].startswith("large"):
            assert FAST[capability] in report["instructions"], report
            assert "cp.async" in report["instructions"], report


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["ampere", "hopper"])
def test_kernels_compile_without_spilling(capability: tuple[int, int]) -> None:
    reports = run("compile_triton.py", *map(str, capability))
    assert len(reports) >= 14
    check(capability, reports)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=["a100", "a10", "h100"])
def test_every_tile_with_every_feature_compiles_without_spilling(capability: tuple[int, int]) -> None:
    check(capability, run("compile_triton.py", *map(str, capability), "full"))


def test_no_step_after_the_warm_up_needs_a_compiler() -> None:
    (compiled,) = run("launch_triton.py")
    assert compiled["warm-up"] == ["_attention_kernel"] * 2 + ["_combine_kernel"] * 2 + ["_store_kernel"]
    assert compiled["later"] == []
