"""What the store on PostgreSQL is told: turns, conversations and their items, leases, and what is kept under a name.

May not know what an item means. A turn is one statement, which locks what it goes on from before it reads it: first the
thread, then the turn.
"""

from __future__ import annotations

import math
import os
from typing import Any

from postgres_pool import Asked, Statement, Transaction
from postgres_reads import OWN, RESPONSE_WINDOW, conversation, item_in, items_with, thread_of, window
from postgres_tables import FORGETTING
from reads import COMPACTION
from schema import OUTPUTS_AT
from verbs import (
    Conversation,
    Lock,
    NewItem,
    NewTurn,
    cannot_continue,
    conversation_lease,
    locked,
    no_conversation,
    repeated,
    response_of,
)
from writes import kind_of, last_compaction, newest_compaction, settings_digest, settings_key

# -- turns -------------------------------------------------------------------------------------------------------------

# Whatever a turn continues gives `before` one row where it is there, and `place` one where it may be written, too.
ALLOWED = """freed AS (DELETE FROM lease WHERE name = :lock AND holder = :lock_holder AND EXISTS (SELECT FROM before)
        RETURNING 1),
    allowed AS (SELECT FROM before WHERE :lock::text IS NULL OR EXISTS (SELECT FROM freed))"""
NEW_THREAD = f"""before AS (SELECT 1 FROM ok), {ALLOWED},
    place AS (INSERT INTO thread (tip, is_conversation) SELECT 0, false FROM allowed
        RETURNING seq AS thread, 0::bigint AS depth, NULL::bigint AS previous)"""
PARENT = "turn.id = :previous AND turn.owner = :owner AND turn.lives_until IS NULL"
# Closed to children, which fork then: a turn that has one in its thread, one of a conversation. Of two children that
# come at once one moves the tip; the other one waits for that, sees it, and forks.
CHILD = f"""line AS MATERIALIZED (SELECT thread.seq FROM thread, ok
        WHERE thread.seq = (SELECT turn.thread FROM turn WHERE {PARENT}) FOR KEY SHARE OF thread),
    before AS MATERIALIZED (SELECT turn.seq, turn.thread, turn.depth FROM turn JOIN line ON line.seq = turn.thread
        WHERE {PARENT} FOR KEY SHARE OF turn), {ALLOWED},
    tip AS (UPDATE thread SET tip = before.depth + 1 FROM before, allowed WHERE thread.seq = before.thread
        AND thread.tip = before.depth AND NOT thread.is_conversation AND NOT :is_detached::boolean
        RETURNING thread.seq),
    fork AS (INSERT INTO thread (parent, parent_depth, tip, is_conversation)
        SELECT before.thread, before.depth, before.depth + 1, false FROM before, allowed
        WHERE NOT EXISTS (SELECT FROM tip) RETURNING seq),
    place AS (SELECT own.seq AS thread, before.depth + 1 AS depth, before.seq AS previous
        FROM before, (SELECT seq FROM tip UNION ALL SELECT seq FROM fork) AS own)"""
IN_CONVERSATION = f"""before AS MATERIALIZED (SELECT conversation.thread FROM conversation, ok
        WHERE id = :conversation AND owner = :owner FOR KEY SHARE OF conversation), {ALLOWED},
    place AS (UPDATE thread SET tip = tip + 1 FROM before, allowed WHERE thread.seq = before.thread
        RETURNING thread.seq AS thread, thread.tip AS depth, NULL::bigint AS previous)"""
# Beside its conversation, with the window of that.
BESIDE_CONVERSATION = f"""before AS MATERIALIZED (SELECT thread.seq AS thread, thread.tip
        FROM conversation JOIN thread ON thread.seq = conversation.thread CROSS JOIN ok
        WHERE id = :conversation AND owner = :owner FOR KEY SHARE OF conversation, thread), {ALLOWED},
    place AS (INSERT INTO thread (parent, parent_depth, tip, is_conversation)
        SELECT CASE WHEN tip >= 0 THEN thread END, CASE WHEN tip >= 0 THEN tip END, tip + 1, false FROM before, allowed
        RETURNING seq AS thread, tip AS depth, NULL::bigint AS previous)"""
GIVEN_ITEMS = """unnest(:places::integer[], :kinds::smallint[], :foreign::boolean[], :ids::text[], :bodies::bytea[])
    AS given (place, kind, is_foreign, id, body)"""
