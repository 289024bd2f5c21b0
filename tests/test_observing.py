"""What moves each number of /metrics in the running proxy, and the trace that goes on to the backend."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import App, StartApp
from scripted import Backend, Script, chunk, plain, refused, sse, streamed
from test_background import RUN, cancelled, created, ended, gated
from test_metrics import reached, values, values_in

from errors import StoreError
from fields import REQUEST_FIELDS
from metrics import KINDS, Load, Metrics
from observing import OTHER, Observer, Place, ignored_label, kind_of, tokens_of
from services import Services
from tallies import Count, Spread
from tracing import NO_TRACE, trace_of
from upstream_errors import UpstreamError, UpstreamGarbled

Json = dict[str, Any]
HI: Json = {"model": "m", "input": "Hi"}
STREAM: Json = {**HI, "stream": True}
TURNS = "POST /v1/responses"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
DETAILED = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


async def read(app: App, body: Json, path: str = "/v1/responses", **options: Any) -> int:
    async with app.post(body, path, **options) as answer:
        await answer.read()
        return int(answer.status)


def moved(found: dict[str, float], name: str) -> dict[str, float]:
    """The series of a family that have counted something."""
    return {key.removeprefix(name): value for key, value in found.items() if key.startswith(name) and value}


# -- requests and turns ------------------------------------------------------------------------------------------------


async def test_a_plain_turn_is_counted_everywhere_it_passes(app: App) -> None:
    assert await read(app, HI) == 200
    found = await values(app)
    assert moved(found, "requests_total") == {f"[{TURNS}][200]": 1}
    assert moved(found, "turns_total") == {"[plain][completed]": 1}
    assert moved(found, "upstream_requests_total") == {"[default]": 1}
    assert moved(found, "tokens_total") == {"[input][default]": 11, "[output][default]": 7}
    assert moved(found, "upstream_errors_total") == {}
    names = (f"answer_seconds_count[plain][{TURNS}]", "turn_seconds_count[plain]", "store_save_seconds_count")
    assert [found[name] for name in names] == [1, 1, 1]
    assert found["store_bytes"] > 0


async def test_the_metrics_see_their_own_request(app: App) -> None:
    assert (await values(app))["requests_in_flight"] == 1
    await reached(app, **{"requests_total[GET /metrics][200]": 1})


async def test_a_stream_is_open_until_its_end(app: App, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    async with app.post(STREAM) as answer:
        await reached(app, streams_open=1, requests_in_flight=2)
        assert (await values(app))[f"answer_seconds_count[stream][{TURNS}]"] == 1
        assert "turn_seconds_count[streamed]" not in await values(app)
        goes_on.set()
        await answer.read()
    await reached(app, streams_open=0, requests_in_flight=1)
    found = await values(app)
    assert [found[f"{name}_count[streamed]"] for name in ("first_output_seconds", "turn_seconds")] == [1, 1]
    assert moved(found, "tokens_total") == {"[input][default]": 11, "[output][default]": 7}


async def test_a_background_turn_has_its_own_mode(app: App, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    await ended(app, (await created(app, RUN))["id"])
    await reached(app, **{"turns_total[background][completed]": 1})
    assert (await values(app))["store_save_seconds_count"] == 1


ENDS = {
    "incomplete": ([plain("Hi", "length")], HI, {"[plain][incomplete]": 1}),
    "a plain turn that is refused": ([refused(400, "No.")], HI, {"[plain][failed]": 1}),
    "a stream that is refused at once": ([refused(400, "No.")], STREAM, {"[streamed][failed]": 1}),
    "a stream that breaks": ([Script([chunk(content="Hel")], end="cut")], STREAM, {"[streamed][failed]": 1}),
    "a stream without an end": ([Script([chunk(content="Hel")])], STREAM, {"[streamed][failed]": 1}),
}


@pytest.mark.parametrize(("scripts", "body", "expected"), ENDS.values(), ids=ENDS)
async def test_a_turn_is_counted_by_how_it_ended(
    app: App, backend: Backend, scripts: list[Script], body: Json, expected: Json
) -> None:
    backend.script(*scripts)
    await read(app, body)
    assert moved(await values(app), "turns_total") == expected


async def test_a_turn_whose_client_left_is_cancelled(app: App, backend: Backend) -> None:
    script, _ = gated()
    backend.script(script)
    async with app.post(STREAM) as answer:
        await answer.content.readany()
    await reached(app, **{"turns_total[streamed][cancelled]": 1, "streams_open": 0})


async def test_a_run_that_is_cancelled_is_a_cancelled_turn(app: App, backend: Backend) -> None:
    script, _ = gated()
    backend.script(script)
    response = await created(app, RUN)
    await backend.received()
    await cancelled(app, response["id"])
    await reached(app, **{"turns_total[background][cancelled]": 1})


async def test_routes_are_told_as_templates(app: App) -> None:
    async with app.post(HI) as answer:
        response_id = (await answer.json())["id"]
    calls = [("GET", f"/v1/responses/{response_id}"), ("GET", f"/responses/{response_id}"), ("GET", "/v1/no/such")]
    for method, path in [*calls, ("PUT", f"/v1/responses/{response_id}"), ("PURGE", f"/v1/responses/{response_id}")]:
        async with app.http.request(method, app.url + path):
            pass
    assert await read(app, HI, "/responses") == 200
    found = moved(await values(app), "requests_total")
    assert found == {
        f"[{TURNS}][200]": 2,
        "[GET /v1/responses/{id}][200]": 2,
        "[PUT /v1/responses/{id}][405]": 1,
        "[GET /v1/*][404]": 1,
        f"[{OTHER}][405]": 1,
    }


async def test_metrics_are_told_when_the_store_cannot_be_read() -> None:
    async def broken() -> Any:
        raise StoreError("The store of responses is damaged.")

    store = SimpleNamespace(queue=broken, size_bytes=broken, waiting=2)
    services: Any = SimpleNamespace(background=SimpleNamespace(store=store))
    load = await Services.load(services)
    assert (load.store_waiting, math.isnan(load.runs_queued)) == (2, True)
    assert math.isnan(values_in(Metrics().text(load).decode())["runs_running"])


# -- backends ----------------------------------------------------------------------------------------------------------


FAILURES = {
    "overflow": refused(400, "This model's maximum context length is 1024 tokens.", code="context_length_exceeded"),
    "refused_429": refused(429, "Later."),
    "refused_4xx": refused(404, "No such model."),
    "refused_5xx": refused(500, "Oh."),
    "garbled": Script([b"no JSON"]),
    "broken": Script([b'{"id"'], end="cut"),
    "timeout": Script(end="silent"),
}


@pytest.mark.parametrize("kind", FAILURES)
async def test_a_failure_of_a_backend_is_counted_once_by_its_kind(
    start_app: StartApp, backend: Backend, kind: str
) -> None:
    app = await start_app(upstream={"total_timeout_s": 0.3}, compaction={"on_overflow": False})
    backend.script(FAILURES[kind])
    assert await read(app, HI) >= 400
    assert moved(await values(app), "upstream_errors_total") == {f"[{kind}][default]": 1}


STREAM_FAILURES = {
    "broken": Script([chunk(content="Hel")], end="cut"),
    "broken without an end": Script([chunk(content="Hel")]),
    "garbled": Script([chunk(content="Hel"), b"data: no JSON\n\n"]),
    "refused_5xx": Script([chunk(content="Hel"), sse({"error": {"message": "Oh.", "code": 500}})]),
    "timeout": Script([chunk(content="Hel")], end="silent"),
}


@pytest.mark.parametrize("kind", STREAM_FAILURES)
async def test_a_failure_in_a_stream_is_counted_once_by_its_kind(
    start_app: StartApp, backend: Backend, kind: str
) -> None:
    app = await start_app(upstream={"idle_timeout_s": 0.2})
    backend.script(STREAM_FAILURES[kind])
    await read(app, STREAM)
    found = await values(app)
    assert moved(found, "upstream_errors_total") == {f"[{kind.partition(' ')[0]}][default]": 1}
    assert moved(found, "upstream_requests_total") == {"[default]": 1}


async def test_a_backend_that_is_not_there_is_unreachable(start_app: StartApp) -> None:
    app = await start_app(upstream={"base_url": "http://127.0.0.1:9/v1"})
    assert await read(app, HI) == 502
    assert moved(await values(app), "upstream_errors_total") == {"[unreachable][default]": 1}


async def test_each_retry_is_a_request_and_each_failure_before_it_an_error(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(upstream={"retries": 2, "retry_backoff_s": 0.0})
    backend.script(refused(503, "Later."), refused(429, "Later."), plain())
    assert await read(app, HI) == 200
    found = await values(app)
    assert moved(found, "upstream_requests_total") == {"[default]": 3}
    assert moved(found, "upstream_retries_total") == {"[default]": 2}
    assert moved(found, "upstream_errors_total") == {"[refused_5xx][default]": 1, "[refused_429][default]": 1}


def test_every_series_of_a_backend_begins_at_zero() -> None:
    metrics = Metrics()
    metrics.upstream("one")
    found = values_in(metrics.text(Load()).decode())
    assert {key: value for key, value in found.items() if key.startswith("upstream_errors")} == {
        f"upstream_errors_total[{kind}][one]": 0 for kind in KINDS
    }


def leaves(cls: type[UpstreamError]) -> list[type[UpstreamError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in leaves(child))]


@pytest.mark.parametrize("cls", leaves(UpstreamError))
def test_every_failure_has_a_kind(cls: type[UpstreamError]) -> None:
    error = cls.__new__(cls)
    error.http_status = cls.status
    assert kind_of(error) in KINDS


def test_tokens_are_told_by_kind() -> None:
    assert dict(tokens_of(DETAILED)) == {"input": 11, "cached": 4, "output": 7, "reasoning": 3}


@pytest.mark.parametrize("usage", ["many", [1], {"prompt_tokens": "many"}, {"prompt_tokens_details": [1]}, {}])
def test_a_usage_that_is_none_counts_nothing(usage: Any) -> None:
    assert tokens_of(usage) == []


# -- what was left out -------------------------------------------------------------------------------------------------


LABELS = {
    "moderation": "moderation",
    "tools[0].type=web_search": "tools[].type=web_search",
    "input[12].type=web_search_call": "input[].type=web_search_call",
    "history.function_call=call_1": "history.function_call",
    "history[3].encrypted_content": "history[].encrypted_content",
    "tool_choice.type=web_search": "tool_choice.type=web_search",
    "input[1].tools[2].type=web_search": "input[].tools[].type=web_search",
    "Idempotency-Key": "Idempotency-Key",
    "seed": OTHER,
    "input.input": OTHER,
    "reasoning.mine": OTHER,
    "context_management[0].mine": OTHER,
    "tools[0].type=mine": "tools[].type",
}


@pytest.mark.parametrize(("name", "label"), LABELS.items())
def test_a_name_that_is_not_ours_is_no_label(name: str, label: str) -> None:
    assert ignored_label(name) == label


@pytest.mark.parametrize("name", [name for name, row in REQUEST_FIELDS.items() if row.fate == "left out"])
def test_a_parameter_that_is_left_out_is_a_label(name: str) -> None:
    assert ignored_label(name) == name


async def test_what_is_left_out_is_counted(app: App) -> None:
    body = {**HI, "tools": [{"type": "web_search"}], "seed": 1, "mine": 2, "moderation": {}}
    assert await read(app, body) == 200
    found = moved(await values(app), "ignored_total")
    assert found == {"[tools[].type=web_search]": 1, f"[{OTHER}]": 2, "[moderation]": 1}


# -- the numbers themselves --------------------------------------------------------------------------------------------


def test_a_value_stands_in_its_bucket_and_in_all_above_it() -> None:
    spread = Spread("name", "text", ["mode"], (1, 5))
    for value in (0.5, 1, 3, 9):
        spread.add(("plain",), value)
    (family,) = spread.collect()
    found = {(sample.name, sample.labels.get("le")): sample.value for sample in family.samples}
    assert found == {
        ("name_bucket", "1.0"): 2,
        ("name_bucket", "5.0"): 3,
        ("name_bucket", "+Inf"): 4,
        ("name_count", None): 4,
        ("name_sum", None): 13.5,
    }


def test_a_count_is_told_by_its_labels() -> None:
    count = Count("name", "text", ["route", "status"])
    count.of["GET /", 200] += 2
    (family,) = count.collect()
    assert [(sample.name, sample.labels, sample.value) for sample in family.samples] == [
        ("name_total", {"route": "GET /", "status": "200"}, 2)
    ]


def test_a_turn_ends_once() -> None:
    metrics = Metrics()
    meter = metrics.turn("plain")
    meter.ended("completed")
    meter.ended("failed")
    assert {labels: number for labels, number in metrics.turns.of.items() if number} == {("plain", "completed"): 1}


# -- the trace ---------------------------------------------------------------------------------------------------------


def headers(*given: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in given]


STATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
VALID = {
    "a parent": ([("traceparent", PARENT)], {"traceparent": PARENT}),
    "with a state": (
        [("traceparent", PARENT), ("tracestate", STATE)],
        {"traceparent": PARENT, "tracestate": STATE},
    ),
    "with two states": (
        [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b@c=2 3")],
        {"traceparent": PARENT, "tracestate": "a=1,b@c=2 3"},
    ),
    "a later version": ([("traceparent", f"01{PARENT[2:]}-more")], {"traceparent": f"01{PARENT[2:]}-more"}),
    "a bad state": ([("traceparent", PARENT), ("tracestate", "no state")], {"traceparent": PARENT}),
    "a state with a key twice": ([("traceparent", PARENT), ("tracestate", "a=1,a=2")], {"traceparent": PARENT}),
    "a long state": ([("traceparent", PARENT), ("tracestate", f"a={'b' * 511}")], {"traceparent": PARENT}),
    "many states": (
        [("traceparent", PARENT), ("tracestate", ",".join(f"a{n}=1" for n in range(33)))],
        {"traceparent": PARENT},
    ),
}


@pytest.mark.parametrize(("given", "expected"), VALID.values(), ids=VALID)
def test_a_valid_trace_goes_on(given: list[tuple[str, str]], expected: Json) -> None:
    assert trace_of(headers(*given)) == expected


INVALID = {
    "none": [],
    "a state alone": [("tracestate", STATE)],
    "two parents": [("traceparent", PARENT), ("traceparent", PARENT)],
    "capitals": [("traceparent", PARENT.upper())],
    "no trace id": [("traceparent", PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32))],
    "no parent id": [("traceparent", PARENT.replace("b7ad6b7169203331", "0" * 16))],
    "the version that cannot be": [("traceparent", "ff" + PARENT[2:])],
    "more than version 00 has": [("traceparent", PARENT + "-more")],
    "too short": [("traceparent", PARENT[:-1])],
    "too long": [("traceparent", f"01{PARENT[2:]}-{'m' * 128}")],
    "a newline": [("traceparent", PARENT + "\nx-more: 1")],
    "foreign letters": [("traceparent", PARENT[:-1] + "é")],
}


@pytest.mark.parametrize("given", INVALID.values(), ids=INVALID)
def test_a_trace_that_is_not_valid_is_dropped(given: list[tuple[str, str]]) -> None:
    assert trace_of(headers(*given)) is NO_TRACE


@pytest.mark.parametrize("body", [HI, STREAM], ids=["plain", "streamed"])
async def test_the_backend_is_told_the_trace(app: App, backend: Backend, body: Json) -> None:
    backend.script(streamed("Hi") if body.get("stream") else plain())
    await read(app, body, headers={"traceparent": PARENT, "tracestate": STATE})
    told = (await backend.received()).headers
    assert (told["traceparent"], told["tracestate"]) == (PARENT, STATE)


async def test_the_backend_is_told_no_trace_that_is_not_valid(app: App, backend: Backend) -> None:
    await read(app, HI, headers={"traceparent": "00-no-trace", "tracestate": STATE})
    assert {"traceparent", "tracestate"} & (await backend.received()).headers.keys() == set()


async def test_a_run_in_background_is_no_part_of_the_trace(app: App, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    await created(app, RUN, traceparent=PARENT)
    assert "traceparent" not in (await backend.received()).headers


@pytest.mark.parametrize("is_sent", [True, False])
async def test_the_backend_is_told_the_request_id_where_that_is_set(
    start_app: StartApp, backend: Backend, is_sent: bool
) -> None:
    app = await start_app(upstream={"send_request_id": is_sent})
    await read(app, HI, headers={"x-request-id": "mine-1"})
    assert (await backend.received()).headers.get("x-request-id") == ("mine-1" if is_sent else None)


async def test_the_request_id_of_a_run_is_its_response(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(upstream={"send_request_id": True})
    backend.script(streamed("Hi"))
    response = await created(app, RUN)
    assert (await backend.received()).headers["x-request-id"] == response["id"]


def test_a_call_is_told_of_what_it_is_left_with() -> None:
    observer = Observer(Metrics())
    call = Place(observer, "one", "localhost", 1).call({}, {})
    call.__exit__(UpstreamGarbled, UpstreamGarbled("No."), None)
    assert observer.metrics.upstream_errors.of["one", "garbled"] == 1


def test_a_call_counts_its_tokens_once() -> None:
    observer = Observer(Metrics())
    call = Place(observer, "one", "localhost", 1).call({}, {})
    call.heard([{"usage": DETAILED}])
    for _ in range(2):
        call.ended()
    assert observer.metrics.tokens.of["one", "input"] == 11
