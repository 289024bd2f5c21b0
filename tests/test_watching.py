"""Who waits for a response to change: the watcher itself, readers of a log, and turns that wait for their parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import App, StartApp, both_stores
from controlled import controlled
from event_grammar import check, parse
from scripted import DEADLINE_S, END, Backend, Script, call_delta, chunk, plain, refused, streamed, streamed_calls
from store_places import MemoryPlace, Place
from test_background import (
    HI,
    QUICK,
    RUN,
    STREAMED_RUN,
    StartOnStore,
    cancelled,
    check_run,
    created,
    deleted,
    ended,
    events_of,
    foreground,
    gated,
    in_status,
    joined,
    on_store,
    said,
    until,
)
from test_proxy import Blocks, error_of, events_in, terminal_types

from errors import StoreError
from run_verbs import RunStore
from watching import Watcher

__all__ = ["on_store"]
pytestmark = both_stores
Json = dict[str, Any]
CHILD: Json = {**HI, "input": "And?"}
NUMBERS = range(-2, 20)


# -- the watcher -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stores(place: MemoryPlace | Place, count: int) -> AsyncIterator[list[RunStore]]:
    opened = [await place.open() for _ in range(count)]
    try:
        yield opened
    finally:
        for store in opened:
            await store.close()


@contextlib.asynccontextmanager
async def running(watcher: Watcher) -> AsyncIterator[Watcher]:
    looking = asyncio.create_task(watcher.run())
    try:
        yield watcher
    finally:
        looking.cancel()
        await asyncio.wait({looking})


@pytest.fixture
async def watcher() -> AsyncIterator[Watcher]:
    async with stores(MemoryPlace(), 1) as (store,):
        yield Watcher(store)


async def test_who_watches_is_told(watcher: Watcher) -> None:
    with watcher.watching("resp_1") as one, watcher.watching("resp_1") as other, watcher.watching("resp_2") as third:
        watcher.tell("resp_1")
        assert [await watch.changed(0.01) for watch in (one, other, third)] == [True, True, False]


async def test_a_change_is_told_once(watcher: Watcher) -> None:
    with watcher.watching("resp_1") as watch:
        watcher.tell("resp_1")
        watcher.tell("resp_1")
        assert [await watch.changed(0.01) for _ in range(2)] == [True, False]


async def test_a_change_wakes_who_waits_already(watcher: Watcher) -> None:
    with watcher.watching("resp_1") as watch:
        waiting = asyncio.create_task(watch.changed())
        await asyncio.sleep(0)
        watcher.tell("resp_1")
        async with asyncio.timeout(DEADLINE_S):
            assert await waiting


async def test_everybody_can_be_told(watcher: Watcher) -> None:
    with watcher.watching("resp_1") as one, watcher.watching("resp_2") as other:
        watcher.tell_all()
        assert [await watch.changed(0.01) for watch in (one, other)] == [True, True]


async def test_who_has_stopped_watching_is_not_told(watcher: Watcher) -> None:
    with watcher.watching("resp_1") as one:
        with watcher.watching("resp_1") as other:
            pass
        watcher.tell("resp_1")
        assert [await watch.changed(0.01) for watch in (one, other)] == [True, False]
    watcher.tell("resp_1")


async def test_what_another_connection_writes_is_seen(place: Place) -> None:
    async with stores(place, 2) as (store, other), running(Watcher(store)) as watcher:
        async with asyncio.timeout(DEADLINE_S):
            await watcher.anything.changed()
            await other.secret("name")
            assert await watcher.anything.changed()


async def test_a_store_that_cannot_be_read_is_looked_at_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version = controlled("version", monkeypatch)
    version.failure = StoreError("The store of responses cannot be read or written.")
    async with stores(place, 2) as (store, other), running(Watcher(store)) as watcher:
        await version.once_more("failed", 2)
        version.failure = None
        await other.secret("name")
        assert await watcher.anything.changed(DEADLINE_S)
    assert "could not look for changes" in caplog.text


async def test_the_state_of_one_that_is_not_watched_is_not_asked_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = controlled("states", monkeypatch)
    async with stores(place, 2) as (store, other), running(Watcher(store)) as watcher:
        await watcher.anything.changed(DEADLINE_S)
        await other.secret("name")
        assert await watcher.anything.changed(DEADLINE_S)
    assert states.asked == 0


# -- readers of a log --------------------------------------------------------------------------------------------------


def number_of(block: str) -> int:
    number: int = json.loads(block.partition("\ndata: ")[2])["sequence_number"]
    return number


def behind(number: int, blocks: list[str]) -> list[str]:
    """The events behind that number, and the end."""
    *events, end = blocks
    return [*(block for block in events if number_of(block) > number), end]


def tail(app: App, response_id: str, after: int | None = None, **headers: str) -> Any:
    cursor = "" if after is None else f"&starting_after={after}"
    return app.http.get(f"{app.url}/v1/responses/{response_id}?stream=true{cursor}", headers=headers)


async def rest_of(app: App, response_id: str, after: int | None = None) -> list[str]:
    async with tail(app, response_id, after) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        return await Blocks(answer).rest()


def steps(gates: list[asyncio.Event]) -> Script:
    """An answer of some pieces, behind each of which it waits."""
    pieces = [step for number, gate in enumerate(gates) for step in (chunk(content=f"{number} "), gate)]
    return Script([*pieces, *END])


MIXED = Script(
    [
        chunk(reasoning_content="Let me think.\n\n"),
        chunk(content="data: x\n\n"),
        chunk(content="ü\u2028"),
        chunk(tool_calls=[call_delta(0, "{}", "weather", "call_a")]),
        chunk("tool_calls"),
        *END[1:],
    ]
)


@pytest.mark.parametrize(
    "script",
    [streamed("Hel", "lo"), MIXED, streamed_calls(call_delta(0, "{}", "weather", "call_a")), refused(500, "no")],
    ids=["text", "mixed", "call", "refused"],
)
async def test_after_the_end_every_number_gives_exactly_the_rest(app: App, backend: Backend, script: Script) -> None:
    backend.script(script)
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}]
    async with app.post({**STREAMED_RUN, "tools": tools}) as answer:
        whole = await Blocks(answer).rest()
    response_id = check_run(events_in(whole))["id"]
    assert await rest_of(app, response_id) == whole
    for number in range(-2, len(whole) + 3):
        assert await rest_of(app, response_id, number) == behind(number, whole)


@pytest.mark.parametrize("seen", [2, 4, 6, 8])
async def test_during_the_run_every_number_gives_exactly_the_rest(app: App, backend: Backend, seen: int) -> None:
    gates = [asyncio.Event() for _ in range(4)]
    backend.script(steps(gates))
    async with app.post(STREAMED_RUN) as answer, contextlib.AsyncExitStack() as stack:
        blocks = Blocks(answer)
        first = [await blocks.next() for _ in range(2)]
        for gate in gates[: max(seen - 5, 0)]:
            first.append(await blocks.until("event: response.output_text.delta"))
            gate.set()
        response_id = json.loads(first[0].partition("data: ")[2])["response"]["id"]
        readers = {n: Blocks(await stack.enter_async_context(tail(app, response_id, n))) for n in NUMBERS}
        for gate in gates:
            gate.set()
        await blocks.rest()
        found = {number: await reader.rest() for number, reader in readers.items()}
    whole = await rest_of(app, response_id)
    assert len(whole) - 1 < NUMBERS[-1]
    check_run(events_in(whole))
    assert found == {number: behind(number, whole) for number in NUMBERS}


async def test_a_reader_that_breaks_off_again_and_again_sees_each_event_once(app: App, backend: Backend) -> None:
    gates = [asyncio.Event() for _ in range(10)]
    backend.script(steps(gates))
    response_id = (await created(app, STREAMED_RUN))["id"]
    seen: list[str] = []
    for gate in gates:
        async with tail(app, response_id, number_of(seen[-1]) if seen else None) as answer:
            blocks = Blocks(answer)
            while not seen or "output_text.delta" not in seen[-1] or gate is not gates[len(deltas(seen)) - 1]:
                seen.append(await blocks.next())
        gate.set()
    rest = await rest_of(app, response_id, number_of(seen[-1]))
    assert joined(seen, rest) == await rest_of(app, response_id)


def deltas(blocks: list[str]) -> list[str]:
    return [block for block in blocks if block.startswith("event: response.output_text.delta")]


async def test_many_readers_are_told_the_same(on_store: StartOnStore, backend: Backend) -> None:
    apps = [await on_store(workers=workers) for workers in (0, 1)]
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(apps[0], STREAMED_RUN))["id"]
    async with contextlib.AsyncExitStack() as stack:
        answers = [await stack.enter_async_context(tail(apps[n % 2], response_id)) for n in range(20)]
        readers = [Blocks(answer) for answer in answers]
        for reader in readers:
            await reader.until("event: response.output_text.delta")
        goes_on.set()
        found = [await reader.rest() for reader in readers]
    assert found == [found[0]] * 20


@pytest.mark.parametrize("after", [11, 12, 1000, 2**28, 2**63, 2**70])
async def test_behind_the_end_there_is_an_empty_stream(app: App, backend: Backend, after: int) -> None:
    backend.script(streamed("Hel", "lo"))
    *_, last = await events_of(app)
    assert last["sequence_number"] == 10
    assert await rest_of(app, last["response"]["id"], after) == ["data: [DONE]"]


async def test_behind_the_end_of_one_that_runs_it_waits_and_is_empty(app: App, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app, STREAMED_RUN))["id"]
    await backend.received()
    async with tail(app, response_id, 1000) as answer:
        goes_on.set()
        assert await Blocks(answer).rest() == ["data: [DONE]"]


async def test_one_that_was_cancelled_before_it_began_has_its_whole_stream(start_app: StartApp) -> None:
    app = await start_app(background={"workers": 0})
    response_id = (await created(app, STREAMED_RUN))["id"]
    response = await cancelled(app, response_id)
    first, second, last = events_in(await rest_of(app, response_id))
    assert [first["type"], second["type"], last["type"]] == [
        "response.created",
        "response.queued",
        "response.incomplete",
    ]
    assert (last["sequence_number"], last["response"]) == (2, response)
    assert events_in(await rest_of(app, response_id, 1)) == [last]


@pytest.mark.parametrize("how", [cancelled, deleted], ids=["cancelled", "deleted"])
async def test_every_reader_of_one_that_is_stopped_gets_an_end(
    on_store: StartOnStore, backend: Backend, how: Any
) -> None:
    apps = [await on_store(workers=workers) for workers in (0, 1)]
    backend.script(gated()[0])
    response_id = (await created(apps[0], STREAMED_RUN))["id"]
    async with contextlib.AsyncExitStack() as stack:
        readers = [Blocks(await stack.enter_async_context(tail(app, response_id))) for app in apps]
        for reader in readers:
            await reader.until("event: response.output_text.delta")
        await how(apps[0], response_id)
        ends = [events_in(await reader.rest())[-1] for reader in readers]
    assert [(end["type"], end["response"]["status"]) for end in ends] == [("response.incomplete", "cancelled")] * 2
    assert [end["response"]["output"] for end in ends] == [[], []]
    parse(ends)


async def test_a_reader_of_a_waiting_child_sees_it_begin(app: App, backend: Backend) -> None:
    script, goes_on = gated("One", ".")
    backend.script(script, streamed("Two."))
    parent = (await created(app))["id"]
    await backend.received()
    child = (await created(app, {**STREAMED_RUN, "previous_response_id": parent}))["id"]
    async with tail(app, child) as answer:
        blocks = Blocks(answer)
        seen = [await blocks.next() for _ in range(2)]
        goes_on.set()
        assert check_run(events_in(joined(seen, await blocks.rest())))["status"] == "completed"


async def test_a_reader_is_kept_alive_by_comments(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(server={"keepalive_s": 0.05})
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app, STREAMED_RUN))["id"]
    async with tail(app, response_id) as answer:
        blocks = Blocks(answer)
        assert await blocks.until(":") == ": keepalive\n\n"
        goes_on.set()
        assert events_in(await blocks.rest())[-1]["type"] == "response.completed"


async def test_a_reader_survives_a_store_that_cannot_be_read(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("event_log.TRY_AGAIN_S", 0.02)
    script, goes_on = gated()
    backend.script(script)
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        seen = [await blocks.next() for _ in range(6)]
        reads = controlled("tail", monkeypatch)
        reads.failure = StoreError("The store of responses cannot be read or written.")
        goes_on.set()
        await reads.once_more("failed", 2)
        reads.failure = None
        rest = await blocks.rest()
    assert check_run(events_in(joined(seen, rest)))["status"] == "completed"


async def test_an_answer_of_many_batches_is_read_whole(
    on_store: StartOnStore, backend: Backend, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than one read of the log gives."""
    monkeypatch.setattr("event_log.FLUSH_EVERY_S", 0.001)
    app = await on_store()
    gates = [asyncio.Event() for _ in range(140)]
    backend.script(steps(gates))
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        seen = []
        for gate in gates:
            while not seen or not seen[-1].startswith("event: response.output_text.delta"):
                seen.append(await blocks.next())
            seen.append("")
            gate.set()
        rest = await blocks.rest()
    whole = joined([block for block in seen if block], rest)
    response_id = check_run(events_in(whole))["id"]
    assert place.asked("SELECT count(*) FROM event")[0][0] > 128
    for number in (-1, 0, 63, 64, 65, 127, 128, 140):
        assert await rest_of(app, response_id, number) == behind(number, whole)


