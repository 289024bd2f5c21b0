"""Connections to SQLite on threads of their own, and lanes of work to them: what waits is done in one hop.

May not know the tables. On the writer's lane one hop is one transaction.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import aiosqlite

from errors import ProxyError, StoreError

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

# Result codes -> what to say of them. Source: sqlite.org/rescode.html.
REASONS = {
    sqlite3.SQLITE_BUSY: "is locked by another process",
    sqlite3.SQLITE_LOCKED: "is locked",
    sqlite3.SQLITE_FULL: "has no space left on its disk",
    sqlite3.SQLITE_IOERR: "cannot be read or written",
    sqlite3.SQLITE_READONLY: "may not be written",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_CORRUPT: "is damaged",
    sqlite3.SQLITE_NOTADB: "is not a database",
}
RETRY_AFTER_S = 1.0


def store_error(error: sqlite3.Error, what: str = "The store of responses") -> StoreError:
    """What a client is told of an error of SQLite; the cause is kept for the log."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    refusal = StoreError(f"{what} {REASONS.get(code, f'failed ({type(error).__name__})')}.")
    refusal.retry_after_s = RETRY_AFTER_S
    refusal.__cause__ = error
    return refusal


class DatabaseThread(aiosqlite.Connection):
    """A connection on a thread of its own, which does not keep a process from ending."""

    def __init__(self, path: str) -> None:
        """In autocommit mode: transactions are begun by name."""
        super().__init__(partial(sqlite3.connect, path, isolation_level=None, cached_statements=256), 64)
        self._thread.daemon = True

    async def run(self, work: Work[T]) -> T:
        """What the work returns, all of it done on the thread: one hop for many statements."""

        def hop() -> T:  # aiosqlite logs what it is given, which must not be work with a prompt in its arguments
            return work(self._conn)

        result: T = await self._execute(hop)  # type: ignore[no-untyped-call]
        return result


class Lane:
    """The work for one connection. What waits is done together, in one hop."""

    def __init__(
        self, thread: DatabaseThread, do_all: Callable[[Sequence[Work[Any]], sqlite3.Connection], list[Any]]
    ) -> None:
        self._thread = thread
        self._do_all = do_all
        self._waiting: list[tuple[asyncio.Future[Any], Work[Any]]] = []
        self._driver: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def waiting(self) -> int:
        """How much work has not begun."""
        return len(self._waiting)

    async def do(self, work: Work[T]) -> T:
        """What the work returns. Raises: what it raises, and StoreError."""
        self._refuse_closed()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, work))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await future

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise StoreError("The store of responses is closed.")

    async def _drive(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                outcomes = await self._thread.run(partial(self._do_all, [work for _, work in batch]))
            except Exception as error:  # noqa: BLE001 - handed to everybody who waits
                outcomes = [error] * len(batch)
            for (future, _), outcome in zip(batch, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    async def run_bare(self, work: Work[T]) -> T:
        """Work that cannot stand in a transaction. Raises: StoreError."""
        self._refuse_closed()
        try:
            return await self._thread.run(work)
        except sqlite3.Error as error:
            raise store_error(error) from error

    async def close(self) -> None:
        """Finishes what waits."""
        self._is_closed = True
        if self._driver is not None:
            await asyncio.wait({self._driver})
        await self._thread.close()


def _outcome(work: Work[Any], db: sqlite3.Connection) -> Any:
    """What the work returns, or its refusal; a work that refuses does so before its first write."""
    try:
        return work(db)
    except ProxyError as refusal:
        return refusal


def write_all(works: Sequence[Work[Any]], db: sqlite3.Connection) -> list[Any]:
    """All in one transaction; when one of them is at fault, each in its own."""
    return _do_all("BEGIN IMMEDIATE", works, db)


def read_all(works: Sequence[Work[Any]], db: sqlite3.Connection) -> list[Any]:
    """All on one state of the file; when one of them is at fault, each on its own."""
    return _do_all("BEGIN", works, db)


def _do_all(begin: str, works: Sequence[Work[Any]], db: sqlite3.Connection) -> list[Any]:
    try:
        return _transact(begin, works, db)
    except sqlite3.OperationalError as error:
        return [store_error(error) for _ in works]
    except Exception as error:  # noqa: BLE001 - handed to the one whose work it is
        if len(works) > 1:
            return [_do_all(begin, [work], db)[0] for work in works]
        return [store_error(error) if isinstance(error, sqlite3.Error) else error]


def _transact(begin: str, works: Sequence[Work[Any]], db: sqlite3.Connection) -> list[Any]:
    db.execute(begin)
    try:
        outcomes = [_outcome(work, db) for work in works]
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    return outcomes
