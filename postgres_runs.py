"""Background runs on PostgreSQL: admission, claims, the log of events, and how runs end.

May not know what a request or an event means. Each verb is one statement, which locks the run before anything else.
"""

from __future__ import annotations

from typing import Any

from errors import QueueFull
from postgres_forgetting import ERASE_LOGS, STOPPED, forget
from postgres_pool import Asked, Statement, Transaction, Verb
from postgres_reads import OWN, response
from postgres_writes import (
    ALLOWED,
    GIVEN_ITEMS,
    INSERT_TURN,
    ONE_FORGETS,
    OUTCOME,
    PLACES_FOR,
    digest_of,
    items_of,
    place_of,
    refusal_of,
    values_of,
)
from run_rows import BATCHES_AT_ONCE, FORGOTTEN_AT_ONCE, QUEUE_FULL_RETRY_S
from run_tables import NUMBERS
from run_verbs import Batch, Ending, Held, NewRun, QueueLimits, QueueState, Run, RunInfo, Stopped, Tail
from schema import OUTPUTS_AT
from verbs import locked, no_conversation, still_running

# -- admission ---------------------------------------------------------------------------------------------------------

# Nobody else is admitted until this statement has ended: the lengths are right, and so is who comes before.
ROOM = """line_up AS MATERIALIZED (SELECT * FROM line_of(:owner::text, :conversation::text, :total_limit::bigint)),
    room AS MATERIALIZED (SELECT line_up.before FROM line_up
        WHERE line_up.own < :own_limit::bigint AND line_up.total < :total_limit::bigint),
    parent_run AS MATERIALIZED (SELECT run.seq, run.conversation FROM turn JOIN run ON run.turn = turn.seq
        WHERE turn.id = :previous::text AND turn.owner = :owner::text AND NOT run.is_stopped FOR KEY SHARE OF run),
    ok AS MATERIALIZED (SELECT before FROM room
        WHERE NOT EXISTS (SELECT FROM parent_run WHERE parent_run.conversation IS NOT NULL))"""
INSERT_RUN = """queued AS (INSERT INTO run (turn, owner, conversation, request, bearer, admitted_at, waits_for,
            next_number)
        SELECT new.seq, :owner::text, :conversation::text, :request::bytea, :bearer::text,
            :admitted_at::double precision,
            CASE WHEN :conversation::text IS NULL THEN (SELECT seq FROM parent_run) ELSE ok.before END,
            :next_number::bigint
        FROM new, ok RETURNING seq),
    logged AS (INSERT INTO log (run, turn, until_at) SELECT queued.seq, new.seq, 'Infinity' FROM queued, new
        WHERE :first::bigint IS NOT NULL),
    told AS (INSERT INTO event (run, first, body) SELECT seq, :first::bigint, :frames::bytea FROM queued
        WHERE :first::bigint IS NOT NULL),
    in_round AS (INSERT INTO queue (owner, served) SELECT :owner::text, nextval('round') FROM queued
        ON CONFLICT (owner) DO UPDATE SET served = excluded.served WHERE (SELECT own FROM line_up) = 0)"""
ADMIT = {
    name: Statement(
        f"""WITH {ROOM}, {place}, {INSERT_TURN}, {INSERT_RUN}
        SELECT (SELECT count(*) FROM room) AS room, (SELECT count(*) FROM ok) AS ok, {OUTCOME}"""
    )
    for name, place in PLACES_FOR.items()
}


async def admit(db: Asked, new: NewRun, limits: QueueLimits) -> None:
    turn = new.turn
    own = {"request": new.request, "bearer": new.bearer, "admitted_at": new.admitted_at}
    bounds = {"own_limit": limits.per_owner, "total_limit": limits.total}
    values = {**values_of(turn), **own, **bounds, **_events(new.batch)}
    row = await db.row(ADMIT[place_of(turn)], values)
    if row is None or not row["room"]:
        refusal = QueueFull("Too many background responses are queued. Try again later.")
        refusal.retry_after_s = QUEUE_FULL_RETRY_S
        raise refusal
    if not row["ok"]:
        raise still_running(turn.previous_id or "")
    if row["turn"] is None:
        raise refusal_of(turn, bool(row["found"]))


