"""The HTTP edge on real sockets: what is refused, how streams live and end, and who notices that a client left."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import aiohttp
import pytest
from conftest import App, StartApp, settings_of
from controlled import controlled
from event_grammar import check, parse
from scripted import DEADLINE_S, END, Backend, Script, chunk, plain, refused, sse, streamed

from answers import read_body
from background import Background
from errors import StoreError
from proxy import Application
from settings import Settings, load_settings
from sources import Ids
from stored import STORED_ROUTES
from streaming import ResponseStream
from upkeep import told_to_stop
from windows import WINDOW_ROUTES

HI: dict[str, Any] = {"model": "m", "input": "Hi"}
STREAM = {**HI, "stream": True}
PATIENT = {"created_after_ms": 60_000}
HASTY = {"created_after_ms": 1}
MIB = 1024 * 1024


async def error_of(answer: aiohttp.ClientResponse, status: int) -> dict[str, Any]:
    """The error of an answer, after a look at its envelope."""
    body = await answer.json()
    assert answer.status == status, body
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


class Blocks:
    """The blocks of an event stream, one by one as they arrive."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        assert answer.status == 200
        self._content = answer.content

    async def next(self) -> str:
        async with asyncio.timeout(DEADLINE_S):
            return (await self._content.readuntil(b"\n\n")).decode()

    async def until(self, start: str) -> str:
        """The next block that begins so."""
        while not (block := await self.next()).startswith(start):
            pass
        return block

    async def rest(self) -> list[str]:
        async with asyncio.timeout(DEADLINE_S):
            return (await self._content.read()).decode().split("\n\n")[:-1]


def events_in(blocks: list[str]) -> list[dict[str, Any]]:
    """The events among the blocks; each block is whole, and the last one is `[DONE]`."""
    assert blocks[-1] == "data: [DONE]"
    events = []
    for block in blocks[:-1]:
        if not block.startswith(":"):
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


async def failure_of(app: App) -> dict[str, Any]:
    """The error of a stream that is accepted and fails; nothing comes after the failure."""
    async with app.post(STREAM) as answer:
        events = events_in(await Blocks(answer).rest())
    assert terminal_types(events) == ["response.failed"]
    error: dict[str, Any] = events[-1]["response"]["error"]
    return error


def terminal_types(events: list[dict[str, Any]]) -> list[str]:
    terminal = ("response.completed", "response.incomplete", "response.failed")
    return [event["type"] for event in events if event["type"] in terminal]


# -- requests that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b'"text"', b"null", b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_a_400(app: App, body: bytes) -> None:
    async with app.post(body) as answer:
        error = await error_of(answer, 400)
    assert error["type"] == "invalid_request_error"


async def test_a_body_nested_too_deep_is_a_400(app: App) -> None:
    nested: Any = "deep"
    for _ in range(130):
        nested = [nested]
    async with app.post({**HI, "metadata": nested}) as answer:
        error = await error_of(answer, 400)
    assert "deeper than 128" in error["message"]


