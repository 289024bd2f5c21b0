"""Runs, batches of events and ends for the tests of a store: small, and equal when built twice."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from store_builders import NOW, OWNER, Place, turn

from run_verbs import Batch, Ending, Held, NewRun, QueueLimits, Run, RunStore, Stopped, Tail
from verbs import NewTurn

UNLIMITED = QueueLimits(per_owner=10_000, total=10_000)
LEASE_S, LOG_S, BRIEF_S = 15.0, 60.0, 600.0
# Tables where a response leaves rows, and what its run leaves.
RUN_TABLES = ("turn", "item", "item_id", "thread", "run", "log", "event", "queue")

OpenRunStore = Callable[..., Awaitable[RunStore]]


def queued(turn_id: str, previous_id: str | None = None, **changes: Any) -> NewTurn:
    """A turn as it is admitted, with the input item `<id>.in`; in a conversation it takes no place yet."""
    usual = {"status": "queued", "completed_at": None, "body": b"{}", "outputs": ()}
    detached = {"is_detached": True} if changes.get("conversation_id") or changes.get("is_brief") else {}
    return turn(turn_id, previous_id, **{**usual, **detached, **changes})


def brief(turn_id: str, previous_id: str | None = None, **changes: Any) -> NewTurn:
    """A turn with `store: false` as it is admitted."""
    return queued(turn_id, previous_id, is_brief=True, **changes)


def new_run(new: NewTurn, **changes: Any) -> NewRun:
    usual = NewRun(turn=new, request=b'{"of":"%b"}' % new.id.encode(), admitted_at=NOW)
    return msgspec.structs.replace(usual, **changes)


def batch(first: int, count: int = 1, mark: str = "") -> Batch:
    """Events whose frames tell their numbers: `3. 4. `."""
    frames = "".join(f"{number}{mark}. " for number in range(first, first + count))
    return Batch(first, first + count, frames.encode())


def ending(new: NewTurn, events: Batch | None = None, now: float = NOW) -> Ending:
    return Ending(new, events, now + LOG_S, now + BRIEF_S)


# -- verbs, shorter ----------------------------------------------------------------------------------------------------


async def admit(store: RunStore, *turns: NewTurn, **changes: Any) -> None:
    for each in turns:
        await store.admit(new_run(each, **changes), UNLIMITED)


async def claim(store: RunStore, limit: int = 1000, holder: str = "me") -> list[Run]:
    return await store.claim(holder, NOW + LEASE_S, limit)


async def claim_ids(store: RunStore, limit: int = 1000, holder: str = "me") -> list[str]:
    return [run.response_id for run in await claim(store, limit, holder)]


async def claim_one(store: RunStore, response_id: str, holder: str = "me") -> Held:
    """The claim on the next run in line, which is the one of that name."""
    (run,) = await claim(store, 1, holder)
    assert run.response_id == response_id
    return run.held


async def begin(store: RunStore, new: NewTurn, **changes: Any) -> Held:
    """Admitted and claimed."""
    await admit(store, new, **changes)
    return await claim_one(store, new.id)


async def finish(store: RunStore, new: NewTurn) -> None:
    """Admitted, claimed and ended: a new turn as it is at its end."""
    names = ("previous_id", "conversation_id", "owner", "inputs")
    held = await begin(store, queued(new.id, **{name: getattr(new, name) for name in names}))
    assert await store.settle(held, ending(new)) is True


async def cancel(store: RunStore, response_id: str, owner: str = OWNER, now: float = NOW) -> Stopped | None:
    return await store.stop(owner, response_id, now + LOG_S, now + BRIEF_S)


async def sweep(store: RunStore, now: float) -> int:
    """What is over at that time is freed and forgotten; how many claims it was."""
    found = await store.expired(now)
    for held in found:
        await store.free(held, now)
    await store.forget_ended(now)
    return len(found)


# -- what there is -----------------------------------------------------------------------------------------------------


async def status_of(store: RunStore, response_id: str, owner: str = OWNER) -> str | None:
    kept = await store.response(owner, response_id)
    return kept and kept.status


async def waiting_ids(store: RunStore) -> list[str]:
    return [run.response_id for run in await store.runs() if run.is_waiting]


async def run_ids(store: RunStore) -> list[str]:
    return [run.response_id for run in await store.runs()]


def events_after(tail: Tail | None, after: int) -> list[str] | None:
    """The events behind a number; at most the first batch may hold others, as far as they stand in one batch."""
    if tail is None:
        return None
    found: list[str] = []
    for place, (first, frames) in enumerate(tail.batches):
        events = frames.decode().split()
        assert int(events[0].rstrip(".+")) == first
        new = [event for number, event in enumerate(events, first) if number > after]
        assert place == 0 or len(new) == len(events)
        found += new
    return found


async def all_events(store: RunStore, response_id: str, after: int = -1, owner: str = OWNER) -> list[str]:
    """All logged events behind a number, read as a client's tail is."""
    events: list[str] = []
    while True:
        tail = await store.tail(owner, response_id, after)
        found = events_after(tail, after)
        assert tail is not None
        assert found is not None
        assert found or not tail.has_more
        events += found
        after += len(found)
        if not tail.has_more:
            return events


def numbered(*numbers: int) -> list[str]:
    return [f"{number}." for number in numbers]


def run_rows_in(place: Place) -> dict[str, int]:
    """How many rows the tables have where a background response leaves some."""
    return place.counts(RUN_TABLES)


def lengths_in(connection: sqlite3.Connection) -> dict[str, int]:
    """The lengths of the queue as they are kept."""
    return dict(connection.execute("SELECT owner, length FROM queue").fetchall())


def counted_in(connection: sqlite3.Connection) -> dict[str, int]:
    """The lengths of the queue as they are."""
    return dict(connection.execute("SELECT owner, count(*) FROM run WHERE holder IS NULL GROUP BY owner").fetchall())
