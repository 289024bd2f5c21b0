"""What processes on one database tell each other, and stores that work behind a pooler in transaction mode."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from postgres_pooler import pooled
from store_builders import DEADLINE_S
from store_places import PostgresPlace
from test_postgres_store import empty, made, place

import postgres_news
from errors import StoreError
from postgres_news import WORDS_AT_ONCE
from run_verbs import QUEUE, RunStore

__all__ = ["empty", "made", "place"]
LOGGER = "responses_proxy.postgres_news"
LISTENER = "(SELECT pid FROM pg_stat_activity WHERE application_name = 'responses-proxy' ORDER BY backend_start DESC)"


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
    stack: AsyncExitStack, place: PostgresPlace, made: Counter[str]
) -> None:
    one, two = [await an_ear(stack, place) for _ in range(2)]
    made.clear()
    for _ in range(100):
        one.store.announce("resp_first")
        one.store.announce("resp_second")
    await two.until_heard("resp_first", "resp_second")
    assert (sum(made.values()), two.times) == (1, 1)


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


async def test_the_last_words_of_a_process_are_heard(stack: AsyncExitStack, place: PostgresPlace) -> None:
    one = await an_ear(stack, place)
    async with AsyncExitStack() as other:
        ending = await an_ear(other, place)
        ending.store.announce("resp_1")
    await one.until_heard("resp_1")


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
    place.asked(f"SELECT pg_terminate_backend(pid) FROM {LISTENER} AS listener LIMIT 1")
    await two.until(lambda: two.missed == 3)
    one.store.announce("resp_1")
    await two.until_heard("resp_1")
    lost, back = caplog.messages
    assert "not heard, and looked for instead: The database has lost its connection." in lost
    assert back == "changes of other processes are heard again"


async def test_a_connection_that_does_not_answer_is_found_by_who_looks(
    stack: AsyncExitStack, place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store_postgres.ANSWER_WITHIN_S", 0.5)
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
        await self._execute("SELECT pg_sleep(60)")


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
