"""A look at something far away that is made beside requests: none of them waits for it for long.

May not know what is looked at.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

# How long a request waits for a look that is under way.
LOOK_WAIT_S = 0.1


class Look:
    """Made anew in a task of its own when it is old enough; `make` must not raise."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._make = make
        self._task: asyncio.Task[None] | None = None
        self._began_at = -math.inf

    def begun(self) -> None:
        """Notes that what is looked at is being seen now, whoever looks."""
        self._began_at = asyncio.get_running_loop().time()

    def again(self, pause_s: float) -> None:
        """Looks, unless a look is under way or the last one began less than that long ago."""
        age_s = asyncio.get_running_loop().time() - self._began_at
        if age_s >= pause_s and (self._task is None or self._task.done()):
            self.begun()
            self._task = asyncio.create_task(self._make())

    async def wait(self, wait_s: float = LOOK_WAIT_S) -> None:
        """Until the look has been made, but not for longer than that after it began."""
        if self._task is not None:
            age_s = asyncio.get_running_loop().time() - self._began_at
            await asyncio.wait({self._task}, timeout=max(0.0, wait_s - age_s))

    async def close(self) -> None:
        """Ends a look that is still under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
