"""What the proxy costs beside a bare relay doing the same work in the same run, and what its store costs:
`bench/run.py [SECTION...]`.

Both servers get the same requests from the same load generator and backend, in alternating rounds; the ratio is the
median over the rounds. Nothing is stored in these sections; the others measure the store alone, and the proxy with it
beside the proxy without, in the background beside the foreground, after a compaction beside an ordinary turn. Exits 1
when a bound is broken. A full run of all sections writes RESULTS.md.
"""

import argparse
import datetime
import hashlib
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import sub, truediv
from pathlib import Path
from typing import IO, Any, Self

BENCH = Path(__file__).parent
ROOT = BENCH.parent
PROGRAMS = {"relay": "bench/relay.py", "bytes": "bench/bytes_relay.py", "proxy": "proxy.py"}
START_LIMIT_S = 20
CHILD_LIMIT_S = 90
REPLICAS_LIMIT_S = 600
WORD_CHARACTERS = 5
PER_CHUNK_BOUND = 1.6
PER_REQUEST_BOUND = 2.0
FILE_BOUND = 1.3
GROWTH_BOUND = 1.15
READ_BOUND_MS = 5
SAVE_BOUND_US = 40
BACKGROUND_BOUND = 2.0
EVENT_BOUND = 1.5
QUEUED_BOUND_KB = 2
ADMISSION_BOUND = 1.5
AHEAD_BOUND = 1.2
COUNTING_BOUND = 1.15
PASSING_BOUND = 1.2
# For a turn of a chain that somebody waits for.
STATEMENTS_BOUND = 4
UPLOAD_MEGABYTES, UPLOADS = 20, 4
OWNERS = 20
OWNER_KEYS = tuple(f"bench-{number}" for number in range(OWNERS))
BACKGROUND = ("--keep", "turns", "--background")
NO_SETTINGS: Mapping[str, str] = {}
# As many as one answer of the backend to a plain request has words.
WORDS = 8
# A chain whose turns are of 1 KB and an answer of 1.6 KB passes the threshold with the answer to its last turn; an
# ordinary one has about as many tokens as that after it was compacted.
THRESHOLD_TOKENS, LONG_TURNS, ORDINARY_TURNS = 4600, 7, 2
NEVER_TOKENS = 1_000_000_000


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
    stored_requests: int = 4000
    stored_at_once: int = 200
    background_requests: int = 600
    live_streams: int = 32
    queued_runs: int = 10_000
    queue_rounds: int = 3
    replica_rounds: int = 4
    window_chains: int = 12
    chain_turns: int = 50