def _events(batch: Batch | None) -> dict[str, Any]:
    if batch is None:
        return {"first": None, "frames": None, "next_number": None}
    return {"first": batch.first, "frames": batch.frames, "next_number": batch.end}


# -- claims ------------------------------------------------------------------------------------------------------------

# How many runs others may be taking at the moment, without hiding those behind them.
PASSED_OVER = 64
# Owners take turns: first the next run of each, in the order in which they were served, then the one after it. Runs and
# owners that somebody else is taking just now are left to them. However long the line is, only its front is read: of as
# many owners as may come next, as many runs; and by their keys whatever is known of the table, which grows in bursts.
CLAIM = Statement(
    f"""WITH front AS MATERIALIZED (SELECT queue.owner, queue.served FROM queue CROSS JOIN LATERAL
        (SELECT FROM run WHERE run.owner = queue.owner AND run.holder IS NULL AND run.waits_for IS NULL
            ORDER BY run.seq LIMIT 1) AS one ORDER BY queue.served LIMIT :at_most::bigint + {PASSED_OVER}),
    ready AS MATERIALIZED (SELECT next.seq, next.place, front.served FROM front CROSS JOIN LATERAL
        (SELECT seq, row_number() OVER (ORDER BY seq) AS place FROM (SELECT run.seq FROM run
            WHERE run.owner = front.owner AND run.holder IS NULL AND run.waits_for IS NULL ORDER BY run.seq
            LIMIT (SELECT :at_most::bigint + {PASSED_OVER} / greatest(count(*), 1) FROM front)) AS first) AS next),
    picked AS MATERIALIZED (SELECT own.seq, own.owner, next.place, next.served
        FROM (SELECT * FROM ready ORDER BY place, served) AS next CROSS JOIN LATERAL
        (SELECT run.seq, run.owner FROM run WHERE run.seq = next.seq AND num_nonnulls(run.holder, run.waits_for) = 0
            FOR UPDATE OF run SKIP LOCKED) AS own LIMIT :at_most::bigint),
    ordered AS MATERIALIZED (SELECT seq, owner, row_number() OVER (ORDER BY place, served) AS number FROM picked),
    claimed AS (UPDATE run SET holder = :holder, until_at = :until_at, generation = generation + 1,
            attempts = attempts + 1
        FROM ordered WHERE run.seq = ordered.seq
        RETURNING ordered.number, run.seq, run.turn, run.owner, run.generation, run.attempts, run.request, run.bearer,
            run.next_number),
    free_owners AS MATERIALIZED (SELECT queue.owner FROM queue WHERE owner IN (SELECT owner FROM ordered)
        FOR UPDATE SKIP LOCKED),
    last AS MATERIALIZED (SELECT owner, nextval('round') AS served FROM
        (SELECT owner FROM ordered GROUP BY owner ORDER BY max(number)) AS in_order),
    in_round AS (UPDATE queue SET served = last.served FROM last
        WHERE queue.owner = last.owner AND queue.owner IN (SELECT owner FROM free_owners)),
    begun AS (UPDATE turn SET status = 'in_progress' FROM claimed WHERE turn.seq = claimed.turn
        RETURNING turn.seq, turn.id, turn.created_at),
    freed AS (DELETE FROM lease USING claimed
        WHERE claimed.generation > 1 AND lease.holder = 'run ' || claimed.seq || '.' || (claimed.generation - 1))
    SELECT claimed.*, begun.id, begun.created_at, (SELECT array_agg(item.body ORDER BY item.place) FROM item
        WHERE item.turn = claimed.turn AND item.place < {OUTPUTS_AT}) AS inputs
    FROM claimed JOIN begun ON begun.seq = claimed.turn ORDER BY claimed.number"""
)
OF_CLAIM = "run.seq = :run AND run.generation = :generation"
RENEW = Statement(
    "UPDATE run SET until_at = :until_at WHERE holder = :holder AND NOT is_stopped RETURNING seq, generation"
)
HELD = Statement("SELECT seq, generation FROM run WHERE holder = :holder AND NOT is_stopped ORDER BY seq")
EXPIRED = Statement("SELECT seq, generation FROM run WHERE holder IS NOT NULL AND until_at < :now ORDER BY seq")
# Who has nothing in line but what comes back enters at the end of the round.
BACK = """WITH back AS (UPDATE run SET holder = NULL, attempts = attempts - {attempts}
        WHERE {which} AND holder IS NOT NULL AND NOT is_stopped RETURNING owner),
    gone AS (DELETE FROM run WHERE {which} AND holder IS NOT NULL AND is_stopped)
    UPDATE queue SET served = nextval('round') WHERE owner IN (SELECT owner FROM back)
    AND NOT EXISTS (SELECT FROM run WHERE run.owner = queue.owner AND run.holder IS NULL)"""
