"""What is counted for operators, in the text form of Prometheus.

May not know where the numbers come from. Counters are of this process; gauges are read when they are asked for. No
label holds what a client wrote. Children are looked up once: every turn passes here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

# Upper ends of buckets.
TOKENS = (500, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000, 256_000, 1_000_000)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BRIEF_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
PREFIX = "responses_proxy"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Mode = Literal["plain", "streamed", "background", "websocket"]
MODES: tuple[Mode, ...] = ("plain", "streamed", "background", "websocket")
ENDS = ("completed", "incomplete", "failed", "cancelled")
# Why a backend's call failed: no connection, silence, an early end, no chat completion, a full window, a refusal.
KINDS = ("unreachable", "timeout", "broken", "garbled", "overflow", "refused_429", "refused_4xx", "refused_5xx")
TOKEN_KINDS = ("input", "cached", "output", "reasoning")

Child = TypeVar("Child", Counter, Histogram)


class Load(NamedTuple):
    """What is read when it is asked for; NaN: it cannot be read just now."""

    runs_queued: float = 0
    runs_running: float = 0
    store_waiting: float = 0
    store_bytes: float = 0


class _Children(dict[Any, Child], Generic[Child]):
    """The children of a family by their labels, each made at its first use."""

    def __init__(self, family: Child) -> None:
        super().__init__()
        self._family: Child = family

    def __missing__(self, labels: Any) -> Child:
        child: Child = self._family.labels(*(labels if isinstance(labels, tuple) else (labels,)))
        self[labels] = child
        return child


class UpstreamMeter:
    """The counters of one backend."""

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.requests = metrics.upstream_requests.labels(name)
        self.retries = metrics.upstream_retries.labels(name)
        self.errors = {kind: metrics.upstream_errors.labels(name, kind) for kind in KINDS}
        self.tokens = {kind: metrics.tokens.labels(name, kind) for kind in TOKEN_KINDS}


class TurnMeter:
    """One turn from its beginning to its one end; `with` it, or tell it how it `ended`."""

    def __init__(self, metrics: Metrics, mode: Mode) -> None:
        self.status = "failed"
        self._metrics = metrics
        self._mode = mode
        self._began_at = metrics.clock()
        self._is_told = self._is_over = False

    def told(self) -> None:
        """The model has said something."""
        if not self._is_told:
            self._is_told = True
            self._metrics.first_outputs[self._mode].observe(self._metrics.clock() - self._began_at)

    def ended(self, status: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._metrics.turns[self._mode, status].inc()
            self._metrics.turn_times[self._mode].observe(self._metrics.clock() - self._began_at)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What a save takes, also one that fails."""
        began_at = self._metrics.clock()
        try:
            yield
        finally:
            self._metrics.save_times.observe(self._metrics.clock() - began_at)

    def __enter__(self) -> None:
        """What is left with an exception has failed, or was cancelled; else `status` is how it ended."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.ended(self.status)
        else:
            self.ended("failed" if issubclass(kind, Exception) else "cancelled")


class Metrics:
    """The counters of one process. `clock` need not tell the time of day."""

    def __init__(self, version: str = "", clock: Callable[[], float] = time.perf_counter) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each counter that says when this process began
        self.clock = clock
        self._registry = CollectorRegistry()
        self.attempts = self._counter("run_attempts", "Attempts at background responses that this process began.")
        self.takeovers = self._counter("run_takeovers", "Those of the attempts that were not the first at a response.")
        self.cancels = self._counter("run_cancels", "Background responses that were cancelled before their end.")
        self._compactions = self._counter("compactions", "Windows that were compacted.", ["cause"])
        self.compaction_failures = self._counter("compaction_failures", "Compactions that failed.", ["cause"])
        self._before = self._histogram("compaction_tokens_before", "Tokens of windows before compaction.", TOKENS)
        self._after = self._histogram("compaction_tokens_after", "Tokens of windows after compaction.", TOKENS)
        self._seconds = self._histogram("compaction_seconds", "What compactions took.", SECONDS)
        self._open_requests()
        self._open_turns()
        self._open_upstreams()
        self.save_times = self._histogram("store_save_seconds", "What saving a response took.", BRIEF_SECONDS)
        self._load = (
            self._gauge("runs_queued", "Background responses that wait, in all processes of the store."),
            self._gauge("runs_running", "Background responses being made, in all processes of the store."),
            self._gauge("store_writes_waiting", "Writes that wait for the store in this process."),
            self._gauge("store_bytes", "Size of the database file, without its journal."),
        )
        self._gauge("build_info", "Always 1; the label says which version runs.", ["version"]).labels(version).set(1)

    def _open_requests(self) -> None:
        self.in_flight = self.streams_open = self.websockets_open = 0
        self._requests = _Children(self._counter("requests", "Requests that were answered.", ["route", "status"]))
        text = "Until an answer began: of a plain one all of it, of a stream its first event."
        self._answer_times = _Children(self._histogram("answer_seconds", text, SECONDS, ["route", "kind"]))
        self._ignored = _Children(self._counter("ignored", "What was left out of requests, by name.", ["name"]))
        self._open_gauges = {
            "in_flight": self._gauge("requests_in_flight", "Requests that are being answered."),
            "streams_open": self._gauge("streams_open", "Those of them that are streams."),
            "websockets_open": self._gauge("websockets_open", "Open WebSocket connections."),
        }

    def _open_turns(self) -> None:
        self.turns = _Children(self._counter("turns", "Turns that ended.", ["mode", "status"]))
        self.turn_times = _Children(self._histogram("turn_seconds", "What turns took.", SECONDS, ["mode"]))
        text = "Until the model's first output in a turn that is streamed."
        self.first_outputs = _Children(self._histogram("first_output_seconds", text, SECONDS, ["mode"]))
        for labels in product(MODES, ENDS):
            self.turns[labels].inc(0)

    def _open_upstreams(self) -> None:
        by_name = ["upstream"]
        self.upstream_requests = self._counter("upstream_requests", "Requests sent to backends, retries too.", by_name)
        self.upstream_retries = self._counter("upstream_retries", "Those of them that were retries.", by_name)
        self.upstream_errors = self._counter("upstream_errors", "What went wrong with them.", ["upstream", "kind"])
        self.tokens = self._counter("tokens", "Tokens as backends counted them.", ["upstream", "kind"])

    # -- what is told --------------------------------------------------------------------------------------------------

    def compacted(self, cause: str, before_tokens: float, after_tokens: float, took_s: float) -> None:
        self._compactions.labels(cause).inc()
        self._before.observe(before_tokens)
        self._after.observe(after_tokens)
        self._seconds.observe(took_s)

    def answered(self, route: str, kind: Literal["plain", "stream"], took_s: float) -> None:
        """The first of an answer has left."""
        self._answer_times[route, kind].observe(took_s)

    def request(self, route: str, status: int) -> None:
        """`route`: a template. `status` 0: nothing was answered."""
        self._requests[route, status].inc()

    def ignored(self, name: str) -> None:
        """`name`: one of ours."""
        self._ignored[name].inc()

    def turn(self, mode: Mode) -> TurnMeter:
        return TurnMeter(self, mode)

    def upstream(self, name: str) -> UpstreamMeter:
        """All of its series begin at zero."""
        return UpstreamMeter(name, self)

    def text(self, load: Load) -> bytes:
        """All of them."""
        for gauge, value in zip(self._load, load, strict=True):
            gauge.set(value)
        for name, gauge in self._open_gauges.items():
            gauge.set(getattr(self, name))
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self._registry)
