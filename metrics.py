"""What is counted for operators, in the text form of Prometheus.

May not know where the numbers come from. Counters are of this process; gauges are read when they are asked for. No
label holds what a client wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from tallies import Count, Spread

# Upper ends of buckets.
TOKENS = (500, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000, 256_000, 1_000_000)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BRIEF_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
PREFIX = "responses_proxy"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Mode = Literal["plain", "streamed", "background", "websocket"]
MODES: tuple[Mode, ...] = ("plain", "streamed", "background", "websocket")
ENDS = ("completed", "incomplete", "failed", "cancelled")
# Why a backend's call failed: no connection, silence, an early end, no chat completion, a full window; it was not made,
# because the line was full or the circuit open; a refusal.
ANSWERS_OF_ITS_OWN = ("refused_429", "refused_4xx", "refused_5xx")
KINDS = ("unreachable", "timeout", "broken", "garbled", "overflow", "busy", "open_circuit", *ANSWERS_OF_ITS_OWN)
TOKEN_KINDS = ("input", "cached", "output", "reasoning")


class Load(NamedTuple):
    """What is read when it is asked for; NaN: it cannot be read just now."""

    runs_queued: float = 0
    runs_running: float = 0
    store_waiting: float = 0
    store_bytes: float = 0


class UpstreamMeter:
    """The counters of one backend, all of which begin at zero."""

    def __init__(self, name: str, metrics: Metrics) -> None:
        self._requests, self._retries = metrics.upstream_requests.of, metrics.upstream_retries.of
        self._errors, self._tokens = metrics.upstream_errors.of, metrics.tokens.of
        self._own = (name,)
        self._by_kind = {kind: (name, kind) for kind in (*KINDS, *TOKEN_KINDS)}
        self._requests[self._own] = self._retries[self._own] = 0
        self._errors |= dict.fromkeys(((name, kind) for kind in KINDS), 0)
        self._tokens |= dict.fromkeys(((name, kind) for kind in TOKEN_KINDS), 0)

    def sent(self) -> None:
        self._requests[self._own] += 1

    def retried(self) -> None:
        self._retries[self._own] += 1

    def failed(self, kind: str) -> None:
        self._errors[self._by_kind[kind]] += 1

    def counted(self, kind: str, tokens: int) -> None:
        self._tokens[self._by_kind[kind]] += tokens


class TurnMeter:
    """One turn from its beginning to its one end; `with` it, or tell it how it `ended`."""

    status = "failed"
    _is_told = _is_over = False

    def __init__(self, metrics: Metrics, mode: Mode) -> None:
        self.clock = metrics.clock
        self._metrics = metrics
        self._labels = (mode,)
        self._began_at = metrics.clock()

    def told(self) -> None:
        """The model has said something."""
        if not self._is_told:
            self._is_told = True
            self._metrics.first_outputs.add(self._labels, self.clock() - self._began_at)

    def ended(self, status: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._metrics.turns.of[*self._labels, status] += 1
            self._metrics.turn_times.add(self._labels, self.clock() - self._began_at)

    def saved(self, began_at: float) -> None:
        """The response is in the store; `began_at`: by the clock of the metrics."""
        self._metrics.save_times.add((), self.clock() - began_at)

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
        self.save_times = self._spread("store_save_seconds", "What saving a response took.", [], BRIEF_SECONDS)
        self._load = (
            self._gauge("runs_queued", "Background responses that wait, in all processes of the store."),
            self._gauge("runs_running", "Background responses being made, in all processes of the store."),
            self._gauge("store_writes_waiting", "Writes that wait for the store in this process."),
            self._gauge("store_bytes", "Size of the database file, without its journal."),
        )
        self._gauge("build_info", "Always 1; the label says which version runs.", ["version"]).labels(version).set(1)

    def _open_requests(self) -> None:
        self.in_flight = self.streams_open = self.websockets_open = 0
        self._requests = self._count("requests", "Requests that have ended.", ["route", "status"])
        text = "Until an answer began: of a plain one all of it, of a stream its first event."
        self._answer_times = self._spread("answer_seconds", text, ["route", "kind"])
        self._ignored = self._count("ignored", "What was left out of requests, by name.", ["name"])
        self._open_gauges = {
            "in_flight": self._gauge("requests_in_flight", "Requests that are being answered."),
            "streams_open": self._gauge("streams_open", "Those of them that are streams."),
            "websockets_open": self._gauge("websockets_open", "Open WebSocket connections."),
        }

    def _open_turns(self) -> None:
        self.turns = self._count("turns", "Turns that have ended.", ["mode", "status"])
        self.turn_times = self._spread("turn_seconds", "What turns took.", ["mode"])
        text = "Until the model's first output in a turn that is streamed."
        self.first_outputs = self._spread("first_output_seconds", text, ["mode"])
        self.turns.of |= dict.fromkeys(product(MODES, ENDS), 0)

    def _open_upstreams(self) -> None:
        by_name = ["upstream"]
        self.upstream_requests = self._count("upstream_requests", "Requests sent to backends, retries too.", by_name)
        self.upstream_retries = self._count("upstream_retries", "Those of them that were retries.", by_name)
        self._fallbacks = self._count(
            "upstream_fallbacks", "Requests that went on with another backend.", ["upstream", "to", "kind"]
        )
        self.upstream_errors = self._count("upstream_errors", "What went wrong with them.", ["upstream", "kind"])
        self.tokens = self._count("tokens", "Tokens as backends counted them.", ["upstream", "kind"])

    # -- what is told --------------------------------------------------------------------------------------------------

    def compacted(self, cause: str, before_tokens: float, after_tokens: float, took_s: float) -> None:
        self._compactions.labels(cause).inc()
        self._before.observe(before_tokens)
        self._after.observe(after_tokens)
        self._seconds.observe(took_s)

    def answered(self, route: str, kind: Literal["plain", "stream"], took_s: float) -> None:
        """The first of an answer has left."""
        self._answer_times.add((route, kind), took_s)

    def request(self, route: str, status: int) -> None:
        """`route`: a template. `status` 0: nothing was answered."""
        self._requests.of[route, status] += 1

    def ignored(self, name: str) -> None:
        """`name`: one of ours."""
        self._ignored.of[name,] += 1

    def upstream_failed(self, name: str, kind: str) -> None:
        """`kind`: one of KINDS."""
        self.upstream_errors.of[name, kind] += 1

    def fell_back(self, name: str, to: str, kind: str) -> None:
        self._fallbacks.of[name, to, kind] += 1

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

    def _count(self, name: str, text: str, labels: Sequence[str]) -> Count:
        count = Count(f"{PREFIX}_{name}", text, labels)
        self._registry.register(count)
        return count

    def _spread(self, name: str, text: str, labels: Sequence[str], ends: Sequence[float] = SECONDS) -> Spread:
        spread = Spread(f"{PREFIX}_{name}", text, labels, ends)
        self._registry.register(spread)
        return spread

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self._registry)
