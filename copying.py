"""A store that is copied into another one: what in which order, how far it is, and whether both are the same.

May not know SQL. A row is a tuple with the columns of `TABLES`; both stores read and write such rows. Turns, threads
and runs are named by their numbers, settings by `writes.settings_key`, times are Unix seconds, bodies JSON in bytes.
Pages come in the order of a key, and a page is written together with how far it leads: who begins
again goes on behind it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import msgspec

from errors import StoreError, UnfinishedCopy
from verbs import Store

# Table -> its columns, in the order of the copy: what is referred to comes before what refers to it.
TABLES: dict[str, tuple[str, ...]] = {
    "secret": ("name", "value"),
    "learned": ("name", "value"),
    "settings": ("key", "owner", "digest", "model", "body"),
    "thread": ("seq", "parent", "parent_depth", "tip", "is_conversation"),
    "turn": (
        *("seq", "id", "owner", "thread", "depth", "previous", "settings", "status", "created_at", "completed_at"),
        *("deleted_at", "ages_from", "lives_until", "compaction", "body", "ahead"),
    ),
    "item": ("turn", "place", "kind", "is_removed", "is_foreign", "id", "body"),
    "conversation": ("id", "owner", "thread", "created_at", "metadata"),
    "first_use": ("owner", "key", "digest", "response", "until_at"),
    "run": (
        *("seq", "turn", "owner", "conversation", "request", "bearer", "admitted_at", "waits_for", "holder"),
        *("until_at", "generation", "attempts", "next_number", "is_stopped"),
    ),
    "queue": ("owner", "served"),
    "log": ("run", "turn", "until_at"),
    "event": ("run", "first", "body"),
}
# Table -> why it stays behind.
LEFT_BEHIND = {
    "lease": "a right of a process that works on the store; nobody does while it is copied",
    "account": "what an owner has used is there again after a minute",
    "flight": "requests of processes; in a database it is a part of the account",
}
# Where rows name a turn.
TURNS = {"turn": ("seq", "previous"), "item": ("turn",), "run": ("turn",), "log": ("turn",)}
PAGE_ROWS, PAGE_BYTES = 1000, 8_000_000
DIGEST_BYTES = 16
SOURCE = "source"

Row = tuple[Any, ...]
Tell = Callable[[str], None]


class Slice(NamedTuple):
    """Some rows, and the key of the last one."""

    rows: list[Row]
    last: list[Any]


class Progress(msgspec.Struct, frozen=True):
    """How far a table is copied: up to the row with that key."""

    after: list[Any] | None = None
    rows: int = 0
    is_whole: bool = False


class Displaced(NamedTuple):
    """A turn that was made before the one that it stands behind in its thread: the latest of those."""

    turn: int
    behind: int


class Compared(NamedTuple):
    """A table of both stores: rows here and there, and whether they are the same ones."""

    table: str
    source_rows: int
    target_rows: int
    is_same: bool


class Side(Protocol):
    """One of the two stores. It is nobody else's as long as it is open."""

    what: str
    kind: str
    # Whether turns have to rise along each thread, and whether texts may hold NUL.
    needs_rising: bool
    takes_nul: bool

    async def refuse_use(self, now: float) -> None:
        """Raises: StoreError when somebody works on what it holds."""

    async def counts(self) -> dict[str, int]:
        """Rows of every table."""

    async def displaced(self) -> list[Displaced]:
        """In the order in which they stand."""

    async def page(self, table: str, after: list[Any] | None) -> Slice:
        """At most `PAGE_ROWS` rows and about `PAGE_BYTES`, but at least one where there is one."""

    async def progress(self) -> dict[str, bytes]:
        """What was noted of a copy into this store; nothing where none was begun."""

    async def begin(self, notes: dict[str, bytes]) -> None:
        """From here on it is no store, until `finish`. Raises: StoreError when it is not empty."""

    async def put(self, table: str, rows: list[Row], notes: tuple[bytes, bytes]) -> None:
        """Rows, and the table's note instead of the one before, or nothing of it. Raises: StoreError."""

    async def problems(self) -> list[str]: ...

    async def finish(self) -> None:
        """It is a store again, and new rows get numbers of their own."""


class Numbers:
    """Turns as a file numbers them, rising along every thread: the displaced come right behind, the others move up."""

    def __init__(self, displaced: list[Displaced]) -> None:
        self._behind = [each.behind for each in displaced]
        self._moved = {each.turn: each.behind + place for place, each in enumerate(displaced, 1)}

    def __call__(self, turn: int | None) -> int | None:
        if turn is None or not self._behind:
            return turn
        return self._moved.get(turn) or turn + bisect_left(self._behind, turn)


