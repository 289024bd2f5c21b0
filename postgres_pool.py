"""Connections to PostgreSQL: statements with named values, one transaction each, tried again where that is the rule.

May not know the tables. No message tells the address of the database, which may hold a password.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import asyncpg  # type: ignore[import-untyped]

from errors import StoreError

T = TypeVar("T")
Values = Mapping[str, Any]
Row = Mapping[str, Any]

RETRY_AFTER_S = 1.0
# How often a statement is begun that lost a race against another one.
ATTEMPTS = 5
NAMED = re.compile(r"(?<!:):([a-z_]+)")
# Classes of errors -> what to say of them; the first that fits.
# Source: postgresql.org/docs/current/errcodes-appendix.html, and asyncpg's exceptions.
REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (asyncpg.InvalidAuthorizationSpecificationError, "refuses the user or the password"),
    (asyncpg.InvalidCatalogNameError, "has no database of that name"),
    (asyncpg.InvalidSchemaNameError, "has no schema of the name in its address"),
    (asyncpg.InsufficientPrivilegeError, "may not be read or written by this user"),
    (asyncpg.TooManyConnectionsError, "takes no more connections"),
    (asyncpg.DiskFullError, "has no space left on its disk"),
    (asyncpg.ReadOnlySQLTransactionError, "may not be written"),
    (asyncpg.QueryCanceledError, "takes too long"),
    (asyncpg.LockNotAvailableError, "is locked by another process"),
    (asyncpg.CannotConnectNowError, "is starting or stopping"),
    (asyncpg.AdminShutdownError, "is stopping"),
    (asyncpg.PostgresConnectionError, "has lost its connection"),
    (asyncpg.ClientConfigurationError, "has an address that cannot be understood"),
    (asyncpg.InterfaceError, "has lost its connection"),
    (TimeoutError, "does not answer in time"),
    (OSError, "cannot be reached"),
    (ValueError, "has an address that cannot be understood"),
)
FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
# Two statements met: what one of them has read is not so any more. Tried again, it sees what the other one did.
RACES = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.ForeignKeyViolationError)
RACED_CONSTRAINTS = frozenset({"turn_place"})


def store_error(error: BaseException, what: str = "The store of responses") -> StoreError:
    """What a client is told of an error of PostgreSQL; the cause is kept for the log."""
    reason = next((reason for kind, reason in REASONS if isinstance(error, kind)), f"failed ({type(error).__name__})")
    refusal = StoreError(f"{what} {reason}.")
    refusal.retry_after_s = RETRY_AFTER_S
    refusal.__cause__ = error
    return refusal


def _is_race(error: BaseException) -> bool:
    if isinstance(error, asyncpg.UniqueViolationError):
        return error.constraint_name in RACED_CONSTRAINTS
    return isinstance(error, RACES)


class Statement:
    """SQL with `:named` values."""

    def __init__(self, text: str) -> None:
        self.names = list(dict.fromkeys(NAMED.findall(text)))
        self.text = NAMED.sub(lambda found: f"${self.names.index(found[1]) + 1}", text)

    def values(self, given: Values) -> list[Any]:
        """In the order of their numbers; there is no NUL in a text of PostgreSQL, and none in an id."""
        found = (given[name] for name in self.names)
        return [value.replace("\0", "\ufffd") if isinstance(value, str) else value for value in found]


class Asked(Protocol):
    """Whoever can be asked: the database, each statement for itself, or one transaction of it."""

    async def rows(self, statement: Statement, values: Values) -> list[Row]: ...

    async def row(self, statement: Statement, values: Values) -> Row | None: ...


Work = Callable[["Transaction"], Awaitable[T]]


class Transaction:
    """One transaction, or one state of the database. The verbs that take one make several statements."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def rows(self, statement: Statement, values: Values) -> list[Row]:
        found: list[Row] = await self._connection.fetch(statement.text, *statement.values(values))
        return found

    async def row(self, statement: Statement, values: Values) -> Row | None:
        found: Row | None = await self._connection.fetchrow(statement.text, *statement.values(values))
        return found

    async def run(self, text: str) -> None:
        """Statements without values."""
        await self._connection.execute(text)

    async def do(self, work: Work[T], **options: Any) -> T:
        """All of the work or nothing of it."""
        async with self._connection.transaction(**options):
            return await work(self)


class Database:
    """A pool of connections. `close` it."""

    def __init__(self, pool: asyncpg.Pool, patience_s: float) -> None:
        self._pool = pool
        self._patience_s = patience_s
        self._is_closed = False
        # How many verbs wait for a connection.
        self.waiting = 0

    async def rows(self, statement: Statement, values: Values) -> list[Row]:
        """In a transaction of its own. Raises: StoreError."""
        return await self._again(lambda connection: connection.rows(statement, values))

    async def row(self, statement: Statement, values: Values) -> Row | None:
        """In a transaction of its own. Raises: StoreError."""
        return await self._again(lambda connection: connection.row(statement, values))

    async def write(self, work: Work[T]) -> T:
        """All of the work or nothing of it. Raises: what it raises, and StoreError."""
        return await self._again(lambda connection: connection.do(work))

    async def read(self, work: Work[T]) -> T:
        """All of the work on one state of the database. Raises: what it raises, and StoreError."""
        return await self._again(lambda one: one.do(work, isolation="repeatable_read", readonly=True))

    async def _again(self, work: Work[T]) -> T:
        """Raises: StoreError."""
        attempts = ATTEMPTS
        while True:
            attempts -= 1
            try:
                return await self._once(work)
            except FAILURES as error:
                if not attempts or not _is_race(error):
                    raise store_error(error) from error

    async def _once(self, work: Work[T]) -> T:
        if self._is_closed:
            raise StoreError("The store of responses is closed.")
        self.waiting += 1
        try:
            connection = await self._pool.acquire(timeout=self._patience_s)
        finally:
            self.waiting -= 1
        try:
            return await work(Transaction(connection))
        finally:
            await self._pool.release(connection)

    async def close(self) -> None:
        """Finishes what has begun."""
        self._is_closed = True
        await self._pool.close()
