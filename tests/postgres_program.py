"""A PostgreSQL of the package pgserver, for tests and measurements: only the programs of the package are used.

May not know what it is started for: who starts it says with which options, and ends it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import asyncpg  # type: ignore[import-untyped]

# PostgreSQL refuses to run as root.
NOBODY = 65534
START_LIMIT_S = 20.0


class Program(NamedTuple):
    """One that answers. `stop` it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """Nothing is left of it."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.log.parent, ignore_errors=True)


def programs() -> Path | None:
    """Where the programs are; None where the package has no wheel."""
    spec = importlib.util.find_spec("pgserver")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def started(folder_of_programs: Path, options: dict[str, str]) -> Program:
    """On a socket in a new folder. Raises: AssertionError with its log, when it does not answer."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of a socket may have 107 bytes
    as_user: dict[str, Any] = {}
    if os.name == "posix" and os.geteuid() == 0:
        as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        os.chown(folder, NOBODY, NOBODY)
    data = folder / "data"
    init = [str(folder_of_programs / "initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=utf8"]
    subprocess.run([*init, "--no-sync", "-N"], check=True, capture_output=True, cwd=folder, timeout=50, **as_user)
    flags = [f"-c{name}={value}" for name, value in {**options, "unix_socket_directories": str(folder)}.items()]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [folder_of_programs / "postgres", "-D", data, *flags], stdout=log, stderr=log, cwd=folder, **as_user
        )
    program = Program(f"postgresql://postgres@/postgres?host={quote(str(folder))}", server, folder / "log")
    try:
        asyncio.run(_answers(program))
    except BaseException:
        program.stop()
        raise
    return program


async def _answers(program: Program) -> None:
    give_up_at = time.monotonic() + START_LIMIT_S
    while True:
        try:
            await (await asyncpg.connect(program.url)).close()
            return
        except (OSError, asyncpg.CannotConnectNowError):
            if time.monotonic() > give_up_at or program.process.poll() is not None:
                raise AssertionError(program.log.read_text()) from None
        await asyncio.sleep(0.02)
