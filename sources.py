"""Where time and fresh ids come from: handed in, so that a test can say both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

# Random bytes of an id; they are fetched for many ids at once.
RANDOM_BYTES = 10
POOL_BYTES = RANDOM_BYTES * 256


class Ids:
    """Fresh ids: a prefix and 32 hex digits, which begin with the time, so that ids of one time stand together."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pool = b""
        self._used = 0

    def __call__(self, prefix: str) -> str:
        if self._used >= len(self._pool):
            self._pool, self._used = os.urandom(POOL_BYTES), 0
        self._used += RANDOM_BYTES
        random = self._pool[self._used - RANDOM_BYTES : self._used].hex()
        return f"{prefix}_{int(self._clock() * 1000):012x}{random}"


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a turn has its time and its ids from."""

    clock: Callable[[], float]
    new_id: Callable[[str], str]
