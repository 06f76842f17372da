"""Every kind of death gets its cause and, where there is one, the remedy; and the first failing rank gets the blame."""

import signal

import pytest
from tgi_launcher.explain import Death, Evidence, explain, first_cause, last_line
from tgi_launcher.memory_fit import GIB

TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
    f()
ValueError: the weights are wrong"""
DUMP = 'Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n  File "x.py", line 1'


def death(returncode: int, **values: str) -> Death:
    return Death("shard-1", returncode, **values)


def test_the_kernels_killer_is_named_with_its_figures() -> None:
    evidence = Evidence(oom_kills=1, memory_limit=8 * GIB, memory_limited_by="cgroup", peak_rss=int(7.9 * GIB))
    text = str(explain(death(-signal.SIGKILL, phase="load 3.0/5.0 GiB"), evidence))
    assert text.startswith(
        "shard-1 (in phase load 3.0/5.0 GiB) was killed by the kernel's OOM killer at 7.9 GiB of 8.0 GiB (cgroup)"
    )
    assert "--max-batch-total-tokens" in text


def test_a_kill_without_memory_trouble_came_from_outside() -> None:
    assert "somebody outside sent it" in str(explain(death(-signal.SIGKILL), Evidence()))


@pytest.mark.parametrize(
    ("shm", "words"),
    [(64 * 2**20, "/dev/shm is 64 MiB: give"), (None, "/dev/shm is absent"), (8 * GIB, "cut off or changed")],
)
def test_a_bus_error_is_explained_by_shared_memory_or_a_cut_file(shm: int | None, words: str) -> None:
    assert words in str(explain(death(-signal.SIGBUS), Evidence(shm_bytes=shm)))


def test_an_illegal_instruction_names_what_the_cpu_lacks() -> None:
    text = str(explain(death(-signal.SIGILL), Evidence(cpu_flags=frozenset({"avx2"}))))
    assert "this CPU lacks avx512f, avx512_bf16, amx_tile" in text
    assert "this CPU lacks" not in str(explain(death(-signal.SIGILL), Evidence()))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE])
def test_a_native_crash_comes_with_its_dump(number: signal.Signals) -> None:
    text = str(explain(death(-number, stderr=f"words\n{DUMP}"), Evidence()))
    assert f"died of {number.name} (signal {number.value}), a crash in native code" in text
    assert text.endswith(DUMP)


def test_other_signals_are_named() -> None:
    assert "was ended by SIGTERM (signal 15)" in str(explain(death(-signal.SIGTERM), Evidence()))
    assert "was ended by signal 50 (signal 50)" in str(explain(death(-50), Evidence()))


def test_a_traceback_is_shown_whole_wherever_it_was_written() -> None:
    for values in (
        {"stderr": f"noise\n{TRACEBACK}\n"},
        {"last_error": f"ValueError: the weights are wrong\n{TRACEBACK}"},
    ):
        found = explain(death(1, **values), Evidence())
        assert found.cause == "shard-1 (in phase serving) exited with status 1: ValueError: the weights are wrong"
        assert found.detail == TRACEBACK


def test_the_childs_own_sentence_is_the_cause() -> None:
    found = explain(death(1, last_error="a.safetensors lacks `x`", stderr="noise"), Evidence())
    assert str(found) == "shard-1 (in phase serving) exited with status 1: a.safetensors lacks `x`"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_running_out_of_memory_says_which_flags_help(device: str) -> None:
    found = explain(death(1, last_error="torch.OutOfMemoryError: CUDA out of memory."), Evidence(device=device))
    assert "--max-batch-prefill-tokens" in found.advice
    assert ("--cuda-memory-fraction" in found.advice) == (device == "cuda")


@pytest.mark.parametrize(
    ("status", "words"), [(2, "different versions"), (127, "not installed"), (0, "nobody asked it to stop")]
)
def test_exit_statuses_with_a_meaning_are_explained(status: int, words: str) -> None:
    assert words in str(explain(death(status), Evidence()))


def test_a_child_that_the_launcher_killed_says_why() -> None:
    text = str(explain(death(-9, stopped_because="no progress for 300 s in phase load", stderr=DUMP), Evidence()))
    assert text.startswith("shard-1 (in phase serving) was killed by the launcher: no progress for 300 s in phase load")
    assert text.endswith(DUMP)


def test_the_blame_is_the_first_ranks_that_did_not_just_lose_its_peer() -> None:
    lost = Death("shard-0", 1, last_error="RuntimeError: Connection closed by peer [127.0.0.1]:5")
    failed = Death("shard-1", 1, last_error="ValueError: boom")
    killed = Death("shard-2", -9)
    assert first_cause([lost, failed]) is failed
    assert first_cause([lost, failed, killed]) is killed
    assert first_cause([lost]) is lost
    assert first_cause([failed, Death("shard-3", 1, last_error="ValueError: later")]) is failed


def test_the_last_line_of_nothing_is_nothing() -> None:
    assert last_line("\n \n") == ""
