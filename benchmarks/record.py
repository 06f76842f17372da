"""Where a result was measured, and writing it down: `benchmarks/results/<name>-<UTC time>.json`.

Called by every benchmark's main. A result without its commit, versions, hardware and command cannot be compared.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("aiohttp", "grpcio", "msgspec", "protobuf", "tokenizers", "torch", "uvloop")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _commit() -> str | None:
    """The commit, with `+changes` when the tree differs from it. None outside a repository."""
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return (commit + ("+changes" if changed else "")) or None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return {"python": platform.python_version(), **found}


def environment() -> dict[str, Any]:
    """Commit, versions, hardware, command and time."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "versions": _versions(),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory_bytes / 2**30, 1),
            "gpus": gpus,
            "system": platform.platform(),
            "load_average": [round(value, 2) for value in os.getloadavg()],
        },
    }


def save(name: str, result: dict[str, Any], path: Path | None = None) -> Path:
    """Writes `result` with its environment and returns where."""
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(
        json.dumps({"benchmark": name, "environment": environment(), **result}, indent=2, ensure_ascii=False) + "\n"
    )
    return path
