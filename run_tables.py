"""The tables of background runs, with their units: version 2 of the SQLite file.

May not know what a turn or an item means.
"""

from __future__ import annotations

import sqlite3

# A row of events has the seq run.seq * NUMBERS + the number of its first event.
NUMBERS = 1 << 28

TABLES = (
    # Of a background response with `store: false`, which is short-lived; infinite while it runs. NULL: all others.
    "ALTER TABLE turn ADD COLUMN lives_until REAL",  # Unix seconds
    "CREATE INDEX turn_by_life ON turn (lives_until) WHERE lives_until IS NOT NULL",
    # A background turn that has not ended. Its seq is never used twice, because events are numbered by it.
    """CREATE TABLE run (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        turn INTEGER NOT NULL,
        owner TEXT NOT NULL,
        conversation TEXT,
        request BLOB NOT NULL,   -- JSON, without its input, which is the turn's
        bearer TEXT,             -- the client's own key, sealed
        admitted_at REAL NOT NULL,  -- Unix seconds
        waits_for INTEGER,       -- run that has to end before
        holder TEXT,             -- the process that carries it out; NULL: queued
        until_at REAL,           -- Unix seconds: end of the holder's lease
        generation INTEGER NOT NULL DEFAULT 0,  -- grows with every claim
        attempts INTEGER NOT NULL DEFAULT 0,
        next_number INTEGER,     -- of the next event; NULL: no events are kept
        is_stopped INTEGER NOT NULL DEFAULT 0)  -- its holder has to let go, and that is all that is left of it""",
    "CREATE INDEX run_ready ON run (owner, seq) WHERE holder IS NULL AND waits_for IS NULL",
    "CREATE INDEX run_by_holder ON run (holder) WHERE holder IS NOT NULL",
    "CREATE INDEX run_by_turn ON run (turn)",
    "CREATE INDEX run_by_waits_for ON run (waits_for) WHERE waits_for IS NOT NULL",
    "CREATE INDEX run_by_conversation ON run (conversation) WHERE conversation IS NOT NULL",
    # How many runs of an owner are queued, and when in the round its last one was taken.
    "CREATE TABLE queue (owner TEXT PRIMARY KEY, length INTEGER NOT NULL, served INTEGER NOT NULL) WITHOUT ROWID",
    # The events of a streamed run can be read until then; infinite while it runs.
    "CREATE TABLE log (run INTEGER PRIMARY KEY, turn INTEGER NOT NULL, until_at REAL NOT NULL)",
    "CREATE INDEX log_by_turn ON log (turn)",
    # Some events that follow each other, as clients are sent them.
    "CREATE TABLE event (seq INTEGER PRIMARY KEY, body BLOB NOT NULL)",
)
ENTER = """INSERT INTO queue VALUES (NEW.owner, 1, (SELECT coalesce(max(served), 0) + 1 FROM queue))
    ON CONFLICT (owner) DO UPDATE SET length = length + 1;"""
LEAVE = """UPDATE queue SET length = length - 1 WHERE owner = OLD.owner;
    DELETE FROM queue WHERE owner = OLD.owner AND length = 0;"""
# The lengths are counted where runs change, so that no statement can forget it. Who enters does so at the round's end.
TRIGGERS = {
    "run_admitted": f"AFTER INSERT ON run BEGIN {ENTER} END",
    "run_claimed": f"AFTER UPDATE OF holder ON run WHEN OLD.holder IS NULL AND NEW.holder NOTNULL BEGIN {LEAVE} END",
    "run_released": f"AFTER UPDATE OF holder ON run WHEN OLD.holder NOTNULL AND NEW.holder IS NULL BEGIN {ENTER} END",
    "run_left": f"AFTER DELETE ON run WHEN OLD.holder IS NULL BEGIN {LEAVE} END",
}


def add_runs(db: sqlite3.Connection) -> None:
    """The migration from version 1 to version 2."""
    for statement in TABLES:
        db.execute(statement)
    for name, trigger in TRIGGERS.items():
        db.execute(f"CREATE TRIGGER {name} {trigger}")
