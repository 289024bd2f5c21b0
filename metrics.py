"""What is counted for operators, in the text form of Prometheus.

May not know where the numbers come from. Counters are of this process; gauges are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

# Upper ends of buckets.
TOKENS = (500, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000, 256_000, 1_000_000)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PREFIX = "responses_proxy"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each counter that says when this process began
        self._registry = CollectorRegistry()
        self.attempts = self._counter("run_attempts", "Attempts at background responses that this process began.")
        self.takeovers = self._counter("run_takeovers", "Those of the attempts that were not the first at a response.")
        self.cancels = self._counter("run_cancels", "Background responses that were cancelled before their end.")
        self._compactions = self._counter("compactions", "Windows that were compacted.", ["cause"])
        self.compaction_failures = self._counter("compaction_failures", "Compactions that failed.", ["cause"])
        self._before = self._histogram("compaction_tokens_before", "Tokens of windows before compaction.", TOKENS)
        self._after = self._histogram("compaction_tokens_after", "Tokens of windows after compaction.", TOKENS)
        self._seconds = self._histogram("compaction_seconds", "What compactions took.", SECONDS)
        self._queued = self._gauge("runs_queued", "Background responses that wait, in all processes of the store.")
        self._running = self._gauge("runs_running", "Background responses being made, in all processes of the store.")

    def compacted(self, cause: str, before_tokens: float, after_tokens: float, took_s: float) -> None:
        self._compactions.labels(cause).inc()
        self._before.observe(before_tokens)
        self._after.observe(after_tokens)
        self._seconds.observe(took_s)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, registry=self._registry)

    def text(self, queued: int, running: int) -> bytes:
        """All of them, with the two numbers of the queue."""
        self._queued.set(queued)
        self._running.set(running)
        return generate_latest(self._registry)
