"""Runs that stand still in the middle of their answers, and readers of them."""

from __future__ import annotations

import contextlib
from typing import Any

from campaign_harness import DEADLINE_S, Fleet, Proxy, Reading, events_of, request_of

Json = dict[str, Any]


async def begun(fleet: Fleet, proxy: Proxy, count: int, **fields: Any) -> list[Json]:
    """Runs of a process that stand still in the middle of their answers."""
    created = [await fleet.create(proxy, f"held at 4: run {number}", **fields) for number in range(count)]
    for number in range(count):
        await fleet.backend.begun(f"held at 4: run {number}", sent=4)
    return created


async def begun_streams(fleet: Fleet, proxy: Proxy, count: int) -> list[str]:
    """The ids of streamed runs that stand still in the middle; who created them has left."""
    return [await begun_stream(fleet, proxy, f"held at 4: run {number}") for number in range(count)]


async def begun_stream(fleet: Fleet, proxy: Proxy, prompt: str) -> str:
    """The same for one prompt that stands still at its fourth piece."""
    async with fleet.http.post(f"{proxy.url}/v1/responses", json=request_of(prompt, stream=True)) as answer:
        async with contextlib.aclosing(events_of(answer)) as events:
            created = await anext(events)
        await fleet.backend.begun(prompt, sent=4)
    return str(created["response"]["id"])


async def let_go_on(fleet: Fleet, numbers: range, deadline_s: float = DEADLINE_S) -> None:
    """Once their second attempts stand where the first ones did."""
    for number in numbers:
        await fleet.backend.begun(f"held at 4: run {number}", times=2, sent=4, deadline_s=deadline_s)
        fleet.backend.let_go(f"held at 4: run {number}")


async def read_on(fleet: Fleet, proxy: Proxy, response_id: str, reading: Reading) -> None:
    """To the end, or to the cut."""
    async for event in fleet.tail(proxy, response_id, reading.last):
        reading.note(event)
