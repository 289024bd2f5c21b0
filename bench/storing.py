"""What the store costs by itself, as one JSON line: `bench/storing.py chain|save|queue --folder F --rounds N`.

`chain`: the file of one chain, and the reading of its window, at several depths. `save`: CPU of the whole process per
saved turn, many savers at a time, less what it costs to make the turns. A turn is 2 KB of text and all else that is
kept of it, made by the rooms that make it in the proxy. `queue`: CPU per admission and per claim, at the beginning
and at the end of a long queue, whose order is checked.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import orjson
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from keeper import begin  # noqa: E402
from records import decoded, identified, new_turn  # noqa: E402 - the rooms stand one folder up
from request import RequestLimits, echo, parse_request  # noqa: E402
from run_verbs import NewRun, QueueLimits  # noqa: E402
from sources import Ids  # noqa: E402
from store import SQLiteStore, StoreSettings, open_store  # noqa: E402
from stream_plan import StreamPlan  # noqa: E402
from streaming import ResponseStream  # noqa: E402
from verbs import ItemIds, NewTurn, Window  # noqa: E402

DEPTHS = (10, 100, 1000)
READS_A_ROUND = 20
SAVERS = 200
TURNS_A_ROUND = 10
# Everybody's when `auth.mode` is `none`.
OWNER = ""
LIMITS = RequestLimits()
TEXT = ("word that then some line more time here " * 26)[:1024]
QUEUED_RUNS = 10_000
ADMITTED_AT_ONCE = 200
# One owner of twenty has half of the queue, so that turns are taken until the end.
OWNERS = (["greedy"] * (QUEUED_RUNS // 2) + [f"owner {number % 19}" for number in range(QUEUED_RUNS)])[:QUEUED_RUNS]
NO_LIMITS = QueueLimits(QUEUED_RUNS, QUEUED_RUNS)
NEVER = 4e9
USAGE = {"prompt_tokens": 812, "completion_tokens": 205, "total_tokens": 1017}
MESSAGE = {"role": "assistant", "content": TEXT}
COMPLETION = {"choices": [{"finish_reason": "stop", "index": 0, "message": MESSAGE}], "usage": USAGE}
BEGUN = {"object": "response", "completed_at": None, "error": None, "incomplete_details": None, "usage": None}

new_id = Ids(time.time)


def built(previous_id: str | None) -> NewTurn:
    """What `turns.Turn` gives the store for a plain request of one message and its answer."""
    body = {"model": "bench", "input": TEXT}
    request = parse_request({**body, "previous_response_id": previous_id} if previous_id else body, LIMITS)
    response_id = new_id("resp")
    item_ids = ItemIds(response_id)
    own = identified(request.items, item_ids)
    begun = {"id": response_id, "created_at": int(time.time()), "status": "in_progress", **BEGUN, **echo(request)}
    machine = ResponseStream(begun, StreamPlan(), item_ids, time.time)
    machine.feed(COMPLETION)
    machine.close()
    return new_turn(OWNER, machine.snapshot(), own, request)


# -- chain -------------------------------------------------------------------------------------------------------------


class Chain:
    """One chain in a file of its own, and how many bytes its items have on the wire."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.depth = 0
        self.tip: str | None = None
        self.wire_bytes = 0

    async def grow(self, store: SQLiteStore) -> None:
        turn = built(self.tip)
        await store.save(turn)
        self.tip = turn.id
        self.depth += 1
        self.wire_bytes += sum(len(item.body) for item in turn.inputs + turn.outputs)

    def file_bytes(self) -> int:
        """Of a store that is closed, so that the log of what was written last is in the file."""
        if Path(f"{self.file}-wal").exists():
            raise SystemExit("the store did not fold its log into the file when it was closed")
        return self.file.stat().st_size

    async def read(self, store: SQLiteStore) -> Window:
        assert self.tip
        window = await store.window(OWNER, self.tip)
        if window is None or len(window.items) != 2 * self.depth:
            raise SystemExit(f"the window of {self.depth} turns is not whole")
        return window


async def chain(folder: Path, rounds: int) -> dict[str, Any]:
    grown = Chain(folder / "chain.db")
    return {"depths": [await at_depth(grown, depth, rounds) for depth in DEPTHS]}


async def at_depth(grown: Chain, depth: int, rounds: int) -> dict[str, Any]:
    store = await open_store(StoreSettings(str(grown.file)))
    try:
        while grown.depth < depth:
            await grown.grow(store)

        async def read() -> Window:
            return await grown.read(store)

        async def read_and_decode() -> int:
            return len(decoded((await grown.read(store)).items))

        read_ms = await each_round_ms(read, rounds)
        decoded_ms = await each_round_ms(read_and_decode, rounds)
    finally:
        await store.close()
    sizes = {"file_bytes": grown.file_bytes(), "wire_bytes": grown.wire_bytes}
    return {"depth": depth, **sizes, "read_ms": read_ms, "decoded_ms": decoded_ms}


async def each_round_ms(work: Callable[[], Awaitable[object]], rounds: int) -> list[float]:
    """CPU of the whole process, the median of each round."""
    return [statistics.median([await cpu_s(work) * 1000 for _ in range(READS_A_ROUND)]) for _ in range(rounds)]


