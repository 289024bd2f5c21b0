"""A duty of one process: who has it, who takes it over, and what is done under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from conftest import at, running_app, settings_of
from controlled import controlled
from replicas import Place
from scripted import Backend
from test_admissions import until
from test_quotas import Clock, clock

from duties import Duty
from run_verbs import RunStore
from sources import Ids, Sources
from store import StoreSettings, open_store
from upkeep import ended, purge_again_and_again
from verbs import Purged

__all__ = ["clock"]


@pytest.fixture
async def store() -> AsyncIterator[RunStore]:
    store = await open_store(StoreSettings(":memory:"))
    yield store
    await store.close()


def duty(store: RunStore, clock: Clock, name: str = "retention") -> Duty:
    return Duty(store, Sources(clock, Ids(clock)), name, 60.0)


async def test_a_duty_is_that_of_the_first_who_asks_for_as_long_as_it_asks_again(store: RunStore, clock: Clock) -> None:
    one, two = duty(store, clock), duty(store, clock)
    for _ in range(10):
        assert [await one.is_ours(), await two.is_ours()] == [True, False]
        clock.now += 31


async def test_another_one_takes_over_from_a_process_that_is_gone(store: RunStore, clock: Clock) -> None:
    gone, left = duty(store, clock), duty(store, clock)
    assert [await gone.is_ours(), await left.is_ours()] == [True, False]
    clock.now += 59
    assert await left.is_ours() is False
    clock.now += 31
    assert [await left.is_ours(), await gone.is_ours()] == [True, False]


async def test_another_one_has_it_at_once_when_it_is_given_up(store: RunStore, clock: Clock) -> None:
    one, two = duty(store, clock), duty(store, clock)
    assert [await one.is_ours(), await duty(store, clock, "another").is_ours()] == [True, True]
    await two.give_up()
    await one.give_up()
    assert [await two.is_ours(), await one.is_ours()] == [True, False]


async def test_the_store_is_asked_twice_in_the_time_of_the_lease(
    store: RunStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = controlled("acquire", monkeypatch)
    one = duty(store, clock)
    for _ in range(120):
        assert await one.is_ours()
        clock.now += 1
    assert asking.done == 4


async def has(place: Place, clock: Clock, name: str) -> bool:
    """Whether a running process has a duty: then it is nobody else's, at a time long ago."""
    store = await place.open()
    try:
        return not await Duty(store, Sources(lambda: 0.0, Ids(clock)), name, 60.0).is_ours()
    finally:
        await store.close()


@pytest.mark.parametrize("name", ["retention", "forgetting"])
async def test_a_running_proxy_has_its_duties_and_gives_them_up_when_it_stops(
    backend: Backend, place: Place, clock: Clock, name: str
) -> None:
    async with running_app(settings_of(backend.url, **at(place, {}))):
        await until(lambda: has(place, clock, name))
    assert not await has(place, clock, name)


async def test_of_two_processes_one_purges_until_it_stops(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upkeep.PURGE_EVERY_S", 0.001)
    settings = StoreSettings(str(tmp_path / "responses.db"))
    stores = [await open_store(settings) for _ in range(2)]
    purged_by: list[RunStore] = []
    for store in stores:
        monkeypatch.setattr(store, "purge", noting(store, purged_by), raising=False)
    one, two = (
        asyncio.create_task(purge_again_and_again(each, settings, Sources(clock, Ids(clock)))) for each in stores
    )
    await until(lambda: asyncio.sleep(0, len(purged_by) >= 20))
    (first,) = set(purged_by)
    await ended(one if first is stores[0] else two)
    clock.now += 1
    await until(lambda: asyncio.sleep(0, len(set(purged_by)) == 2))
    for task, store in zip((one, two), stores, strict=True):
        await ended(task)
        await store.close()


def noting(store: RunStore, done_by: list[RunStore]) -> Callable[..., Awaitable[Purged]]:
    async def purge(before_at: float, now: float) -> Purged:
        done_by.append(store)
        return Purged(0, 0)

    return purge


async def test_what_has_ended_is_forgotten_by_one_of_two_processes(
    backend: Backend, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetting, renewing = controlled("forget_ended", monkeypatch), controlled("renew_runs", monkeypatch)
    settings = settings_of(backend.url, store={"path": str(tmp_path / "responses.db")}, background={"lease_s": 600.0})
    async with running_app(settings):
        await until(lambda: asyncio.sleep(0, forgetting.done == 1))
        acquiring = controlled("acquire", monkeypatch)
        async with running_app(settings):
            await until(lambda: asyncio.sleep(0, (renewing.done, acquiring.done) == (2, 2)))
        assert forgetting.done == 1
