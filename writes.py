"""What the store is told, in SQL: turns, conversations and their items, leases, and what is to be forgotten.

May not know what an item means. A function that refuses does so before its first write.
"""

from __future__ import annotations

import math
import sqlite3
from hashlib import blake2b

from reads import (
    COMPACTION,
    HIDDEN,
    LISTED,
    NEWEST,
    THREAD,
    UNLISTED,
    Place,
    conversation,
    id_of,
    item_in,
    place_of,
    response_window,
    thread_of,
)
from run_tables import NUMBERS
from schema import OUTPUTS_AT, PAGE_BYTES, PLACES
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

# -- turns and conversations -------------------------------------------------------------------------------------------

INSERT_TURN = """INSERT INTO turn (id, owner, thread, depth, previous, settings, status, created_at, completed_at,
    ages_from, compaction, body, lives_until) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)"""
# A turn that was deleted meanwhile carries a child still; one that is short-lived carries none. Closed to children,
# which fork then: a turn that has one in its thread, and the turns of a conversation.
PARENT = """SELECT turn.seq, turn.thread, turn.depth, turn.status, thread.is_conversation OR EXISTS
    (SELECT 1 FROM turn AS child WHERE child.thread = turn.thread AND child.depth = turn.depth + 1)
    FROM turn JOIN thread ON thread.seq = turn.thread
    WHERE turn.id = ? AND turn.owner = ? AND turn.lives_until IS NULL"""
NEW_COMPACTION = f"""UPDATE turn SET compaction = (SELECT max(item.seq) - turn.seq * {PLACES} FROM item
    WHERE item.seq BETWEEN turn.seq * {PLACES} AND turn.seq * {PLACES} + {PLACES - 1}
    AND item.kind = {COMPACTION} AND NOT item.is_removed) WHERE seq = ?"""
KEEP_AHEAD = """UPDATE turn SET ahead = ? WHERE id = ? AND owner = ? AND deleted_at IS NULL AND lives_until IS NULL
    AND status IN ('completed', 'incomplete')"""
# Of all windows that reach this thread: forks, and forks of forks, begin with items of it.
ERASE_AHEAD = """WITH RECURSIVE line (thread) AS (VALUES (?) UNION ALL
    SELECT thread.seq FROM line JOIN thread ON thread.parent = line.thread)
    UPDATE turn SET ahead = NULL WHERE thread IN line AND ahead IS NOT NULL"""
RELEASE = "DELETE FROM lease WHERE name = ? AND holder = ?"
IS_HELD_AT = "SELECT 1 FROM lease WHERE name = ? AND until_at > ?"


def save(turn: NewTurn, db: sqlite3.Connection) -> int:
    """The seq of the new turn. Raises: InvalidRequest, NotFound, ConversationLocked."""
    thread, before = place_for(turn, db)
    if turn.lock and not db.execute(RELEASE, (turn.lock.name, turn.lock.holder)).rowcount:
        raise locked()
    if thread is None:
        thread = _new_thread(db, before and before.thread, before and before.depth)
    depth = before.depth + 1 if before else 0
    previous = before.seq if before and turn.previous_id else None
    ages_from = None if turn.conversation_id and not turn.is_detached else turn.created_at
    lives_until = math.inf if turn.is_brief else None
    own = (turn.status, turn.created_at, turn.completed_at, ages_from, newest_compaction(turn), turn.body, lives_until)
    row = (turn.id, turn.owner, thread, depth, previous, settings_seq(turn, db), *own)
    seq = db.execute(INSERT_TURN, row).lastrowid or 0
    numbered = [*enumerate(turn.inputs, seq * PLACES), *enumerate(turn.outputs, seq * PLACES + OUTPUTS_AT)]
    insert_items(db, numbered, turn.id)
    if first := turn.first_use:
        use = (turn.owner, first.key, first.digest, turn.id, first.until_at)
        db.execute("INSERT OR REPLACE INTO first_use VALUES (?,?,?,?,?)", use)
    return seq


