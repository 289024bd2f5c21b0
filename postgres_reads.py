"""What the store on PostgreSQL is asked: windows of chains and conversations, pages of lists, and items by their ids.

May not write, nor know what an item means. Items of a window are in the order of depth and place: depth goes on from
the parent thread's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, TypeVar

from errors import InvalidRequest
from postgres_pool import Asked, Row, Statement
from postgres_tables import HEAD, LISTED_TURN, TABLES
from reads import COMPACTION, EMPTY, LAST, LISTED
from schema import OUTPUTS_AT, PLACES
from verbs import Conversation, KeptResponse, Listed, NewItem, Page, Window, response_of

T = TypeVar("T")

# Depth and place of an item.
Position = tuple[int, int]
START: Position = (0, 0)
END: Position = (LAST, PLACES)


class _Span(NamedTuple):
    """Some turns of a thread, the first and last item of interest in them, and whether removed items count."""

    thread: int
    low: int
    high: int
    first: Position = START
    last: Position = END
    with_removed: bool = False


class _Kept(NamedTuple):
    """An item that has a given id."""

    turn: int
    place: int
    thread: int
    depth: int
    owner: str
    kind: int
    is_removed: bool
    is_living: bool
    is_of_response: bool
    id: str
    body: bytes


OWN = "turn.id = :id AND turn.owner = :owner AND turn.deleted_at IS NULL"
LASTING = "turn.lives_until IS NULL"
# The turn before `place`, or above that: the thread it is in, and a depth. A parent is known by its depth: else all
# forks might be read, while there seem to be none.
END_BEFORE = """SELECT place.thread, place.depth - 1 AS depth FROM place
        WHERE EXISTS (SELECT FROM turn WHERE turn.thread = place.thread AND turn.depth < place.depth)
    UNION ALL SELECT thread.parent, thread.parent_depth FROM place JOIN thread ON thread.seq = place.thread
        WHERE thread.parent_depth IS NOT NULL
        AND NOT EXISTS (SELECT FROM turn WHERE turn.thread = place.thread AND turn.depth < place.depth)"""
NEWEST_COMPACTION = """LEFT JOIN LATERAL (SELECT turn.depth, turn.compaction FROM turn WHERE turn.thread = {thread}
    AND turn.depth <= {depth} AND turn.compaction IS NOT NULL ORDER BY turn.depth DESC LIMIT 1) AS fold ON true"""
# The spans of the window that ends at `start`, newest first. The one with the newest compaction item has `low`.
LINE = f"""line (thread, low, high, place) AS (
    SELECT start.thread, fold.depth, start.depth, fold.compaction FROM start
        {NEWEST_COMPACTION.format(thread="start.thread", depth="start.depth")}
    UNION ALL SELECT thread.parent, fold.depth, thread.parent_depth, fold.compaction
        FROM line JOIN thread ON thread.seq = line.thread AND thread.parent_depth IS NOT NULL
        {NEWEST_COMPACTION.format(thread="thread.parent", depth="thread.parent_depth")}
        WHERE line.low IS NULL)"""
# First what is told of the turn `newest`, then the items: as one array they take twice as long. No row: no such name.
WINDOW = f"""WITH RECURSIVE place AS ({{place}}), newest AS ({{newest}}),
    start AS (SELECT thread, depth FROM newest WHERE status IN ('completed', 'incomplete')), {LINE},
    given AS (SELECT -1 AS depth, told.place, told.body, NULL AS is_earlier
        FROM place LEFT JOIN newest ON true LEFT JOIN settings ON settings.digest = newest.settings
        CROSS JOIN LATERAL (VALUES (0, convert_to(newest.status, 'UTF8')), (1, newest.body), (2, settings.body),
            (3, newest.ahead)) AS told (place, body)
        UNION ALL SELECT turn.depth, item.place, item.body, turn.seq <> (SELECT seq FROM newest)
        FROM line JOIN turn ON turn.thread = line.thread AND turn.depth BETWEEN coalesce(line.low, 0) AND line.high
        JOIN item ON item.turn = turn.seq WHERE NOT item.is_removed AND item.kind <= {COMPACTION}
        AND (line.low IS NULL OR turn.depth > line.low OR item.place >= line.place))
    SELECT body, is_earlier FROM given ORDER BY depth, place"""
TOLD = 4
OF_PLACE = "SELECT turn.* FROM turn JOIN place USING (seq)"
NEWEST_OF = """SELECT turn.* FROM {start} CROSS JOIN LATERAL (SELECT * FROM turn WHERE turn.thread = start.thread
    AND turn.depth <= start.depth ORDER BY turn.depth DESC LIMIT 1) AS turn"""
RESPONSE_WINDOW = Statement(WINDOW.format(place=f"SELECT seq FROM turn WHERE {OWN} AND {LASTING}", newest=OF_PLACE))
WINDOW_BEFORE = Statement(
    WINDOW.format(
        place=f"SELECT thread, depth FROM turn WHERE {OWN}", newest=NEWEST_OF.format(start=f"({END_BEFORE}) AS start")
    )
)
CONVERSATION_WINDOW = Statement(
    WINDOW.format(
        place=f"SELECT thread, {LAST} AS depth FROM conversation WHERE id = :id AND owner = :owner",
        newest=NEWEST_OF.format(start="place AS start"),
    )
)
SPANS_BEFORE = Statement(
    f"""WITH RECURSIVE place AS (SELECT :thread::bigint AS thread, :depth::bigint AS depth), start AS ({END_BEFORE}),
    {LINE} SELECT thread, low, high, place FROM line ORDER BY high"""
)
PLACE = Statement(f"SELECT thread, depth FROM turn WHERE {OWN}")
ITEMS = """SELECT item.body FROM turn JOIN item ON item.turn = turn.seq
    WHERE turn.thread = :thread AND turn.depth BETWEEN :low AND :high
    AND (turn.depth, item.place) >= (:first_depth::bigint, :first_place::integer)
    AND (turn.depth, item.place) <= (:last_depth::bigint, :last_place::integer)
    AND (:with_removed OR NOT item.is_removed) AND item.kind <= :kind
    ORDER BY turn.depth {order}, item.place {order} LIMIT :at_most"""
ITEMS_IN = {order: Statement(ITEMS.format(order=order)) for order in ("asc", "desc")}
ITEMS_WITH = Statement(
    f"""SELECT item.turn, item.place, turn.thread, turn.depth, turn.owner, item.kind, item.is_removed,
        (turn.deleted_at IS NULL AND turn.lives_until IS NULL) OR (thread.is_conversation AND NOT item.is_removed)
            AS is_living,
        turn.id IS NOT NULL AS is_of_response, item.id, item.body
    FROM (SELECT turn, place FROM item WHERE id = ANY(:ids) AND is_foreign
        AND {HEAD.format("id")} = ANY(ARRAY(SELECT {HEAD.format("given")} FROM unnest(:ids::text[]) AS given))
        UNION ALL SELECT item.turn, item.place FROM turn JOIN item ON item.turn = turn.seq
        WHERE turn.id = ANY(:responses) AND item.id = ANY(:ids) AND NOT item.is_foreign) AS found
    JOIN item ON item.turn = found.turn AND item.place = found.place
    JOIN turn ON turn.seq = found.turn JOIN thread ON thread.seq = turn.thread
    WHERE :thread::bigint IS NULL OR turn.thread = :thread::bigint ORDER BY item.turn, item.place"""
)
RESPONSE = f"""SELECT turn.seq, turn.id, turn.status, turn.created_at, turn.completed_at, previous.id AS previous_id,
    settings.body AS settings, turn.body,
    (SELECT array_agg(item.body ORDER BY item.place) FROM item
        WHERE item.turn = turn.seq AND item.place >= {OUTPUTS_AT}) AS outputs
    FROM turn JOIN settings ON settings.digest = turn.settings
    LEFT JOIN turn AS previous ON previous.seq = turn.previous"""
ONE_RESPONSE = Statement(f"{RESPONSE} WHERE {OWN}")
OF_MODEL = f"{LASTING} AND (:model::text IS NULL OR settings.model = :model::text)"
LISTED_RESPONSE = Statement(f"{RESPONSE} WHERE {OWN} AND {OF_MODEL}")
RESPONSES = f"""{RESPONSE} WHERE turn.owner = :owner AND {LISTED_TURN} AND {OF_MODEL}
    AND turn.seq BETWEEN :first AND :last ORDER BY turn.seq {{order}} LIMIT :at_most"""
RESPONSES_IN = {order: Statement(RESPONSES.format(order=order)) for order in ("asc", "desc")}
CONVERSATION = Statement("SELECT thread, id, created_at, metadata FROM conversation WHERE id = :id AND owner = :owner")
FIRST_USE = Statement(
    """SELECT digest, response FROM first_use JOIN turn ON turn.id = response
    WHERE first_use.owner = :owner AND key = :key AND until_at > :now::double precision AND turn.deleted_at IS NULL"""
)
SIZE = Statement("SELECT sum(pg_total_relation_size(t::regclass))::bigint AS bytes FROM unnest(:tables::text[]) AS t")
# What no statement may leave behind, and no constraint can refuse.
PROBLEMS = Statement(
    """SELECT 'thread ' || thread.seq || ' does not end with its newest turn' AS problem FROM thread
        WHERE tip <> coalesce((SELECT max(depth) FROM turn WHERE turn.thread = thread.seq), -1)
    UNION ALL SELECT 'turn ' || seq || ' is in no thread' FROM turn
        WHERE NOT EXISTS (SELECT FROM thread WHERE thread.seq = turn.thread)
    UNION ALL SELECT 'run ' || seq || ' has no turn' FROM run WHERE turn IS NULL AND NOT is_stopped
    UNION ALL SELECT 'run ' || seq || ' stands in no queue' FROM run
        WHERE NOT EXISTS (SELECT FROM queue WHERE queue.owner = run.owner)"""
)

# -- windows -----------------------------------------------------------------------------------------------------------


async def window(db: Asked, statement: Statement, owner: str, name: str) -> Window | None:
    """None for an unknown name. In one statement, so on one state of the database."""
    rows = await db.rows(statement, {"owner": owner, "id": name})
    if not rows:
        return None
    status, body, settings, ahead = (row["body"] for row in rows[:TOLD])
    if status is None:
        return EMPTY
    items = rows[TOLD:]
    earlier = [row["is_earlier"] for row in items].count(True)
    return Window(status.decode(), [row["body"] for row in items], earlier, body, settings or b"", ahead)


async def _spans_before(db: Asked, thread: int, depth: int) -> list[_Span]:
    """The window that a turn began with, oldest first."""
    rows = await db.rows(SPANS_BEFORE, {"thread": thread, "depth": depth})
    return [_span(row) for row in rows]


def _span(row: Row) -> _Span:
    if row["low"] is None:
        return _Span(row["thread"], 0, row["high"])
    return _Span(row["thread"], row["low"], row["high"], (row["low"], row["place"]))


# -- items by their ids ------------------------------------------------------------------------------------------------


async def items_with(db: Asked, ids: list[str], thread: int | None = None) -> list[_Kept]:
    """All items with these ids, of one thread or of all, the oldest first."""
    known = [item_id for item_id in set(ids) if "\0" not in item_id]
    values = {"ids": known, "responses": [response_of(item_id) for item_id in known], "thread": thread}
    return [_Kept(*row.values()) for row in await db.rows(ITEMS_WITH, values)]


async def living_items(db: Asked, owner: str, ids: list[str]) -> dict[str, bytes]:
    return {item.id: item.body for item in await items_with(db, ids) if item.owner == owner and item.is_living}


async def item_in(db: Asked, thread: int, item_id: str) -> _Kept | None:
    return next((item for item in await items_with(db, [item_id], thread) if not item.is_removed), None)


# -- pages -------------------------------------------------------------------------------------------------------------


def _is_in(found: _Kept, span: _Span) -> bool:
    at_place = span.thread == found.thread and span.low <= found.depth <= span.high
    return at_place and span.first <= (found.depth, found.place) <= span.last and found.is_removed <= span.with_removed


def _no_cursor(name: str, given: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{name}': {given[:100]!r} is not in this list.", param=name)


Find = Callable[[str, str], Awaitable[Position]]
Read = Callable[[Position, Position, str, int], Awaitable[list[T]]]


async def _listed(page: Page, find: Find, read: Read[T]) -> Listed[T]:
    """A page of what `read(first, last, order, limit)` gives between two cursors."""
    first, last, is_rising = START, END, page.order == "asc"
    if page.after:
        depth, place = await find("after", page.after)
        first, last = ((depth, place + 1), last) if is_rising else (first, (depth, place - 1))
    if page.before:
        depth, place = await find("before", page.before)
        first, last = (first, (depth, place - 1)) if is_rising else ((depth, place + 1), last)
    is_backwards = bool(page.before and not page.after)
    rows = await read(first, last, "asc" if is_rising != is_backwards else "desc", page.limit + 1)
    shown = rows[: page.limit]
    return Listed(shown[::-1] if is_backwards else shown, len(rows) > page.limit)


async def _find_item(db: Asked, spans: list[_Span], highest_kind: int, name: str, item_id: str) -> Position:
    for found in await items_with(db, [item_id]):
        if found.kind <= highest_kind and any(_is_in(found, span) for span in spans):
            return found.depth, found.place
    raise _no_cursor(name, item_id)


async def _list_items(db: Asked, spans: list[_Span], page: Page, highest_kind: int) -> Listed[bytes]:
    async def read(first: Position, last: Position, order: str, limit: int) -> list[bytes]:
        rows: list[bytes] = []
        for span in spans if order == "asc" else spans[::-1]:
            inside = span._replace(first=max(span.first, first), last=min(span.last, last))
            values = {**_bounds(inside), "kind": highest_kind, "at_most": limit - len(rows)}
            rows += [row["body"] for row in await db.rows(ITEMS_IN[order], values)]
            if len(rows) == limit:
                break
        return rows

    return await _listed(page, partial(_find_item, db, spans, highest_kind), read)


def _bounds(span: _Span) -> dict[str, int]:
    (first_depth, first_place), (last_depth, last_place) = span.first, span.last
    ends = {"first_depth": first_depth, "first_place": first_place, "last_depth": last_depth, "last_place": last_place}
    return {"thread": span.thread, "low": span.low, "high": span.high, "with_removed": span.with_removed, **ends}


async def input_items(db: Asked, owner: str, response_id: str, page: Page) -> Listed[bytes] | None:
    place = await db.row(PLACE, {"owner": owner, "id": response_id})
    if place is None:
        return None
    thread, depth = place["thread"], place["depth"]
    own = _Span(thread, depth, depth, (depth, 0), (depth, OUTPUTS_AT - 1), with_removed=True)
    return await _list_items(db, [*await _spans_before(db, thread, depth), own], page, LISTED)


async def conversation_items(db: Asked, owner: str, conversation_id: str, page: Page) -> Listed[bytes] | None:
    thread = await thread_of(db, owner, conversation_id)
    return None if thread is None else await _list_items(db, [_Span(thread, 0, LAST)], page, COMPACTION)


async def responses(db: Asked, owner: str, page: Page, model: str | None) -> Listed[KeptResponse]:
    of_model = {"owner": owner, "model": model}

    async def find(name: str, given: str) -> Position:
        if found := await db.row(LISTED_RESPONSE, {**of_model, "id": given}):
            return found["seq"], 0
        raise _no_cursor(name, given)

    async def read(first: Position, last: Position, order: str, limit: int) -> list[KeptResponse]:
        ends = {"first": first[0] + (first[1] > 0), "last": last[0] - (last[1] < 0), "at_most": limit}
        return [_kept(row) for row in await db.rows(RESPONSES_IN[order], {**of_model, **ends})]

    return await _listed(page, find, read)


# -- single rows -------------------------------------------------------------------------------------------------------


def _kept(row: Row) -> KeptResponse:
    times = (row["created_at"], row["completed_at"])
    outputs = row["outputs"] or []
    return KeptResponse(row["id"], row["status"], *times, row["previous_id"], row["settings"], row["body"], outputs)


async def response(db: Asked, owner: str, response_id: str) -> KeptResponse | None:
    row = await db.row(ONE_RESPONSE, {"owner": owner, "id": response_id})
    return _kept(row) if row else None


async def thread_of(db: Asked, owner: str, conversation_id: str) -> int | None:
    row = await db.row(CONVERSATION, {"owner": owner, "id": conversation_id})
    return row["thread"] if row else None


async def conversation(db: Asked, owner: str, conversation_id: str) -> Conversation | None:
    row = await db.row(CONVERSATION, {"owner": owner, "id": conversation_id})
    return Conversation(row["id"], row["created_at"], row["metadata"]) if row else None


IS_KEPT = Statement("SELECT 1 FROM turn WHERE id = :id AND owner = :owner")


async def is_kept(db: Asked, owner: str, response_id: str) -> bool:
    """Whether the response was ever put here by this owner."""
    return bool(await db.rows(IS_KEPT, {"owner": owner, "id": response_id}))


async def is_conversation(db: Asked, owner: str, conversation_id: str) -> bool:
    return await thread_of(db, owner, conversation_id) is not None


async def holds(db: Asked, owner: str, conversation_id: str, items: tuple[NewItem, ...]) -> bool:
    """Whether all these items are in the conversation."""
    thread = await thread_of(db, owner, conversation_id)
    found = [] if thread is None else await items_with(db, [item.id for item in items], thread)
    return {item.id for item in items} <= {item.id for item in found if not item.is_removed}


async def conversation_item(db: Asked, owner: str, conversation_id: str, item_id: str) -> bytes | None:
    thread = await thread_of(db, owner, conversation_id)
    found = None if thread is None else await item_in(db, thread, item_id)
    return found and found.body


async def first_use(db: Asked, owner: str, key: str, now: float) -> tuple[bytes, str] | None:
    row = await db.row(FIRST_USE, {"owner": owner, "key": key, "now": now})
    return (row["digest"], row["response"]) if row else None


async def size_bytes(db: Asked) -> int:
    """Of the tables and their indexes."""
    row = await db.row(SIZE, {"tables": TABLES})
    return int(row["bytes"]) if row else 0


async def problems(db: Asked) -> list[str]:
    return [row["problem"] for row in await db.rows(PROBLEMS, {})]
