"""Whether the database answers: who asks while it does not, how long the others wait, and what the log is told.

May not know statements or connections. Each change is one line in the log, and a reason that comes again and again is
told once in a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable

from errors import StoreError
from postgres_errors import refusal

log = logging.getLogger("responses_proxy.store")

# How long who comes waits for a database that is known to be away.
GRACE_S = 2.0
# How long it is between two tries at first, and at most; a part of that, so that many processes do not come at once.
PAUSE_S, PAUSE_MAX_S = 0.1, 1.0
TELL_AGAIN_S = 10.0

Chance = Callable[[], float]


class Presence:
    """While the database is away one asks at a time; the others wait for that one, or are refused."""

    def __init__(self, chance: Chance) -> None:
        """`chance`: from 0 to below 1, anew at each call."""
        self._chance = chance
        self._reason: str | None = None
        self._away_since = self._next_at = 0.0
        self._pause_s = PAUSE_S
        self._has_scout = self._is_told = self._is_known = False
        self._change = asyncio.Event()
        self._told_at: dict[str, float] = {}

    @property
    def is_away(self) -> bool:
        return self._reason is not None

    async def admitted(self, until_at: float) -> bool:
        """Whether the caller is the one who asks, and has to say `scouted`; False: the database answers.

        Raises: StoreError when it does not until then.
        """
        now = asyncio.get_running_loop().time
        while self._reason is not None:
            if not self._has_scout and now() >= self._next_at:
                self._has_scout = True
                return True
            if now() >= until_at:
                raise self.told(refusal(self._reason))
            look_at = until_at if self._has_scout else min(until_at, self._next_at)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at):
                    await self._change.wait()
        return False

    def scouted(self) -> None:
        """Whatever came of it: another one may ask, after a pause if the database is away still."""
        self._has_scout = False
        if self._reason is not None:
            now = asyncio.get_running_loop().time()
            self._next_at = now + self._pause_s * (0.5 + self._chance() / 2)
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        self._tell_waiting()

    def answered(self) -> None:
        self._is_known = True
        if self._reason is None:
            return
        if self._is_told:
            log.info("the database answers again, after %.1f s", asyncio.get_running_loop().time() - self._away_since)
        self._reason, self._is_told = None, False
        self._pause_s = PAUSE_S
        self._tell_waiting()

    def missed(self, reason: str) -> None:
        if self._reason is None:
            self._away_since = self._next_at = asyncio.get_running_loop().time()
        self._reason = reason
        self._is_told |= self.tell(reason)

    def tell(self, reason: str) -> bool:
        """To the log, unless it was told so a moment ago, or has never answered: then who opens it tells."""
        if not self._is_known:
            return False
        now = asyncio.get_running_loop().time()
        if now - self._told_at.get(reason, -math.inf) < TELL_AGAIN_S:
            return False
        self._told_at[reason] = now
        log.warning("the database %s", reason)
        return True

    @staticmethod
    def told(error: StoreError) -> StoreError:
        """Who logs the error itself need not disturb anybody."""
        error.log_level = logging.DEBUG
        return error

    def _tell_waiting(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
