"""Kinds of metrics and their text exposition (Prometheus 0.0.4), as TGI's exporter writes them.

Written here because TGI's counters have no `_total` suffix and integral numbers have no `.0`, which the usual client
library does not allow. Recording takes well under a microsecond: it happens per token. What metrics there are stands in
metrics.py, the only importer beside metrics_page.py.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


def format_number(value: float) -> str:
    """`value` as Rust's `Display` prints it: no exponent, no `.0`."""
    if value != value or value in (float("inf"), float("-inf")):
        return {float("inf"): "+Inf", float("-inf"): "-Inf"}.get(value, "NaN")
    if value == int(value):
        return str(int(value))
    text = repr(value)
    if "e" not in text:
        return text
    mantissa, _, exponent = text.partition("e")  # only small magnitudes get here: integral ones are gone
    digits = mantissa.replace(".", "").lstrip("-")
    return ("-" if value < 0 else "") + "0." + "0" * (-int(exponent) - 1) + digits


class Metric(Protocol):
    """help: the exposition's, None where TGI has none. meaning: what the reference page adds to it."""

    name: str
    help: str | None
    meaning: str
    kind: str
    label: str | None
    values: tuple[str, ...]  # of the label

    def samples(self) -> Iterable[str]:
        """Sample lines without line ends."""


class _Labelled:
    """Names and the one label a metric may have."""

    def __init__(
        self, name: str, help: str | None, meaning: str, label: str | None = None, values: Sequence[str] = ("",)
    ) -> None:
        self.name = name
        self.help = help
        self.meaning = meaning
        self.label = label
        self.values = tuple(values)

    def _braces(self, value: str, extra: str = "") -> str:
        own = f'{self.label}="{value}"' if self.label else ""
        inner = ",".join(part for part in (own, extra) if part)
        return "{" + inner + "}" if inner else ""


class Counter(_Labelled):
    """Only grows."""

    kind = "counter"

    def __init__(
        self, name: str, help: str | None, meaning: str, label: str | None = None, values: Sequence[str] = ("",)
    ) -> None:
        super().__init__(name, help, meaning, label, values)
        self._counts = dict.fromkeys(self.values, 0.0)

    def inc(self, value: str = "", amount: float = 1.0) -> None:
        """Adds `amount` to the series whose label has `value` ("" when the metric has no label)."""
        self._counts[value] += amount

    def get(self, value: str = "") -> float:
        return self._counts[value]

    def samples(self) -> Iterable[str]:
        for value, count in self._counts.items():
            yield f"{self.name}{self._braces(value)} {format_number(count)}"


class Gauge(_Labelled):
    """Goes up and down."""

    kind = "gauge"

    def __init__(self, name: str, help: str | None, meaning: str) -> None:
        super().__init__(name, help, meaning)
        self._current = 0.0

    def set(self, value: float) -> None:
        self._current = value

    def get(self) -> float:
        return self._current

    def samples(self) -> Iterable[str]:
        yield f"{self.name} {format_number(self._current)}"


class Histogram(_Labelled):
    """Cumulative buckets, sum and count, per label value."""

    kind = "histogram"

    def __init__(
        self,
        name: str,
        help: str | None,
        meaning: str,
        buckets: Sequence[float],
        label: str | None = None,
        values: Sequence[str] = ("",),
    ) -> None:
        super().__init__(name, help, meaning, label, values)
        self.set_buckets(buckets)

    def set_buckets(self, buckets: Sequence[float]) -> None:
        """Replaces the bounds and forgets what was observed; before the first request only."""
        self.bounds = tuple(buckets)
        self._buckets = {value: [0] * (len(self.bounds) + 1) for value in self.values}
        self._sums = dict.fromkeys(self.values, 0.0)

    def observe(self, amount: float, value: str = "") -> None:
        self._buckets[value][bisect_left(self.bounds, amount)] += 1
        self._sums[value] += amount

    def count(self, value: str = "") -> int:
        return sum(self._buckets[value])

    def samples(self) -> Iterable[str]:
        for value in self.values:
            total = 0
            for bound, count in zip((*self.bounds, float("inf")), self._buckets[value], strict=True):
                total += count
                le = self._braces(value, f'le="{format_number(bound)}"')
                yield f"{self.name}_bucket{le} {total}"
            yield f"{self.name}_sum{self._braces(value)} {format_number(self._sums[value])}"
            yield f"{self.name}_count{self._braces(value)} {total}"


class Summary(_Labelled):
    """Quantiles over the last observations, sum and count over all."""

    kind = "summary"

    def __init__(self, name: str, help: str | None, meaning: str) -> None:
        super().__init__(name, help, meaning)
        self._recent: deque[float] = deque(maxlen=1024)
        self._sum = 0.0
        self._count = 0

    def observe(self, *amounts: float) -> None:
        self._recent.extend(amounts)
        self._sum += sum(amounts)
        self._count += len(amounts)

    def count(self) -> int:
        return self._count

    def samples(self) -> Iterable[str]:
        ordered = sorted(self._recent)
        for quantile in QUANTILES:
            value = ordered[round(quantile * (len(ordered) - 1))] if ordered else 0.0
            yield f'{self.name}{{quantile="{format_number(quantile)}"}} {format_number(value)}'
        yield f"{self.name}_sum {format_number(self._sum)}"
        yield f"{self.name}_count {self._count}"
