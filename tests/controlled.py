"""Verbs of the real store that wait, or fail, for as long as a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partialmethod
from typing import Any

import pytest
from scripted import DEADLINE_S

from store import SQLiteStore
from store_postgres import PostgresStore

Work = Callable[..., Awaitable[Any]]
STORES: tuple[type[Any], ...] = (SQLiteStore, PostgresStore)


class Verb:
    """One verb of every store: it raises `failure` where there is one, and begins when `may_begin` is set."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.failure: Exception | None = None
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self.asked = self.failed = self.done = 0

    async def do(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        self._count("asked")
        await self.may_begin.wait()
        if self.failure is not None:
            self._count("failed")
            raise self.failure.with_traceback(None)  # one exception, raised again and again
        result = await work(*arguments)
        self._count("done")
        return result

    def _count(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)
        self._changed.set()

    async def once_more(self, what: str, times: int = 1) -> None:
        """Waits until it was `asked`, has `failed` or was `done` so many times more than now."""
        enough = getattr(self, what) + times
        async with asyncio.timeout(DEADLINE_S):
            while getattr(self, what) < enough:
                self._changed.clear()
                await self._changed.wait()


def controlled(name: str, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """The verb of that name, until the test has ended."""
    verb = Verb()

    async def controlled_one(work: Work, *arguments: Any) -> Any:
        return await verb.do(work, *arguments)

    replaced(name, controlled_one, monkeypatch)
    return verb


def replaced(name: str, by: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every store carry out `by` for that verb, which is given what the store itself would do."""
    for store in STORES:
        monkeypatch.setattr(store, name, partialmethod(_instead, by, getattr(store, name)))


async def _instead(store: Any, by: Callable[..., Awaitable[Any]], work: Work, *arguments: Any) -> Any:
    return await by(work, store, *arguments)
