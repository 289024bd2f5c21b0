"""Two processes on one store: what one began, the other sees, cancels and finishes."""

from __future__ import annotations

import asyncio
import signal

import pytest
from campaign_harness import BROKEN, Fleet, Knobs, Proxy, Reading, answer_to, answered, asked, text_of, until
from held_runs import begun, begun_stream, begun_streams, let_go_on, read_on

pytest_plugins = ["fleet_fixtures"]

CLOSED_WITHIN_S = 1.0
# Well before the lease that a dead process had on a conversation would run out.
SOON_S = 15.0


async def test_another_process_finishes_what_a_killed_one_had_begun(fleet: Fleet) -> None:
    first = await fleet.start()
    created = await begun(fleet, first, 6)
    second = await fleet.start()
    await first.kill()
    await let_go_on(fleet, range(6))
    finished = [await fleet.finished(second, response["id"]) for response in created]
    assert [text_of(each) for each in finished] == [answer_to(asked(f"held at 4: run {number}")) for number in range(6)]
    assert fleet.backend.doubles() == []


async def test_another_process_carries_out_the_queue_of_a_killed_one(fleet: Fleet) -> None:
    first = await fleet.start(Knobs(workers=1))
    (parent,) = await begun(fleet, first, 1)
    child = await fleet.create(first, "child", previous_response_id=parent["id"])
    others = [await fleet.create(first, f"other {number}") for number in range(5)]
    await first.kill()
    second = await fleet.start()
    await let_go_on(fleet, range(1))
    texts = [text_of(await fleet.finished(second, response["id"])) for response in (child, *others)]
    transcript = asked("child", answered(asked("held at 4: run 0")))
    assert texts == [answer_to(transcript), *(answer_to(asked(f"other {number}")) for number in range(5))]
    assert [len(fleet.backend.of(f"other {number}")) for number in range(5)] == [1] * 5


async def test_a_stream_tailed_at_another_process_has_no_gap_when_the_first_one_is_killed(fleet: Fleet) -> None:
    first = await fleet.start()
    (created,) = await begun_streams(fleet, first, 1)
    second = await fleet.start()
    reading = Reading()
    following = asyncio.create_task(read_on(fleet, second, created, reading))
    await until(lambda: reading.text, "text of the first attempt")
    await first.kill()
    await let_go_on(fleet, range(1))
    await following
    assert (reading.faults, reading.attempts, reading.text) == ([], 2, answer_to(asked("held at 4: run 0")))
    assert reading.final == await fleet.get(second, created)
    assert await fleet.told(second, created) == reading.events


async def test_a_reader_of_a_killed_process_goes_on_at_another_one_without_a_gap(fleet: Fleet) -> None:
    first = await fleet.start()
    (created,) = await begun_streams(fleet, first, 1)
    second = await fleet.start()
    reading = Reading()
    following = asyncio.create_task(read_on(fleet, first, created, reading))
    await until(lambda: reading.text, "text of the first attempt")
    await first.kill()
    (error,) = await asyncio.gather(following, return_exceptions=True)
    assert isinstance(error, BROKEN)
    await let_go_on(fleet, range(1))
    await read_on(fleet, second, created, reading)
    assert (reading.faults, reading.attempts, reading.text) == ([], 2, answer_to(asked("held at 4: run 0")))
    assert reading.final == await fleet.get(second, created)


async def test_a_cancel_through_another_process_stops_the_backend_at_once(fleet: Fleet) -> None:
    first = await fleet.start(Knobs(lease_s=600.0))
    (created,) = await begun(fleet, first, 1)
    second = await fleet.start(Knobs(lease_s=600.0))
    cancelled = await fleet.cancel(second, created["id"])
    answered_at = asyncio.get_running_loop().time()
    (generation,) = fleet.backend.of("held at 4: run 0")
    ended_at = await until(lambda: generation.ended_at, "end of the request")
    assert ended_at <= answered_at + CLOSED_WITHIN_S
    assert (cancelled["status"], cancelled["output"]) == ("cancelled", [])
    assert await fleet.get(first, created["id"]) == cancelled


async def test_what_was_cancelled_before_its_process_was_killed_is_not_begun_again(fleet: Fleet) -> None:
    first = await fleet.start()
    created = await begun(fleet, first, 2)
    second = await fleet.start()
    cancelled = await fleet.cancel(second, created[0]["id"])
    await first.kill()
    fleet.backend.let_go("held at 4: run 1")
    await fleet.finished(second, created[1]["id"])
    assert await fleet.get(second, created[0]["id"]) == cancelled
    assert len(fleet.backend.of("held at 4: run 0")) == 1


