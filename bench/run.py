"""What the proxy costs beside a bare relay doing the same work in the same run: `bench/run.py [SECTION...]`.

Both servers get the same requests from the same load generator and backend, in alternating rounds; the ratio is the
median over the rounds. Exits 1 when a bound is broken. A full run of all sections writes RESULTS.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BENCH = Path(__file__).parent
ROOT = BENCH.parent
PROGRAMS = {"relay": "bench/relay.py", "proxy": "proxy.py"}
START_LIMIT_S = 20
LOAD_LIMIT_S = 90
WORD_CHARACTERS = 5
PER_CHUNK_BOUND = 1.6
PER_REQUEST_BOUND = 2.0


@dataclass(frozen=True)
class Plan:
    """How much is sent; counts are per round and server. Many short rounds: on shared cores noise comes in spells."""

    rounds: int
    paced_streams: int
    free_streams: int
    plain_requests: int
    first_events: int
    idle_rounds: int
    idle_streams: int = 200


FULL = Plan(rounds=15, paced_streams=8, free_streams=16, plain_requests=600, first_events=40, idle_rounds=3)
QUICK = Plan(rounds=5, paced_streams=8, free_streams=16, plain_requests=600, first_events=40, idle_rounds=1)


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """User and system time of the whole process so far, from its CPU clock (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def rss_kb(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])


@dataclass(frozen=True)
class Row:
    """One line of the table; a measure without a counterpart in the relay has neither `relay` nor `ratios`."""

    what: str
    unit: str
    proxy: float
    relay: float | None = None
    ratios: tuple[float, ...] = ()
    bound: float | None = None

    def broken(self) -> bool:
        return self.bound is not None and statistics.median(self.ratios) > self.bound

    def cells(self) -> list[str]:
        relay = "-" if self.relay is None else number(self.relay)
        ratio = f"**{statistics.median(self.ratios):.2f}**" if self.ratios else "-"
        rounds = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}" if self.ratios else "-"
        bound = "-" if self.bound is None else f"{self.bound} {'broken' if self.broken() else 'held'}"
        return [self.what, ratio, rounds, bound, number(self.proxy), relay, self.unit]


@dataclass(frozen=True)
class Bench:
    plan: Plan
    backend_port: int
    relay: Server
    proxy: Server

    def script(self, *, chunks: int, interval_ms: float = 0, silent: bool = False) -> None:
        query = f"chunks={chunks}&interval_ms={interval_ms}&silent={int(silent)}"
        fetch(f"http://127.0.0.1:{self.backend_port}/script?{query}", b"")

    def compare(self, measure: Callable[[Server], float], rounds: int) -> tuple[float, float, tuple[float, ...]]:
        """Median of the proxy, median of the relay, and the ratio of each round; who goes first alternates."""
        pairs: list[tuple[float, float]] = []
        for turn in range(rounds):
            first, second = (self.proxy, self.relay) if turn % 2 else (self.relay, self.proxy)
            values = (measure(first), measure(second))
            pairs.append(values if turn % 2 else values[::-1])
        proxy, relay = zip(*pairs, strict=True)
        return statistics.median(proxy), statistics.median(relay), tuple(p / r for p, r in pairs)

    def row(self, what: str, unit: str, measure: Callable[[Server], float], bound: float | None = None) -> Row:
        return Row(what, unit, *self.compare(measure, self.plan.rounds), bound)


def paced(bench: Bench) -> list[Row]:
    bench.script(chunks=200, interval_ms=5)
    what = "CPU per relayed chunk, 8 streams, a chunk per 5 ms"
    return [bench.row(what, "µs", cpu_per_chunk(bench.plan.paced_streams, 200), PER_CHUNK_BOUND)]


def free(bench: Bench) -> list[Row]:
    bench.script(chunks=1000)
    what = "CPU per relayed chunk, 8 streams, as fast as they go"
    return [bench.row(what, "µs", cpu_per_chunk(bench.plan.free_streams, 1000))]


def cpu_per_chunk(streams: int, chunks: int) -> Callable[[Server], float]:
    def measure(server: Server) -> float:
        before = server.cpu_s()
        seen = load(server, "stream", streams, 8)
        spent_s = server.cpu_s() - before
        if seen["characters"] != streams * chunks * WORD_CHARACTERS:
            raise SystemExit(f"{server.name} lost text: {seen}")
        return spent_s * 1e6 / (streams * chunks)

    return measure


def plain(bench: Bench) -> list[Row]:
    count = bench.plan.plain_requests

    def measure(server: Server) -> float:
        before = server.cpu_s()
        load(server, "plain", count, 4)
        return (server.cpu_s() - before) * 1e6 / count

    return [bench.row("CPU per plain request, 4 at a time", "µs", measure, PER_REQUEST_BOUND)]


def first(bench: Bench) -> list[Row]:
    bench.script(chunks=3)

    def delay_ms(event: str) -> Callable[[Server], float]:
        return lambda server: float(load(server, "stream", bench.plan.first_events, 1)[event])

    return [
        bench.row("Delay of `response.created`, one stream at a time", "ms", delay_ms("created_ms")),
        bench.row("Delay of the first text delta, one stream at a time", "ms", delay_ms("delta_ms")),
    ]


