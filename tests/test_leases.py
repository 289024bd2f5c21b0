"""A lease on a real store: when its holder is cancelled, and when the store cannot be written for a while.

The clock stands still, so that no lease runs out by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from conftest import both_stores, no_task_is_left
from controlled import controlled
from scripted import DEADLINE_S
from store_places import MemoryPlace, Place
from test_idempotency import Clock

from errors import StoreError
from leases import LEASE_S, Leases
from sources import Ids, Sources

pytestmark = both_stores
UNWRITABLE = StoreError("The store of responses may not be written.")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def leases(clock: Clock, kept_in: MemoryPlace | Place, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Leases]:
    """Leases that are renewed, asked for and given back again without delay."""
    for name in ("RENEW_EVERY_S", "ASK_AGAIN_S", "RETURN_AGAIN_S"):
        monkeypatch.setattr(f"leases.{name}", 0.001)
    store = await kept_in.open()
    leases = Leases(store, Sources(clock, Ids(clock)))
    yield leases
    async with asyncio.timeout(DEADLINE_S):
        await leases.close()
    await no_task_is_left()
    await store.close()


async def is_free(leases: Leases, wait_s: float = 0) -> bool:
    """Whether somebody else gets the lease within that time; who gets it gives it back."""
    other = leases.lease("work")
    try:
        return await other.acquire(wait_s)
    finally:
        await other.release()


async def after_steps(steps: int) -> None:
    """When the loop has gone round so many times."""
    for _ in range(steps):
        await asyncio.sleep(0)


# -- holders that are cancelled ----------------------------------------------------------------------------------------


async def test_who_is_cancelled_while_the_store_decides_gives_back_what_it_decided(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    deciding = controlled("acquire", monkeypatch)
    deciding.may_begin.clear()
    acquiring = asyncio.create_task(leases.lease("work").acquire(wait_s=0))
    await deciding.once_more("asked")
    acquiring.cancel()
    deciding.may_begin.set()
    with pytest.raises(asyncio.CancelledError):
        await acquiring
    assert (deciding.done, await is_free(leases)) == (1, True)


@pytest.mark.parametrize("steps", range(6))
async def test_a_holder_that_is_cancelled_when_the_store_has_decided_has_the_lease_or_nobody(
    leases: Leases, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    deciding = controlled("acquire", monkeypatch)
    lease = leases.lease("work")
    acquiring = asyncio.create_task(lease.acquire(wait_s=0))
    await deciding.once_more("done")
    await after_steps(steps)
    acquiring.cancel()
    await asyncio.wait({acquiring})
    assert await is_free(leases) is acquiring.cancelled()
    await lease.release()


async def test_who_is_cancelled_while_another_holds_the_lease_leaves_it_to_the_other(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = leases.lease("work")
    await held.acquire(wait_s=0)
    deciding = controlled("acquire", monkeypatch)
    waiting = asyncio.create_task(leases.lease("work").acquire(wait_s=DEADLINE_S))
    await deciding.once_more("asked", times=3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not await is_free(leases)
    await held.release()
    assert await is_free(leases)


@pytest.mark.parametrize("steps", range(1, 12))
async def test_a_release_gives_back_whenever_it_is_cancelled(leases: Leases, steps: int) -> None:
    """From its first step on: a task that is cancelled before it begins does nothing at all."""
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    releasing = asyncio.create_task(lease.release())
    await after_steps(steps)
    releasing.cancel()
    await asyncio.wait({releasing})
    assert await is_free(leases, DEADLINE_S)


# -- a store that cannot be written ------------------------------------------------------------------------------------


async def test_a_lease_is_given_back_as_soon_as_the_store_can_be_written_again(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    releasing = controlled("release", monkeypatch)
    releasing.failure = UNWRITABLE
    await lease.release()
    await releasing.once_more("failed", times=3)
    assert not await is_free(leases)
    releasing.failure = None
    assert await is_free(leases, DEADLINE_S)


async def test_a_store_that_does_not_answer_holds_up_nobody_who_gives_back(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leases.GIVE_BACK_S", 0.01)
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    releasing = controlled("release", monkeypatch)
    releasing.may_begin.clear()
    async with asyncio.timeout(DEADLINE_S):
        await lease.release()
    assert (releasing.asked, releasing.done) == (1, 0)
    releasing.may_begin.set()
    assert await is_free(leases, DEADLINE_S)


async def test_a_lease_that_could_not_be_renewed_is_tried_again_soon(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leases.RENEW_AGAIN_S", 0.001)
    renewing = controlled("renew", monkeypatch)
    renewing.failure = UNWRITABLE
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    await renewing.once_more("failed")
    monkeypatch.setattr("leases.RENEW_EVERY_S", 10 * DEADLINE_S)
    await renewing.once_more("failed", times=3)
    await lease.release()


async def test_a_lease_that_has_run_out_is_not_given_back_any_more(
    leases: Leases, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    releasing = controlled("release", monkeypatch)
    releasing.failure = UNWRITABLE
    await lease.release()
    await releasing.once_more("failed")
    clock.now += LEASE_S
    await no_task_is_left()
    releasing.failure = None
    assert await is_free(leases)


async def test_closing_ends_what_could_not_be_given_back(leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    releasing = controlled("release", monkeypatch)
    releasing.failure = UNWRITABLE
    await lease.release()
    await releasing.once_more("failed")
    async with asyncio.timeout(DEADLINE_S):
        await leases.close()
    await no_task_is_left()
    assert releasing.done == 0


async def test_a_lease_that_could_not_be_renewed_is_renewed_again_and_stays_held(
    leases: Leases, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewing = controlled("renew", monkeypatch)
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    renewing.failure = UNWRITABLE
    await renewing.once_more("failed", times=3)
    renewing.failure = None
    for _ in range(3):
        clock.now += LEASE_S * 0.75
        await renewing.once_more("done", times=2)
        assert not await is_free(leases)
    await lease.release()
    assert await is_free(leases)


# -- the end of a lease ------------------------------------------------------------------------------------------------


async def test_a_lease_that_was_lost_is_not_renewed_any_more(leases: Leases) -> None:
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    await leases.store.release(lease.lock)
    await no_task_is_left()
    await lease.release()


async def test_a_lease_that_was_given_back_is_not_renewed_any_more(
    leases: Leases, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewing = controlled("renew", monkeypatch)
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    await renewing.once_more("done")
    await lease.was_given_back()
    await no_task_is_left()
    clock.now += LEASE_S
    assert await is_free(leases)


async def test_a_lease_that_was_given_back_is_not_given_back_again(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    releasing = controlled("release", monkeypatch)
    lease = leases.lease("work")
    await lease.acquire(wait_s=0)
    await lease.was_given_back()
    await lease.release()
    assert releasing.asked == 0
