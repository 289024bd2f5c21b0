"""What the store is asked, in SQL: windows of chains and conversations, pages of lists, and items by their ids.

May not write, nor know what an item means.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import orjson

from errors import InvalidRequest
from schema import OUTPUTS_AT, PLACES
from verbs import CONTINUED, Conversation, KeptResponse, Listed, Page, Window, response_of

T = TypeVar("T")

LAST = (1 << 63) - 1
EMPTY = Window("completed", [], 0)
# Kinds of items.
LISTED, UNLISTED, COMPACTION, HIDDEN = 0, 1, 2, 3


class _Span(NamedTuple):
    """Some turns of a thread, the first and last item of interest in them, and whether removed items count."""

    thread: int
    low: int
    high: int
    first: int = 0
    last: int = LAST
    with_removed: int = 0


class Place(NamedTuple):
    """A turn of a thread."""

    seq: int
    thread: int
    depth: int
    status: str = "completed"


TURN = "SELECT seq, thread, depth, status FROM turn WHERE id = ? AND owner = ? AND deleted_at IS NULL"
LASTING = "turn.lives_until IS NULL"
NEWEST = "SELECT seq, thread, depth, status FROM turn WHERE thread = ? ORDER BY depth DESC LIMIT 1"
AT_OR_ABOVE = """SELECT seq, thread, depth, status FROM turn WHERE thread = ? AND depth <= ?
    ORDER BY depth DESC LIMIT 1"""
NEWEST_COMPACTION = f"""SELECT depth, seq * {PLACES} + compaction FROM turn
    WHERE thread = ? AND depth <= ? AND compaction IS NOT NULL ORDER BY depth DESC LIMIT 1"""
# What a window tells of its newest turn.
TOLD = """SELECT turn.body, coalesce(settings.body, x''), turn.ahead FROM turn
    LEFT JOIN settings ON settings.seq = turn.settings WHERE turn.seq = ?"""
THREAD = "SELECT parent, parent_depth, is_conversation FROM thread WHERE seq = ?"
# Items of a span in the order of the chain; no sorting, because seq grows with depth, and from parent to child thread.
ITEMS = f"""SELECT item.seq, item.body FROM turn CROSS JOIN item
    ON item.seq BETWEEN max(turn.seq * {PLACES}, ?4) AND min(turn.seq * {PLACES} + {PLACES - 1}, ?5)
    WHERE turn.thread = ?1 AND turn.depth BETWEEN ?2 AND ?3 AND item.is_removed <= ?6 AND item.kind <= ?7
    ORDER BY turn.depth {{order}}, item.seq {{order}} LIMIT ?8"""
ITEMS_IN = {"asc": ITEMS.format(order="ASC"), "desc": ITEMS.format(order="DESC")}
OUTPUTS = "SELECT body FROM item WHERE seq BETWEEN ? AND ? ORDER BY seq"
OF_ITEM = """SELECT item.seq, turn.thread, turn.depth, turn.owner, item.kind, item.is_removed,
    (turn.deleted_at IS NULL AND turn.lives_until IS NULL) OR (thread.is_conversation AND NOT item.is_removed),
    item.body FROM"""
OF_TURN = "JOIN thread ON thread.seq = turn.thread"
BY_INDEX = f"""{OF_ITEM} item_id JOIN item ON item.seq = item_id.item
    JOIN turn ON turn.seq = item_id.item / {PLACES} {OF_TURN} WHERE item_id.id = ?"""
# With an id as JSON has it, so that the items of a large response need not all be parsed; NULL: all of them.
BY_RESPONSE = f"""{OF_ITEM} turn {OF_TURN} CROSS JOIN item
    ON item.seq BETWEEN turn.seq * {PLACES} AND turn.seq * {PLACES} + {PLACES - 1}
    WHERE turn.id = ?1 AND (?2 IS NULL OR instr(item.body, ?2))"""
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


def _spans_before(db: sqlite3.Connection, place: Place) -> list[_Span]:
    """The window that a turn began with."""
    return _spans(db, *_end_before(db, place))


def _end_before(db: sqlite3.Connection, place: Place) -> tuple[int | None, int]:
    """The thread of the turn before this one, None where there is none, and a depth that is its own or above it."""
    earlier = "SELECT 1 FROM turn WHERE thread = ? AND depth < ? LIMIT 1"
    if db.execute(earlier, (place.thread, place.depth)).fetchone():
        return place.thread, place.depth - 1
    parent, depth, _ = db.execute(THREAD, (place.thread,)).fetchone()
    return parent, depth


def _window(db: sqlite3.Connection, place: Place) -> Window:
    told = db.execute(TOLD, (place.seq,)).fetchone()
    if place.status not in CONTINUED:
        return Window(place.status, [], 0, *told)
    rows: list[tuple[int, bytes]] = []
    for span in _spans(db, place.thread, place.depth):
        rows += db.execute(ITEMS_IN["asc"], (*span, COMPACTION, -1))
    newest = len(rows)
    while newest and rows[newest - 1][0] >= place.seq * PLACES:
        newest -= 1
    return Window(place.status, [body for _, body in rows], newest, *told)


class _Kept(NamedTuple):
    """An item that has a given id."""

    seq: int
    thread: int
    depth: int
    owner: str
    kind: int
    is_removed: int
    is_living: int
    body: bytes


def id_of(body: bytes) -> str:
    return str(orjson.loads(body)["id"])


def items_with(db: sqlite3.Connection, item_ids: list[str]) -> dict[str, list[_Kept]]:
    """All items with these ids: clients may send one id many times. Each response is read once."""
    found: dict[str, list[_Kept]] = {item_id: [] for item_id in item_ids}
    for response_id in {response_of(item_id) for item_id in found}:
        only = orjson.dumps(item_ids[0]) if len(item_ids) == 1 else None
        for row in db.execute(BY_RESPONSE, (response_id, only)):
            item = _Kept(*row)
            found.get(id_of(item.body), []).append(item)
    for item_id, items in found.items():
        known = {item.seq for item in items}
        indexed = (_Kept(*row) for row in db.execute(BY_INDEX, (item_id,)))
        items += [item for item in indexed if item.seq not in known]
    return found


def _is_in(found: _Kept, span: _Span) -> bool:
    at_place = span.thread == found.thread and span.low <= found.depth <= span.high
    return at_place and span.first <= found.seq <= span.last and found.is_removed <= span.with_removed


def _item_seq(db: sqlite3.Connection, spans: list[_Span], highest_kind: int, name: str, item_id: str) -> int:
    for found in items_with(db, [item_id])[item_id]:
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


def place_of(db: sqlite3.Connection, owner: str, response_id: str) -> Place | None:
    found = db.execute(TURN, (response_id, owner)).fetchone()
    return Place(*found) if found else None


def response(owner: str, response_id: str, db: sqlite3.Connection) -> KeptResponse | None:
    found = db.execute(RESPONSE + "AND turn.id = ?2", (owner, response_id)).fetchone()
    return _kept(db, found) if found else None


def responses(owner: str, page: Page, model: str | None, db: sqlite3.Connection) -> Listed[KeptResponse]:
    of_model = f"AND {LASTING} AND (?2 IS NULL OR settings.model = ?2) "

    def seq_of(name: str, given: str) -> int:
        if found := db.execute(RESPONSE + of_model + "AND turn.id = ?3", (owner, model, given)).fetchone():
            return int(found[0])
        raise _no_cursor(name, given)

    def read(first: int, last: int, order: str, limit: int) -> list[KeptResponse]:
        wanted = f"AND turn.id IS NOT NULL AND turn.seq BETWEEN ?3 AND ?4 ORDER BY turn.seq {order} LIMIT ?5"
        found = db.execute(RESPONSE + of_model + wanted, (owner, model, first, last, limit)).fetchall()
        return [_kept(db, row) for row in found]

    return _listed(page, seq_of, read)


def response_window(owner: str, response_id: str, db: sqlite3.Connection) -> Window | None:
    found = db.execute(f"{TURN} AND {LASTING}", (response_id, owner)).fetchone()
    return _window(db, Place(*found)) if found else None


def window_before(owner: str, response_id: str, db: sqlite3.Connection) -> Window | None:
    place = place_of(db, owner, response_id)
    if place is None:
        return None
    before = db.execute(AT_OR_ABOVE, _end_before(db, place)).fetchone()
    return _window(db, Place(*before)) if before else EMPTY


def input_items(owner: str, response_id: str, page: Page, db: sqlite3.Connection) -> Listed[bytes] | None:
    place = place_of(db, owner, response_id)
    if place is None:
        return None
    own = _Span(place.thread, place.depth, place.depth, 0, place.seq * PLACES + OUTPUTS_AT - 1, with_removed=1)
    return _list_items(db, [*_spans_before(db, place), own], page, LISTED)


def living_items(owner: str, ids: list[str], db: sqlite3.Connection) -> dict[str, bytes]:
    return {
        item_id: item.body
        for item_id, items in items_with(db, ids).items()
        for item in sorted(items)
        if item.owner == owner and item.is_living
    }


def thread_of(db: sqlite3.Connection, owner: str, conversation_id: str) -> int | None:
    found = db.execute(CONVERSATION, (conversation_id, owner)).fetchone()
    return found[0] if found else None


def conversation(owner: str, conversation_id: str, db: sqlite3.Connection) -> Conversation | None:
    found = db.execute(CONVERSATION, (conversation_id, owner)).fetchone()
    return Conversation(*found[1:]) if found else None


def conversation_window(owner: str, conversation_id: str, db: sqlite3.Connection) -> Window | None:
    thread = thread_of(db, owner, conversation_id)
    if thread is None:
        return None
    newest = db.execute(NEWEST, (thread,)).fetchone()
    return _window(db, Place(*newest)) if newest else EMPTY


def conversation_items(owner: str, conversation_id: str, page: Page, db: sqlite3.Connection) -> Listed[bytes] | None:
    thread = thread_of(db, owner, conversation_id)
    return None if thread is None else _list_items(db, [_Span(thread, 0, LAST)], page, COMPACTION)


def item_in(db: sqlite3.Connection, thread: int | None, item_id: str) -> _Kept | None:
    return next(
        (each for each in items_with(db, [item_id])[item_id] if each.thread == thread and not each.is_removed), None
    )


def conversation_item(owner: str, conversation_id: str, item_id: str, db: sqlite3.Connection) -> bytes | None:
    found = item_in(db, thread_of(db, owner, conversation_id), item_id)
    return found and found.body


def first_use(owner: str, key: str, now: float, db: sqlite3.Connection) -> tuple[bytes, str] | None:
    query = """SELECT digest, response FROM first_use JOIN turn ON turn.id = response
        WHERE first_use.owner = ? AND key = ? AND until_at > ? AND turn.deleted_at IS NULL"""
    found: tuple[bytes, str] | None = db.execute(query, (owner, key, now)).fetchone()
    return found


def size_bytes(db: sqlite3.Connection) -> int:
    """Of the file, without its journal."""
    (found,) = db.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()
    return int(found)


def problems(db: sqlite3.Connection) -> list[str]:
    return [text for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
