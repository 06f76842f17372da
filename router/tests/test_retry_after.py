"""The estimate behind `Retry-After`: pure, the clock is an argument."""

from hypothesis import given
from hypothesis import strategies as st
from tgi_router.retry_after import MAX_S, RetryAfter, seconds_until_free


def test_permits_come_back_at_the_rate_at_which_they_are_held() -> None:
    assert seconds_until_free(mean_held_s=10.0, permits=100, ahead=1) == 0.1
    assert seconds_until_free(mean_held_s=10.0, permits=4, ahead=8) == 20.0


def test_nobody_has_finished_yet() -> None:
    assert RetryAfter(permits=4).refused(1, now_s=100.0) == 1
    assert RetryAfter(permits=4).until_all_returned(4) == 1


def test_the_mean_is_over_the_last_requests() -> None:
    later = RetryAfter(permits=1)
    for _ in range(100):
        later.returned(held_s=50.0)
    for _ in range(64):
        later.returned(held_s=3.0)
    assert later.refused(1, now_s=0.0) == 3
    assert later.until_all_returned(2) == 6


def test_the_refused_stand_in_line_and_the_line_moves_with_the_clock() -> None:
    later = RetryAfter(permits=2)
    later.returned(held_s=8.0)  # one comes back every 4 s
    assert [later.refused(1, now_s=0.0) for _ in range(3)] == [4, 8, 12]
    later.returned(held_s=8.0)
    assert later.refused(2, now_s=10.0) == 10  # 12 - 10, and two more
    later.returned(held_s=8.0)
    assert later.refused(1, now_s=1000.0) == 4


def test_while_nothing_comes_back_the_wait_grows() -> None:
    later = RetryAfter(permits=100)
    later.returned(held_s=1.0)
    assert [later.refused(1, now_s=now) for now in (0.0, 5.0, 20.0, 500.0)] == [1, 5, 20, MAX_S]
    later.returned(held_s=1.0)
    assert later.refused(1, now_s=600.0) == 1


@given(
    st.integers(1, 512),
    st.lists(st.tuples(st.booleans(), st.floats(0, 1e4), st.integers(1, 512)), max_size=50),
)
def test_it_is_always_whole_seconds_within_a_minute(permits: int, events: list[tuple[bool, float, int]]) -> None:
    later, now = RetryAfter(permits), 0.0
    for returned, seconds, count in events:
        now += seconds
        if returned:
            later.returned(seconds)
        else:
            told = later.refused(count, now)
            assert isinstance(told, int)
            assert 1 <= told <= MAX_S
        assert 1 <= later.until_all_returned(count) <= MAX_S
