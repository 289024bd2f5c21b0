"""What the store on PostgreSQL forgets: responses, conversations, the ends of threads that nothing living stands on.

May not know what an item means. Whoever makes something unknown locks its thread before it looks who needs it; one at a
time does so.
"""

from __future__ import annotations

import math

from postgres_pool import Statement, Transaction, Verb
from postgres_quotas import SWEEP as SWEEP_ACCOUNTS
from postgres_reads import OWN
from postgres_tables import ADMITTING
from postgres_writes import ERASE_AHEAD, ONE_FORGETS

# How many responses one transaction of a purge takes, so that nobody waits long for it.
PURGED_AT_ONCE = 100
LATEST_AT = 2.0**62
DOOMED = Statement(f"SELECT seq, thread FROM turn WHERE {OWN}")
OLD = Statement(
    """SELECT seq, thread FROM turn WHERE ages_from < :before_at AND ages_from IS NOT NULL
    AND deleted_at IS NULL ORDER BY ages_from LIMIT :at_most"""
)
RUNNING = Statement("SELECT turn FROM run WHERE turn = ANY(:turns) AND NOT is_stopped ORDER BY seq")
# Takes a run out of the line, or from its holder, who has to let go of it. Who waits for it waits for what that one
# waited for, if anything: conversations keep their order.
STOPPED = """held AS MATERIALIZED (SELECT run.seq, run.holder, run.waits_for FROM run WHERE run.turn = {turn}
        AND NOT run.is_stopped FOR UPDATE OF run),
    awake AS (UPDATE run SET waits_for = held.waits_for FROM held WHERE run.waits_for = held.seq),
    left_line AS (DELETE FROM run USING held WHERE run.seq = held.seq AND held.holder IS NULL),
    halted AS (UPDATE run SET is_stopped = true, request = '', bearer = NULL FROM held
        WHERE run.seq = held.seq AND held.holder IS NOT NULL)"""
STOP_RUN = Statement(f"WITH {STOPPED.format(turn=':turn')} SELECT 1")
ERASE_LOGS = Statement(
    """WITH gone AS (DELETE FROM log WHERE turn = ANY(:turns) RETURNING run)
    DELETE FROM event USING gone WHERE event.run = gone.run"""
)
BURY = Statement("UPDATE turn SET deleted_at = :now, ahead = NULL WHERE seq = ANY(:turns)")
LOCK_THREAD = Statement("SELECT parent, is_conversation FROM thread WHERE seq = :thread FOR UPDATE")
ERASE_TURNS = Statement(
    """WITH needed AS MATERIALIZED (SELECT greatest(
        coalesce((SELECT max(depth) FROM turn WHERE thread = :thread::bigint AND deleted_at IS NULL), -1),
        coalesce((SELECT max(parent_depth) FROM thread WHERE parent = :thread::bigint), -1)) AS depth),
    gone AS (DELETE FROM turn USING needed WHERE turn.thread = :thread::bigint AND turn.depth > needed.depth
        RETURNING turn.settings, turn.lives_until),
    unshared AS (DELETE FROM settings USING gone WHERE digest = gone.settings AND gone.lives_until IS NOT NULL)
    UPDATE thread SET tip = (SELECT depth FROM needed) WHERE seq = :thread::bigint
    AND EXISTS (SELECT FROM turn, needed WHERE turn.thread = :thread::bigint AND turn.depth <= needed.depth)
    RETURNING 1"""
)
ERASE_THREAD = Statement("DELETE FROM thread WHERE seq = :thread")
DELETE_CONVERSATION = Statement("DELETE FROM conversation WHERE id = :id AND owner = :owner RETURNING thread")
FREE_THREAD = Statement("UPDATE thread SET is_conversation = false WHERE seq = :thread")
BEGIN_TO_AGE = Statement(
    """UPDATE turn SET deleted_at = CASE WHEN id IS NULL THEN :now::bigint ELSE deleted_at END,
    ages_from = CASE WHEN id IS NULL THEN ages_from ELSE :now::bigint END WHERE thread = :thread"""
)
SWEEP = (
    Statement("DELETE FROM first_use WHERE until_at <= :now::double precision"),
    Statement("DELETE FROM lease WHERE until_at <= :now::double precision"),
    SWEEP_ACCOUNTS,
    Statement("DELETE FROM settings WHERE NOT EXISTS (SELECT FROM turn WHERE turn.settings = settings.digest)"),
)
# Each owner's next run is looked for by the owner: to read all runs for all owners holds up admissions for long.
SWEEP_QUEUE = Statement(
    """DELETE FROM queue WHERE owner NOT IN (SELECT owner FROM run WHERE holder IS NOT NULL)
    AND (SELECT true FROM run WHERE run.owner = queue.owner AND holder IS NULL LIMIT 1) IS NULL"""
)


