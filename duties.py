"""What one process does for all that share a store: held under a lease, so that another one takes it over.

May not know what is done. Done twice it does no harm: a process that was stopped for a while may still be at it.
"""

from __future__ import annotations

import math

from sources import Sources
from verbs import Lock, Store


class Duty:
    """One duty, and whether it is this process's. `give_up` when the process stops."""

    def __init__(self, store: Store, sources: Sources, name: str, lasts_s: float) -> None:
        """Another process has it `lasts_s` after the last one that held it was seen, at one and a half times that."""
        self._store = store
        self._clock = sources.clock
        self._lock = Lock(f"duty {name}", sources.new_id("duty"))
        self._lasts_s = lasts_s
        self._is_ours = False
        self._asked_at = -math.inf

    async def is_ours(self) -> bool:
        """Asked for as often as one likes: the store is asked twice in the time of the lease. Raises: StoreError."""
        now = self._clock()
        if abs(now - self._asked_at) >= self._lasts_s / 2:
            self._is_ours = await self._store.acquire(self._lock, now, now + self._lasts_s)
            self._asked_at = now
        return self._is_ours

    async def give_up(self) -> None:
        """Lets another one have it at once. Raises: StoreError."""
        if self._is_ours:
            self._is_ours, self._asked_at = False, -math.inf
            await self._store.release(self._lock)
