"""Turns, items and lists for the tests of a store: small, named by the test, and equal when built twice."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any, Literal

import msgspec
from store_places import FilePlace, Place

from verbs import Conversation, ItemIds, KeptResponse, Listed, NewItem, NewTurn, Page, Store, Window

OWNER, STRANGER = "owner", "stranger"
NOW = 10_000.0
DEADLINE_S = 50.0
ALL_ASC, ALL_DESC = Page(limit=1000, order="asc"), Page(limit=1000)
TABLES = ("turn", "item", "item_id", "thread", "settings")

OpenStore = Callable[..., Awaitable[Store]]
GiveItems = Callable[[Page], Awaitable[Listed[bytes] | None]]


def message(item_id: str, text: str = "Hi") -> NewItem:
    return NewItem(item_id, json.dumps({"id": item_id, "type": "message", "text": text}).encode())


def reasoning(item_id: str) -> NewItem:
    return NewItem(item_id, json.dumps({"id": item_id, "type": "reasoning"}).encode(), is_listed=False)


def compaction(item_id: str) -> NewItem:
    body = json.dumps({"id": item_id, "type": "compaction"}).encode()
    return NewItem(item_id, body, is_listed=False, is_compaction=True)


def turn(turn_id: str, previous_id: str | None = None, **changes: Any) -> NewTurn:
    """A completed turn with one input item and one output item, `<id>.in` and `<id>.out`."""
    usual = NewTurn(
        id=turn_id,
        owner=OWNER,
        status="completed",
        created_at=1000,
        completed_at=1001,
        model="m",
        settings=b'{"temperature":1}',
        body=json.dumps({"usage": turn_id}).encode(),
        inputs=(message(f"{turn_id}.in"),),
        outputs=(message(f"{turn_id}.out"),),
        previous_id=previous_id,
    )
    return msgspec.structs.replace(usual, **changes)


def failed(turn_id: str, previous_id: str | None = None, **changes: Any) -> NewTurn:
    return turn(turn_id, previous_id, **{"status": "failed", "is_detached": True, **changes})


def kept(saved: NewTurn) -> KeptResponse:
    """What `response` has to say of a turn that was saved."""
    return KeptResponse(
        id=saved.id,
        status=saved.status,
        created_at=saved.created_at,
        completed_at=saved.completed_at,
        previous_id=saved.previous_id,
        settings=saved.settings,
        body=saved.body,
        outputs=[item.body for item in saved.outputs],
    )


def window_of(newest: NewTurn, items: list[bytes], start: int = 0, ahead: bytes | None = None) -> Window:
    """What a window has to say whose newest turn, as it was saved, begins at an index."""
    return Window(newest.status, items, start, newest.body, newest.settings, ahead)


def conversation(conversation_id: str = "conv", metadata: bytes = b"{}") -> Conversation:
    return Conversation(conversation_id, 1000, metadata)


# -- what stands in a list ---------------------------------------------------------------------------------------------


def ids_in(bodies: list[bytes]) -> list[str]:
    return [json.loads(body)["id"] for body in bodies]


def both_of(*turn_ids: str) -> list[str]:
    """The ids of the items of usual turns: `a.in`, `a.out`, `b.in`, …"""
    return [f"{turn_id}.{side}" for turn_id in turn_ids for side in ("in", "out")]


async def save_all(store: Store, *turns: NewTurn) -> None:
    for each in turns:
        await store.save(each)


async def save_chain(store: Store, *turn_ids: str, after: str | None = None, **changes: Any) -> None:
    """Usual turns, each the child of the one before."""
    for turn_id in turn_ids:
        await store.save(turn(turn_id, after, **changes))
        after = turn_id


async def window_ids(store: Store, turn_id: str) -> list[str] | None:
    window = await store.window(OWNER, turn_id)
    return None if window is None else ids_in(window.items)


async def input_ids(store: Store, turn_id: str) -> list[str] | None:
    listed = await store.input_items(OWNER, turn_id, ALL_ASC)
    return None if listed is None else ids_in(listed.rows)


async def conversation_ids(store: Store, conversation_id: str = "conv") -> list[str] | None:
    listed = await store.conversation_items(OWNER, conversation_id, ALL_ASC)
    return None if listed is None else ids_in(listed.rows)


async def response_ids(store: Store) -> list[str]:
    """All living responses of the owner, oldest first."""
    found: list[str] = []
    while True:
        after = found[-1] if found else None
        listed = await store.responses(OWNER, Page(limit=500, order="asc", after=after), None)
        found += [response.id for response in listed.rows]
        if not listed.has_more:
            return found


async def walk(give: GiveItems, limit: int, order: Literal["asc", "desc"]) -> list[str]:
    """The ids of a whole list, page after page, each after the last id of the one before."""
    found: list[str] = []
    while True:
        listed = await give(Page(limit=limit, order=order, after=found[-1] if found else None))
        assert listed is not None
        assert len(listed.rows) == limit or not listed.has_more
        found += ids_in(listed.rows)
        if not listed.has_more:
            return found


async def walk_back(give: GiveItems, limit: int, order: Literal["asc", "desc"], last: str) -> list[str]:
    """The ids of all that stands before `last` in a list, page before page; in the order of the list."""
    found = [last]
    while True:
        listed = await give(Page(limit=limit, order=order, before=found[0]))
        assert listed is not None
        assert len(listed.rows) == limit or not listed.has_more
        found = ids_in(listed.rows) + found
        if not listed.has_more:
            return found[:-1]


def rows_in(place: Place | Path) -> dict[str, int]:
    """How many rows some tables have, in a file or wherever a store is."""
    with closing(FilePlace(place)) if isinstance(place, Path) else contextlib.nullcontext(place) as found:
        return found.counts(TABLES)


def files_in(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def integrity_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


# -- turns that their name tells, written by other processes -----------------------------------------------------------


def told(name: str) -> NewTurn:
    """The turn of a name `resp_<run>.<kind>.<number>`: what it continues and all its bytes follow from the name.

    A `chain` continues the number before, a `fork` half the number, a `talk` the conversation `<run>.talk`, and a
    `shared` one of ten turns of a chain that others continue too. The item ids of a chain tell their response.
    """
    run, kind, number = name.rsplit(".", 2)
    place = int(number)
    ids = ItemIds(name) if kind == "chain" else f"{name}.{{}}".format
    random = Random(name)
    previous_id = {
        "chain": f"{run}.chain.{place - 1}" if place else None,
        "fork": f"{run}.fork.{(place - 1) // 2}" if place else None,
        "shared": f"resp_all.chain.{place % 10}",
    }.get(kind)
    return turn(
        name,
        previous_id,
        conversation_id=f"{run}.talk" if kind == "talk" else None,
        settings=b'{"seed":%d}' % random.randrange(5),
        body=message(name, "b" * random.randrange(300)).body,
        inputs=(message(ids("in"), "i" * random.randrange(3000)),),
        outputs=(reasoning(ids("think")), message(ids("out"), "o" * random.randrange(3000))),
    )


def told_items(name: str) -> tuple[NewItem, NewItem]:
    """The batch of a name: two items."""
    return message(f"{name}.1", "x" * Random(name).randrange(3000)), message(f"{name}.2")


def told_line(name: str | None) -> list[str]:
    """The ids of the items of a named turn and of what it continues, oldest first."""
    line: list[str] = []
    while name:
        own = told(name)
        line = [item.id for item in (*own.inputs, *own.outputs)] + line
        name = own.previous_id
    return line


async def assert_told(store: Store, names: Iterable[str]) -> None:
    """These turns are there whole: the response, what it was given, and the window of it if it is in no talk."""
    for name in names:
        expected = told(name)
        assert await store.response(OWNER, name) == kept(expected)
        items = {item.id: item.body for item in (*expected.inputs, *expected.outputs)}
        assert await store.items(OWNER, list(items)) == items
        if expected.conversation_id is None:
            assert await window_ids(store, name) == told_line(name)


@contextmanager
def writer(what: str, path: Path, run: str) -> Iterator[subprocess.Popen[str]]:
    """A process that writes a store, ended with the test: see store_writer.py."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here.parent.parent, here.parent, here)))}
    command = [sys.executable, str(here / "store_writer.py"), what, str(path), run]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()
