"""Calls that come while an earlier one is being made, and are made as one after it.

May not know what is called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Given = TypeVar("Given")
T = TypeVar("T")


class Together(Generic[Given, T]):
    """Asks for all who have come by then; it goes on for the others when one of them leaves. `close` it."""

    def __init__(self, ask: Callable[[list[Given]], Awaitable[list[T]]]) -> None:
        """`ask`: an answer for each that is given, in their order."""
        self._ask = ask
        # Those who are asked for next.
        self._group: list[Given] | None = None
        self._asking: asyncio.Task[list[T]] | None = None

    async def call(self, given: Given) -> T:
        """Raises: what the asking raises."""
        if self._group is None:
            self._group = []
            self._asking = asyncio.create_task(self._asked(self._group, self._asking))
            self._asking.add_done_callback(_retrieve)
        group, asking = self._group, self._asking
        assert asking is not None
        group.append(given)
        place = len(group) - 1
        return (await asyncio.shield(asking))[place]

    async def close(self) -> None:
        """Waits for what is being asked."""
        if self._asking is not None:
            await asyncio.wait({self._asking})

    async def _asked(self, group: list[Given], before: asyncio.Task[list[T]] | None) -> list[T]:
        if before is not None:
            await asyncio.wait({before})
        self._group = None
        return await self._ask(group)


def _retrieve(asking: asyncio.Task[list[T]]) -> None:
    """All who asked may have left."""
    if not asking.cancelled():
        asking.exception()
