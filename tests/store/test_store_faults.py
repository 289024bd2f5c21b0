"""What is left of a store when its process is killed, and what it does when its disk is full."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from store_builders import (
    DEADLINE_S,
    OpenStore,
    assert_told,
    conversation_ids,
    integrity_of,
    response_ids,
    rows_in,
    told,
    told_items,
    writer,
)

from verbs import Store

pytest_plugins = ["store_fixtures"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are those of POSIX")

KILLS_EACH = 10
BATCH_EVERY = 3  # as in store_writer.py


def killed_after(lines: int, path: Path, run: str) -> list[str]:
    """The names that a writer said before it was killed: at least so many, and what it said meanwhile."""
    with writer("endless", path, run) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
        assert process.wait(DEADLINE_S) == -9, process.stderr and process.stderr.read()
    return [line.strip() for line in said if line.endswith("\n")]


def is_batch(name: str) -> bool:
    return ".talk." in name and int(name.rsplit(".", 1)[1]) % BATCH_EVERY == 0


async def assert_talk(store: Store, run: str, acknowledged: list[str]) -> int:
    """The conversation of a run is whole up to some turn or batch, and has what was acknowledged. How many it has."""
    found = await conversation_ids(store, f"{run}.talk")
    count = 0
    expected: list[str] = []
    while found is not None and len(expected) < len(found):
        name = f"{run}.talk.{count}"
        items = told_items(name) if is_batch(name) else (*told(name).inputs, *told(name).outputs)
        expected += [item.id for item in items]
        count += 1
    assert (found or []) == expected
    assert all(int(name.rsplit(".", 1)[1]) < count for name in acknowledged if ".talk." in name)
    return count


@pytest.mark.parametrize("seed", range(5))
async def test_a_killed_process_leaves_whole_turns_and_all_it_acknowledged(
    open_at: OpenStore, store_path: Path, seed: int
) -> None:
    """Ten times on one file: three tasks write a chain, forks and a conversation, and die together."""
    random = Random(seed)
    before: set[str] = set()
    turns = 0
    for round_number in range(KILLS_EACH):
        run, lines = f"resp_{seed}x{round_number}", random.randrange(1, 80)
        acknowledged = await asyncio.to_thread(killed_after, lines, store_path, run)
        where = f"seed {seed}, round {round_number}, killed after {lines} lines"
        assert len(acknowledged) >= lines, where
        assert integrity_of(store_path) == "ok", where
        store = await open_at()
        present = await response_ids(store)
        new = [name for name in present if name not in before]
        assert {name for name in acknowledged if not is_batch(name)} <= set(new), where
        assert {name.rsplit(".", 2)[0] for name in new} <= {run}, where
        assert len(new) == len(set(new)) == len(present) - len(before), where
        await assert_told(store, new)
        talked = await assert_talk(store, run, acknowledged)
        talks = sorted(int(name.rsplit(".", 1)[1]) for name in new if ".talk." in name)
        assert talks == [number for number in range(talked) if number % BATCH_EVERY], where
        turns += len(new) + len(range(0, talked, BATCH_EVERY))
        rows = rows_in(store_path)
        assert rows["turn"] == turns, where
        before = set(present)
        await store.close()
    store = await open_at()
    await assert_told(store, before)
    assert await store.problems() == []


def filled_up(path: Path, room_bytes: int) -> dict[str, Any]:
    with writer("full", path, f"resp_{room_bytes}") as process:
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


# No room at all, room for some pages, for some turns, and for so many that they reach the database file itself.
@pytest.mark.parametrize("room_bytes", [0, 30_000, 300_000, 18_000_000])
async def test_a_full_disk_refuses_saves_whole_and_the_process_goes_on_when_there_is_room(
    open_at: OpenStore, store_path: Path, room_bytes: int
) -> None:
    report = await asyncio.to_thread(filled_up, store_path, room_bytes)
    assert len(report["refused"]) >= 30
    assert (report["errors"], report["others"]) == (["StoreError"], ["StoreError"])
    assert all(seconds > 0 for seconds in report["retry_after_s"])
    assert report["readable"] == report["saved"][:20]
    assert integrity_of(store_path) == "ok"
    store = await open_at()
    assert sorted(await response_ids(store)) == sorted(report["saved"])
    await assert_told(store, report["saved"][:20] + report["saved"][-1000:])
    assert await conversation_ids(store, "talk") == ["begin.1", "begin.2"]
    assert await store.problems() == []
    rows = rows_in(store_path)
    assert (rows["turn"], rows["item"]) == (len(report["saved"]) + 1, len(report["saved"]) * 3 + 2)


async def test_what_was_refused_for_a_full_disk_can_be_saved_later(open_at: OpenStore, store_path: Path) -> None:
    report = await asyncio.to_thread(filled_up, store_path, 100_000)
    store = await open_at()
    for name in report["refused"]:
        await store.save(told(name))
    await assert_told(store, report["saved"] + report["refused"])
