"""One side of a copy that is a file: its rows in pages, as `copying.TABLES` has them, and rows into its tables.

May not know what is copied into what. The file is locked against every other process while it is open here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from copying import LEFT_BEHIND, PAGE_BYTES, PAGE_ROWS, TABLES, Displaced, Row, Slice, prepare
from errors import StoreError
from lanes import DatabaseThread, store_error
from reads import problems
from run_tables import NUMBERS
from schema import APPLICATION_ID, COPYING_ID, MIGRATIONS, PLACES
from store import StoreSettings, open_store
from writes import settings_key

T = TypeVar("T")

PATIENCE_S = 1.0
# What the file has besides, to be counted when it has to be empty.
ALL_TABLES = (*TABLES, *LEFT_BEHIND, "item_id")
# Only what turns have: a purge would erase the others, and databases do not tell whose they are.
ORPHANS = """CREATE TEMP TABLE orphan AS SELECT seq FROM settings
    WHERE seq NOT IN (SELECT settings FROM turn WHERE settings IS NOT NULL)"""
PROGRESS = "CREATE TABLE copy_progress (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
KEYS = "CREATE TABLE copy_settings (key BLOB PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID"
NOTE = "UPDATE copy_progress SET value = ? WHERE name = ? AND value = ?"
RUN_NUMBERS = """INSERT INTO sqlite_sequence (name, seq)
    SELECT 'run', max((SELECT coalesce(max(seq), 0) FROM run), (SELECT coalesce(max(run), 0) FROM log))"""
FALLING = """SELECT 'turn ' || later.seq || ' comes behind ' || turn.seq || ' in its thread' FROM turn
    JOIN turn AS later ON later.thread = turn.thread AND later.depth = turn.depth + 1
    AND later.seq < turn.seq LIMIT 9"""


class _Identified(msgspec.Struct):
    id: str


ID_OF = msgspec.json.Decoder(_Identified)


class _Read(NamedTuple):
    """Where the rows of a table come from, and what a row becomes; its key stands in front of it."""

    key: tuple[str, ...]
    columns: str
    source: str
    row: Callable[[sqlite3.Connection, Row], Row] = lambda db, row: row


def _item(db: sqlite3.Connection, row: Row) -> Row:
    seq, kind, is_removed, body = row
    item_id = ID_OF.decode(body).id
    found = db.execute("SELECT 1 FROM item_id WHERE id = ? AND item = ?", (item_id, seq)).fetchone()
    return seq // PLACES, seq % PLACES, kind, bool(is_removed), found is not None, item_id, body


def _direct(key: str, table: str) -> _Read:
    return _Read(tuple(key.split()), ", ".join(f"{table}.{column}" for column in TABLES[table]), table)


def _turn(db: sqlite3.Connection, row: Row) -> Row:
    *own, digest = row
    own[6] = None if digest is None else settings_key(row[2], digest)
    return tuple(own)


READS: dict[str, _Read] = {
    "secret": _direct("secret.name", "secret"),
    "learned": _direct("learned.name", "learned"),
    "settings": _Read(
        ("settings.seq",),
        "owner, digest, model, body",
        "settings WHERE seq NOT IN (SELECT seq FROM temp.orphan) AND true",
        lambda db, row: (settings_key(row[0], row[1]), *row),
    ),
    "thread": _Read(
        ("thread.seq",),
        "seq, parent, parent_depth, coalesce((SELECT max(depth) FROM turn WHERE turn.thread = thread.seq), -1), "
        "is_conversation",
        "thread",
        lambda db, row: (*row[:4], bool(row[4])),
    ),
    "turn": _Read(
        ("turn.seq",),
        f"{', '.join(f'turn.{column}' for column in TABLES['turn'])}, settings.digest",
        "turn LEFT JOIN settings ON settings.seq = turn.settings",
        _turn,
    ),
    "item": _Read(("item.seq",), "item.seq, kind, is_removed, body", "item", _item),
    "conversation": _direct("conversation.id", "conversation"),
    "first_use": _direct("first_use.owner first_use.key", "first_use"),
    "run": _Read(
        ("run.seq",),
        "seq, nullif(turn, 0), owner, conversation, request, bearer, admitted_at, (SELECT other.seq FROM run AS other "
        "WHERE other.seq = run.waits_for), holder, until_at, generation, attempts, next_number, is_stopped",
        "run",
        lambda db, row: (*row[:13], bool(row[13])),
    ),
    "queue": _Read(
        ("line.owner",),
        "line.owner, coalesce(queue.served, 0)",
        "(SELECT DISTINCT owner FROM run) AS line LEFT JOIN queue ON queue.owner = line.owner",
    ),
    "log": _direct("log.run", "log"),
    "event": _Read(("event.seq",), "seq, body", "event", lambda db, row: (row[0] // NUMBERS, row[0] % NUMBERS, row[1])),
}


def _page(table: str, after: list[Any] | None, db: sqlite3.Connection) -> Slice:
    read = READS[table]
    keys, width = ", ".join(read.key), len(read.key)
    behind = f"({keys}) > ({', '.join('?' * width)})" if after else "true"
    joint = "AND" if " WHERE " in read.source else "WHERE"
    query = f"SELECT {keys}, {read.columns} FROM {read.source} {joint} {behind} ORDER BY {keys} LIMIT {PAGE_ROWS}"
    rows: list[Row] = []
    last: list[Any] = []
    size_bytes = 0
    for found in db.execute(query, after or ()):
        last = list(found[:width])
        rows.append(read.row(db, found[width:]))
        size_bytes += sum(len(value) for value in found if isinstance(value, bytes))
        if size_bytes >= PAGE_BYTES:
            break
    return Slice(rows, last)


# -- rows into tables --------------------------------------------------------------------------------------------------


def _insert(table: str, columns: tuple[str, ...], db: sqlite3.Connection, rows: list[Row]) -> None:
    marks = ", ".join("?" * len(columns))
    db.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)


def _put_settings(db: sqlite3.Connection, rows: list[Row]) -> None:
    for key, *own in rows:
        seq = db.execute("INSERT INTO settings (owner, digest, model, body) VALUES (?,?,?,?)", own).lastrowid
        db.execute("INSERT INTO copy_settings VALUES (?,?)", (key, seq))


def _put_turns(db: sqlite3.Connection, rows: list[Row]) -> None:
    columns = TABLES["turn"]
    marks = ", ".join(
        "(SELECT seq FROM copy_settings WHERE key = ?)" if column == "settings" else "?" for column in columns
    )
    db.executemany(f"INSERT INTO turn ({', '.join(columns)}) VALUES ({marks})", rows)


def _put_items(db: sqlite3.Connection, rows: list[Row]) -> None:
    numbered = [(turn * PLACES + place, *own) for turn, place, *own in rows]
    items = [(seq, kind, is_removed, body) for seq, kind, is_removed, _, _, body in numbered]
    _insert("item", ("seq", "kind", "is_removed", "body"), db, items)
    _insert("item_id", ("id", "item"), db, [(each[4], each[0]) for each in numbered if each[3]])


def _put_runs(db: sqlite3.Connection, rows: list[Row]) -> None:
    """As queued, and then held: so the lengths of the queue are counted by their triggers."""
    holder, turn = TABLES["run"].index("holder"), TABLES["run"].index("turn")
    queued = [(*row[:turn], row[turn] or 0, *row[turn + 1 : holder], None, *row[holder + 1 :]) for row in rows]
    _insert("run", TABLES["run"], db, queued)
    held = [(row[holder], row[0]) for row in rows if row[holder] is not None]
    db.executemany("UPDATE run SET holder = ? WHERE seq = ?", held)


def _put_queue(db: sqlite3.Connection, rows: list[Row]) -> None:
    db.executemany("UPDATE queue SET served = ?2 WHERE owner = ?1", rows)


PUTS: dict[str, Callable[[sqlite3.Connection, list[Row]], None]] = {
    **{table: partial(_insert, table, columns) for table, columns in TABLES.items()},
    "settings": _put_settings,
    "thread": lambda db, rows: _insert(
        "thread", ("seq", "parent", "parent_depth", "is_conversation"), db, [(*row[:3], row[4]) for row in rows]
    ),
    "turn": _put_turns,
    "item": _put_items,
    "run": _put_runs,
    "queue": _put_queue,
    "event": lambda db, rows: _insert("event", ("seq", "body"), db, [(r * NUMBERS + n, body) for r, n, body in rows]),
}


# -- the file ----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(settings: StoreSettings, is_source: bool) -> AsyncIterator[FileSide]:
    """Raises: StoreError, also for a file that somebody else has open."""
    patience = dataclasses.replace(settings, busy_timeout_s=PATIENCE_S)
    await prepare(open_store(settings), is_source)
    thread = DatabaseThread(settings.path)
    await thread
    try:
        side = FileSide(thread, f"'{settings.path}'")
        await side.hold(patience)
        yield side
    finally:
        await thread.close()


class FileSide:
    """The verbs of `copying.Side` on a file."""

    kind = "file"
    needs_rising = True
    takes_nul = True

    def __init__(self, thread: DatabaseThread, what: str) -> None:
        self._thread = thread
        self.what = what

    async def hold(self, settings: StoreSettings) -> None:
        """Raises: StoreError."""
        try:
            await self._thread.run(partial(_hold, settings))
        except sqlite3.OperationalError as error:
            if (error.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY:
                raise store_error(error, self.what) from error
            raise StoreError(
                f"{self.what} is in use by another process: stop the proxy first (SIGTERM gives background responses "
                "that it carries out back to the queue)"
            ) from error

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await self._thread.run(work)
        except sqlite3.Error as error:
            raise store_error(error, self.what) from error

    async def refuse_use(self, now: float) -> None:
        """Nobody else has the file open: a lease or a run in it is one of a process that died."""

    async def counts(self) -> dict[str, int]:
        return await self._run(_counts)

    async def displaced(self) -> list[Displaced]:
        return []

    async def page(self, table: str, after: list[Any] | None) -> Slice:
        return await self._run(partial(_page, table, after))

    async def progress(self) -> dict[str, bytes]:
        return await self._run(partial(_progress, self.what))

    async def begin(self, notes: dict[str, bytes]) -> None:
        await self._run(partial(_begin, self.what, notes))

    async def put(self, table: str, rows: list[Row], notes: tuple[bytes, bytes]) -> None:
        await self._run(partial(_put, self.what, table, rows, notes))

    async def problems(self) -> list[str]:
        return await self._run(_problems)

    async def finish(self) -> None:
        await self._run(_finish)


def _hold(settings: StoreSettings, db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA busy_timeout = {int(settings.busy_timeout_s * 1000)}")
    db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the first read: then nobody else may have it open at all
    db.execute(f"PRAGMA synchronous = {settings.synchronous}")
    db.execute("PRAGMA temp_store = MEMORY")
    with _whole(db):
        db.execute(ORPHANS)


@contextlib.contextmanager
def _whole(db: sqlite3.Connection) -> Any:
    """All of it or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _counts(db: sqlite3.Connection) -> dict[str, int]:
    return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ALL_TABLES}


