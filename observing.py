"""What operators are told of requests, turns and calls of backends: counts, a line in the log, spans.

May not know the HTTP framework or the store, and tells nothing of what a prompt or an answer says. Names of spans and
their attributes: OpenTelemetry's conventions for HTTP (stable) and for generative AI (in development), read 2026-11-21.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Self

from chunks import usage_of
from dialects import GENERIC
from fields import REQUEST_FIELDS
from items import ITEMS
from metrics import Metrics
from tools import TOOL_CHOICES, TOOLS
from tracing import NO_TRACE, NOTHING, Attributes, Span, Trace, Tracing, trace_of
from upstream_errors import (
    CircuitOpen,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    WindowExceeded,
)

Json = dict[str, Any]
Scope = Mapping[str, Any]
log = logging.getLogger("responses_proxy.observing")
access_log = logging.getLogger("responses_proxy.access")

OTHER, CANCELLED = "other", "cancelled"
# Asked for so often that nobody wants to read it.
QUIET_ROUTES = frozenset({"GET /healthz", "GET /readyz", "GET /metrics"})
WITHOUT_PREFIX = ("/v1", "/healthz", "/readyz", "/metrics")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
STREAM_TYPE = b"text/event-stream"


# -- requests ----------------------------------------------------------------------------------------------------------


class Noted:
    """What is found out of a request on its way, for its line in the log and its spans."""

    owner = response_id = conversation_id = upstream = ""


# Of the request or the run that is being worked for.
NOTED: ContextVar[Noted | None] = ContextVar("NOTED", default=None)


class SeenRequest(Noted):
    """One HTTP request from its beginning to its end."""

    trace: Trace = NO_TRACE
    _status = 0
    _is_stream = False
    _span: Span | None = None

    def __init__(self, observer: Observer, scope: Scope) -> None:
        self._observer = observer  # and not the scope, which holds this
        self._began_at = observer.metrics.clock()
        if b"traceparent" in scope["header_values"]:
            self.trace = trace_of(scope["headers"])
        if observer.tracing is not None:
            self._span = observer.tracing.begin("HTTP", "server", self.trace, _asked(scope))
            self.trace = self._span.trace
        observer.metrics.in_flight += 1
        NOTED.set(self)

    def answered(self, status: int, headers: Iterable[tuple[bytes, bytes]], route: str) -> None:
        """The answer begins."""
        self._status = status
        metrics = self._observer.metrics
        for name, value in headers:
            if name == b"content-type":
                if value.startswith(STREAM_TYPE):
                    self._is_stream = True
                    metrics.streams_open += 1
                break
        metrics.answered(route, "stream" if self._is_stream else "plain", metrics.clock() - self._began_at)

    def ended(self, route: str) -> None:
        metrics = self._observer.metrics
        metrics.in_flight -= 1
        if self._is_stream:
            metrics.streams_open -= 1
        metrics.request(route, self._status)
        if self._observer.has_access_log:
            self._tell(route, metrics.clock() - self._began_at)
        if self._span is not None:
            self._end_span(self._span, route)

    def _tell(self, route: str, took_s: float) -> None:
        level = logging.DEBUG if route in QUIET_ROUTES else logging.INFO
        if not access_log.isEnabledFor(level):
            return
        method, _, path = route.partition(" ")
        known = {"owner": self.owner, "response_id": self.response_id, "upstream": self.upstream}
        fields = {"method": method, "path": path, "status": self._status, "duration_ms": round(took_s * 1000, 1)}
        fields |= {name: value for name, value in known.items() if value}
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        access_log.log(level, line, extra={"fields": fields})

    def _end_span(self, span: Span, route: str) -> None:
        _, _, path = route.partition(" ")
        noted = {"http.route": path or None, "http.response.status_code": self._status or None}
        known = {"gen_ai.response.id": self.response_id, "gen_ai.conversation.id": self.conversation_id}
        span.note({name: value for name, value in (noted | known).items() if value})
        span.rename(route if path else "HTTP")
        is_fault = self._status >= 500 or not self._status
        span.end(str(self._status or CANCELLED) if is_fault else None)


def _asked(scope: Scope) -> Attributes:
    return {
        "http.request.method": scope["method"] if scope["method"] in METHODS else "_OTHER",
        "url.scheme": scope.get("scheme", "http"),
        "url.path": scope["path"],
        "responses_proxy.request.id": scope["request_id"],
    }


def route_of(scope: Scope) -> str:
    """The method and the template of the path that was routed, never the path itself."""
    path: str | None = getattr(scope.get("route"), "path", None)
    if path is None or scope["method"] not in METHODS:
        return OTHER
    return f"{scope['method']} {path if path.startswith(WITHOUT_PREFIX) else '/v1' + path}"


# -- calls of backends -------------------------------------------------------------------------------------------------

# Failure -> its kind in metrics and spans; the first one that fits.
KINDS_OF: tuple[tuple[type[UpstreamError], str], ...] = (
    (WindowExceeded, "overflow"),
    (UpstreamBusy, "busy"),
    (CircuitOpen, "open_circuit"),
    (UpstreamUnreachable, "unreachable"),
    (UpstreamTimeout, "timeout"),
    (UpstreamGarbled, "garbled"),
    (UpstreamBroken, "broken"),
)
REFUSALS = {4: "refused_4xx", 5: "refused_5xx"}
# Dialect -> `gen_ai.provider.name`, where the conventions have another name for it.
PROVIDERS = {"gemini": "gcp.gemini", "mistral": "mistral_ai"}
# Field of a chat request -> the attribute for it.
REQUEST_ATTRIBUTES = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "stream": "gen_ai.request.stream",
}
# Kind of tokens -> the attribute for them.
USAGE_ATTRIBUTES = {
    "input": "gen_ai.usage.input_tokens",
    "cached": "gen_ai.usage.cache_read.input_tokens",
    "output": "gen_ai.usage.output_tokens",
    "reasoning": "gen_ai.usage.reasoning.output_tokens",
}
# What a backend says is cut to this length.
WORD_CHARACTERS = 200


def kind_of(error: UpstreamError) -> str:
    """Of the failure of a call: one of metrics.KINDS."""
    for cls, kind in KINDS_OF:
        if isinstance(error, cls):
            return kind
    if isinstance(error, UpstreamRefused) and error.http_status == 429:
        return "refused_429"
    return REFUSALS.get(error.http_status // 100, "refused_5xx")


def tokens_of(usage: Any) -> list[tuple[str, int]]:
    """What chat usage counts, by kind; nothing of what is not numbers."""
    try:
        told = usage_of(usage)
    except (AttributeError, TypeError):
        return []
    found = (
        ("input", told["input_tokens"]),
        ("cached", told["input_tokens_details"]["cached_tokens"]),
        ("output", told["output_tokens"]),
        ("reasoning", told["output_tokens_details"]["reasoning_tokens"]),
    )
    return [(kind, number) for kind, number in found if isinstance(number, int) and number > 0]


class Place:
    """A backend as it is observed: its name and address, and its counters."""

    def __init__(self, observer: Observer, name: str, address: str, port: int) -> None:
        self.observer = observer
        self.name = name
        # Of the backend, once it is known.
        self.dialect = GENERIC.name
        self.where = {"server.address": address, "server.port": port}
        self.meter = observer.metrics.upstream(name)

    def call(self, body: Json, passed: Trace) -> Call:
        """`passed`: headers for the backend; those of the trace are replaced when spans are recorded."""
        if (noted := NOTED.get()) is not None:
            noted.upstream = self.name
        if self.observer.tracing is None:
            return Call(self, passed, None)
        attributes = self.where | self._asked(body)
        if noted is not None and noted.conversation_id:
            attributes["gen_ai.conversation.id"] = noted.conversation_id
        span = self.observer.tracing.begin(f"chat {body.get('model', '')}".rstrip(), "client", passed, attributes)
        return Call(self, {**passed, **span.trace}, span)

    def untold(self, passed: Trace) -> Call:
        """A call of which no span tells, because it is not known what it asks."""
        if (noted := NOTED.get()) is not None:
            noted.upstream = self.name
        return Call(self, passed, None)

    def _asked(self, body: Json) -> dict[str, Any]:
        given = {attribute: body[name] for name, attribute in REQUEST_ATTRIBUTES.items() if body.get(name) is not None}
        return given | {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": PROVIDERS.get(self.dialect, self.dialect),
            "gen_ai.request.model": str(body.get("model", "")),
            "gen_ai.output.type": "json" if body.get("response_format") else "text",
            "responses_proxy.upstream": self.name,
        }


class Call:
    """One call of a backend, its retries among it. `with` it, and `stay_open` for what is read after that."""

    _usage: Any = None
    _reasons: tuple[str, ...] = ()
    _error: str | None = None
    _is_open = _is_heard = _is_over = False

    def __init__(self, place: Place, passed: Trace, span: Span | None) -> None:
        self.passed = passed
        self._meter = place.meter
        self._span = span
        if span is not None:
            self._clock = place.observer.metrics.clock
            self._began_at = self._clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UpstreamError):
            self.failed(error)
        elif error is not None:
            self._error = type(error).__name__ if isinstance(error, Exception) else CANCELLED
        if error is not None or not self._is_open:
            self.ended()

    def stay_open(self) -> Self:
        self._is_open = True
        return self

    def sent(self) -> None:
        """A request goes out; there may be several, and the last one counts."""
        self._error = None
        self._meter.sent()

    def retried(self) -> None:
        self._meter.retried()

    def failed(self, error: UpstreamError) -> None:
        """Each failure is told once, also one after which another request goes out."""
        self._error = kind_of(error)
        self._meter.failed(self._error)
        log.debug("%s", error.message)  # a backend's own words, which may quote the prompt

    def heard(self, chunks: Iterable[Json]) -> None:
        """What the backend says, be it a chunk or a whole completion; none of its text is looked at."""
        for chunk in chunks:
            if usage := chunk.get("usage"):
                self._usage = usage
            if self._span is not None:
                self._note(chunk, self._span)

    def _note(self, chunk: Json, span: Span) -> None:
        if not self._is_heard:
            self._is_heard = True
            told = {"gen_ai.response.id": chunk.get("id"), "gen_ai.response.model": chunk.get("model")}
            span.note({name: value[:WORD_CHARACTERS] for name, value in told.items() if isinstance(value, str)})
            if self._is_open:
                span.note({"gen_ai.response.time_to_first_chunk": self._clock() - self._began_at})
        for choice in chunk.get("choices") or ():
            if isinstance(choice, dict) and isinstance(reason := choice.get("finish_reason"), str):
                self._reasons += (reason[:WORD_CHARACTERS],)

    def ended(self, *, is_whole: bool = True) -> None:
        """`is_whole`: the backend said so itself."""
        if self._is_over:
            return
        self._is_over = True
        tokens = tokens_of(self._usage) if self._usage else []
        for kind, number in tokens:
            self._meter.counted(kind, number)
        if self._span is not None:
            told: dict[str, Any] = {USAGE_ATTRIBUTES[kind]: number for kind, number in tokens}
            self._span.note(told | ({"gen_ai.response.finish_reasons": self._reasons} if self._reasons else {}))
            is_cut = self._error is None and not is_whole and not self._reasons
            self._span.end(CANCELLED if is_cut else self._error)


# -- all of it ---------------------------------------------------------------------------------------------------------


class Step:
    """Part of the work for a request, as a span of its own where spans are recorded: `with` it."""

    def __init__(self, span: Span | None, of: Trace) -> None:
        self.trace = span.trace if span is not None else of
        self._span = span

    def note(self, attributes: Attributes) -> None:
        if self._span is not None:
            self._span.note(attributes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._span is not None:
            self._span.end(None if kind is None else kind.__name__ if issubclass(kind, Exception) else CANCELLED)


class Observer:
    """What everything is told to. Without `tracing` no span is recorded."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None, *, has_access_log: bool = False) -> None:
        self.metrics = metrics
        self.tracing = tracing
        self.has_access_log = has_access_log

    def request(self, scope: Scope) -> SeenRequest:
        return SeenRequest(self, scope)

    def step(self, name: str, of: Trace = NO_TRACE, attributes: Attributes = NOTHING) -> Step:
        return Step(self.tracing.begin(name, "internal", of, attributes) if self.tracing else None, of)

    def turned_away(self, upstream: str, error: UpstreamError) -> None:
        """A call of a backend was not made: it is busy, or left alone for a while."""
        self.metrics.upstream_failed(upstream, kind_of(error))

    def fell_back(self, upstream: str, to: str, error: UpstreamError) -> None:
        """A request goes on with another backend."""
        self.metrics.fell_back(upstream, to, kind_of(error))

    def ignored(self, names: Iterable[str]) -> None:
        for name in names:
            self.metrics.ignored(ignored_label(name))


# -- names of what was left out ----------------------------------------------------------------------------------------

INDEX = re.compile(r"\[\d+\]")
TYPES = frozenset({*ITEMS, *TOOLS, *TOOL_CHOICES})
# Paths that this program itself names, without indices. Whatever else is named, a client has thought of.
PATHS = frozenset(
    {"reasoning.mode", "reasoning.context", "reasoning.effort", "text.verbosity", "text.format", "include[]"}
    | {"Idempotency-Key", "input[].encrypted_content", "history[].encrypted_content", "input[].type", "history[].type"}
    | {"tool_choice.type", "tool_choice.tools[].type", "tools[].type", "tools[].tools[].type"}
    | {f"{root}[].tools[].type" for root in ("input", "history")}
    | {f"history.{kind}" for kind in ITEMS}
    | REQUEST_FIELDS.keys()
)


def ignored_label(name: str) -> str:
    """The name without indices and ids; `other` for one that a client has thought of."""
    path, _, value = INDEX.sub("[]", name).partition("=")
    if path not in PATHS:
        return OTHER
    return f"{path}={value}" if value in TYPES else path
