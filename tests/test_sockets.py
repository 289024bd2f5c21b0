"""WebSockets on real sockets: what is said and refused, lanes, what a connection remembers, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
import uvicorn
from conftest import App, StartApp, listening_socket, settings_of
from event_grammar import check
from openai.types.responses import ResponseSteerFailedEvent
from openai.types.responses.responses_server_event import ResponseWsError
from scripted import DEADLINE_S, END, Backend, Script, chunk, refused, streamed
from socket_client import PATH, Json, Socket, connected, handshake_refused
from test_metrics import reached, values
from test_observing import PARENT, STATE, moved

from auth import Caller, new_key
from metrics import Metrics
from observing import Observer
from proxy import server_config
from request import RequestLimits
from sockets import STOPPING, Client, Connection, SocketMeans, WebSocketSettings
from stream_lanes import AT_ONCE, NAMED_LANES
from turns import Turns

HASTY = {"created_after_ms": 1}
PATIENT = {"created_after_ms": 60_000}
STORED = {"store": True}


@pytest.fixture
async def client(app: App) -> AsyncIterator[Socket]:
    async with connected(app) as client:
        yield client


def held(*texts: str) -> tuple[Script, asyncio.Event]:
    """An answer that stands still before its end."""
    goes_on = asyncio.Event()
    return Script(
        [chunk(role="assistant", content=""), *(chunk(content=text) for text in texts), goes_on, *END]
    ), goes_on


def said_to(backend: Backend) -> list[list[str]]:
    """What the backend was asked: the texts of each request's messages."""
    return [[message["content"] for message in request.body["messages"]] for request in backend.requests]


def text_of(response: Json) -> str:
    return str(response["output"][-1]["content"][0]["text"])


# -- responses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PATH, "/responses"])
async def test_the_events_are_those_of_a_stream(app: App, backend: Backend, path: str) -> None:
    backend.script(streamed("Hel", "lo"))
    async with connected(app, path) as client:
        await client.create("Hi")
        events = await client.events()
    async with app.post({"model": "m", "input": "Hi", "store": False, "stream": True}) as answer:
        streamed_events = [line for line in (await answer.text()).splitlines() if line.startswith("event: ")]
    assert text_of(check(events)) == "Hello"
    assert [f"event: {event['type']}" for event in events] == streamed_events
    assert [event for event in events if "stream_id" in event] == []


@pytest.mark.parametrize(
    "fields",
    [{"stream": True}, {"stream_options": {"include_obfuscation": False}}, {"background": False}, {"generate": True}],
)
async def test_what_says_nothing_on_a_socket_is_tolerated(client: Socket, fields: Json) -> None:
    await client.create("Hi", **fields)
    first, *events = await client.events()
    check([first, *events])
    assert "x-responses-proxy-ignored" not in first


