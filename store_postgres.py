"""PostgreSQL: the verbs of a store on one database that several machines share.

May not know HTTP, what an item means, or policy: how long things are kept and who may ask is decided by the caller.
Each verb is one statement wherever it can be; the others are one transaction.
"""

from __future__ import annotations

import contextlib
from functools import partial

import asyncpg  # type: ignore[import-untyped]

import postgres_forgetting as forgetting
import postgres_reads as reads
import postgres_runs as runs
import postgres_writes as writes
from errors import StoreError
from postgres_pool import FAILURES, Database, Statement, Transaction, store_error
from postgres_tables import HAS_VERSION, MIGRATING, MIGRATIONS, VERSION_TABLE
from run_verbs import Batch, Ending, Held, NewRun, QueueLimits, QueueState, Run, RunInfo, RunStore, Stopped, Tail
from store import StoreSettings, shown
from verbs import Conversation, KeptResponse, Listed, Lock, NewItem, NewTurn, Page, Purged, Window

NAME = "responses-proxy"
# The statements of this program are about this many.
CACHED_STATEMENTS = 256


async def open_store(settings: StoreSettings, may_make: bool = True) -> RunStore:
    """The store in a database, whose tables are made where there are none if that may be.

    Raises: StoreError when the database cannot be used.
    """
    what = f"'{shown(settings.path)}'"
    async with contextlib.AsyncExitStack() as stack:
        db = Database(await _connected(what, settings), settings.busy_timeout_s)
        stack.push_async_callback(db.close)
        await db.write(partial(_migrate, what, may_make))
        stack.pop_all()
    return PostgresStore(db)


async def _connected(what: str, settings: StoreSettings) -> asyncpg.Pool:
    """Raises: StoreError."""
    try:
        return await _pool(settings)
    except (*FAILURES, ValueError) as error:
        refusal = store_error(error, what)
        refusal.__cause__ = None  # it may tell the address, and so a password
        raise refusal from None


async def _pool(settings: StoreSettings) -> asyncpg.Pool:
    # A compiler for queries that read much takes longer than any of these.
    session = {"application_name": NAME} | ({"jit": "off"} if settings.prepared_statements else {})
    pool: asyncpg.Pool = await asyncpg.create_pool(
        settings.path,
        min_size=1,
        max_size=settings.pool_size,
        timeout=settings.connect_timeout_s,
        command_timeout=settings.statement_timeout_s or None,
        statement_cache_size=CACHED_STATEMENTS if settings.prepared_statements else 0,
        max_cached_statement_lifetime=0,
        max_cacheable_statement_size=0,
        server_settings=session,
        reset=_nothing_to_reset,
    )
    return pool


async def _nothing_to_reset(connection: asyncpg.Connection) -> None:
    """No verb leaves anything in its session, and to make sure of that costs as much as a verb."""


async def _migrate(what: str, may_make: bool, db: Transaction) -> None:
    """Makes the tables if that may be, or brings them up to date.

    Raises: StoreError for those of a newer version or of another program, which stay as they are.
    """
    await db.run(f"SELECT pg_advisory_xact_lock({MIGRATING})")
    found = await db.row(Statement(HAS_VERSION + " AS is_there"), {})
    version = await _version(what, db) if found and found["is_there"] else None
    if version == len(MIGRATIONS):
        return
    if version is None and not may_make:
        raise StoreError(f"{what} holds no store of this program.")
    try:
        for statement in () if version is not None else (VERSION_TABLE, "INSERT INTO responses_proxy VALUES (0)"):
            await db.run(statement)
        for statement in (each for migration in MIGRATIONS[version or 0 :] for each in migration):
            await db.run(statement)
    except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError) as error:
        raise StoreError(f"{what} holds tables of another program; give it a schema of its own.") from error
    await db.run(f"UPDATE responses_proxy SET version = {len(MIGRATIONS)}")


async def _version(what: str, db: Transaction) -> int:
    """Raises: StoreError."""
    row = await db.row(Statement("SELECT version FROM responses_proxy"), {})
    version = int(row["version"]) if row else 0
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{what} was written by a newer version of this program (schema {version}; this one knows up to "
            f"{len(MIGRATIONS)})."
        )
    return version


