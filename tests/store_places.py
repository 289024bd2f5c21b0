"""Where stores are, for tests: what opens them, and what is in them, asked beside them.

The memory of one process, or what several may share: a file, a database.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
import resource
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
from postgres_server import Beside, emptied

from postgres_tables import TABLES
from run_verbs import RunStore
from store import StoreSettings, open_store
from store_postgres import open_store as open_postgres_store

Settings = dict[str, dict[str, Any]]


def environ_of(settings: Settings) -> dict[str, str]:
    """Settings as a process gets them with its environment."""
    return {
        f"RESPONSES_PROXY_{section}__{name}".upper(): ",".join(value) if isinstance(value, tuple) else str(value)
        for section, values in settings.items()
        for name, value in values.items()
    }


class MemoryPlace:
    """The memory of whoever opens it."""

    def __init__(self) -> None:
        self.address = ":memory:"
        self.settings: Settings = {"store": {"path": self.address}}

    async def open(self) -> RunStore:
        return await open_store(StoreSettings(self.address))

    def close(self) -> None:
        """Nothing is left."""


class FilePlace:
    """A new file. `settings` are those of a proxy that keeps its state there, and `environ` of one in a process."""

    LENGTHS = "SELECT owner, length FROM queue"
    ROUND = "SELECT owner FROM queue ORDER BY served"

    def __init__(self, path: Path | None = None) -> None:
        self._directory = None if path else tempfile.TemporaryDirectory()
        self.path = path or Path(self._directory.name if self._directory else "") / "responses.db"
        self.address = str(self.path)
        self.settings: Settings = {"store": {"path": self.address}}
        self.environ = environ_of(self.settings)
        # The settings of the store for a proxy that hardly waits for a lock.
        self.hasty: dict[str, Any] = {"busy_timeout_s": 0.1}
        self._beside: sqlite3.Connection | None = None

    async def open(self, **settings: Any) -> RunStore:
        return await open_store(StoreSettings(**{"path": self.address, **settings}))

    def asked(self, query: str, *values: Any) -> list[Any]:
        """What a statement gives or does, with values where it has a `?`."""
        if self._beside is None:
            self._beside = sqlite3.connect(self.path, isolation_level=None)
        return self._beside.execute(query, values).fetchall()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else can write meanwhile."""
        self.asked("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            self.asked("ROLLBACK")

    @contextlib.contextmanager
    def full(self, pid: int) -> Iterator[None]:
        """As if the disk were: no file of that process may become larger than the log of the store is."""
        log_bytes = self.path.with_name(f"{self.path.name}-wal").stat().st_size
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (log_bytes, hard))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    def holding(self, text: str) -> list[str]:
        """The names of the files beside it in which a text stands, its own among them."""
        return sorted(path.name for path in self.path.parent.iterdir() if text.encode() in path.read_bytes())

    def counts(self, tables: Iterable[str]) -> dict[str, int]:
        return {name: self.asked(f"SELECT count(*) FROM {name}")[0][0] for name in tables}

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
        if self._directory is not None:
            self._directory.cleanup()


KEY = base64.b64encode(b"k" * 32).decode()
# Several proxies of one test have to find room at the server.
CONNECTIONS = 4
FULL_DISK = """CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full', MESSAGE = 'no space left on device'; END $$"""
# Where a database counts something else: it has no row of an id, and keeps that of an owner until a purge.
QUEUED = "run WHERE holder IS NULL"
COUNTED = {"item_id": "item WHERE is_foreign", "queue": f"(SELECT owner FROM {QUEUED} GROUP BY owner) AS line"}


class PostgresPlace:
    """An empty database. `settings` and `environ` are as those of a file."""

    LENGTHS = f"SELECT owner, count(*) FROM {QUEUED} GROUP BY owner"
    ROUND = f"SELECT owner FROM queue WHERE owner IN (SELECT owner FROM {QUEUED}) ORDER BY served"

    def __init__(self) -> None:
        self.url = self.address = emptied()
        self.settings: Settings = {
            "store": {"path": self.url, "pool_size": CONNECTIONS},
            "sealing": {"keys": (KEY,)},
        }
        self.environ = environ_of(self.settings)
        self.hasty: dict[str, Any] = {"path": f"{self.url}&lock_timeout=100"}
        self._beside: Beside | None = None

    async def open(self, **settings: Any) -> RunStore:
        return await open_postgres_store(StoreSettings(**{"path": self.url, "pool_size": CONNECTIONS, **settings}))

    def asked(self, query: str, *values: Any) -> list[Any]:
        """What a statement gives or does, with values where it has a `?`."""
        if self._beside is None:
            self._beside = Beside(self.url)
        numbers = itertools.count(1)
        return self._beside.asked(re.sub(r"\?", lambda _: f"${next(numbers)}", query), *values)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else can write meanwhile; each statement is told so after the time that `hasty` allows."""
        while not self._has_locked():
            pass
        try:
            yield
        finally:
            self.asked("ROLLBACK")

    def _has_locked(self) -> bool:
        """Not where a proxy was writing just then, in another order of the tables."""
        self.asked("BEGIN")
        try:
            self.asked(f"LOCK TABLE {', '.join(TABLES)} IN EXCLUSIVE MODE")
        except asyncpg.DeadlockDetectedError:
            self.asked("ROLLBACK")
            return False
        return True

    @contextlib.contextmanager
    def full(self, pid: int) -> Iterator[None]:
        """As if the disk were: nothing is added, whichever process wants to."""
        self.asked(FULL_DISK)
        try:
            for table in TABLES:
                self.asked(
                    f"CREATE TRIGGER disk_is_full BEFORE INSERT OR UPDATE ON {table} EXECUTE FUNCTION full_disk()"
                )
            yield
        finally:
            for table in TABLES:
                self.asked(f"DROP TRIGGER IF EXISTS disk_is_full ON {table}")

    def holding(self, text: str) -> list[str]:
        """The names of the tables in which a text stands."""
        found = [f"%{text}%", f"%{text.encode().hex()}%"]
        held = "SELECT 1 FROM {0} WHERE {0}::text LIKE ANY(?::text[]) LIMIT 1"
        return [table for table in sorted(TABLES) if self.asked(held.format(table), found)]

    def counts(self, tables: Iterable[str]) -> dict[str, int]:
        names = list(tables)
        counts = ", ".join(f"(SELECT count(*) FROM {COUNTED.get(name, name)})" for name in names)
        return dict(zip(names, self.asked(f"SELECT {counts}")[0], strict=True))

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()


Place = FilePlace | PostgresPlace