RELEASE = Statement(BACK.format(which="run.holder = :holder", attempts=1))
RELEASE_RUN = Statement(BACK.format(which=OF_CLAIM, attempts=1))
FREE = Statement(BACK.format(which=f"{OF_CLAIM} AND run.until_at < :before_at", attempts=0))
LET_GO = Statement(f"DELETE FROM run WHERE {OF_CLAIM} AND is_stopped")
IS_HELD = Statement("SELECT 1 FROM run WHERE seq = :run")


async def claim(db: Asked, holder: str, until_at: float, limit: int) -> list[Run]:
    rows = await db.rows(CLAIM, {"holder": holder, "until_at": until_at, "at_most": limit})
    return [
        Run(
            held=Held(row["seq"], row["generation"]),
            response_id=row["id"],
            owner=row["owner"],
            created_at=row["created_at"],
            inputs=row["inputs"] or [],
            attempt=row["attempts"],
            request=row["request"],
            bearer=row["bearer"],
            next_number=row["next_number"],
        )
        for row in rows
    ]


async def renew(db: Asked, holder: str, until_at: float) -> list[Held]:
    return [Held(*row.values()) for row in await db.rows(RENEW, {"holder": holder, "until_at": until_at})]


async def held(db: Asked, holder: str) -> list[Held]:
    return [Held(*row.values()) for row in await db.rows(HELD, {"holder": holder})]


async def expired(db: Asked, now: float) -> list[Held]:
    return [Held(*row.values()) for row in await db.rows(EXPIRED, {"now": now})]


async def release(db: Asked, holder: str) -> None:
    await db.rows(RELEASE, {"holder": holder})


async def free(db: Asked, held: Held, before_at: float) -> None:
    await db.rows(FREE, {**_of(held), "before_at": before_at})


async def release_run(db: Asked, held: Held) -> None:
    await db.rows(RELEASE_RUN, _of(held))


async def let_go(db: Asked, held: Held) -> None:
    await db.rows(LET_GO, _of(held))


async def is_held(db: Asked, run: int) -> bool:
    return bool(await db.rows(IS_HELD, {"run": run}))


def _of(held: Held) -> dict[str, Any]:
    return {"run": held.run, "generation": held.generation}


# -- the log -----------------------------------------------------------------------------------------------------------

