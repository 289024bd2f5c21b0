"""What several processes on one PostgreSQL carry, as one JSON line: `bench/replicas.py --backend-port P --rounds N`.

The same turns on one process with a file, one on a database, and three on another one, whose chains hop between them
with every turn: how many a second, and what they cost the processes and the database. The database keeps what it has
said was kept, as in production. It counts the statements itself: each that it parses or carries out for a process.
`--url` names a server, whose log and clocks cannot be read: what is told then is less.
"""

import argparse
import asyncio
import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.run import BENCH, Server, free_port, listening, printed, serving
from tests.postgres_program import Server as Program
from tests.postgres_program import programs, started

# What is said to be kept has to survive the loss of power.
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
OPTIONS = {
    **DURABLE,
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "listen_addresses": "",
    "log_line_prefix": "%a|",
}
EACH_STATEMENT = "log_min_duration_statement"
# Of one that a process has sent: in a round trip of its own it is parsed, once for a connection, or carried out.
STATEMENT = re.compile(rb"^responses-proxy\|LOG:  duration: \S+ ms  (?:statement|parse|execute)\b", re.MULTILINE)
REPLICAS = 3
AT_ONCE, TURNS = 200, 600
# Long chains, so that their first turns do not count.
COUNTED_AT_ONCE, COUNTED_TURNS = 8, 400
IDLE_S = 6.0
TICKS_A_S = os.sysconf("SC_CLK_TCK")
# Name -> flags of `bench/load.py`; `{store}` is where it sees which runs have ended.
KINDS: dict[str, tuple[str, ...]] = {
    "not stored": ("--mode", "plain", "--keep", "nothing"),
    "first": ("--mode", "plain", "--keep", "turns"),
    "chained": ("--mode", "plain", "--keep", "chains"),
    "chained, streamed": ("--mode", "stream", "--keep", "chains"),
    "background": ("--mode", "plain", "--keep", "turns", "--background", "--store", "{store}"),
}


