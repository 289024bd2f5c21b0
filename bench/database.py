"""What the store costs in PostgreSQL, as JSON: `bench/database.py`, on the server of PG_URL or one of its own.

A server of its own is that of the package pgserver with fsync on. Everything is made in an empty schema, and nothing
else may write to the server: bytes of the log (WAL) are those of all of it. A turn is 2 KB of text and all else that is
kept of it, as in `bench/storing.py`.
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import postgres_server  # type: ignore[import-not-found] # noqa: E402 - the rooms and the tests stand one folder up
from storing import NO_LIMITS, OWNERS, built  # type: ignore[import-not-found] # noqa: E402

from run_verbs import Batch, Ending, NewRun, RunStore  # noqa: E402
from store import StoreSettings  # noqa: E402
from store_postgres import open_store  # noqa: E402
from verbs import Lock  # noqa: E402

TURNS, CHAINS = 10_000, 100
SAVERS = 20
COMMITS = 2_000
ADMITTED_AT_ONCE, CLAIMED_AT_ONCE, CLAIMS = 1_000, 8, 500
STREAMED, BATCHES, EVENTS_A_BATCH = 500, 10, 8
LOGGED = 200
# As they go out for one word of text; about so long.
EVENT = b"event: response.output_text.delta\ndata: " + b"x" * 180 + b"\n\n"
LATER = 4e9
TABLES = """SELECT relname, pg_total_relation_size(oid) AS total, pg_indexes_size(oid) AS indexes FROM pg_class
    WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"""


class Beside:
    """What the server tells of itself."""

    def __init__(self, url: str) -> None:
        self._connection = postgres_server.Beside(url)
        self.asked, self.close = self._connection.asked, self._connection.close

    def wal_bytes(self) -> int:
        return int(self.asked("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')")[0][0])

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {name: (total, indexes) for name, total, indexes in self.asked(TABLES)}


async def many(count: int, at_once: int, work: Callable[[int], Awaitable[Any]]) -> float:
    """How many of these calls were done a second, when so many are under way."""
    numbers = iter(range(count))

    async def some() -> None:
        for number in numbers:
            await work(number)

    began = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(at_once)))
    return count / (time.perf_counter() - began)


async def commits(store: RunStore, at_once: int) -> float:
    return await many(COMMITS, at_once, lambda n: store.acquire(Lock(f"lease {n % 500}", "bench"), 0.0, LATER + n))


async def turns(store: RunStore, beside: Beside) -> dict[str, Any]:
    """Chains that grow side by side, each turn after its window was read, as in the proxy."""
    before, wal = beside.sizes(), beside.wal_bytes()
    taken_s: list[float] = []

    async def chain(number: int) -> None:
        tip = None
        for _ in range(TURNS // CHAINS):
            turn = built(tip)
            began = time.perf_counter()
            if tip:
                await store.window("", tip)
            await store.save(turn)
            taken_s.append(time.perf_counter() - began)
            tip = turn.id

    rate = await many(CHAINS, SAVERS, chain) * TURNS / CHAINS
    wal = beside.wal_bytes() - wal
    return {
        "per_s": rate,
        "median_ms": statistics.median(taken_s) * 1000,
        "wal_bytes_per_turn": wal / TURNS,
        "bytes_per_turn": grown(before, beside.sizes(), TURNS),
    }


def grown(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], by: int) -> dict[str, Any]:
    """Bytes of each table that grew, with its indexes, and of these: for each of so many."""
    found = {name: [(new - old) / by for new, old in zip(after[name], before[name], strict=True)] for name in after}
    return {name: values for name, values in found.items() if values[0]} | {"all": sum(v[0] for v in found.values())}


def queued(owner: str, events: Batch | None = None) -> NewRun:
    turn = built(None)
    turn = msgspec.structs.replace(turn, owner=owner, status="queued", completed_at=None, outputs=())
    return NewRun(turn=turn, request=b'{"model":"bench"}', admitted_at=time.time(), batch=events)


async def queue(store: RunStore, beside: Beside) -> dict[str, Any]:
    """A queue that becomes as long as the settings allow: admission at its beginning and end, then claims."""
    runs = [queued(owner) for owner in OWNERS]
    admitted: dict[str, float] = {}
    wal = beside.wal_bytes()
    for start in range(0, len(runs), ADMITTED_AT_ONCE):
        some = runs[start : start + ADMITTED_AT_ONCE]
        at_once = SAVERS if start else 1
        rate = await many(len(some), at_once, lambda n, some=some: store.admit(some[n], NO_LIMITS))  # type: ignore[misc]
        admitted[f"{start} to {start + len(some)} queued, {at_once} at a time"] = rate
    wal = beside.wal_bytes() - wal
    taken = await many(CLAIMS, 3, lambda n: store.claim(f"p{n % 3}", LATER, CLAIMED_AT_ONCE))
    return {
        "admitted_per_s": admitted,
        "wal_bytes_per_admission": wal / len(runs),
        "claimed_per_s": taken * CLAIMED_AT_ONCE,
    }


async def streamed(store: RunStore, beside: Beside) -> dict[str, Any]:
    """Runs whose events are kept: admitted, claimed, logged in batches and ended."""
    before, wal = beside.sizes(), beside.wal_bytes()

    async def one(number: int) -> None:
        new = queued(f"streamer {number % 20}", Batch(0, 2, EVENT * 2))
        await store.admit(new, NO_LIMITS)
        while not (claimed := await store.claim(f"s{number}", LATER, 1)):
            pass  # all that it saw were being taken by others just then
        (run,) = claimed
        for first in range(2, 2 + BATCHES * EVENTS_A_BATCH, EVENTS_A_BATCH):
            await store.log(run.held, Batch(first, first + EVENTS_A_BATCH, EVENT * EVENTS_A_BATCH))
        turn = msgspec.structs.replace(built(None), id=run.response_id, owner=run.owner)
        last = 2 + BATCHES * EVENTS_A_BATCH
        await store.settle(run.held, Ending(turn, Batch(last, last + 1, EVENT), LATER, LATER))

    rate = await many(STREAMED, SAVERS, one)
    wal = beside.wal_bytes() - wal
    events = STREAMED * (2 + BATCHES * EVENTS_A_BATCH + 1)
    sizes = grown(before, beside.sizes(), STREAMED)
    return {
        "runs_per_s": rate,
        "statements_per_run": 3 + BATCHES,
        "wal_bytes_per_run": wal / STREAMED,
        "bytes_per_run": sizes,
        "bytes_per_event": sizes["event"][0] * STREAMED / events,
        "wire_bytes_per_event": len(EVENT),
    }


async def logged(store: RunStore) -> dict[str, float]:
    """Batches of events a second, of many runs of one process at the same moments, and one after the other."""
    for number in range(LOGGED):
        await store.admit(queued(f"logger {number % 20}", Batch(0, 2, EVENT * 2)), NO_LIMITS)
    runs = await store.claim("logger", LATER, LOGGED)
    assert len(runs) == LOGGED

    def batch(number: int) -> Batch:
        return Batch(2 + number, 3 + number, EVENT)

    began = time.perf_counter()
    for number in range(BATCHES):
        await asyncio.gather(*(store.log(run.held, batch(number)) for run in runs))
    together = LOGGED * BATCHES / (time.perf_counter() - began)
    alone = await many(LOGGED, 1, lambda number: store.log(runs[number].held, batch(BATCHES)))
    return {f"{LOGGED} at once": together, "one at a time": alone}


async def measured(url: str, beside: Beside) -> dict[str, Any]:
    store = await open_store(StoreSettings(path=url, pool_size=SAVERS, busy_timeout_s=60.0))
    try:
        rates = {str(at_once): await commits(store, at_once) for at_once in (1, SAVERS)}
        found = {"commits_per_s": rates, "turns": await turns(store, beside)}
        found["streamed"] = await streamed(store, beside)
        found["batches_per_s"] = await logged(store)
        return found | {"queue": await queue(store, beside), "pool_size": SAVERS}
    finally:
        await store.close()


def main() -> None:
    durable = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "autovacuum": "on"}
    if not os.environ.get("PG_URL"):
        postgres_server.OPTIONS.update(durable, shared_buffers="128MB", max_wal_size="4GB")
    try:
        url = postgres_server.emptied()
        beside = Beside(url)
        try:
            found = asyncio.run(measured(url, beside))
            settings = beside.asked("SELECT current_setting('server_version'), current_setting('fsync')")
        finally:
            beside.close()
        print(orjson.dumps({"server": settings[0], **found}, option=orjson.OPT_INDENT_2).decode())
    finally:
        postgres_server.end()


if __name__ == "__main__":
    main()