# -- what has no log ---------------------------------------------------------------------------------------------------

NO_STREAM = "This response cannot be streamed because it was not created with "
GONE = f"{NO_STREAM}stream=true or the stream TTL has expired."


@pytest.mark.parametrize("when", ["running", "ended"])
async def test_one_that_was_not_streamed_is_a_400(app: App, backend: Backend, when: str) -> None:
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app))["id"]
    await backend.received()
    if when == "ended":
        goes_on.set()
        await ended(app, response_id)
    async with tail(app, response_id) as answer:
        error = await error_of(answer, 400)
    assert (error["message"], error["param"]) == (GONE, "stream")


@pytest.mark.parametrize("options", [{}, {"stream": True}], ids=["plain", "stream"])
async def test_a_foreground_response_is_a_400(app: App, backend: Backend, options: Json) -> None:
    backend.script(streamed("Hi") if options else plain())
    if options:
        response_id = (await events_of(app, {**HI, **options}))[-1]["response"]["id"]
    else:
        response_id = (await foreground(app))["id"]
    async with tail(app, response_id) as answer:
        error = await error_of(answer, 400)
    assert (error["message"], error["param"]) == (f"{NO_STREAM}background=true.", "stream")


@pytest.mark.parametrize("after", [None, 0, 1000])
async def test_an_unknown_one_is_a_404(app: App, after: int | None) -> None:
    async with tail(app, "resp_unknown", after) as answer:
        error = await error_of(answer, 404)
    assert error["message"] == "Response with id 'resp_unknown' not found."


