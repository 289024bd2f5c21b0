"""Places at a backend: who is let in, in which order, who is turned away, and what is noted of a call."""

from __future__ import annotations

import asyncio
import math

import pytest

from circuits import Circuit
from gates import Gate, Guard, Hold, Terms
from upstream_errors import CircuitOpen, UpstreamBroken, UpstreamBusy, UpstreamError, UpstreamRefused, UpstreamTimeout

TINY_S = 0.01


def gate(most_in: int = 1, most_waiting: int = 9, wait_s: float = math.inf) -> Gate:
    return Gate("one", most_in, most_waiting, wait_s)


async def settle() -> None:
    """A few turns of the loop, in which others go as far as they can."""
    for _ in range(5):
        await asyncio.sleep(0)


class Line:
    """Callers of a gate, who note when it is their turn."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.entered: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def join(self, *, is_patient: bool = False) -> asyncio.Task[None]:
        task = asyncio.create_task(self._wait(len(self.tasks), is_patient))
        self.tasks.append(task)
        await settle()
        return task

    async def _wait(self, number: int, is_patient: bool) -> None:
        await self.gate.enter_in_turn(is_patient=is_patient)
        self.entered.append(number)


async def full(**limits: float) -> Line:
    """The line before a gate whose only place is taken."""
    line = Line(gate(**limits))  # type: ignore[arg-type]
    assert line.gate.enter_at_once()
    return line


def test_a_gate_without_a_limit_lets_everybody_in() -> None:
    free = gate(most_in=0)
    assert [free.enter_at_once() for _ in range(99)] == [True] * 99
    assert free.inside == 99


def test_a_gate_has_so_many_places() -> None:
    two = gate(most_in=2)
    assert [two.enter_at_once() for _ in range(3)] == [True, True, False]
    two.leave()
    assert two.enter_at_once()


async def test_who_came_first_enters_first() -> None:
    line = await full()
    for _ in range(3):
        await line.join()
    for _ in range(3):
        line.gate.leave()
        await settle()
    assert line.entered == [0, 1, 2]
    line.gate.leave()
    assert (line.gate.inside, line.gate.waiting) == (0, 0)


async def test_nobody_passes_those_who_wait() -> None:
    line = await full()
    first = await line.join()
    line.gate.leave()
    assert not line.gate.enter_at_once()  # the place is the first one's, who has not noticed yet
    await first
    assert line.gate.inside == 1


async def test_a_line_that_is_full_turns_others_away_at_once() -> None:
    line = await full(most_waiting=1)
    first = await line.join()
    with pytest.raises(UpstreamBusy, match="1 requests wait for it already") as caught:
        await line.gate.enter_in_turn(is_patient=False)
    assert (caught.value.http_status, caught.value.retry_after_s) == (503, 2.0)
    line.gate.leave()
    await first


async def test_a_wait_comes_to_an_end() -> None:
    line = await full(wait_s=TINY_S)
    with pytest.raises(UpstreamBusy, match=r"no place became free within 0\.01 s"):
        await line.gate.enter_in_turn(is_patient=False)
    assert (line.gate.inside, line.gate.waiting) == (1, 0)


async def test_the_patient_are_not_turned_away() -> None:
    line = await full(most_waiting=0, wait_s=0.0)
    patient = await line.join(is_patient=True)
    line.gate.leave()
    await patient
    assert line.entered == [0]


async def test_who_leaves_the_line_does_not_hold_it_up() -> None:
    line = await full()
    first = await line.join()
    second = await line.join()
    first.cancel()
    await asyncio.wait({first})
    line.gate.leave()
    await second
    assert (line.entered, line.gate.inside, line.gate.waiting) == ([1], 1, 0)


@pytest.mark.parametrize("another_waits", [True, False])
async def test_who_leaves_as_their_turn_comes_gives_it_on(another_waits: bool) -> None:
    line = await full()
    first = await line.join()
    second = await line.join() if another_waits else None
    line.gate.leave()
    first.cancel()
    await asyncio.wait({first})
    if second:
        await second
    assert (first.cancelled(), line.gate.inside, line.gate.waiting) == (True, int(another_waits), 0)


# -- calls -------------------------------------------------------------------------------------------------------------


class Noted:
    def __init__(self) -> None:
        self.failures: list[str] = []

    def turned_away(self, upstream: str, error: UpstreamError) -> None:
        self.failures.append(f"{upstream} {type(error).__name__}")

    def fell_back(self, upstream: str, to: str, error: UpstreamError) -> None:
        raise AssertionError("that is not for a gate to say")


class Door:
    """A guard with a clock that a test sets."""

    def __init__(self, most_in: int = 1, most_failures: int = 1) -> None:
        self.now = 0.0
        self.observer = Noted()
        self.gate = gate(most_in, most_waiting=0)
        circuit = Circuit("one", most_failures, 15.0, lambda: self.now)
        self.guard = Guard("one", self.gate, circuit, self.observer)

    def held(self, *, has_other: bool = True) -> Hold:
        return Hold(self.guard, Terms(has_other))

    async def failing(self, error: BaseException, *, is_kept: bool = False) -> None:
        with pytest.raises(type(error)):
            await self._call(error, is_kept)

    async def _call(self, error: BaseException, is_kept: bool) -> None:
        async with self.held() as hold:
            if is_kept:
                hold.keep()
            raise error


async def test_a_call_has_its_place_to_its_end() -> None:
    door = Door()
    async with door.held():
        with pytest.raises(UpstreamBusy):
            await door.held().__aenter__()
    assert door.gate.inside == 0
    assert door.observer.failures == ["one UpstreamBusy"]


async def test_a_call_that_is_kept_has_its_place_until_it_is_ended() -> None:
    door = Door()
    async with door.held() as hold:
        hold.keep()
    assert door.gate.inside == 1
    hold.end()
    hold.end()
    assert door.gate.inside == 0


async def test_a_failure_gives_the_place_back_although_it_was_to_be_kept() -> None:
    door = Door()
    await door.failing(UpstreamBroken("cut"), is_kept=True)
    assert door.gate.inside == 0


async def test_a_failed_call_opens_the_circuit_and_the_next_is_noted_as_turned_away() -> None:
    door = Door()
    await door.failing(UpstreamBroken("cut"))
    with pytest.raises(CircuitOpen):
        await door.held().__aenter__()
    assert door.observer.failures == ["one CircuitOpen"]
    assert door.gate.inside == 0


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyError("ours"), UpstreamRefused("no", status=429)])
async def test_what_is_not_the_backends_fault_leaves_the_circuit_closed(error: BaseException) -> None:
    door = Door()
    await door.failing(error)
    async with door.held():
        assert door.gate.inside == 1


async def test_a_call_that_is_given_up_tells_nothing_of_the_backend() -> None:
    door = Door(most_failures=2)
    await door.failing(UpstreamBroken("cut"))
    async with door.held() as hold:
        hold.keep()
    hold.give_up()
    await door.failing(UpstreamBroken("cut"))
    assert door.guard.circuit.is_open


async def test_a_failure_that_is_not_raised_counts() -> None:
    door = Door()
    async with door.held() as hold:
        hold.failed(UpstreamRefused("oh", status=502))
    assert door.guard.circuit.is_open


async def test_a_circuit_that_opens_while_a_caller_waits_turns_it_away_and_its_place_goes_on() -> None:
    door = Door()
    door.guard = door.guard._replace(gate=gate(1))
    first = door.held()
    await first.__aenter__()
    second = asyncio.create_task(door.held().__aenter__())
    await settle()
    first.end(UpstreamBroken("cut"))
    with pytest.raises(CircuitOpen):
        await second
    assert door.guard.gate.inside == 0


async def test_a_probe_that_is_answered_lets_others_in_who_have_nowhere_else_to_go() -> None:
    door = Door(most_in=2)
    await door.failing(UpstreamTimeout("late"))
    door.now += 15
    async with door.held(has_other=False) as hold:
        with pytest.raises(CircuitOpen):
            await door.held(has_other=False).__aenter__()
        hold.keep()
        async with door.held(has_other=False):
            assert door.gate.inside == 2
    hold.end()
