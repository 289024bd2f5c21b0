"""One side of a copy that is a database: its rows in pages, as `copying.TABLES` has them, and rows into its tables.

May not know what is copied into what. All of a source is read in one transaction, which keeps others from writing.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import asyncpg  # type: ignore[import-untyped]

from copying import PAGE_BYTES, PAGE_ROWS, TABLES, Displaced, Row, Slice, prepare
from errors import StoreError
from postgres_advice import opening_error
from postgres_errors import FAILURES, store_error
from postgres_opening import CACHED_STATEMENTS
from postgres_pool import Transaction
from postgres_reads import problems
from postgres_tables import COPYING, MIGRATING, MIGRATIONS
from postgres_tables import TABLES as ALL_TABLES
from store import StoreSettings, shown
from store_postgres import open_store
from writes import settings_digest

NAME = "responses-proxy copy"
PATIENCE = "SET LOCAL lock_timeout = '5s'; SET LOCAL idle_in_transaction_session_timeout = 0"
# Columns of bytes, which make the size of a page.
BYTES = ("value", "body", "metadata", "request", "ahead")
# What is in use. The keys that were seen stay for a month, and a killed process has the duty to purge for an hour.
IN_USE = """SELECT (SELECT count(*) FROM run WHERE holder IS NOT NULL AND until_at > $1) AS runs,
    (SELECT count(*) FROM lease WHERE until_at > $1 AND name NOT IN ('sealing keys', 'duty retention')) AS leases"""
DISPLACED = """SELECT seq, behind FROM (SELECT seq, depth, max(seq) OVER (PARTITION BY thread ORDER BY depth) AS behind
    FROM turn) AS placed WHERE seq < behind ORDER BY behind, depth"""
PROGRESS = "CREATE TABLE copy_progress (name text PRIMARY KEY, value bytea NOT NULL)"
NOTE = "UPDATE copy_progress SET value = $1 WHERE name = $2 AND value = $3"
LAST = {
    "turn": "SELECT max(seq) FROM turn",
    "thread": "SELECT max(seq) FROM thread",
    "run": "SELECT greatest((SELECT max(seq) FROM run), (SELECT max(run) FROM log))",
}
FINISH = (
    *(
        f"SELECT setval(pg_get_serial_sequence('{table}', 'seq'), coalesce(({n}), 0) + 1, false)"
        for table, n in LAST.items()
    ),
    "SELECT setval('round', (SELECT coalesce(max(served), 0) + 1 FROM queue), false)",
    "DROP TABLE copy_progress",
    f"UPDATE responses_proxy SET version = {len(MIGRATIONS)}",
)


class _Read(NamedTuple):
    """Where the rows of a table come from, and what a row becomes."""

    key: tuple[str, ...]
    query: str
    row: Callable[[Row], Row] = lambda row: row


def _direct(key: str, table: str) -> _Read:
    return _Read(tuple(key.split()), f"SELECT {', '.join(TABLES[table])} FROM {table}")


def _settings(row: Row) -> Row:
    key, owner, brief_id, model, body = row
    return key, owner, settings_digest(model, body, brief_id or ""), model, body


READS: dict[str, _Read] = {
    "secret": _direct("name", "secret"),
    "learned": _direct("name", "learned"),
    "settings": _Read(
        ("key",),
        """SELECT digest AS key, turn.owner, CASE WHEN turn.lives_until IS NOT NULL THEN turn.id END AS brief_id, model,
        settings.body FROM settings CROSS JOIN LATERAL
        (SELECT owner, id, lives_until FROM turn WHERE turn.settings = settings.digest LIMIT 1) AS turn""",
        _settings,
    ),
    "thread": _direct("seq", "thread"),
    "turn": _direct("seq", "turn"),
    "item": _direct("turn place", "item"),
    "conversation": _direct("id", "conversation"),
    "first_use": _direct("owner key", "first_use"),
    "run": _direct("seq", "run"),
    "queue": _Read(
        ("owner",),
        """SELECT owner, CASE WHEN EXISTS (SELECT FROM run WHERE run.owner = queue.owner AND holder IS NULL)
        THEN served ELSE 0 END AS served FROM queue WHERE EXISTS (SELECT FROM run WHERE run.owner = queue.owner)""",
    ),
    "log": _direct("run", "log"),
    "event": _direct("run first", "event"),
}
# Table -> columns of the database, and the places of their values in a row of `copying.TABLES`.
PUTS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    **{table: (columns, tuple(range(len(columns)))) for table, columns in TABLES.items()},
    "settings": (("digest", "model", "body"), (0, 3, 4)),
}


def _page_query(table: str, is_first: bool) -> str:
    """A page's rows as long as its bytes do not come to more; a body is only read when it is sent."""
    read = READS[table]
    keys = ", ".join(read.key)
    names = ", ".join(TABLES[table]) if table != "settings" else "key, owner, brief_id, model, body"
    size = " + ".join([f"coalesce(octet_length({name}), 0)" for name in TABLES[table] if name in BYTES] or ["0"])
    behind = "" if is_first else f"WHERE ({keys}) > ({', '.join(f'${n}' for n in range(1, len(read.key) + 1))})"
    return f"""SELECT {names} FROM (SELECT next.*, sum({size}) OVER (ORDER BY {keys}) - ({size}) AS earlier_bytes
        FROM (SELECT * FROM ({read.query}) AS every {behind} ORDER BY {keys} LIMIT {PAGE_ROWS}) AS next) AS page
        WHERE earlier_bytes < {PAGE_BYTES} ORDER BY {keys}"""


