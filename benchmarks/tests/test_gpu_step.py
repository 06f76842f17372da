"""The GPU benchmark runs from end to end on tiny shapes, so that the first machine with a GPU need not debug it."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import record


def test_a_tiny_run_on_the_cpu_measures_every_part(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--device", "cpu", "--tiny", "--repeats", "1"]
    done = subprocess.run([*command, "--out", str(out)], cwd=record.ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["environment"]["command"].startswith("python -m benchmarks.gpu_step")
    assert result["attention_backend"] == "cpu"
    for part in ("attention", "model", "engine"):
        assert all(row["ms"] > 0 if "ms" in row else row["graph_ms"] > 0 for row in result[part])
    assert [row["step"] for row in result["model"]] == ["decode 1 x 64", "decode 8 x 64", "prefill 256"]
    assert "floor_share" in done.stdout
