"""Stop strings: found wherever token boundaries lie, removed or kept, and nothing shown too early."""

from hypothesis import given
from hypothesis import strategies as st
from tgi_router.stopping import StopStrings

texts = st.text(alphabet="ab\n", max_size=30)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def cut(text: str, lengths: list[int]) -> list[str]:
    """`text` in pieces of the given lengths, the rest character by character."""
    pieces = []
    for length in lengths:
        pieces.append(text[:length])
        text = text[length:]
    return pieces + list(text)


def run(pieces: list[str], stops: list[str], *, keep: bool) -> tuple[str, bool]:
    """(shown text, found)."""
    search = StopStrings(stops, keep=keep)
    shown = ""
    for piece in pieces:
        shown += search.add(piece)
        if search.found:
            return shown, True
    return shown + search.end(), False


def first(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that is complete first, by looking at every prefix of the text."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@given(text=texts, stops=stops, lengths=st.lists(st.integers(0, 5), max_size=10))
def test_a_removed_stop_string_ends_the_text_before_it_however_the_text_is_cut(
    text: str, stops: list[str], lengths: list[int]
) -> None:
    match = first(text, stops)
    assert run(cut(text, lengths), stops, keep=False) == ((text[: match[0]], True) if match else (text, False))


@given(text=texts, stops=stops, lengths=st.lists(st.integers(0, 5), max_size=10))
def test_a_kept_stop_string_ends_the_text_after_it(text: str, stops: list[str], lengths: list[int]) -> None:
    match = first(text, stops)
    shown, found = run(cut(text, lengths), stops, keep=True)
    assert found is (match is not None)
    if match is None:
        assert shown == text
    else:
        assert shown.removesuffix("\n") in (text[: match[1]], text[: match[1]].removesuffix("\n"))


@given(text=texts, stops=stops)
def test_what_is_shown_is_never_taken_back_and_never_lags_more_than_needed(text: str, stops: list[str]) -> None:
    search = StopStrings(stops, keep=False)
    shown = ""
    for count, character in enumerate(text, 1):
        shown += search.add(character)
        if search.found:
            break
        held = text[len(shown) : count]
        assert text.startswith(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_line_break_right_after_a_kept_stop_string_stays_as_in_tgi() -> None:
    assert run(["x", "END\n"], ["END"], keep=True) == ("xEND\n", True)
    assert run(["x", "END\nmore"], ["END"], keep=True) == ("xEND", True)


def test_the_stop_string_that_is_complete_first_wins_and_the_longer_of_two() -> None:
    assert run(["abcd"], ["d", "bc"], keep=False) == ("a", True)
    assert run(["abcd"], ["c", "bc"], keep=False) == ("a", True)


@given(text=texts, stops=stops, num_ignored=st.integers(0, 20), keep=st.booleans())
def test_a_stop_string_that_is_complete_too_early_does_not_count_and_one_that_ends_later_does(
    text: str, stops: list[str], num_ignored: int, keep: bool
) -> None:
    search, shown = StopStrings(stops, keep=keep), ""
    for count, character in enumerate(text, 1):
        shown += search.add(character, counts=count > num_ignored)
        if search.found:
            break
    ends = [
        (end, min(end - len(stop) for stop in stops if text[:end].endswith(stop)))
        for end in range(num_ignored + 1, len(text) + 1)
        if any(text[:end].endswith(stop) for stop in stops)
    ]
    assert search.found is bool(ends)
    if not ends:
        assert shown + search.end() == text
    elif keep:
        assert shown == text[: ends[0][0]]
    else:
        assert shown == text[: ends[0][1]]