FULL = Plan(rounds=15, paced_streams=8, free_streams=16, plain_requests=600, first_events=40, idle_rounds=3)
QUICK = Plan(
    rounds=5, paced_streams=8, free_streams=16, plain_requests=600, first_events=40, idle_rounds=1, replica_rounds=2
)


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    process: subprocess.Popen[bytes]
    store: str

    def cpu_s(self) -> float:
        """User and system time of the whole process so far, from its CPU clock (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def rss_kb(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])


# What a round of work on a server costs.
Measure = Callable[[Server], float]


@dataclass(frozen=True)
class Row:
    """One line of the table; `rounds` holds ratios, or values where the relay has no counterpart: `relay` is None.

    `bound` is on the median of the ratios, or on the value of the proxy where there is no relay.
    """

    what: str
    unit: str
    proxy: float
    relay: float | None = None
    rounds: tuple[float, ...] = ()
    bound: float | None = None

    @classmethod
    def of_rounds(cls, what: str, unit: str, rounds: Iterable[float], bound: float | None = None) -> Self:
        """A measure of the proxy alone; with a bound, of the best round, because other programs only ever add to it."""
        values = tuple(rounds)
        result = statistics.median(values) if bound is None else min(values)
        return cls(what, unit, result, rounds=values, bound=bound)

    @classmethod
    def of_ratios(cls, what: str, ratios: Iterable[float], bound: float | None = None) -> Self:
        """Two measures of the proxy against each other; a bound is on the median of the rounds."""
        values = tuple(ratios)
        return cls(what, "ratio", statistics.median(values), rounds=values, bound=bound)

    def result(self) -> float:
        return self.proxy if self.relay is None else statistics.median(self.rounds)

    def broken(self) -> bool:
        return self.bound is not None and self.result() > self.bound

    def cells(self) -> list[str]:
        ratio, proxy, relay = "-", f"**{number(self.proxy)}**", "-"
        if self.relay is not None:
            ratio, proxy, relay = f"**{self.result():.2f}**", number(self.proxy), number(self.relay)
        rounds = f"{number(min(self.rounds))} to {number(max(self.rounds))}" if self.rounds else "-"
        bound = "-" if self.bound is None else f"{self.bound} {'broken' if self.broken() else 'held'}"
        return [self.what, ratio, rounds, bound, proxy, relay, self.unit]


@dataclass(frozen=True)
class Bench:
    plan: Plan
    backend_port: int
    relay: Server
    proxy: Server

    def script(self, *, chunks: int, interval_ms: float = 0, silent: bool = False, more: str = "") -> None:
        """`more`: what only some sections set, in the form of a query."""
        query = (
            f"chunks={chunks}&interval_ms={interval_ms}&silent={int(silent)}&{more or 'words=1&counting=0&plain_ms=0'}"
        )
        fetch(f"http://127.0.0.1:{self.backend_port}/script?{query}", b"")

    def compare(self, measure: Measure, rounds: int) -> tuple[float, float, tuple[float, ...]]:
        """Median of the proxy, median of the relay, and the ratio of each round; who goes first alternates."""
        pairs: list[tuple[float, float]] = []
        for turn in range(rounds):
            first, second = (self.proxy, self.relay) if turn % 2 else (self.relay, self.proxy)
            values = (measure(first), measure(second))
            pairs.append(values if turn % 2 else values[::-1])
        proxy, relay = zip(*pairs, strict=True)
        return statistics.median(proxy), statistics.median(relay), tuple(p / r for p, r in pairs)

    def row(self, what: str, unit: str, measure: Measure, bound: float | None = None) -> Row:
        return Row(what, unit, *self.compare(measure, self.plan.rounds), bound)


def paced(bench: Bench) -> list[Row]:
    bench.script(chunks=200, interval_ms=5)
    what = "CPU per relayed chunk, 8 streams, a chunk per 5 ms"
    return [bench.row(what, "µs", cpu_per_chunk(bench.plan.paced_streams, 200), PER_CHUNK_BOUND)]


def free(bench: Bench) -> list[Row]:
    bench.script(chunks=1000)
    what = "CPU per relayed chunk, 8 streams, as fast as they go"
    return [bench.row(what, "µs", cpu_per_chunk(bench.plan.free_streams, 1000))]


def cpu_per_chunk(streams: int, chunks: int, *flags: str, at_once: int = 8) -> Measure:
    def measure(server: Server) -> float:
        before = server.cpu_s()
        seen = load(server, "stream", streams, at_once, *flags)
        spent_s = server.cpu_s() - before
        if seen["characters"] != streams * chunks * WORD_CHARACTERS:
            raise SystemExit(f"{server.name} lost text: {seen}")
        return spent_s * 1e6 / (streams * chunks)

    return measure


def plain(bench: Bench) -> list[Row]:
    measure = cpu_per_request(bench.plan.plain_requests, 4)
    return [bench.row("CPU per plain request, 4 at a time", "µs", measure, PER_REQUEST_BOUND)]


def cpu_per_request(requests: int, at_once: int, *flags: str, mode: str = "plain") -> Measure:
    def measure(server: Server) -> float:
        before = server.cpu_s()
        load(server, mode, requests, at_once, *flags)
        return (server.cpu_s() - before) * 1e6 / requests

    return measure


def first(bench: Bench) -> list[Row]:
    bench.script(chunks=3)

    def delay_ms(event: str) -> Measure:
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


def chain(bench: Bench) -> list[Row]:
    depths = storing("chain", bench.plan.rounds)["depths"]
    sizes = [(at["depth"], at["file_bytes"], at["wire_bytes"]) for at in depths]
    files = [
        Row(f"File of a chain, {depth} turns of 2 KB : JSON of its items", "ratio", file_bytes / wire_bytes)
        for depth, file_bytes, wire_bytes in sizes
    ]
    growths = [
        Row(f"Growth of the file per turn, turns {low + 1} to {high}", "bytes", (after - before) / (high - low))
        for (low, before, _), (high, after, _) in pairwise(sizes)
    ]
    early, late = (growth.proxy for growth in growths)
    reads = [Row.of_rounds(f"CPU of reading the window, {at['depth']} turns", "ms", at["read_ms"]) for at in depths]
    decoding = [Row.of_rounds(f"The same with decoding, {at['depth']} turns", "ms", at["decoded_ms"]) for at in depths]
    return [
        *files[:-1],
        replace(files[-1], bound=FILE_BOUND),
        *growths,
        Row("Growth per turn, later : earlier", "ratio", late / early, bound=GROWTH_BOUND),
        *reads[:-1],
        replace(reads[-1], bound=READ_BOUND_MS),
        *decoding,
    ]


def save(bench: Bench) -> list[Row]:
    seen = storing("save", bench.plan.rounds)
    what = "CPU of the store per saved turn, 200 at a time,"
    return [
        Row.of_rounds(f"{what} first turns", "µs", seen["roots_us"], SAVE_BOUND_US),
        Row.of_rounds(f"{what} turns of chains", "µs", seen["chained_us"], SAVE_BOUND_US),
    ]


def stored(bench: Bench) -> list[Row]:
    """No bound: a difference of two large values has the noise of both; its rounds lay at 10 to 275 µs in one run."""
    requests, at_once = bench.plan.stored_requests, bench.plan.stored_at_once
    measures = [cpu_per_request(requests, at_once, "--keep", keep) for keep in ("nothing", "turns", "chains")]
    bare, kept, chained = taking_turns(measures, bench.proxy, bench.plan.rounds)
    what = f"CPU per plain request, {at_once} at a time, `store:"
    depth = requests // at_once
    return [
        Row.of_rounds(f"{what} false`", "µs", bare),
        Row.of_rounds(f"{what} true`", "µs", kept),
        Row.of_ratios(f"{what} true` : `store: false`", map(truediv, kept, bare)),
        Row.of_rounds(f"{what} true` less `store: false`", "µs", map(sub, kept, bare)),
        Row.of_rounds(f"{what} true`, in chains of {depth} turns", "µs", chained),
    ]


def taking_turns(measures: list[Measure], server: Server, rounds: int) -> list[tuple[float, ...]]:
    """The rounds of each measure of one server; who goes first alternates, and the first round warms up."""
    seen: list[tuple[float, ...]] = []
    for turn in range(rounds + 1):
        order = 1 if turn % 2 else -1
        seen.append(tuple([measure(server) for measure in measures[::order]][::order]))
    return list(zip(*seen[1:], strict=True))


def background(bench: Bench) -> list[Row]:
    """The same turn three ways. A background one is created, has ended, and is then fetched once."""
    bench.script(chunks=WORDS)
    rows: list[Row] = []
    with serving("proxy", bench.backend_port) as server:
        for at_once in (8, 200):
            rows += background_rows(bench.plan, server, at_once)
    return rows


def background_rows(plan: Plan, server: Server, at_once: int) -> list[Row]:
    requests = plan.background_requests
    measures = [
        cpu_per_request(requests, at_once, "--keep", "turns"),
        cpu_per_request(requests, at_once, "--keep", "turns", mode="stream"),
        cpu_per_request(requests, at_once, *BACKGROUND, "--store", server.store),
    ]
    plain, streamed, queued = taking_turns(measures, server, plan.rounds)
    what = f"CPU per stored turn, {at_once} at a time,"
    return [
        Row.of_rounds(f"{what} plain", "µs", plain),
        Row.of_rounds(f"{what} streamed", "µs", streamed),
        Row.of_rounds(f"{what} in background", "µs", queued),
        # The same turn: a background turn asks the backend for a stream, so that a long answer is no silence.
        Row.of_ratios(f"{what} in background : streamed", map(truediv, queued, streamed), BACKGROUND_BOUND),
        Row.of_ratios(f"{what} in background : plain", map(truediv, queued, plain)),
    ]


def events(bench: Bench) -> list[Row]:
    """Streams read by those who asked for them; what it costs to begin and to end one is in it."""
    streams = bench.plan.live_streams
    rows: list[Row] = []
    with serving("proxy", bench.backend_port, BACKGROUND__WORKERS=str(streams)) as server:
        for chunks, interval_ms, pace in ((100, 20, "a chunk per 20 ms"), (1000, 0, "as fast as they go")):
            bench.script(chunks=chunks, interval_ms=interval_ms)
            measures = [
                cpu_per_chunk(streams, chunks, "--keep", "turns", at_once=streams),
                cpu_per_chunk(streams, chunks, *BACKGROUND, at_once=streams),
            ]
            fore, back = taking_turns(measures, server, bench.plan.rounds)
            what = f"CPU per chunk, {streams} stored streams, {pace},"
            rows += [
                Row.of_rounds(f"{what} foreground", "µs", fore),
                Row.of_rounds(f"{what} background", "µs", back),
                Row.of_ratios(f"{what} background : foreground", map(truediv, back, fore), EVENT_BOUND),
            ]
    return rows


def queue(bench: Bench) -> list[Row]:
    """Admission of many that stay queued: memory and CPU of the server, and of the store's own part in it."""
    seen = storing("queue", bench.plan.queue_rounds)
    filled = [filling(bench) for _ in range(bench.plan.queue_rounds)]
    runs, tenth = bench.plan.queued_runs, bench.plan.queued_runs // 10
    grown, late_grown, early, late = zip(*filled, strict=True)
    what = f"{runs} runs queued by {OWNERS} owners:"
    return [
        Row.of_rounds(f"{what} memory of the server per run", "KB", grown, QUEUED_BOUND_KB),
        Row.of_rounds(f"{what} the same, second half", "KB", late_grown),
        Row.of_rounds(f"{what} CPU per admission, first {tenth}", "µs", early),
        Row.of_ratios(f"{what} last {tenth} : first {tenth}", map(truediv, late, early), ADMISSION_BOUND),
        *stored_queue_rows(what, seen),
    ]


