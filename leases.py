"""The right to do something for as long as it takes: held in the store, renewed, and free again when its holder died.

May not know what the right is for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from errors import StoreError
from sources import Sources
from verbs import Lock, Store

log = logging.getLogger("responses_proxy.leases")

# What a lease of a process that died keeps others waiting, at most.
LEASE_S = 30.0
RENEW_EVERY_S = LEASE_S / 3
ASK_AGAIN_S = 0.05
RETURN_AGAIN_S = 0.1
# How soon a lease that could not be renewed is tried again, and how long a lease that is given back holds anybody up.
RENEW_AGAIN_S = 1.0
GIVE_BACK_S = 1.0


class Leases:
    """Gives leases, and gives those back that could not be given back at once. `close` it."""

    def __init__(self, store: Store, sources: Sources) -> None:
        self.store = store
        self.clock = sources.clock
        self._new_id = sources.new_id
        self._returning: set[asyncio.Task[None]] = set()

    def lease(self, name: str, holder: str | None = None) -> Lease:
        """A lease that is still to be acquired, by somebody new unless `holder` says who it is."""
        return Lease(self, Lock(name, holder or self._new_id("lease")))

    async def give_back(self, lock: Lock, after: asyncio.Future[bool] | None = None) -> None:
        """At once, or as soon as the store can be written again; it runs out by itself in the meantime.

        `after`: what has to be decided before. Who is cancelled meanwhile need not wait for it, nor does anybody for
        a store that is slow.
        """
        await asyncio.wait({self._own(self._give_back_now(lock, after))}, timeout=GIVE_BACK_S)

    def _own(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
        return task

    async def _give_back_now(self, lock: Lock, after: asyncio.Future[bool] | None) -> None:
        if after is not None:
            await asyncio.wait({after})
        try:
            await self.store.release(lock)
        except StoreError as error:
            log.log(error.log_level, "a lease could not be given back: %s", error.message)
            self._own(self._give_back_later(lock))

    async def _give_back_later(self, lock: Lock) -> None:
        gone_at = self.clock() + LEASE_S
        while self.clock() < gone_at:
            await asyncio.sleep(RETURN_AGAIN_S)
            try:
                return await self.store.release(lock)
            except StoreError:
                continue

    async def close(self) -> None:
        for task in self._returning:
            task.cancel()
        if self._returning:
            await asyncio.wait(self._returning)


class Lease:
    """One right. `acquire` it, and `release` it in every case."""

    def __init__(self, home: Leases, lock: Lock) -> None:
        self.lock = lock
        self._home = home
        self._renewing: asyncio.Task[None] | None = None

    async def acquire(self, wait_s: float) -> bool:
        """Whether it was free, or became so within `wait_s`. Raises: StoreError."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + wait_s
        while not await self._ask():
            if loop.time() >= give_up_at:
                return False
            await asyncio.sleep(ASK_AGAIN_S)
        self._renewing = asyncio.create_task(self._renew())
        return True

    async def _ask(self) -> bool:
        """Who is cancelled while the store decides gives back what it decided."""
        now = self._home.clock()
        asking = asyncio.ensure_future(self._home.store.acquire(self.lock, now, now + LEASE_S))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            await self._home.give_back(self.lock, asking)
            raise

    async def _renew(self) -> None:
        """A store that cannot be written just now is tried again; a lease that was lost is noticed at the save."""
        is_held, pause_s = True, RENEW_EVERY_S
        while is_held:
            await asyncio.sleep(pause_s)
            try:
                is_held = await self._home.store.renew(self.lock, self._home.clock() + LEASE_S)
                pause_s = RENEW_EVERY_S
            except StoreError as error:
                log.log(error.log_level, "a lease could not be renewed: %s", error.message)
                pause_s = RENEW_AGAIN_S

    async def release(self) -> None:
        renewing, self._renewing = self._renewing, None
        if renewing is None:
            return
        renewing.cancel()
        try:
            await asyncio.wait({renewing})
        finally:
            await self._home.give_back(self.lock)

    async def was_given_back(self) -> None:
        """Another write has released it; it is not renewed any more."""
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.cancel()
            await asyncio.wait({renewing})
