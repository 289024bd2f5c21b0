"""A store of each kind, opened for a test and closed after it.

A plugin that the tests of a store name, not a conftest.py: other tests say `from conftest import …` and mean the one
above, and two modules of one name are not to be had.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from store_builders import OpenStore, Place
from store_places import FilePlace, PostgresPlace

from store import StoreSettings, open_store
from verbs import Store


async def open_memory(_path: Path) -> Store:
    return await open_store(StoreSettings(path=":memory:"))


async def open_file(path: Path) -> Store:
    return await FilePlace(path).open()


async def open_postgres(_path: Path) -> Store:
    return await PostgresPlace().open()


OPEN: dict[str, Callable[[Path], Awaitable[Store]]] = {
    "file": open_file,
    "memory": open_memory,
    "postgres": open_postgres,
}


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "responses.db"


@pytest.fixture(params=sorted(OPEN))
async def store(request: pytest.FixtureRequest, store_path: Path) -> AsyncIterator[Store]:
    store = await OPEN[request.param](store_path)
    yield store
    await store.close()


@pytest.fixture
async def open_at(store_path: Path) -> AsyncIterator[OpenStore]:
    """Opens a store on the test's file, with settings: `await open_at(synchronous="FULL")`; closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_it(**settings: Any) -> Store:
            store = await open_store(StoreSettings(**{"path": str(store_path), **settings}))
            stack.push_async_callback(store.close)
            return store

        yield open_it


@pytest.fixture
async def open_in(place: Place) -> AsyncIterator[OpenStore]:
    """As `open_at`, on a store of any kind that several may share."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_it(**settings: Any) -> Store:
            store = await place.open(**settings)
            stack.push_async_callback(store.close)
            return store

        yield open_it
