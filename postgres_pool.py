"""Connections to PostgreSQL: statements with named values, one transaction each, tried again where that is the rule.

May not know the tables. A verb has one deadline for everything: a place in the pool, a connection, its statements, and
what is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import asyncpg  # type: ignore[import-untyped]

from errors import ProxyError, StoreError
from postgres_errors import BUSY, FAILURES, LOST, Unheard, is_race, reason_of, refusal, store_error, unheard
from postgres_presence import GRACE_S, Chance, Presence

T = TypeVar("T")
Values = Mapping[str, Any]
Row = Mapping[str, Any]

# How often a statement is begun that lost a race against another one.
ATTEMPTS = 5
# How long the database may take to say that it has given up a statement; its connection is cut then.
CANCEL_S = 1.0
# What is not done for a request, a purge or a migration, may take longer.
PATIENT_S = 600.0
# After that long without a word it is looked whether a connection is still one, and how long that may take.
IDLE_S, PING_S = 10.0, 1.0
# What goes on is finished before the end, but not for longer.
CLOSE_S = 5.0
NAMED = re.compile(r"(?<!:):([a-z_]+)")


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
        transaction = self._connection.transaction(**options)
        async with contextlib.AsyncExitStack() as undoing:
            undoing.push_async_callback(self._undo, transaction)
            await transaction.start()
            found = await work(self)
            await transaction.commit()
            undoing.pop_all()
        return found

    async def _undo(self, transaction: asyncpg.transaction.Transaction) -> None:
        """A database that does not even answer to that loses its connection, and ends the transaction by itself."""
        with contextlib.ExitStack() as cutting:
            cutting.callback(self._connection.terminate)
            with contextlib.suppress(*FAILURES):
                async with asyncio.timeout(CANCEL_S):
                    await transaction.rollback()
                    cutting.pop_all()


class Limits(NamedTuple):
    """How many places the pool has, how long a verb waits for one, and how long it may take in all."""

    places: int
    place_s: float
    verb_s: float


class NotSent(Exception):
    """There was no connection; whatever was to be asked was not."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Verb:
    """What is asked of the database for one verb, within its one deadline.

    `repeats`: a statement whose answer was lost is made again, since it may be made twice.
    """

    def __init__(self, database: Database, limit_s: float, repeats: bool) -> None:
        self._database = database
        self._repeats = repeats
        self._attempt_s = limit_s / 2
        self._ends_at = asyncio.get_running_loop().time() + max(limit_s - CANCEL_S, limit_s / 2)

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
        now = asyncio.get_running_loop().time
        was_cancelled = _cancellations()
        if now() >= self._ends_at:
            raise Presence.told(store_error(TimeoutError()))
        give_up_at, has_lost = min(now() + GRACE_S, self._ends_at), self._database.is_away
        for attempt in itertools.count(1):
            try:
                return await self._database.attempt(work, min(now() + self._attempt_s, self._ends_at), give_up_at)
            except (*FAILURES, NotSent) as failure:
                if _cancellations() > was_cancelled:  # its clean-up failed, and hid that
                    raise asyncio.CancelledError from failure
                if is_race(failure) and attempt < ATTEMPTS:
                    continue
                is_lost = isinstance(failure, (*LOST, NotSent))
                if is_lost and not has_lost:
                    give_up_at, has_lost = min(now() + GRACE_S, self._ends_at), True
                if not is_lost or now() >= give_up_at or not self._may_repeat(failure):
                    raise self._told(failure, is_lost) from failure
        raise AssertionError("it has returned or raised")

    def _may_repeat(self, failure: BaseException) -> bool:
        return self._repeats or isinstance(failure, NotSent)

    def _told(self, failure: BaseException, is_lost: bool) -> StoreError:
        if isinstance(failure, NotSent):
            return Presence.told(store_error(failure.error))
        return Presence.told(unheard(failure) if is_lost and not self._repeats else store_error(failure))