def place_for(turn: NewTurn, db: sqlite3.Connection) -> tuple[int | None, Place | None]:
    """The thread that a turn goes on, None for a new one, and the turn before it. Raises: NotFound, InvalidRequest."""
    if turn.conversation_id:
        thread = thread_of(db, turn.owner, turn.conversation_id)
        if thread is None:
            raise no_conversation(turn.conversation_id, "conversation")
        newest = db.execute(NEWEST, (thread,)).fetchone()
        return None if turn.is_detached else thread, Place(*newest) if newest else None
    if not turn.previous_id:
        return None, None
    found = db.execute(PARENT, (turn.previous_id, turn.owner)).fetchone()
    if found is None:
        raise cannot_continue(turn.previous_id, "not found")
    *place, is_closed = found
    parent = Place(*place)
    return None if is_closed or turn.is_detached else parent.thread, parent


def _new_thread(db: sqlite3.Connection, parent: int | None, depth: int | None, is_conversation: bool = False) -> int:
    row = (parent, depth, is_conversation)
    inserted = db.execute("INSERT INTO thread (parent, parent_depth, is_conversation) VALUES (?,?,?)", row)
    return inserted.lastrowid or 0


def settings_seq(turn: NewTurn, db: sqlite3.Connection) -> int:
    """Shared by all turns that have the same; those of a brief turn are its own, and go with it."""
    key = (turn.owner, settings_digest(turn.model, turn.settings, turn.id if turn.is_brief else ""))
    found = db.execute("SELECT seq FROM settings WHERE owner = ? AND digest = ?", key).fetchone()
    if found:
        return int(found[0])
    insert = "INSERT INTO settings (owner, digest, model, body) VALUES (?,?,?,?)"
    return db.execute(insert, (*key, turn.model, turn.settings)).lastrowid or 0


def settings_digest(model: str, settings: bytes, brief_id: str) -> bytes:
    """`brief_id`: of the brief response that they belong to, if it is one."""
    return blake2b(b"%b\0%b" % (model.encode(), settings), digest_size=16, key=brief_id.encode()).digest()


def settings_key(owner: str, digest: bytes) -> bytes:
    """One value for the two that settings are known by: databases know them by it, and copies do."""
    return blake2b(owner.encode() + b"\0" + digest, digest_size=16).digest()


def newest_compaction(turn: NewTurn) -> int | None:
    found = last_compaction(turn.outputs, OUTPUTS_AT)
    return last_compaction(turn.inputs) if found is None else found


def last_compaction(items: tuple[NewItem, ...], start: int = 0) -> int | None:
    return next((start + n for n in reversed(range(len(items))) if items[n].is_compaction), None)


def insert_items(db: sqlite3.Connection, numbered: list[tuple[int, NewItem]], response_id: str) -> None:
    rows = [(seq, kind_of(item), item.body) for seq, item in numbered]
    db.executemany("INSERT INTO item VALUES (?,?,0,?)", rows)
    ids = [(item.id, seq) for seq, item in numbered if response_of(item.id) != response_id]
    if ids:
        db.executemany("INSERT INTO item_id VALUES (?,?)", ids)


def kind_of(item: NewItem) -> int:
    if item.is_hidden:
        return HIDDEN
    return COMPACTION if item.is_compaction else LISTED if item.is_listed else UNLISTED


def keep_ahead(owner: str, response_id: str, blob: bytes, of: list[bytes] | None, db: sqlite3.Connection) -> bool:
    if of is not None and ((window := response_window(owner, response_id, db)) is None or window.items != of):
        return False
    return db.execute(KEEP_AHEAD, (blob, response_id, owner)).rowcount > 0


def _append(db: sqlite3.Connection, owner: str, thread: int, items: tuple[NewItem, ...], now: float) -> None:
    newest = db.execute(NEWEST, (thread,)).fetchone()
    depth = newest[2] + 1 if newest else 0
    own = ("completed", int(now), None, None, last_compaction(items), b"", None)
    row = (None, owner, thread, depth, None, None, *own)
    seq = db.execute(INSERT_TURN, row).lastrowid or 0
    insert_items(db, list(enumerate(items, seq * PLACES)), "")


def create_conversation(
    owner: str, conversation: Conversation, items: tuple[NewItem, ...], db: sqlite3.Connection
) -> None:
    thread = _new_thread(db, None, None, is_conversation=True)
    row = (conversation.id, owner, thread, conversation.created_at, conversation.metadata)
    db.execute("INSERT INTO conversation VALUES (?,?,?,?,?)", row)
    if items:
        _append(db, owner, thread, items, conversation.created_at)


def update_conversation(
    owner: str, conversation_id: str, metadata: bytes, db: sqlite3.Connection
) -> Conversation | None:
    db.execute("UPDATE conversation SET metadata = ? WHERE id = ? AND owner = ?", (metadata, conversation_id, owner))
    return conversation(owner, conversation_id, db)


