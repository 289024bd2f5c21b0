"""Background runs in SQL: admission, claims, the log of events, and how runs end.

May not know what a request or an event means. A function that refuses does so before its first write.
"""

from __future__ import annotations

import math
import sqlite3

import msgspec
import orjson

from errors import QueueFull
from reads import place_of, response
from run_tables import NUMBERS
from run_verbs import UNFINISHED, Batch, Ending, Held, NewRun, QueueLimits, QueueState, Run, RunInfo, Stopped, Tail
from schema import OUTPUTS_AT, PLACES
from verbs import NewTurn, locked, still_running
from writes import (
    AWAKEN,
    OWN_SETTINGS,
    erase_log,
    erase_turns,
    forget,
    insert_items,
    newest_compaction,
    place_for,
    save,
    settings_seq,
    stop_run,
)

QUEUE_FULL_RETRY_S = 5.0
BATCHES_AT_ONCE = 64
# How many logs and responses one transaction erases, so that no turn waits long for the writer.
FORGOTTEN_AT_ONCE = 10

# -- admission ---------------------------------------------------------------------------------------------------------

LENGTHS = "SELECT coalesce(sum(length) FILTER (WHERE owner = ?), 0), coalesce(sum(length), 0) FROM queue"
UNFINISHED_PARENT = """SELECT run.seq, run.conversation FROM turn JOIN run ON run.turn = turn.seq
    WHERE turn.id = ? AND turn.owner = ? AND NOT run.is_stopped"""
BEFORE_IN_CONVERSATION = "SELECT max(seq), NULL FROM run WHERE conversation = ? AND owner = ? AND NOT is_stopped"
INSERT_RUN = """INSERT INTO run (turn, owner, conversation, request, bearer, admitted_at, waits_for, next_number)
    VALUES (?,?,?,?,?,?,?,?)"""


def admit(new: NewRun, limits: QueueLimits, db: sqlite3.Connection) -> None:
    turn = new.turn
    _refuse_full(db.execute(LENGTHS, (turn.owner,)).fetchone(), limits)
    waits_for = _waits_for(turn, db)
    seq = save(turn, db)
    next_number = new.batch.end if new.batch else None
    row = (seq, turn.owner, turn.conversation_id, new.request, new.bearer, new.admitted_at, waits_for, next_number)
    run = db.execute(INSERT_RUN, row).lastrowid or 0
    if new.batch:
        db.execute("INSERT INTO log VALUES (?,?,?)", (run, seq, math.inf))
        _insert_events(run, new.batch, db)


def _refuse_full(lengths: tuple[int, int], limits: QueueLimits) -> None:
    if lengths[0] >= limits.per_owner or lengths[1] >= limits.total:
        refusal = QueueFull("Too many background responses are queued. Try again later.")
        refusal.retry_after_s = QUEUE_FULL_RETRY_S
        raise refusal


def _waits_for(turn: NewTurn, db: sqlite3.Connection) -> int | None:
    """The run that has to end before: the parent's, or the one before in the conversation.

    Raises: StillRunning for a parent that will take its place in a conversation only when it has ended.
    """
    if turn.conversation_id:
        found = db.execute(BEFORE_IN_CONVERSATION, (turn.conversation_id, turn.owner)).fetchone()
    else:
        found = db.execute(UNFINISHED_PARENT, (turn.previous_id, turn.owner)).fetchone()
    run, conversation = found or (None, None)
    if conversation:
        raise still_running(turn.previous_id or "")
    return run


# -- claims ------------------------------------------------------------------------------------------------------------

NEXT = """SELECT run.seq, run.owner, run.turn FROM queue JOIN run ON run.seq = (SELECT min(seq) FROM run AS first
    WHERE first.owner = queue.owner AND first.holder IS NULL AND first.waits_for IS NULL)
    ORDER BY queue.served LIMIT 1"""
SERVED = "UPDATE queue SET served = (SELECT max(served) + 1 FROM queue) WHERE owner = ?"
CLAIM = """UPDATE run SET holder = ?, until_at = ?, generation = generation + 1, attempts = attempts + 1 WHERE seq = ?
    RETURNING generation, attempts, request, bearer, next_number"""
IS_HELD = "holder NOTNULL AND NOT is_stopped"
OWN = "holder = ? AND NOT is_stopped"
HELD = f"SELECT seq, generation FROM run WHERE {OWN}"
# Nothing may be written for a run that was stopped, or that somebody else holds by now.
OF_CLAIM = "seq = ? AND generation = ?"
CLAIMED = f"SELECT turn FROM run WHERE {OF_CLAIM} AND NOT is_stopped"
EXPIRED = "SELECT seq, generation FROM run WHERE holder NOTNULL AND until_at < ?"
INPUTS = "SELECT body FROM item WHERE seq BETWEEN ? AND ? ORDER BY seq"


