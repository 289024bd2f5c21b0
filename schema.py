"""The tables of the SQLite file, with their units, and the numbered migrations that lead to them.

May not know what a turn or an item means. Source of the statements' form: sqlite.org/lang.html.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

from errors import StoreError, UnfinishedCopy
from run_tables import add_runs

APPLICATION_ID = 0x52705278
# Of a file into which another store is being copied: no version of the program takes it for a store.
COPYING_ID = 0x52705263
# Rows of items have half a page of waste at each end of a page at worst: the larger the page, the less of it.
PAGE_BYTES = 16384
# An item's seq is turn.seq * PLACES + its place; input has the lower half of the places, output the upper.
PLACES = 1 << 20
OUTPUTS_AT = PLACES // 2

SCHEMA_1 = (
    # What makes the keyed hash of owners; never leaves the server.
    "CREATE TABLE secret (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    # What the responses of a chain share, kept once.
    """CREATE TABLE settings (
        seq INTEGER PRIMARY KEY,
        owner TEXT NOT NULL,
        digest BLOB NOT NULL,  -- BLAKE2b, 16 bytes, of model and body
        model TEXT NOT NULL,
        body BLOB NOT NULL,    -- JSON
        UNIQUE (owner, digest))""",
    # A line of turns. A fork names the turn that it leaves.
    """CREATE TABLE thread (
        seq INTEGER PRIMARY KEY,
        parent INTEGER,        -- thread
        parent_depth INTEGER,
        is_conversation INTEGER NOT NULL)""",
    "CREATE INDEX thread_by_parent ON thread (parent, parent_depth) WHERE parent IS NOT NULL",
    """CREATE TABLE conversation (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        thread INTEGER NOT NULL,
        created_at INTEGER NOT NULL,  -- Unix seconds
        metadata BLOB NOT NULL) WITHOUT ROWID""",
    # A response, or items that a client put into a conversation. Depth goes on from the parent thread's.
    """CREATE TABLE turn (
        seq INTEGER PRIMARY KEY,
        id TEXT UNIQUE,        -- of the response; NULL: items put in by a client
        owner TEXT NOT NULL,
        thread INTEGER NOT NULL,
        depth INTEGER NOT NULL,
        previous INTEGER,      -- turn that previous_response_id named
        settings INTEGER,
        status TEXT NOT NULL,
        created_at INTEGER NOT NULL,    -- Unix seconds, as the next two
        completed_at INTEGER,
        deleted_at INTEGER,
        ages_from INTEGER,     -- Unix seconds; NULL: a conversation holds it
        compaction INTEGER,    -- place of the newest compaction item
        body BLOB NOT NULL,    -- JSON
        UNIQUE (thread, depth))""",
    "CREATE INDEX turn_by_owner ON turn (owner) WHERE id IS NOT NULL AND deleted_at IS NULL",
    "CREATE INDEX turn_by_age ON turn (ages_from) WHERE ages_from IS NOT NULL AND deleted_at IS NULL",
    """CREATE TABLE item (
        seq INTEGER PRIMARY KEY,
        kind INTEGER NOT NULL,        -- 0: listed, 1: not listed, 2: compaction, 3: nor in a window
        is_removed INTEGER NOT NULL,  -- taken out of its conversation
        body BLOB NOT NULL)    -- JSON""",
    # Ids that do not tell their response: see verbs.response_of.
    "CREATE TABLE item_id (id TEXT, item INTEGER, PRIMARY KEY (id, item)) WITHOUT ROWID",
    "CREATE TABLE lease (name TEXT PRIMARY KEY, holder TEXT NOT NULL, until_at REAL NOT NULL) WITHOUT ROWID",
    """CREATE TABLE first_use (
        owner TEXT, key TEXT, digest BLOB NOT NULL, response TEXT NOT NULL, until_at INTEGER NOT NULL,
        PRIMARY KEY (owner, key)) WITHOUT ROWID""",
)
SCHEMA_3 = (
    # Stands for the window that ends with the turn.
    "ALTER TABLE turn ADD COLUMN ahead BLOB",
    # About models; nobody's own.
    "CREATE TABLE learned (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
)

SCHEMA_4 = (
    # What an owner has used.
    """CREATE TABLE account (
        owner TEXT PRIMARY KEY,
        requests_at REAL NOT NULL,  -- Unix seconds: when all of it is there again
        tokens_at REAL NOT NULL,    -- likewise
        took_s REAL NOT NULL) WITHOUT ROWID  -- how long the last request in flight took""",
    # How many requests of an owner a holder has in flight; the holder is the name of its lease.
    """CREATE TABLE flight (
        owner TEXT, holder TEXT, requests INTEGER NOT NULL, PRIMARY KEY (owner, holder)) WITHOUT ROWID""",
)


def _create(db: sqlite3.Connection) -> None:
    for statement in SCHEMA_1:
        db.execute(statement)


def _add_ahead(db: sqlite3.Connection) -> None:
    for statement in SCHEMA_3:
        db.execute(statement)


def _add_accounts(db: sqlite3.Connection) -> None:
    for statement in SCHEMA_4:
        db.execute(statement)


# The function at index n brings a file from version n to n + 1 (PRAGMA user_version).
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create, add_runs, _add_ahead, _add_accounts)


def migrate(db: sqlite3.Connection, path: str) -> None:
    """Makes the tables of a new file, or brings an old one up to date.

    Raises: StoreError for a file of another program or of a newer version, which stays as it is.
    """
    if _version(db, path) is None:  # only a file without tables takes these
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db, path) or 0
        for migration in MIGRATIONS[version:]:
            migration(db)
        if version < len(MIGRATIONS):
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _version(db: sqlite3.Connection, path: str) -> int | None:
    """The schema's version; None for a file without tables. Raises: StoreError."""
    if not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        return None
    (program,) = db.execute("PRAGMA application_id").fetchone()
    if program == COPYING_ID:
        raise UnfinishedCopy(f"'{path}'")
    if program != APPLICATION_ID:
        raise StoreError(f"'{path}' is a database of another program.")
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(
            f"'{path}' was written by a newer version of this program (schema {version}; this one knows up to "
            f"{len(MIGRATIONS)})."
        )
    return version


def use_wal(db: sqlite3.Connection, patience_s: float) -> None:
    """Readers beside a writer. SQLite itself does not wait here for a process that opens the file just now."""
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= give_up_at:
                raise
            time.sleep(0.01)
