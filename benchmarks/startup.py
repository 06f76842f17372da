"""Time from executing `text-generation-launcher` on the demo model to the first 200 of /health, by phase.

    python -m benchmarks.startup --runs 5

The first run warms the file cache and is not counted. Phases come from the launcher's own log records: shard phases
from rank 0's, `serving` from the router. The shard and the router start side by side, so phases overlap.
"""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.measure import CpuMeter, descendants, percentile, process_cpu_s, table
from benchmarks.serving import Serving, serving

Json = dict[str, Any]
TARGET_S = 6.0


def _time_s(log_record: Json) -> float:
    return datetime.fromisoformat(log_record["timestamp"]).timestamp()


def milestones(server: Serving) -> dict[str, float]:
    """Seconds after the start at which each phase was entered, in order."""
    found: dict[str, float] = {}
    for line in server.records():
        if "launcher speaks" not in found:
            found["launcher speaks"] = _time_s(line) - server.started_s
        if line.get("event") == "phase" and line.get("rank", 0) == 0:
            found.setdefault(f"shard {line['phase']}", _time_s(line) - server.started_s)
        if line.get("event") == "serving":
            found["router serving"] = _time_s(line) - server.started_s
    found["health 200"] = server.healthy_s - server.started_s
    return {name: round(value, 3) for name, value in sorted(found.items(), key=lambda item: item[1])}


def one_run(flags: list[str]) -> Json:
    meter = CpuMeter(None)
    with serving("--json-output", *flags) as server:
        cpu = meter.read(1)
        processes = {name: round(process_cpu_s(pid), 2) for name, pid in _pids(server).items()}
        return {"milestones_s": milestones(server), "cpu_s": processes, "machine_busy_s": cpu["others_s"]}


def _pids(server: Serving) -> dict[str, int]:
    """The processes of the server by name."""
    found = {}
    for pid in descendants(server.process.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        named = [Path(word).name for word in words if "text-generation-" in Path(word).name]
        found[named[0] if named else f"helper {pid}"] = pid
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("flags", nargs="*", help="more launcher flags, after --")
    arguments = parser.parse_args()
    one_run(arguments.flags)
    runs = [one_run(arguments.flags) for _ in range(arguments.runs)]
    names = list(runs[0]["milestones_s"])
    rows, medians = [], {}
    for name in names:
        values = sorted(run["milestones_s"][name] for run in runs if name in run["milestones_s"])
        medians[name] = percentile(values, 50)
        rows.append([name, f"{medians[name]:.2f}", f"{values[0]:.2f}", f"{values[-1]:.2f}"])
    print(table(["seconds after start", "median", "min", "max"], rows))
    print("CPU seconds of the last run: " + ", ".join(f"{name} {value}" for name, value in runs[-1]["cpu_s"].items()))
    result = {"target_s": TARGET_S, "median_s": medians["health 200"], "medians_s": medians, "runs": runs}
    print(
        f"median {medians['health 200']:.2f} s, target {TARGET_S:.0f} s; written to "
        f"{record.save('startup', result, arguments.out)}"
    )


if __name__ == "__main__":
    main()
