"""What processes on one database tell each other, and stores that work behind a pooler in transaction mode."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from conftest import App, StartApp, running_app, settings_of
from postgres_pooler import pooled
from scripted import END, Backend, Script, chunk, plain, streamed
from store_builders import DEADLINE_S, OWNER
from store_places import PostgresPlace
from test_background import (
    RUN,
    STREAMED_RUN,
    cancelled,
    created,
    ended,
    foreground,
    gated,
    in_status,
    said,
    until,
)
from test_postgres_store import KEY, empty, made
from test_proxy import Blocks, events_in

import postgres_news
from errors import StoreError
from postgres_news import ANNOUNCE, WORDS_AT_ONCE, News
from run_verbs import QUEUE, Run, RunStore
from store_postgres import PostgresStore
from watching import Watcher

__all__ = ["empty", "made"]
pytestmark = pytest.mark.stores("postgres")
NEVER_S = 3600.0
LOGGER = "responses_proxy.postgres_news"
LISTENER = """(SELECT pid FROM pg_stat_activity WHERE application_name = 'responses-proxy'
    ORDER BY backend_start DESC LIMIT 1)"""
EVERYBODY_OFF = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'responses-proxy'"


class Ear:
    """One store that hears, and what it was told."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.heard: set[str] = set()
        self.times = self.missed = 0
        self._changed = asyncio.Event()

    def tell(self, news: frozenset[str] | None) -> None:
        self.heard |= news or frozenset()
        self.times += news is not None
        self.missed += news is None
        self._changed.set()

    async def until(self, found: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not found():
                self._changed.clear()
                await self._changed.wait()

    async def until_heard(self, *words: str) -> None:
        await self.until(lambda: self.heard >= set(words))

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        hearing = asyncio.create_task(self.store.hear(self.tell))
        try:
            yield
        finally:
            hearing.cancel()
            await asyncio.wait({hearing})


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def an_ear(stack: AsyncExitStack, place: PostgresPlace, hears: bool = True, **settings: Any) -> Ear:
    """A store of its own, once it hears, or once it has said that it does not."""
    ear = Ear(await place.open(**settings))
    stack.push_async_callback(ear.store.close)
    await stack.enter_async_context(ear.open())
    await ear.until(lambda: ear.missed > 0)
    assert ear.store.hears is hears
    return ear


# -- what is told ------------------------------------------------------------------------------------------------------


async def test_what_one_process_announces_others_hear_and_not_itself(
    stack: AsyncExitStack, place: PostgresPlace
) -> None:
    one, two, three = [await an_ear(stack, place) for _ in range(3)]
    one.store.announce("resp_1")
    one.store.announce(QUEUE)
    await two.until_heard("resp_1", QUEUE)
    await three.until_heard("resp_1", QUEUE)
    two.store.announce("resp_2")
    await one.until_heard("resp_2")
    assert (one.heard, two.heard) == ({"resp_2"}, {"resp_1", QUEUE})


async def test_what_is_announced_meanwhile_is_told_together(
    stack: AsyncExitStack, place: PostgresPlace, made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_news, "GATHER_S", 0.5)
    one, two = [await an_ear(stack, place) for _ in range(2)]
    made.clear()
    one.store.announce("resp_first")
    await two.until_heard("resp_first")
    for word in ("resp_second", "resp_second", "resp_third"):
        one.store.announce(word)
        await one.store.tail(OWNER, word, -1)
    await two.until_heard("resp_second", "resp_third")
    assert (two.times, made[ANNOUNCE.text]) == (2, 2)


async def test_more_than_one_message_can_hold_is_told(stack: AsyncExitStack, place: PostgresPlace) -> None:
    one, two = [await an_ear(stack, place) for _ in range(2)]
    words = {f"resp_{number:048}" for number in range(2 * WORDS_AT_ONCE + 1)}
    for word in words:
        one.store.announce(word)
    await two.until_heard(*words)
    assert (two.heard, two.times) == (words, 3)


async def test_each_schema_hears_its_own(stack: AsyncExitStack, place: PostgresPlace, empty: str) -> None:
    one, two = [await an_ear(stack, place) for _ in range(2)]
    other = await an_ear(stack, place, path=empty)
    other.store.announce("resp_other")
    one.store.announce("resp_own")
    await two.until_heard("resp_own")
    one_more = await an_ear(stack, place, path=empty)
    other.store.announce("resp_again")
    await one_more.until_heard("resp_again")
    assert (two.heard, other.heard) == ({"resp_own"}, set())


async def test_the_last_words_of_a_process_are_heard(
    stack: AsyncExitStack, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_news, "GATHER_S", 3600.0)
    one = await an_ear(stack, place)
    async with AsyncExitStack() as other:
        ending = await an_ear(other, place)
        ending.store.announce("resp_1")
        await one.until_heard("resp_1")
        ending.store.announce("resp_2")
    await one.until_heard("resp_2")


async def test_what_could_not_be_told_is_told_later(
    stack: AsyncExitStack, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = [await an_ear(stack, place) for _ in range(2)]
    tell, failures = postgres_news.News._tell, [StoreError("The store of responses cannot be reached.")]

    async def failing_once(news: Any, words: list[str]) -> None:
        if failures:
            raise failures.pop()
        await tell(news, words)

    monkeypatch.setattr(postgres_news, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(postgres_news.News, "_tell", failing_once)
    one.store.announce("resp_1")
    await two.until_heard("resp_1")
    assert "could not be told what has changed" in caplog.text


# -- connections that are lost -----------------------------------------------------------------------------------------


async def test_a_lost_connection_is_made_again_and_what_was_missed_is_looked_for(
    stack: AsyncExitStack, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    monkeypatch.setattr(postgres_news, "FIRST_PAUSE_S", 0.01)
    one, two = [await an_ear(stack, place) for _ in range(2)]
    assert two.missed == 1
    place.asked(f"SELECT pg_terminate_backend(pid) FROM {LISTENER} AS listener")
    await two.until(lambda: two.missed == 3)
    one.store.announce("resp_1")
    await two.until_heard("resp_1")
    lost, back = caplog.messages
    assert "not heard, and looked for instead: The database has lost its connection." in lost
    assert back == "changes of other processes are heard again"


async def test_a_connection_that_does_not_answer_is_found_by_who_looks(
    stack: AsyncExitStack, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postgres_opening.ANSWER_WITHIN_S", 0.5)
    monkeypatch.setattr(postgres_news, "FIRST_PAUSE_S", 0.01)
    ear = await an_ear(stack, place)
    real, ear.store._news._connection = ear.store._news._connection, Stuck(ear.store._news._connection)  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="does not answer in time"):
        await ear.store.version()
    assert real.is_closed()
    await ear.until(lambda: ear.missed == 3)
    assert ear.store.hears
    assert isinstance(await ear.store.version(), int)


class Stuck:
    """A connection that does not answer what it is asked."""

    def __init__(self, connection: Any) -> None:
        self.terminate = connection.terminate
        self._execute = connection.execute

    async def fetchrow(self, *_: Any) -> Any:
        await self._execute("SELECT pg_sleep(1)")


@contextlib.asynccontextmanager
async def watcher_of(store: RunStore) -> AsyncIterator[Watcher]:
    """Once the store hears, and what there was has been seen."""
    watcher = Watcher(store)
    running = asyncio.create_task(watcher.run())

    async def hears() -> bool:
        return store.hears

    try:
        await until(hears)
        while await watcher.anything.changed(0.2):
            pass
        yield watcher
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_what_nobody_has_announced_is_seen_by_who_looks(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watching.PACES_S", {False: (NEVER_S, 0.0), True: (0.01, 0.0)})
    one, two = [await place.open() for _ in range(2)]
    async with watcher_of(one) as watcher:
        await two.secret("name")
        assert await watcher.anything.changed(DEADLINE_S)
    await one.close()
    await two.close()


async def test_who_does_not_hear_any_more_looks_at_once(place: PostgresPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watching.PACES_S", {False: (0.01, 0.0), True: (0.01, NEVER_S)})
    monkeypatch.setattr(postgres_news, "FIRST_PAUSE_S", NEVER_S)
    one, two = [await place.open() for _ in range(2)]
    async with watcher_of(one) as watcher:
        await two.secret("name")
        assert not await watcher.anything.changed(0.2)
        place.asked(EVERYBODY_OFF)
        assert await watcher.anything.changed(DEADLINE_S)
    await one.close()
    await two.close()


async def test_a_store_that_cannot_hear_says_so_once_and_is_looked_at(
    stack: AsyncExitStack, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgres_news, "FIRST_PAUSE_S", 0.01)
    nowhere = "postgresql://me:secret@/postgres?host=/nowhere"
    ear = await an_ear(stack, place, hears=False, listen_url=nowhere)
    await ear.until(lambda: ear.missed > 2)
    (message,) = caplog.messages
    assert "The database cannot be reached." in message
    assert "secret" not in caplog.text
    assert isinstance(await ear.store.version(), int)


# -- behind a pooler ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def pool(place: PostgresPlace) -> AsyncIterator[dict[str, Any]]:
    """Settings of a store behind a pooler in transaction mode."""
    async with pooled(place.url) as address:
        yield {"path": address, "prepared_statements": False}


async def test_behind_a_pooler_it_says_that_it_does_not_hear(
    stack: AsyncExitStack, place: PostgresPlace, pool: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    await an_ear(stack, place, hears=False, **pool)
    (message,) = caplog.messages
    assert "looked for instead: A pooler is between; store.listen_url may lead to the database itself." in message


async def test_behind_a_pooler_it_hears_where_it_is_told_to_listen(
    stack: AsyncExitStack, place: PostgresPlace, pool: dict[str, Any]
) -> None:
    one, two = [await an_ear(stack, place, **pool, listen_url=place.url) for _ in range(2)]
    direct = await an_ear(stack, place)
    one.store.announce("resp_1")
    await two.until_heard("resp_1")
    await direct.until_heard("resp_1")
    assert one.heard == set()


async def test_one_that_was_told_to_listen_through_a_pooler_notices(
    stack: AsyncExitStack,
    place: PostgresPlace,
    pool: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(postgres_news, "ECHO_WITHIN_S", 0.1)
    await an_ear(stack, place, hears=False, **pool, listen_url=pool["path"])
    assert "does not hear what is told" in caplog.text


async def test_what_a_pooler_refuses_is_told(place: PostgresPlace, pool: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="pooler before it refuses how this connection begins"):
        await place.open(path=pool["path"])


# -- programs that are told --------------------------------------------------------------------------------------------

StartHearing = Callable[..., Awaitable[App]]


@pytest.fixture
def start_hearing(start_app: StartApp, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch) -> StartHearing:
    """Starts a program that sees nothing of what others write but what it hears."""
    known: list[News] = []

    class Known(News):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            known.append(self)

    async def start(**background: Any) -> App:
        settings = {"lease_s": NEVER_S, **background}
        app = await start_app(store={"path": place.url}, sealing={"keys": (KEY,)}, background=settings)

        async def hears() -> bool:
            return known[-1].are_heard

        await until(hears)
        return app

    monkeypatch.setattr("store_postgres.News", Known)
    monkeypatch.setattr("watching.PACES_S", {False: (0.01, 0.0), True: (NEVER_S, 0.0)})
    for room in ("background", "event_log", "past"):
        monkeypatch.setattr(f"{room}.LOOK_AGAIN_S", NEVER_S)
    return start


async def test_a_run_that_a_program_leaves_to_others_is_begun_by_one_that_hears_of_it(
    start_hearing: StartHearing, backend: Backend
) -> None:
    full, other = await start_hearing(workers=1), await start_hearing()
    backend.script(gated()[0], streamed("Hi"))
    first = await created(full)
    await backend.received()
    second = await created(full)
    assert (await ended(full, second["id"]))["status"] == "completed"
    assert (await cancelled(other, first["id"]))["status"] == "cancelled"


async def test_children_that_become_ready_are_carried_out_by_all(start_hearing: StartHearing, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script, gated()[0])
    full = await start_hearing(workers=1)
    parent = (await created(full))["id"]
    await backend.received()
    other = await start_hearing(workers=2)
    for previous in (parent, parent, None):
        await created(full, {**RUN, "previous_response_id": previous})
    await backend.received()  # the other one has seen by then that the children are not ready
    goes_on.set()
    children = [await backend.received() for _ in range(2)]
    assert [said(child) for child in children] == [["Hi", "Hello", "Hi"]] * 2
    assert (await ended(other, parent))["status"] == "completed"


async def test_a_cancel_through_another_program_ends_the_call_of_the_backend(
    start_hearing: StartHearing, backend: Backend
) -> None:
    maker, other = await start_hearing(), await start_hearing(workers=0)
    backend.script(Script((chunk(content="Hel"),), end="silent"))
    response = await created(maker)
    request = await backend.received()
    assert (await cancelled(other, response["id"]))["status"] == "cancelled"
    assert await request.is_let_go()


async def test_a_reader_at_another_program_is_told_each_piece(start_hearing: StartHearing, backend: Backend) -> None:
    maker, other = await start_hearing(), await start_hearing(workers=0)
    gates = [asyncio.Event() for _ in range(5)]
    backend.script(Script([*(step for gate in gates for step in (chunk(content="x "), gate)), *END]))
    async with maker.post(STREAMED_RUN) as answer:
        block = await Blocks(answer).next()
        response_id = json.loads(block.partition("data: ")[2])["response"]["id"]
        async with other.http.get(f"{other.url}/v1/responses/{response_id}?stream=true") as tail:
            blocks = Blocks(tail)
            for gate in gates:
                await blocks.until("event: response.output_text.delta")
                gate.set()
            assert events_in(await blocks.rest())[-1]["type"] == "response.completed"


async def test_a_turn_that_waits_for_a_run_of_another_program_goes_on_at_its_end(
    start_hearing: StartHearing, backend: Backend
) -> None:
    maker, other = await start_hearing(), await start_hearing(workers=0)
    script, goes_on = gated()
    backend.script(script, plain("Two."))
    parent = (await created(maker))["id"]
    await backend.received()
    child = asyncio.create_task(foreground(other, previous_response_id=parent))
    for _ in range(3):
        await in_status(other, parent, "in_progress")
    goes_on.set()
    assert (await child)["status"] == "completed"


async def test_what_a_program_gives_back_at_its_end_is_begun_by_another(
    start_hearing: StartHearing, backend: Backend, place: PostgresPlace
) -> None:
    other = await start_hearing()
    backend.script(gated()[0], streamed("Hi"))
    async with running_app(settings_of(backend.url, store={"path": place.url}, sealing={"keys": (KEY,)})) as maker:
        response_id = (await created(maker))["id"]
        await backend.received()
    assert (await ended(other, response_id))["status"] == "completed"


async def test_a_program_that_ends_while_it_claims_gives_that_back_too(
    start_hearing: StartHearing, backend: Backend, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, release_runs = PostgresStore.claim, PostgresStore.release_runs
    has_begun, is_released = asyncio.Event(), asyncio.Event()

    async def late_claim(store: PostgresStore, *given: Any) -> list[Run]:
        has_begun.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await is_released.wait()
        return await asyncio.shield(claim(store, *given))  # the database does it, whoever has left

    async def released(store: PostgresStore, holder: str) -> None:
        await release_runs(store, holder)
        is_released.set()

    other = await start_hearing()
    backend.script(gated()[0], streamed("Hi"))
    async with running_app(settings_of(backend.url, store={"path": place.url}, sealing={"keys": (KEY,)})) as maker:
        responses = [await created(maker)]
        await backend.received()
        monkeypatch.setattr(PostgresStore, "claim", late_claim)
        monkeypatch.setattr(PostgresStore, "release_runs", released)
        responses.append(await created(maker))
        await has_begun.wait()
    for response in responses:
        assert (await ended(other, response["id"]))["status"] == "completed"


async def test_behind_a_pooler_a_cancel_through_another_program_is_seen(
    pool: dict[str, Any], backend: Backend, stack: AsyncExitStack
) -> None:
    maker, other = [
        await stack.enter_async_context(
            running_app(settings_of(backend.url, store=pool, sealing={"keys": (KEY,)}, background={"workers": workers}))
        )
        for workers in (2, 0)
    ]
    backend.script(Script((chunk(content="Hel"),), end="silent"), streamed("Hi"))
    response = await created(maker)
    request = await backend.received()
    assert (await cancelled(other, response["id"]))["status"] == "cancelled"
    assert await request.is_let_go()
    assert (await ended(maker, (await created(other))["id"]))["status"] == "completed"
