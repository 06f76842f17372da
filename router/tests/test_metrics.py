"""The exposition: TGI's names, types, labels, buckets and number format, all of it from the start."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tgi_router import metrics_page
from tgi_router.metric_types import format_number
from tgi_router.metrics import FAILURES, METHODS, Metrics

FAILED = ("validation", "overloaded", "template", "incomplete", "generation", "dropped")
METHOD = ("prefill", "decode")
# TGI's list: name -> type, label, its values, number of buckets, help text
TGIS: dict[str, tuple[str, str | None, tuple[str, ...], int, str | None]] = {
    "tgi_request_count": ("counter", None, (), 0, "Total number of requests"),
    "tgi_request_success": ("counter", None, (), 0, "Number of successful requests"),
    "tgi_request_failure": ("counter", "err", FAILED, 0, None),
    "tgi_request_duration": ("histogram", None, (), 35, "Request duration"),
    "tgi_request_validation_duration": ("histogram", None, (), 35, "Request validation duration"),
    "tgi_request_queue_duration": ("histogram", None, (), 35, "Request queue duration"),
    "tgi_request_inference_duration": ("histogram", None, (), 35, "Request inference duration"),
    "tgi_request_mean_time_per_token_duration": ("histogram", None, (), 35, "Mean time per token per request"),
    "tgi_request_generated_tokens": ("histogram", None, (), 100, "Generated tokens per request"),
    "tgi_request_input_length": ("histogram", None, (), 100, "Input token length per request"),
    "tgi_request_max_new_tokens": ("histogram", None, (), 100, "Maximum new tokens per request"),
    "tgi_request_skipped_tokens": ("summary", None, (), 0, "Speculated tokens per request"),
    "tgi_batch_next_size": ("histogram", None, (), 1024, "Batch size of the next batch"),
    "tgi_batch_current_size": ("gauge", None, (), 0, "Current batch size"),
    "tgi_batch_current_max_tokens": ("gauge", None, (), 0, "Maximum tokens for the current batch"),
    "tgi_queue_size": ("gauge", None, (), 0, "Current queue size"),
    "tgi_batch_inference_count": ("counter", "method", METHOD, 0, "Inference calls per method (prefill or decode)"),
    "tgi_batch_inference_success": (
        *("counter", "method", METHOD, 0),
        "Number of successful inference calls per method (prefill or decode)",
    ),
    "tgi_batch_inference_failure": ("counter", "method", METHOD, 0, None),
    "tgi_batch_inference_duration": ("histogram", "method", METHOD, 35, "Batch inference duration"),
    "tgi_batch_forward_duration": (
        *("histogram", "method", METHOD, 35),
        "Batch forward duration per method (prefill or decode)",
    ),
    "tgi_batch_decode_duration": (
        *("histogram", "method", METHOD, 35),
        "Time spent decoding a batch per method (prefill or decode)",
    ),
    "tgi_batch_filter_duration": (
        *("histogram", "method", METHOD, 35),
        "Time spent filtering batches and sending generated tokens per method (prefill or decode)",
    ),
    "tgi_batch_concat_duration": ("histogram", "method", ("decode",), 35, None),
    "tgi_batch_concat": ("counter", "reason", ("backpressure", "wait_exceeded", "chunking"), 0, None),
    "tgi_batch_max_total_tokens": ("gauge", None, (), 0, None),
}


def lines(metrics: Metrics, name: str) -> list[str]:
    return [line for line in metrics.exposition().splitlines() if re.match(rf"{name}(_bucket|_sum|_count)?[{{ ]", line)]


def test_everything_exists_at_zero_from_the_start() -> None:
    text = Metrics().exposition()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert line.endswith(" 0"), line
    assert not re.search(r"_total\b|_created\b", text)
    assert text.index("counter") < text.index("gauge") < text.index("histogram")


@pytest.mark.parametrize("name", TGIS)
def test_name_type_label_buckets_and_help_are_tgis(name: str) -> None:
    kind, label, values, num_buckets, help = TGIS[name]
    metrics = Metrics()
    metrics.set_limits(max_input_tokens=1000, max_total_tokens=2048)
    text = metrics.exposition()
    assert f"# TYPE {name} {kind}\n" in text
    assert re.findall(rf"# HELP {name} (.*)", text) == ([] if help is None else [help])
    found = lines(metrics, name)
    labelled = [value for value in values if any(f'{label}="{value}"' in line for line in found)]
    assert labelled == list(values)
    assert all("{" not in line or label is not None or "le=" in line or "quantile=" in line for line in found)
    num_series = max(1, len(values))
    num_lines = sum("_bucket{" in line for line in found)
    assert num_lines == ((num_buckets + 1) * num_series if num_buckets else 0)  # one more for +Inf


def test_labels_are_tgis() -> None:
    metrics = Metrics()
    metrics.request_failure.inc("overloaded")
    assert lines(metrics, "tgi_request_failure") == [
        f'tgi_request_failure{{err="{err}"}} {int(err == "overloaded")}' for err in FAILURES
    ]
    metrics.batch_inference_duration.observe(0.001, "decode")
    assert f'tgi_batch_inference_duration_count{{method="{METHODS[1]}"}} 1' in metrics.exposition()


def test_duration_buckets_have_tgis_digits() -> None:
    metrics = Metrics()
    bounds = re.findall(r'le="([^"]+)"', "\n".join(lines(metrics, "tgi_request_duration")))
    assert len(bounds) == 36
    assert bounds[:7] == [
        "0.00015000000000000001",
        "0.00022500000000000002",
        "0.0003375",
        "0.00050625",
        "0.000759375",
        "0.0011390624999999999",
        "0.0017085937499999998",
    ]
    assert bounds[-4:] == ["64.71598249109837", "97.07397373664756", "145.61096060497135", "+Inf"]


def test_buckets_of_lengths_follow_the_limits() -> None:
    metrics = Metrics()
    metrics.set_limits(max_input_tokens=1000, max_total_tokens=2048)
    metrics.request_input_length.observe(10)
    found = lines(metrics, "tgi_request_input_length")
    assert found[0] == 'tgi_request_input_length_bucket{le="10"} 1'
    assert found[99] == 'tgi_request_input_length_bucket{le="1000"} 1'
    assert lines(metrics, "tgi_request_max_new_tokens")[0] == 'tgi_request_max_new_tokens_bucket{le="20.48"} 0'
    assert lines(metrics, "tgi_batch_next_size")[0] == 'tgi_batch_next_size_bucket{le="1"} 0'
    assert len(lines(metrics, "tgi_batch_next_size")) == 1024 + 3


def test_a_histogram_counts_cumulatively_and_its_bounds_are_inclusive() -> None:
    metrics = Metrics()
    for value in (1.0, 2.0, 2.5, 5000.0):
        metrics.batch_next_size.observe(value)
    found = lines(metrics, "tgi_batch_next_size")
    assert found[:3] == [f'tgi_batch_next_size_bucket{{le="{n}"}} {count}' for n, count in ((1, 1), (2, 2), (3, 3))]
    assert found[-3:] == [
        'tgi_batch_next_size_bucket{le="+Inf"} 4',
        "tgi_batch_next_size_sum 5005.5",
        "tgi_batch_next_size_count 4",
    ]
    assert metrics.batch_next_size.count() == 4


def test_skipped_tokens_is_a_summary_with_tgis_quantiles() -> None:
    metrics = Metrics()
    for value in range(101):
        metrics.request_skipped_tokens.observe(value)
    found = lines(metrics, "tgi_request_skipped_tokens")
    assert found == [
        *(
            f'tgi_request_skipped_tokens{{quantile="{quantile}"}} {value}'
            for quantile, value in [
                ("0", 0),
                ("0.5", 50),
                ("0.9", 90),
                ("0.95", 95),
                ("0.99", 99),
                ("0.999", 100),
                ("1", 100),
            ]
        ),
        "tgi_request_skipped_tokens_sum 5050",
        "tgi_request_skipped_tokens_count 101",
    ]
    assert metrics.request_skipped_tokens.count() == 101


def test_prometheus_own_parser_reads_it() -> None:
    metrics = Metrics()
    metrics.queue_size.set(3)
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition())}
    assert set(TGIS) <= set(families)
    assert families["tgi_queue_size"].samples[0].value == metrics.queue_size.get() == 3
    assert families["tgi_request_duration"].type == "histogram"


def test_numbers_print_without_an_exponent_and_whole_ones_without_a_point() -> None:
    cases = {0.0: "0", 3.0: "3", -2.0: "-2", 1e20: "100000000000000000000", 0.5: "0.5", 1.5e-7: "0.00000015"}
    assert {value: format_number(value) for value in cases} == cases
    assert format_number(-2.5e-5) == "-0.000025"
    assert [format_number(float(text)) for text in ("inf", "-inf", "nan")] == ["+Inf", "-Inf", "NaN"]


def test_the_reference_page_is_the_one_that_make_docs_writes() -> None:
    committed = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
    assert committed.read_text() == metrics_page.page(), "run `make docs`"
    for metric in Metrics().all():
        assert f"`{metric.name}`" in committed.read_text()
        assert metric.meaning.endswith("."), metric.name
