"""What this machine offers: memory within the cgroup, cores, /dev/shm, file descriptors, free ports and sockets.

Reads /proc and /sys and opens no network connection except to test whether a port or socket is taken. The planner gets
the numbers as a `Machine`; `explain` gets them as evidence after a death.
"""

import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .gpu import Gpu


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `limit`: the smaller of machine and cgroup; `free`: what can be used without swapping or being killed."""

    limit: int
    free: int
    limited_by: str  # "machine" | "cgroup"
    oom_kills: int = 0  # processes of this cgroup that the kernel killed so far


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts the planner decides by."""

    memory: Memory
    cores: int
    gpus: tuple[Gpu, ...] = ()  # visible to the children; empty when torch cannot use them
    device_count: int | None = None  # as TGI counts, from the environment


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    table = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        table[name] = int(rest.split()[0]) * 1024
    return table


def _read_int(path: Path) -> int | None:
    """The number in `path`; None when it is absent, unreadable or `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_table(path: Path) -> dict[str, int]:
    """Lines of `name number`; empty when the file is absent."""
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _cgroup_dirs(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(directory, version) of this process' cgroup for `controller` and of its ancestors, innermost first.

    Inside a container the path in /proc/self/cgroup may be the host's; then only the mount's root exists and is used.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" and (base / "cgroup.controllers").exists():
            top, version = base, 2
        elif controller in controllers.split(",") and (base / controller).exists():
            top, version = base / controller, 1
        else:
            continue
        here = top / path.lstrip("/")
        while here != top and top in here.parents:
            if here.exists():
                yield here, version
            here = here.parent
        yield top, version


def memory(root: Path = Path("/")) -> Memory:
    """The machine's and the cgroup's memory. Page cache that can be dropped counts as free, in both."""
    info = _meminfo(root)
    limit, free, limited_by, oom_kills = info["MemTotal"], info["MemAvailable"], "machine", 0
    for index, (directory, version) in enumerate(_cgroup_dirs(root, "memory")):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group_limit, used = _read_int(directory / names[0]), _read_int(directory / names[1])
        if index == 0:
            events = directory / ("memory.events" if version == 2 else "memory.oom_control")
            oom_kills = _read_table(events).get("oom_kill", 0)
        if group_limit is None or used is None or group_limit >= info["MemTotal"]:
            continue
        stat = _read_table(directory / "memory.stat")
        prefix = "" if version == 2 else "total_"
        cache = stat.get(prefix + "inactive_file", 0) + stat.get(prefix + "active_file", 0)
        free = min(free, max(0, group_limit - used + cache))
        if group_limit < limit:
            limit, limited_by = group_limit, "cgroup"
    return Memory(limit, free, limited_by, oom_kills)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity mask and the cgroup's CPU quota, at least 1."""
    cores = float(len(os.sched_getaffinity(0)))
    for directory, version in _cgroup_dirs(root, "cpu"):
        if version == 2:
            try:
                quota, period = (directory / "cpu.max").read_text().split()
            except (OSError, ValueError):
                continue
            limits = (None if quota == "max" else int(quota), int(period))
        else:
            limits = (_read_int(directory / "cpu.cfs_quota_us"), _read_int(directory / "cpu.cfs_period_us") or 100_000)
        if limits[0] is not None and limits[0] > 0:
            cores = min(cores, limits[0] / limits[1])
    return max(1, int(cores))


def process_start_s() -> float:
    """When this process was started, on the clock of time.monotonic(); in steps of the kernel's tick (10 ms)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.monotonic()
    return time.monotonic() - max(0.0, age_s)


def shm_bytes(path: str = "/dev/shm") -> int | None:
    """Size of the shared-memory file system; None where there is none."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return stat.f_frsize * stat.f_blocks


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction-set flags of the first CPU."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def open_files_limit() -> int:
    """File descriptors a process may open; raised to the hard limit first, which every child inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if wanted > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft


def port_objection(host: str, port: int) -> str | None:
    """Why `host:port` cannot be listened on; None when it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return os.strerror(error.errno) if error.errno else str(error)
    return None


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def socket_answers(path: str) -> bool:
    """Whether a live process listens on the Unix socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
