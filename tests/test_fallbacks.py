"""Backends in place of one that fails: when, in which form, and what a client sees of it; and their places."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import openai
import pytest
from compacting import LOW, Talker, answered, chain, each_mode, ended, turn, until
from conftest import App, no_task_is_left, running_app, settings_of
from event_grammar import check, parse
from scripted import DEADLINE_S, DONE, Backend, Script, chunk, plain, refused, sse, streamed

from upstream import UpstreamSettings

Json = dict[str, Any]
HI: Json = {"model": "m", "input": "Hi"}
TINY_S = 0.05
Start = Callable[..., Awaitable[App]]


@pytest.fixture
async def backend() -> AsyncIterator[Talker]:
    async with Talker().running() as backend:
        yield backend


@pytest.fixture
async def second() -> AsyncIterator[Talker]:
    async with Talker().running() as backend:
        yield backend


@pytest.fixture
async def start(backend: Talker, second: Talker) -> AsyncIterator[Start]:
    """Starts the proxy with "first" and "second", which answers in its place: `await start({...}, {...}, {...})`.

    The tables are settings of the two, and of more that come after them; sections are given by name.
    """
    async with AsyncExitStack() as stack:

        async def started(*tables: Json, **sections: Json) -> App:
            urls = itertools.chain([backend.url, second.url], itertools.repeat(second.url))
            names = ("first", "second", "third")
            upstreams = []
            for name, url, table in itertools.zip_longest(names[: max(len(tables), 2)], urls, tables, fillvalue={}):
                if not name:
                    break
                more = {"fallback": ("second",)} if name == "first" else {}
                given = {"dialect": "generic", "retries": 0, "name": name, "base_url": url, **more, **table}
                upstreams.append(UpstreamSettings(**given))
            settings = replace(settings_of(backend.url, **sections), upstream=tuple(upstreams))
            return await stack.enter_async_context(running_app(settings))

        yield started
    await no_task_is_left()


def says(text: str) -> Callable[[Json], Script]:
    """An answer in the form that was asked for."""
    return lambda body: streamed(text) if body.get("stream") else plain(text)


def always(script: Callable[[], Script]) -> Callable[[Json], Script]:
    return lambda _: script()


def text_of(response: Json) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


async def told(app: App, **body: Any) -> list[Json]:
    """The events of a stream, held to the grammar."""
    async with app.post({**HI, "stream": True, **body}) as answer:
        assert answer.status == 200, await answer.text()
        lines = [line async for line in answer.content]
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    parse(events)
    check(events)
    return events


# -- what sends a request on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
@each_mode
async def test_a_refusal_that_is_not_the_requests_fault_goes_on(
    start: Start, backend: Talker, second: Talker, mode: str, status: int
) -> None:
    backend.answer, second.answer = always(lambda: refused(status, "oh")), says("from the second")
    response = await turn(await start(), mode, "Hi")
    assert (response["status"], text_of(response)) == ("completed", "from the second")


def dropped() -> Script:
    return Script(end="cut")


FAULTS: dict[str, Callable[[], Script]] = {
    "an answer that is cut": dropped,
    "garbage": lambda: Script([b"<html>"]),
    "an error in an answer": lambda: Script([sse({"error": {"message": "oh", "code": 500}})]),
    "nothing": Script,
}


@pytest.mark.parametrize("fault", FAULTS)
@each_mode
async def test_an_answer_that_says_nothing_goes_on(
    start: Start, backend: Talker, second: Talker, mode: str, fault: str
) -> None:
    backend.answer, second.answer = always(FAULTS[fault]), says("from the second")
    assert text_of(await turn(await start(), mode, "Hi")) == "from the second"


@each_mode
async def test_nobody_listening_goes_on(start: Start, second: Talker, unused_tcp_port: int, mode: str) -> None:
    second.answer = says("from the second")
    app = await start({"base_url": f"http://127.0.0.1:{unused_tcp_port}/v1", "models": ("m",)})
    assert text_of(await turn(app, mode, "Hi")) == "from the second"


@each_mode
async def test_a_backend_that_says_nothing_in_time_goes_on(
    start: Start, backend: Talker, second: Talker, mode: str
) -> None:
    backend.answer = always(lambda: Script(before=asyncio.Event()))
    second.answer = says("from the second")
    app = await start({"first_byte_timeout_s": TINY_S, "total_timeout_s": TINY_S})
    assert text_of(await turn(app, mode, "Hi")) == "from the second"
    assert await (await backend.received()).is_let_go()


async def test_a_stream_that_only_opens_an_answer_goes_on_as_the_same_response(
    start: Start, backend: Talker, second: Talker
) -> None:
    backend.answer = always(lambda: Script([chunk(role="assistant", content="")], end="cut"))
    second.answer = says("from the second")
    events = await told(await start())
    assert [event["type"] for event in events[:3]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    assert text_of(events[-1]["response"]) == "from the second"


async def test_retries_come_before_the_fallback(start: Start, backend: Talker, second: Talker) -> None:
    backend.answer = always(lambda: refused(503, "later"))
    await turn(await start({"retries": 2, "retry_backoff_s": 0.0}), "plain", "Hi")
    assert (len(backend.requests), len(second.requests)) == (3, 1)


async def test_the_list_is_gone_through_once_and_the_last_word_is_told(
    start: Start, backend: Talker, second: Talker
) -> None:
    backend.answer = second.answer = always(lambda: refused(503, "later"))
    app = await start({"fallback": ("second", "third")}, {"fallback": ("first", "third")}, {"fallback": ("first",)})
    async with app.post(HI) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["message"]) == (503, "Upstream 'third' answered 503: later")
    assert (len(backend.requests), len(second.requests)) == (1, 2)


# -- what does not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 422])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_of_the_request_stays_where_it_is(
    start: Start, backend: Talker, second: Talker, status: int, stream: bool
) -> None:
    backend.answer = always(lambda: refused(status, "no"))
    async with (await start(turns={"created_after_ms": 60_000})).post({**HI, "stream": stream}) as answer:
        assert answer.status == status
    assert second.requests == []


async def test_a_full_window_stays_where_it_is(start: Start, backend: Talker, second: Talker) -> None:
    backend.answer = always(lambda: refused(400, "full", code="context_length_exceeded"))
    async with (await start(compaction={"on_overflow": False})).post(HI) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "context_length_exceeded")
    assert second.requests == []


@pytest.mark.parametrize(
    "said",
    [
        chunk(content="Hel"),
        chunk(content=" "),
        chunk(reasoning_content="Hm"),
        chunk(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]),
    ],
)
@pytest.mark.parametrize("mode", ["streamed", "background"])
async def test_a_backend_that_has_spoken_is_not_replaced(
    start: Start, backend: Talker, second: Talker, mode: str, said: bytes
) -> None:
    backend.answer = always(lambda: Script([said], end="cut"))
    response = await turn(await start(), mode, "Hi")
    assert (response["status"], second.requests) == ("failed", [])


async def test_without_a_fallback_the_refusal_is_the_answer(start: Start, backend: Talker, second: Talker) -> None:
    backend.answer = always(lambda: refused(503, "later", {"Retry-After": "7"}))
    async with (await start({"fallback": ()})).post(HI) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (503, "7")
    assert second.requests == []


async def test_a_fallback_that_does_not_know_the_model_says_nothing_to_the_client(
    start: Start, backend: Talker, second: Talker
) -> None:
    backend.answer, second.answer = always(lambda: refused(503, "later")), always(lambda: refused(404, "no model"))
    async with (await start()).post(HI) as answer:
        assert (answer.status, (await answer.json())["error"]["message"]) == (
            503,
            "Upstream 'first' answered 503: later",
        )


# -- in which form -----------------------------------------------------------------------------------------------------


async def test_the_request_is_rendered_anew_for_the_other_backend(
    start: Start, backend: Talker, second: Talker
) -> None:
    backend.answer = always(lambda: refused(503, "later"))
    app = await start(
        {"aliases": {"nick": "m-first"}, "dialect": "mistral"}, {"aliases": {"nick": "m-second"}, "dialect": "openai"}
    )
    async with app.post({"model": "nick", "input": "Hi", "max_output_tokens": 99}) as answer:
        assert (await answer.json())["model"] == "nick"
    bodies = [(await each.received()).body for each in (backend, second)]
    assert [body["model"] for body in bodies] == ["m-first", "m-second"]
    assert [body.get("max_tokens") for body in bodies] == [99, None]
    assert bodies[1]["max_completion_tokens"] == 99


async def test_a_name_without_an_alias_there_is_the_clients(start: Start, backend: Talker, second: Talker) -> None:
    backend.answer = always(lambda: refused(503, "later"))
    app = await start({"aliases": {"nick": "m-first"}})
    await turn(app, "plain", "Hi", model="nick")
    assert (await second.received()).body["model"] == "nick"


async def test_what_is_left_out_is_told_of_the_backend_that_answered(
    start: Start, backend: Talker, second: Talker
) -> None:
    backend.answer = always(lambda: refused(503, "later"))
    app = await start({"dialect": "mistral"}, {"dialect": "openai"})
    async with app.post({**HI, "presence_penalty": 0.5, "seed": 1}) as answer:
        response = await answer.json()
        assert answer.headers["x-responses-proxy-ignored"] == "seed"
        assert answer.headers["x-responses-proxy-upstream"] == "second"
    assert (await second.received()).body["presence_penalty"] == 0.5
    assert response["status"] == "completed"


async def test_a_plain_answer_names_its_backend(start: Start) -> None:
    async with (await start({"name": "f\u00fcnf", "fallback": ()})).post(HI) as answer:
        assert answer.headers["x-responses-proxy-upstream"] == "f?nf"


async def test_a_backend_that_cannot_be_given_the_request_is_passed_over(
    start: Start, backend: Talker, second: Talker
) -> None:
    backend.answer = always(lambda: refused(503, "later"))
    app = await start({"fallback": ("second", "third")}, {"dialect": "ollama"}, {"dialect": "openai"})
    picture = {"type": "input_image", "image_url": "https://example.org/cat.png"}
    async with app.post({**HI, "input": [{"role": "user", "content": [picture]}]}) as answer:
        assert (answer.status, answer.headers["x-responses-proxy-upstream"]) == (200, "third")
    assert len(second.requests) == 1


async def test_reasoning_is_found_as_the_other_backend_writes_it(start: Start, backend: Talker, second: Talker) -> None:
    backend.answer = always(lambda: refused(503, "later"))
    second.answer = lambda body: streamed("Hm", "</think>Hello")
    response = (await told(await start({"think": "off"}, {"think": "open"})))[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert text_of(response) == "Hello"


@each_mode
async def test_the_clients_key_stays_with_the_backend_that_it_speaks_to(
    start: Start, backend: Talker, second: Talker, mode: str
) -> None:
    backend.answer = always(lambda: refused(503, "later"))
    app = await start({}, {"api_key": "of-the-second"}, auth={"mode": "passthrough"})
    await turn(app, mode, "Hi")
    keys = [(await each.received()).headers["authorization"] for each in (backend, second)]
    assert keys == ["Bearer client-key", "Bearer of-the-second"]


async def test_a_list_does_not_draw_the_clients_key_to_a_backend(start: Start, second: Talker) -> None:
    second.models = {"data": [{"id": "listed"}]}
    app = await start(auth={"mode": "passthrough"})
    await turn(app, "plain", "Hi", model="listed")
    assert "authorization" not in (await second.received()).headers


# -- windows and records -----------------------------------------------------------------------------------------------


def counted(body: Json) -> Script:
    """An answer that is said to have taken very many tokens."""
    return answered(body, "from a backend that counts otherwise", output_tokens=90_000)


@each_mode
async def test_what_the_other_backend_counted_is_no_base_for_the_next_turn(
    start: Start, backend: Talker, second: Talker, mode: str
) -> None:
    app = await start()
    backend.answer, second.answer = always(lambda: refused(503, "later")), counted
    response = await turn(app, mode, "Hi")
    assert response["usage"]["output_tokens"] == 90_000
    body = {"model": "m", "previous_response_id": response["id"], "input": "And?"}
    async with app.post(body, "/v1/responses/input_tokens") as answer:
        assert (await answer.json())["input_tokens"] < 1000


async def test_what_the_models_own_backend_counted_is_no_base_for_the_other_one(
    start: Start, backend: Talker, second: Talker
) -> None:
    app = await start({}, {"window_tokens": 4000}, compaction={"threshold_fraction": 0.8})
    backend.answer, second.answer = counted, says("from the second")
    response = await turn(app, "plain", "Hi")
    backend.answer = always(lambda: refused(503, "later"))
    response = await turn(app, "plain", "And?", previous_response_id=response["id"])
    assert [item["type"] for item in response["output"]] == ["message"]


async def test_a_window_that_is_too_full_for_the_other_backend_is_compacted(
    start: Start, backend: Talker, second: Talker
) -> None:
    app = await start({}, {"window_tokens": 1000}, compaction={"threshold_fraction": 0.8})
    last = await chain(app, 3)
    backend.answer = always(lambda: refused(503, "later"))
    backend.record = backend.answer
    for mode in ("plain", "streamed"):
        response = await turn(app, mode, "FACT 9: red.", previous_response_id=last["id"])
        assert [item["type"] for item in response["output"]] == ["compaction", "message"]
        assert response["status"] == "completed"
    assert len(second.records) >= 2


async def test_a_record_is_written_by_another_backend_too(start: Start, backend: Talker, second: Talker) -> None:
    app = await start(compaction=LOW, auth={"mode": "passthrough"})
    backend.record = always(lambda: refused(503, "later"))
    response = await chain(app, 2)
    assert "compaction" in [item["type"] for item in response["output"]]
    keys = {each.headers.get("authorization") for each in second.requests}
    assert (len(second.records) >= 1, second.turns, keys) == (True, [], {None})


# -- places ------------------------------------------------------------------------------------------------------------

ONE_PLACE: Json = {"max_in_flight": 1, "queue_wait_s": TINY_S}


@contextlib.asynccontextmanager
async def busy(app: App, backend: Talker) -> AsyncIterator[asyncio.Event]:
    """While a stream of the backend is in the middle of its answer; the event ends it."""
    goes_on = asyncio.Event()
    backend.answer = lambda _: Script([chunk(content="Hel"), goes_on, chunk(content="lo"), chunk("stop"), DONE])
    reading = asyncio.create_task(told(app))
    await backend.received()
    backend.answer = says("from the first")
    try:
        yield goes_on
    finally:
        goes_on.set()
        assert text_of((await reading)[-1]["response"]) == "Hello"


@each_mode
async def test_a_stream_has_its_place_to_its_end_and_others_go_on(
    start: Start, backend: Talker, second: Talker, mode: str
) -> None:
    second.answer = says("from the second")
    app = await start(ONE_PLACE)
    async with busy(app, backend):
        assert text_of(await turn(app, mode, "Hi")) == "from the second"
    assert text_of(await turn(app, mode, "Hi")) == "from the first"


async def test_who_waits_is_served_when_a_place_becomes_free(start: Start, backend: Talker, second: Talker) -> None:
    app = await start({**ONE_PLACE, "queue_wait_s": 60.0})
    async with busy(app, backend) as goes_on:
        waiting = [asyncio.create_task(turn(app, mode, "Hi")) for mode in ("plain", "streamed")]
        goes_on.set()
        assert [text_of(response) for response in await asyncio.gather(*waiting)] == ["from the first"] * 2
    assert second.requests == []


@pytest.mark.parametrize("line", [{"queue_wait_s": TINY_S}, {"queue_wait_s": 60.0, "max_waiting": 0}])
async def test_a_wait_that_is_too_long_is_a_503_that_clients_try_again(
    start: Start, backend: Talker, line: Json
) -> None:
    app = await start({**ONE_PLACE, "fallback": (), **line}, turns={"created_after_ms": 60_000})
    async with busy(app, backend):
        for stream in (False, True):
            async with app.post({**HI, "stream": stream}) as answer:
                error = (await answer.json())["error"]
            assert (answer.status, answer.headers["retry-after"], error["code"]) == (503, "2", "upstream_busy")
            assert error["type"] == "server_error"


async def test_a_wait_that_is_too_long_after_a_stream_began_fails_it(start: Start, backend: Talker) -> None:
    app = await start({**ONE_PLACE, "fallback": ()}, turns={"created_after_ms": 0})
    async with busy(app, backend):
        last = (await told(app))[-1]
    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "server_error")


async def test_a_background_response_stands_in_line_for_as_long_as_it_takes(start: Start, backend: Talker) -> None:
    app = await start({**ONE_PLACE, "fallback": (), "max_waiting": 0, "queue_wait_s": 0.0})
    async with busy(app, backend):
        queued = await app.openai.responses.create(**HI, background=True)
        with pytest.raises(openai.InternalServerError):
            await app.openai.responses.create(**HI)
    assert text_of((await ended(app.openai, queued.id)).to_dict()) == "from the first"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_gives_its_place_back(start: Start, backend: Talker, stream: bool) -> None:
    app = await start({**ONE_PLACE, "fallback": (), "queue_wait_s": DEADLINE_S})
    backend.answer = always(lambda: Script([chunk(content="Hel")], end="silent"))
    leaving = asyncio.create_task(app.post({**HI, "stream": stream}).__aenter__())
    request = await backend.received()
    if stream:
        (await leaving).close()
    leaving.cancel()
    await asyncio.wait({leaving})
    assert await request.is_let_go()
    backend.answer = says("from the first")
    assert text_of(await turn(app, "plain", "Hi")) == "from the first"


# -- circuits ----------------------------------------------------------------------------------------------------------


async def test_a_backend_that_fails_again_and_again_is_left_alone(
    start: Start, backend: Talker, second: Talker
) -> None:
    backend.answer = always(lambda: refused(500, "oh"))
    app = await start({"circuit_failures": 2, "circuit_open_s": 60.0})
    for _ in range(5):
        await turn(app, "plain", "Hi")
    assert (len(backend.requests), len(second.requests)) == (2, 5)


async def test_a_backend_that_works_again_is_asked_again(start: Start, backend: Talker) -> None:
    backend.answer = always(lambda: refused(500, "oh"))
    app = await start({"circuit_failures": 1, "circuit_open_s": TINY_S})
    await turn(app, "plain", "Hi")
    backend.answer = says("from the first")
    await until(lambda: is_answered_by(app, "from the first"))
    assert [text_of(await turn(app, "plain", "Hi")) for _ in range(3)] == ["from the first"] * 3


async def is_answered_by(app: App, text: str) -> bool:
    return text_of(await turn(app, "plain", "Hi")) == text


@pytest.mark.parametrize("script", [dropped, lambda: Script([chunk(content="Hel")]), lambda: Script([b"data: {"])])
async def test_streams_that_break_open_the_circuit(
    start: Start, backend: Talker, second: Talker, script: Callable[[], Script]
) -> None:
    backend.answer = always(script)
    app = await start({"circuit_failures": 2, "circuit_open_s": 60.0})
    for _ in range(4):
        await told(app)
    assert len(backend.requests) == 2


async def test_a_backend_without_a_fallback_is_used_as_soon_as_it_is_back(start: Start, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}/v1"
    app = await start({"base_url": url, "models": ("m",), "fallback": (), "circuit_failures": 1})
    for _ in range(3):
        async with app.post(HI) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (502, "upstream_error")
    back = Backend()
    server = await asyncio.start_server(back._connected, sock=_listener(unused_tcp_port))
    async with server:
        assert text_of(await turn(app, "plain", "Hi")) == "Hello there."
        for task in list(back._tasks):
            task.cancel()


def _listener(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


async def test_a_backend_without_a_fallback_that_does_not_answer_in_time_is_a_503_at_once(
    start: Start, backend: Talker
) -> None:
    backend.answer = always(lambda: Script(before=asyncio.Event()))
    app = await start({"fallback": (), "circuit_failures": 1, "circuit_open_s": 60.0, "total_timeout_s": TINY_S})
    async with app.post(HI) as answer:
        assert answer.status == 504
    async with app.post(HI) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, answer.headers["retry-after"], error["code"]) == (503, "60", "upstream_unavailable")
    assert len(backend.requests) == 1