INSERT_ITEMS = f"""INSERT INTO item (turn, place, kind, is_foreign, id, body)
    SELECT new.seq, given.* FROM new, {GIVEN_ITEMS}"""
INSERT_TURN = f"""shared AS (INSERT INTO settings (digest, model, body)
        SELECT :digest::bytea, :model::text, :settings::bytea FROM place ON CONFLICT DO NOTHING),
    new AS (INSERT INTO turn (id, owner, thread, depth, previous, settings, status, created_at, completed_at, ages_from,
            lives_until, compaction, body)
        SELECT :id::text, :owner::text, thread, depth, previous, :digest::bytea, :status::text, :created_at::bigint,
            :completed_at::bigint, :ages_from::bigint, :lives_until::double precision, :compaction::integer,
            :body::bytea
        FROM place RETURNING seq),
    items AS ({INSERT_ITEMS}),
    used AS (INSERT INTO first_use (owner, key, digest, response, until_at)
        SELECT :owner::text, :key::text, :key_digest::bytea, :id::text, :key_until::bigint FROM new
        WHERE :key::text IS NOT NULL ON CONFLICT (owner, key)
        DO UPDATE SET digest = excluded.digest, response = excluded.response, until_at = excluded.until_at)"""
PLACES_FOR = {"new": NEW_THREAD, "child": CHILD, "joining": IN_CONVERSATION, "beside": BESIDE_CONVERSATION}
OUTCOME = "(SELECT count(*) FROM before) AS found, (SELECT seq FROM new) AS turn"
SAVE = {
    name: Statement(f"WITH ok AS (SELECT 1 AS one), {place}, {INSERT_TURN} SELECT {OUTCOME}")
    for name, place in PLACES_FOR.items()
}


async def save(db: Asked, turn: NewTurn) -> None:
    row = await db.row(SAVE[place_of(turn)], values_of(turn))
    if row is None or row["turn"] is None:
        raise refusal_of(turn, bool(row and row["found"]))


def place_of(turn: NewTurn) -> str:
    """What a turn goes on from, as a key of `PLACES_FOR`."""
    if turn.conversation_id:
        return "beside" if turn.is_detached else "joining"
    return "child" if turn.previous_id else "new"


def refusal_of(turn: NewTurn, is_found: bool) -> Exception:
    if is_found:
        return locked()
    if turn.conversation_id:
        return no_conversation(turn.conversation_id, "conversation")
    return cannot_continue(turn.previous_id or "", "not found")


def values_of(turn: NewTurn) -> dict[str, Any]:
    """For the statements that keep a turn."""
    lock, use = turn.lock, turn.first_use
    return {
        "id": turn.id,
        "owner": turn.owner,
        "previous": turn.previous_id,
        "conversation": turn.conversation_id,
        "is_detached": turn.is_detached,
        "lock": lock and lock.name,
        "lock_holder": lock and lock.holder,
        "digest": digest_of(turn, turn.is_brief),
        "model": turn.model,
        "settings": turn.settings,
        "status": turn.status,
        "created_at": turn.created_at,
        "completed_at": turn.completed_at,
        "ages_from": None if turn.conversation_id and not turn.is_detached else turn.created_at,
        "lives_until": math.inf if turn.is_brief else None,
        "compaction": newest_compaction(turn),
        "body": turn.body,
        "key": use and use.key,
        "key_digest": use and use.digest,
        "key_until": use and use.until_at,
        **items_of([*enumerate(turn.inputs), *enumerate(turn.outputs, OUTPUTS_AT)], turn.id),
    }


def digest_of(turn: NewTurn, is_brief: bool) -> bytes:
    """Shared by all turns of an owner that have the same settings; those of a brief turn are its own."""
    return settings_key(turn.owner, settings_digest(turn.model, turn.settings, turn.id if is_brief else ""))


def items_of(numbered: list[tuple[int, NewItem]], response_id: str) -> dict[str, list[Any]]:
    items = [item for _, item in numbered]
    return {
        "places": [place for place, _ in numbered],
        "kinds": [kind_of(item) for item in items],
        "foreign": [response_of(item.id) != response_id for item in items],
        "ids": [item.id.replace("\0", "\ufffd") for item in items],
        "bodies": [item.body for item in items],
    }


