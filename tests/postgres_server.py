"""A PostgreSQL for tests: the one that `PG_URL` names, or one from the package pgserver, started once for all tests.

Each test has the same schema to itself, emptied before it begins: to make one takes ten times as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
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
    """The address of a store with nothing in it. Skips the test where there is no server."""
    url = postgres_url()
    _cleaner(url).do("; ".join(f"DELETE FROM {table}" for table in reversed(TABLES)))
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

    def asked(self, query: str) -> list[Any]:
        return [tuple(row) for row in self._run(self._connection.fetch(query))]

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


class Server:
    """A PostgreSQL of one's own, which can be stopped, killed, frozen, and started again on the same data."""

    def __init__(self, **options: str) -> None:
        """Skips the test where there are no programs for it. It serves loopback too, when it is given a `port`."""
        spec = importlib.util.find_spec("pgserver")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("no PostgreSQL: PG_URL is not set, and the package pgserver has no wheel for this platform")
        self._programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of a socket may have 107 bytes
        self._as_user: dict[str, Any] = {}
        if os.name == "posix" and os.geteuid() == 0:
            self._as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            os.chown(self.folder, NOBODY, NOBODY)
        self._options = {**OPTIONS, "unix_socket_directories": str(self.folder), **options}
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = int(options.get("port", 0))
        self.url = f"postgresql://postgres@/postgres?host={quote(str(self.folder))}"
        if self.port:
            self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        init = [self._programs / "initdb", "-D", self._data, "-U", "postgres", "--encoding=utf8", "--no-sync", "-N"]
        init = [*init, "--auth=trust"]
        subprocess.run(init, check=True, capture_output=True, cwd=self.folder, timeout=50, **self._as_user)

    def start(self) -> None:
        """Returns when it answers."""
        self.begin()
        _wait_for(self.url, self.folder / "log")

    def begin(self) -> None:
        options = [f"-c{name}={value}" for name, value in self._options.items()]
        command = [self._programs / "postgres", "-D", self._data, *options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._as_user)

    def stop(self) -> None:
        """In order: open connections are told, what has begun is rolled back."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """As the end of its machine: no process of it says a word more."""
        self._tell_all(signal.SIGKILL)
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """The system goes on to accept connections for it, and nobody answers them."""
        self._tell_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._tell_all(signal.SIGCONT)

    def restore(self) -> None:
        """As `start` leaves it, whatever was done to it."""
        self.thaw()
        if self._process is None:
            self.start()

    def do(self, statements: str) -> None:
        """In a session beside everybody else's."""
        _ask(self.url, statements)

    def _tell_all(self, what: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(process, what)

    def _processes(self) -> list[int]:
        """The first of them, which makes the others, comes first."""
        if self._process is None or self._process.poll() is not None:
            return []
        main = self._process.pid
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        return [main, *map(int, children)]

    def _end(self, by: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(by)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        if self._process is not None:
            self.thaw()
        self._end(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


def _started() -> str:
    server = Server()
    ENDS.append(server.close)
    server.start()
    return server.url


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