async def test_a_deleted_one_is_a_404(app: App, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    response_id = (await events_of(app))[-1]["response"]["id"]
    await deleted(app, response_id)
    async with tail(app, response_id) as answer:
        await error_of(answer, 404)


async def test_a_log_is_forgotten_and_its_response_is_not(
    on_store: StartOnStore, backend: Backend, place: Place
) -> None:
    app = await on_store(background={"stream_retention_s": 0.2})
    backend.script(streamed("Hel", "lo"))
    response = (await events_of(app))[-1]["response"]

    async def is_forgotten() -> bool:
        async with tail(app, response["id"]) as answer:
            return answer.status == 400

    await until(is_forgotten)
    async with tail(app, response["id"], 3) as answer:
        error = await error_of(answer, 400)
    assert (error["message"], error["param"]) == (GONE, "stream")
    assert await ended(app, response["id"]) == response
    assert place.asked("SELECT count(*) FROM event") == [(0,)]


@pytest.mark.parametrize("query", ["starting_after=x", "starting_after=1.5", "starting_after=", "nonsense=1"])
async def test_a_query_that_cannot_be_understood_is_a_400(app: App, backend: Backend, query: str) -> None:
    backend.script(streamed("Hi"))
    response_id = (await events_of(app))[-1]["response"]["id"]
    async with app.http.get(f"{app.url}/v1/responses/{response_id}?stream=true&{query}") as answer:
        error = await error_of(answer, 400)
    assert error["param"] == query.partition("=")[0]


async def test_a_number_without_stream_is_a_400(app: App, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    response_id = (await events_of(app))[-1]["response"]["id"]
    async with app.http.get(f"{app.url}/v1/responses/{response_id}?starting_after=3") as answer:
        error = await error_of(answer, 400)
    assert error["param"] == "starting_after"


async def test_include_has_no_say_in_what_is_told_again_and_is_named(app: App, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    response_id = (await events_of(app))[-1]["response"]["id"]
    whole = await rest_of(app, response_id)
    query = "stream=true&include=message.output_text.logprobs"
    async with app.http.get(f"{app.url}/v1/responses/{response_id}?{query}") as answer:
        assert (answer.headers["x-responses-proxy-ignored"], await Blocks(answer).rest()) == ("include", whole)


# -- foreground children -----------------------------------------------------------------------------------------------


async def test_a_plain_child_waits_for_its_parent(app: App, backend: Backend) -> None:
    script, goes_on = gated("One", ".")
    backend.script(script, plain("Two."))
    parent = (await created(app))["id"]
    await backend.received()
    async with asked_and_waiting(app, {**CHILD, "previous_response_id": parent}) as child:
        goes_on.set()
        answer = await child
    assert (answer["status"], said(backend.requests[1])) == ("completed", ["Hi", "One.", "And?"])


@contextlib.asynccontextmanager
async def asked_and_waiting(app: App, body: Json) -> AsyncIterator[asyncio.Task[Json]]:
    """A plain request, once the proxy waits for its parent."""
    child = asyncio.create_task(foreground(app, **body))
    # A later request on another connection is answered when the earlier one was read.
    for _ in range(3):
        await in_status(app, body["previous_response_id"], "in_progress", "queued")
    assert not child.done()
    yield child


async def test_a_streamed_child_waits_for_its_parent(app: App, backend: Backend) -> None:
    script, goes_on = gated("One", ".")
    backend.script(script, streamed("Two."))
    parent = (await created(app))["id"]
    await backend.received()
    child = asyncio.create_task(events_of(app, {**CHILD, "stream": True, "previous_response_id": parent}))
    await in_status(app, parent, "in_progress")
    goes_on.set()
    assert check(await child)["status"] == "completed"
    assert said(backend.requests[1]) == ["Hi", "One.", "And?"]


async def test_a_child_waits_for_a_parent_that_is_queued(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background={"workers": 1})
    script, goes_on = gated()
    backend.script(script, streamed("One."), plain("Two."))
    await created(app)
    await backend.received()
    parent = (await created(app))["id"]
    async with asked_and_waiting(app, {**CHILD, "previous_response_id": parent}) as child:
        goes_on.set()
        assert (await child)["status"] == "completed"
    assert said(backend.requests[2]) == ["Hi", "One.", "And?"]


@pytest.mark.parametrize("options", [{}, {"stream": True}], ids=["plain", "stream"])
async def test_a_child_that_waits_too_long_is_a_409(start_app: StartApp, backend: Backend, options: Json) -> None:
    app = await start_app(turns={"parent_wait_s": 0.05})
    script, goes_on = gated()
    backend.script(script)
    parent = (await created(app))["id"]
    await backend.received()
    async with app.post({**CHILD, **options, "previous_response_id": parent}) as answer:
        error = await error_of(answer, 409)
        assert int(answer.headers["retry-after"]) >= 1
    assert error == {
        "message": f"Previous response with id '{parent}' is still running.",
        "type": "invalid_request_error",
        "param": "previous_response_id",
        "code": None,
    }
    goes_on.set()
    assert (await ended(app, parent))["status"] == "completed"
    assert len(backend.requests) == 1


async def test_a_streamed_child_that_waits_is_kept_alive_and_then_runs(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(server={"keepalive_s": 0.05})
    script, goes_on = gated("One", ".")
    backend.script(script, streamed("Two."))
    parent = (await created(app))["id"]
    await backend.received()
    async with app.post({**CHILD, "stream": True, "previous_response_id": parent}) as answer:
        blocks = Blocks(answer)
        assert [await blocks.next() for _ in range(2)] == [": keepalive\n\n"] * 2
        goes_on.set()
        response = check(events_in(await blocks.rest()))
    assert (response["status"], response["previous_response_id"]) == ("completed", parent)
    assert await ended(app, response["id"]) == response


@pytest.mark.parametrize("how", ["too long", "cancelled", "failed"])
async def test_a_streamed_child_that_waited_and_cannot_run_ends_with_response_failed(
    start_app: StartApp, backend: Backend, how: str
) -> None:
    app = await start_app(server={"keepalive_s": 0.05}, turns={"parent_wait_s": 0.5 if how == "too long" else 10.0})
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), goes_on], end="cut"))
    parent = (await created(app))["id"]
    await backend.received()
    async with app.post({**CHILD, "stream": True, "previous_response_id": parent}) as answer:
        blocks = Blocks(answer)
        assert await blocks.next() == ": keepalive\n\n"
        if how == "cancelled":
            await cancelled(app, parent)
        if how == "failed":
            goes_on.set()
        events = events_in(await blocks.rest())
    parse(events)
    response = check(events)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert (response["status"], parent in response["error"]["message"]) == ("failed", True)
    assert len(backend.requests) == 1


