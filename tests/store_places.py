"""Where stores are that several may share, for tests: what opens them, and what is in them, asked beside them."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from postgres_server import Beside, emptied

from run_verbs import RunStore
from store import StoreSettings, open_store
from store_postgres import open_store as open_postgres_store


class FilePlace:
    """A new file."""

    LENGTHS = "SELECT owner, length FROM queue"
    ROUND = "SELECT owner FROM queue ORDER BY served"

    def __init__(self, path: Path | None = None) -> None:
        self._directory = None if path else tempfile.TemporaryDirectory()
        self.path = path or Path(self._directory.name if self._directory else "") / "responses.db"
        self._beside: sqlite3.Connection | None = None

    async def open(self, **settings: Any) -> RunStore:
        return await open_store(StoreSettings(**{"path": str(self.path), **settings}))

    def asked(self, query: str) -> list[Any]:
        if self._beside is None:
            self._beside = sqlite3.connect(self.path, isolation_level=None)
        return self._beside.execute(query).fetchall()

    def counts(self, tables: Iterable[str]) -> dict[str, int]:
        return {name: self.asked(f"SELECT count(*) FROM {name}")[0][0] for name in tables}

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
        if self._directory is not None:
            self._directory.cleanup()


# Where a database counts something else: it has no row of an id, and keeps that of an owner until a purge.
QUEUED = "run WHERE holder IS NULL"
COUNTED = {"item_id": "item WHERE is_foreign", "queue": f"(SELECT owner FROM {QUEUED} GROUP BY owner) AS line"}


class PostgresPlace:
    """An empty database."""

    LENGTHS = f"SELECT owner, count(*) FROM {QUEUED} GROUP BY owner"
    ROUND = f"SELECT owner FROM queue WHERE owner IN (SELECT owner FROM {QUEUED}) ORDER BY served"

    def __init__(self) -> None:
        self.url = emptied()
        self._beside: Beside | None = None

    async def open(self, **settings: Any) -> RunStore:
        return await open_postgres_store(StoreSettings(**{"path": self.url, "pool_size": 4, **settings}))

    def asked(self, query: str) -> list[Any]:
        if self._beside is None:
            self._beside = Beside(self.url)
        return self._beside.asked(query)

    def counts(self, tables: Iterable[str]) -> dict[str, int]:
        names = list(tables)
        counts = ", ".join(f"(SELECT count(*) FROM {COUNTED.get(name, name)})" for name in names)
        return dict(zip(names, self.asked(f"SELECT {counts}")[0], strict=True))

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
