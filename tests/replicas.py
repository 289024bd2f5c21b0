"""Several proxies on one store, in one process of tests: on a file, and on a database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import App, StartApp, at
from store_places import FilePlace, Place, PostgresPlace

PLACES = ("file", "postgres")
StartReplica = Callable[..., Awaitable[App]]


def place_of(kind: str, path: Path) -> Place:
    return FilePlace(path / "responses.db") if kind == "file" else PostgresPlace()


@pytest.fixture
def replica(start_app: StartApp, place: Place) -> StartReplica:
    """Starts one more proxy on the test's store: `await replica(limits={...})`."""

    async def start(**sections: dict[str, Any]) -> App:
        return await start_app(**at(place, sections))

    return start