async def test_a_streamed_child_that_waited_and_is_refused_by_the_backend_ends_with_response_failed(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(server={"keepalive_s": 0.05})
    script, goes_on = gated("One", ".")
    backend.script(script, refused(429, "slow down"))
    parent = (await created(app))["id"]
    await backend.received()
    async with app.post({**CHILD, "stream": True, "previous_response_id": parent}) as answer:
        blocks = Blocks(answer)
        await blocks.next()
        goes_on.set()
        events = events_in(await blocks.rest())
    assert terminal_types(events) == ["response.failed"]
    assert check(events)["error"] == {
        "code": "rate_limit_exceeded",
        "message": "Upstream 'default' answered 429: slow down",
    }


@pytest.mark.parametrize("how", ["cancelled", "failed"])
@pytest.mark.parametrize("options", [{}, {"stream": True}], ids=["plain", "stream"])
async def test_a_child_of_one_that_has_not_completed_is_a_400_that_names_it(
    app: App, backend: Backend, options: Json, how: str
) -> None:
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), goes_on], end="cut"))
    parent = (await created(app))["id"]
    await backend.received()
    child = app.post({**CHILD, **options, "previous_response_id": parent})
    asking = asyncio.create_task(child.__aenter__())
    await in_status(app, parent, "in_progress")
    if how == "cancelled":
        await cancelled(app, parent)
    else:
        goes_on.set()
    async with await asking as answer:
        error = await error_of(answer, 400)
    assert error["message"] == f"Previous response with id '{parent}' is {how} and cannot be continued."
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


