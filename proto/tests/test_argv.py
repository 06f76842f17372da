"""A child's configuration survives the trip over its command line."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tgi_proto.argv import flag, from_argv, to_argv
from tgi_router.config import RouterConfig
from tgi_shard.config import ShardConfig

text = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda s: not s.startswith("-")
)


@dataclass(frozen=True, slots=True)
class Everything:
    name: str = flag("A name.")
    count: int = flag("A count.", 3)
    ratio: float = flag("A ratio.", 0.5)
    on: bool = flag("On.", True)
    off: bool = flag("Off.", False)
    maybe: int | None = flag("Maybe.", None)
    choice: Literal["a", "b"] | None = flag("Choice.", None)
    words: tuple[str, ...] = flag("Words.", ())
    numbers: tuple[int, ...] = flag("Numbers.", ())


@given(
    st.builds(
        Everything,
        name=text,
        count=st.integers(0, 10**12),
        ratio=st.floats(0, 1e9),
        on=st.booleans(),
        off=st.booleans(),
        maybe=st.none() | st.integers(0, 9),
        choice=st.sampled_from([None, "a", "b"]),
        words=st.lists(text, max_size=3).map(tuple),
        numbers=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    )
)
def test_any_configuration_survives_the_command_line(config: Everything) -> None:
    assert from_argv(Everything, to_argv(config), prog="test") == config


def test_values_equal_to_their_default_are_not_written() -> None:
    assert to_argv(Everything(name="x")) == ["--name", "x"]


def test_the_configurations_of_router_and_shard_survive() -> None:
    router = RouterConfig("/m", "id", cors_allow_origin=("https://a", "https://b"), max_total_tokens=7, hostname="::1")
    shard = ShardConfig("/m", "id", rank=1, world_size=2, dtype="bfloat16", trust_remote_code=True)
    assert from_argv(RouterConfig, to_argv(router), prog="router") == router
    assert from_argv(ShardConfig, to_argv(shard), prog="shard") == shard


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--name"],
        ["--name", "x", "--count", "many"],
        ["--name", "x", "--choice", "c"],
        ["--name", "x", "--nam", "y"],
    ],
)
def test_a_wrong_command_line_exits_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        from_argv(Everything, argv, prog="test")
    assert exit.value.code == 2
    assert "usage: test" in capsys.readouterr().err