def _progress(what: str, db: sqlite3.Connection) -> dict[str, bytes]:
    if db.execute("PRAGMA application_id").fetchone() != (COPYING_ID,):
        return {}
    if db.execute("PRAGMA user_version").fetchone() != (len(MIGRATIONS),):
        raise StoreError(f"{what} holds an unfinished copy of another version of this program: empty it")
    return dict(db.execute("SELECT name, value FROM copy_progress").fetchall())


def _begin(what: str, notes: dict[str, bytes], db: sqlite3.Connection) -> None:
    with _whole(db):
        if any(_counts(db).values()):
            raise StoreError(f"{what} is not empty: copy into a file that is not there yet")
        db.execute(PROGRESS)
        db.execute(KEYS)
        db.executemany("INSERT INTO copy_progress VALUES (?,?)", notes.items())
        db.execute(f"PRAGMA application_id = {COPYING_ID}")


def _put(what: str, table: str, rows: list[Row], notes: tuple[bytes, bytes], db: sqlite3.Connection) -> None:
    before, after = notes
    with _whole(db):
        PUTS[table](db, rows)
        if not db.execute(NOTE, (after, table, before)).rowcount:
            raise StoreError(f"another copy into {what} is under way")


def _problems(db: sqlite3.Connection) -> list[str]:
    return problems(db) + [text for (text,) in db.execute(FALLING)]


def _finish(db: sqlite3.Connection) -> None:
    with _whole(db):
        db.execute("DELETE FROM sqlite_sequence WHERE name = 'run'")
        db.execute(RUN_NUMBERS)
        db.execute("DROP TABLE copy_progress")
        db.execute("DROP TABLE copy_settings")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