async def cpu_s(work: Callable[[], Awaitable[object]]) -> float:
    before = time.process_time()
    await work()
    return time.process_time() - before


# -- save --------------------------------------------------------------------------------------------------------------


class Saver:
    """Makes and saves turn after turn: each continues the one before, or each is a root."""

    def __init__(self, store: SQLiteStore, *, continues: bool) -> None:
        self.store = store
        self.continues = continues
        self.tip: str | None = None

    async def save(self) -> None:
        for _ in range(TURNS_A_ROUND):
            turn = built(self.tip)
            await self.store.save(turn)
            if self.continues:
                self.tip = turn.id

    async def only_build(self) -> None:
        for _ in range(TURNS_A_ROUND):
            built(self.tip)


async def save(folder: Path, rounds: int) -> dict[str, Any]:
    """CPU per turn of each round; the first round warms up."""
    store = await open_store(StoreSettings(str(folder / "save.db")))
    roots, chained = ([Saver(store, continues=continues) for _ in range(SAVERS)] for continues in (False, True))
    try:
        pairs = [(await saved_us(roots), await saved_us(chained)) for _ in range(rounds + 1)]
    finally:
        await store.close()
    return dict(zip(("roots_us", "chained_us"), zip(*pairs[1:], strict=True), strict=True))


async def saved_us(savers: list[Saver]) -> float:
    """What it costs to make turns is measured right beside and taken off: cores change their speed in spells."""
    making = await cpu_s(lambda: asyncio.gather(*(saver.only_build() for saver in savers)))
    both = await cpu_s(lambda: asyncio.gather(*(saver.save() for saver in savers)))
    return (both - making) * 1e6 / (SAVERS * TURNS_A_ROUND)


# -- queue -------------------------------------------------------------------------------------------------------------


def queued(owner: str) -> NewRun:
    """What `background.Background` gives the store for a plain request."""
    request = parse_request({"model": "bench", "input": "Say some words.", "background": True}, LIMITS)
    response_id = new_id("resp")
    response = {**begin(request, response_id, int(time.time())), "status": "queued"}
    turn = new_turn(owner, response, identified(request.items, ItemIds(response_id)), request)
    return NewRun(turn, msgspec.json.encode(msgspec.structs.replace(request, input=None)), time.time())


def fair_order(runs: Iterable[NewRun]) -> list[str]:
    """The ids as they have to be claimed: owners take turns in the order of their first, each one's in its own."""
    lines: dict[str, deque[str]] = {}
    for run in runs:
        lines.setdefault(run.turn.owner, deque()).append(run.turn.id)
    order: list[str] = []
    while lines:
        order += [line.popleft() for line in lines.values()]
        lines = {owner: line for owner, line in lines.items() if line}
    return order


class Queue:
    """A long queue in a file of its own."""

    def __init__(self, store: SQLiteStore, runs: list[NewRun]) -> None:
        self.store = store
        self.runs = runs
        self.claimed: list[str] = []

    async def admit(self, start: int, end: int) -> None:
        for at in range(start, end, ADMITTED_AT_ONCE):
            batch = self.runs[at : min(at + ADMITTED_AT_ONCE, end)]
            await asyncio.gather(*(self.store.admit(run, NO_LIMITS) for run in batch))

    async def claim(self, start: int, end: int) -> None:
        for _ in range(start, end):
            self.claimed += [run.response_id for run in await self.store.claim("bench", NEVER, 1)]

    async def tenths_us(self, step: Callable[[int, int], Awaitable[None]]) -> list[float]:
        """CPU per run of a step, for each tenth of the runs."""
        tenth = len(self.runs) // 10
        starts = range(0, len(self.runs), tenth)
        return [await cpu_s(partial(step, start, start + tenth)) * 1e6 / tenth for start in starts]


async def queue(folder: Path, rounds: int) -> dict[str, Any]:
    """The first tenth and the last, of each round; the first round warms up. A claim is a transaction of its own."""
    seen = [await queue_us(folder / f"queue_{number}.db") for number in range(rounds + 1)]
    names = ("early_admission_us", "late_admission_us", "early_claim_us", "late_claim_us")
    return dict(zip(names, zip(*seen[1:], strict=True), strict=True))


async def queue_us(file: Path) -> tuple[float, ...]:
    owners = list(OWNERS)
    random.Random(7).shuffle(owners)
    store = await open_store(StoreSettings(str(file)))
    filled = Queue(store, [queued(owner) for owner in owners])
    try:
        admissions = await filled.tenths_us(filled.admit)
        claims = await filled.tenths_us(filled.claim)
    finally:
        await store.close()
    if filled.claimed != fair_order(filled.runs):
        raise SystemExit("the queue was not claimed in fair order")
    return admissions[0], admissions[-1], claims[0], claims[-1]


MEASURES = {"chain": chain, "save": save, "queue": queue}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("measure", choices=MEASURES)
    flags.add_argument("--folder", type=Path, required=True, help="where the files are made, and left")
    flags.add_argument("--rounds", type=int, required=True)
    given = flags.parse_args()
    print(orjson.dumps(uvloop.run(MEASURES[given.measure](given.folder, given.rounds))).decode())


if __name__ == "__main__":
    main()
