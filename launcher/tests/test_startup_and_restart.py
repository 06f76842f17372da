"""The pure parts of supervision: phases with their stall limit, and the restart budget with its back-off."""

from hypothesis import given
from hypothesis import strategies as st
from tgi_launcher.restart import WINDOW_S, RestartBudget
from tgi_launcher.startup import Startup


def test_phases_are_timed_and_described() -> None:
    startup = Startup(10.0)
    assert startup.describe() == "spawn"
    startup.enter("import", 10.5)
    startup.enter("load", 12.0)
    startup.advance(2**30, 4 * 2**30, "bytes", 12.5)
    assert startup.describe() == "load 1.0/4.0 GiB"
    startup.advance(2**19, 2**20, "bytes", 12.5)
    assert startup.describe() == "load 0.5/1.0 MiB"
    startup.enter("warmup", 13.0)
    startup.advance(1, 3, "steps", 13.1)
    assert startup.describe() == "warmup 1/3 steps"
    assert not startup.ready
    startup.enter("ready", 14.0)
    assert startup.ready
    assert startup.total_s == 4.0
    assert startup.summary() == "spawn 0.50 s, import 1.50 s, load 1.00 s, warmup 1.00 s"


def test_only_progress_postpones_the_stall_limit() -> None:
    startup = Startup(0.0)
    assert startup.stalls_at(300) == 300
    startup.enter("load", 100)
    assert startup.stalls_at(300) == 400
    startup.advance(5, 10, "bytes", 200)
    assert startup.stalls_at(300) == 500
    startup.advance(5, 10, "bytes", 250)
    assert startup.stalls_at(300) == 500


def test_the_first_restart_is_at_once_and_the_next_wait_longer_and_longer() -> None:
    budget = RestartBudget(6)
    assert [budget.spend(float(t)) for t in range(7)] == [0.0, 1.0, 2.0, 4.0, 8.0, 8.0, None]
    assert budget.spent == 6


def test_the_budget_refills_as_time_passes() -> None:
    budget = RestartBudget(1)
    assert budget.spend(0.0) == 0.0
    assert budget.spend(WINDOW_S - 1) is None
    assert budget.spend(WINDOW_S) == 0.0


@given(limit=st.integers(0, 5), gaps=st.lists(st.floats(0, 1000), max_size=40))
def test_no_window_ever_holds_more_restarts_than_the_budget(limit: int, gaps: list[float]) -> None:
    budget, now, granted = RestartBudget(limit), 0.0, []
    for gap in gaps:
        now += gap
        if budget.spend(now) is not None:
            granted.append(now)
    for start in granted:
        assert sum(start <= t < start + WINDOW_S for t in granted) <= limit
