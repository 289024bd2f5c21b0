"""A PostgreSQL of the package pgserver, for tests and measurements: only the programs of the package are used.

May not know what it is started for: who starts it says with which options, and ends it.
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
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg  # type: ignore[import-untyped]

# PostgreSQL refuses to run as root.
NOBODY = 65534
START_LIMIT_S = 20.0
ASK_AGAIN_S = 0.02


def programs() -> Path | None:
    """Where the programs are; None where the package has no wheel."""
    spec = importlib.util.find_spec("pgserver")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


class Server:
    """On a socket in a new folder, and on loopback where `port` is an option. `close` it.

    It may be stopped, killed, frozen, and started again on the same data. What `options` do not say is as PostgreSQL
    has it, so that what was committed survives whatever end it takes.
    """

    def __init__(self, folder_of_programs: Path, options: Mapping[str, str]) -> None:
        self._programs = folder_of_programs
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of a socket may have 107 bytes
        self._as_user: dict[str, Any] = {}
        if os.name == "posix" and os.geteuid() == 0:
            self._as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            os.chown(self.folder, NOBODY, NOBODY)
        given = {**options, "unix_socket_directories": str(self.folder)}
        self._options = [f"-c{name}={value}" for name, value in given.items()]
        self._data = self.folder / "data"
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = int(options.get("port", 0))
        self.url = f"postgresql://postgres@/postgres?host={quote(str(self.folder))}"
        if self.port:
            self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        init = [
            str(self._programs / "initdb"),
            "-D",
            str(self._data),
            "-U",
            "postgres",
            "--encoding=utf8",
            "--no-sync",
            "-N",
        ]
        init = [*init, "--no-sync", "-N", "--auth=trust"]
        subprocess.run(init, check=True, capture_output=True, cwd=self.folder, timeout=50, **self._as_user)

    def start(self) -> None:
        """Returns when it answers. Raises: AssertionError with its log, when it does not."""
        give_up_at = time.monotonic() + START_LIMIT_S
        while True:
            self.begin()
            if self._answers(give_up_at):
                return
            if time.monotonic() > give_up_at:
                raise AssertionError(self.log.read_text())
            time.sleep(ASK_AGAIN_S)

    def begin(self) -> None:
        """Does not wait until it answers."""
        command = [str(self._programs / "postgres"), "-D", str(self._data), *self._options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._as_user)

    def _answers(self, give_up_at: float) -> bool:
        """False for one that ended: processes of the one before it may have the memory still."""
        with ThreadPoolExecutor(1) as thread:  # there may be a loop in this one
            return thread.submit(asyncio.run, self._answers_soon(give_up_at)).result()

    async def _answers_soon(self, give_up_at: float) -> bool:
        while self.process is not None and self.process.poll() is None and time.monotonic() < give_up_at:
            with contextlib.suppress(OSError, asyncpg.CannotConnectNowError):
                await (await asyncpg.connect(self.url)).close()
                return True
            await asyncio.sleep(ASK_AGAIN_S)
        return False

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: in order; SIGQUIT: at once; SIGKILL: only its first process, the others notice."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """As the end of its machine: no process of it says a word more."""
        self._send(signal.SIGKILL)
        self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """The system goes on to accept connections for it, and nobody answers them."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def restore(self) -> None:
        """As `start` leaves it, whatever was done to it."""
        self.thaw()
        if self.process is None:
            self.start()

    def do(self, statements: str) -> None:
        """In a session beside everybody else's."""
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, self._do(statements)).result()

    async def _do(self, statements: str) -> None:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statements)
        finally:
            await connection.close()

    def _send(self, number: int) -> None:
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _processes(self) -> list[int]:
        """The first of them, which makes the others, comes first."""
        if self.process is None or self.process.poll() is not None:
            return []
        main = self.process.pid
        return [main, *map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())]

    def close(self) -> None:
        """Nothing is left of it."""
        self.thaw()
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


def started(folder_of_programs: Path, options: Mapping[str, str]) -> Server:
    """Raises: AssertionError with its log, when it does not answer."""
    server = Server(folder_of_programs, options)
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server
