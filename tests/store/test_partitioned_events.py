"""The statements of docs/scaling.md, carried out below a running store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from postgres_server import Beside
from run_builders import batch, begin, ending, queued
from store_builders import NOW, OWNER, turn
from store_places import PostgresPlace

from run_verbs import RunStore
from store import StoreSettings
from store_postgres import open_store

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "scaling.md"
CHURN, PARTITION, DETACH = re.findall(r"^```sql\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


async def told(store: RunStore, response_id: str) -> bytes:
    tail = await store.tail(OWNER, response_id, -1)
    return b"".join(frames for _, frames in tail.batches) if tail else b""


@pytest.fixture
def beside() -> Iterator[tuple[Beside, str]]:
    """A connection to a schema of its own, and the address of that."""
    name = "partitioned"
    with closing(PostgresPlace()) as place, closing(Beside(place.url)) as first:
        first.do(f"DROP SCHEMA IF EXISTS {name} CASCADE; CREATE SCHEMA {name}")
        url = f"{place.url.rpartition('search_path=')[0]}search_path={name}"
        with closing(Beside(url)) as own:
            yield own, url
        first.do(f"DROP SCHEMA {name} CASCADE")


async def test_the_log_goes_on_in_partitions_below_a_running_store(beside: tuple[Beside, str]) -> None:
    asked, url = beside
    store = await open_store(StoreSettings(path=url, pool_size=2))
    try:
        before = await begin(store, queued("before"), batch=batch(0, 2))
        assert await store.log(before, batch(2, 2))
        asked.do(CHURN + PARTITION)
        asked.do("ALTER TABLE run ALTER seq RESTART WITH 1000000")
        assert await store.log(before, batch(4, 1))
        after = await begin(store, queued("after"), batch=batch(0, 2))
        assert [await store.log(after, batch(2, count)) for count in (1, 2)] == [True, True]
        assert await told(store, "before") == b"0. 1. 2. 3. 4. "
        assert await told(store, "after") == b"0. 1. 2. 3. "
        assert asked.asked("SELECT (SELECT count(*) FROM event_before), (SELECT count(*) FROM event_1)") == [(3, 2)]
        for held, name in ((before, "before"), (after, "after")):
            assert await store.settle(held, ending(turn(name)))
        assert await store.delete_response(OWNER, "before", NOW)
        asked.do(DETACH)
        assert asked.asked("SELECT to_regclass('event_before')::text") == [(None,)]
        assert await told(store, "after") == b"0. 1. 2. 3. "
        await store.forget_ended(NOW + 1e6)
        assert asked.asked("SELECT count(*) FROM event") == [(0,)]
    finally:
        await store.close()
