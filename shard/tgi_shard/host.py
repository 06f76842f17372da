"""What this process may use of the host: cores and memory, containers' limits included. Torch-free. Used at start."""

import os
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_cores(cgroup_root: Path = _CGROUP_ROOT) -> int:
    """Cores by affinity mask and CPU quota (cgroup v2 or v1), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [text.split() for folder in _own_cgroups(cgroup_root) for text in _read(folder / "cpu.max")]
    for quota, period in (fields for fields in quotas if len(fields) == 2):
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    for quota in _read(cgroup_root / "cpu" / "cpu.cfs_quota_us"):
        for period in _read(cgroup_root / "cpu" / "cpu.cfs_period_us"):
            if int(quota) > 0:
                cores = min(cores, -(-int(quota) // int(period)))
    return max(cores, 1)


def available_memory(cgroup_root: Path = _CGROUP_ROOT, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can be allocated without swapping and without passing a cgroup's limit; page cache counts as free."""
    lines = meminfo.read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    for folder in _own_cgroups(cgroup_root):
        available = min(available, _headroom(folder, "memory.max", "memory.current", "inactive_file "))
    v1 = cgroup_root / "memory"
    return min(available, _headroom(v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "))


def _headroom(folder: Path, limit_file: str, usage_file: str, cache_field: str) -> int:
    """Bytes up to a cgroup's limit; 2**63 when it has none."""
    for limit in _read(folder / limit_file):
        for usage in _read(folder / usage_file):
            if limit == "max":
                break
            statistics = "".join(_read(folder / "memory.stat")).splitlines()
            cache = sum(int(line.split()[1]) for line in statistics if line.startswith(cache_field))
            return max(int(limit) - int(usage) + cache, 0)
    return 2**63


def _own_cgroups(root: Path) -> list[Path]:
    """This process' cgroup (v2) and those above it, as far as they are visible."""
    folders = [root]
    for text in _read(Path("/proc/self/cgroup")):
        for line in text.splitlines():
            hierarchy, _, path = line.split(":", 2)
            if hierarchy == "0" and ".." not in path:
                parts = Path(path.lstrip("/")).parts
                folders += [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return folders


def _read(path: Path) -> list[str]:
    """The file's text, or nothing when there is no such file or we may not read it."""
    try:
        return [path.read_text().strip()]
    except OSError:
        return []
