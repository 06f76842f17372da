"""Numbers out of finished requests: percentiles, throughput, CPU time, and the tables people read.

Pure, except for CpuMeter, which reads /proc. Called by load.py, bench.py and router_cost.py.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished request. start_s is when it was due (open loop) or sent (closed loop)."""

    start_s: float
    end_s: float
    first_s: float | None
    gaps_s: Sequence[float]
    prompt_tokens: int
    output_tokens: int
    error: str | None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks of already sorted values."""
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def distribution_ms(values_s: Iterable[float]) -> Json | None:
    """mean, percentiles and maximum in milliseconds; None without values."""
    ordered = sorted(values_s)
    if not ordered:
        return None
    result = {"mean": sum(ordered) / len(ordered) * 1e3}
    result.update({f"p{p}": percentile(ordered, p) * 1e3 for p in PERCENTILES})
    result["max"] = ordered[-1] * 1e3
    return {name: round(value, 3) for name, value in result.items()}


def summarize(outcomes: Sequence[Outcome]) -> Json:
    """The result of one run. Latencies are of the requests that succeeded; throughput counts what was delivered."""
    good = [o for o in outcomes if o.error is None]
    wall_s = max((o.end_s for o in outcomes), default=0.0) - min((o.start_s for o in outcomes), default=0.0)
    output_tokens = sum(o.output_tokens for o in outcomes)
    prompt_tokens = sum(o.prompt_tokens for o in outcomes)
    rate = 1 / wall_s if wall_s else 0.0
    return {
        "requests": len(outcomes),
        "errors": dict(sorted(Counter(o.error for o in outcomes if o.error is not None).items())),
        "wall_s": round(wall_s, 3),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": round(len(good) * rate, 3),
        "output_tokens_per_s": round(output_tokens * rate, 2),
        "total_tokens_per_s": round((output_tokens + prompt_tokens) * rate, 2),
        "ttft_ms": distribution_ms(o.first_s - o.start_s for o in good if o.first_s is not None),
        "inter_token_ms": distribution_ms(gap for o in good for gap in o.gaps_s),
        "end_to_end_ms": distribution_ms(o.end_s - o.start_s for o in good),
    }


# CPU time ------------------------------------------------------------------------------------------------------------

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def process_times_s(pid: int) -> tuple[float, float]:
    """User and system CPU seconds of one process so far. Zeros when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    return int(fields[11]) / _TICKS_PER_S, int(fields[12]) / _TICKS_PER_S


def process_cpu_s(pid: int) -> float:
    """CPU seconds of one process so far. 0.0 when it is gone."""
    return sum(process_times_s(pid))


def reference_loop_ms() -> float:
    """CPU time of a fixed piece of Python, milliseconds: the best and the median of some tries tell how much the
    neighbours on this machine slow down what is measured (shared caches, shared cores of the host)."""
    begin = time.process_time()
    total = 0
    for i in range(300_000):
        total += i & 3
    return (time.process_time() - begin) * 1e3


def descendants(pid: int) -> list[int]:
    """`pid` and every process below it, in the order found."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended while we looked
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:
        found.extend(sorted(children.get(process, ())))
    return found


def _machine_busy_s() -> float:
    """CPU seconds that all processors together have been busy since boot."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


class CpuMeter:
    """CPU seconds from its creation to `read`: our own, the server's (when its pid is known), everybody else's."""

    def __init__(self, server_pid: int | None) -> None:
        self._server_pid = server_pid
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        server = sum(map(process_cpu_s, descendants(self._server_pid))) if self._server_pid else 0.0
        return time.process_time(), server, _machine_busy_s()

    def read(self, output_tokens: int) -> Json:
        own, server, machine = (now - then for now, then in zip(self._now(), self._start, strict=True))
        tokens = max(1, output_tokens)
        result: Json = {"generator_s": round(own, 3), "generator_us_per_token": round(own / tokens * 1e6, 2)}
        if self._server_pid:
            result |= {"server_s": round(server, 3), "server_us_per_token": round(server / tokens * 1e6, 2)}
        result["others_s"] = round(max(0.0, machine - own - server), 3)
        return result


# Tables --------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


_LATENCIES = (("time to first token", "ttft_ms"), ("between tokens", "inter_token_ms"), ("end to end", "end_to_end_ms"))


def describe(name: str, summary: Json) -> str:
    """One run, for people."""
    rows = [
        [f"{label}, ms", *(f"{values[column]:.2f}" for column in ("mean", "p50", "p90", "p99", "max"))]
        for label, key in _LATENCIES
        if (values := summary[key])
    ]
    cpu = summary["cpu"]
    server = f", server {cpu['server_us_per_token']} µs/token" if "server_us_per_token" in cpu else ""
    return "\n".join(
        [
            f"{name}: {summary['requests']} requests in {summary['wall_s']:.1f} s, "
            f"{summary['output_tokens_per_s']} output tokens/s, {summary['total_tokens_per_s']} tokens/s in all, "
            f"{summary['requests_per_s']} requests/s",
            table(["", "mean", "p50", "p90", "p99", "max"], rows) if rows else "no request succeeded",
            "errors: " + (", ".join(f"{kind} × {n}" for kind, n in summary["errors"].items()) or "none"),
            f"CPU: generator {cpu['generator_us_per_token']} µs/token{server}, other processes {cpu['others_s']} s",
        ]
    )


_COMPARED = (
    ("output tokens/s", ("output_tokens_per_s",)),
    ("requests/s", ("requests_per_s",)),
    ("time to first token p50, ms", ("ttft_ms", "p50")),
    ("time to first token p99, ms", ("ttft_ms", "p99")),
    ("between tokens p50, ms", ("inter_token_ms", "p50")),
    ("between tokens p99, ms", ("inter_token_ms", "p99")),
    ("end to end p50, ms", ("end_to_end_ms", "p50")),
)


def _median_of(runs: Sequence[Json], path: tuple[str, ...]) -> float | None:
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value[key] if value is not None else None
        if value is not None:
            values.append(value)
    return percentile(sorted(values), 50) if values else None


def compare(a: Sequence[Json], b: Sequence[Json]) -> list[Json]:
    """Medians over the rounds of two servers, and A / B."""
    rows = []
    for label, path in _COMPARED:
        left, right = _median_of(a, path), _median_of(b, path)
        ratio = round(left / right, 4) if left is not None and right else None
        rows.append({"metric": label, "a": left, "b": right, "a_over_b": ratio})
    return rows


def describe_comparison(rows: Sequence[Json]) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return table(
        ["median of rounds", "A", "B", "A / B"],
        [[r["metric"], *map(cell, (r["a"], r["b"], r["a_over_b"]))] for r in rows],
    )
