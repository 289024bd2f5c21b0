"""Three replicas on one PostgreSQL: what befalls one of them, or the database, is seen by no client that tries again.

The seed of what happens is REPLICA_SEED, REPLICA_TURNS how many turns there are, and REPLICA_FAULTS how often something
happens; with REPLICA_LONG_LEASES=1 the leases of dead processes last as long as they do in earnest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from campaign_harness import BROKEN, Knobs, Reading, answer_to, asked, text_of, until
from fleet_fixtures import pace_of
from held_runs import begun_stream, let_go_on, read_on
from postgres_program import Server
from postgres_server import emptied, server_with
from replica_campaign import Disturbance, ReplicaCampaign, ReplicaPlan, ReplicaReport, Replicas, pace_by, replicas

SEED = int(os.environ.get("REPLICA_SEED", "20261121"))
TURNS = os.environ.get("REPLICA_TURNS")
FAULTS = os.environ.get("REPLICA_FAULTS")
HAS_SHORT_LEASES = "REPLICA_LONG_LEASES" not in os.environ
# A campaign takes about that long for each turn and for each fault, and a lease more.
TIMEOUT_S = 100.0 if TURNS is None else 120.0 + int(TURNS) * 0.5 + int(FAULTS or 10) * 15.0

# How many runs are cancelled through each replica, and the bound that is promised for the end of the backend's request.
CANCELS = 10
STOPPED_WITHIN_S = 1.0
# A replica that never learns what others write.
UNAWARE = """import asyncio, watching, proxy
async def run(self): await asyncio.Event().wait()
watching.Watcher.run = run
proxy.main()"""
# What durability costs is paid here: what was acknowledged has to be there after any end of the server.
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "listen_addresses": ""}
# How a server ends: fast, at once, and as if its machine were gone.
ENDS = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Replicas]:
    async with replicas(tmp_path, emptied(), pace_of) as fleet:
        yield fleet


@pytest.fixture
def server() -> Iterator[Server]:
    server = server_with(DURABLE)
    try:
        server.start()
        yield server
    finally:
        server.close()


def plan_of(turns: int, faults: int, knobs: Knobs, **more: frozenset[str]) -> ReplicaPlan:
    turns, faults = int(TURNS or turns), int(FAULTS or faults)
    return ReplicaPlan(SEED, turns, faults, knobs=knobs, deadline_s=TIMEOUT_S - 10, **more)


def nothing_is_wrong(report: ReplicaReport) -> None:
    print(f"seed {SEED}: {report}")
    assert (dict(report.faults), report.details) == ({}, []), f"seed {SEED}"


# -- a campaign for each thing that happens ----------------------------------------------------------------------------


@pytest.mark.timeout(TIMEOUT_S)
async def test_nothing_is_lost_stuck_or_wrong_when_one_replica_after_another_is_killed(tmp_path: Path) -> None:
    plan = plan_of(240, 10, Knobs(workers=8))
    async with replicas(tmp_path, emptied(), pace_by(SEED), has_short_leases=HAS_SHORT_LEASES) as fleet:

        async def kill(number: int) -> None:
            await fleet.proxies[number % 3].kill()

        async def start_again(number: int) -> None:
            await fleet.proxies[number % 3].start()

        report = await ReplicaCampaign(fleet, plan, Disturbance(kill, start_again)).run()
    nothing_is_wrong(report)
    assert (report.takeovers > 0, report.begun_again > 0) == (True, True)


@pytest.mark.timeout(TIMEOUT_S)
async def test_nothing_is_lost_stuck_or_wrong_when_the_database_is_restarted(tmp_path: Path, server: Server) -> None:
    plan = plan_of(120, 3, Knobs(workers=8, lease_s=3.0))
    open_then: list[int] = []
    async with replicas(tmp_path, server.url, pace_by(SEED), has_short_leases=HAS_SHORT_LEASES) as fleet:

        async def stop(number: int) -> None:
            open_then.append(sum(each.is_open for each in fleet.backend.generations))
            await asyncio.to_thread(server.stop, ENDS[number % 3])

        async def start_again(number: int) -> None:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.start)

        report = await ReplicaCampaign(fleet, plan, Disturbance(stop, start_again)).run()
    nothing_is_wrong(report)
    assert open_then.count(0) <= len(open_then) // 10, "there was nothing to go wrong"


@pytest.mark.timeout(TIMEOUT_S)
async def test_a_rolling_update_loses_no_run_and_cuts_nothing_but_streams_that_go_on_elsewhere(tmp_path: Path) -> None:
    """A lease that does not run out, and one attempt: each run is handed over, and its attempt does not count."""
    knobs = Knobs(workers=8, lease_s=600.0, max_attempts=1)
    again = frozenset({"still_running"})
    plan = plan_of(120, 3, knobs, cuts_allowed=frozenset({"followed"}), again_allowed=again)
    async with replicas(tmp_path, emptied(), pace_by(SEED), has_short_leases=HAS_SHORT_LEASES) as fleet:

        async def begin_new(number: int) -> None:
            await fleet.start(knobs)

        async def end_old(number: int) -> None:
            await fleet.leave(fleet.proxies[number])

        report = await ReplicaCampaign(fleet, plan, Disturbance(end_old, prepare=begin_new)).run()
    nothing_is_wrong(report)
    assert report.takeovers > 0


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_a_stream_goes_on_at_another_replica_without_a_gap_when_its_own_is_killed(fleet: Replicas) -> None:
    first = await fleet.start()
    response_id = await begun_stream(fleet, first, "held at 4: run 0")
    second, third = await asyncio.gather(fleet.start(), fleet.start())
    reading = Reading()
    following = asyncio.create_task(read_on(fleet, first, response_id, reading))
    await until(lambda: reading.text, "text of the first attempt")
    await first.kill()
    (error,) = await asyncio.gather(following, return_exceptions=True)
    assert isinstance(error, BROKEN)
    await let_go_on(fleet, range(1))
    await read_on(fleet, second, response_id, reading)
    assert (reading.faults, reading.attempts, reading.text) == ([], 2, answer_to(asked("held at 4: run 0")))
    assert reading.final == await fleet.get(third, response_id)
    assert await fleet.told(third, response_id) == reading.events


async def test_a_stream_that_is_read_at_another_replica_for_every_event_has_no_gap(fleet: Replicas) -> None:
    """All of them live, and one of them carries it out."""
    proxies = await fleet.start_three()
    response_id = await begun_stream(fleet, proxies[0], "held at 4: run 0")
    reading, looks = Reading(), 0
    while reading.final is None:
        async with contextlib.aclosing(fleet.tail(proxies[looks % 3], response_id, reading.last)) as events:
            reading.note(await anext(events))
        looks += 1
        if len(reading.text.split()) == 4:
            fleet.backend.let_go("held at 4: run 0")
    assert (reading.faults, reading.attempts, reading.text) == ([], 1, answer_to(asked("held at 4: run 0")))
    assert text_of(reading.final) == reading.text
    for proxy in proxies:
        assert (await fleet.get(proxy, response_id), await fleet.told(proxy, response_id)) == (
            reading.final,
            reading.events,
        )


# -- cancels -----------------------------------------------------------------------------------------------------------


async def stopped_after_s(fleet: Replicas, number: int) -> float:
    """From the moment at which the cancel is sent to the one at which the backend sees that nobody listens any more."""
    carrier, asked_for = fleet.proxies[0], fleet.proxies[number % 3]
    prompt = f"held at 4: run {number}"
    created = await fleet.create(carrier, prompt)
    generation = await fleet.backend.begun(prompt, sent=4)
    sent_at = asyncio.get_running_loop().time()
    assert (await fleet.cancel(asked_for, created["id"]))["status"] == "cancelled"
    await until(lambda: generation.ended_at, "end of the request")
    assert generation.ended_at is not None
    return generation.ended_at - sent_at


async def test_a_cancel_through_any_replica_stops_the_backend_within_a_second(fleet: Replicas) -> None:
    """The median for each replica: whatever else this machine does delays single ones, and not most of them.

    A process that saw the cancel only when it looks by itself, or renews its lease, would be late at each.
    """
    carrier = await fleet.start(Knobs(lease_s=600.0))
    await asyncio.gather(*(fleet.start(Knobs(workers=0, lease_s=600.0)) for _ in range(2)))
    took_s = [await stopped_after_s(fleet, number) for number in range(3 * CANCELS)]
    medians_s = [statistics.median(took_s[first::3]) for first in range(3)]
    print(f"cancels: medians {medians_s}, the slowest {max(took_s)}")
    assert max(medians_s) <= STOPPED_WITHIN_S
    assert "Traceback" not in carrier.said()


async def test_a_run_that_ends_before_its_replica_sees_the_cancel_is_let_go_without_waiting_for_its_lease(
    fleet: Replicas,
) -> None:
    fleet.program = ("-c", UNAWARE)
    carrier = await fleet.start(Knobs(lease_s=600.0))
    created = await fleet.create(carrier, "held at 4: run 0")
    await fleet.backend.begun("held at 4: run 0", sent=4)
    fleet.program = ("proxy.py",)
    other = await fleet.start(Knobs(workers=0, lease_s=600.0))
    assert (await fleet.cancel(other, created["id"]))["status"] == "cancelled"
    fleet.backend.let_go("held at 4: run 0")
    await until(lambda: not fleet.place.asked("SELECT 1 FROM run"), "end of the run", 10.0)
    assert (await fleet.get(other, created["id"]))["status"] == "cancelled"
