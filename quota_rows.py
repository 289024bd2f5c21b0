"""What owners have used, in SQL: version 4 of the SQLite file.

May not know what a limit is, nor what is limited.
"""

from __future__ import annotations

import sqlite3

from quota_verbs import Charge, Used

ACCOUNT = "SELECT requests_at, tokens_at, took_s FROM account WHERE owner = ?"
ELSEWHERE = """SELECT coalesce(sum(flight.requests), 0) FROM flight JOIN lease ON lease.name = flight.holder
    WHERE flight.owner = ? AND flight.holder <> ? AND lease.until_at > ?"""
# What is as good as no account at all, once the flights are gone whose holders have no lease any more.
SWEEP = (
    "DELETE FROM flight WHERE holder NOT IN (SELECT name FROM lease WHERE until_at > :now)",
    """DELETE FROM account WHERE requests_at <= :now AND tokens_at <= :now
        AND owner NOT IN (SELECT owner FROM flight)""",
)


def charge(charge: Charge, db: sqlite3.Connection) -> Used:
    now = charge.now
    row = db.execute(ACCOUNT, (charge.owner,)).fetchone() or (0.0, 0.0, 0.0)
    requests_at, tokens_at = max(row[0], now), max(row[1], now) + charge.tokens_s
    took_s = row[2] if charge.took_s is None else charge.took_s
    (elsewhere,) = db.execute(ELSEWHERE, (charge.owner, charge.holder, now)).fetchone()
    is_granted = _is_enough(charge, requests_at, tokens_at, elsewhere)
    if is_granted:
        requests_at += charge.requests_s
    account = (charge.owner, requests_at, tokens_at, took_s)
    db.execute("INSERT OR REPLACE INTO account VALUES (?,?,?,?)", account)
    _keep_flights(charge, charge.in_flight + (is_granted and charge.most_in_flight is not None), db)
    return Used(is_granted, requests_at, tokens_at, elsewhere, took_s)


def _is_enough(charge: Charge, requests_at: float, tokens_at: float, elsewhere: int) -> bool:
    return (
        charge.has_wish
        and requests_at - charge.now <= charge.most_requests_s
        and tokens_at - charge.now <= charge.most_tokens_s
        and (charge.most_in_flight is None or elsewhere + charge.in_flight < charge.most_in_flight)
    )


def _keep_flights(charge: Charge, requests: int, db: sqlite3.Connection) -> None:
    if requests:
        db.execute("INSERT OR REPLACE INTO flight VALUES (?,?,?)", (charge.owner, charge.holder, requests))
    else:
        db.execute("DELETE FROM flight WHERE owner = ? AND holder = ?", (charge.owner, charge.holder))


def sweep(now: float, db: sqlite3.Connection) -> None:
    for statement in SWEEP:
        db.execute(statement, {"now": now})
