"""What the store keeps under a name, in SQL: secrets, and what was learned about models.

May not know what a value means.
"""

from __future__ import annotations

import sqlite3


def secret(name: str, db: sqlite3.Connection) -> bytes:
    db.execute("INSERT OR IGNORE INTO secret VALUES (?, randomblob(32))", (name,))
    return bytes(db.execute("SELECT value FROM secret WHERE name = ?", (name,)).fetchone()[0])


def keep_learned(facts: dict[str, bytes], db: sqlite3.Connection) -> None:
    db.executemany("INSERT OR REPLACE INTO learned VALUES (?,?)", facts.items())


def learned(db: sqlite3.Connection) -> dict[str, bytes]:
    return dict(db.execute("SELECT name, value FROM learned").fetchall())