def idle(bench: Bench) -> list[Row]:
    bench.script(chunks=3)
    what = f"Memory per open silent stream, {bench.plan.idle_streams} open"
    return [Row(what, "KB", *bench.compare(lambda server: idle_kb(bench, server.name), bench.plan.idle_rounds))]


def idle_kb(bench: Bench, name: str) -> float:
    """Growth of a fresh server, because one that has worked has freed memory to spare."""
    count = bench.plan.idle_streams
    with serving(name, bench.backend_port) as server:
        bench.script(chunks=3)
        load(server, "stream", 16, 8)
        bench.script(chunks=3, silent=True)
        before = server.rss_kb()
        with holding(server, count):
            return (server.rss_kb() - before) / count


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "paced": paced,
    "free": free,
    "plain": plain,
    "first": first,
    "idle": idle,
}


def fetch(url: str, data: bytes | None = None) -> None:
    with urllib.request.urlopen(url, data, timeout=5) as answer:
        answer.read()


def load_command(server: Server, mode: str, count: int, concurrency: int) -> list[str]:
    command = [sys.executable, str(BENCH / "load.py"), "--port", str(server.port), "--mode", mode]
    return [*command, "--count", str(count), "--concurrency", str(concurrency)]


def load(server: Server, mode: str, count: int, concurrency: int) -> dict[str, Any]:
    command = load_command(server, mode, count, concurrency)
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=LOAD_LIMIT_S, check=True)
    seen: dict[str, Any] = json.loads(done.stdout)
    if seen["failed"]:
        raise SystemExit(f"{server.name} failed requests: {seen}")
    return seen


@contextmanager
def holding(server: Server, count: int) -> Iterator[None]:
    command = load_command(server, "hold", count, count)
    with child(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)) as process:
        assert process.stdin
        assert process.stdout
        if not process.stdout.readline():
            raise SystemExit(f"{server.name} did not open {count} streams")
        time.sleep(0.5)
        yield
        process.stdin.close()
        process.wait(5)


@contextmanager
def child(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends the process on the way out, whatever happened inside."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def listening(command: list[str], port: int, path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child that answers on `path`; what it wrote is shown if it never does."""
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen([sys.executable, *command, "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)
        with child(started) as process:
            await_answer(process, f"http://127.0.0.1:{port}{path}", log)
            yield process


def await_answer(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    give_up_at = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            return fetch(url)
        except OSError:
            time.sleep(0.05)
    log.seek(0)
    raise SystemExit(f"{process.args!r} did not answer on {url}:\n{log.read().decode(errors='replace')}")


@contextmanager
def serving(name: str, backend_port: int) -> Iterator[Server]:
    port = free_port()
    command = [PROGRAMS[name], "--upstream", f"http://127.0.0.1:{backend_port}/v1"]
    with listening(command, port, "/healthz") as process:
        yield Server(name, port, process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def standing(plan: Plan, subject: str) -> Iterator[Bench]:
    with ExitStack() as stack:
        port = free_port()
        stack.enter_context(listening(["bench/backend.py"], port, "/v1/models"))
        relay, proxy = (stack.enter_context(serving(name, port)) for name in ("relay", subject))
        yield Bench(plan, port, relay, proxy)


def warm_up(bench: Bench) -> None:
    bench.script(chunks=200)
    for server in (bench.relay, bench.proxy):
        load(server, "stream", 32, 8)
        load(server, "plain", 800, 4)


def measured(bench: Bench, sections: list[str]) -> list[Row]:
    warm_up(bench)
    rows: list[Row] = []
    for name in sections:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += SECTIONS[name](bench)
    return rows


def number(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def table(rows: list[Row]) -> str:
    head = ["measure", "proxy : relay", "single rounds", "bound", "proxy", "relay", "unit"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(rows: list[Row]) -> str:
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("uvicorn", "uvloop", "aiohttp")]
    software = ", ".join([f"Python {platform.python_version()}", *packages])
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"""# What the proxy costs

`make bench` (`python bench/run.py`), {datetime.date.today()}, {software}, {machine}.

{table(rows)}

The relay (`bench/relay.py`) is a raw ASGI application on the same server and HTTP client: JSON in and out, no
validation, no state. CPU is user and system time of the server process alone. Ratios are the median over
{FULL.rounds} rounds ({FULL.idle_rounds} for memory) in which the two take turns. The columns in µs, ms and KB are
medians of the same rounds and noisy: compare them within a row, not with another machine or day.
"""


def parse_flags() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; none: all")
    flags.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    flags.add_argument("--subject", choices=PROGRAMS, default="proxy", help="relay: against itself, to see the noise")
    given = flags.parse_args()
    if unknown := set(given.sections) - SECTIONS.keys():
        flags.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return given


def main() -> int:
    given = parse_flags()
    if sys.platform != "linux":
        raise SystemExit("bench/run.py reads /proc and process CPU clocks; it needs Linux")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with standing(QUICK if given.quick else FULL, given.subject) as bench:
        rows = measured(bench, given.sections or list(SECTIONS))
    print(table(rows))
    if not given.sections and not given.quick and given.subject == "proxy":
        (BENCH / "RESULTS.md").write_text(report(rows))
    return int(any(row.broken() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
