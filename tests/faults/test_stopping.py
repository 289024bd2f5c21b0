"""SIGTERM: runs go to another process at once, foreground turns are finished, and the end comes in time."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import aiohttp
from campaign_harness import (
    BROKEN,
    Fleet,
    Knobs,
    Proxy,
    Reading,
    answer_to,
    answered,
    asked,
    request_of,
    text_of,
    until,
)
from held_runs import begun, begun_streams, let_go_on, read_on

pytest_plugins = ["fleet_fixtures"]

Json = dict[str, Any]
# A lease that cannot be what a run waited for.
LONG = 600.0
PATIENT = Knobs(lease_s=LONG)
RUNS = 40
# How often is looked whether nothing happens: for longer than a process takes to see what others write.
LOOKS = 30


async def refuses_connections(proxy: Proxy) -> None:
    host, port = (proxy.url or "").removeprefix("http://").split(":")

    async def refuses() -> bool:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionError:
            return True
        writer.transport.abort()
        return False

    await until(refuses, "process that stops")


async def fails(fleet: Fleet, proxy: Proxy, prompt: str) -> bool:
    """Whether a turn that a client waits for is cut, or answered with an error."""
    try:
        async with fleet.http.post(f"{proxy.url}/v1/responses", json={"model": "m", "input": prompt}) as answer:
            return answer.status >= 400
    except aiohttp.ClientError:
        return True


async def test_sigterm_hands_runs_to_another_process_at_once(fleet: Fleet) -> None:
    first = await fleet.start(PATIENT)
    created = await begun(fleet, first, 4)
    second = await fleet.start(PATIENT)
    assert await first.stop() == 0
    await let_go_on(fleet, range(4))
    texts = [text_of(await fleet.finished(second, response["id"])) for response in created]
    assert texts == [answer_to(asked(f"held at 4: run {number}")) for number in range(4)]
    assert fleet.backend.doubles() == []
    assert "Traceback" not in first.said() + second.said()


async def test_a_run_that_is_handed_over_has_not_been_attempted(fleet: Fleet) -> None:
    knobs = Knobs(lease_s=LONG, max_attempts=1)
    process = await fleet.start(knobs)
    (created,) = await begun(fleet, process, 1)
    for times in (2, 3):
        assert await process.stop() == 0
        await process.start()
        await fleet.backend.begun("held at 4: run 0", times, sent=4)
    fleet.backend.let_go("held at 4: run 0")
    assert (await fleet.finished(process, created["id"]))["status"] == "completed"


async def test_a_reader_of_a_process_that_stops_goes_on_at_another_one_without_a_gap(fleet: Fleet) -> None:
    first = await fleet.start(PATIENT)
    (response_id,) = await begun_streams(fleet, first, 1)
    second = await fleet.start(PATIENT)
    reading = Reading()
    following = asyncio.create_task(read_on(fleet, first, response_id, reading))
    await until(lambda: reading.text, "text of the first attempt")
    assert await first.stop() == 0
    (error,) = await asyncio.gather(following, return_exceptions=True)
    assert isinstance(error, BROKEN)
    await let_go_on(fleet, range(1))
    await read_on(fleet, second, response_id, reading)
    assert (reading.faults, reading.text) == ([], answer_to(asked("held at 4: run 0")))
    assert reading.final == await fleet.get(second, response_id)


async def test_a_foreground_turn_is_finished_within_the_grace_while_runs_go_on_elsewhere(fleet: Fleet) -> None:
    first = await fleet.start(PATIENT)
    (created,) = await begun(fleet, first, 1)
    waited_for = asyncio.create_task(fleet.post(first, {"model": "m", "input": "held at 4: waited for"}))
    await fleet.backend.begun("held at 4: waited for", sent=4)
    second = await fleet.start(PATIENT)
    first.signal(signal.SIGTERM)
    await let_go_on(fleet, range(1))
    assert text_of(await fleet.finished(second, created["id"])) == answer_to(asked("held at 4: run 0"))
    fleet.backend.let_go("held at 4: waited for")
    assert text_of(await waited_for) == answer_to(asked("held at 4: waited for"))
    assert await first.ended() == 0


async def test_a_process_that_stops_claims_nothing_more(fleet: Fleet) -> None:
    process = await fleet.start(PATIENT)
    waited_for = asyncio.create_task(fleet.post(process, {"model": "m", "input": "held at 4: waited for"}))
    await fleet.backend.begun("held at 4: waited for", sent=4)
    process.signal(signal.SIGTERM)
    await refuses_connections(process)
    other = await fleet.start(Knobs(workers=0))
    created = await fleet.create(other, "run 0")
    for _ in range(LOOKS):
        assert (await fleet.get(other, created["id"]))["status"] == "queued"
        await asyncio.sleep(0.05)
    fleet.backend.let_go("held at 4: waited for")
    await waited_for
    assert await process.ended() == 0
    assert fleet.backend.of("run 0") == []


async def test_a_second_sigterm_ends_a_process_whose_foreground_turn_hangs(fleet: Fleet) -> None:
    process = await fleet.start(Knobs(lease_s=LONG, shutdown_grace_s=600.0))
    (created,) = await begun(fleet, process, 1)
    hanging = asyncio.create_task(fails(fleet, process, "held at 4: waited for"))
    await fleet.backend.begun("held at 4: waited for", sent=4)
    process.signal(signal.SIGTERM)
    await refuses_connections(process)
    assert await process.stop() == 0
    assert await hanging
    fleet.backend.let_go("held at 4: run 0")
    second = await fleet.start(PATIENT)
    assert (await fleet.finished(second, created["id"]))["status"] == "completed"


# -- four workers of another server ------------------------------------------------------------------------------------


async def start_workers(fleet: Fleet, knobs: Knobs) -> Proxy:
    environ = {"RESPONSES_PROXY_CONFIG": fleet.config(knobs), **fleet.place.environ}
    arguments = ("-m", "uvicorn", "--workers", "4", "--timeout-graceful-shutdown", "10", "--port", "0", "proxy:app")
    proxy = await fleet.started(Proxy(*arguments, **environ))
    await until(lambda: proxy.said().count("startup complete") == 4, "four workers")
    return proxy


def children_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


async def ended_over_a_connection_of_its_own(fleet: Fleet, proxy: Proxy, number: int) -> None:
    """A run is created, followed and continued over connections that are not used again."""
    prompt = f"run {number}"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        body = request_of(prompt, stream=number % 3 == 0)
        async with http.post(f"{proxy.url}/v1/responses", json=body) as answer:
            text = await answer.text()
        response_id = (
            json.loads(text.splitlines()[1][6:])["response"]["id"] if number % 3 == 0 else json.loads(text)["id"]
        )
        child = await fleet.create(proxy, f"child {number}", previous_response_id=response_id)
        finished = await fleet.finished(proxy, child["id"])
    assert text_of(finished) == answer_to(asked(f"child {number}", answered(asked(prompt))))


async def test_four_workers_share_one_store(fleet: Fleet) -> None:
    proxy = await start_workers(fleet, Knobs(workers=4))
    async with asyncio.TaskGroup() as group:
        for number in range(RUNS):
            group.create_task(ended_over_a_connection_of_its_own(fleet, proxy, number))
    assert len(fleet.backend.generations) == 2 * RUNS
    assert "Traceback" not in proxy.said()


async def test_sigterm_to_the_master_ends_all_workers_and_gives_their_runs_back(fleet: Fleet) -> None:
    proxy = await start_workers(fleet, PATIENT)
    children = children_of(proxy.pid)
    created = await begun(fleet, proxy, 4)
    assert await proxy.stop() == 0
    await until(lambda: not living(children), "end of all workers")
    await until(lambda: not [each for each in fleet.backend.generations if each.is_open], "end of all requests")
    alone = await fleet.start(PATIENT)
    await let_go_on(fleet, range(4))
    statuses = [(await fleet.finished(alone, response["id"]))["status"] for response in created]
    assert statuses == ["completed"] * 4
    assert "Traceback" not in proxy.said()