async def test_what_is_left_out_is_named_on_the_first_event_and_only_there(
    client: Socket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await client.create("Hi", stream=False, **{"a\nb": 1})
    first, *events = await client.events()
    assert (first["type"], first["x-responses-proxy-ignored"]) == ("response.created", "a?b, stream")
    assert [event for event in events if "x-responses-proxy-ignored" in event] == []
    assert "left out of req_" in caplog.text


async def test_what_would_be_left_out_is_refused_where_the_settings_are_strict(start_app: StartApp) -> None:
    async with connected(await start_app(turns={"strict": True})) as client:
        await client.create("Hi", unheard_of=1)
        assert (await client.refused())["param"] == "unheard_of"


async def test_a_stored_response_can_be_retrieved(app: App, client: Socket) -> None:
    response = await client.turn("Hi", **STORED)
    async with app.http.get(f"{app.url}{PATH}/{response['id']}") as answer:
        assert await answer.json() == response


async def test_what_is_not_stored_cannot_be_retrieved(app: App, client: Socket) -> None:
    response = await client.turn("Hi")
    async with app.http.get(f"{app.url}{PATH}/{response['id']}") as answer:
        assert answer.status == 404


async def test_conversations_are_read_and_written(app: App, client: Socket, backend: Backend) -> None:
    conversation = await app.openai.conversations.create(items=[{"role": "user", "content": "Earlier"}])
    backend.script(streamed("Yes."))
    await client.turn("Hi", conversation=conversation.id, **STORED)
    response = await client.turn("Not kept", conversation=conversation.id)
    await client.turn("And now?", previous_response_id=response["id"])
    items = await app.openai.conversations.items.list(conversation.id, order="asc")
    assert [item.content[0].text for item in items.data] == ["Earlier", "Hi", "Yes."]
    assert said_to(backend)[2] == ["Earlier", "Hi", "Yes.", "Not kept", "Yes.", "And now?"]


# -- refusals ----------------------------------------------------------------------------------------------------------

MALFORMED = ["", "{", "[1]", "null", '"text"', "[" * 100_000, '{"a":' + "[" * 100_000, '{"type": nope}']


@pytest.mark.parametrize("message", MALFORMED)
async def test_a_message_that_is_no_event_is_refused_and_nothing_else(client: Socket, message: str) -> None:
    await client.ws.send_str(message)
    error = await client.refused()
    assert (error["status"], error["type"]) == (400, "invalid_request_error")
    await client.turn("Hi")


async def test_a_binary_message_is_refused_and_nothing_else(client: Socket) -> None:
    await client.ws.send_bytes(b'{"type": "response.create", "model": "m", "input": "Hi"}')
    assert "binary" in (await client.refused())["message"]
    await client.turn("Hi")


@pytest.mark.parametrize("kind", [None, "response.cancel", 7, {"a": 1}])
async def test_an_unknown_event_is_refused_by_its_type(client: Socket, kind: Any) -> None:
    await client.ws.send_json({"type": kind, "stream_id": "a"})
    error = await client.refused("a")
    assert (error["status"], error["code"], error["param"]) == (400, "invalid_value", "type")


BAD = [
    {"input": None},
    {"max_output_tokens": 3},
    {"tools": [{"type": "function", "function": {"name": "a"}}]},
    {"previous_response_id": "resp_nobody"},
    {"previous_response_id": "x"},
    {"metadata": [[[[[[]]]]]]},
    {"input": [{"type": "item_reference", "id": "msg_1"}]},
]


@pytest.mark.parametrize("fields", BAD)
async def test_a_request_is_refused_with_the_error_of_http(app: App, client: Socket, fields: Json) -> None:
    body = {"model": "m", "input": "Hi", "store": False, **fields}
    async with app.post(body) as answer:
        expected = {"status": answer.status, **(await answer.json())["error"]}
    await client.ws.send_json({"type": "response.create", **body})
    assert await client.refused() == expected
    await client.turn("Hi")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"background": True}, "background"), ({"generate": "no"}, "generate"), ({"generate": 0}, "generate")],
)
async def test_what_a_socket_cannot_do_is_refused(client: Socket, fields: Json, param: str) -> None:
    await client.create("Hi", **fields)
    error = await client.refused()
    assert (error["status"], error["param"]) == (400, param)


async def test_a_refusal_of_the_backend_keeps_its_status_and_its_patience(
    start_app: StartApp, backend: Backend
) -> None:
    backend.script(refused(429, "Later.", {"retry-after": "7"}), streamed("Now."))
    async with connected(await start_app(turns=PATIENT)) as client:
        await client.create("Hi", stream_id="a")
        event = await client.hear("a")
        assert (event["status"], event["error"]["code"]) == (429, "rate_limit_exceeded")
        assert event["error"]["headers"] == {"retry-after": "7"}
        ResponseWsError.model_validate(event)
        await client.turn("Again", lane="a")


async def test_a_failure_after_the_first_event_is_a_failed_response(start_app: StartApp, backend: Backend) -> None:
    goes_on = asyncio.Event()
    backend.script(Script(refused(500, "broken").steps, 500, before=goes_on), streamed("Fine."))
    async with connected(await start_app(turns=HASTY)) as client:
        await client.create("Hi")
        created = await client.hear()
        goes_on.set()
        events = [created, *await client.events()]
        assert [event["type"] for event in events] == [
            f"response.{kind}" for kind in ("created", "in_progress", "failed")
        ]
        assert (await client.turn("Again"))["status"] == "completed"


