"""Counts and spreads that every turn adds to: plain numbers, made families of Prometheus when they are asked for.

May not be told anything outside the event loop: there is no lock in it, which is what makes it cheap.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

Labels = tuple[str | int, ...]


class Count:
    """A counter: `count.of[labels] += 1`."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self.of: defaultdict[Labels, int] = defaultdict(int)
        self._told = (name, text, labels)

    def collect(self) -> Iterator[CounterMetricFamily]:
        name, text, names = self._told
        family = CounterMetricFamily(name, text, labels=names)
        for labels, number in self.of.items():
            family.add_metric([str(label) for label in labels], number)
        yield family


class Spread:
    """A histogram; `ends` are the upper ends of its buckets."""

    def __init__(self, name: str, text: str, labels: Sequence[str], ends: Sequence[float]) -> None:
        self._told = (name, text, labels)
        self._ends = ends
        self._sums: defaultdict[Labels, float] = defaultdict(float)
        self._buckets: defaultdict[Labels, list[int]] = defaultdict(self._empty)

    def _empty(self) -> list[int]:
        return [0] * (len(self._ends) + 1)

    def add(self, labels: Labels, value: float) -> None:
        self._buckets[labels][bisect_left(self._ends, value)] += 1
        self._sums[labels] += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        name, text, names = self._told
        family = HistogramMetricFamily(name, text, labels=names)
        for labels, buckets in self._buckets.items():
            family.add_metric([str(label) for label in labels], self._summed(buckets), self._sums[labels])
        yield family

    def _summed(self, buckets: list[int]) -> list[tuple[str, float]]:
        """Each bucket holds the ones below it, too."""
        ends = [*(str(float(end)) for end in self._ends), "+Inf"]
        return [(end, sum(buckets[: index + 1])) for index, end in enumerate(ends)]
