"""SQLite: the verbs of a store on one file that several processes may share.

May not know HTTP, what an item means, or policy: how long things are kept and who may ask is decided by the caller.
One writer puts everything that waits into one transaction and one hop to its thread; readers have their own connection.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, TypeVar

import orjson

from errors import ConversationLocked, InvalidRequest, NotFound, StoreError
from lanes import DatabaseThread, Lane, connected, read_all, store_error, write_all
from schema import OUTPUTS_AT, PAGE_BYTES, PLACES, migrate, use_wal
from verbs import (
    Conversation,
    KeptResponse,
    Listed,
    Lock,
    NewItem,
    NewTurn,
    Page,
    Purged,
    Window,
    conversation_lock,
    response_of,
)

T = TypeVar("T")

CACHE_KB = 16_000
JOURNAL_BYTES = 64 * 1024 * 1024
LAST = (1 << 63) - 1
# Kinds of items.
LISTED, UNLISTED, COMPACTION = 0, 1, 2


@dataclass(frozen=True)
class StoreSettings:
    """The section `[store]`."""

    path: str = "responses.db"
    synchronous: Literal["NORMAL", "FULL"] = "NORMAL"
    retention_days: float = 30.0
    busy_timeout_s: float = 5.0


async def open_store(settings: StoreSettings) -> SQLiteStore:
    """The store in a file, made where there is none; `:memory:` keeps nothing.

    Raises: StoreError when the file cannot be used.
    """
    threads: list[DatabaseThread] = []
    try:
        await _open_threads(settings, threads)
    except (OSError, sqlite3.Error, StoreError) as error:
        for thread in threads:
            await thread.close()
        if isinstance(error, StoreError):
            raise
        if isinstance(error, sqlite3.Error):
            raise store_error(error, f"'{settings.path}'") from error
        raise StoreError(f"'{settings.path}' cannot be opened: {error.strerror}.") from error
    writer = Lane(threads[0], write_all)
    return SQLiteStore(writer, Lane(threads[1], read_all) if len(threads) > 1 else writer)


async def _open_threads(settings: StoreSettings, threads: list[DatabaseThread]) -> None:
    """The writer's, which makes the file or brings it up to date, and the reader's; a store in memory has one."""
    in_memory = settings.path == ":memory:"
    if not in_memory:
        os.close(os.open(settings.path, os.O_RDWR | os.O_CREAT, 0o600))
    for prepare in (_prepare,) if in_memory else (_prepare, None):
        threads.append(await connected(settings.path))
        await threads[-1].run(partial(_set_up, settings))
        if prepare is not None:
            await threads[-1].run(partial(prepare, settings))


def _set_up(settings: StoreSettings, db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA busy_timeout = {int(settings.busy_timeout_s * 1000)}")
    db.execute(f"PRAGMA synchronous = {settings.synchronous}")
    db.execute("PRAGMA secure_delete = ON")
    db.execute(f"PRAGMA cache_size = -{CACHE_KB}")
    db.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")


def _prepare(settings: StoreSettings, db: sqlite3.Connection) -> None:
    migrate(db, settings.path)
    use_wal(db, settings.busy_timeout_s)


# -- reading -----------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Some turns of a thread, the first and last item of interest in them, and whether removed items count."""

    thread: int
    low: int
    high: int
    first: int = 0
    last: int = LAST
    with_removed: int = 0


class _Place(NamedTuple):
    """A turn of a thread."""

    seq: int
    thread: int
    depth: int
    status: str = "completed"


TURN = "SELECT seq, thread, depth, status FROM turn WHERE id = ? AND owner = ? AND deleted_at IS NULL"
NEWEST = "SELECT seq, thread, depth, status FROM turn WHERE thread = ? ORDER BY depth DESC LIMIT 1"
NEWEST_COMPACTION = f"""SELECT depth, seq * {PLACES} + compaction FROM turn
    WHERE thread = ? AND depth <= ? AND compaction IS NOT NULL ORDER BY depth DESC LIMIT 1"""
