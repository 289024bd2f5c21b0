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
    _in_a_loop_of_its_own(_open(url))
    return url


def emptied() -> str:
    """The address of a store with nothing in it. Skips the test where there is no server."""
    url = postgres_url()
    _ask(url, "; ".join(f"DELETE FROM {table}" for table in reversed(TABLES)))
    return url


def rows_of(url: str, query: str) -> list[Any]:
    """What a query finds, asked beside the store."""
    return [tuple(row) for row in _in_a_loop_of_its_own(_fetch(url, query))]


async def _open(url: str) -> None:
    await (await open_store(StoreSettings(path=url))).close()


async def _fetch(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def _execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


def _ask(url: str, statements: str) -> None:
    _in_a_loop_of_its_own(_execute(url, statements))


def _in_a_loop_of_its_own(work: Coroutine[Any, Any, T]) -> T:
    """Also where a loop runs: on another thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


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