async def test_a_declared_body_over_the_limit_is_a_413(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(limits={"body_bytes": 1000})
    async with app.post(b" " * 1001) as answer:
        error = await error_of(answer, 413)
    assert (error["code"], backend.requests) == ("request_too_large", [])


async def test_a_chunked_body_over_the_limit_is_a_413(start_app: StartApp) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 100

    app = await start_app(limits={"body_bytes": 1000})
    async with app.http.post(f"{app.url}/v1/responses", data=pieces()) as answer:
        error = await error_of(answer, 413)
    assert error["code"] == "request_too_large"


async def test_a_chunked_body_within_the_limit_is_answered(app: App) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in json.dumps(HI).encode():
            yield bytes([byte])

    async with app.http.post(f"{app.url}/v1/responses", data=pieces()) as answer:
        assert (await answer.json())["status"] == "completed"


async def test_a_declared_body_over_the_limit_is_refused_before_it_is_sent(start_app: StartApp) -> None:
    app = await start_app(limits={"body_bytes": 1000})
    reader, writer = await asyncio.open_connection("127.0.0.1", int(app.url.rpartition(":")[2]))
    writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n")
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.readline() == b"HTTP/1.1 413 Request Entity Too Large\r\n"
    writer.close()
    await writer.wait_closed()


@pytest.mark.timeout(20)
async def test_a_body_of_many_pieces_is_read_without_copying_it_each_time() -> None:
    piece = b" " * 4096
    more = iter([True] * 32_767 + [False])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": piece, "more_body": next(more)}

    assert len(await read_body({"header_values": {}}, receive, 128 * MIB)) == 128 * MIB


async def test_a_compressed_body_is_a_400(app: App) -> None:
    async with app.post(b"x", headers={"content-encoding": "zstd"}) as answer:
        error = await error_of(answer, 400)
    assert "content-encoding" in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{"type": "hologram"}]}, "input[0].type"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "hammer"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
async def test_a_wrong_value_is_a_400_with_its_path(app: App, changes: dict[str, Any], param: str) -> None:
    async with app.post({**HI, **changes}) as answer:
        error = await error_of(answer, 400)
    assert error["param"] == param