# A batch whose writer never learned that it was written comes again, perhaps with more events at its end. A shorter one
# that was given up, and arrives only after that, takes none of them away.
LOG = Statement(
    f"""WITH claimed AS (UPDATE run SET next_number = :next_number
        WHERE {OF_CLAIM} AND NOT is_stopped AND next_number <= :next_number RETURNING seq)
    INSERT INTO event (run, first, body) SELECT seq, :first::bigint, :frames::bytea FROM claimed
    ON CONFLICT (run, first) DO UPDATE SET body = excluded.body RETURNING 1"""
)
# What runs of one process log at the same moment. A run that somebody else is writing just now holds up no other one.
LOG_TOGETHER = Statement(
    """WITH given AS (SELECT * FROM unnest(:runs::bigint[], :generations::bigint[], :next_numbers::bigint[],
        :firsts::bigint[], :bodies::bytea[]) AS given (seq, generation, next_number, first, body)),
    free AS MATERIALIZED (SELECT given.* FROM given JOIN run USING (seq, generation)
        WHERE NOT run.is_stopped AND run.next_number <= given.next_number FOR UPDATE OF run SKIP LOCKED),
    claimed AS (UPDATE run SET next_number = free.next_number FROM free WHERE run.seq = free.seq
        RETURNING run.seq, run.generation, free.first, free.body),
    told AS (INSERT INTO event (run, first, body) SELECT seq, first, body FROM claimed
        ON CONFLICT (run, first) DO UPDATE SET body = excluded.body)
    SELECT seq, generation FROM claimed"""
)
# From the batch that holds a given number on.
TAIL = Statement(
    f"""SELECT turn.status, given.firsts, given.bodies FROM turn JOIN log ON log.turn = turn.seq CROSS JOIN LATERAL
        (SELECT array_agg(part.first ORDER BY part.first) AS firsts, array_agg(part.body ORDER BY part.first) AS bodies
        FROM (SELECT event.first, event.body FROM event WHERE event.run = log.run AND event.first >= coalesce(
            (SELECT max(held.first) FROM event AS held WHERE held.run = log.run AND held.first <= :wanted), 0)
            ORDER BY event.first LIMIT {BATCHES_AT_ONCE}) AS part) AS given
    WHERE {OWN}"""
)
STATES = Statement(
    """SELECT turn.id, turn.status, (SELECT max(event.first) FROM event WHERE event.run = log.run) AS newest
    FROM turn LEFT JOIN log ON log.turn = turn.seq WHERE turn.id = ANY(:ids) AND turn.deleted_at IS NULL"""
)
# Differs as soon as what a new statement sees may differ: a transaction that has written has ended.
VERSION = Statement("SELECT hashtextextended(pg_current_snapshot()::text, 0) AS version")


async def log(db: Asked, held: Held, batch: Batch) -> bool:
    return bool(await db.rows(LOG, {**_of(held), **_events(batch)}))


async def log_together(db: Asked, logged: list[tuple[Held, Batch]]) -> list[bool]:
    """Of each batch whether it was written, of a run the first one only; what was not may be written by itself."""
    first = {each[0].run: each for each in reversed(logged)}
    if len(first) == 1:
        return [False] * len(logged)
    rows = [(held.run, held.generation, batch.end, batch.first, batch.frames) for held, batch in first.values()]
    columns = ("runs", "generations", "next_numbers", "firsts", "bodies")
    values = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
    written = {Held(*row.values()) for row in await db.rows(LOG_TOGETHER, values)}
    return [each is first[each[0].run] and each[0] in written for each in logged]


async def tail(db: Asked, owner: str, response_id: str, after: int) -> Tail | None:
    row = await db.row(TAIL, {"owner": owner, "id": response_id, "wanted": min(max(after + 1, 0), NUMBERS)})
    if row is None:
        return None
    batches = list(zip(row["firsts"] or [], row["bodies"] or [], strict=True))
    return Tail(row["status"], batches, len(batches) == BATCHES_AT_ONCE)


async def states(db: Asked, response_ids: list[str]) -> dict[str, tuple[str, int | None]]:
    ids = [response_id for response_id in response_ids if "\0" not in response_id]
    return {row["id"]: (row["status"], row["newest"]) for row in await db.rows(STATES, {"ids": ids})}


async def version(db: Asked) -> int:
    row = await db.row(VERSION, {})
    return int(row["version"]) if row else 0