def claim(holder: str, until_at: float, limit: int, db: sqlite3.Connection) -> list[Run]:
    claimed: list[Run] = []
    while len(claimed) < limit and (found := db.execute(NEXT).fetchone()):
        seq, owner, turn = found
        db.execute(SERVED, (owner,))
        ((generation, *given),) = db.execute(CLAIM, (holder, until_at, seq)).fetchall()
        db.execute("UPDATE turn SET status = 'in_progress' WHERE seq = ?", (turn,))
        db.execute("DELETE FROM lease WHERE holder = ?", (Held(seq, generation - 1).holder,))
        response_id, created_at = db.execute("SELECT id, created_at FROM turn WHERE seq = ?", (turn,)).fetchone()
        inputs = [body for (body,) in db.execute(INPUTS, (turn * PLACES, turn * PLACES + OUTPUTS_AT - 1))]
        claimed.append(Run(Held(seq, generation), response_id, owner, created_at, inputs, *given))
    return claimed


def renew(holder: str, until_at: float, db: sqlite3.Connection) -> list[Held]:
    db.execute(f"UPDATE run SET until_at = ? WHERE {OWN}", (until_at, holder))
    return held(holder, db)


def held(holder: str, db: sqlite3.Connection) -> list[Held]:
    return [Held(*row) for row in db.execute(HELD, (holder,))]


def release(holder: str, db: sqlite3.Connection) -> None:
    db.execute(f"UPDATE run SET holder = NULL, attempts = attempts - 1 WHERE {OWN}", (holder,))
    db.execute("DELETE FROM run WHERE holder = ?", (holder,))


def expired(now: float, db: sqlite3.Connection) -> list[Held]:
    return [Held(*row) for row in db.execute(EXPIRED, (now,))]


def free(held: Held, before_at: float, db: sqlite3.Connection) -> None:
    claim = (held.run, held.generation, before_at)
    db.execute(f"UPDATE run SET holder = NULL WHERE {OF_CLAIM} AND until_at < ? AND NOT is_stopped", claim)
    db.execute(f"DELETE FROM run WHERE {OF_CLAIM} AND until_at < ? AND is_stopped", claim)


def release_run(held: Held, db: sqlite3.Connection) -> None:
    claim = (held.run, held.generation)
    db.execute(f"UPDATE run SET holder = NULL, attempts = attempts - 1 WHERE {OF_CLAIM} AND {IS_HELD}", claim)
    let_go(held, db)


def let_go(held: Held, db: sqlite3.Connection) -> None:
    db.execute(f"DELETE FROM run WHERE {OF_CLAIM} AND is_stopped", (held.run, held.generation))