async def test_a_run_can_be_cancelled_while_its_process_is_dead(fleet: Fleet) -> None:
    first = await fleet.start(Knobs(lease_s=600.0))
    (created,) = await begun(fleet, first, 1)
    second = await fleet.start(Knobs(lease_s=600.0))
    await first.kill()
    cancelled = await fleet.cancel(second, created["id"])
    assert cancelled["status"] == "cancelled"
    await fleet.finished(second, (await fleet.create(second, "the next one"))["id"])
    assert await fleet.get(second, created["id"]) == cancelled
    assert len(fleet.backend.of("held at 4: run 0")) == 1


async def test_a_conversation_goes_on_in_order_at_another_process_when_the_first_one_is_killed(fleet: Fleet) -> None:
    first = await fleet.start()
    async with fleet.http.post(f"{first.url}/v1/conversations", json={}) as answer:
        conversation = (await answer.json())["id"]
    created = await begun(fleet, first, 1, conversation=conversation)
    created += [await fleet.create(first, prompt, conversation=conversation) for prompt in ("one", "two")]
    second = await fleet.start()
    await first.kill()
    await let_go_on(fleet, range(1), SOON_S)
    texts = [text_of(await fleet.finished(second, response["id"])) for response in created]
    before = answered(asked("held at 4: run 0"))
    transcripts = [asked("held at 4: run 0"), asked("one", before), asked("two", answered(asked("one", before)))]
    assert texts == [answer_to(transcript) for transcript in transcripts]
    assert fleet.backend.doubles() == []


# -- a process that stands still ---------------------------------------------------------------------------------------


async def overtaken(fleet: Fleet, prompt: str) -> tuple[Proxy, Proxy, str]:
    """A process that was stopped in the middle of a streamed run, and another one that has begun it again."""
    first = await fleet.start()
    response_id = await begun_stream(fleet, first, prompt)
    second = await fleet.start()
    first.signal(signal.SIGSTOP)
    await fleet.backend.begun(prompt, times=2, sent=4)
    return first, second, response_id


async def is_awake(fleet: Fleet, process: Proxy) -> None:
    process.signal(signal.SIGCONT)
    created = await fleet.create(process, "the next one")
    assert (await fleet.finished(process, created["id"]))["status"] == "completed"


async def test_a_process_that_wakes_up_after_the_end_of_its_run_changes_nothing(fleet: Fleet) -> None:
    prompt = "held at 4: run 0"
    first, second, response_id = await overtaken(fleet, prompt)
    fleet.backend.let_go(prompt)
    response = await fleet.finished(second, response_id)
    told = await fleet.told(second, response_id)
    await until(lambda: fleet.backend.of(prompt)[0].is_whole, "whole answer to the first request")
    await is_awake(fleet, first)
    assert await first.stop() == 0
    assert await fleet.get(second, response_id) == response
    assert await fleet.told(second, response_id) == told
    assert "Traceback" not in first.said()


@pytest.mark.parametrize("prompt", ["held at 4: run 0", "held at 4, 6: run 0"], ids=["whole", "more"])
async def test_a_process_that_wakes_up_in_the_next_attempt_writes_nothing_into_it(fleet: Fleet, prompt: str) -> None:
    """What it finds then is the whole answer, or more of it."""
    first, second, response_id = await overtaken(fleet, prompt)
    reading = Reading()
    following = asyncio.create_task(read_on(fleet, second, response_id, reading))
    await until(lambda: reading.attempts == 2 and reading.text, "text of the second attempt")
    fleet.backend.of(prompt)[0].go_on()
    await fleet.backend.begun(prompt, sent=6)
    await is_awake(fleet, first)
    await until(lambda: not fleet.backend.of(prompt)[0].is_open, "end of the first request")
    assert (await fleet.get(first, response_id))["status"] == "in_progress"
    fleet.backend.let_go(prompt)
    await following
    assert (reading.faults, reading.attempts, reading.text) == ([], 2, answer_to(asked(prompt)))
    assert reading.final == await fleet.get(second, response_id)
    assert await fleet.told(first, response_id) == reading.events
    assert len(fleet.backend.of(prompt)) == 2


async def test_a_process_that_wakes_up_in_the_next_attempt_does_not_end_it(fleet: Fleet) -> None:
    """Of a run whose events are not kept, so that its end is all that is written."""
    prompt = "held at 4: run 0"
    first = await fleet.start()
    (created,) = await begun(fleet, first, 1)
    second = await fleet.start()
    first.signal(signal.SIGSTOP)
    await fleet.backend.begun(prompt, times=2, sent=4)
    fleet.backend.of(prompt)[0].go_on()
    await until(lambda: fleet.backend.of(prompt)[0].is_whole, "whole answer to the first request")
    await is_awake(fleet, first)
    assert (await fleet.get(first, created["id"]))["status"] == "in_progress"
    assert await first.stop() == 0
    fleet.backend.let_go(prompt)
    assert text_of(await fleet.finished(second, created["id"])) == answer_to(asked(prompt))
    assert len(fleet.backend.of(prompt)) == 2
