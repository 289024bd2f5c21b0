"""Spans: what OpenTelemetry is told of requests, calls of backends and compactions, and how it gets there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from compacting import LOW, TRIGGER, Talker, chain
from conftest import App, StartApp, running_app, settings_of
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from scripted import DEADLINE_S, Backend, Script, chunk, plain, refused, streamed
from test_background import RUN, created, ended, gated
from test_observing import DETAILED, HI, PARENT, STATE, STREAM, read

import spans
from services import opened
from settings import SettingsError

Json = dict[str, Any]
TRACED: Json = {"tracing": {"enabled": True}}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What was recorded, in the order of the ends."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(spans, "sent_in_batches", lambda: SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
async def traced(start_app: StartApp, recorded: InMemorySpanExporter) -> App:
    return await start_app(**TRACED)


async def of(recorded: InMemorySpanExporter, *names: str) -> list[ReadableSpan]:
    """The spans that have ended, which are these."""
    async with asyncio.timeout(DEADLINE_S):
        while len(found := recorded.get_finished_spans()) < len(names):  # noqa: ASYNC110 - ended by the proxy
            await asyncio.sleep(0.01)
    assert [span.name for span in found] == list(names)
    return list(found)


def noted(span: ReadableSpan) -> Json:
    return dict(span.attributes or {})


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


SERVER = "POST /v1/responses"


async def test_a_plain_turn_is_a_server_span_around_a_client_span(
    traced: App, backend: Backend, recorded: InMemorySpanExporter
) -> None:
    async with traced.post({**HI, "temperature": 0.5, "max_output_tokens": 20}) as answer:
        response = await answer.json()
        request_id = answer.headers["x-request-id"]
    call, server = await of(recorded, "chat m", SERVER)
    assert (call.kind.name, server.kind.name) == ("CLIENT", "SERVER")
    assert (parent_of(server), parent_of(call)) == (None, server.context.span_id)
    assert noted(server) == {
        "http.request.method": "POST",
        "http.route": "/v1/responses",
        "http.response.status_code": 200,
        "url.path": "/v1/responses",
        "url.scheme": "http",
        "gen_ai.response.id": response["id"],
        "responses_proxy.request.id": request_id,
    }
    assert noted(call) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "generic",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": "c1",
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "server.address": "127.0.0.1",
        "server.port": int(backend.url.split(":")[2].removesuffix("/v1")),
        "responses_proxy.upstream": "default",
    }
    assert (call.status.status_code.name, server.status.status_code.name) == ("UNSET", "UNSET")


async def test_the_backend_continues_the_client_span(
    traced: App, backend: Backend, recorded: InMemorySpanExporter
) -> None:
    await read(traced, HI, headers={"traceparent": PARENT, "tracestate": STATE})
    call, server = await of(recorded, "chat m", SERVER)
    assert (f"{call.context.trace_id:x}", f"{parent_of(server):x}") == (PARENT[4:35], PARENT[36:52])
    told = (await backend.received()).headers
    assert told["traceparent"] == f"00-{call.context.trace_id:032x}-{call.context.span_id:016x}-01"
    assert told["tracestate"] == STATE


async def test_a_span_of_a_stream_ends_with_it(traced: App, backend: Backend, recorded: InMemorySpanExporter) -> None:
    script, goes_on = gated()
    backend.script(script)
    async with traced.post(STREAM) as answer:
        await answer.content.readany()
        assert recorded.get_finished_spans() == ()
        goes_on.set()
        await answer.read()
    call, server = await of(recorded, "chat m", SERVER)
    found = noted(call)
    assert found.pop("gen_ai.response.time_to_first_chunk") > 0
    assert (found["gen_ai.request.stream"], found["gen_ai.response.finish_reasons"]) == (True, ("stop",))
    assert noted(server)["http.response.status_code"] == 200


async def test_all_kinds_of_tokens_are_told(traced: App, backend: Backend, recorded: InMemorySpanExporter) -> None:
    body = json.loads(next(iter(plain().steps)))
    backend.script(Script([json.dumps({**body, "usage": DETAILED}).encode()]))
    await read(traced, HI)
    call, _ = await of(recorded, "chat m", SERVER)
    found = {name.removeprefix("gen_ai.usage."): value for name, value in noted(call).items() if "usage" in name}
    assert (found["cache_read.input_tokens"], found["reasoning.output_tokens"]) == (4, 3)


FAILURES = {
    "refused_5xx": ([refused(500, "a secret")], HI, "502"),
    "refused_4xx": ([refused(400, "a secret")], HI, None),
    "broken": ([Script([chunk(content="Hel")], end="cut")], STREAM, None),
}


@pytest.mark.parametrize("kind", FAILURES)
async def test_a_failure_is_a_word_and_never_a_message(
    traced: App, backend: Backend, recorded: InMemorySpanExporter, kind: str
) -> None:
    scripts, body, of_server = FAILURES[kind]
    backend.script(*scripts)
    await read(traced, body)
    call, server = await of(recorded, "chat m", SERVER)
    assert (noted(call)["error.type"], call.status.status_code.name) == (kind, "ERROR")
    assert noted(server).get("error.type") == of_server
    assert "secret" not in "".join(span.to_json() for span in (call, server))


async def test_retries_are_one_span(start_app: StartApp, backend: Backend, recorded: InMemorySpanExporter) -> None:
    app = await start_app(upstream={"retries": 1, "retry_backoff_s": 0.0}, **TRACED)
    backend.script(refused(503, "Later."), plain())
    await read(app, HI)
    call, _ = await of(recorded, "chat m", SERVER)
    assert "error.type" not in noted(call)


async def test_a_call_that_nobody_waits_for_is_cancelled(
    traced: App, backend: Backend, recorded: InMemorySpanExporter
) -> None:
    script, _ = gated()
    backend.script(script)
    async with traced.post(STREAM) as answer:
        await answer.content.readany()
    call, _ = await of(recorded, "chat m", SERVER)
    assert noted(call)["error.type"] == "cancelled"


async def test_a_conversation_is_named(traced: App, recorded: InMemorySpanExporter) -> None:
    async with traced.post({}, "/v1/conversations") as answer:
        conversation = (await answer.json())["id"]
    await read(traced, {**HI, "conversation": conversation})
    _, call, server = await of(recorded, "POST /v1/conversations", "chat m", SERVER)
    assert {noted(span)["gen_ai.conversation.id"] for span in (call, server)} == {conversation}


async def test_a_path_that_is_no_route_is_no_name(traced: App, recorded: InMemorySpanExporter) -> None:
    async with traced.http.get(f"{traced.url}/no/such"):
        pass
    (server,) = await of(recorded, "HTTP")
    assert "http.route" not in noted(server)


async def test_a_path_that_goes_through_is_named_without_its_end(traced: App, recorded: InMemorySpanExporter) -> None:
    async with traced.http.get(f"{traced.url}/v1/files/mine"):
        pass
    (server,) = await of(recorded, "GET /v1/*")
    assert noted(server)["http.route"] == "/v1/*"


async def test_a_run_in_background_begins_a_trace(
    traced: App, backend: Backend, recorded: InMemorySpanExporter
) -> None:
    backend.script(streamed("Hi"))
    response = await created(traced, RUN, traceparent=PARENT)
    await ended(traced, response["id"])
    async with asyncio.timeout(DEADLINE_S):
        while not (runs := [s for s in recorded.get_finished_spans() if s.name == "background response"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (call,) = [span for span in recorded.get_finished_spans() if span.name == "chat m"]
    assert (parent_of(runs[0]), parent_of(call)) == (None, runs[0].context.span_id)
    assert noted(runs[0]) == {"gen_ai.response.id": response["id"], "responses_proxy.run.attempt": 1}
    assert f"{runs[0].context.trace_id:x}" != PARENT[4:35]


async def test_what_is_not_enabled_records_nothing(start_app: StartApp, recorded: InMemorySpanExporter) -> None:
    await read(await start_app(), HI)
    assert recorded.get_finished_spans() == ()


async def test_without_its_packages_it_cannot_be_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spans", None)
    settings = settings_of("http://127.0.0.1:9/v1", **TRACED)
    with pytest.raises(SettingsError, match=r"responses-proxy\[otel\]"):
        await contextlib.AsyncExitStack().enter_async_context(opened(settings))


# -- compaction --------------------------------------------------------------------------------------------------------


async def test_a_compaction_is_a_span_around_its_calls(start_app: StartApp, recorded: InMemorySpanExporter) -> None:
    async with Talker().running() as talker:
        app = await start_app(compaction=LOW, upstream={"base_url": talker.url}, **TRACED)
        first = await chain(app, 2)
        recorded.clear()
        await read(app, {"model": "m", "previous_response_id": first["id"], "input": [TRIGGER]})
        call, compaction, server = await of(recorded, "chat m", "compact", SERVER)
    assert (parent_of(call), parent_of(compaction)) == (compaction.context.span_id, server.context.span_id)
    found = noted(compaction)
    assert found["responses_proxy.compaction.cause"] == "trigger"
    assert found["responses_proxy.compaction.before_tokens"] > found["responses_proxy.compaction.after_tokens"]


# -- over HTTP ---------------------------------------------------------------------------------------------------------


class Collector:
    """An endpoint for OTLP over HTTP: what was sent to it."""

    def __init__(self) -> None:
        self.url = ""
        self.headers: list[Json] = []
        self.sent: list[Any] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Collector]:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        raw = await reader.readexactly(int(headers["content-length"]))
        self.headers.append({"path": first.split()[1], **headers})
        self.sent.append(ExportTraceServiceRequest.FromString(raw))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()


async def test_spans_are_sent_before_it_stops(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector().running() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=mine")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        async with running_app(settings_of(backend.url, **TRACED)) as app:
            await read(app, HI)
        (headers,) = collector.headers
        ((resource,),) = [each.resource_spans for each in collector.sent]
    assert (headers["path"], headers["x-key"]) == ("/v1/traces", "mine")
    told = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (told["service.name"], told["deployment.environment.name"]) == ("responses-proxy", "test")
    (scope,) = resource.scope_spans
    assert ([span.name for span in scope.spans], scope.scope.name) == (["chat m", SERVER], "responses_proxy")


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    found = spans._resource("1.2").attributes
    assert (found["service.name"], found["service.version"]) == ("mine", "1.2")
