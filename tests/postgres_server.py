"""A PostgreSQL for tests: the one that `PG_URL` names, or one from the package pgserver, started once for all tests.

Each test has the same schema to itself, emptied before it begins: to make one takes ten times as long.
"""

from __future__ import annotations

import asyncio
import os
<<<<<<< HEAD
from collections.abc import Callable, Coroutine
=======
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
>>>>>>> wt-fleet
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import asyncpg
import pytest
from postgres_program import programs, started

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


def _started() -> str:
<<<<<<< HEAD
    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL: PG_URL is not set, and the package pgserver has no wheel for this platform")
    with ThreadPoolExecutor(1) as thread:
        program = thread.submit(started, folder, OPTIONS).result()
    ENDS.append(program.stop)
    return program.url
=======
    server = Server(OPTIONS)
    ENDS.append(server.close)
    server.start()
    return server.url


class Server:
    """A PostgreSQL on data of its own, which may be stopped and started again. `close` it. Skips the test without one.

    What `options` do not say is as PostgreSQL has it, so that what was committed survives whatever end it takes.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        spec = importlib.util.find_spec("pgserver")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("no PostgreSQL: PG_URL is not set, and the package pgserver has no wheel for this platform")
        self._programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of a socket may have 107 bytes
        self._as_user: dict[str, Any] = {}
        if os.name == "posix" and os.geteuid() == 0:
            self._as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            os.chown(self._folder, NOBODY, NOBODY)
        given = {**options, "unix_socket_directories": str(self._folder)}
        self._options = [f"-c{name}={value}" for name, value in given.items()]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://postgres@/postgres?host={quote(str(self._folder))}"
        init = ["-D", self._data, "-U", "postgres", "--auth=trust", "--encoding=utf8", "--no-sync", "-N"]
        program = self._programs / "initdb"
        subprocess.run([program, *init], check=True, capture_output=True, cwd=self._folder, timeout=50, **self._as_user)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        """Until it can be asked."""
        for _ in _until(20.0):
            with (self._folder / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    [self._programs / "postgres", "-D", self._data, *self._options],
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    **self._as_user,
                )
            if self._answers(self._process):
                return
        raise AssertionError((self._folder / "log").read_text())

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        """False for one that ended: processes of the one before it may have the memory still."""
        for _ in _until(20.0):
            if process.poll() is not None:
                return False
            with contextlib.suppress(OSError, asyncpg.CannotConnectNowError):
                _ask(self.url, "SELECT 1")
                return True
        return False

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT ends it fast, SIGQUIT at once, SIGKILL as if the machine had lost it."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(20)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _until(seconds: float) -> Iterator[None]:
    wait = threading.Event()
    for _ in range(int(seconds / 0.02)):
        yield
        wait.wait(0.02)
>>>>>>> wt-fleet
