"""How the database of a store is opened: its pool of connections, its tables, and a look at its clock.

May not know the verbs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from functools import partial

import asyncpg  # type: ignore[import-untyped]

from errors import StoreError, UnfinishedCopy
from postgres_advice import opening_error, refuse_lost_files
from postgres_errors import FAILURES
from postgres_pool import Database, Known, Limits, NotSent, Statement, Transaction
from postgres_tables import COPYING, HAS_VERSION, MIGRATING, MIGRATIONS, VERSION_TABLE
from store import StoreSettings, shown

log = logging.getLogger("responses_proxy.store")

NAME = "responses-proxy"
# The statements of this program are about this many.
CACHED_STATEMENTS = 256
# How statements are planned: once for a connection, because to plan one takes longer than most of them take; by the
# keys that they name, because a table that has just grown has no statistics, without which all of it would be read; and
# without a compiler, which is for those that read much. Source: postgresql.org/docs/current/runtime-config-query.html.
PLANS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
NOW = "SELECT extract(epoch FROM clock_timestamp())::double precision"
CLOCKS_APART_S = 2.0
# How soon a connection that listens has to answer.
ANSWER_WITHIN_S = 5.0


async def opened_database(settings: StoreSettings, may_make: bool) -> Database:
    """The database, whose tables are made where there are none if that may be.

    Raises: StoreError when it cannot be used.
    """
    what = f"'{shown(settings.path)}'"
    known = Known()
    limits = Limits(settings.pool_size, settings.busy_timeout_s, settings.statement_timeout_s)
    async with contextlib.AsyncExitStack() as stack:
        db = Database(await _connected(what, settings, known), known, limits)
        stack.push_async_callback(db.close)
        try:
            await db.verb(is_patient=True).write(partial(_migrate, what, may_make))
        except StoreError as error:
            cause = error.__cause__.error if isinstance(error.__cause__, NotSent) else error.__cause__
            raise opening_error(cause, what) if isinstance(cause, FAILURES) else error from None
        stack.pop_all()
    return db


async def _connected(what: str, settings: StoreSettings, known: Known) -> asyncpg.Pool:
    """Raises: StoreError."""
    refuse_lost_files(what, settings.path)
    try:
        pool = await _pool(settings, known)
        with contextlib.ExitStack() as stack:
            stack.callback(pool.terminate)
            await _look_at_clock(pool, settings.connect_timeout_s)
            stack.pop_all()
    except (*FAILURES, ValueError) as error:
        raise opening_error(error, what) from None
    return pool


async def _look_at_clock(pool: asyncpg.Pool, limit_s: float) -> None:
    async with pool.acquire(timeout=limit_s) as connection:
        before_at = time.time()
        theirs_at = await connection.fetchval(NOW, timeout=limit_s)
        _compare(theirs_at, before_at, time.time())


def _compare(theirs_at: float, before_at: float, after_at: float) -> None:
    """Leases compare what the clocks of several machines say."""
    apart_s = max(theirs_at - after_at, before_at - theirs_at)
    if apart_s > CLOCKS_APART_S:
        side = "behind" if theirs_at > after_at else "ahead of"
        log.warning(
            "the clock of this machine is %.1f s %s that of the database; leases need them together", apart_s, side
        )


async def _pool(settings: StoreSettings, known: Known) -> asyncpg.Pool:
    # What a process that cannot be reached any more has begun holds up nobody for longer than a verb.
    idle_ms = str(math.ceil(settings.statement_timeout_s * 1000))
    session = {"application_name": NAME}
    if settings.prepared_statements:
        session |= {**PLANS, "idle_in_transaction_session_timeout": idle_ms}

    async def note(connection: asyncpg.Connection) -> None:
        known.add(connection)

    pool: asyncpg.Pool = await asyncpg.create_pool(
        settings.path,
        min_size=0,  # else it connects by itself, and logs what goes wrong
        max_size=settings.pool_size,
        timeout=settings.connect_timeout_s,
        statement_cache_size=CACHED_STATEMENTS if settings.prepared_statements else 0,
        max_cached_statement_lifetime=0,
        max_cacheable_statement_size=0,
        server_settings=session,
        init=note,
        reset=_nothing_to_reset,
    )
    return pool


async def listener(settings: StoreSettings) -> asyncpg.Connection:
    """A connection that is not the pool's: what is told comes to where LISTEN was said."""
    return await asyncpg.connect(
        settings.listen_url or settings.path,
        timeout=settings.connect_timeout_s,
        command_timeout=ANSWER_WITHIN_S,
        statement_cache_size=0,
        server_settings={"application_name": NAME},
    )


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
    except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError):
        raise StoreError(f"{what} holds tables of another program; give it a schema of its own.") from None
    await db.run(f"UPDATE responses_proxy SET version = {len(MIGRATIONS)}")


async def _version(what: str, db: Transaction) -> int:
    """Raises: StoreError."""
    row = await db.row(Statement("SELECT version FROM responses_proxy"), {})
    version = int(row["version"]) if row else 0
    if version >= COPYING:
        raise UnfinishedCopy(what)
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{what} was written by a newer version of this program (schema {version}; this one knows up to "
            f"{len(MIGRATIONS)})."
        )
    return version
