"""How long an answer may be silent, and how long it may take in all: a look now and then, not a timer for each read.

May not know what an answer says. The clock is the loop's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import NamedTuple

# Looks are not closer together than this.
TIMER_STEP_S = 0.01


class StreamLimits(NamedTuple):
    """Whose answer it is, and how long it may take to its first chunk, between two, and in all."""

    name: str
    first_byte_timeout_s: float
    idle_timeout_s: float
    total_timeout_s: float


class Silence:
    """Watches one answer, and calls `stop` when it takes too long. `end` it; comments do not count as an answer."""

    def __init__(self, limits: StreamLimits, first_s: float, stop: Callable[[], None]) -> None:
        """`first_s`: how long the first thing may take."""
        self._limits = limits
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._total_ends_at = self._heard_at + limits.total_timeout_s
        self._silence_s = first_s
        # What took too long, once something did.
        self.verdict: str | None = None
        self._timer = self._next_look()

    def heard(self) -> None:
        self._heard_at, self._silence_s = self._loop.time(), self._limits.idle_timeout_s

    def pause(self) -> None:
        """Nothing is awaited, until something is heard again."""
        self._heard_at = math.inf

    def _ends_at(self) -> float:
        return min(self._total_ends_at, self._heard_at + self._silence_s)

    def _next_look(self) -> asyncio.TimerHandle:
        """Not later than `idle_timeout_s`, which may have begun to count by then."""
        now = self._loop.time()
        next_at = min(self._ends_at(), now + self._limits.idle_timeout_s)
        return self._loop.call_at(max(next_at, now + TIMER_STEP_S), self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if now < self._ends_at():
            self._timer = self._next_look()
            return
        total = f"ran for {self._limits.total_timeout_s:g} s"
        self.verdict = total if now >= self._total_ends_at else f"sent nothing for {self._silence_s:g} s"
        self._stop()

    def end(self) -> None:
        self._timer.cancel()
