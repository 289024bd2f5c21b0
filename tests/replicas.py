"""Several proxies on one store, in one process of tests: on a file, and on a database."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import App, StartApp
from store_places import FilePlace, PostgresPlace

Place = FilePlace | PostgresPlace
PLACES = ("file", "postgres")
StartReplica = Callable[..., Awaitable[App]]


def place_of(kind: str, path: Path) -> Place:
    return FilePlace(path / "responses.db") if kind == "file" else PostgresPlace()


def sections_of(place: Place) -> dict[str, dict[str, Any]]:
    """The settings of a proxy whose store is there."""
    if isinstance(place, FilePlace):
        return {"store": {"path": str(place.path)}}
    keys = (base64.b64encode(b"k" * 32).decode(),)
    return {"store": {"path": place.url, "pool_size": 4}, "sealing": {"keys": keys}}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    place = place_of(request.param, tmp_path)
    yield place
    place.close()


@pytest.fixture
def replica(start_app: StartApp, place: Place) -> StartReplica:
    """Starts one more proxy on the test's store: `await replica(limits={...})`."""

    async def start(**sections: dict[str, Any]) -> App:
        store = sections_of(place)
        return await start_app(**{**store, **sections, "store": {**store["store"], **sections.get("store", {})}})

    return start