# -- ends --------------------------------------------------------------------------------------------------------------

CLAIMED = f"""claimed AS MATERIALIZED (SELECT run.seq, run.turn FROM run WHERE {OF_CLAIM} AND NOT run.is_stopped
        FOR UPDATE OF run)"""
OLD = "SELECT turn.* FROM turn JOIN claimed ON claimed.turn = turn.seq"
STANDING = (
    f"before AS (SELECT 1 FROM claimed), old AS MATERIALIZED (SELECT turn.*, turn.depth AS tip FROM ({OLD}) AS turn)"
)
# A turn at the end of its conversation leaves the place where it was queued, which stood by itself.
JOINING = f"""before AS MATERIALIZED (SELECT conversation.thread FROM conversation, claimed
        WHERE id = :conversation AND owner = :owner FOR KEY SHARE OF conversation), {ALLOWED},
    place AS (UPDATE thread SET tip = tip + 1 FROM before, allowed WHERE thread.seq = before.thread
        RETURNING thread.seq, thread.tip),
    queued AS MATERIALIZED ({OLD}),
    left_thread AS (DELETE FROM thread USING queued, place WHERE thread.seq = queued.thread),
    old AS MATERIALIZED (SELECT queued.seq, place.seq AS thread, place.tip, queued.settings, queued.lives_until
        FROM queued, place)"""
END = f"""shared AS (INSERT INTO settings (digest, model, body) SELECT
        CASE WHEN lives_until IS NULL THEN :digest::bytea ELSE :own_digest::bytea END, :model::text, :settings::bytea
        FROM old ON CONFLICT DO NOTHING),
    new AS (UPDATE turn SET status = :status, completed_at = :completed_at, body = :body,
            settings = CASE WHEN old.lives_until IS NULL THEN :digest::bytea ELSE :own_digest::bytea END,
            compaction = coalesce(:compaction, turn.compaction), thread = old.thread, depth = old.tip,
            lives_until = CASE WHEN old.lives_until IS NOT NULL THEN :lives_until::double precision END{{more}}
        FROM old WHERE turn.seq = old.seq RETURNING turn.seq),
    unshared AS (DELETE FROM settings USING old, new
        WHERE old.lives_until IS NOT NULL AND digest = old.settings AND digest <> :own_digest::bytea),
    items AS (INSERT INTO item (turn, place, kind, is_foreign, id, body) SELECT new.seq, given.* FROM new, {GIVEN_ITEMS}
        ON CONFLICT (turn, place) DO UPDATE SET kind = excluded.kind, is_foreign = excluded.is_foreign,
            id = excluded.id, body = excluded.body),
    told AS (INSERT INTO event (run, first, body) SELECT claimed.seq, :first::bigint, :frames::bytea FROM claimed, new
        WHERE :first::bigint IS NOT NULL ON CONFLICT (run, first) DO UPDATE SET body = excluded.body),
    aged AS (UPDATE log SET until_at = :log_until_at FROM claimed, new WHERE log.run = claimed.seq),
    gone AS (DELETE FROM run USING claimed, new WHERE run.seq = claimed.seq)
    SELECT (SELECT count(*) FROM claimed) AS claimed, (SELECT count(*) FROM before) AS found,
        (SELECT count(*) FROM new) AS ended"""
