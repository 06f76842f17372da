"""What the launcher learns about the machine, on made-up /proc and /sys trees and real sockets."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tgi_launcher import env_report, exec_child, gpu, guard, preflight, resources
from tgi_launcher.errors import ArgumentValidation
from tgi_launcher.flags import Flags
from tgi_launcher.memory_fit import GIB, gib

MEMINFO = f"MemTotal: {32 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {20 * 2**20} kB\n"
SMI = """0, GPU-aa, NVIDIA H200, 143771, 143000
1, GPU-bb, NVIDIA H200, 143771, 1000
garbage
2, GPU-cc, NVIDIA T4, [N/A], 5
"""


def tree(root: Path, **files: str) -> Path:
    """Files by path; `__` stands for a slash and `_DOT_` for a dot."""
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


# -- memory and cores


def test_without_a_cgroup_the_machine_limits(tmp_path: Path) -> None:
    assert resources.memory(tree(tmp_path)) == resources.Memory(32 * GIB, 20 * GIB, "machine")


def test_cgroup_v2_limits_and_its_page_cache_counts_as_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/cgroup.controllers": "memory\n",
        "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{5 * GIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "5\n",
        "sys/fs/cgroup/a/b/memory.events": "low 0\noom 1\noom_kill 3\n",
    }
    assert resources.memory(tree(tmp_path, **files)) == resources.Memory(8 * GIB, 5 * GIB, "cgroup", 3)


def test_cgroup_v1_limits_when_the_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\n",
        "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\noom_kill 2\n",
    }
    assert resources.memory(tree(tmp_path, **files)) == resources.Memory(4 * GIB, 2 * GIB, "cgroup", 2)


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("max 100000", None), ("garbage", None)])
def test_a_cpu_quota_limits_the_cores(quota: str, cores: int | None, tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu\n",
        "sys/fs/cgroup/cpu.max": quota,
    }
    everything = len(os.sched_getaffinity(0))
    assert resources.usable_cores(tree(tmp_path, **files)) == min(cores or everything, everything)


def test_an_old_cpu_quota_limits_the_cores(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert resources.usable_cores(tree(tmp_path, **files)) == 1


def test_this_machine_can_be_read() -> None:
    memory = resources.memory()
    assert 0 < memory.free <= memory.limit
    assert resources.usable_cores() >= 1
    assert resources.process_start_s() > 0


def test_cpu_flags_are_read_and_may_be_absent(tmp_path: Path) -> None:
    assert resources.cpu_flags(tmp_path) == frozenset()
    tree(tmp_path, **{"proc/cpuinfo": "processor: 0\nflags\t\t: fpu avx2\n"})
    assert resources.cpu_flags(tmp_path) == {"fpu", "avx2"}
    tree(tmp_path, **{"proc/cpuinfo": "processor: 0\n"})
    assert resources.cpu_flags(tmp_path) == frozenset()


def test_shared_memory_may_be_absent() -> None:
    assert resources.shm_bytes("/no/where") is None
    assert resources.shm_bytes("/tmp") is not None


def test_sizes_are_for_people() -> None:
    assert [gib(n) for n in (3 * GIB, GIB // 2, 2**20)] == ["3.0 GiB", "0.5 GiB", "1 MiB"]


# -- GPUs


def test_nvidia_smis_lines_are_read_and_odd_ones_left_out() -> None:
    first, second = gpu.parse_query(SMI)
    assert (first.index, first.uuid, first.card, first.free_bytes) == (0, "GPU-aa", "nvidia-h200", 143000 * 2**20)
    assert second.index == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("GPU-bb", [1]), ("", []), ("-1", []), ("0,7,1", [0])],
)
def test_visible_devices_are_chosen_as_cuda_chooses_them(value: str | None, expected: list[int]) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [device.index for device in gpu.visible(gpu.parse_query(SMI), environ)] == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "0"}, 1),
        ({"ZE_AFFINITY_MASK": "0,1"}, 2),
    ],
)
def test_devices_are_counted_as_tgi_counts_them(environ: dict[str, str], expected: int | None) -> None:
    assert gpu.device_count(environ, gpu.parse_query(SMI)) == expected


def test_all_devices_of_a_machine_without_any_count_as_one() -> None:
    assert gpu.device_count({"NVIDIA_VISIBLE_DEVICES": "all"}, ()) == 1


def fake_tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_nvidia_smi_is_asked_and_its_failure_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake_tool(tmp_path, "nvidia-smi", "echo '0, GPU-aa, NVIDIA H200, 143771, 143000'")
    assert [device.name for device in gpu.query()] == ["NVIDIA H200"]
    fake_tool(tmp_path, "nvidia-smi", "exit 9")
    assert gpu.query() == ()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert gpu.query() == ()


def test_whether_torch_was_built_for_cuda_is_read_without_importing_it() -> None:
    code = "import sys; from tgi_launcher.gpu import torch_has_cuda; print(torch_has_cuda(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    import importlib.metadata

    assert done.stdout.split() == [str("+cpu" not in importlib.metadata.version("torch")), "False"]


def test_the_report_names_versions_and_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = resources.Machine(resources.memory(), 2)
    text = env_report.report(machine, {"GIT_SHA": "abc"})
    assert text.startswith("Runtime environment:\nTarget: ")
    assert "Commit sha: abc" in text
    assert text.endswith("nvidia-smi:\nN/A")
    assert env_report.package_version("no-such-distribution") == "not installed"
    fake_tool(tmp_path, "nvidia-smi", "echo driver 9")
    assert env_report.tool_output("nvidia-smi") == "driver 9"


# -- preflight


def test_a_taken_port_is_named_with_the_flag_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name in ("port", "prometheus_port"):
            flags = Flags(hostname="127.0.0.1", **{"port": resources.free_port(), name: port}, sources={name: "flag"})
            with pytest.raises(ArgumentValidation) as info:
                preflight.check_ports(flags)
            assert f"`{name}` {port} cannot be listened on at 127.0.0.1: Address already in use" in info.value.sentence
            assert f"--{name.replace('_', '-')}" in info.value.sentence
        preflight.check_ports(Flags(hostname="127.0.0.1", port=resources.free_port(), prometheus_port=port))


def test_an_address_of_another_machine_is_named() -> None:
    assert "assign" in (resources.port_objection("192.0.2.1", 3000) or "")
    assert resources.port_objection("::1", 0) in (None, "Cannot assign requested address")


def test_a_taken_rendezvous_port_is_replaced_unless_it_was_asked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert preflight.master_port(Flags(master_port=port), 1) == port
        assert preflight.master_port(Flags(master_port=port, master_addr="10.0.0.9"), 2) == port
        assert preflight.master_port(Flags(master_port=port), 2) != port
        with pytest.raises(ArgumentValidation, match="--master-port"):
            preflight.master_port(Flags(master_port=port, sources={"master_port": "env"}), 2)


def test_few_file_descriptors_and_small_shared_memory_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "open_files_limit", lambda: 64)
    monkeypatch.setattr(preflight, "shm_bytes", lambda: 64 * 2**20)
    files, shm = preflight.machine_warnings(2, "cuda")
    assert "only 64 file descriptors" in files
    assert "/dev/shm is only 64 MiB" in shm
    assert len(preflight.machine_warnings(2, "cpu")) == 1


def test_the_soft_limit_of_files_is_raised_to_the_hard_one() -> None:
    code = (
        "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, min(hard, 4096))); "
        "from tgi_launcher.resources import open_files_limit; print(open_files_limit())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert int(done.stdout) == min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)


def test_the_socket_prefix_is_locked_freed_and_checked(tmp_path: Path) -> None:
    prefix = str(tmp_path / "new" / "s")
    lock = preflight.SocketLock(prefix, 1)
    with pytest.raises(ArgumentValidation, match="another launcher holds it"):
        preflight.SocketLock(prefix, 1)
    lock.release()
    assert not Path(lock.path).exists()
    preflight.SocketLock(prefix, 1).release()


def test_a_live_socket_without_a_lock_is_respected(tmp_path: Path) -> None:
    prefix = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(f"{prefix}-1")
        live.listen()
        with pytest.raises(ArgumentValidation, match="a live process answers at"):
            preflight.SocketLock(prefix, 2)
        preflight.SocketLock(prefix, 1).release()
    preflight.SocketLock(prefix, 2).release()
    assert not Path(f"{prefix}-1").exists()


def test_what_is_no_socket_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "s-0").write_text("precious")
    with pytest.raises(ArgumentValidation, match="is no socket"):
        preflight.SocketLock(str(tmp_path / "s"), 1)
    assert (tmp_path / "s-0").read_text() == "precious"


def test_a_prefix_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentValidation, match="too long"):
        preflight.SocketLock("/tmp/" + "x" * 120, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentValidation, match="cannot be used"):
        preflight.SocketLock(str(tmp_path / "file" / "s"), 1)


# -- guard and exec wrapper


def test_the_guard_obeys_and_does_nothing_after_done(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    guard.follow(["group 999999999\n", f"path {tmp_path / 'kept'}\n", "done\n"])
    assert (tmp_path / "kept").exists()


def test_the_guard_cleans_up_when_the_orders_end(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    spared = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    orders = [f"group {sleeper.pid}", f"group {spared.pid}", f"gone {spared.pid}"]
    orders += [f"path {tmp_path / name}" for name in ("tree", "file", "never-there")]
    guard.follow(orders)
    assert sleeper.wait(10) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    assert spared.poll() is None
    spared.kill()
    spared.wait()


def test_a_guard_that_was_killed_is_no_obstacle() -> None:
    watching = guard.Guard()
    watching._process.kill()
    watching._process.wait()
    watching.watch_group(999999999)
    watching.forget_group(999999999)
    watching.done()


def test_a_child_whose_parent_is_gone_does_not_start() -> None:
    script = Path(exec_child.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", str(script), "999999999", "true"], timeout=30)
    assert done.returncode == 1


def test_a_program_that_is_not_there_is_status_127() -> None:
    script = Path(exec_child.__file__)
    command = [sys.executable, "-I", "-S", str(script), str(os.getpid()), "/no/such/program"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (127, "/no/such/program cannot be started: No such file or directory\n")


def test_the_wrapper_becomes_the_program() -> None:
    script = Path(exec_child.__file__)
    command = [sys.executable, "-I", "-S", str(script), str(os.getpid()), "echo", "hello"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == "hello\n"


def test_the_wrapper_can_be_called_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(exec_child, "die_with_parent", lambda parent: started.append([str(parent)]))
    monkeypatch.setattr(os, "execvp", lambda file, argv: started.append(argv))
    exec_child.main(["7", "echo", "hello"])
    assert started == [["7"], ["echo", "hello"]]
