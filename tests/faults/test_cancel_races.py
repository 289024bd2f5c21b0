"""A hundred cancels at every stage of a run, through the process that carries it out and through another one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from campaign_harness import PIECES, Fleet, Knobs, Proxy, Reading, answer_to, asked, text_of, until

pytest_plugins = ["fleet_fixtures"]

Json = dict[str, Any]
SEED = 20261122
RACES = 100
AT_ONCE = 10
# What the requirement allows between the answer of a cancel and the end of the request to the backend.
CLOSED_WITHIN_S = 1.0
STAGES = ("queued", "parent", "claimed", "before", "middle", "last", "after")
# Stage -> how the prompt begins, where it has to stand still for it.
HELD_AT = {"before": "held at -1: ", "middle": "held at 4: ", "last": f"held at {PIECES}: "}
# Stages at which the cancel is not sent at once, but somewhat later; at the last chunk, so is the end of the answer.
JITTERED = {"queued": 0.05, "claimed": 0.02, "last": 0.01}


@dataclass
class Race:
    """One run and its cancel."""

    number: int
    stage: str
    canceller: Proxy
    reader: Proxy | None
    jitter_s: float
    end_s: float
    reading: Reading = field(default_factory=Reading)
    answer: Json = field(default_factory=dict)
    answered_at: float = 0.0

    @property
    def prompt(self) -> str:
        return f"{HELD_AT.get(self.stage, '')}race {self.number}"

    @property
    def is_cancelled(self) -> bool:
        return bool(self.answer["status"] == "cancelled")


@dataclass
class Track:
    """Where races are run: `worker` carries out all runs, `other` none."""

    fleet: Fleet
    worker: Proxy
    other: Proxy
    limit: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    def drawn(self, random: Random) -> list[Race]:
        both = (self.worker, self.other)
        races = []
        for number in range(RACES):
            stage = STAGES[number % len(STAGES)]
            reader = random.choice(both) if random.random() < 1 / 3 else None
            jitter_s, end_s = (JITTERED.get(stage, 0) * random.choice((0, random.random(), 10)) for _ in range(2))
            races.append(Race(number, stage, random.choice(both), reader, jitter_s, end_s))
        random.shuffle(races)
        return races

    async def run(self, race: Race) -> None:
        async with self.limit, contextlib.AsyncExitStack() as stack:
            fields = await self.parent_of(race, stack)
            created = await self.create(race, fields)
            reading = asyncio.create_task(self.read(race, created["id"]))
            await self.reach(race, created["id"])
            await asyncio.sleep(race.jitter_s)
            race.answer = await self.fleet.cancel(race.canceller, created["id"])
            race.answered_at = asyncio.get_running_loop().time()
            await until(lambda: not self.open_ones(race), f"end of the request for {race}")
            await reading

    async def parent_of(self, race: Race, stack: contextlib.AsyncExitStack) -> Json:
        """Of a race that waits for a parent, one that ends only after the cancel."""
        if race.stage != "parent":
            return {}
        prompt = f"held at 2: parent of {race.number}"
        parent = await self.fleet.create(self.worker, prompt)
        stack.callback(self.fleet.backend.let_go, prompt)
        return {"previous_response_id": parent["id"]}

    async def create(self, race: Race, fields: Json) -> Json:
        if race.reader is None:
            return await self.fleet.create(self.worker, race.prompt, **fields)
        body = {"model": "m", "input": race.prompt, "background": True, "stream": True, **fields}
        async with self.fleet.http.post(f"{self.worker.url}/v1/responses", json=body) as answer:
            line = await until(answer.content.readline, "first event")
            assert line == b"event: response.created\n"
            created: Json = json_of(await answer.content.readline())["response"]
            return created

    async def reach(self, race: Race, response_id: str) -> None:
        """The race's stage."""
        backend = self.fleet.backend
        if race.stage == "claimed":
            await until(lambda: self.is_claimed(response_id), f"claim of {race}")
        elif race.stage == "after":
            await self.fleet.finished(race.canceller, response_id)
        elif race.stage in HELD_AT:
            await backend.begun(race.prompt, sent={"before": 0, "middle": 4, "last": PIECES}[race.stage])
        if race.stage == "last":
            asyncio.get_running_loop().call_later(race.end_s, backend.let_go, race.prompt)

    async def is_claimed(self, response_id: str) -> bool:
        return bool((await self.fleet.get(self.other, response_id))["status"] != "queued")

    async def read(self, race: Race, response_id: str) -> None:
        if race.reader is not None:
            async for event in self.fleet.tail(race.reader, response_id):
                race.reading.note(event)

    def open_ones(self, race: Race) -> list[Any]:
        return [each for each in self.fleet.backend.of(race.prompt) if each.is_open]

    def queue_is_empty(self) -> bool:
        return self.fleet.place.asked("SELECT count(*) FROM run") == [(0,)]


def json_of(line: bytes) -> Json:
    found: Json = json.loads(line.removeprefix(b"data: "))
    return found


async def raced(fleet: Fleet) -> tuple[Track, list[Race]]:
    worker = await fleet.start(Knobs(workers=6))
    track = Track(fleet, worker, await fleet.start(Knobs(workers=0)))
    races = track.drawn(Random(SEED))
    async with asyncio.TaskGroup() as group:
        for race in races:
            group.create_task(track.run(race))
    return track, races


async def test_a_hundred_cancels_are_final_at_every_stage(fleet: Fleet) -> None:
    track, races = await raced(fleet)
    counts = Counter((race.stage, race.answer["status"]) for race in races)
    print(f"seed {SEED}", sorted(counts.items()))
    assert_answers(races)
    assert_backend_was_let_go(fleet, races)
    assert_readers_were_told(races)
    await until(track.queue_is_empty, "empty queue")
    for proxy in (track.worker, track.other):
        for race in races:
            assert await fleet.get(proxy, race.answer["id"]) == race.answer
    await track.worker.kill()
    await track.worker.start()
    await fleet.finished(track.worker, (await fleet.create(track.worker, "the last one"))["id"])
    for race in races:
        assert await fleet.get(track.worker, race.answer["id"]) == race.answer
    assert_backend_was_let_go(fleet, races)
    assert "Traceback" not in track.worker.said() + track.other.said()


def assert_answers(races: list[Race]) -> None:
    for race in races:
        if race.is_cancelled:
            assert (race.answer["output"], race.answer["error"]) == ([], None), race
        else:
            assert race.stage in ("claimed", "queued", "last", "after"), race
            assert (race.answer["status"], text_of(race.answer)) == ("completed", answer_to(asked(race.prompt))), race
    assert {race.is_cancelled for race in races if race.stage == "after"} == {False}
    assert {race.is_cancelled for race in races if race.stage == "last"} == {False, True}
    assert sum(race.is_cancelled for race in races) > RACES / 2


def assert_backend_was_let_go(fleet: Fleet, races: list[Race]) -> None:
    for race in races:
        for each in fleet.backend.of(race.prompt):
            # A request that was closed before the answer left may be read after it: two sockets have no order.
            assert each.began_at <= race.answered_at or each.sent == 0, (race, each)
            assert each.ended_at is not None, (race, each)
            assert each.ended_at <= race.answered_at + CLOSED_WITHIN_S, (race, each)


def assert_readers_were_told(races: list[Race]) -> None:
    """Of what was cancelled, too: no reader hangs."""
    for race in races:
        if race.reader is not None:
            assert race.reading.faults == [], race
            kind = "incomplete" if race.is_cancelled else "completed"
            assert race.reading.events[-1]["type"] == f"response.{kind}", race
            assert race.reading.final == race.answer, race
