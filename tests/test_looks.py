"""Looks that are made beside requests."""

from __future__ import annotations

import asyncio

from looks import Look


class Seen:
    """What is looked at: counts the looks, each of which ends when it may."""

    def __init__(self) -> None:
        self.looks = 0
        self.may_end = asyncio.Event()

    async def look(self) -> None:
        self.looks += 1
        await self.may_end.wait()


async def test_a_look_is_waited_for() -> None:
    seen = Seen()
    look = Look(seen.look)
    seen.may_end.set()
    look.again(10.0)
    await look.wait()
    assert seen.looks == 1


async def test_a_young_look_is_not_made_again() -> None:
    seen = Seen()
    look = Look(seen.look)
    seen.may_end.set()
    for _ in range(2):
        look.again(10.0)
        await look.wait()
    assert seen.looks == 1


async def test_an_old_look_is_made_again() -> None:
    seen = Seen()
    look = Look(seen.look)
    seen.may_end.set()
    for _ in range(2):
        look.again(0.0)
        await look.wait()
    assert seen.looks == 2


async def test_what_was_seen_on_another_occasion_is_not_looked_at() -> None:
    seen = Seen()
    look = Look(seen.look)
    look.begun()
    look.again(10.0)
    await look.wait()
    assert seen.looks == 0


async def test_a_look_that_takes_long_is_neither_waited_for_nor_doubled() -> None:
    seen = Seen()
    look = Look(seen.look)
    for _ in range(2):
        look.again(0.0)
        await look.wait()
    assert seen.looks == 1
    await look.close()


async def test_only_the_first_waits_for_a_look_that_takes_long() -> None:
    seen = Seen()
    look = Look(seen.look)
    look.again(10.0)
    await look.wait()
    began_at = asyncio.get_running_loop().time()
    await asyncio.gather(*(look.wait() for _ in range(10)))
    assert asyncio.get_running_loop().time() - began_at < 0.1
    await look.close()


async def test_a_look_ends_with_its_owner() -> None:
    seen = Seen()
    look = Look(seen.look)
    look.again(10.0)
    await look.wait()
    await look.close()
    assert [task for task in asyncio.all_tasks() if "Seen.look" in repr(task)] == []
