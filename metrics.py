"""What is counted for operators, in the text form of Prometheus.

May not know where the numbers come from. Counters are of this process; gauges are read when they are asked for.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

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
        self._queued = self._gauge("runs_queued", "Background responses that wait, in all processes of the store.")
        self._running = self._gauge("runs_running", "Background responses being made, in all processes of the store.")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, registry=self._registry)

    def text(self, queued: int, running: int) -> bytes:
        """All of them, with the two numbers of the queue."""
        self._queued.set(queued)
        self._running.set(running)
        return generate_latest(self._registry)