THREAD = "SELECT parent, parent_depth, is_conversation FROM thread WHERE seq = ?"
# Items of a span in the order of the chain; no sorting, because seq grows with depth, and from parent to child thread.
ITEMS = f"""SELECT item.seq, item.body FROM turn CROSS JOIN item
    ON item.seq BETWEEN max(turn.seq * {PLACES}, ?4) AND min(turn.seq * {PLACES} + {PLACES - 1}, ?5)
    WHERE turn.thread = ?1 AND turn.depth BETWEEN ?2 AND ?3 AND item.is_removed <= ?6 AND item.kind <= ?7
    ORDER BY turn.depth {{order}}, item.seq {{order}} LIMIT ?8"""
ITEMS_IN = {"asc": ITEMS.format(order="ASC"), "desc": ITEMS.format(order="DESC")}
OUTPUTS = "SELECT body FROM item WHERE seq BETWEEN ? AND ? ORDER BY seq"
OF_ITEM = """SELECT item.seq, turn.thread, turn.depth, turn.owner, turn.deleted_at, item.kind, item.is_removed,
    item.body FROM"""
BY_INDEX = f"""{OF_ITEM} item_id JOIN item ON item.seq = item_id.item JOIN turn ON turn.seq = item_id.item / {PLACES}
    WHERE item_id.id = ?"""
BY_RESPONSE = f"""{OF_ITEM} turn CROSS JOIN item
    ON item.seq BETWEEN turn.seq * {PLACES} AND turn.seq * {PLACES} + {PLACES - 1}
    WHERE turn.id = ?"""
RESPONSE = """SELECT turn.seq, turn.id, turn.status, turn.created_at, turn.completed_at, previous.id, settings.body,
    turn.body FROM turn JOIN settings ON settings.seq = turn.settings
    LEFT JOIN turn AS previous ON previous.seq = turn.previous WHERE turn.deleted_at IS NULL AND turn.owner = ?1 """
CONVERSATION = "SELECT thread, id, created_at, metadata FROM conversation WHERE id = ? AND owner = ?"


def _spans(db: sqlite3.Connection, thread: int | None, depth: int) -> list[_Span]:
    """The window that ends with this turn, oldest first."""
    spans: list[_Span] = []
    while thread is not None:
        if found := db.execute(NEWEST_COMPACTION, (thread, depth)).fetchone():
            spans.append(_Span(thread, found[0], depth, found[1]))
            break
        spans.append(_Span(thread, 0, depth))
        thread, depth, _ = db.execute(THREAD, (thread,)).fetchone()
    return spans[::-1]


def _spans_before(db: sqlite3.Connection, place: _Place) -> list[_Span]:
    """The window that a turn began with."""
    earlier = "SELECT 1 FROM turn WHERE thread = ? AND depth < ? LIMIT 1"
    if db.execute(earlier, (place.thread, place.depth)).fetchone():
        return _spans(db, place.thread, place.depth - 1)
    parent, depth, _ = db.execute(THREAD, (place.thread,)).fetchone()
    return _spans(db, parent, depth)


def _window(db: sqlite3.Connection, place: _Place) -> Window:
    if place.status in ("failed", "cancelled"):
        return Window(place.status, [], 0)
    rows: list[tuple[int, bytes]] = []
    for span in _spans(db, place.thread, place.depth):
        rows += db.execute(ITEMS_IN["asc"], (*span, COMPACTION, -1))
    newest = len(rows)
    while newest and rows[newest - 1][0] >= place.seq * PLACES:
        newest -= 1
    return Window(place.status, [body for _, body in rows], newest)


class _Found(NamedTuple):
    """An item that has a given id."""

    seq: int
    thread: int
    depth: int
    owner: str
    deleted_at: int | None
    kind: int
    is_removed: int
    body: bytes


def _id_of(body: bytes) -> str:
    return str(orjson.loads(body)["id"])