async def test_strict_refuses_what_would_be_left_out(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(turns={"strict": True})
    async with app.post({**HI, "seed": 1}) as answer:
        error = await error_of(answer, 400)
    assert (error["param"], error["code"], backend.requests) == ("seed", "unsupported_parameter", [])


async def test_an_input_without_anything_for_the_model_is_a_400(app: App) -> None:
    async with app.post({**HI, "input": [{"type": "additional_tools", "tools": []}]}) as answer:
        error = await error_of(answer, 400)
    assert error["param"] == "input"


# -- routes ------------------------------------------------------------------------------------------------------------


async def test_an_unknown_route_is_a_404(app: App) -> None:
    async with app.post(HI, "/answers") as answer:
        error = await error_of(answer, 404)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/responses/", "/v1/conversations/", "/responses/resp_1/", "//v1/responses"])
async def test_a_slash_too_many_is_a_404(app: App, path: str) -> None:
    async with app.http.get(app.url + path, allow_redirects=False) as answer:
        await error_of(answer, 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/responses", "GET, HEAD, POST"),
        ("PUT", "/v1/responses/resp_1", "DELETE, GET, HEAD"),
        ("PUT", "/conversations/conv_1", "DELETE, GET, HEAD, POST"),
        ("OPTIONS", "/v1/responses/resp_1/cancel", "POST"),
        ("POST", "/healthz", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_a_405_that_names_the_right_ones(
    app: App, method: str, path: str, allowed: str
) -> None:
    async with app.http.request(method, app.url + path) as answer:
        await error_of(answer, 405)
    assert answer.headers["allow"] == allowed


# Routes that name an object in their path.
NAMED = [(method, path) for method, path in STORED_ROUTES if "{id}" in path]
BODY_OF = {
    ("POST", "/conversations/{id}"): {"metadata": {}},
    ("POST", "/conversations/{id}/items"): {"items": [{"role": "user", "content": "Hi"}]},
}


@pytest.mark.parametrize("prefix", ["/v1", ""])
@pytest.mark.parametrize(("method", "path"), NAMED)
async def test_an_unknown_id_is_a_404(app: App, prefix: str, method: str, path: str) -> None:
    object_id = "resp_1" if path.startswith("/responses") else "conv_1"
    url = app.url + prefix + path.format(id=object_id, item="msg_1")
    async with app.http.request(method, url, json=BODY_OF.get((method, path))) as answer:
        error = await error_of(answer, 404)
    kind = "Response" if object_id == "resp_1" else "Conversation"
    message = f"{kind} with id '{object_id}' not found."
    assert error == {"message": message, "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize("prefix", ["/v1", ""])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_an_unknown_item_of_a_conversation_is_a_404(app: App, prefix: str, method: str) -> None:
    async with app.http.post(f"{app.url}{prefix}/conversations") as answer:
        conversation_id = (await answer.json())["id"]
    url = f"{app.url}{prefix}/conversations/{conversation_id}/items/msg_1"
    async with app.http.request(method, url) as answer:
        error = await error_of(answer, 404)
    message = f"Item with id 'msg_1' not found in conversation '{conversation_id}'."
    assert error == {"message": message, "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize("prefix", ["/v1", ""])
@pytest.mark.parametrize(("method", "path"), sorted(set(STORED_ROUTES) - set(NAMED)))
async def test_a_route_that_names_nothing_needs_nothing(app: App, prefix: str, method: str, path: str) -> None:
    async with app.http.request(method, app.url + prefix + path) as answer:
        assert (answer.status, (await answer.json())["object"]) == (200, OBJECT_OF[path])


OBJECT_OF = {
    "/responses": "list",
    "/conversations": "conversation",
    "/responses/compact": "response.compaction",
    "/responses/input_tokens": "response.input_tokens",
}


@pytest.mark.parametrize("prefix", ["/v1", ""])
@pytest.mark.parametrize(("method", "path"), sorted(WINDOW_ROUTES))
async def test_a_route_about_windows_is_answered(app: App, prefix: str, method: str, path: str) -> None:
    async with app.http.request(method, app.url + prefix + path, json=HI) as answer:
        assert (answer.status, (await answer.json())["object"]) == (200, OBJECT_OF[path])


async def test_turns_are_answered_without_the_prefix(app: App) -> None:
    async with app.post(HI, "/responses") as answer:
        assert (await answer.json())["object"] == "response"


async def test_created_at_is_an_integer(app: App) -> None:
    async with app.post(HI) as answer:
        response = await answer.json()
    assert (type(response["created_at"]), type(response["completed_at"])) == (int, int)


async def test_healthz_says_ok(app: App) -> None:
    async with app.http.get(f"{app.url}/healthz") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/v1/responses", "/responses", "/v1/realtime"])
async def test_an_upgrade_at_a_server_without_websockets_is_a_426(app: App, path: str) -> None:
    async with app.http.get(app.url + path, headers={"upgrade": "websocket"}) as answer:
        await error_of(answer, 426)


@pytest.mark.parametrize(
    ("extensions", "sent"),
    [
        ({"websocket.http.response": {}}, ["websocket.http.response.start", "websocket.http.response.body"]),
        ({}, ["websocket.close"]),
    ],
)
async def test_an_upgrade_is_refused_as_the_server_can_do_it(extensions: Any, sent: list[str]) -> None:
    scope = {"type": "websocket", "path": "/nowhere", "headers": [], "extensions": extensions}
    async with lifespan_of(Application(lambda: some_settings())) as application:
        messages = await asgi_call(application, scope)
    assert [message["type"] for message in messages] == sent
    assert messages[0].get("status", 404) == 404


async def test_a_path_prefix_of_the_server_is_not_part_of_the_route() -> None:
    scope = {"type": "http", "method": "POST", "path": "/api/v1/responses", "root_path": "/api", "headers": []}
    async with lifespan_of(Application(lambda: some_settings())) as application:
        start, body = await asgi_call(application, scope)
    assert (start["status"], json.loads(body["body"])["error"]["type"]) == (400, "invalid_request_error")


def test_ids_have_their_form_and_never_repeat() -> None:
    new_id = Ids(lambda: 1_763_683_200.5)
    ids = [new_id("resp") for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert [each for each in ids if not re.fullmatch(r"resp_019aa3b5edf4[0-9a-f]{20}", each)] == []


async def test_the_client_may_name_its_request(app: App) -> None:
    async with app.post(HI, headers={"x-request-id": "mine-1.2:3"}) as answer:
        assert answer.headers["x-request-id"] == "mine-1.2:3"


@pytest.mark.parametrize("unfit", ["with space", "x" * 129, "über", ""])
async def test_an_unfit_request_id_is_replaced(app: App, unfit: str) -> None:
    async with app.post(HI, headers={"x-request-id": unfit}) as answer:
        assert answer.headers["x-request-id"].startswith("req_")


async def test_ignored_names_cannot_break_the_header(app: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with app.post({**HI, "a\r\nset-cookie: b": 1, "ü": 2}) as answer:
        assert answer.headers["x-responses-proxy-ignored"] == "a??set-cookie: b, ?"
    assert "\nset-cookie" not in caplog.text


# -- what the backend does before the stream ---------------------------------------------------------------------------


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_an_unreachable_backend_is_a_502_that_names_it(start_app: StartApp, body: dict[str, Any]) -> None:
    app = await start_app(upstream={"base_url": "http://127.0.0.1:1/v1", "name": "gpu-box"}, turns=PATIENT)
    async with app.post(body) as answer:
        error = await error_of(answer, 502)
    assert "'gpu-box'" in error["message"]
    assert error["code"] == "upstream_error"


@pytest.mark.parametrize(("body", "setting"), [(HI, "total_timeout_s"), (STREAM, "first_byte_timeout_s")])
async def test_a_backend_that_says_nothing_is_a_504(
    start_app: StartApp, backend: Backend, body: dict[str, Any], setting: str
) -> None:
    backend.script(Script(before=asyncio.Event()))
    app = await start_app(upstream={setting: 0.05}, turns=PATIENT)
    async with app.post(body) as answer:
        error = await error_of(answer, 504)
    assert error["code"] == "upstream_timeout"
    assert await (await backend.received()).is_let_go()


@pytest.mark.parametrize("body", [HI, STREAM])
@pytest.mark.parametrize(("status", "seen"), [(404, 404), (429, 429), (503, 503), (500, 502)])
async def test_a_refusal_keeps_its_status(
    start_app: StartApp, backend: Backend, body: dict[str, Any], status: int, seen: int
) -> None:
    backend.script(refused(status, "Not now."))
    app = await start_app(turns=PATIENT)
    async with app.post(body) as answer:
        error = await error_of(answer, seen)
    assert "Not now." in error["message"]


@pytest.mark.parametrize(("given", "kept"), [("7", "7"), ("1.5", "2"), ("3000000", "3000000")])
async def test_retry_after_is_kept_in_whole_seconds(app: App, backend: Backend, given: str, kept: str) -> None:
    backend.script(refused(429, "Later.", {"retry-after": given}))
    async with app.post(HI) as answer:
        await error_of(answer, 429)
        assert answer.headers["retry-after"] == kept


@pytest.mark.parametrize("answer_of_backend", [b"no json", b"[]", b"{}"])
async def test_a_backend_that_does_not_speak_chat_is_a_502(
    app: App, backend: Backend, answer_of_backend: bytes
) -> None:
    backend.script(Script([answer_of_backend]))
    async with app.post(HI) as answer:
        await error_of(answer, 502)


async def test_a_backend_that_gave_up_is_a_502(app: App, backend: Backend) -> None:
    backend.script(plain("half", finish="error"))
    async with app.post(HI) as answer:
        await error_of(answer, 502)


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_created_leaves_before_the_backend_has_answered(start_app: StartApp, backend: Backend) -> None:
    accepts = asyncio.Event()
    script = streamed("Hello")
    script.before = accepts
    backend.script(script)
    app = await start_app(turns=HASTY)
    async with app.post(STREAM) as answer:
        blocks = Blocks(answer)
        assert (await blocks.next()).startswith("event: response.created\n")
        assert (await blocks.next()).startswith("event: response.in_progress\n")
        accepts.set()
        events = events_in(await blocks.rest())
    assert terminal_types(events) == ["response.completed"]


async def test_text_is_passed_on_as_it_comes(app: App, backend: Backend) -> None:
    more = asyncio.Event()
    backend.script(Script([chunk(content="one"), more, chunk(content="two"), *END]))
    async with app.post(STREAM) as answer:
        blocks = Blocks(answer)
        assert '"delta":"one"' in await blocks.until("event: response.output_text.delta")
        more.set()
        assert '"delta":"two"' in await blocks.until("event: response.output_text.delta")


async def test_a_stream_is_not_to_be_cached_or_buffered(app: App, backend: Backend) -> None:
    backend.script(streamed("Hello"))
    async with app.post(STREAM) as answer:
        await answer.read()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")


async def test_a_stream_has_one_terminal_event_and_then_done(app: App, backend: Backend) -> None:
    backend.script(streamed("Hello"))
    async with app.post(STREAM) as answer:
        events = events_in(await Blocks(answer).rest())
    assert terminal_types(events) == ["response.completed"]
    assert events[-1]["type"] == "response.completed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (refused(429, "Later."), "rate_limit_exceeded"),
        (refused(400, "This model's maximum context length is 10 tokens."), "context_length_exceeded"),
    ],
)
async def test_a_refusal_after_created_is_a_failed_response_with_its_code(
    start_app: StartApp, backend: Backend, script: Script, code: str
) -> None:
    refuses = asyncio.Event()
    backend.script(dataclasses.replace(script, before=refuses))
    app = await start_app(turns=HASTY)
    async with app.post(STREAM) as answer:
        blocks = Blocks(answer)
        await blocks.until("event: response.created")
        refuses.set()
        response = events_in(await blocks.rest())[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", code)


async def test_an_error_in_the_middle_keeps_what_was_said(app: App, backend: Backend) -> None:
    breaks = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), breaks, sse({"error": {"message": "CUDA", "code": 500}})]))
    async with app.post(STREAM) as answer:
        blocks = Blocks(answer)
        await blocks.until("event: response.output_text.delta")
        breaks.set()
        events = events_in(await blocks.rest())
    assert terminal_types(events) == ["response.failed"]
    response = events[-1]["response"]
    assert response["error"]["code"] == "server_error"
    assert response["output"][0]["content"][0]["text"] == "Hel"
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("end", ["cut", "whole"])
async def test_a_stream_that_ends_without_a_finish_reason_failed(app: App, backend: Backend, end: str) -> None:
    backend.script(Script([chunk(content="Hel")], end=end))
    assert (await failure_of(app))["code"] == "server_error"


async def test_a_stream_that_is_cut_after_its_finish_reason_failed_or_completed_once(
    app: App, backend: Backend
) -> None:
    backend.script(Script([chunk(content="Hello"), chunk("stop")], end="cut"))
    async with app.post(STREAM) as answer:
        events = events_in(await Blocks(answer).rest())
    assert len(terminal_types(events)) == 1


async def test_a_stream_with_a_finish_reason_needs_no_done(app: App, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hello"), chunk("stop")]))
    async with app.post(STREAM) as answer:
        events = events_in(await Blocks(answer).rest())
    assert terminal_types(events) == ["response.completed"]


async def test_a_chunk_that_is_no_json_fails_the_response(app: App, backend: Backend) -> None:
    backend.script(Script([b"data: {oops\n\n"]))
    assert (await failure_of(app))["code"] == "server_error"


async def test_a_backend_that_falls_silent_fails_the_response(start_app: StartApp, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))
    app = await start_app(upstream={"idle_timeout_s": 0.05})
    assert "sent nothing" in (await failure_of(app))["message"]
    assert await (await backend.received()).is_let_go()


async def test_comments_keep_a_stream_alive_before_the_first_byte(start_app: StartApp, backend: Backend) -> None:
    accepts = asyncio.Event()
    script = streamed("Hello")
    script.before = accepts
    backend.script(script)
    app = await start_app(turns=HASTY, server={"keepalive_s": 0.01})
    async with app.post(STREAM) as answer:
        blocks = Blocks(answer)
        assert await blocks.until(":") == ": keepalive\n\n"
        assert await blocks.next() == ": keepalive\n\n"
        accepts.set()
        events = events_in(await blocks.rest())
    assert terminal_types(events) == ["response.completed"]


async def test_comments_keep_a_stream_alive_in_the_middle(start_app: StartApp, backend: Backend) -> None:
    more = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), more, chunk(content="lo"), *END]))
    app = await start_app(server={"keepalive_s": 0.01})
    async with app.post(STREAM) as answer:
        blocks = Blocks(answer)
        await blocks.until("event: response.output_text.delta")
        assert await blocks.next() == ": keepalive\n\n"
        more.set()
        events = events_in(await blocks.rest())
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