class PostgresStore:
    """The verbs of `run_verbs.RunStore` on PostgreSQL."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def save(self, turn: NewTurn) -> None:
        await writes.save(self._db, turn)

    async def response(self, owner: str, response_id: str) -> KeptResponse | None:
        return await reads.response(self._db, owner, response_id)

    async def responses(self, owner: str, page: Page, model: str | None) -> Listed[KeptResponse]:
        return await self._db.read(lambda db: reads.responses(db, owner, page, model))

    async def delete_response(self, owner: str, response_id: str, now: float) -> bool:
        return await self._db.write(lambda db: forgetting.delete_response(db, owner, response_id, now))

    async def window(self, owner: str, response_id: str) -> Window | None:
        return await reads.window(self._db, reads.RESPONSE_WINDOW, owner, response_id)

    async def window_before(self, owner: str, response_id: str) -> Window | None:
        return await reads.window(self._db, reads.WINDOW_BEFORE, owner, response_id)

    async def keep_ahead(self, owner: str, response_id: str, blob: bytes, of: list[bytes] | None = None) -> bool:
        return await self._db.write(lambda db: writes.keep_ahead(db, owner, response_id, blob, of))

    async def input_items(self, owner: str, response_id: str, page: Page) -> Listed[bytes] | None:
        return await self._db.read(lambda db: reads.input_items(db, owner, response_id, page))

    async def items(self, owner: str, ids: list[str]) -> dict[str, bytes]:
        return await reads.living_items(self._db, owner, ids)

    async def create_conversation(self, owner: str, conversation: Conversation, items: tuple[NewItem, ...]) -> None:
        await writes.create_conversation(self._db, owner, conversation, items)

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        return await reads.conversation(self._db, owner, conversation_id)

    async def update_conversation(self, owner: str, conversation_id: str, metadata: bytes) -> Conversation | None:
        return await self._db.write(lambda db: writes.update_conversation(db, owner, conversation_id, metadata))

    async def delete_conversation(self, owner: str, conversation_id: str, now: float) -> bool:
        return await self._db.write(lambda db: forgetting.delete_conversation(db, owner, conversation_id, now))

    async def conversation_window(self, owner: str, conversation_id: str) -> Window | None:
        return await reads.window(self._db, reads.CONVERSATION_WINDOW, owner, conversation_id)

    async def add_items(self, owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float) -> bool:
        return await self._db.write(lambda db: writes.add_items(db, owner, conversation_id, items, now))

    async def conversation_items(self, owner: str, conversation_id: str, page: Page) -> Listed[bytes] | None:
        return await self._db.read(lambda db: reads.conversation_items(db, owner, conversation_id, page))

    async def conversation_item(self, owner: str, conversation_id: str, item_id: str) -> bytes | None:
        return await reads.conversation_item(self._db, owner, conversation_id, item_id)

    async def delete_conversation_item(self, owner: str, conversation_id: str, item_id: str, now: float) -> bool:
        name = (conversation_id, item_id)
        return await self._db.write(lambda db: writes.delete_conversation_item(db, owner, name, now))

    async def acquire(self, lock: Lock, now: float, until_at: float) -> bool:
        return await writes.acquire(self._db, lock, now, until_at)

    async def renew(self, lock: Lock, until_at: float) -> bool:
        return await writes.renew(self._db, lock, until_at)

    async def release(self, lock: Lock) -> None:
        await writes.release(self._db, lock)

    async def first_use(self, owner: str, key: str, now: float) -> tuple[bytes, str] | None:
        return await reads.first_use(self._db, owner, key, now)

    async def secret(self, name: str) -> bytes:
        return await writes.secret(self._db, name)

    async def learned(self) -> dict[str, bytes]:
        return await writes.learned(self._db)

    async def keep_learned(self, learned: dict[str, bytes]) -> None:
        await writes.keep_learned(self._db, learned)

    async def purge(self, before_at: float, now: float) -> Purged:
        """The space is used again by the database, which gives none back."""
        responses = 0
        while forgotten := await self._db.write(lambda db: forgetting.forget_some(db, before_at, now)):
            responses += forgotten
        await forgetting.sweep(self._db, now)
        return Purged(responses, 0)

    async def admit(self, run: NewRun, limits: QueueLimits) -> None:
        await runs.admit(self._db, run, limits)

    async def claim(self, holder: str, until_at: float, limit: int) -> list[Run]:
        return await runs.claim(self._db, holder, until_at, limit)

    async def renew_runs(self, holder: str, until_at: float) -> list[Held]:
        return await runs.renew(self._db, holder, until_at)

    async def held(self, holder: str) -> list[Held]:
        return await runs.held(self._db, holder)

    async def release_runs(self, holder: str) -> None:
        await runs.release(self._db, holder)

    async def log(self, held: Held, batch: Batch) -> bool:
        return await runs.log(self._db, held, batch)

    async def settle(self, held: Held, ending: Ending) -> bool:
        return await runs.settle(self._db, held, ending)

    async def free(self, held: Held, before_at: float) -> None:
        await runs.free(self._db, held, before_at)

    async def release_run(self, held: Held) -> None:
        await runs.release_run(self._db, held)

    async def let_go(self, held: Held) -> None:
        await runs.let_go(self._db, held)

    async def stop(self, owner: str, response_id: str, log_until_at: float, lives_until: float) -> Stopped | None:
        return await runs.stop(self._db, (owner, response_id), log_until_at, lives_until)

    async def is_held(self, run: int) -> bool:
        return await runs.is_held(self._db, run)

    async def tail(self, owner: str, response_id: str, after: int) -> Tail | None:
        return await runs.tail(self._db, owner, response_id, after)

    async def states(self, response_ids: list[str]) -> dict[str, tuple[str, int | None]]:
        return await runs.states(self._db, response_ids)

    async def version(self) -> int:
        return await runs.version(self._db)

    async def expired(self, now: float) -> list[Held]:
        return await runs.expired(self._db, now)

    async def forget_ended(self, now: float) -> None:
        while await runs.forget_ended(self._db, now):
            pass

    async def runs(self) -> list[RunInfo]:
        return await runs.runs(self._db)

    async def queue(self) -> QueueState:
        return await runs.queue(self._db)

    @property
    def waiting(self) -> int:
        return self._db.waiting

    async def size_bytes(self) -> int:
        return await reads.size_bytes(self._db)

    async def problems(self) -> list[str]:
        return await reads.problems(self._db)

    async def close(self) -> None:
        await self._db.close()
