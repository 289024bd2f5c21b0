"""Idempotency-Key through the running proxy: what is sent twice is carried out once, and what failed is forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import pytest
import uvicorn
from conftest import App, StartApp, at, both_stores, listening_socket, settings_of
from event_grammar import check, parse
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from scripted import (
    DEADLINE_S,
    END,
    Backend,
    Script,
    call_delta,
    chunk,
    plain,
    plain_call,
    refused,
    streamed,
    streamed_calls,
)
from store_places import MemoryPlace, Place
from test_proxy import Blocks, error_of, events_in

from counting import Counter
from edge import Edge
from leases import Leases
from metrics import Metrics
from observing import Observer
from outermost import Outermost
from routing import Upstreams
from services import make_seals, make_services, opened_store
from sources import Ids, Sources
from turns import Means
from watching import Watcher

pytestmark = both_stores
Json = dict[str, Any]
HI: Json = {"model": "m", "input": "Hi"}
STREAM: Json = {**HI, "stream": True}
KEY = {"Idempotency-Key": "k-1"}
REPLAYED = "idempotent-replayed"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
DAY_S = 24 * 3600
IN_USE = {
    "message": "A request with this Idempotency-Key is still being answered.",
    "type": "invalid_request_error",
    "param": None,
    "code": "idempotency_key_in_use",
}


@contextlib.asynccontextmanager
async def asked(app: App, body: Json, headers: Mapping[str, str] = KEY) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to a request, which is repeated for as long as its key is in use."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with app.post(body, headers=headers) as answer:
                if answer.status != 409:
                    yield answer
                    return
            await asyncio.sleep(0.01)


async def sent(app: App, body: Json = HI, **headers: str) -> tuple[Json, str | None]:
    """The response to a plain request with the key, and whether it says that it was given before."""
    async with asked(app, body, {**KEY, **headers}) as answer:
        assert answer.status == 200, await answer.text()
        response: Json = await answer.json()
        return response, answer.headers.get(REPLAYED)


async def sent_streamed(app: App, body: Json = STREAM) -> tuple[Json, str | None]:
    """The response at the end of a whole, valid stream, and whether it says that it was given before."""
    async with asked(app, body) as answer:
        events = events_in(await Blocks(answer).rest())
    parse(events)
    return check(events), answer.headers.get(REPLAYED)


def held(script: Script) -> tuple[Script, asyncio.Event]:
    """A script that begins when the event is set."""
    script.before = asyncio.Event()
    return script, script.before


# -- the same request --------------------------------------------------------------------------------------------------


async def test_the_same_request_gets_the_same_response(app: App, backend: Backend) -> None:
    first, is_first_replayed = await sent(app)
    again, is_replayed = await sent(app)
    assert (again, is_first_replayed, is_replayed, len(backend.requests)) == (first, None, "true", 1)


@pytest.mark.parametrize("body", [HI, STREAM], ids=["plain", "stream"])
async def test_what_was_left_out_is_named_again(app: App, backend: Backend, body: Json) -> None:
    backend.script(streamed("Hi") if "stream" in body else plain())
    named = []
    for _ in range(2):
        async with asked(app, {**body, "seed": 1, "tools": [{"type": "web_search"}]}) as answer:
            await answer.read()
            named.append((answer.headers.get(REPLAYED), answer.headers.get("x-responses-proxy-ignored")))
    assert named == [(None, "seed, tools[0].type=web_search"), ("true", "seed, tools[0].type=web_search")]


@pytest.mark.parametrize("body", [HI, STREAM], ids=["plain", "stream"])
async def test_a_client_that_has_the_whole_answer_is_not_told_that_it_is_still_running(
    app: App, backend: Backend, body: Json
) -> None:
    backend.script(streamed("Hi") if "stream" in body else plain())
    statuses = []
    for _ in range(10):
        async with app.post(body, headers=KEY) as answer:
            await answer.read()
            statuses.append(answer.status)
    assert statuses == [200] * 10


async def test_a_request_without_the_key_is_carried_out_each_time(app: App, backend: Backend) -> None:
    for _ in range(2):
        async with app.post(HI) as answer:
            assert (answer.status, answer.headers.get(REPLAYED)) == (200, None)
    assert len(backend.requests) == 2


async def test_another_key_is_another_request(app: App, backend: Backend) -> None:
    (first, _), (second, is_replayed) = await sent(app), await sent(app, HI, **{"Idempotency-Key": "k-2"})
    assert (first["id"] != second["id"], is_replayed, len(backend.requests)) == (True, None, 2)


STREAMS = {
    "text": streamed("Hel", "lo"),
    "nothing": Script([chunk(role="assistant", content=""), *END]),
    "reasoning": Script(
        [chunk(reasoning_content="Let me "), chunk(reasoning_content="think."), chunk(content="Hi"), *END]
    ),
    "calls": streamed_calls(
        call_delta(0, "", "weather", "call_a"), call_delta(0, "{}"), call_delta(1, '{"a": 1}', "weather", "call_b")
    ),
    "refusal": Script([chunk(refusal="No."), *END]),
    "cut": Script([chunk(content="Hel"), chunk("length"), *END[1:]]),
}


@pytest.mark.parametrize("script", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("expose", ["summary", "text", "none"])
async def test_a_stream_is_given_again_as_a_valid_stream(
    start_app: StartApp, backend: Backend, script: Script, expose: str
) -> None:
    app = await start_app(reasoning={"expose": expose})
    backend.script(script)
    body = {**STREAM, "tools": [WEATHER], "include": ["reasoning.encrypted_content"]}
    first, is_first_replayed = await sent_streamed(app, body)
    again, is_replayed = await sent_streamed(app, body)
    assert (again, is_first_replayed, is_replayed, len(backend.requests)) == (first, None, "true", 1)


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (plain_call("weather", '{"city": "Ulm"}'), {"tools": [WEATHER]}),
        (plain("Hel", "length"), {"max_output_tokens": 16}),
        (plain("Hi", reasoning_content="Let me think."), {"include": ["reasoning.encrypted_content"]}),
        (plain(), {"metadata": {"a": "b"}, "instructions": "Be brief.", "user": "u", "temperature": 0.5}),
        (plain(None, refusal="No."), {}),
    ],
    ids=["call", "cut", "reasoning", "settings", "refusal"],
)
async def test_a_response_is_given_again_whole(app: App, backend: Backend, script: Script, changes: Json) -> None:
    backend.script(script)
    first, _ = await sent(app, {**HI, **changes})
    assert await sent(app, {**HI, **changes}) == (first, "true")


async def test_what_was_given_again_can_be_retrieved(app: App) -> None:
    await sent(app)
    again, _ = await sent(app)
    async with app.http.get(f"{app.url}/v1/responses/{again['id']}") as answer:
        assert await answer.json() == again


async def test_a_conversation_gets_a_request_once(app: App) -> None:
    conversation = await app.openai.conversations.create()
    for _ in range(3):
        await sent(app, {**HI, "conversation": conversation.id})
    listed = await app.openai.conversations.items.list(conversation.id, order="asc")
    assert [item.role for item in listed.data if item.type == "message"] == ["user", "assistant"]


@pytest.mark.stores("file", "postgres")
async def test_a_key_is_known_after_a_restart(start_app: StartApp, backend: Backend) -> None:
    first, _ = await sent(await start_app())
    assert (await sent(await start_app()), len(backend.requests)) == ((first, "true"), 1)


# -- what a key does not stand for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [{**HI, "input": "Ho"}, STREAM, {**HI, "store": True}, {"input": "Hi", "model": "m"}],
    ids=["input", "stream", "more", "order"],
)  # fmt: skip
async def test_the_same_key_with_another_body_is_a_400(app: App, backend: Backend, body: Json) -> None:
    await sent(app)
    async with app.post(body, headers=KEY) as answer:
        error = await error_of(answer, 400)
    assert error == {
        "message": "This Idempotency-Key was used for another request body within the last 24 hours.",
        "type": "invalid_request_error",
        "param": None,
        "code": "idempotency_key_reused",
    }
    assert len(backend.requests) == 1


async def test_the_right_body_is_answered_after_a_wrong_one(app: App) -> None:
    first, _ = await sent(app)
    async with app.post({**HI, "input": "Ho"}, headers=KEY) as answer:
        assert answer.status == 400
    assert await sent(app) == (first, "true")


async def test_another_owner_may_use_the_same_key(start_app: StartApp, backend: Backend) -> None:
    keys = {name: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("ann", "ben")}
    app = await start_app(auth={"mode": "keys", "keys": keys})
    ann, ben = {"authorization": "Bearer ann"}, {"authorization": "Bearer ben"}
    first, _ = await sent(app, HI, **ann)
    other, is_replayed = await sent(app, {**HI, "input": "Ho"}, **ben)
    assert (first["id"] != other["id"], is_replayed) == (True, None)
    assert (await sent(app, HI, **ann), len(backend.requests)) == ((first, "true"), 2)


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_that_is_empty_or_too_long_is_a_400(app: App, backend: Backend, key: str) -> None:
    async with app.post(HI, headers={"Idempotency-Key": key}) as answer:
        error = await error_of(answer, 400)
    message = "Invalid 'Idempotency-Key': expected 1 to 255 characters."
    assert (error["message"], backend.requests) == (message, [])


async def test_a_key_of_255_characters_is_a_key(app: App) -> None:
    first, _ = await sent(app, HI, **{"Idempotency-Key": "k" * 255})
    assert await sent(app, HI, **{"Idempotency-Key": "k" * 255}) == (first, "true")


@pytest.mark.parametrize("body", [HI, STREAM], ids=["plain", "stream"])
async def test_without_a_store_the_key_is_left_out_and_named(app: App, backend: Backend, body: Json) -> None:
    backend.script(streamed("Hi") if "stream" in body else plain())
    for _ in range(2):
        async with app.post({**body, "store": False}, headers=KEY) as answer:
            assert (answer.status, answer.headers["x-responses-proxy-ignored"]) == (200, "Idempotency-Key")
            await answer.read()
    assert len(backend.requests) == 2


async def test_a_deleted_response_frees_its_key(app: App, backend: Backend) -> None:
    first, _ = await sent(app)
    await app.openai.responses.delete(first["id"])
    second, is_replayed = await sent(app, {**HI, "input": "Ho"})
    assert (second["id"] != first["id"], is_replayed, len(backend.requests)) == (True, None, 2)


# -- at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [HI, STREAM, {**HI, "input": "Ho"}], ids=["plain", "stream", "other body"])
async def test_the_second_of_two_at_once_is_a_409(app: App, backend: Backend, body: Json) -> None:
    script, goes_on = held(plain())
    backend.script(script)
    first = asyncio.create_task(sent(app))
    await backend.received()
    async with app.post(body, headers=KEY) as answer:
        error = await error_of(answer, 409)
    goes_on.set()
    assert (error, answer.headers["retry-after"], len(backend.requests)) == (IN_USE, "1", 1)
    assert await sent(app) == ((await first)[0], "true")


async def test_a_key_is_in_use_until_the_stream_has_ended(app: App, backend: Backend) -> None:
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), goes_on, chunk(content="lo"), *END]))
    async with app.post(STREAM, headers=KEY) as first:
        blocks = Blocks(first)
        await blocks.until("event: response.output_text.delta")
        async with app.post(STREAM, headers=KEY) as answer:
            error = await error_of(answer, 409)
        goes_on.set()
        rest = events_in(await blocks.rest())
    assert (error, rest[-1]["type"]) == (IN_USE, "response.completed")
    assert await sent_streamed(app) == (rest[-1]["response"], "true")


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "stream"])
async def test_the_retry_of_the_sdk_gets_the_first_response(app: App, backend: Backend, is_streamed: bool) -> None:
    script, goes_on = held(streamed("Hi") if is_streamed else plain())
    backend.script(script)
    statuses: list[int] = []

    async def on_response(answer: Any) -> None:
        statuses.append(answer.status_code)
        if answer.status_code == 409:
            goes_on.set()

    async def id_from(sdk: AsyncOpenAI) -> str:
        if not is_streamed:
            return (await sdk.responses.create(model="m", input="Hi", extra_headers=KEY)).id
        async with await sdk.responses.create(model="m", input="Hi", stream=True, extra_headers=KEY) as events:
            *_, last = [event async for event in events]
        assert last.type == "response.completed"
        return last.response.id

    http = DefaultAsyncHttpxClient(event_hooks={"response": [on_response]})
    patient = AsyncOpenAI(base_url=f"{app.url}/v1", api_key="k", max_retries=5, http_client=http)
    async with patient:
        first = asyncio.create_task(id_from(patient))
        await backend.received()
        second = await id_from(patient)
        assert (second, sorted(statuses), len(backend.requests)) == (await first, [200, 200, 409], 1)


async def test_of_twenty_at_once_one_is_carried_out(app: App, backend: Backend) -> None:
    script, goes_on = held(plain())
    backend.script(script)

    async def status() -> int:
        async with app.post(HI, headers=KEY) as answer:
            return int(answer.status)

    running = [asyncio.create_task(status()) for _ in range(20)]
    await backend.received()
    pending = set(running)
    while len(pending) > 1:
        done, pending = await asyncio.wait(pending, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        assert done
    goes_on.set()
    assert sorted([await each for each in running]) == [200, *[409] * 19]
    assert len(backend.requests) == 1


# -- what failed is not remembered -------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [refused(500, "no"), refused(400, "no"), Script([b"{"]), plain(finish="error")])
async def test_a_turn_that_failed_is_carried_out_again(app: App, backend: Backend, failure: Script) -> None:
    backend.script(failure, plain())
    async with app.post(HI, headers=KEY) as answer:
        assert answer.status >= 400
    response, is_replayed = await sent(app, {**HI, "input": "Ho"})
    assert (response["status"], is_replayed, len(backend.requests)) == ("completed", None, 2)


@pytest.mark.parametrize(
    "failure", [Script([chunk(content="Hel")], end="cut"), Script([chunk(content="Hel"), chunk("error"), *END[1:]])]
)
async def test_a_stream_that_failed_is_carried_out_again(app: App, backend: Backend, failure: Script) -> None:
    backend.script(failure, streamed("Hello"))
    first, _ = await sent_streamed(app)
    second, is_replayed = await sent_streamed(app)
    assert [first["status"], second["status"], is_replayed, len(backend.requests)] == ["failed", "completed", None, 2]
    assert await sent_streamed(app) == (second, "true")


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": "hot"},
        {"previous_response_id": "resp_unknown"},
        {"conversation": "conv_unknown"},
        {"input": [{"type": "hologram"}]},
        {"input": [{"type": "item_reference", "id": "msg_unknown"}]},
    ],
    ids=str,
)
async def test_a_request_that_was_refused_does_not_use_its_key_up(app: App, changes: Json) -> None:
    async with app.post({**HI, **changes}, headers=KEY) as answer:
        assert answer.status in (400, 404)
    response, is_replayed = await sent(app)
    assert (response["status"], is_replayed) == ("completed", None)


@pytest.mark.parametrize("item", [{"id": []}, {"id": {"a": 1}}, {"type": {"a": 1}}], ids=str)
async def test_an_item_of_an_odd_form_is_a_400_and_does_not_hold_its_key(app: App, item: Json) -> None:
    async with app.post({**HI, "input": [{"role": "user", "content": "Hi", **item}]}, headers=KEY) as answer:
        await error_of(answer, 400)
    assert (await sent(app))[1] is None


# -- a client that leaves ----------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_a_plain_turn_frees_the_key(app: App, backend: Backend) -> None:
    script, _ = held(plain())
    backend.script(script, plain())
    leaving = asyncio.create_task(sent(app))
    received = await backend.received()
    leaving.cancel()
    await asyncio.wait({leaving})
    assert await received.is_let_go()
    response, is_replayed = await sent(app)
    assert (response["status"], is_replayed) == ("completed", None)


async def test_a_client_that_leaves_a_stream_frees_the_key(app: App, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"), plain())
    async with app.post(STREAM, headers=KEY) as answer:
        await Blocks(answer).until("event: response.output_text.delta")
        received = await backend.received()
        answer.close()
    assert await received.is_let_go()
    response, is_replayed = await sent(app)
    assert (response["status"], is_replayed) == ("completed", None)


async def test_a_client_that_leaves_before_the_stream_is_accepted_frees_the_key(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(turns={"created_after_ms": 60_000})
    script, _ = held(streamed("Hi"))
    backend.script(script, plain())
    leaving = asyncio.create_task(sent_streamed(app))
    received = await backend.received()
    leaving.cancel()
    await asyncio.wait({leaving})
    assert await received.is_let_go()
    response, is_replayed = await sent(app)
    assert (response["status"], is_replayed) == ("completed", None)


# -- 24 hours ----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def clocked_app(backend: Backend, clock: Callable[[], float], kept_in: MemoryPlace | Place) -> AsyncIterator[App]:
    """The proxy put together as `proxy.opened` does it, by another clock."""
    settings = settings_of(backend.url, **at(kept_in, {}))
    async with contextlib.AsyncExitStack() as stack:
        store = await opened_store(settings, stack)
        upstreams = Upstreams(settings.upstream)
        stack.push_async_callback(upstreams.close)
        sources = Sources(clock, Ids(clock))
        leases = Leases(store, sources)
        stack.push_async_callback(leases.close)
        means = Means(upstreams, leases, make_seals(settings), sources, Watcher(store), Counter(), Observer(Metrics()))
        services = await make_services(settings, store, means)
        listener = listening_socket()
        asgi = Outermost(Edge(settings, services), services.observer, sources.new_id)
        config = uvicorn.Config(asgi, log_config=None, access_log=False, lifespan="off")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup([listener])
        stack.push_async_callback(server.shutdown, [listener])
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        http = await stack.enter_async_context(aiohttp.ClientSession())
        client = await stack.enter_async_context(AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0))
        yield App(url, client, http)


async def test_a_key_is_known_for_24_hours(backend: Backend, kept_in: MemoryPlace | Place) -> None:
    clock = Clock()
    async with clocked_app(backend, clock, kept_in) as app:
        first, _ = await sent(app)
        clock.now += DAY_S - 1
        assert (await sent(app), len(backend.requests)) == ((first, "true"), 1)


async def test_a_key_is_forgotten_after_24_hours(backend: Backend, kept_in: MemoryPlace | Place) -> None:
    clock = Clock()
    async with clocked_app(backend, clock, kept_in) as app:
        first, _ = await sent(app)
        clock.now += DAY_S
        second, is_replayed = await sent(app, {**HI, "input": "Ho"})
        assert (second["id"] != first["id"], is_replayed, len(backend.requests)) == (True, None, 2)


async def test_a_key_is_known_for_24_hours_from_its_first_use_only(
    backend: Backend, kept_in: MemoryPlace | Place
) -> None:
    clock = Clock()
    async with clocked_app(backend, clock, kept_in) as app:
        first, _ = await sent(app)
        clock.now += DAY_S - 1
        await sent(app)
        clock.now += 1
        second, is_replayed = await sent(app)
        assert (second["id"] != first["id"], is_replayed, len(backend.requests)) == (True, None, 2)


async def test_a_forgotten_key_stands_for_its_newest_use(backend: Backend, kept_in: MemoryPlace | Place) -> None:
    clock = Clock()
    async with clocked_app(backend, clock, kept_in) as app:
        await sent(app)
        clock.now += DAY_S
        second, _ = await sent(app)
        clock.now += DAY_S - 1
        assert (await sent(app), len(backend.requests)) == ((second, "true"), 2)