async def test_a_fault_of_the_program_ends_one_response_only(
    client: Socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sockets.parse_create", lambda *given: 1 / 0)
        await client.create("Hi")
        error = await client.refused()
    assert (error["status"], "req_" in error["message"]) == (500, True)
    assert "ZeroDivisionError" in caplog.text
    await client.turn("Hi")


async def test_a_message_that_is_too_large_closes_the_connection(start_app: StartApp) -> None:
    async with connected(await start_app(limits={"body_bytes": 10_000})) as client:
        await client.turn("x" * 9_000)
        await client.create("x" * 10_000)
        assert await client.closed() == 1009


# -- warm-ups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"generate": False}, {"generate": True, "prompt_cache_options": {"prewarm": True}}])
@pytest.mark.parametrize("store", [False, True])
async def test_a_warm_up_asks_no_backend_and_can_be_continued(
    client: Socket, backend: Backend, how: Json, store: bool
) -> None:
    await client.create([{"role": "developer", "content": "Be brief."}], store=store, **how)
    events = await client.events()
    warm = check(events)
    assert [event["type"] for event in events] == [
        f"response.{kind}" for kind in ("created", "in_progress", "completed")
    ]
    assert (warm["output"], warm["usage"]["total_tokens"]) == ([], 0)
    assert backend.requests == []
    await client.turn("Hi", previous_response_id=warm["id"], store=store)
    assert said_to(backend) == [["Be brief.", "Hi"]]


async def test_a_stored_warm_up_is_kept_like_any_response(app: App, client: Socket) -> None:
    warm = await client.turn("Hi", generate=False, **STORED)
    async with app.http.get(f"{app.url}{PATH}/{warm['id']}") as answer:
        assert await answer.json() == warm


async def test_a_warm_up_needs_no_input(client: Socket, backend: Backend) -> None:
    warm = await client.turn([], generate=False)
    await client.turn("Hi", previous_response_id=warm["id"])
    assert said_to(backend) == [["Hi"]]


@pytest.mark.parametrize(
    "said", [[{"type": "compaction_trigger"}], [{"type": "message", "role": "user", "content": 7}]]
)
async def test_a_warm_up_is_checked_like_any_request(client: Socket, said: Any) -> None:
    await client.create(said, generate=False)
    assert (await client.refused())["status"] == 400


# -- lanes -------------------------------------------------------------------------------------------------------------


async def test_lanes_run_side_by_side_and_each_in_order(client: Socket, backend: Backend) -> None:
    slow, goes_on = held("slow")
    backend.script(slow, streamed("fast"), streamed("last"))
    await client.create("First", stream_id="a")
    await client.until("response.output_text.delta", "a")
    await client.create("Second", stream_id="a")
    assert text_of(await client.turn("Other", lane="b")) == "fast"
    goes_on.set()
    await client.until("response.completed", "a")
    assert text_of(await client.ended("a")) == "last"
    assert said_to(backend) == [["First"], ["Other"], ["Second"]]


async def test_every_event_of_a_named_lane_names_it(client: Socket) -> None:
    await client.create("Hi", stream_id="A-1_.")
    events = await client.events("A-1_.")
    assert {event["stream_id"] for event in events} == {"A-1_."}


async def test_null_names_the_lane_without_a_name(client: Socket) -> None:
    await client.ws.send_json({"type": "response.create", "model": "m", "input": "Hi", "stream_id": None})
    await client.ended()


@pytest.mark.parametrize("name", ["", "x" * 257, "a b", 7])
async def test_a_bad_lane_is_refused_without_a_lane(client: Socket, name: Any) -> None:
    await client.create("Hi", stream_id=name)
    error = await client.refused()
    assert (error["status"], error["code"], error["param"]) == (400, "invalid_stream_id", "stream_id")


async def test_the_33rd_named_lane_is_refused_and_the_others_live(client: Socket) -> None:
    for number in range(NAMED_LANES):
        await client.create("Hi", stream_id=f"lane-{number}", generate=False)
    await client.create("Hi", stream_id="one-more")
    assert (await client.refused("one-more"))["code"] == "websocket_stream_limit_reached"
    for number in range(NAMED_LANES):
        await client.ended(f"lane-{number}")
    await client.turn("Hi", generate=False)


async def test_the_17th_response_waits_until_another_has_ended(client: Socket, backend: Backend) -> None:
    slow, goes_on = held("slow")
    backend.script(*[slow] * AT_ONCE, streamed("after"))
    for number in range(AT_ONCE):
        await client.create("Hi", stream_id=f"lane-{number}")
        await client.until("response.output_text.delta", f"lane-{number}")
    await client.create("Hi")
    await client.ws.send_str("{")
    assert (await client.refused())["code"] == "invalid_json"  # which comes before the first event of the 17th
    assert len(backend.requests) == AT_ONCE
    goes_on.set()
    assert text_of(await client.ended()) == "after"


@pytest.mark.parametrize("settings", [{"websocket": {"queued": 1}}, {"limits": {"body_bytes": 300}}])
async def test_too_much_that_waits_is_a_429(start_app: StartApp, backend: Backend, settings: Any) -> None:
    slow, goes_on = held("slow")
    backend.script(slow, streamed("after"))
    async with connected(await start_app(**settings)) as client:
        await client.create("Hi")
        await client.until("response.output_text.delta")
        await client.create("x" * 100)
        await client.create("x" * 100)
        error = await client.refused()
        assert (error["status"], error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
        goes_on.set()
        await client.until("response.completed")
        assert text_of(await client.ended()) == "after"


# -- memory ------------------------------------------------------------------------------------------------------------


async def test_a_response_that_is_not_stored_can_be_continued_here(app: App, client: Socket, backend: Backend) -> None:
    backend.script(streamed("one"), streamed("two"), streamed("three"))
    first = await client.turn("A")
    second = await client.turn("B", previous_response_id=first["id"])
    third = await client.turn("C", previous_response_id=second["id"])
    assert third["previous_response_id"] == second["id"]
    assert said_to(backend)[-1] == ["A", "one", "B", "two", "C"]
    async with connected(app) as other:
        await other.not_found(third)


async def test_only_the_latest_response_of_a_lane_is_remembered(client: Socket) -> None:
    first = await client.turn("A")
    second = await client.turn("B", previous_response_id=first["id"])
    await client.not_found(first)
    await client.turn("C", previous_response_id=second["id"])


async def test_what_is_stored_can_always_be_continued(app: App, client: Socket, backend: Backend) -> None:
    first = await client.turn("A", **STORED)
    await client.turn("B", **STORED)
    await client.turn("C", previous_response_id=first["id"])
    async with connected(app) as other:
        await other.turn("D", previous_response_id=first["id"])
    assert [texts[0] for texts in said_to(backend)[2:]] == ["A", "A"]


async def test_a_stored_response_takes_the_place_of_one_that_is_not(client: Socket) -> None:
    first = await client.turn("A")
    await client.turn("B", previous_response_id=first["id"], **STORED)
    await client.not_found(first)


async def test_a_stored_response_that_was_deleted_is_gone_here_too(app: App, client: Socket) -> None:
    response = await client.turn("A", **STORED)
    await app.openai.responses.delete(response["id"])
    await client.not_found(response)


async def test_a_stored_response_keeps_all_that_it_continues(app: App, client: Socket, backend: Backend) -> None:
    backend.script(streamed("one"), streamed("two"), streamed("three"), streamed("four"))
    first = await client.turn("A", **STORED)
    second = await client.turn("B", previous_response_id=first["id"])
    third = await client.turn("C", previous_response_id=second["id"], **STORED)
    await client.turn("D", previous_response_id=third["id"], **STORED)
    assert said_to(backend)[-1] == ["A", "one", "B", "two", "C", "three", "D"]
    async with app.http.get(f"{app.url}{PATH}/{third['id']}") as answer:
        kept = await answer.json()
    assert kept == {**third, "previous_response_id": None}
    async with app.http.get(f"{app.url}{PATH}/{third['id']}/input_items?order=asc") as answer:
        items = (await answer.json())["data"]
    assert [item["content"][0]["text"] for item in items] == ["A", "one", "B", "two", "C"]


async def test_a_new_chain_may_begin_in_a_lane_with_a_past(client: Socket, backend: Backend) -> None:
    first = await client.turn("A")
    await client.turn("B")
    await client.not_found(first)
    assert said_to(backend) == [["A"], ["B"]]


async def test_a_lane_may_fork_from_another_which_goes_on(client: Socket, backend: Backend) -> None:
    backend.script(streamed("one"), streamed("two"), streamed("three"))
    first = await client.turn("A", lane="a")
    await client.turn("B", lane="b", previous_response_id=first["id"])
    await client.turn("C", lane="a", previous_response_id=first["id"])
    assert said_to(backend)[1:] == [["A", "one", "B"], ["A", "one", "C"]]


@pytest.mark.parametrize("fields", [{"max_output_tokens": 3}, {"input": [{"type": "unheard_of"}]}, {"generate": "no"}])
async def test_a_refused_continuation_forgets_what_it_would_continue(client: Socket, fields: Json) -> None:
    first = await client.turn("A", lane="a")
    await client.create("B", stream_id="a", previous_response_id=first["id"], **fields)
    await client.refused("a")
    await client.not_found(first, "a")


async def test_a_failed_continuation_forgets_what_it_continued(start_app: StartApp, backend: Backend) -> None:
    backend.script(streamed("one"), Script([chunk(content="tw")], end="cut"), streamed("three"))
    async with connected(await start_app()) as client:
        first = await client.turn("A")
        assert (await client.turn("B", previous_response_id=first["id"]))["status"] == "failed"
        await client.not_found(first)


async def test_a_refusal_in_another_lane_forgets_nothing(client: Socket) -> None:
    first = await client.turn("A", lane="a")
    await client.create("B", stream_id="b", previous_response_id=first["id"], max_output_tokens=3)
    await client.refused("b")
    await client.turn("C", lane="a", previous_response_id=first["id"])


async def test_a_refusal_forgets_no_stored_response(client: Socket) -> None:
    first = await client.turn("A", **STORED)
    await client.create("B", previous_response_id=first["id"], max_output_tokens=3)
    await client.refused()
    await client.turn("C", previous_response_id=first["id"])


async def test_a_response_that_was_cut_short_can_be_continued(client: Socket, backend: Backend) -> None:
    backend.script(Script([chunk(content="one"), chunk("length"), *END[1:]]), streamed("two"))
    first = await client.turn("A")
    await client.turn("B", previous_response_id=first["id"])
    assert (first["status"], said_to(backend)[-1]) == ("incomplete", ["A", "one", "B"])


async def test_beyond_its_memory_a_connection_forgets_the_lane_that_was_used_longest_ago(start_app: StartApp) -> None:
    async with connected(await start_app(websocket={"memory_bytes": 5_000})) as client:
        first = {lane: await client.turn("x" * 2_000, lane=lane) for lane in "ab"}
        again = await client.turn("y", lane="c", previous_response_id=first["a"]["id"])
        await client.not_found(first["b"], "b")
        await client.turn("y", lane="c", previous_response_id=again["id"])


async def test_what_is_larger_than_the_memory_is_not_remembered(start_app: StartApp) -> None:
    async with connected(await start_app(websocket={"memory_bytes": 1_000})) as client:
        await client.not_found(await client.turn("x" * 2_000))


async def test_an_item_that_stands_in_the_chain_already_is_refused(client: Socket) -> None:
    first = await client.turn("A")
    await client.create(first["output"], previous_response_id=first["id"])
    assert "Duplicate item" in (await client.refused())["message"]


async def test_reasoning_goes_back_to_a_backend_that_wants_it(start_app: StartApp, backend: Backend) -> None:
    backend.script(Script([chunk(reasoning_content="Hm."), chunk(content="one"), *END]))
    async with connected(await start_app(upstream={"dialect": "deepseek"})) as client:
        first = await client.turn("A")
        await client.turn("B", previous_response_id=first["id"])
    assert backend.requests[-1].body["messages"][1]["reasoning_content"] == "Hm."


async def test_a_call_is_answered_by_the_next_turn(client: Socket, backend: Backend) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    backend.script(Script([chunk(tool_calls=[call]), chunk("tool_calls"), *END[1:]]), streamed("Seen."))
    first = await client.turn("A", tools=[{"type": "function", "name": "look"}])
    output = {"type": "function_call_output", "call_id": "call_1", "output": "a tree"}
    await client.turn([output], previous_response_id=first["id"])
    assert [message["role"] for message in backend.requests[-1].body["messages"]] == ["user", "assistant", "tool"]


# -- steering ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["Faster!", [{"type": "message", "role": "user", "content": "Faster!"}]])
async def test_steering_is_refused_and_its_input_given_back(client: Socket, given: Any) -> None:
    await client.ws.send_json({"type": "response.steer", "previous_response_id": "resp_1", "input": given})
    event = await client.hear()
    ResponseSteerFailedEvent.model_validate(event)
    assert event["steer"] == {"input": given, "previous_response_id": "resp_1"}
    assert (event["error"]["code"], "stream_id" in event) == ("steering_not_supported", False)


async def test_steering_that_is_malformed_is_refused_as_such(client: Socket) -> None:
    await client.ws.send_json({"type": "response.steer", "input": 7})
    event = await client.hear()
    ResponseSteerFailedEvent.model_validate(event)
    assert event["error"]["code"] == "invalid_input"


# -- how it begins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer nobody"}])
async def test_an_upgrade_without_a_key_is_a_401(start_app: StartApp, headers: dict[str, str]) -> None:
    app = await start_app(auth={"mode": "keys", "keys": {"me": new_key()[1]}})
    assert (await handshake_refused(app, headers=headers)).status == 401


async def test_a_refused_upgrade_is_no_error_of_the_server(app: App, caplog: pytest.LogCaptureFixture) -> None:
    await handshake_refused(app, "/v1/chat")
    await connected_once(app)  # the server has done with the one before by then
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def connected_once(app: App) -> None:
    async with connected(app) as client:
        await client.turn("Hi")


async def test_what_a_connection_stores_is_its_owners(start_app: StartApp) -> None:
    mine, theirs = new_key(), new_key()
    app = await start_app(auth={"mode": "keys", "keys": {"me": mine[1], "they": theirs[1]}})
    bearers = [{"Authorization": f"Bearer {key}"} for key, _ in (mine, theirs)]
    async with connected(app, headers=bearers[0]) as me, connected(app, headers=bearers[1]) as they:
        response = await me.turn("A", **STORED)
        await they.not_found(response)
        await me.turn("B", previous_response_id=response["id"])


async def test_the_key_that_is_passed_on_is_that_of_the_upgrade(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(auth={"mode": "passthrough"})
    async with connected(app, headers={"Authorization": "Bearer mine"}) as client:
        await client.turn("Hi")
    assert backend.requests[-1].headers["authorization"] == "Bearer mine"


@pytest.mark.parametrize("path", ["/v1/chat", "/healthz", "/v1/responses/resp_1"])
async def test_an_upgrade_of_another_path_is_a_404(app: App, path: str) -> None:
    assert (await handshake_refused(app, path)).status == 404


@pytest.mark.parametrize("path", [PATH, "/responses"])
async def test_an_upgrade_is_a_426_where_websockets_are_switched_off(start_app: StartApp, path: str) -> None:
    app = await start_app(websocket={"enabled": False})
    assert (await handshake_refused(app, path)).status == 426


async def test_a_client_may_name_its_upgrade(app: App) -> None:
    async with app.http.ws_connect(app.url + PATH, headers={"x-request-id": "mine"}) as ws:
        assert ws._response.headers["x-request-id"] == "mine"


async def test_nothing_is_deflated(app: App) -> None:
    async with connected(app, compress=15) as client:
        assert client.ws.compress == 0


# -- limits, counts and traces -----------------------------------------------------------------------------------------

PER_MINUTE, AT_ONE_TIME = {"requests_per_minute": 1}, {"in_flight_per_owner": 1}


async def rate_limited(client: Socket, lane: str | None = None) -> dict[str, str]:
    """The headers in the error frame that a lane hears next."""
    event = await client.hear(lane)
    error = ResponseWsError.model_validate(event)
    assert (error.status, error.error.type, error.error.code) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert error.error.headers
    return error.error.headers


async def test_over_the_limit_a_minute_the_socket_stays_and_says_how_long_to_wait(
    start_app: StartApp, backend: Backend
) -> None:
    async with connected(await start_app(limits=PER_MINUTE)) as client:
        await client.turn("Hi")
        for _ in range(2):
            await client.create("More")
            headers = await rate_limited(client)
            assert 0 < int(headers["retry-after"]) <= 60
            assert headers["x-ratelimit-remaining-requests"] == "0"
    assert len(backend.requests) == 1


async def test_requests_over_http_and_on_sockets_are_limited_together(start_app: StartApp) -> None:
    app = await start_app(limits=PER_MINUTE)
    async with connected(app) as client, connected(app) as other:
        await client.turn("Hi")
        await other.create("Hi")
        await rate_limited(other)
        async with app.post({"model": "m", "input": "Hi"}) as answer:
            assert answer.status == 429


async def test_what_one_owner_says_on_a_socket_does_not_hinder_another(start_app: StartApp) -> None:
    mine, theirs = new_key(), new_key()
    app = await start_app(auth={"mode": "keys", "keys": {"me": mine[1], "they": theirs[1]}}, limits=PER_MINUTE)
    bearers = [{"Authorization": f"Bearer {key}"} for key, _ in (mine, theirs)]
    async with connected(app, headers=bearers[0]) as me, connected(app, headers=bearers[1]) as they:
        await me.turn("Hi")
        await me.create("More")
        await rate_limited(me)
        await they.turn("Hi")


async def test_a_lane_over_the_limit_at_once_is_refused_and_the_other_goes_on(
    start_app: StartApp, backend: Backend
) -> None:
    slow, goes_on = held("slow")
    backend.script(slow, streamed("after"))
    async with connected(await start_app(limits=AT_ONE_TIME)) as client:
        await client.create("Hi", stream_id="a")
        await client.until("response.output_text.delta", "a")
        await client.create("Hi", stream_id="b")
        await rate_limited(client, "b")
        await client.create("Next", stream_id="a")  # waits in its lane, and is not in flight meanwhile
        goes_on.set()
        await client.until("response.completed", "a")
        assert text_of(await client.ended("a")) == "after"


async def test_what_a_refusal_for_a_limit_would_continue_is_not_forgotten(
    start_app: StartApp, backend: Backend
) -> None:
    slow, goes_on = held("slow")
    backend.script(streamed("one"), slow, streamed("two"))
    async with connected(await start_app(limits=AT_ONE_TIME)) as client:
        parent = await client.turn("Hi")
        await client.create("Hi", stream_id="b")
        await client.until("response.output_text.delta", "b")
        await client.create("More", previous_response_id=parent["id"])
        await rate_limited(client)
        goes_on.set()
        await client.until("response.completed", "b")
        await client.turn("Hi", lane="b", generate=False)  # the one before it is no longer in flight
        await client.turn("More", previous_response_id=parent["id"])
    assert said_to(backend)[-1] == ["Hi", "one", "More"]


async def test_the_tokens_of_a_turn_on_a_socket_count_for_its_owner(start_app: StartApp) -> None:
    async with connected(await start_app(limits={"tokens_per_minute": 18})) as client:
        await client.turn("Hi")
        await client.create("More")
        headers = await rate_limited(client)
        assert headers["x-ratelimit-remaining-tokens"] == "0"


async def test_turns_are_counted_as_those_of_a_socket_which_is_open_until_it_ends(app: App) -> None:
    assert (await values(app))["websockets_open"] == 0
    async with connected(app) as client, connected(app):
        await client.turn("Hi", unheard_of=1)
        found = await values(app)
        assert found["websockets_open"] == 2
        assert moved(found, "turns_total") == {"[websocket][completed]": 1}
        assert moved(found, "ignored_total") == {"[other]": 1}
        assert found["turn_seconds_count[websocket]"] == 1
    await reached(app, websockets_open=0)


async def test_what_runs_when_a_client_leaves_is_counted_as_cancelled(app: App, backend: Backend) -> None:
    slow, _ = held("slow")
    backend.script(slow)
    async with connected(app) as client:
        await client.create("Hi")
        await client.until("response.output_text.delta")
    await reached(app, **{"turns_total[websocket][cancelled]": 1, "websockets_open": 0})


async def test_a_refused_upgrade_is_no_open_socket(app: App) -> None:
    await handshake_refused(app, headers={"origin": "https://evil.example"})
    assert (await values(app))["websockets_open"] == 0


async def test_the_trace_of_the_upgrade_goes_on_to_the_backend(app: App, backend: Backend) -> None:
    async with connected(app, headers={"traceparent": PARENT, "tracestate": STATE}) as client:
        await client.turn("Hi")
        await client.turn("More")
    assert [request.headers["traceparent"] for request in backend.requests] == [PARENT, PARENT]
    assert {request.headers["tracestate"] for request in backend.requests} == {STATE}


# -- how it ends -------------------------------------------------------------------------------------------------------


async def test_an_idle_connection_is_told_when_its_life_is_over(start_app: StartApp) -> None:
    async with connected(await start_app(websocket={"life_s": 0.05})) as client:
        error = await client.refused()
        assert (error["status"], error["code"]) == (400, "websocket_connection_limit_reached")
        assert await client.closed() == 1001


async def test_what_runs_when_the_life_is_over_is_finished_and_nothing_else(
    start_app: StartApp, backend: Backend
) -> None:
    slow, goes_on = held("slow")
    backend.script(slow)
    async with connected(await start_app(websocket={"life_s": 1.0})) as client:
        await client.create("Hi", stream_id="a")
        await client.until("response.output_text.delta", "a")
        await client.create("waits", stream_id="a")
        assert (await client.refused("a"))["code"] == "websocket_connection_limit_reached"
        await client.create("too late", stream_id="b")
        assert (await client.refused("b"))["code"] == "websocket_connection_limit_reached"
        goes_on.set()
        await client.until("response.completed", "a")
        assert (await client.refused())["code"] == "websocket_connection_limit_reached"
        assert await client.closed() == 1001
    assert len(backend.requests) == 1


@contextlib.asynccontextmanager
async def stoppable(backend: Backend, **sections: Any) -> AsyncIterator[tuple[uvicorn.Server, Socket]]:
    """A server that a test stops, and a client of it."""
    listener = listening_socket()
    config = server_config(settings_of(backend.url, **sections))
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with aiohttp.ClientSession() as http, http.ws_connect(url + PATH, autoclose=False) as ws:
        yield server, Socket(ws)


async def test_a_server_that_stops_finishes_what_runs(backend: Backend) -> None:
    slow, goes_on = held("slow")
    backend.script(slow)
    async with stoppable(backend) as (server, client):
        await client.create("Hi")
        await client.until("response.output_text.delta")
        await client.create("waits")
        stopping = asyncio.create_task(server.shutdown())
        assert (await client.refused())["status"] == 500
        goes_on.set()
        await client.until("response.completed")
        assert await client.closed() == 1012
        await stopping


async def test_a_server_that_stops_closes_idle_connections_at_once(backend: Backend) -> None:
    async with stoppable(backend) as (server, client):
        stopping = asyncio.create_task(server.shutdown())
        assert await client.closed() == 1012
        await stopping


async def test_what_takes_longer_than_the_grace_has_failed(backend: Backend) -> None:
    backend.script(held("slow")[0])
    async with stoppable(backend, server={"shutdown_grace_s": 0.0}) as (server, client):
        for lane in ("a", "b"):
            await client.create("Hi", stream_id=lane)
            await client.until("response.output_text.delta", lane)
        stopping = asyncio.create_task(server.shutdown())
        for lane in ("a", "b"):
            response = (await client.until("response.failed", lane))["response"]
            assert "stopped" in response["error"]["message"]
        assert await client.closed() == 1012
        await stopping


@pytest.mark.parametrize("leaves", ["closes", "drops"])
async def test_a_client_that_leaves_stops_all_its_turns(app: App, backend: Backend, leaves: str) -> None:
    backend.script(held("slow")[0])
    async with connected(app) as client:
        for lane in ("a", "b"):
            await client.create("Hi", stream_id=lane)
            await client.until("response.output_text.delta", lane)
        if leaves == "drops":
            transport = client.ws.get_extra_info("socket")
            transport.shutdown(socket.SHUT_RDWR)
        else:
            await client.ws.close()
        for request in backend.requests:
            assert await request.is_let_go()


async def test_a_client_that_answers_no_ping_is_cut_off(start_app: StartApp) -> None:
    app = await start_app(websocket={"ping_s": 0.02, "ping_timeout_s": 0.02})
    async with connected(app, autoping=False) as client:
        assert (await client.ws.receive()).type is aiohttp.WSMsgType.PING
        assert await client.closed() == 1011


async def test_a_client_that_does_not_read_holds_the_backend_back(app: App, backend: Backend) -> None:
    sent = 0
    piece, pieces = chunk(content="x" * 60_000), 2_000

    def steps() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(pieces):
            sent += 1
            yield piece

    backend.script(Script(steps()))
    host, port = app.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1000)
    writer.write(f"GET {PATH} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n".encode())
    writer.write(b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    body = json.dumps({"type": "response.create", "model": "m", "input": "Hi", "store": False}).encode()
    writer.write(b"\x81" + bytes([0x80 | len(body)]) + bytes(4) + body)
    request = await backend.received()
    before = -1
    async with asyncio.timeout(DEADLINE_S):
        while not sent or sent != before:
            before = sent
            await asyncio.sleep(0.3)
    assert 0 < sent < pieces / 2
    writer.transport.abort()
    assert await request.is_let_go()


# -- what waits when a connection ends ---------------------------------------------------------------------------------


class Told:
    """A turn that goes on when it is told to."""

    ignored = ()

    def __init__(self, goes_on: asyncio.Event) -> None:
        self._goes_on = goes_on

    async def accept(self) -> None: ...

    async def close(self) -> None: ...

    async def events(self) -> AsyncIterator[list[Json]]:
        yield [{"type": "response.created"}]
        await self._goes_on.wait()
        yield [{"type": "response.completed"}]


async def test_all_that_waits_is_refused_also_where_what_runs_ends_meanwhile() -> None:
    goes_on, heard = asyncio.Event(), asyncio.Queue[Json]()
    said: list[str] = []

    async def prepare(asked: Any) -> Told:
        return Told(goes_on)

    async def send(message: Json) -> None:
        said.append(json.loads(message["text"])["type"] if "text" in message else message["type"])
        if said == ["response.created"]:
            heard.put_nowait({"type": STOPPING})
        if said == ["response.created", "error"]:
            goes_on.set()
        for _ in range(20):  # a client that takes its time, so that the others get on
            await asyncio.sleep(0)

    for number in range(5):
        body = {"type": "response.create", "model": "m", "input": str(number), "store": False}
        heard.put_nowait({"type": "websocket.receive", "text": json.dumps(body)})
    turns = cast(Turns, SimpleNamespace(prepare=prepare))
    means = SocketMeans(turns, WebSocketSettings(), RequestLimits(), 1 << 20, str, None, Observer(Metrics()))
    async with asyncio.timeout(DEADLINE_S):
        await Connection(means, Caller("o"), Client(heard.get, send)).serve()
    assert sorted(said[:-1]) == ["error"] * 4 + ["response.completed", "response.created"]
    assert said[-1] == "websocket.close"


async def test_the_log_does_not_quote_what_a_backend_repeats(
    app: App, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend.script(refused(500, "You said: sesame"))
    async with connected(app) as client:
        await client.create("sesame")
        assert "sesame" in (await client.hear())["error"]["message"]
    assert "answered 500" in caplog.text
    assert "sesame" not in caplog.text