async def prepare(opening: Awaitable[Store], is_source: bool) -> None:
    """Both have their tables, and what is copied has the secret of its owners. Raises: StoreError."""
    try:
        store = await opening
        if is_source:
            await store.secret("owner")
        await store.close()
    except UnfinishedCopy:
        if is_source:
            raise


async def copy(source: Side, target: Side, now: float, tell: Tell) -> tuple[list[Compared], list[str]]:
    """Copies what is not copied yet; the tables compared, and what is wrong. Where all is well, the target is a store.

    Raises: StoreError, also for a source that is in use, and for a target with something else in it.
    """
    await source.refuse_use(now)
    notes = await _begun(source, target)
    numbers = Numbers(await source.displaced() if target.needs_rising else [])
    for table in TABLES:
        await _copy_table(table, (source, target), numbers, notes[table], tell)
    compared = [await _compared(table, source, target, numbers) for table in TABLES]
    wrong = [f"{each.table} is not the same in both" for each in compared if not each.is_same]
    wrong += await target.problems()
    if not wrong:
        await target.finish()
    return compared, wrong


async def _begun(source: Side, target: Side) -> dict[str, bytes]:
    """How far each table is. Raises: StoreError."""
    identity = await _identity(source)
    notes = await target.progress()
    if not notes:
        notes = {SOURCE: identity, **dict.fromkeys(TABLES, msgspec.msgpack.encode(Progress()))}
        await target.begin(notes)
    if notes[SOURCE] != identity:
        raise StoreError(
            f"{target.what} holds an unfinished copy of another store, or of this one as it was before it changed: "
            "empty it, and copy again"
        )
    return notes


async def _identity(source: Side) -> bytes:
    """Of a store as it is now: who copies it in several goes must find it unchanged."""
    secrets = (await source.page("secret", None)).rows
    known = msgspec.msgpack.encode((source.kind, TABLES, secrets, sorted((await source.counts()).items())))
    return blake2b(known, digest_size=DIGEST_BYTES).digest()


async def _copy_table(table: str, sides: tuple[Side, Side], numbers: Numbers, note: bytes, tell: Tell) -> None:
    source, target = sides
    done = msgspec.msgpack.decode(note, type=Progress)
    if done.rows and not done.is_whole:
        tell(f"{table}: goes on behind {done.rows} rows")
    while not done.is_whole:
        rows, last = await source.page(table, done.after)
        done = Progress(last, done.rows + len(rows)) if rows else Progress(done.after, done.rows, True)
        new = msgspec.msgpack.encode(done)
        await target.put(table, fitted(table, rows, target, numbers), (note, new))
        note = new
    tell(f"{table}: {done.rows} rows")


def fitted(table: str, rows: list[Row], target: Side, numbers: Numbers) -> list[Row]:
    """Rows as the target can have them."""
    turns = {TABLES[table].index(column) for column in TURNS.get(table, ())} if target.needs_rising else set()
    if not turns and target.takes_nul:
        return rows
    return [tuple(_fitted(value, n in turns, target, numbers) for n, value in enumerate(row)) for row in rows]


def _fitted(value: Any, is_turn: bool, target: Side, numbers: Numbers) -> Any:
    if isinstance(value, str) and not target.takes_nul:
        return value.replace("\0", "\ufffd")
    return numbers(value) if is_turn else value


async def _compared(table: str, source: Side, target: Side, numbers: Numbers) -> Compared:
    """All rows of both, read once more: also those that an earlier go has copied."""
    (source_rows, source_sum), (target_rows, target_sum) = [
        await _summed(table, side, target, numbers if side is source else Numbers([])) for side in (source, target)
    ]
    return Compared(table, source_rows, target_rows, (source_rows, source_sum) == (target_rows, target_sum))


async def _summed(table: str, side: Side, target: Side, numbers: Numbers) -> tuple[int, int]:
    """How many rows, and the sum of their digests: the order in which they come is each store's own."""
    count = total = 0
    after: list[Any] | None = None
    while (page := await side.page(table, after)).rows:
        after = page.last
        count += len(page.rows)
        for row in fitted(table, page.rows, target, numbers):
            digest = blake2b(msgspec.msgpack.encode(row), digest_size=DIGEST_BYTES).digest()
            total = (total + int.from_bytes(digest, "big")) % (1 << 8 * DIGEST_BYTES)
    return count, total


def table_of(compared: list[Compared]) -> str:
    """For people: one line for each table."""
    rows = [("TABLE", "FROM", "TO", ""), *((each.table, *_cells(each)) for each in compared)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    name, source, target, _ = widths
    return "\n".join(f"{a:<{name}}  {b:>{source}}  {c:>{target}}  {d}".rstrip() for a, b, c, d in rows)


def _cells(compared: Compared) -> tuple[str, str, str]:
    return str(compared.source_rows), str(compared.target_rows), "same" if compared.is_same else "DIFFERENT"