def _refuse_locked(db: sqlite3.Connection, conversation_id: str, now: float) -> None:
    if db.execute(IS_HELD_AT, (conversation_lease(conversation_id), now)).fetchone():
        raise locked()


def add_items(owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float, db: sqlite3.Connection) -> bool:
    thread = thread_of(db, owner, conversation_id)
    if thread is None:
        return False
    _refuse_locked(db, conversation_id, now)
    for item in items:
        if item_in(db, thread, item.id):
            raise repeated(item.id)
    _append(db, owner, thread, items, now)
    return True


def delete_conversation_item(
    owner: str, conversation_id: str, item_id: str, now: float, db: sqlite3.Connection
) -> bool:
    found = item_in(db, thread_of(db, owner, conversation_id), item_id)
    if found is None:
        return False
    _refuse_locked(db, conversation_id, now)
    (response_id,) = db.execute("SELECT id FROM turn WHERE seq = ?", (found.seq // PLACES,)).fetchone()
    if response_id is not None:
        db.execute("UPDATE item SET is_removed = 1 WHERE seq = ?", (found.seq,))
    else:
        db.execute("DELETE FROM item_id WHERE id = ? AND item = ?", (item_id, found.seq))
        db.execute("DELETE FROM item WHERE seq = ?", (found.seq,))
    db.execute(ERASE_AHEAD, (found.thread,))
    if found.kind == COMPACTION:
        db.execute(NEW_COMPACTION, (found.seq // PLACES,))
    return True


def acquire(lock: Lock, now: float, until_at: float, db: sqlite3.Connection) -> bool:
    claim = """INSERT INTO lease VALUES (?1, ?2, ?3) ON CONFLICT (name) DO UPDATE SET holder = ?2, until_at = ?3
        WHERE holder = ?2 OR until_at <= ?4"""
    return db.execute(claim, (lock.name, lock.holder, until_at, now)).rowcount > 0


def renew(lock: Lock, until_at: float, db: sqlite3.Connection) -> bool:
    renew = "UPDATE lease SET until_at = ? WHERE name = ? AND holder = ?"
    return db.execute(renew, (until_at, lock.name, lock.holder)).rowcount > 0


def release(lock: Lock, db: sqlite3.Connection) -> None:
    db.execute(RELEASE, (lock.name, lock.holder))


# -- deleting ----------------------------------------------------------------------------------------------------------

VACUUMED_PAGES = 2000
# Who waits for a run that goes waits for what that one waited for, if anything: conversations keep their order.
AWAKEN = "UPDATE run SET waits_for = (SELECT gone.waits_for FROM run AS gone WHERE gone.seq = ?1) WHERE waits_for = ?1"
# How many responses one transaction of a purge takes, so that no turn waits long for the writer.
PURGED_AT_ONCE = 100
OLD = """SELECT seq, thread FROM turn WHERE ages_from < ? AND ages_from IS NOT NULL AND deleted_at IS NULL
    ORDER BY ages_from LIMIT ?"""
DEPTH_NEEDED = """SELECT max(coalesce((SELECT max(depth) FROM turn WHERE thread = ?1 AND deleted_at IS NULL), -1),
    coalesce((SELECT max(parent_depth) FROM thread WHERE parent = ?1), -1))"""


def delete_response(owner: str, response_id: str, now: float, db: sqlite3.Connection) -> bool:
    place = place_of(db, owner, response_id)
    if place is None:
        return False
    forget(db, [(place.seq, place.thread)], now)
    return True


def delete_conversation(owner: str, conversation_id: str, now: float, db: sqlite3.Connection) -> bool:
    thread = thread_of(db, owner, conversation_id)
    if thread is None:
        return False
    db.execute("DELETE FROM conversation WHERE id = ?", (conversation_id,))
    db.execute("UPDATE thread SET is_conversation = 0 WHERE seq = ?", (thread,))
    db.execute("UPDATE turn SET deleted_at = ? WHERE thread = ? AND id IS NULL", (int(now), thread))
    db.execute("UPDATE turn SET ages_from = ? WHERE thread = ? AND id IS NOT NULL", (int(now), thread))
    db.execute(ERASE_AHEAD, (thread,))
    _prune(db, thread)
    return True


def forget(db: sqlite3.Connection, turns: list[tuple[int, int]], now: float) -> None:
    """Makes responses unknown, and erases what nothing living stands on; a run among them is stopped."""
    for seq, _ in turns:
        stop_run(seq, db)
        erase_log(seq, db)
    db.executemany("UPDATE turn SET deleted_at = ?, ahead = NULL WHERE seq = ?", [(int(now), seq) for seq, _ in turns])
    for thread in {thread for _, thread in turns}:
        _prune(db, thread)


def stop_run(turn: int, db: sqlite3.Connection) -> None:
    """Takes a turn's run out of the line, or from its holder, who has to let go of it."""
    found = db.execute("SELECT seq FROM run WHERE turn = ? AND NOT is_stopped", (turn,)).fetchone()
    if found:
        db.execute(AWAKEN, found)
        db.execute("DELETE FROM run WHERE seq = ? AND holder IS NULL", found)
        db.execute("UPDATE run SET is_stopped = 1, request = x'', bearer = NULL WHERE seq = ?", found)


def erase_log(turn: int, db: sqlite3.Connection) -> None:
    for (run,) in db.execute("SELECT run FROM log WHERE turn = ?", (turn,)).fetchall():
        db.execute("DELETE FROM event WHERE seq BETWEEN ? AND ?", (run * NUMBERS, run * NUMBERS + NUMBERS - 1))
        db.execute("DELETE FROM log WHERE run = ?", (run,))


def _prune(db: sqlite3.Connection, thread: int | None) -> None:
    """Erases the end of a thread that no living turn needs, and then perhaps of the thread it left."""
    while thread is not None:
        found = db.execute(THREAD, (thread,)).fetchone()
        if found is None or found[2]:
            return
        (needed,) = db.execute(DEPTH_NEEDED, (thread,)).fetchone()
        erase_turns(db, db.execute("SELECT seq FROM turn WHERE thread = ? AND depth > ?", (thread, needed)).fetchall())
        if db.execute("SELECT 1 FROM turn WHERE thread = ? LIMIT 1", (thread,)).fetchone():
            return
        db.execute("DELETE FROM thread WHERE seq = ?", (thread,))
        thread = found[0]


OWN_SETTINGS = "DELETE FROM settings WHERE seq = (SELECT settings FROM turn WHERE seq = ? AND lives_until NOTNULL)"


def erase_turns(db: sqlite3.Connection, turns: list[tuple[int]]) -> None:
    for (seq,) in turns:
        items = (seq * PLACES, seq * PLACES + PLACES - 1)
        bodies = db.execute("SELECT seq, body FROM item WHERE seq BETWEEN ? AND ?", items)
        ids = [(id_of(body), item) for item, body in bodies]
        db.executemany("DELETE FROM item_id WHERE id = ? AND item = ?", ids)
        db.execute("DELETE FROM item WHERE seq BETWEEN ? AND ?", items)
        db.execute(OWN_SETTINGS, (seq,))
        db.execute("UPDATE run SET turn = 0 WHERE turn = ?", (seq,))  # a new turn may get the number
        db.execute("DELETE FROM turn WHERE seq = ?", (seq,))


def forget_some(before_at: float, now: float, db: sqlite3.Connection) -> int:
    """Of the responses that age from before that time; how many it was."""
    old = db.execute(OLD, (before_at, PURGED_AT_ONCE)).fetchall()
    forget(db, old, now)
    return len(old)


def sweep(now: float, db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM first_use WHERE until_at <= ?", (now,))
    db.execute("DELETE FROM lease WHERE until_at <= ?", (now,))
    db.execute("DELETE FROM settings WHERE seq NOT IN (SELECT settings FROM turn WHERE settings IS NOT NULL)")


def checkpoint(db: sqlite3.Connection) -> None:
    """Brings the log into the file and empties it; not while somebody reads, because all writers would wait."""
    (patience_ms,) = db.execute("PRAGMA busy_timeout").fetchone()
    db.execute("PRAGMA busy_timeout = 0")
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        db.execute(f"PRAGMA busy_timeout = {patience_ms}")


def vacuum_some(db: sqlite3.Connection) -> int:
    """Gives free pages at the end of the file back; the bytes that this saved."""
    (before,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA incremental_vacuum({VACUUMED_PAGES})").fetchall()
    (after,) = db.execute("PRAGMA page_count").fetchone()
    return int(before - after) * PAGE_BYTES