def stored_queue_rows(what: str, seen: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for step in ("admission", "claim"):
        early, late = seen[f"early_{step}_us"], seen[f"late_{step}_us"]
        part = f"{what} CPU of the store per {step},"
        rows.append(Row.of_rounds(f"{part} first tenth", "µs", early))
        bound = ADMISSION_BOUND if step == "admission" else None
        rows.append(Row.of_ratios(f"{part} last tenth : first tenth", map(truediv, late, early), bound))
    return rows


def filling(bench: Bench) -> tuple[float, float, float, float]:
    """KB per run, in all and of the second half, and µs per admission, of the first tenth and the last.

    The server is fresh, and warm before the first run is counted.
    """
    tenth = bench.plan.queued_runs // 10
    keys = ",".join(f"{name}=sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in OWNER_KEYS)
    limits = {"BACKGROUND__QUEUE_PER_OWNER": "100000", "BACKGROUND__QUEUE_TOTAL": "100000"}
    settings = {"AUTH__MODE": "keys", "AUTH__KEYS": keys, "BACKGROUND__WORKERS": "0", **limits}
    admit = cpu_per_request(tenth, 2 * OWNERS, *BACKGROUND, "--owners", str(OWNERS), mode="admit")
    with serving("proxy", bench.backend_port, **settings) as server:
        admit(server)
        sizes_kb, costs_us = [server.rss_kb()], []
        for _ in range(10):
            costs_us.append(admit(server))
            sizes_kb.append(server.rss_kb())
    growth = (sizes_kb[-1] - sizes_kb[0]) / (10 * tenth), (sizes_kb[-1] - sizes_kb[5]) / (5 * tenth)
    return *growth, costs_us[0], costs_us[-1]


def rate(bench: Bench) -> list[Row]:
    """Runs that clients create, await and fetch, 200 clients at a time, on a backend that answers at once."""
    bench.script(chunks=WORDS)
    requests, at_once = bench.plan.stored_requests, bench.plan.stored_at_once
    rates: list[float] = []
    with serving("proxy", bench.backend_port) as server:
        flags = ("--store", server.store)
        for _ in range(bench.plan.queue_rounds + 1):
            rates.append(requests / load(server, "plain", requests, at_once, *BACKGROUND, *flags)["took_s"])
    return [Row.of_rounds(f"Background runs, {at_once} clients, 8 workers, one process", "per s", rates[1:])]


def ahead(bench: Bench) -> list[Row]:
    """The turn after one that passed the threshold; what writes the record takes 50 ms, where a model takes seconds."""
    threshold = {"COMPACTION__THRESHOLD_TOKENS": str(THRESHOLD_TOKENS)}
    rows: list[Row] = []
    with (
        serving("proxy", bench.backend_port, **threshold, COMPACTION__AHEAD="true") as ready,
        serving("proxy", bench.backend_port, **threshold) as waiting,
    ):
        for interval_ms, pace, bound in ((10, "a chunk per 10 ms", AHEAD_BOUND), (0, "as fast as they go", None)):
            bench.script(chunks=2, interval_ms=interval_ms, more="words=160&counting=1&plain_ms=50")
            seen = [after_turns(bench, ready, waiting, is_odd=turn % 2 == 1) for turn in range(bench.plan.rounds + 1)]
            for name, event in (("created_ms", "`response.created`"), ("delta_ms", "the first text delta")):
                ordinary, made, path = ([each[name] for each in kind] for kind in zip(*seen[1:], strict=True))
                what = f"Delay of {event}, {pace},"
                rows += [
                    Row.of_rounds(f"{what} ordinary turn of a chain", "ms", ordinary),
                    Row.of_rounds(f"{what} chain compacted ahead", "ms", made),
                    Row.of_rounds(f"{what} compacted in its path", "ms", path),
                    Row.of_ratios(f"{what} compacted ahead : ordinary", map(truediv, made, ordinary), bound),
                ]
    return rows


def after_turns(bench: Bench, ready: Server, waiting: Server, *, is_odd: bool) -> list[dict[str, Any]]:
    """First events of an ordinary turn, after a compaction ahead, and after one in its path.

    Which of the first two is measured first alternates.
    """
    works: list[tuple[int, tuple[str, ...]]] = [(ORDINARY_TURNS, ()), (LONG_TURNS, ("--store", ready.store))]
    order = 1 if is_odd else -1
    ordinary, made = [first_events(bench, ready, turns, *flags) for turns, flags in works[::order]][::order]
    path = first_events(bench, waiting, LONG_TURNS)
    chains = bench.plan.window_chains
    if [seen["compacted"] for seen in (ordinary, made, path)] != [0, chains, chains]:
        raise SystemExit(f"windows were not compacted as they should: {ordinary} {made} {path}")
    if not ordinary["tokens"] / 1.2 < made["tokens"] < ordinary["tokens"] * 1.2:
        raise SystemExit(f"windows of {ordinary['tokens']} and {made['tokens']} tokens cannot be compared")
    return [ordinary, made, path]


def first_events(bench: Bench, server: Server, turns: int, *flags: str) -> dict[str, Any]:
    """Of a turn at the end of each of some chains, one at a time."""
    command = [sys.executable, str(BENCH / "windows.py"), "--port", str(server.port), "--turns", str(turns)]
    return printed([*command, "--count", str(bench.plan.window_chains), *flags])


def counting(bench: Bench) -> list[Row]:
    """What it costs to know how full a window is: the same chains with a threshold that is never reached."""
    bench.script(chunks=WORDS)
    turns = bench.plan.chain_turns
    requests = cpu_per_request(20 * turns, 20, "--keep", "chains")
    backend = bench.backend_port
    with (
        serving("proxy", backend) as bare,
        serving("proxy", backend, COMPACTION__THRESHOLD_TOKENS=str(NEVER_TOKENS)) as minding,
    ):
        measures: list[Measure] = [lambda _: requests(bare), lambda _: requests(minding)]
        without, with_threshold = taking_turns(measures, bare, bench.plan.rounds)
    what = f"CPU per plain request, chains of {turns} turns, threshold"
    return [
        Row.of_rounds(f"{what} not set", "µs", without),
        Row.of_rounds(f"{what} never reached", "µs", with_threshold),
        Row.of_ratios(f"{what} never reached : not set", map(truediv, with_threshold, without), COUNTING_BOUND),
    ]


def passing(bench: Bench) -> list[Row]:
    """What goes through as it is, beside a server and a client that only copy bytes."""
    plan = bench.plan
    rows: list[Row] = []
    with serving("bytes", bench.backend_port) as copying:
        beside = replace(bench, relay=copying)
        what = "CPU per chunk that goes through, 8 streams,"
        for streams, chunks, ms, pace in (
            (plan.paced_streams, 200, 5, "a chunk per 5 ms"),
            (plan.free_streams, 1000, 0, "as fast as they go"),
        ):
            bench.script(chunks=chunks, interval_ms=ms)
            measure = cpu_per_chunk(streams, chunks, "--passing")
            measure(copying)
            rows.append(beside.row(f"{what} {pace}", "µs", measure, PASSING_BOUND))
        rows.append(beside.row(f"CPU per {UPLOAD_MEGABYTES} MB out and back", "ms", upload_ms))
    return rows


def upload_ms(server: Server) -> float:
    before = server.cpu_s()
    load(server, "upload", UPLOADS, 1, "--megabytes", str(UPLOAD_MEGABYTES))
    return (server.cpu_s() - before) * 1000 / UPLOADS


STANDS = {"file": "one process on a file", "one": "one on PostgreSQL", "three": "three on PostgreSQL"}
KINDS = {
    "not stored": "plain, `store: false`",
    "first": "plain, first turns",
    "chained": "plain, turns of chains",
    "chained, streamed": "streamed, turns of chains",
    "background": "in background",
}


def replicas(bench: Bench) -> list[Row]:
    """The same turns on a file and on PostgreSQL, by one process and by three that share it; left out without one."""
    bench.script(chunks=WORDS)
    command = [sys.executable, str(BENCH / "replicas.py"), "--backend-port", str(bench.backend_port)]
    given = ["--url", os.environ["PG_URL"]] if os.environ.get("PG_URL") else []
    seen = printed([*command, "--rounds", str(bench.plan.replica_rounds), *given], REPLICAS_LIMIT_S)
    if not seen:
        print("no PostgreSQL: PG_URL is not set, and there is no package pgserver; left out", file=sys.stderr)
        return []
    rows = [row for kind in KINDS for row in replica_rows(KINDS[kind], seen["rounds"][kind])]
    return [*rows, *statement_rows(seen["statements"])]


def replica_rows(kind: str, rounds: dict[str, list[dict[str, float]]]) -> list[Row]:
    def each(stand: str, what: str) -> list[float]:
        return [seen[what] for seen in rounds[stand]]

    per_s = {stand: each(stand, "per_s") for stand in STANDS}
    what = f"200 clients, {kind}:"
    rows = [Row.of_rounds(f"{what} {STANDS[stand]}", "turns per s", per_s[stand]) for stand in STANDS]
    rows += [
        Row.of_ratios(f"{what} three : one, on PostgreSQL", map(truediv, per_s["three"], per_s["one"])),
        Row.of_ratios(f"{what} one on PostgreSQL : one on a file", map(truediv, per_s["one"], per_s["file"])),
    ]
    for stand, name in STANDS.items():
        rows.append(Row.of_rounds(f"{what} CPU per turn of the proxy, {name}", "µs", each(stand, "proxy_us")))
    for stand in ("one", "three"):
        if any(spent := each(stand, "database_us")):
            rows.append(Row.of_rounds(f"{what} CPU per turn of the database, {STANDS[stand]}", "µs", spent))
    return rows


def statement_rows(counted: dict[str, float]) -> list[Row]:
    """Of a database whose log can be read."""
    rows = [
        Row(
            f"Statements per turn, three on PostgreSQL, {KINDS[kind]}",
            "statements",
            each,
            bound=STATEMENTS_BOUND if kind.startswith("chained") else None,
        )
        for kind, each in counted.items()
        if kind in KINDS
    ]
    if "idle" in counted:
        rows.append(Row("Statements per second of a process that has nothing to do", "per s", counted["idle"]))
    return rows


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "paced": paced,
    "free": free,
    "plain": plain,
    "first": first,
    "idle": idle,
    "chain": chain,
    "save": save,
    "stored": stored,
    "background": background,
    "events": events,
    "queue": queue,
    "rate": rate,
    "ahead": ahead,
    "counting": counting,
    "passing": passing,
    "replicas": replicas,
}


def fetch(url: str, data: bytes | None = None) -> None:
    with urllib.request.urlopen(url, data, timeout=5) as answer:
        answer.read()


def load_command(server: Server, mode: str, count: int, concurrency: int) -> list[str]:
    command = [sys.executable, str(BENCH / "load.py"), "--port", str(server.port), "--mode", mode]
    return [*command, "--count", str(count), "--concurrency", str(concurrency)]


def load(server: Server, mode: str, count: int, concurrency: int, *flags: str) -> dict[str, Any]:
    seen = printed([*load_command(server, mode, count, concurrency), *flags])
    if seen["failed"]:
        raise SystemExit(f"{server.name} failed requests: {seen}")
    return seen


def storing(measure: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        command = [sys.executable, str(BENCH / "storing.py"), measure, "--folder", folder]
        return printed([*command, "--rounds", str(rounds)])


def printed(command: list[str], limit_s: float = CHILD_LIMIT_S) -> dict[str, Any]:
    """The JSON that a program writes."""
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit_s, check=True)
    seen: dict[str, Any] = json.loads(done.stdout)
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
def listening(
    command: list[str], port: int, path: str, settings: Mapping[str, str] = NO_SETTINGS
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that answers on `path`; what it wrote is shown if it never does."""
    environ = {**os.environ, **{f"RESPONSES_PROXY_{name}": value for name, value in settings.items()}}
    with tempfile.TemporaryFile() as log:
        call = [sys.executable, *command, "--port", str(port)]
        started = subprocess.Popen(call, cwd=ROOT, stdout=log, stderr=log, env=environ)
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
def serving(name: str, backend_port: int, **settings: str) -> Iterator[Server]:
    """A server on a store of its own; `settings` are named as in the environment: SECTION__KEY."""
    port = free_port()
    command = [PROGRAMS[name], "--upstream", f"http://127.0.0.1:{backend_port}/v1"]
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        file = f"{folder}/responses.db"
        store = ["--store", file] if name == "proxy" else []
        with listening([*command, *store], port, "/healthz", settings) as process:
            yield Server(name, port, process, file)


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
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


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
validation, no state; beside it, the proxy stores nothing either. CPU is user and system time of the server process
alone. Ratios are the median over {FULL.rounds} rounds ({FULL.idle_rounds} for memory) in which the two take turns. The
columns in µs, ms and KB are medians of the same rounds and noisy: compare them within a row, not with another machine
or day.

Rows without a relay are about the store; their bounds and single rounds are of the value itself. A value with a bound
is that of the best round, because other programs on the machine only ever add to it. Chains and saved turns
are measured in a process without a server (`bench/storing.py`): a turn is a message of 1 KB, an answer of 1 KB, and all
else that the proxy keeps of it. A file is measured after it was closed; it has pages of 16 KB, and those of its empty
tables are counted. Windows are read from a warm cache, {FULL.rounds} rounds of 20 reads. CPU per saved turn is that of
the whole process, less what it costs to make the turn, measured in the same round. The rows with `store:` are of the
server process again, with an answer of a few words.

A background turn is created, and fetched once when the file of the store says that it has ended, which costs the server
nothing; so it is two requests and a stream from the backend, of {WORDS} chunks, beside one request and one plain answer
or one stream. Events in the background are read live by those who asked for them; what admission and end cost is in it.
Bounds on these ratios are of the median. The queue is filled over HTTP into a fresh server that carries nothing out,
after {FULL.queued_runs // 10} runs that are not counted. Rows about the store's part in it are of a process without a
server: {FULL.queued_runs} runs of {OWNERS} owners, one of whom has half of them; 200 are admitted at a time, and one is
claimed at a time, in an order that is checked. Runs per second share the two cores with the clients and the backend.

Compaction ahead of time is measured at the last turn of chains (`bench/windows.py`), one at a time: of {LONG_TURNS}
turns, whose window of about {THRESHOLD_TOKENS} tokens was compacted, and of {ORDINARY_TURNS}, whose window is as large
as that one then is, within a fifth, which is checked. The record takes the backend 50 ms, where a model takes seconds.
A backend that answers at once shows what the proxy itself adds; the bound is with one that takes 10 ms to its first
chunk, which is less than models take.

What goes through as it is stands beside another relay (`bench/bytes_relay.py`): aiohttp's server and client on the same
event loop, which copy bytes. The large body is of {UPLOAD_MEGABYTES} MB, and so is its answer.

Replicas (`bench/replicas.py`) are processes that share one PostgreSQL, which keeps what it has said was kept (`fsync`,
`synchronous_commit` and `full_page_writes` are on); it comes from the package pgserver, or `PG_URL` names one. Chains
hop to the next replica with every turn. Medians of {FULL.replica_rounds} rounds in which the three stands take turns.
**Here three replicas share {os.cpu_count()} cores with the database, the load generator and the backend, so they cannot
be three times as fast as one: they divide the same cores.** What machines of their own carry follows from the CPU per
turn: a replica has one core for its event loop, so N replicas carry at most N times 1,000,000 / (µs per turn of the
proxy) turns a second, as long as the database does, whose C cores carry at most C times 1,000,000 / (µs per turn of the
database). CPU of the database is of all its processes, those that have ended included. Statements are counted by the
log of the server, in a run of their own: all that processes send, beginning and ending of transactions and what they
ask beside their turns included. A file has no CPU of its own: the process writes it.
"""


def parse_flags() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; none: all")
    flags.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    flags.add_argument(
        "--subject", choices=("proxy", "relay"), default="proxy", help="relay: against itself, to see the noise"
    )
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