@pytest.mark.parametrize("keepalive_s", [0.05, 15.0], ids=["with comments", "silent"])
@pytest.mark.parametrize("options", [{}, {"stream": True}], ids=["plain", "stream"])
async def test_a_client_that_leaves_ends_the_wait(
    start_app: StartApp, backend: Backend, options: Json, keepalive_s: float
) -> None:
    app = await start_app(server={"keepalive_s": keepalive_s}, turns={"parent_wait_s": 3600.0})
    script, goes_on = gated()
    backend.script(script, streamed("Hi"))
    parent = (await created(app))["id"]
    await backend.received()
    asking = asyncio.create_task(left_soon(app, {**CHILD, **options, "previous_response_id": parent}))
    await waiting_for_a_parent(1)
    asking.cancel()
    await asyncio.wait({asking})
    await waiting_for_a_parent(0)
    goes_on.set()
    assert (await ended(app, parent))["status"] == "completed"
    assert len(backend.requests) == 1


async def left_soon(app: App, body: Json) -> None:
    async with app.post(body) as answer:
        await answer.read()


async def waiting_for_a_parent(count: int) -> None:
    """Waits until so many turns wait for a parent, as their tasks show it."""

    async def is_so() -> bool:
        names = [inner_names(task.get_coro()) for task in asyncio.all_tasks()]
        return sum("Pasts._ended_window" in found for found in names) == count

    await until(is_so)


def inner_names(coroutine: Any) -> list[str]:
    """The functions that a coroutine waits in, the outermost first."""
    names = []
    while coroutine is not None and hasattr(coroutine, "cr_code"):
        names.append(coroutine.cr_code.co_qualname)
        coroutine = coroutine.cr_await
    return names


async def test_two_hundred_children_wait_for_one_parent(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background=QUICK)
    script, goes_on = gated("One", ".")
    backend.script(script, plain("Two."))
    parent = (await created(app, RUN))["id"]
    await backend.received()
    children = [asyncio.create_task(foreground(app, previous_response_id=parent)) for _ in range(200)]
    await in_status(app, parent, "in_progress")
    goes_on.set()
    async with asyncio.timeout(DEADLINE_S):
        assert {(await child)["status"] for child in children} == {"completed"}