async def test_a_connection_is_used_again_after_a_stream(app: App, backend: Backend) -> None:
    backend.script(streamed("Hello"), plain("Hi"))
    async with app.post(STREAM) as answer:
        await answer.read()
    async with app.post(HI) as answer:
        assert (await answer.json())["status"] == "completed"


# -- clients that leave ------------------------------------------------------------------------------------------------


async def test_leaving_a_flowing_stream_ends_the_upstream_request(app: App, backend: Backend) -> None:
    backend.script(Script(itertools.repeat(chunk(content="and on "))))
    async with app.post(STREAM) as answer:
        await Blocks(answer).until("event: response.output_text.delta")
        answer.close()
    assert await (await backend.received()).is_let_go()


async def test_leaving_a_silent_stream_ends_the_upstream_request(app: App, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))
    async with app.post(STREAM) as answer:
        await Blocks(answer).until("event: response.output_text.delta")
        answer.close()
    assert await (await backend.received()).is_let_go()


async def test_leaving_a_stream_that_is_not_accepted_yet_ends_the_upstream_request(
    start_app: StartApp, backend: Backend
) -> None:
    backend.script(Script(before=asyncio.Event()))
    app = await start_app(turns=HASTY)
    async with app.post(STREAM) as answer:
        await Blocks(answer).until("event: response.created")
        answer.close()
    assert await (await backend.received()).is_let_go()