@contextlib.asynccontextmanager
async def opened(settings: StoreSettings, is_source: bool) -> AsyncIterator[DatabaseSide]:
    """Raises: StoreError."""
    what = f"'{shown(settings.path)}'"
    await prepare(open_store(settings, may_make=not is_source), is_source)
    connection = await _connected(what, settings)
    try:
        side = DatabaseSide(connection, what)
        async with side.held() if is_source else contextlib.nullcontext():
            yield side
    finally:
        await connection.close(timeout=settings.connect_timeout_s)


async def _connected(what: str, settings: StoreSettings) -> asyncpg.Connection:
    """Raises: StoreError."""
    session = {"application_name": NAME} | ({"jit": "off"} if settings.prepared_statements else {})
    cached = CACHED_STATEMENTS if settings.prepared_statements else 0
    try:
        return await asyncpg.connect(
            settings.path, timeout=settings.connect_timeout_s, statement_cache_size=cached, server_settings=session
        )
    except (*FAILURES, ValueError) as error:
        raise opening_error(error, what) from None


class DatabaseSide:
    """The verbs of `copying.Side` on a database."""

    kind = "database"
    needs_rising = False
    takes_nul = False

    def __init__(self, connection: asyncpg.Connection, what: str) -> None:
        self._connection = connection
        self.what = what

    @contextlib.contextmanager
    def _told(self) -> Any:
        try:
            yield
        except FAILURES as error:
            raise store_error(error, self.what) from error

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nobody else writes meanwhile. Raises: StoreError."""
        async with self._connection.transaction():
            try:
                await self._connection.execute(f"{PATIENCE}; SET LOCAL statement_timeout = 0")
                await self._connection.execute(f"LOCK TABLE {', '.join(ALL_TABLES)} IN SHARE MODE")
            except asyncpg.LockNotAvailableError as error:
                raise StoreError(f"{self.what} is being written: stop the proxies first") from error
            except FAILURES as error:
                raise store_error(error, self.what) from error
            yield

    async def refuse_use(self, now: float) -> None:
        with self._told():
            found = await self._connection.fetchrow(IN_USE, now)
        if found["runs"] or found["leases"]:
            raise StoreError(
                f"{self.what} is in use: {found['runs']} background responses are carried out and {found['leases']} "
                "leases are held; stop the proxies first (SIGTERM gives the responses back to the queue; what a "
                "process held that died is free after half a minute)"
            )

    async def counts(self) -> dict[str, int]:
        with self._told():
            return {name: await self._connection.fetchval(f"SELECT count(*) FROM {name}") for name in ALL_TABLES}

    async def displaced(self) -> list[Displaced]:
        with self._told():
            return [Displaced(*row.values()) for row in await self._connection.fetch(DISPLACED)]

    async def page(self, table: str, after: list[Any] | None) -> Slice:
        read = READS[table]
        with self._told():
            found = await self._connection.fetch(_page_query(table, after is None), *(after or ()))
        last = [found[-1][name] for name in read.key] if found else []
        return Slice([read.row(tuple(row)) for row in found], last)

    async def progress(self) -> dict[str, bytes]:
        with self._told():
            version = await self._connection.fetchval("SELECT version FROM responses_proxy")
            if version < COPYING:
                return {}
            if version != COPYING + len(MIGRATIONS):
                raise StoreError(f"{self.what} holds an unfinished copy of another version of this program: empty it")
            return {row["name"]: row["value"] for row in await self._connection.fetch("SELECT * FROM copy_progress")}

    async def begin(self, notes: dict[str, bytes]) -> None:
        with self._told():
            async with self._connection.transaction():
                await self._connection.execute(f"SELECT pg_advisory_xact_lock({MIGRATING})")
                if any((await self.counts()).values()):
                    raise StoreError(f"{self.what} is not empty: copy into a database or a schema of its own")
                await self._connection.execute(PROGRESS)
                await self._connection.copy_records_to_table("copy_progress", records=list(notes.items()))
                await self._connection.execute(f"UPDATE responses_proxy SET version = {COPYING + len(MIGRATIONS)}")

    async def put(self, table: str, rows: list[Row], notes: tuple[bytes, bytes]) -> None:
        columns, places = PUTS[table]
        records = rows if len(columns) == len(TABLES[table]) else [tuple(row[n] for n in places) for row in rows]
        with self._told():
            async with self._connection.transaction():
                await self._connection.execute("SET LOCAL statement_timeout = 0")
                await self._connection.copy_records_to_table(table, records=records, columns=columns)
                await self._note(table, notes)

    async def _note(self, table: str, notes: tuple[bytes, bytes]) -> None:
        before, after = notes
        if await self._connection.execute(NOTE, after, table, before) != "UPDATE 1":
            raise StoreError(f"another copy into {self.what} is under way")

    async def problems(self) -> list[str]:
        with self._told():
            return await problems(Transaction(self._connection))

    async def finish(self) -> None:
        with self._told():
            async with self._connection.transaction():
                for statement in FINISH:
                    await self._connection.execute(statement)
            await self._connection.execute(f"ANALYZE {', '.join(ALL_TABLES)}")