async def delete_response(db: Transaction, owner: str, response_id: str, now: float) -> bool:
    await db.run(ONE_FORGETS)
    row = await db.row(DOOMED, {"owner": owner, "id": response_id})
    if row is None:
        return False
    await forget(db, [(row["seq"], row["thread"])], now)
    return True


async def delete_conversation(db: Transaction, owner: str, conversation_id: str, now: float) -> bool:
    await db.run(ONE_FORGETS)
    row = await db.row(DELETE_CONVERSATION, {"owner": owner, "id": conversation_id})
    if row is None:
        return False
    thread = {"thread": row["thread"]}
    await db.rows(LOCK_THREAD, thread)
    await db.rows(FREE_THREAD, thread)
    await db.rows(BEGIN_TO_AGE, {**thread, "now": int(now)})
    await db.rows(ERASE_AHEAD, thread)
    await _prune(db, row["thread"])
    return True


async def forget(db: Transaction, turns: list[tuple[int, int]], now: float) -> None:
    """Makes responses unknown, and erases what nothing living stands on; a run among them is stopped."""
    if not turns:
        return
    doomed = {"turns": [turn for turn, _ in turns]}
    for row in await db.rows(RUNNING, doomed):
        await db.rows(STOP_RUN, {"turn": row["turn"]})
    await db.rows(ERASE_LOGS, doomed)
    await db.rows(BURY, {**doomed, "now": int(now)})
    for thread in sorted({thread for _, thread in turns}):
        await _prune(db, thread)


async def _prune(db: Transaction, thread: int | None) -> None:
    """Erases the end of a thread that no living turn needs, and then perhaps of the thread it left."""
    while thread is not None:
        row = await db.row(LOCK_THREAD, {"thread": thread})
        if row is None or row["is_conversation"] or await db.rows(ERASE_TURNS, {"thread": thread}):
            return
        await db.rows(ERASE_THREAD, {"thread": thread})
        thread = row["parent"]


async def forget_some(db: Transaction, before_at: float, now: float) -> int:
    """Of the responses that age from before that time; how many it was."""
    await db.run(ONE_FORGETS)
    old = await db.rows(OLD, {"before_at": _whole(before_at), "at_most": PURGED_AT_ONCE})
    await forget(db, [(row["seq"], row["thread"]) for row in old], now)
    return len(old)


def _whole(before_at: float) -> int:
    """Whole seconds, as times are kept: compared with a fraction, all of them would be read."""
    return math.ceil(min(max(before_at, 0.0), LATEST_AT))


async def sweep(db: Verb, now: float) -> None:
    """Each statement for itself: one that meets a new turn is tried again."""
    for statement in SWEEP:
        await db.rows(statement, {"now": now})
    await db.write(_sweep_queue)


async def _sweep_queue(db: Transaction) -> None:
    """While nobody is admitted, so that no run is without its owner's row."""
    await db.run(f"SELECT pg_advisory_xact_lock({ADMITTING})")
    await db.rows(SWEEP_QUEUE, {})