class Database:
    """A pool of connections. `close` it."""

    def __init__(self, pool: asyncpg.Pool, known: Known, limits: Limits, chance: Chance = random.random) -> None:
        """`known`: the connections of the pool."""
        self._pool = pool
        self._known = known
        self._limits = limits
        self._presence = Presence(chance)
        self._places = asyncio.Semaphore(limits.places)
        self._is_closed = False
        # Process of the database -> when its connection was used last; none while it is in use.
        self._used_at: dict[int, float | None] = {}
        self._dropped_at = -math.inf
        self._releasing: set[asyncio.Task[None]] = set()
        # How many verbs wait for a connection.
        self.waiting = 0

    @property
    def is_away(self) -> bool:
        return self._presence.is_away

    def verb(self, *, repeats: bool = True, is_patient: bool = False) -> Verb:
        """The deadline of a verb begins now."""
        return Verb(self, PATIENT_S if is_patient else self._limits.verb_s, repeats)

    async def rows(self, statement: Statement, values: Values) -> list[Row]:
        """In a transaction of its own. Raises: StoreError."""
        return await self.verb().rows(statement, values)

    async def row(self, statement: Statement, values: Values) -> Row | None:
        """In a transaction of its own. Raises: StoreError."""
        return await self.verb().row(statement, values)

    async def write(self, work: Work[T]) -> T:
        """All of the work or nothing of it. Raises: what it raises, and StoreError."""
        return await self.verb().write(work)

    async def read(self, work: Work[T]) -> T:
        """All of the work on one state of the database. Raises: what it raises, and StoreError."""
        return await self.verb().read(work)

    async def attempt(self, work: Work[T], until_at: float, give_up_at: float) -> T:
        """Once. Raises: what the work raises, NotSent, and StoreError when the database is away until `give_up_at`."""
        if self._is_closed:
            raise StoreError("The store of responses is closed.")
        began_at = asyncio.get_running_loop().time()
        async with self._turn(until_at, give_up_at):
            try:
                async with self._connected(until_at) as connection, asyncio.timeout_at(until_at):
                    found = await work(Transaction(connection))
            except (*FAILURES, NotSent) as failure:
                self._note(failure, began_at)
                raise
            self._presence.answered()
            return found

    @contextlib.asynccontextmanager
    async def _turn(self, until_at: float, give_up_at: float) -> AsyncIterator[None]:
        """A place in the pool, while the database is not away; or as the one who asks whether it is."""
        self.waiting += 1
        try:
            is_scout = await self._placed(until_at, give_up_at)
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._places.release()
            if is_scout:
                self._presence.scouted()

    async def _placed(self, until_at: float, give_up_at: float) -> bool:
        """Whether as the one who asks. Raises: StoreError."""
        while True:
            is_scout, has_place = await self._presence.admitted(give_up_at), False
            try:
                has_place = await self._has_place(until_at)
            finally:
                if is_scout and not has_place:
                    self._presence.scouted()
            if not has_place:
                self._presence.tell(BUSY)
                raise Presence.told(refusal(BUSY))
            if is_scout or not self._presence.is_away:
                return is_scout
            self._places.release()

    async def _has_place(self, until_at: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(until_at, asyncio.get_running_loop().time() + self._limits.place_s)):
                return await self._places.acquire()
        return False

    @contextlib.asynccontextmanager
    async def _connected(self, until_at: float) -> AsyncIterator[asyncpg.Connection]:
        """Raises: NotSent."""
        try:
            async with asyncio.timeout_at(until_at):
                connection = await self._pool.acquire()
        except (*FAILURES, ValueError) as error:
            raise NotSent(error) from error
        process, is_whole = connection.get_server_pid(), False
        used_at, self._used_at[process] = self._used_at.get(process), None
        try:
            if used_at is not None:
                await _look_at(connection, used_at, until_at)
            yield connection
            is_whole = True
        except (*LOST, asyncpg.ReadOnlySQLTransactionError) as error:
            if not isinstance(error, TimeoutError):  # that may be the statement's own fault
                connection.terminate()
            raise
        finally:
            try:
                await self._release(connection, is_whole)
            finally:
                self._used_at[process] = asyncio.get_running_loop().time()

    async def _release(self, connection: asyncpg.Connection, is_whole: bool) -> None:
        """What cannot be given back in order is cut, and made anew when it is needed."""
        if is_whole:
            with contextlib.suppress(*FAILURES):
                await self._pool.release(connection)
        else:
            task = asyncio.create_task(self._release_broken(connection))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)
            await asyncio.wait({task})
        if len(self._used_at) > 4 * self._limits.places:
            living = {each.get_server_pid() for each in self._known if not each.is_closed()}
            self._used_at = {each: at for each, at in self._used_at.items() if each in living}

    async def _release_broken(self, connection: asyncpg.Connection) -> None:
        """Waits for the end of what was given up, though whoever gave it up does not."""
        with contextlib.suppress(*FAILURES):
            await self._pool.release(connection, timeout=CANCEL_S)

    def _note(self, failure: BaseException, began_at: float) -> None:
        error = failure.error if isinstance(failure, NotSent) else failure
        if is_race(error):
            return
        if isinstance(failure, (*LOST, NotSent)):
            self._presence.missed(reason_of(error))
        else:
            self._presence.tell(reason_of(error))
        if isinstance(failure, (*LOST, NotSent, asyncpg.ReadOnlySQLTransactionError)) and began_at > self._dropped_at:
            self._drop_idle()

    def _drop_idle(self) -> None:
        """What happened to one connection has perhaps happened to all of them, and is not noticed while they idle."""
        self._dropped_at = asyncio.get_running_loop().time()
        for connection in list(self._known):
            if not connection.is_closed() and self._used_at.get(connection.get_server_pid()) is not None:
                connection.terminate()

    async def close(self) -> None:
        """Finishes what has begun."""
        self._is_closed = True
        if self._releasing:
            await asyncio.wait(self._releasing)
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(CLOSE_S):
                await self._pool.close()


Known = weakref.WeakSet[asyncpg.Connection]


async def _look_at(connection: asyncpg.Connection, used_at: float, until_at: float) -> None:
    """Whether one that was idle is still a connection. Raises: NotSent."""
    now = asyncio.get_running_loop().time()
    if now - used_at < IDLE_S:
        return
    try:
        async with asyncio.timeout_at(min(until_at, now + PING_S)):
            await connection.execute("SELECT")
    except FAILURES as error:
        connection.terminate()
        raise NotSent(error) from error


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task else 0


Attempt = Callable[[], Awaitable[bool | None]]


async def surely(attempt: Attempt, is_done: Callable[[], Awaitable[bool]]) -> bool:
    """What the attempt gives. When its answer was lost it is made again, and may find that it was done the first time.

    Raises: what the attempt raises.
    """
    try:
        return await attempt() is not False
    except Unheard as unsure:
        return await _once_more(attempt, is_done, unsure)


async def _once_more(attempt: Attempt, is_done: Callable[[], Awaitable[bool]], unsure: Unheard) -> bool:
    try:
        return await attempt() is not False
    except ProxyError:
        try:
            was_done = await is_done()
        except StoreError:
            raise unsure from None
        if not was_done:
            raise
        return True


async def gone(attempt: Callable[[], Awaitable[bool]]) -> bool:
    """Whether something is gone by this attempt, be it that the answer was lost the first time."""
    with contextlib.suppress(Unheard):
        return await attempt()
    await attempt()
    return True