class Database:
    """A server of PostgreSQL, and what it says of itself when it is our own."""

    def __init__(self, url: str, program: Program | None) -> None:
        self.url = url
        self.program = program

    def cpu_s(self) -> float:
        """Of all its processes, those that have ended included."""
        if self.program is None:
            return 0.0
        assert self.program.process
        pid = self.program.process.pid
        ended = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[13:15]))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return ended / TICKS_A_S + sum(cpu_clock_s(each) for each in (pid, *map(int, children)))

    def ask(self, statement: str) -> None:
        async def asked() -> None:
            connection = await asyncpg.connect(self.url)
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(asked())

    @contextmanager
    def schema(self, name: str) -> Iterator[str]:
        """The address of a store of its own."""
        self.ask(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        self.ask(f"CREATE SCHEMA {name}")
        try:
            yield f"{self.url}{'&' if '?' in self.url else '?'}search_path={name}"
        finally:
            self.ask(f"DROP SCHEMA {name} CASCADE")

    @contextmanager
    def counting(self) -> Iterator[Callable[[], int]]:
        """How many statements have come since, by the server's own log."""
        assert self.program
        self._log_each("0")
        log, start = self.program.log, self.program.log.stat().st_size
        try:
            yield lambda: len(STATEMENT.findall(log.read_bytes()[start:]))
        finally:
            self._log_each("-1")

    def _log_each(self, from_ms: str) -> None:
        self.ask(f"ALTER SYSTEM SET {EACH_STATEMENT} = {from_ms}")
        self.ask("SELECT pg_reload_conf()")
        time.sleep(0.5)  # each backend reads it before its next statement


def cpu_clock_s(pid: int) -> float:
    """Nothing of one that has just ended."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


@contextmanager
def running(url: str | None) -> Iterator[Database]:
    if url:
        yield Database(url, None)
        return
    folder = programs()
    assert folder
    program = started(folder, OPTIONS)
    try:
        yield Database(program.url, program)
    finally:
        program.close()


@dataclass(frozen=True)
class Stand:
    """Some processes on one store."""

    servers: Sequence[Server]
    store: str

    def cpu_s(self) -> float:
        return sum(server.cpu_s() for server in self.servers)

    def work(self, kind: str, turns: int, at_once: int) -> float:
        """Sends so many turns to all of them; how many seconds that took."""
        flags = [flag.format(store=self.store) for flag in KINDS[kind]]
        ports = ",".join(str(server.port) for server in self.servers)
        counts = ["--port", ports, "--count", str(turns), "--concurrency", str(at_once)]
        seen = printed([sys.executable, str(BENCH / "load.py"), *counts, *flags])
        if seen["failed"]:
            raise SystemExit(f"{kind}: failed requests: {seen}")
        return float(seen["took_s"])


@contextmanager
def stand_on(url: str, backend_port: int, replicas: int, **settings: str) -> Iterator[Stand]:
    """Processes that share a database."""
    keys = {"SEALING__KEYS": base64.b64encode(bytes(32)).decode(), **settings}
    command = ["proxy.py", "--upstream", f"http://127.0.0.1:{backend_port}/v1", "--store", url]
    with ExitStack() as stack:
        servers = []
        for number in range(replicas):
            port = free_port()
            process = stack.enter_context(listening(command, port, "/healthz", keys))
            servers.append(Server(f"replica {number}", port, process, url))
        yield Stand(servers, url)


def round_of(database: Database, stand: Stand, kind: str) -> dict[str, float]:
    proxy_s, database_s = stand.cpu_s(), database.cpu_s()
    took_s = stand.work(kind, TURNS, AT_ONCE)
    spent = {"proxy_us": stand.cpu_s() - proxy_s, "database_us": database.cpu_s() - database_s}
    return {"per_s": TURNS / took_s, **{name: seconds * 1e6 / TURNS for name, seconds in spent.items()}}


def compared(database: Database, stands: dict[str, Stand], rounds: int) -> dict[str, dict[str, Any]]:
    """Kind -> stand -> its rounds; who goes first alternates, and the first round warms up."""
    seen: dict[str, dict[str, Any]] = {kind: {name: [] for name in stands} for kind in KINDS}
    for turn in range(rounds + 1):
        for kind in KINDS:
            for name in list(stands)[:: 1 if turn % 2 else -1]:
                found = round_of(database, stands[name], kind)
                if turn:
                    seen[kind][name].append(found)
    return seen


def statements(database: Database, stand: Stand) -> dict[str, float]:
    """For each turn of a kind, and for each process and second that is idle."""
    if database.program is None:
        return {}
    found: dict[str, float] = {}
    with database.counting() as count:
        for kind in KINDS:
            before = count()
            stand.work(kind, COUNTED_TURNS, COUNTED_AT_ONCE)
            found[kind] = (count() - before) / COUNTED_TURNS
        before = count()
        time.sleep(IDLE_S)
        found["idle"] = (count() - before) / IDLE_S / len(stand.servers)
    return found


def measured(given: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        database = stack.enter_context(running(given.url))
        alone = stack.enter_context(database.schema("bench_one"))
        shared = stack.enter_context(database.schema("bench_three"))
        stands = {
            "file": Stand([server := stack.enter_context(serving("proxy", given.backend_port))], server.store),
            "one": stack.enter_context(stand_on(alone, given.backend_port, 1)),
            "three": stack.enter_context(stand_on(shared, given.backend_port, REPLICAS)),
        }
        rounds = compared(database, stands, given.rounds)
        return {"rounds": rounds, "statements": statements(database, stands["three"])}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--backend-port", type=int, required=True)
    flags.add_argument("--rounds", type=int, required=True)
    flags.add_argument("--url", help="of a PostgreSQL that runs already")
    given = flags.parse_args()
    if not given.url and programs() is None:
        print(orjson.dumps({}).decode())
        return
    print(orjson.dumps(measured(given)).decode())


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"the load generator failed: {error}")
