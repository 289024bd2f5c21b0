"""A run on which process after process dies ends all the same, and so does one whose answer cannot be saved for now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from campaign_harness import (
    PIECES,
    Fleet,
    Knobs,
    Proxy,
    Reading,
    answer_to,
    answered,
    asked,
    events_of,
    request_of,
    text_of,
    until,
)
from held_runs import begun_streams
from store_places import Place, environ_of

pytest_plugins = ["fleet_fixtures"]

DEADLY = Knobs(lease_s=0.5, max_attempts=2)
PROMPT = "held at 4: run 0"
LATE = f"held at {PIECES}: run 0"


async def given_up(fleet: Fleet) -> tuple[Proxy, str]:
    """A streamed run whose process was killed at each of its two attempts."""
    process = await fleet.start(DEADLY)
    (response_id,) = await begun_streams(fleet, process, 1)
    for times in (1, 2):
        await fleet.backend.begun(PROMPT, times, sent=4)
        await process.kill()
        await process.start()
    return process, response_id


async def test_a_run_whose_process_dies_at_every_attempt_has_failed_and_says_why(fleet: Fleet) -> None:
    process, response_id = await given_up(fleet)
    response = await fleet.finished(process, response_id)
    assert (response["status"], response["output"]) == ("failed", [])
    message = "Given up: the process that carried it out ended 2 times before it did."
    assert response["error"] == {"code": "server_error", "message": message}
    assert len(fleet.backend.of(PROMPT)) == 2


async def test_readers_of_a_run_that_was_given_up_are_told_so(fleet: Fleet) -> None:
    process, response_id = await given_up(fleet)
    reading = Reading()
    for event in await fleet.told(process, response_id):
        reading.note(event)
    assert (reading.faults, reading.attempts, reading.events[-1]["type"]) == ([], 2, "response.failed")
    assert reading.final == await fleet.get(process, response_id)


async def test_a_run_that_waits_for_one_that_was_given_up_fails_and_names_it(fleet: Fleet) -> None:
    process = await fleet.start(DEADLY)
    (response_id,) = await begun_streams(fleet, process, 1)
    child = await fleet.create(process, "child", previous_response_id=response_id)
    for times in (1, 2):
        await fleet.backend.begun(PROMPT, times, sent=4)
        await process.kill()
        await process.start()
    response = await fleet.finished(process, child["id"])
    assert response["status"] == "failed"
    assert response_id in response["error"]["message"]
    assert fleet.backend.of("child") == []


# -- a store that cannot be written for a while ------------------------------------------------------------------------


Block = Callable[[Proxy], AbstractContextManager[None]]


@pytest.fixture(params=["full", "locked"])
def blocked(request: pytest.FixtureRequest, place: Place) -> Block:
    """Keeps a process from writing its store for a while: `with blocked(process): ...`."""
    return lambda process: place.full(process.pid) if request.param == "full" else place.locked()


async def started(fleet: Fleet, place: Place) -> Proxy:
    """A process that hardly waits for a store that is locked, and tells of every try."""
    return await fleet.start(Knobs(lease_s=0.5), **environ_of({"server": {"log_level": "debug"}, "store": place.hasty}))


# What the process says each time when an answer could not be saved.
TRIES = "tried again in"


async def tried_in_vain(process: Proxy, times: int) -> None:
    before = process.said().count(TRIES)
    await until(lambda: process.said().count(TRIES) >= before + times, "saves in vain")


async def test_an_answer_that_cannot_be_saved_is_saved_when_there_is_room(
    fleet: Fleet, place: Place, blocked: Block
) -> None:
    process = await started(fleet, place)
    created = await fleet.create(process, LATE)
    child = await fleet.create(process, "child", previous_response_id=created["id"])
    await fleet.backend.begun(LATE, sent=PIECES)
    with blocked(process):
        fleet.backend.let_go(LATE)
        await tried_in_vain(process, 3)
        assert (await fleet.get(process, created["id"]))["status"] == "in_progress"
        assert (await fleet.get(process, child["id"]))["status"] == "queued"
    assert text_of(await fleet.finished(process, created["id"])) == answer_to(asked(LATE))
    transcript = asked("child", answered(asked(LATE)))
    assert text_of(await fleet.finished(process, child["id"])) == answer_to(transcript)
    assert len(fleet.backend.of(LATE)) == 1
    assert "Traceback" not in process.said()


async def test_a_reader_is_told_the_end_when_it_could_be_saved(fleet: Fleet, place: Place, blocked: Block) -> None:
    process = await started(fleet, place)
    body = request_of(LATE, stream=True)
    reading = Reading()
    async with fleet.http.post(f"{process.url}/v1/responses", json=body) as answer:
        await fleet.backend.begun(LATE, sent=PIECES)
        assert answer.status == 200
        with blocked(process):
            fleet.backend.let_go(LATE)
            await tried_in_vain(process, 2)
        async for event in events_of(answer):
            reading.note(event)
    assert (reading.faults, reading.attempts, reading.text) == ([], 1, answer_to(asked(LATE)))
    assert reading.final is not None
    assert reading.final["status"] == "completed"


async def test_an_answer_that_could_not_be_saved_before_the_kill_is_made_again(
    fleet: Fleet, place: Place, blocked: Block
) -> None:
    process = await started(fleet, place)
    created = await fleet.create(process, LATE)
    await fleet.backend.begun(LATE, sent=PIECES)
    with blocked(process):
        fleet.backend.let_go(LATE)
        await tried_in_vain(process, 1)
        await process.kill()
    await process.start()
    assert text_of(await fleet.finished(process, created["id"])) == answer_to(asked(LATE))
    assert len(fleet.backend.of(LATE)) == 2