SETTLE = Statement(f"WITH {CLAIMED}, {STANDING}, {END.format(more='')}")
SETTLE_JOINING = Statement(
    f"WITH {CLAIMED}, {JOINING}, {END.format(more=', created_at = :created_at, ages_from = NULL, previous = NULL')}"
)
STOP = Statement(
    f"""WITH place AS MATERIALIZED (SELECT turn.seq FROM turn WHERE {OWN}),
    {STOPPED.format(turn="(SELECT seq FROM place)")},
    ended AS (UPDATE turn SET status = 'cancelled',
            lives_until = CASE WHEN turn.lives_until IS NOT NULL THEN :lives_until::double precision END
        FROM place WHERE turn.seq = place.seq AND (SELECT count(*) FROM held) >= 0
        AND turn.status IN ('queued', 'in_progress') RETURNING turn.seq),
    aged AS (UPDATE log SET until_at = :log_until_at FROM ended WHERE log.turn = ended.seq)
    SELECT (SELECT count(*) FROM ended) AS ended, place.seq FROM place"""
)
STILL_HELD = Statement("SELECT max(seq) AS run FROM run WHERE turn = :turn AND is_stopped")
OVER_LOGS = Statement("SELECT turn FROM log WHERE until_at <= :now LIMIT :at_most")
OVER_BRIEF = Statement("SELECT seq, thread FROM turn WHERE lives_until <= :now AND deleted_at IS NULL LIMIT :at_most")


async def settle(db: Asked, held: Held, ending: Ending) -> bool:
    turn = ending.turn
    joins = bool(turn.conversation_id) and not turn.is_detached
    values = {
        **values_of(turn),
        **_of(held),
        **_events(ending.batch),
        "digest": digest_of(turn, is_brief=False),
        "own_digest": digest_of(turn, is_brief=True),
        "log_until_at": ending.log_until_at,
        "lives_until": ending.lives_until,
    }
    if not joins:
        values |= items_of(list(enumerate(turn.outputs, OUTPUTS_AT)), turn.id)
    row = await db.row(SETTLE_JOINING if joins else SETTLE, values)
    if row is None or not row["claimed"]:
        return False
    if not row["ended"]:
        raise locked() if row["found"] else no_conversation(turn.conversation_id or "", "conversation")
    return True


async def stop(db: Asked, place: tuple[str, str], log_until_at: float, lives_until: float) -> Stopped | None:
    """`place`: the owner, and the id of the response."""
    owner, response_id = place
    named = {"owner": owner, "id": response_id}
    row = await db.row(STOP, {**named, "log_until_at": log_until_at, "lives_until": lives_until})
    kept = await response(db, owner, response_id) if row else None
    if row is None or kept is None:
        return None
    still_held = await db.row(STILL_HELD, {"turn": row["seq"]})
    return Stopped(kept, bool(row["ended"]), still_held["run"] if still_held else None)


async def forget_ended(db: Verb, now: float) -> int:
    """Some of the logs and brief responses whose time is over; how many it was."""
    some = {"now": now, "at_most": FORGOTTEN_AT_ONCE}
    if not await db.rows(OVER_LOGS, some) and not await db.rows(OVER_BRIEF, some):
        return 0

    async def forget_them(db: Transaction) -> int:
        await db.run(ONE_FORGETS)
        logs = [row["turn"] for row in await db.rows(OVER_LOGS, some)]
        brief = [(row["seq"], row["thread"]) for row in await db.rows(OVER_BRIEF, some)]
        await db.rows(ERASE_LOGS, {"turns": logs})
        await forget(db, brief, now)
        return len(logs) + len(brief)

    return await db.write(forget_them)


# -- for people --------------------------------------------------------------------------------------------------------

RUNS = Statement(
    """SELECT run.waits_for IS NOT NULL AS is_waiting, turn.id, run.owner, run.admitted_at, run.attempts,
        run.next_number, run.holder
    FROM run JOIN turn ON turn.seq = run.turn WHERE NOT run.is_stopped ORDER BY run.seq"""
)
COUNTS = Statement(
    """SELECT count(*) FILTER (WHERE holder IS NULL) AS queued,
        count(*) FILTER (WHERE holder IS NOT NULL AND NOT is_stopped) AS running FROM run"""
)


async def runs(db: Asked) -> list[RunInfo]:
    return [RunInfo(*row.values()) for row in await db.rows(RUNS, {})]


async def queue(db: Asked) -> QueueState:
    row = await db.row(COUNTS, {})
    return QueueState(row["queued"], row["running"]) if row else QueueState(0, 0)
