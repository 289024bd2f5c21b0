"""A PostgreSQL for tests: the one that `PG_URL` names, or one from the package pgserver, started once for all tests.

Each test has the same schema to itself, emptied before it begins: to make one takes ten times as long.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import asyncpg
import pytest
from postgres_program import Server, programs

from postgres_tables import TABLES
from store import StoreSettings
from store_postgres import open_store

T = TypeVar("T")

# Nothing has to survive the end of the tests. What a vacuum does by itself would be a write that no test has made.
OPTIONS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "listen_addresses": "",
    "deadlock_timeout": "100ms",
}
# What is left to do when all tests have ended.
ENDS: list[Callable[[], None]] = []


def end() -> None:
    while ENDS:
        ENDS.pop()()


@cache
def postgres_url() -> str:
    """The schema of this process of tests, with its tables; empty when nobody else uses it."""
    server = os.environ.get("PG_URL") or _started()
    schema = f"tests_{os.getpid()}"
    url = f"{server}{'&' if '?' in server else '?'}search_path={schema}"
    _ask(server, f"DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}")
    ENDS.append(partial(_ask, server, f"DROP SCHEMA {schema} CASCADE"))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, _open(url)).result()
    return url


def emptied() -> str:
    """The address of a store with nothing in it. Skips the test where there is no server.

    What a process that was killed had begun to write, the server may still carry out: that is waited for.
    """
    url = postgres_url()
    lock = f"LOCK TABLE {', '.join(TABLES)}"
    _cleaner(url).do("; ".join([lock, *(f"DELETE FROM {table}" for table in reversed(TABLES))]))
    return url


@cache
def _cleaner(url: str) -> Beside:
    """One connection for all tests."""
    beside = Beside(url)
    ENDS.append(beside.close)
    return beside


class Beside:
    """A connection beside the store, on a loop and a thread of its own, so that it can be asked without awaiting."""

    def __init__(self, url: str) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._runner = asyncio.Runner()
        try:
            self._connection = self._run(asyncpg.connect(url))
        except BaseException:
            self._close_loop()
            raise

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._thread.submit(self._runner.run, work).result()

    def do(self, statements: str) -> None:
        self._run(self._connection.execute(statements))

    def asked(self, query: str, *values: Any) -> list[Any]:
        return [tuple(row) for row in self._run(self._connection.fetch(query, *values))]

    def close(self) -> None:
        self._run(self._connection.close())
        self._close_loop()

    def _close_loop(self) -> None:
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()


async def _open(url: str) -> None:
    await (await open_store(StoreSettings(path=url))).close()


def _ask(url: str, statements: str) -> None:
    beside = Beside(url)
    try:
        beside.do(statements)
    finally:
        beside.close()


# -- the server of the package -----------------------------------------------------------------------------------------


def server_with(options: Mapping[str, str]) -> Server:
    """One on data of its own, which is still to be started. `close` it. Skips the test where there are no programs."""
    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL: PG_URL is not set, and the package pgserver has no wheel for this platform")
    return Server(folder, options)


def _started() -> str:
    server = server_with(OPTIONS)
    ENDS.append(server.close)
    server.start()
    return server.url
