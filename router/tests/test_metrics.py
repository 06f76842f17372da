"""The exposition: TGI's names, types, labels, buckets and number format, all of it from the start."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tgi_router import metrics_page
from tgi_router.metric_types import format_number
from tgi_router.metrics import CONCAT_REASONS, FAILURES, METHODS, Metrics

# name -> type of everything in TGI's list that has a meaning here
TGIS = {
    "tgi_request_count": "counter",
    "tgi_request_success": "counter",
    "tgi_request_failure": "counter",
    "tgi_request_duration": "histogram",
    "tgi_request_validation_duration": "histogram",
    "tgi_request_queue_duration": "histogram",
    "tgi_request_inference_duration": "histogram",
    "tgi_request_mean_time_per_token_duration": "histogram",
    "tgi_request_generated_tokens": "histogram",
    "tgi_request_input_length": "histogram",
    "tgi_request_max_new_tokens": "histogram",
    "tgi_request_skipped_tokens": "summary",
    "tgi_batch_next_size": "histogram",
    "tgi_batch_current_size": "gauge",
    "tgi_batch_current_max_tokens": "gauge",
    "tgi_queue_size": "gauge",
    "tgi_batch_inference_count": "counter",
    "tgi_batch_inference_success": "counter",
    "tgi_batch_inference_failure": "counter",
    "tgi_batch_inference_duration": "histogram",
    "tgi_batch_forward_duration": "histogram",
    "tgi_batch_decode_duration": "histogram",
    "tgi_batch_filter_duration": "histogram",
    "tgi_batch_concat": "counter",
    "tgi_batch_concat_duration": "histogram",
    "tgi_batch_max_total_tokens": "gauge",
}


def lines(metrics: Metrics, name: str) -> list[str]:
    return [line for line in metrics.exposition().splitlines() if re.match(rf"{name}(_bucket|_sum|_count)?[{{ ]", line)]


def test_everything_exists_at_zero_from_the_start_under_tgis_name_and_type() -> None:
    text = Metrics().exposition()
    for name, kind in TGIS.items():
        assert f"# TYPE {name} {kind}\n" in text
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert line.endswith(" 0"), line
    assert not re.search(r"_total\b|_created\b", text.replace("tgi_batch_total", ""))
    assert text.index("counter") < text.index("gauge") < text.index("histogram")


def test_labels_are_tgis() -> None:
    metrics = Metrics()
    metrics.request_failure.inc("overloaded")
    assert lines(metrics, "tgi_request_failure") == [
        f'tgi_request_failure{{err="{err}"}} {int(err == "overloaded")}' for err in FAILURES
    ]
    metrics.batch_inference_duration.observe(0.001, "decode")
    assert f'tgi_batch_inference_duration_count{{method="{METHODS[1]}"}} 1' in metrics.exposition()
    assert lines(metrics, "tgi_batch_concat") == [f'tgi_batch_concat{{reason="{one}"}} 0' for one in CONCAT_REASONS]
    assert 'tgi_batch_concat_duration_count{method="decode"} 0' in metrics.exposition()
    assert "# HELP tgi_request_failure" not in metrics.exposition()
    assert "# HELP tgi_batch_inference_failure" not in metrics.exposition()


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