KEEP_AHEAD = Statement(
    f"""UPDATE turn SET ahead = :blob WHERE {OWN} AND lives_until IS NULL
    AND status IN ('completed', 'incomplete') RETURNING seq"""
)
ONE_FORGETS = f"SELECT pg_advisory_xact_lock({FORGETTING})"


async def keep_ahead(db: Transaction, owner: str, response_id: str, blob: bytes, of: list[bytes] | None) -> bool:
    await db.run(ONE_FORGETS)
    if of is not None:
        found = await window(db, RESPONSE_WINDOW, owner, response_id)
        if found is None or found.items != of:
            return False
    return bool(await db.rows(KEEP_AHEAD, {"owner": owner, "id": response_id, "blob": blob}))


# -- conversations -----------------------------------------------------------------------------------------------------

APPEND = f"""new AS (INSERT INTO turn (owner, thread, depth, status, created_at, compaction, body)
        SELECT :owner::text, place.thread, place.depth, 'completed', :created_at::bigint, :compaction::integer, ''
        FROM place WHERE place.depth >= 0 RETURNING seq)
    {INSERT_ITEMS}"""
CREATE_CONVERSATION = Statement(
    f"""WITH place AS (INSERT INTO thread (tip, is_conversation) VALUES (:tip::bigint, true)
        RETURNING seq AS thread, tip AS depth),
    talk AS (INSERT INTO conversation (id, owner, thread, created_at, metadata)
        SELECT :id::text, :owner::text, thread, :created_at::bigint, :metadata::bytea FROM place),
    {APPEND}"""
)
APPEND_ITEMS = Statement(
    f"""WITH place AS (UPDATE thread SET tip = tip + 1 WHERE seq = :thread RETURNING seq AS thread, tip AS depth),
    {APPEND}"""
)
UPDATE_CONVERSATION = Statement("UPDATE conversation SET metadata = :metadata WHERE id = :id AND owner = :owner")
HOLD_CONVERSATION = Statement("SELECT thread FROM conversation WHERE id = :id AND owner = :owner FOR KEY SHARE")
# Whoever wants the lease meanwhile waits for the end of this transaction.
HOLD_LEASE = Statement(
    """INSERT INTO lease (name, holder, until_at) VALUES (:name, :holder, :now)
    ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING holder, until_at"""
)
WRITER = "a write of its items"
REMOVE_ITEM = Statement("UPDATE item SET is_removed = true WHERE turn = :turn AND place = :place")
ERASE_ITEM = Statement("DELETE FROM item WHERE turn = :turn AND place = :place")
NEW_COMPACTION = Statement(
    f"""UPDATE turn SET compaction = (SELECT max(place) FROM item WHERE item.turn = turn.seq
    AND kind = {COMPACTION} AND NOT is_removed) WHERE seq = :turn"""
)
# Of all windows that reach this thread: forks, and forks of forks, begin with items of it.
ERASE_AHEAD = Statement(
    """WITH RECURSIVE line (thread) AS (VALUES (:thread::bigint) UNION ALL
        SELECT thread.seq FROM line JOIN thread ON thread.parent = line.thread)
    UPDATE turn SET ahead = NULL WHERE thread IN (SELECT thread FROM line) AND ahead IS NOT NULL"""
)


async def create_conversation(db: Asked, owner: str, new: Conversation, items: tuple[NewItem, ...]) -> None:
    own = {"id": new.id, "metadata": new.metadata, "tip": 0 if items else -1}
    await db.rows(CREATE_CONVERSATION, {**own, **_appended(owner, items, new.created_at)})


def _appended(owner: str, items: tuple[NewItem, ...], created_at: int) -> dict[str, Any]:
    own = {"owner": owner, "created_at": created_at, "compaction": last_compaction(items)}
    return {**own, **items_of(list(enumerate(items)), "")}


async def update_conversation(
    db: Transaction, owner: str, conversation_id: str, metadata: bytes
) -> Conversation | None:
    await db.rows(UPDATE_CONVERSATION, {"owner": owner, "id": conversation_id, "metadata": metadata})
    return await conversation(db, owner, conversation_id)


