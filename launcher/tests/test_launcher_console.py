"""What the launcher shows: readable lines, colours, JSON, progress on a terminal, and LOG_LEVEL as TGI reads it."""

import io
import json
import logging

import pytest
from tgi_launcher import console
from tgi_launcher.console import Console, LogLevels, parse_log_level, wants_color

RECORD = {
    "timestamp": "2026-01-02T03:04:05.678901Z",
    "level": "INFO",
    "message": "hello",
    "target": "tgi_router",
    "total_time": "3ms",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_record_is_one_readable_line_with_its_extra_fields() -> None:
    out = io.StringIO()
    Console(out).show("router", RECORD)
    assert out.getvalue() == "2026-01-02T03:04:05.678901Z    INFO router: hello total_time=3ms\n"


def test_the_fields_of_an_event_are_not_repeated() -> None:
    out = io.StringIO()
    Console(out).show("shard-1", {**RECORD, "rank": 1, "event": "phase", "phase": "load"})
    assert out.getvalue().endswith("INFO shard-1: hello total_time=3ms\n")


def test_in_json_the_record_is_passed_on_as_it_is() -> None:
    out = io.StringIO()
    Console(out, json_output=True).show("router", RECORD)
    assert json.loads(out.getvalue()) == RECORD


def test_control_characters_cannot_forge_lines_or_move_the_cursor() -> None:
    out = io.StringIO()
    Console(out).show("router", {**RECORD, "message": "a\x1b[2Jb\rc\nd"})
    assert "a\\x1b[2Jb\\x0dc\nd" in out.getvalue()


def test_on_a_terminal_the_time_is_short_and_progress_is_replaced_in_place() -> None:
    out = Terminal()
    shown = Console(out)
    shown.status("loading 1/2")
    shown.show("router", RECORD)
    shown.status("")
    assert out.getvalue() == (
        "\r\x1b[2Kloading 1/2\r\x1b[2K03:04:05.678    INFO router: hello total_time=3ms\nloading 1/2\r\x1b[2K"
    )


def test_progress_is_not_written_into_files() -> None:
    out = io.StringIO()
    Console(out).status("loading 1/2")
    assert out.getvalue() == ""


def test_colours_mark_level_time_and_tag() -> None:
    out = io.StringIO()
    Console(out, color=True).show("router", {**RECORD, "level": "ERROR"})
    assert "\x1b[31m  ERROR\x1b[0m" in out.getvalue()


def test_a_reader_that_went_away_does_not_end_the_launcher() -> None:
    out = io.StringIO()
    shown = Console(out)
    out.close()
    shown.text("launcher", "INFO", "nobody reads this")
    shown.plain("nor this")


def test_the_launchers_own_records_go_through_the_console() -> None:
    out = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        console.setup(Console(out, json_output=True), "INFO").warning("careful", extra={"n": 1})
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    record = json.loads(out.getvalue())
    assert (record["level"], record["message"], record["target"], record["n"]) == (
        "WARNING",
        "careful",
        "tgi_launcher",
        1,
    )


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        (None, LogLevels("INFO", "INFO", "INFO")),
        ("debug", LogLevels("DEBUG", "DEBUG", "DEBUG")),
        ("warn", LogLevels("WARNING", "WARNING", "WARNING")),
        ("ERROR", LogLevels("ERROR", "ERROR", "ERROR")),
        ("info,text_generation_router=debug", LogLevels("INFO", "DEBUG", "DEBUG")),
        ("warn,text_generation_launcher=info", LogLevels("INFO", "WARNING", "INFO")),
        ("text_generation_router::server=debug", LogLevels("INFO", "DEBUG", "DEBUG")),
        ("loud,hyper=off", LogLevels("INFO", "INFO", "INFO", ("loud",))),
    ],
)
def test_log_level_is_a_level_or_tgis_directives(text: str | None, levels: LogLevels) -> None:
    assert parse_log_level(text) == levels


@pytest.mark.parametrize(
    ("environ", "terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"LOG_COLORIZE": "1"}, False, True),
        ({"LOG_COLORIZE": "0"}, True, False),
        ({"LOG_COLORIZE": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_colour_is_for_terminals_unless_said_otherwise(environ: dict[str, str], terminal: bool, expected: bool) -> None:
    assert wants_color(Terminal() if terminal else io.StringIO(), environ) is expected
