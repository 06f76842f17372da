"""The router benchmark runs end to end on the fake shard and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_the_router_on_the_fake_shard(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.router_cost", "--runs", "1", "--streams", "8", "--output-tokens", "64"]
    result = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    written = json.loads(out.read_text())
    (run,) = written["runs"]
    assert run["tokens"] == 4 * 8 * 64
    assert run["us_per_token"] > 0
    assert "median" in result.stdout
