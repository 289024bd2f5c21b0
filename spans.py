"""Spans for OpenTelemetry, sent by OTLP over HTTP on a thread of their own. Imported only where tracing is enabled.

May not know what they are about. Set up by the environment (OTEL_*), as every program with OpenTelemetry is.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tracing import Attributes, Trace

KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
# Where the attributes are described.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"
HEADERS = TraceContextTextMapPropagator()


class RecordedSpan:
    """One span; `error` is the whole of what it says of a failure, because messages may quote a prompt."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.trace: Trace = _headers_of(span)

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def end(self, error: str | None = None) -> None:
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _headers_of(span: Span) -> Trace:
    carrier: dict[str, str] = {}
    HEADERS.inject(carrier, set_span_in_context(span))
    return carrier


class Spans:
    """What records spans of this process; nothing of it is global, so that a host program keeps its own."""

    def __init__(self, version: str, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=_resource(version), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("responses_proxy", version, schema_url=SCHEMA_URL)

    def begin(
        self, name: str, kind: Literal["server", "client", "internal"], of: Trace, attributes: Attributes
    ) -> RecordedSpan:
        span = self._tracer.start_span(name, HEADERS.extract(dict(of)), KINDS[kind], attributes)
        return RecordedSpan(span)

    async def close(self) -> None:
        """Sends what is left; an endpoint that does not answer holds it up for OTEL_EXPORTER_OTLP_TIMEOUT at most."""
        await asyncio.to_thread(self._provider.shutdown)


def _resource(version: str) -> Resource:
    """The environment names the service, where it does."""
    own = Resource({SERVICE_NAME: "responses-proxy", SERVICE_VERSION: version})
    told = Resource.create()
    is_named = not str(told.attributes[SERVICE_NAME]).startswith("unknown_service")
    return own.merge(told) if is_named else told.merge(own)


def sent_in_batches() -> SpanProcessor:
    """To OTEL_EXPORTER_OTLP_ENDPOINT."""
    return BatchSpanProcessor(OTLPSpanExporter())


def opened(version: str) -> Spans:
    return Spans(version, sent_in_batches())