def _found(db: sqlite3.Connection, item_ids: list[str]) -> dict[str, list[_Found]]:
    """All items with these ids: clients may send one id many times. Each response is read once."""
    found: dict[str, list[_Found]] = {item_id: [] for item_id in item_ids}
    for response_id in {response_of(item_id) for item_id in found}:
        for row in db.execute(BY_RESPONSE, (response_id,)):
            item = _Found(*row)
            found.get(_id_of(item.body), []).append(item)
    for item_id, items in found.items():
        known = {item.seq for item in items}
        indexed = (_Found(*row) for row in db.execute(BY_INDEX, (item_id,)))
        items += [item for item in indexed if item.seq not in known]
    return found


def _is_in(found: _Found, span: _Span) -> bool:
    at_place = span.thread == found.thread and span.low <= found.depth <= span.high
    return at_place and span.first <= found.seq <= span.last and found.is_removed <= span.with_removed


def _item_seq(db: sqlite3.Connection, spans: list[_Span], highest_kind: int, name: str, item_id: str) -> int:
    for found in _found(db, [item_id])[item_id]:
        if found.kind <= highest_kind and any(_is_in(found, span) for span in spans):
            return found.seq
    raise _no_cursor(name, item_id)


def _no_cursor(name: str, given: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{name}': {given[:100]!r} is not in this list.", param=name)


def _listed(page: Page, seq_of: Callable[[str, str], int], read: Callable[[int, int, str, int], list[T]]) -> Listed[T]:
    """A page of what `read(first, last, order, limit)` gives between two cursors."""
    first, last, is_rising = 0, LAST, page.order == "asc"
    if page.after:
        cursor = seq_of("after", page.after)
        first, last = (cursor + 1, last) if is_rising else (first, cursor - 1)
    if page.before:
        cursor = seq_of("before", page.before)
        first, last = (first, cursor - 1) if is_rising else (cursor + 1, last)
    is_backwards = bool(page.before and not page.after)
    rows = read(first, last, "asc" if is_rising != is_backwards else "desc", page.limit + 1)
    shown = rows[: page.limit]
    return Listed(shown[::-1] if is_backwards else shown, len(rows) > page.limit)


def _list_items(db: sqlite3.Connection, spans: list[_Span], page: Page, highest_kind: int) -> Listed[bytes]:
    def read(first: int, last: int, order: str, limit: int) -> list[bytes]:
        rows: list[bytes] = []
        for span in spans if order == "asc" else spans[::-1]:
            inside = span._replace(first=max(span.first, first), last=min(span.last, last))
            found = db.execute(ITEMS_IN[order], (*inside, highest_kind, limit - len(rows)))
            rows += [body for _, body in found]
            if len(rows) == limit:
                break
        return rows

    return _listed(page, partial(_item_seq, db, spans, highest_kind), read)


def _kept(db: sqlite3.Connection, row: tuple[Any, ...]) -> KeptResponse:
    seq, response_id, status, created_at, completed_at, previous_id, settings, body = row
    found = db.execute(OUTPUTS, (seq * PLACES + OUTPUTS_AT, seq * PLACES + PLACES - 1))
    outputs = [output for (output,) in found]
    return KeptResponse(response_id, status, created_at, completed_at, previous_id, settings, body, outputs)


def _place_of(db: sqlite3.Connection, owner: str, response_id: str) -> _Place | None:
    found = db.execute(TURN, (response_id, owner)).fetchone()
    return _Place(*found) if found else None


def _response(owner: str, response_id: str, db: sqlite3.Connection) -> KeptResponse | None:
    found = db.execute(RESPONSE + "AND turn.id = ?2", (owner, response_id)).fetchone()
    return _kept(db, found) if found else None


def _responses(owner: str, page: Page, model: str | None, db: sqlite3.Connection) -> Listed[KeptResponse]:
    of_model = "AND (?2 IS NULL OR settings.model = ?2) "

    def seq_of(name: str, given: str) -> int:
        if found := db.execute(RESPONSE + of_model + "AND turn.id = ?3", (owner, model, given)).fetchone():
            return int(found[0])
        raise _no_cursor(name, given)

    def read(first: int, last: int, order: str, limit: int) -> list[KeptResponse]:
        wanted = f"AND turn.id IS NOT NULL AND turn.seq BETWEEN ?3 AND ?4 ORDER BY turn.seq {order} LIMIT ?5"
        found = db.execute(RESPONSE + of_model + wanted, (owner, model, first, last, limit)).fetchall()
        return [_kept(db, row) for row in found]

    return _listed(page, seq_of, read)


def _response_window(owner: str, response_id: str, db: sqlite3.Connection) -> Window | None:
    place = _place_of(db, owner, response_id)
    return _window(db, place) if place else None


def _input_items(owner: str, response_id: str, page: Page, db: sqlite3.Connection) -> Listed[bytes] | None:
    place = _place_of(db, owner, response_id)
    if place is None:
        return None
    own = _Span(place.thread, place.depth, place.depth, 0, place.seq * PLACES + OUTPUTS_AT - 1, with_removed=1)
    return _list_items(db, [*_spans_before(db, place), own], page, LISTED)


def _living_items(owner: str, ids: list[str], db: sqlite3.Connection) -> dict[str, bytes]:
    return {
        item_id: item.body
        for item_id, items in _found(db, ids).items()
        for item in items
        if item.owner == owner and item.deleted_at is None
    }


def _thread_of(db: sqlite3.Connection, owner: str, conversation_id: str) -> int | None:
    found = db.execute(CONVERSATION, (conversation_id, owner)).fetchone()
    return found[0] if found else None


def _conversation(owner: str, conversation_id: str, db: sqlite3.Connection) -> Conversation | None:
    found = db.execute(CONVERSATION, (conversation_id, owner)).fetchone()
    return Conversation(*found[1:]) if found else None


def _conversation_window(owner: str, conversation_id: str, db: sqlite3.Connection) -> Window | None:
    thread = _thread_of(db, owner, conversation_id)
    if thread is None:
        return None
    newest = db.execute(NEWEST, (thread,)).fetchone()
    return _window(db, _Place(*newest)) if newest else Window("completed", [], 0)


def _conversation_items(owner: str, conversation_id: str, page: Page, db: sqlite3.Connection) -> Listed[bytes] | None:
    thread = _thread_of(db, owner, conversation_id)
    return None if thread is None else _list_items(db, [_Span(thread, 0, LAST)], page, COMPACTION)


def _item_in(db: sqlite3.Connection, thread: int | None, item_id: str) -> _Found | None:
    return next(
        (each for each in _found(db, [item_id])[item_id] if each.thread == thread and not each.is_removed), None
    )


def _conversation_item(owner: str, conversation_id: str, item_id: str, db: sqlite3.Connection) -> bytes | None:
    found = _item_in(db, _thread_of(db, owner, conversation_id), item_id)
    return found and found.body


def _first_use(owner: str, key: str, now: float, db: sqlite3.Connection) -> tuple[bytes, str] | None:
    query = """SELECT digest, response FROM first_use JOIN turn ON turn.id = response
        WHERE first_use.owner = ? AND key = ? AND until_at > ? AND turn.deleted_at IS NULL"""
    found: tuple[bytes, str] | None = db.execute(query, (owner, key, now)).fetchone()
    return found


def _problems(db: sqlite3.Connection) -> list[str]:
    return [text for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]


# -- writing -----------------------------------------------------------------------------------------------------------

INSERT_TURN = """INSERT INTO turn (id, owner, thread, depth, previous, settings, status, created_at, completed_at,
    in_conversation, compaction, body) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"""
# Closed to children, which fork then: a turn that has one in its thread, and the turns of a conversation.
PARENT = """SELECT turn.seq, turn.thread, turn.depth, turn.status, thread.is_conversation OR EXISTS
    (SELECT 1 FROM turn AS child WHERE child.thread = turn.thread AND child.depth = turn.depth + 1)
    FROM turn JOIN thread ON thread.seq = turn.thread
    WHERE turn.id = ? AND turn.owner = ? AND turn.deleted_at IS NULL"""
NEW_COMPACTION = f"""UPDATE turn SET compaction = (SELECT max(item.seq) - turn.seq * {PLACES} FROM item
    WHERE item.seq BETWEEN turn.seq * {PLACES} AND turn.seq * {PLACES} + {PLACES - 1}
    AND item.kind = {COMPACTION} AND NOT item.is_removed) WHERE seq = ?"""
RELEASE = "DELETE FROM lease WHERE name = ? AND holder = ?"
IS_HELD_AT = "SELECT 1 FROM lease WHERE name = ? AND until_at > ?"
LOCKED = "Another process is currently operating on this conversation. Please retry in a few seconds."


def _save(turn: NewTurn, db: sqlite3.Connection) -> None:
    thread, before = _place_for(turn, db)
    if turn.lock and not db.execute(RELEASE, (turn.lock.name, turn.lock.holder)).rowcount:
        raise ConversationLocked(LOCKED, param="conversation")
    if thread is None:
        thread = _new_thread(db, before and before.thread, before and before.depth)
    depth = before.depth + 1 if before else 0
    previous = before.seq if before and turn.previous_id else None
    in_conversation = bool(turn.conversation_id and not turn.is_detached)
    own = (turn.status, turn.created_at, turn.completed_at, in_conversation, _newest_compaction(turn), turn.body)
    row = (turn.id, turn.owner, thread, depth, previous, _settings_seq(turn, db), *own)
    seq = db.execute(INSERT_TURN, row).lastrowid or 0
    numbered = [*enumerate(turn.inputs, seq * PLACES), *enumerate(turn.outputs, seq * PLACES + OUTPUTS_AT)]
    _insert_items(db, numbered, turn.id)
    if first := turn.first_use:
        use = (turn.owner, first.key, first.digest, turn.id, first.until_at)
        db.execute("INSERT OR REPLACE INTO first_use VALUES (?,?,?,?,?)", use)


def _place_for(turn: NewTurn, db: sqlite3.Connection) -> tuple[int | None, _Place | None]:
    """The thread that a turn goes on, None for a new one, and the turn before it. Raises: NotFound."""
    if turn.conversation_id:
        thread = _thread_of(db, turn.owner, turn.conversation_id)
        if thread is None:
            raise NotFound(f"Conversation with id '{turn.conversation_id}' not found.")
        newest = db.execute(NEWEST, (thread,)).fetchone()
        return None if turn.is_detached else thread, _Place(*newest) if newest else None
    if not turn.previous_id:
        return None, None
    found = db.execute(PARENT, (turn.previous_id, turn.owner)).fetchone()
    if found is None:
        raise NotFound(f"Response with id '{turn.previous_id}' not found.")
    *place, is_closed = found
    parent = _Place(*place)
    return None if is_closed or turn.is_detached else parent.thread, parent


def _new_thread(db: sqlite3.Connection, parent: int | None, depth: int | None, is_conversation: bool = False) -> int:
    row = (parent, depth, is_conversation)
    inserted = db.execute("INSERT INTO thread (parent, parent_depth, is_conversation) VALUES (?,?,?)", row)
    return inserted.lastrowid or 0


def _settings_seq(turn: NewTurn, db: sqlite3.Connection) -> int:
    key = (turn.owner, blake2b(b"%b\0%b" % (turn.model.encode(), turn.settings), digest_size=16).digest())
    found = db.execute("SELECT seq FROM settings WHERE owner = ? AND digest = ?", key).fetchone()
    if found:
        return int(found[0])
    insert = "INSERT INTO settings (owner, digest, model, body) VALUES (?,?,?,?)"
    return db.execute(insert, (*key, turn.model, turn.settings)).lastrowid or 0


def _newest_compaction(turn: NewTurn) -> int | None:
    for start, items in ((OUTPUTS_AT, turn.outputs), (0, turn.inputs)):
        for place in reversed(range(len(items))):
            if items[place].is_compaction:
                return start + place
    return None


def _insert_items(db: sqlite3.Connection, numbered: list[tuple[int, NewItem]], response_id: str) -> None:
    rows = [(seq, _kind(item), item.body) for seq, item in numbered]
    db.executemany("INSERT INTO item VALUES (?,?,0,?)", rows)
    ids = [(item.id, seq) for seq, item in numbered if response_of(item.id) != response_id]
    if ids:
        db.executemany("INSERT INTO item_id VALUES (?,?)", ids)


def _kind(item: NewItem) -> int:
    return COMPACTION if item.is_compaction else LISTED if item.is_listed else UNLISTED


def _append(db: sqlite3.Connection, owner: str, thread: int, items: tuple[NewItem, ...], now: float) -> None:
    newest = db.execute(NEWEST, (thread,)).fetchone()
    depth = newest[2] + 1 if newest else 0
    compaction = next((place for place in reversed(range(len(items))) if items[place].is_compaction), None)
    row = (None, owner, thread, depth, None, None, "completed", int(now), None, True, compaction, b"")
    seq = db.execute(INSERT_TURN, row).lastrowid or 0
    _insert_items(db, list(enumerate(items, seq * PLACES)), "")


def _create_conversation(
    owner: str, conversation: Conversation, items: tuple[NewItem, ...], db: sqlite3.Connection
) -> None:
    thread = _new_thread(db, None, None, is_conversation=True)
    row = (conversation.id, owner, thread, conversation.created_at, conversation.metadata)
    db.execute("INSERT INTO conversation VALUES (?,?,?,?,?)", row)
    if items:
        _append(db, owner, thread, items, conversation.created_at)


def _update_conversation(
    owner: str, conversation_id: str, metadata: bytes, db: sqlite3.Connection
) -> Conversation | None:
    db.execute("UPDATE conversation SET metadata = ? WHERE id = ? AND owner = ?", (metadata, conversation_id, owner))
    return _conversation(owner, conversation_id, db)


def _refuse_locked(db: sqlite3.Connection, conversation_id: str, now: float) -> None:
    if db.execute(IS_HELD_AT, (conversation_lock(conversation_id, "").name, now)).fetchone():
        raise ConversationLocked(LOCKED, param="conversation")


def _add_items(
    owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float, db: sqlite3.Connection
) -> bool:
    thread = _thread_of(db, owner, conversation_id)
    if thread is None:
        return False
    _refuse_locked(db, conversation_id, now)
    _append(db, owner, thread, items, now)
    return True


def _delete_conversation_item(
    owner: str, conversation_id: str, item_id: str, now: float, db: sqlite3.Connection
) -> bool:
    found = _item_in(db, _thread_of(db, owner, conversation_id), item_id)
    if found is None:
        return False
    _refuse_locked(db, conversation_id, now)
    (response_id,) = db.execute("SELECT id FROM turn WHERE seq = ?", (found.seq // PLACES,)).fetchone()
    if response_id is not None:
        db.execute("UPDATE item SET is_removed = 1 WHERE seq = ?", (found.seq,))
    else:
        db.execute("DELETE FROM item_id WHERE id = ? AND item = ?", (item_id, found.seq))
        db.execute("DELETE FROM item WHERE seq = ?", (found.seq,))
    if found.kind == COMPACTION:
        db.execute(NEW_COMPACTION, (found.seq // PLACES,))
    return True


def _acquire(lock: Lock, now: float, until_at: float, db: sqlite3.Connection) -> bool:
    claim = """INSERT INTO lease VALUES (?1, ?2, ?3) ON CONFLICT (name) DO UPDATE SET holder = ?2, until_at = ?3
        WHERE holder = ?2 OR until_at <= ?4"""
    return db.execute(claim, (lock.name, lock.holder, until_at, now)).rowcount > 0


def _renew(lock: Lock, until_at: float, db: sqlite3.Connection) -> bool:
    renew = "UPDATE lease SET until_at = ? WHERE name = ? AND holder = ?"
    return db.execute(renew, (until_at, lock.name, lock.holder)).rowcount > 0


def _release(lock: Lock, db: sqlite3.Connection) -> None:
    db.execute(RELEASE, (lock.name, lock.holder))


def _secret(name: str, db: sqlite3.Connection) -> bytes:
    db.execute("INSERT OR IGNORE INTO secret VALUES (?, randomblob(32))", (name,))
    return bytes(db.execute("SELECT value FROM secret WHERE name = ?", (name,)).fetchone()[0])


# -- deleting ----------------------------------------------------------------------------------------------------------

# How many responses one transaction of a purge takes, so that no turn waits long for the writer.
PURGED_AT_ONCE = 100
VACUUMED_PAGES = 2000
DEPTH_NEEDED = """SELECT max(coalesce((SELECT max(depth) FROM turn WHERE thread = ?1 AND deleted_at IS NULL), -1),
    coalesce((SELECT max(parent_depth) FROM thread WHERE parent = ?1), -1))"""
# Turns in the order of their age; those of conversations and those that only descendants need are passed over.
OLD = """SELECT seq, thread, id IS NOT NULL AND deleted_at IS NULL AND NOT in_conversation FROM turn
    WHERE seq > ? AND created_at < ? ORDER BY seq LIMIT ?"""


def _delete_response(owner: str, response_id: str, now: float, db: sqlite3.Connection) -> bool:
    place = _place_of(db, owner, response_id)
    if place is None:
        return False
    _forget(db, [(place.seq, place.thread)], now)
    return True


def _delete_conversation(owner: str, conversation_id: str, now: float, db: sqlite3.Connection) -> bool:
    thread = _thread_of(db, owner, conversation_id)
    if thread is None:
        return False
    db.execute("DELETE FROM conversation WHERE id = ?", (conversation_id,))
    db.execute("UPDATE thread SET is_conversation = 0 WHERE seq = ?", (thread,))
    db.execute("UPDATE turn SET deleted_at = ? WHERE thread = ? AND id IS NULL", (int(now), thread))
    db.execute("UPDATE turn SET in_conversation = 0 WHERE thread = ?", (thread,))
    _prune(db, thread)
    return True


def _forget(db: sqlite3.Connection, turns: list[tuple[int, int]], now: float) -> None:
    """Makes responses unknown, and erases what nothing living stands on."""
    db.executemany("UPDATE turn SET deleted_at = ? WHERE seq = ?", [(int(now), seq) for seq, _ in turns])
    for thread in {thread for _, thread in turns}:
        _prune(db, thread)


def _prune(db: sqlite3.Connection, thread: int | None) -> None:
    """Erases the end of a thread that no living turn needs, and then perhaps of the thread it left."""
    while thread is not None:
        found = db.execute(THREAD, (thread,)).fetchone()
        if found is None or found[2]:
            return
        (needed,) = db.execute(DEPTH_NEEDED, (thread,)).fetchone()
        _erase(db, db.execute("SELECT seq FROM turn WHERE thread = ? AND depth > ?", (thread, needed)).fetchall())
        if db.execute("SELECT 1 FROM turn WHERE thread = ? LIMIT 1", (thread,)).fetchone():
            return
        db.execute("DELETE FROM thread WHERE seq = ?", (thread,))
        thread = found[0]


def _erase(db: sqlite3.Connection, turns: list[tuple[int]]) -> None:
    for (seq,) in turns:
        items = (seq * PLACES, seq * PLACES + PLACES - 1)
        bodies = db.execute("SELECT seq, body FROM item WHERE seq BETWEEN ? AND ?", items)
        ids = [(_id_of(body), item) for item, body in bodies]
        db.executemany("DELETE FROM item_id WHERE id = ? AND item = ?", ids)
        db.execute("DELETE FROM item WHERE seq BETWEEN ? AND ?", items)
        db.execute("DELETE FROM turn WHERE seq = ?", (seq,))


def _old(after: int, before_at: float, db: sqlite3.Connection) -> list[tuple[int, int, int]]:
    return db.execute(OLD, (after, before_at, PURGED_AT_ONCE)).fetchall()


def _sweep(now: float, db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM first_use WHERE until_at <= ?", (now,))
    db.execute("DELETE FROM lease WHERE until_at <= ?", (now,))
    db.execute("DELETE FROM settings WHERE seq NOT IN (SELECT settings FROM turn WHERE settings IS NOT NULL)")


def _vacuum_some(db: sqlite3.Connection) -> int:
    """Gives free pages at the end of the file back; the bytes that this saved."""
    (before,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA incremental_vacuum({VACUUMED_PAGES})").fetchall()
    (after,) = db.execute("PRAGMA page_count").fetchone()
    return int(before - after) * PAGE_BYTES


# -- the verbs ---------------------------------------------------------------------------------------------------------


class SQLiteStore:
    """The verbs of `verbs.Store` on SQLite."""

    def __init__(self, writer: Lane, reader: Lane) -> None:
        self._writer = writer
        self._reader = reader

    async def save(self, turn: NewTurn) -> None:
        await self._writer.do(partial(_save, turn))

    async def response(self, owner: str, response_id: str) -> KeptResponse | None:
        return await self._reader.do(partial(_response, owner, response_id))

    async def responses(self, owner: str, page: Page, model: str | None) -> Listed[KeptResponse]:
        return await self._reader.do(partial(_responses, owner, page, model))

    async def delete_response(self, owner: str, response_id: str, now: float) -> bool:
        return await self._writer.do(partial(_delete_response, owner, response_id, now))

    async def window(self, owner: str, response_id: str) -> Window | None:
        return await self._reader.do(partial(_response_window, owner, response_id))

    async def input_items(self, owner: str, response_id: str, page: Page) -> Listed[bytes] | None:
        return await self._reader.do(partial(_input_items, owner, response_id, page))

    async def items(self, owner: str, ids: list[str]) -> dict[str, bytes]:
        return await self._reader.do(partial(_living_items, owner, ids))

    async def create_conversation(self, owner: str, conversation: Conversation, items: tuple[NewItem, ...]) -> None:
        await self._writer.do(partial(_create_conversation, owner, conversation, items))

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        return await self._reader.do(partial(_conversation, owner, conversation_id))

    async def update_conversation(self, owner: str, conversation_id: str, metadata: bytes) -> Conversation | None:
        return await self._writer.do(partial(_update_conversation, owner, conversation_id, metadata))

    async def delete_conversation(self, owner: str, conversation_id: str, now: float) -> bool:
        return await self._writer.do(partial(_delete_conversation, owner, conversation_id, now))

    async def conversation_window(self, owner: str, conversation_id: str) -> Window | None:
        return await self._reader.do(partial(_conversation_window, owner, conversation_id))

    async def add_items(self, owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float) -> bool:
        return await self._writer.do(partial(_add_items, owner, conversation_id, items, now))

    async def conversation_items(self, owner: str, conversation_id: str, page: Page) -> Listed[bytes] | None:
        return await self._reader.do(partial(_conversation_items, owner, conversation_id, page))

    async def conversation_item(self, owner: str, conversation_id: str, item_id: str) -> bytes | None:
        return await self._reader.do(partial(_conversation_item, owner, conversation_id, item_id))

    async def delete_conversation_item(self, owner: str, conversation_id: str, item_id: str, now: float) -> bool:
        return await self._writer.do(partial(_delete_conversation_item, owner, conversation_id, item_id, now))

    async def acquire(self, lock: Lock, now: float, until_at: float) -> bool:
        return await self._writer.do(partial(_acquire, lock, now, until_at))

    async def renew(self, lock: Lock, until_at: float) -> bool:
        return await self._writer.do(partial(_renew, lock, until_at))

    async def release(self, lock: Lock) -> None:
        await self._writer.do(partial(_release, lock))

    async def first_use(self, owner: str, key: str, now: float) -> tuple[bytes, str] | None:
        return await self._reader.do(partial(_first_use, owner, key, now))

    async def secret(self, name: str) -> bytes:
        return await self._writer.do(partial(_secret, name))

    async def purge(self, before_at: float, now: float) -> Purged:
        responses = freed_bytes = after = 0
        while turns := await self._reader.do(partial(_old, after, before_at)):
            old = [(seq, thread) for seq, thread, is_old in turns if is_old]
            if old:
                await self._writer.do(partial(_forget, turns=old, now=now))
            responses, after = responses + len(old), turns[-1][0]
        await self._writer.do(partial(_sweep, now))
        while freed := await self._writer.do(_vacuum_some):
            freed_bytes += freed
        return Purged(responses, freed_bytes)

    async def problems(self) -> list[str]:
        return await self._reader.do(_problems)

    async def close(self) -> None:
        if self._reader is not self._writer:
            await self._reader.close()
        await self._writer.close()
