"""Proxies on one store, for tests that name this plugin; their prompts say where a generation stands still."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from campaign_harness import Fleet, Pace, running_fleet
from store_places import Place

HELD = re.compile(r"held at ([-\d, ]+):")


def pace_of(prompt: str) -> Pace:
    """`held at 4, 6: …` stands still before the pieces 4 and 6 until it is let go; all else flows."""
    found = HELD.match(prompt)
    return Pace(every_s=0.005, held_at=frozenset(map(int, found[1].split(","))) if found else frozenset())


@pytest.fixture
async def fleet(place: Place, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with running_fleet(place, tmp_path, pace_of) as fleet:
        yield fleet
