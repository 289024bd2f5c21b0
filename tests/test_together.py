"""Calls that are made together."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from errors import StoreError
from together import Together

Calls = list[list[int]]


@pytest.fixture
def calls() -> Calls:
    """What was asked, in one list each time."""
    return []


@pytest.fixture
def may_end() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
async def together(calls: Calls, may_end: asyncio.Event) -> AsyncIterator[Together[int, int]]:
    """Doubles numbers, as soon as it may; a 0 is a fault of the store, and a 13 one of the program."""

    async def doubled(numbers: list[int]) -> list[int]:
        calls.append(numbers)
        await may_end.wait()
        if 0 in numbers:
            raise StoreError("away")
        if 13 in numbers:
            raise ZeroDivisionError
        return [2 * number for number in numbers]

    together = Together(doubled)
    yield together
    may_end.set()
    await together.close()


async def begun(together: Together[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(together.call(number)) for number in numbers]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_calls_that_come_meanwhile_are_one(
    together: Together[int, int], calls: Calls, may_end: asyncio.Event
) -> None:
    tasks = [*await begun(together, 1), *await begun(together, 2, 3), *await begun(together, 4)]
    may_end.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 8]
    assert calls == [[1], [2, 3, 4]]


async def test_who_leaves_takes_nothing_from_the_others(
    together: Together[int, int], calls: Calls, may_end: asyncio.Event
) -> None:
    first, second, third = [*await begun(together, 1), *await begun(together, 2, 3)]
    first.cancel()
    second.cancel()
    await asyncio.wait({first, second})
    may_end.set()
    assert await third == 6
    assert calls == [[1], [2, 3]]


async def test_a_fault_of_which_nobody_is_left_to_hear_is_no_noise(
    together: Together[int, int], may_end: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    (task,) = await begun(together, 0)
    task.cancel()
    await asyncio.wait({task})
    may_end.set()
    await together.close()
    gc.collect()
    assert caplog.messages == []


@pytest.mark.parametrize(("number", "error"), [(0, StoreError), (13, ZeroDivisionError)])
async def test_a_fault_is_told_to_all_who_asked_together_and_to_no_later_one(
    together: Together[int, int], may_end: asyncio.Event, number: int, error: type[Exception]
) -> None:
    tasks = await begun(together, 1, number, 2)
    may_end.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [error] * 3
    assert await together.call(5) == 10


async def test_what_is_being_asked_is_waited_for_at_the_end(
    together: Together[int, int], calls: Calls, may_end: asyncio.Event
) -> None:
    (task,) = await begun(together, 1)
    closing = asyncio.create_task(together.close())
    await asyncio.sleep(0)
    assert not closing.done()
    may_end.set()
    await closing
    assert await task == 2