async def add_items(db: Transaction, owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float) -> bool:
    held = await db.row(HOLD_CONVERSATION, {"owner": owner, "id": conversation_id})
    if held is None:
        return False
    is_mine = await _hold(db, conversation_id, now)
    taken = {
        each.id for each in await items_with(db, [item.id for item in items], held["thread"]) if not each.is_removed
    }
    for item in items:
        if item.id in taken:
            raise repeated(item.id)
    await db.rows(APPEND_ITEMS, {"thread": held["thread"], **_appended(owner, items, int(now))})
    await _let_go(db, conversation_id, is_mine)
    return True


async def _hold(db: Transaction, conversation_id: str, now: float) -> bool:
    """Whether the lease has to be given back. Raises: ConversationLocked."""
    row = await db.row(HOLD_LEASE, {"name": conversation_lease(conversation_id), "holder": WRITER, "now": now})
    if row is not None and row["until_at"] > now:
        raise locked()
    return row is not None and row["holder"] == WRITER


async def _let_go(db: Transaction, conversation_id: str, is_mine: bool) -> None:
    if is_mine:
        await release(db, Lock(conversation_lease(conversation_id), WRITER))


async def delete_conversation_item(db: Transaction, owner: str, name: tuple[str, str], now: float) -> bool:
    """`name`: of the conversation, and of the item."""
    conversation_id, item_id = name
    await db.run(ONE_FORGETS)
    thread = await thread_of(db, owner, conversation_id)
    found = None if thread is None else await item_in(db, thread, item_id)
    if found is None:
        return False
    is_mine = await _hold(db, conversation_id, now)
    await db.rows(REMOVE_ITEM if found.is_of_response else ERASE_ITEM, {"turn": found.turn, "place": found.place})
    await db.rows(ERASE_AHEAD, {"thread": found.thread})
    if found.kind == COMPACTION:
        await db.rows(NEW_COMPACTION, {"turn": found.turn})
    await _let_go(db, conversation_id, is_mine)
    return True


# -- leases and names --------------------------------------------------------------------------------------------------

ACQUIRE = Statement(
    """INSERT INTO lease (name, holder, until_at) VALUES (:name, :holder, :until_at)
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until_at = excluded.until_at
    WHERE lease.holder = excluded.holder OR lease.until_at <= :now::double precision RETURNING 1"""
)
RENEW = Statement("UPDATE lease SET until_at = :until_at WHERE name = :name AND holder = :holder RETURNING 1")
RELEASE = Statement("DELETE FROM lease WHERE name = :name AND holder = :holder")
# Names of models are the clients' own, and a tree takes no longer ones: those are learned anew by each process.
NAME_CHARACTERS = 500
NEW_SECRET = Statement("INSERT INTO secret (name, value) VALUES (:name, :value) ON CONFLICT DO NOTHING")
SECRET = Statement("SELECT value FROM secret WHERE name = :name")
LEARNED = Statement("SELECT name, value FROM learned")
KEEP_LEARNED = Statement(
    """INSERT INTO learned (name, value) SELECT * FROM unnest(:names::text[], :facts::bytea[]) AS given (name, value)
    ORDER BY name ON CONFLICT (name) DO UPDATE SET value = excluded.value"""
)


async def acquire(db: Asked, lock: Lock, now: float, until_at: float) -> bool:
    return bool(await db.rows(ACQUIRE, {"name": lock.name, "holder": lock.holder, "now": now, "until_at": until_at}))


async def renew(db: Asked, lock: Lock, until_at: float) -> bool:
    return bool(await db.rows(RENEW, {"name": lock.name, "holder": lock.holder, "until_at": until_at}))


async def release(db: Asked, lock: Lock) -> None:
    await db.rows(RELEASE, {"name": lock.name, "holder": lock.holder})


async def secret(db: Asked, name: str) -> bytes:
    await db.rows(NEW_SECRET, {"name": name, "value": os.urandom(32)})
    row = await db.row(SECRET, {"name": name})
    return bytes(row["value"]) if row else b""


async def learned(db: Asked) -> dict[str, bytes]:
    return {row["name"]: row["value"] for row in await db.rows(LEARNED, {})}


async def keep_learned(db: Asked, facts: dict[str, bytes]) -> None:
    kept = {name.replace("\0", "\ufffd"): fact for name, fact in facts.items() if len(name) <= NAME_CHARACTERS}
    await db.rows(KEEP_LEARNED, {"names": list(kept), "facts": list(kept.values())})
