"""The verbs of background runs once more, and what many do at once, behind a pooler in transaction mode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from postgres_pooler import pooled
from run_builders import LEASE_S, OpenRunStore, admit, queued
from store_builders import NOW, OWNER, both_of, save_chain, turn, window_ids
from store_places import PostgresPlace
from test_run_verbs import *  # noqa: F403

from run_verbs import RunStore

pytestmark = pytest.mark.stores("postgres")


class PooledPlace(PostgresPlace):
    """An empty database whose stores reach it through a pooler."""

    address = ""

    async def open(self, **settings: Any) -> RunStore:
        return await super().open(**{"path": self.address, "prepared_statements": False, **settings})


@pytest.fixture
async def place() -> AsyncIterator[PooledPlace]:
    place = PooledPlace()
    with contextlib.closing(place):
        async with pooled(place.url) as place.address:
            yield place


@pytest.fixture
async def store(place: PooledPlace) -> AsyncIterator[RunStore]:
    store = await place.open()
    yield store
    await store.close()


async def test_what_many_do_at_once_behind_a_pooler_is_whole(open_in: OpenRunStore) -> None:
    stores = [await open_in() for _ in range(2)] * 10
    await save_chain(stores[0], "a", "b")
    await asyncio.gather(*(store.save(turn(f"c{n}", "b")) for n, store in enumerate(stores)))
    assert [await window_ids(stores[0], f"c{n}") for n in range(20)] == [both_of("a", "b", f"c{n}") for n in range(20)]
    await asyncio.gather(*(admit(store, queued(f"r{n}")) for n, store in enumerate(stores)))
    claims = await asyncio.gather(*(store.claim("me", NOW + LEASE_S, 5) for store in stores))
    assert sorted(run.response_id for runs in claims for run in runs) == sorted(f"r{n}" for n in range(20))
    assert await stores[1].delete_response(OWNER, "a", NOW)
    assert await stores[0].problems() == []
