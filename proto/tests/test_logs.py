"""What a child logs, the launcher reads."""

import io
import json
import logging

import pytest
from tgi_proto import logs


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(stream: io.StringIO):  # type: ignore[no-untyped-def]
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield logs.setup("tgi_test", "INFO", stream=stream, rank=1)
    root.handlers[:], _ = before
    root.setLevel(before[1])


def test_a_record_is_one_line_of_json_with_its_fields_in_order(logger: logging.Logger, stream: io.StringIO) -> None:
    logger.warning("two\nlines and \x1b[31mcolour", extra={"request_id": 7})
    (line,) = stream.getvalue().splitlines()
    record = logs.parse(line)
    assert record is not None
    assert list(record) == ["timestamp", "level", "message", "target", "rank", "request_id"]
    assert record["level"] == "WARNING"
    assert record["message"] == "two\nlines and \x1b[31mcolour"
    assert record["timestamp"].endswith("Z")
    assert "\x1b" not in line


def test_an_exception_comes_with_its_traceback(logger: logging.Logger, stream: io.StringIO) -> None:
    try:
        raise ValueError("the cause")
    except ValueError:
        logger.exception("it failed")
    record = logs.parse(stream.getvalue().strip())
    assert record is not None
    assert record["message"].startswith("it failed\nTraceback")
    assert record["message"].endswith("ValueError: the cause")


def test_an_event_carries_the_fields_the_launcher_acts_on(logger: logging.Logger, stream: io.StringIO) -> None:
    logs.event(logger, "progress", "loading", phase="load", done=1, total=2, unit="bytes")
    record = logs.parse(stream.getvalue().strip())
    assert record is not None
    assert record["event"] == "progress"
    assert {name: record[name] for name in logs.EVENTS["progress"]} == {
        "phase": "load",
        "done": 1,
        "total": 2,
        "unit": "bytes",
    }


def test_the_level_filters(logger: logging.Logger, stream: io.StringIO) -> None:
    logger.debug("not shown")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("line", ["", "plain text", "{broken", "[1]", json.dumps({"message": "no level"}), "{}"])
def test_a_line_that_is_no_record_is_told_apart(line: str) -> None:
    assert logs.parse(line) is None