@pytest.mark.parametrize("script", [Script(before=asyncio.Event()), Script([b"{"], end="silent")])
async def test_leaving_a_plain_request_ends_the_upstream_request(app: App, backend: Backend, script: Script) -> None:
    backend.script(script)
    asking = asyncio.ensure_future(app.http.post(f"{app.url}/v1/responses", json=HI))
    request = await backend.received()
    asking.cancel()
    assert await request.is_let_go()


async def test_leaving_before_created_ends_the_upstream_request(start_app: StartApp, backend: Backend) -> None:
    backend.script(Script(before=asyncio.Event()))
    app = await start_app(turns=PATIENT)
    asking = asyncio.ensure_future(app.http.post(f"{app.url}/v1/responses", json=STREAM))
    request = await backend.received()
    asking.cancel()
    assert await request.is_let_go()


async def test_leaving_in_the_middle_of_the_body_is_no_fault(app: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _, writer = await asyncio.open_connection("127.0.0.1", int(app.url.rpartition(":")[2]))
    writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await becomes_true(lambda: "client left" in caplog.text)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


async def becomes_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - a log has no event to wait for
            await asyncio.sleep(0.005)


async def test_a_client_that_leaves_is_no_fault(app: App, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backend.script(Script([chunk(content="Hel")], end="silent"))
    for body in (HI, STREAM):
        asking = asyncio.ensure_future(app.http.post(f"{app.url}/v1/responses", json=body))
        await backend.received()
        asking.cancel()
        await asyncio.wait({asking})
    await becomes_true(lambda: caplog.text.count("client left") == 2)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_client_that_stays_did_not_leave(app: App, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backend.script(streamed("Hello"), plain())
    for body in (STREAM, HI):
        async with app.post(body) as answer:
            await answer.read()
    assert "client left" not in caplog.text


async def test_a_server_that_cannot_send_ends_the_upstream_request(backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(STREAM).encode()}

    async def send(message: dict[str, Any]) -> None:
        raise ConnectionError

    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": []}
    async with lifespan_of(Application(lambda: settings_of(backend.url))) as application:
        with pytest.raises(ExceptionGroup):
            await application(scope, receive, send)
        assert await (await backend.received()).is_let_go()


async def test_a_client_that_reads_slowly_gets_everything(app: App, backend: Backend) -> None:
    text = "x" * 10_000
    backend.script(streamed(*[text] * 300))
    async with app.post(STREAM) as answer:
        blocks = Blocks(answer)
        await blocks.until("event: response.output_text.delta")
        await backend.received()
        events = events_in(await blocks.rest())
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text * 300


# -- a process that stops ----------------------------------------------------------------------------------------------


async def test_a_stream_that_is_stopped_while_it_is_kept_says_that_it_completed(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.script(streamed("Hello"))
    saving = controlled("save", monkeypatch)
    saving.may_begin.clear()
    given = iter([{"type": "http.request", "body": json.dumps(STREAM).encode()}])
    sent: list[bytes] = []

    async def receive() -> Any:
        return next(given, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": []}
    async with lifespan_of(Application(lambda: settings_of(backend.url))) as application:
        answering = asyncio.ensure_future(application(scope, receive, send))
        await saving.once_more("asked")
        answering.cancel()
        saving.may_begin.set()
        with pytest.raises(asyncio.CancelledError):
            await answering
    events = events_in(b"".join(sent).decode().split("\n\n")[:-1])
    parse(events)
    assert (check(events)["status"], terminal_types(events)) == ("completed", ["response.completed"])


# -- faults of this program --------------------------------------------------------------------------------------------


def breaks(self: ResponseStream, *_: Any) -> Any:
    raise RuntimeError("the inner secret")


async def test_a_fault_is_a_500_that_names_the_request(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ResponseStream, "feed", breaks)
    async with app.post(HI) as answer:
        error = await error_of(answer, 500)
        text = await answer.text()
    assert error["type"] == "server_error"
    assert answer.headers["x-request-id"] in error["message"]
    assert answer.headers["x-request-id"] in caplog.text
    assert "Traceback" not in text
    assert "inner secret" not in text


async def test_a_fault_in_a_stream_is_a_failed_response(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))
    monkeypatch.setattr(ResponseStream, "feed", breaks)
    error = await failure_of(app)
    assert error["code"] == "server_error"
    assert "inner secret" not in error["message"]
    assert await (await backend.received()).is_let_go()


async def test_a_fault_that_cannot_be_told_cuts_the_stream(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ResponseStream, "feed", breaks)
    monkeypatch.setattr(ResponseStream, "fail", breaks)
    async with app.post(STREAM) as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    assert answer.headers["x-request-id"] in caplog.text


# -- logs --------------------------------------------------------------------------------------------------------------


async def test_no_secret_is_logged(start_app: StartApp, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = await start_app(upstream={"api_key": "sk-backend", "headers": {"x-more": "sk-header"}})
    backend.script(plain("an answer"), streamed("an answer"), refused(500, "No."), Script([chunk(content="Hel")]))
    for extra in ({}, {"stream": True}, {}, {"stream": True}):
        body = {"model": "m", "input": "a prompt", "seed": 1, **extra}
        async with app.post(body, headers={"authorization": "Bearer sk-client"}) as answer:
            await answer.read()
    assert (await backend.received()).headers["authorization"] == "Bearer sk-backend"
    assert len(caplog.records) >= 4
    for secret in ("sk-backend", "sk-header", "sk-client", "a prompt", "an answer"):
        assert secret not in caplog.text


# -- the application under any server ----------------------------------------------------------------------------------


def some_settings() -> Settings:
    from_nowhere = {"base_url": "http://127.0.0.1:1/v1", "dialect": "generic"}
    return load_settings(None, {}, {"upstream": from_nowhere})


async def asgi_call(application: Any, scope: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await application(scope, receive, send)
    return sent


class lifespan_of:
    """Runs an application's lifespan around a block, as a server does."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._stops = asyncio.Event()
        self._started = asyncio.Event()
        self.sent: list[Any] = []

    async def __aenter__(self) -> Application:
        messages = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> dict[str, Any]:
            if (kind := next(messages)) == "lifespan.shutdown":
                await self._stops.wait()
            return {"type": kind}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)
            self._started.set()

        self._running = asyncio.ensure_future(self._application({"type": "lifespan"}, receive, send))
        await self._started.wait()
        return self._application

    async def __aexit__(self, *_: Any) -> None:
        self._stops.set()
        await self._running


async def test_the_lifespan_starts_and_stops() -> None:
    lifespan = lifespan_of(Application(some_settings))
    async with lifespan:
        pass
    assert [message["type"] for message in lifespan.sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_settings_without_a_backend_fail_the_start() -> None:
    lifespan = lifespan_of(Application(Settings))
    async with lifespan:
        pass
    (message,) = lifespan.sent
    assert message["type"] == "lifespan.startup.failed"
    assert "no upstream" in message["message"]


async def test_a_server_without_lifespan_is_told_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="lifespan"):
        await asgi_call(Application(some_settings), {"type": "http"})


# -- purges ------------------------------------------------------------------------------------------------------------

LOCKED = StoreError("The store of responses is locked.")
FAULT = RuntimeError("a fault")


@pytest.mark.parametrize(
    ("failure", "logged"),
    [
        (LOCKED, ("WARNING", "could not purge: The store of responses is locked.", None)),
        (FAULT, ("ERROR", "could not purge", FAULT)),
    ],
    ids=["store", "fault"],
)
async def test_a_purge_that_fails_is_logged_and_made_again(
    start_app: StartApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: Any, logged: Any
) -> None:
    monkeypatch.setattr("upkeep.PURGE_EVERY_S", 0.001)
    purging = controlled("purge", monkeypatch)
    purging.failure = failure
    await start_app()
    await purging.once_more("failed", times=2)
    purging.failure = None
    await purging.once_more("done", times=2)
    seen = [
        (record.levelname, record.getMessage(), record.exc_info and record.exc_info[1])
        for record in caplog.records
        if record.name == "responses_proxy.upkeep"
    ]
    assert (len(seen) >= 2, [each for each in seen if each != logged]) == (True, [])


# -- signals -----------------------------------------------------------------------------------------------------------


class Stoppable:
    """Counts how often it was told to stop."""

    def __init__(self) -> None:
        self.told = 0

    def begin_to_stop(self) -> None:
        self.told += 1


@pytest.fixture
def servers_handler() -> Iterator[list[int]]:
    """The signals that the handler of a server was called with."""
    before = signal.getsignal(signal.SIGTERM)
    called: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    yield called
    signal.signal(signal.SIGTERM, before)


async def test_a_signal_is_told_before_the_server_ends(servers_handler: list[int]) -> None:
    found, background = signal.getsignal(signal.SIGTERM), Stoppable()
    with told_to_stop(cast(Background, background)):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        assert (background.told, servers_handler) == (1, [signal.SIGTERM])
    assert signal.getsignal(signal.SIGTERM) is found


async def test_two_applications_that_end_out_of_order_are_both_told(servers_handler: list[int]) -> None:
    first, second = Stoppable(), Stoppable()
    with contextlib.ExitStack() as outer, contextlib.ExitStack() as inner:
        outer.enter_context(told_to_stop(cast(Background, first)))
        inner.enter_context(told_to_stop(cast(Background, second)))
        outer.close()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        assert (second.told, servers_handler) == (1, [signal.SIGTERM])
