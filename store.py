"""SQLite: the verbs of a store on one file that several processes may share.

May not know HTTP, what an item means, or policy: how long things are kept and who may ask is decided by the caller.
One writer puts everything that waits into one transaction and one hop to its thread; readers have their own connection.
"""

from __future__ import annotations

import os
import re
import sqlite3
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, TypeVar

import msgspec

import facts
import quota_rows
import reads
import run_rows
import writes
from errors import StoreError
from lanes import DatabaseThread, Lane, read_all, store_error, write_all
from quota_verbs import Charge, Used
from run_verbs import Batch, Ending, Held, NewRun, QueueLimits, QueueState, Run, RunInfo, Stopped, Tail, Tell
from schema import migrate, use_wal
from verbs import Conversation, KeptResponse, Listed, Lock, NewItem, NewTurn, Page, Purged, Window

T = TypeVar("T")

# What is meant as an address, well formed or not: it may hold a password.
ADDRESS = re.compile(r".*://|[^/\\]+:[^@]*@", re.DOTALL)
CACHE_KB = 16_000
JOURNAL_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class StoreSettings:
    """The section `[store]`."""

    path: str = "responses.db"
    synchronous: Literal["NORMAL", "FULL"] = "NORMAL"
    retention_days: float = 30.0
    busy_timeout_s: float = 5.0
    # Of a database:
    pool_size: Annotated[int, msgspec.Meta(ge=1)] = 10
    prepared_statements: bool = True
    connect_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    statement_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    listen_url: str = ""

    def __post_init__(self) -> None:
        if ADDRESS.match(self.path) and not is_database(self.path):
            raise ValueError("path: expected a file, ':memory:' or 'postgresql://…', got an address of another kind")


def is_database(path: str) -> bool:
    """Whether the store is a database of PostgreSQL, not a file."""
    return path.startswith(("postgresql://", "postgres://"))


def shown(path: str) -> str:
    """A store as messages name it: of a database without user, password and options."""
    if not is_database(path):
        return path
    scheme, _, rest = path.partition("://")
    address, _, options = rest.partition("?")
    host, slash, name = address.partition("/")
    if "@" in name + options:  # it was cut in a password, perhaps
        return f"{scheme}://…"
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{name}"


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
        threads.append(DatabaseThread(settings.path))
        await threads[-1]
        await threads[-1].run(partial(_set_up, settings))
        if prepare is not None:
            await threads[-1].run(partial(prepare, settings))