def is_held(run: int, db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM run WHERE seq = ?", (run,)).fetchone() is not None


# -- the log -----------------------------------------------------------------------------------------------------------

# From the batch that holds a given number on.
EVENTS = """SELECT seq, body FROM event WHERE seq <= ?2 AND seq >= coalesce(
    (SELECT max(seq) FROM event WHERE seq BETWEEN ?1 AND ?3), ?1) ORDER BY seq LIMIT ?4"""
STATES = f"""SELECT turn.id, turn.status, (SELECT max(event.seq) FROM event
    WHERE event.seq BETWEEN log.run * {NUMBERS} AND log.run * {NUMBERS} + {NUMBERS - 1})
    FROM json_each(?) JOIN turn ON turn.id = value LEFT JOIN log ON log.turn = turn.seq WHERE turn.deleted_at IS NULL"""


def log(held: Held, batch: Batch, db: sqlite3.Connection) -> bool:
    if not db.execute(CLAIMED, (held.run, held.generation)).fetchone():
        return False
    _insert_events(held.run, batch, db)
    db.execute("UPDATE run SET next_number = ? WHERE seq = ?", (batch.end, held.run))
    return True


def _insert_events(run: int, batch: Batch, db: sqlite3.Connection) -> None:
    """A batch whose writer never learned that it was written comes again, perhaps with more events at its end."""
    db.execute("INSERT OR REPLACE INTO event VALUES (?,?)", (run * NUMBERS + batch.first, batch.frames))


def tail(owner: str, response_id: str, after: int, db: sqlite3.Connection) -> Tail | None:
    place = place_of(db, owner, response_id)
    found = place and db.execute("SELECT run FROM log WHERE turn = ?", (place.seq,)).fetchone()
    if not place or not found:
        return None
    start = found[0] * NUMBERS
    end, wanted = start + NUMBERS - 1, start + min(max(after + 1, 0), NUMBERS - 1)
    rows = db.execute(EVENTS, (start, end, wanted, BATCHES_AT_ONCE)).fetchall()
    return Tail(place.status, [(seq - start, body) for seq, body in rows], len(rows) == BATCHES_AT_ONCE)


def states(response_ids: list[str], db: sqlite3.Connection) -> dict[str, tuple[str, int | None]]:
    rows = db.execute(STATES, (orjson.dumps(response_ids).decode(),))
    return {response_id: (status, newest) for response_id, status, newest in rows}


def version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA data_version").fetchone()[0])


# -- ends --------------------------------------------------------------------------------------------------------------

END_TURN = """UPDATE turn SET status = ?, completed_at = ?, settings = ?, body = ?, compaction = coalesce(?, compaction)
    WHERE seq = ?"""
IS_HOLDERS = "SELECT 1 FROM lease WHERE name = ? AND holder = ?"


def settle(held: Held, ending: Ending, db: sqlite3.Connection) -> bool:
    found = db.execute(CLAIMED, (held.run, held.generation)).fetchone()
    if found is None:
        return False
    turn, seq = ending.turn, found[0]
    if turn.conversation_id and not turn.is_detached:
        seq = _join(seq, turn, db)
    else:
        turn = msgspec.structs.replace(turn, is_brief=bool(db.execute(OWN_SETTINGS, (seq,)).rowcount))
        row = (turn.status, turn.completed_at, settings_seq(turn, db), turn.body, newest_compaction(turn), seq)
        db.execute(END_TURN, row)
        insert_items(db, list(enumerate(turn.outputs, seq * PLACES + OUTPUTS_AT)), turn.id)
    if ending.batch:
        _insert_events(held.run, ending.batch, db)
    db.execute(AWAKEN, (held.run,))
    db.execute("DELETE FROM run WHERE seq = ?", (held.run,))
    _begin_to_age(seq, ending.log_until_at, ending.lives_until, db)
    return True


def _join(old: int, turn: NewTurn, db: sqlite3.Connection) -> int:
    """A turn at the end of its conversation takes the place of the one that was queued, which stood by itself.

    Raises: NotFound, ConversationLocked.
    """
    place_for(turn, db)
    if turn.lock and not db.execute(IS_HOLDERS, (turn.lock.name, turn.lock.holder)).fetchone():
        raise locked()
    (thread,) = db.execute("SELECT thread FROM turn WHERE seq = ?", (old,)).fetchone()
    erase_turns(db, [(old,)])
    db.execute("DELETE FROM thread WHERE seq = ?", (thread,))
    seq = save(turn, db)
    db.execute("UPDATE log SET turn = ? WHERE turn = ?", (seq, old))
    return seq


def _begin_to_age(turn: int, log_until_at: float, lives_until: float, db: sqlite3.Connection) -> None:
    db.execute("UPDATE log SET until_at = ? WHERE turn = ?", (log_until_at, turn))
    db.execute("UPDATE turn SET lives_until = ? WHERE seq = ? AND lives_until IS NOT NULL", (lives_until, turn))


def stop(
    owner: str, response_id: str, log_until_at: float, lives_until: float, db: sqlite3.Connection
) -> Stopped | None:
    place = place_of(db, owner, response_id)
    if place is None:
        return None
    is_unfinished = place.status in UNFINISHED
    if is_unfinished:
        db.execute("UPDATE turn SET status = 'cancelled' WHERE seq = ?", (place.seq,))
        stop_run(place.seq, db)
        _begin_to_age(place.seq, log_until_at, lives_until, db)
    kept = response(owner, response_id, db)
    (run,) = db.execute("SELECT max(seq) FROM run WHERE turn = ? AND is_stopped", (place.seq,)).fetchone()
    return Stopped(kept, is_unfinished, run) if kept else None


def forget_ended(now: float, db: sqlite3.Connection) -> int:
    """Some of the logs and brief responses whose time is over; how many it was."""
    logs = db.execute("SELECT turn FROM log WHERE until_at <= ? LIMIT ?", (now, FORGOTTEN_AT_ONCE)).fetchall()
    for (turn,) in logs:
        erase_log(turn, db)
    select = "SELECT seq, thread FROM turn WHERE lives_until <= ? AND deleted_at IS NULL LIMIT ?"
    brief = db.execute(select, (now, FORGOTTEN_AT_ONCE)).fetchall()
    forget(db, brief, now)
    return len(logs) + len(brief)


# -- for people --------------------------------------------------------------------------------------------------------

RUNS = """SELECT run.waits_for NOTNULL, turn.id, run.owner, run.admitted_at, run.attempts, run.next_number, run.holder
    FROM run JOIN turn ON turn.seq = run.turn WHERE NOT run.is_stopped ORDER BY run.seq"""
COUNTS = """SELECT (SELECT coalesce(sum(length), 0) FROM queue),
    (SELECT count(*) FROM run WHERE holder NOTNULL AND NOT is_stopped)"""


def runs(db: sqlite3.Connection) -> list[RunInfo]:
    return [RunInfo(bool(row[0]), *row[1:]) for row in db.execute(RUNS)]


def queue(db: sqlite3.Connection) -> QueueState:
    return QueueState(*db.execute(COUNTS).fetchone())
