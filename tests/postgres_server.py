"""A PostgreSQL for tests: the one that `PG_URL` names, or one from the package pgserver, started once for all tests.

Each test has the same schema to itself, emptied before it begins: to make one takes ten times as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import asyncpg
import pytest

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
# PostgreSQL refuses to run as root.
NOBODY = 65534
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


def _started() -> str:
    spec = importlib.util.find_spec("pgserver")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no PostgreSQL: PG_URL is not set, and the package pgserver has no wheel for this platform")
    programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of a socket may have 107 bytes
    as_user: dict[str, Any] = {}
    if os.name == "posix" and os.geteuid() == 0:
        as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        os.chown(folder, NOBODY, NOBODY)
    data = folder / "data"
    init = [programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--encoding=utf8", "--no-sync", "-N"]
    subprocess.run(init, check=True, capture_output=True, cwd=folder, timeout=50, **as_user)
    options = [f"-c{name}={value}" for name, value in {**OPTIONS, "unix_socket_directories": str(folder)}.items()]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=folder, **as_user
        )
    ENDS.append(partial(_stop, server, folder))
    url = f"postgresql://postgres@/postgres?host={quote(str(folder))}"
    _wait_for(url, folder / "log")
    return url


def _wait_for(url: str, log: Path) -> None:
    for _ in _until(20.0):
        with contextlib.suppress(OSError, asyncpg.CannotConnectNowError):
            _ask(url, "SELECT 1")
            return
    raise AssertionError(log.read_text())


def _until(seconds: float) -> Iterator[None]:
    wait = threading.Event()
    for _ in range(int(seconds / 0.02)):
        yield
        wait.wait(0.02)


def _stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    shutil.rmtree(folder, ignore_errors=True)