def _set_up(settings: StoreSettings, db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA busy_timeout = {int(settings.busy_timeout_s * 1000)}")
    db.execute(f"PRAGMA synchronous = {settings.synchronous}")
    db.execute("PRAGMA secure_delete = ON")
    db.execute("PRAGMA temp_store = MEMORY")  # journals of statements with triggers, which else spill to a file
    db.execute(f"PRAGMA cache_size = -{CACHE_KB}")
    db.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")


def _prepare(settings: StoreSettings, db: sqlite3.Connection) -> None:
    migrate(db, settings.path)
    use_wal(db, settings.busy_timeout_s)


class SQLiteStore:
    """The verbs of `run_verbs.RunStore` on SQLite."""

    def __init__(self, writer: Lane, reader: Lane) -> None:
        self._writer = writer
        self._reader = reader

    async def save(self, turn: NewTurn) -> None:
        await self._writer.do(partial(writes.save, turn))

    async def response(self, owner: str, response_id: str) -> KeptResponse | None:
        return await self._reader.do(partial(reads.response, owner, response_id))

    async def responses(self, owner: str, page: Page, model: str | None) -> Listed[KeptResponse]:
        return await self._reader.do(partial(reads.responses, owner, page, model))

    async def delete_response(self, owner: str, response_id: str, now: float) -> bool:
        return await self._writer.do(partial(writes.delete_response, owner, response_id, now))

    async def window(self, owner: str, response_id: str) -> Window | None:
        return await self._reader.do(partial(reads.response_window, owner, response_id))

    async def window_before(self, owner: str, response_id: str) -> Window | None:
        return await self._reader.do(partial(reads.window_before, owner, response_id))

    async def keep_ahead(self, owner: str, response_id: str, blob: bytes, of: list[bytes] | None = None) -> bool:
        return await self._writer.do(partial(writes.keep_ahead, owner, response_id, blob, of))

    async def input_items(self, owner: str, response_id: str, page: Page) -> Listed[bytes] | None:
        return await self._reader.do(partial(reads.input_items, owner, response_id, page))

    async def items(self, owner: str, ids: list[str]) -> dict[str, bytes]:
        return await self._reader.do(partial(reads.living_items, owner, ids))

    async def create_conversation(self, owner: str, conversation: Conversation, items: tuple[NewItem, ...]) -> None:
        await self._writer.do(partial(writes.create_conversation, owner, conversation, items))

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        return await self._reader.do(partial(reads.conversation, owner, conversation_id))

    async def update_conversation(self, owner: str, conversation_id: str, metadata: bytes) -> Conversation | None:
        return await self._writer.do(partial(writes.update_conversation, owner, conversation_id, metadata))

    async def delete_conversation(self, owner: str, conversation_id: str, now: float) -> bool:
        return await self._writer.do(partial(writes.delete_conversation, owner, conversation_id, now))

    async def conversation_window(self, owner: str, conversation_id: str) -> Window | None:
        return await self._reader.do(partial(reads.conversation_window, owner, conversation_id))

    async def add_items(self, owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float) -> bool:
        return await self._writer.do(partial(writes.add_items, owner, conversation_id, items, now))

    async def conversation_items(self, owner: str, conversation_id: str, page: Page) -> Listed[bytes] | None:
        return await self._reader.do(partial(reads.conversation_items, owner, conversation_id, page))

    async def conversation_item(self, owner: str, conversation_id: str, item_id: str) -> bytes | None:
        return await self._reader.do(partial(reads.conversation_item, owner, conversation_id, item_id))

    async def delete_conversation_item(self, owner: str, conversation_id: str, item_id: str, now: float) -> bool:
        return await self._writer.do(partial(writes.delete_conversation_item, owner, conversation_id, item_id, now))

    async def acquire(self, lock: Lock, now: float, until_at: float) -> bool:
        return await self._writer.do(partial(writes.acquire, lock, now, until_at))

    async def renew(self, lock: Lock, until_at: float) -> bool:
        return await self._writer.do(partial(writes.renew, lock, until_at))

    async def release(self, lock: Lock) -> None:
        await self._writer.do(partial(writes.release, lock))

    async def first_use(self, owner: str, key: str, now: float) -> tuple[bytes, str] | None:
        return await self._reader.do(partial(reads.first_use, owner, key, now))

    async def secret(self, name: str) -> bytes:
        return await self._writer.do(partial(facts.secret, name))

    async def learned(self) -> dict[str, bytes]:
        return await self._reader.do(facts.learned)

    async def keep_learned(self, learned: dict[str, bytes]) -> None:
        await self._writer.do(partial(facts.keep_learned, learned))

    async def purge(self, before_at: float, now: float) -> Purged:
        responses = freed_bytes = 0
        while forgotten := await self._writer.do(partial(writes.forget_some, before_at, now)):
            responses += forgotten
        await self._writer.do(partial(writes.sweep, now))
        await self._writer.do(partial(quota_rows.sweep, now))
        while freed := await self._writer.do(writes.vacuum_some):
            freed_bytes += freed
        if freed_bytes:
            await self._writer.run_bare(writes.checkpoint)
        return Purged(responses, freed_bytes)

    async def admit(self, run: NewRun, limits: QueueLimits) -> None:
        await self._writer.do(partial(run_rows.admit, run, limits))

    async def claim(self, holder: str, until_at: float, limit: int) -> list[Run]:
        return await self._writer.do(partial(run_rows.claim, holder, until_at, limit))

    async def renew_runs(self, holder: str, until_at: float) -> list[Held]:
        return await self._writer.do(partial(run_rows.renew, holder, until_at))

    async def held(self, holder: str) -> list[Held]:
        return await self._reader.do(partial(run_rows.held, holder))

    async def release_runs(self, holder: str) -> None:
        await self._writer.do(partial(run_rows.release, holder))

    async def log(self, held: Held, batch: Batch) -> bool:
        return await self._writer.do(partial(run_rows.log, held, batch))

    async def settle(self, held: Held, ending: Ending) -> bool:
        return await self._writer.do(partial(run_rows.settle, held, ending))

    async def free(self, held: Held, before_at: float) -> None:
        await self._writer.do(partial(run_rows.free, held, before_at))

    async def release_run(self, held: Held) -> None:
        await self._writer.do(partial(run_rows.release_run, held))

    async def let_go(self, held: Held) -> None:
        await self._writer.do(partial(run_rows.let_go, held))

    async def stop(self, owner: str, response_id: str, log_until_at: float, lives_until: float) -> Stopped | None:
        return await self._writer.do(partial(run_rows.stop, owner, response_id, log_until_at, lives_until))

    async def is_held(self, run: int) -> bool:
        return await self._reader.do(partial(run_rows.is_held, run))

    async def tail(self, owner: str, response_id: str, after: int) -> Tail | None:
        return await self._reader.do(partial(run_rows.tail, owner, response_id, after))

    async def states(self, response_ids: list[str]) -> dict[str, tuple[str, int | None]]:
        return await self._reader.do(partial(run_rows.states, response_ids))

    async def version(self) -> int:
        return await self._writer.run_bare(run_rows.version)

    def announce(self, what: str) -> None:
        """A file tells nobody; who looks for a change of `version` sees it."""

    async def hear(self, tell: Tell) -> None:
        """Nothing is told."""

    @property
    def hears(self) -> bool:
        return False

    async def expired(self, now: float) -> list[Held]:
        return await self._reader.do(partial(run_rows.expired, now))

    async def forget_ended(self, now: float) -> None:
        while await self._writer.do(partial(run_rows.forget_ended, now)):
            pass

    async def runs(self) -> list[RunInfo]:
        return await self._reader.do(run_rows.runs)

    async def queue(self) -> QueueState:
        return await self._reader.do(run_rows.queue)

    async def charge(self, charge: Charge) -> Used:
        return await self._writer.do(partial(quota_rows.charge, charge))

    @property
    def waiting(self) -> int:
        return self._writer.waiting

    async def size_bytes(self) -> int:
        return await self._reader.do(reads.size_bytes)

    async def problems(self) -> list[str]:
        return await self._reader.do(reads.problems)

    async def close(self) -> None:
        if self._reader is not self._writer:
            await self._reader.close()
        await self._writer.close()
