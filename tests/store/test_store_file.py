"""A store in a SQLite file: what stands on the disk, who else may hold it, and what may be there before it."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest.mock import ANY

import aiosqlite
import msgspec
import pytest
from run_builders import OpenRunStore, admit, all_events, batch, claim, ending, numbered, queued, sweep
from store_builders import (
    ALL_ASC,
    ALL_DESC,
    DEADLINE_S,
    NOW,
    OWNER,
    STRANGER,
    TABLES,
    OpenStore,
    assert_told,
    both_of,
    conversation,
    conversation_ids,
    failed,
    files_in,
    integrity_of,
    kept,
    message,
    reasoning,
    response_ids,
    rows_in,
    save_all,
    save_chain,
    told,
    turn,
    window_ids,
    writer,
)

import schema
from errors import InvalidRequest, StoreError
from quota_verbs import Charge, Used
from run_verbs import RunStore
from verbs import FirstUse, ItemIds, Listed, Lock, NewItem, NewTurn, Page, Store

pytest_plugins = ["store_fixtures"]

NOTHING = dict.fromkeys(TABLES, 0) | {"settings": ANY}  # a purge sweeps settings

LEASE = Lock("name", "me")
CHARGE = Charge(owner=OWNER, holder="name", now=NOW, in_flight=1, tokens_s=1.0)

# -- opening -----------------------------------------------------------------------------------------------------------


async def everything(store: Store) -> list[Any]:
    """What the verbs read of a store that `fill` filled."""
    turns = ("a", "b", "c", "d", "fork", "oops", "gone")
    found: list[Any] = [await store.responses(OWNER, ALL_DESC, None), await store.conversation(OWNER, "conv")]
    found += [await store.response(OWNER, each) for each in turns]
    found += [await store.window(OWNER, each) for each in turns]
    found += [await store.input_items(OWNER, each, ALL_ASC) for each in turns]
    found += [await store.conversation_items(OWNER, "conv", ALL_ASC), await store.conversation_window(OWNER, "conv")]
    found += [await store.first_use(OWNER, "key", NOW), await store.secret("one"), await store.learned()]
    return found


async def fill(store: Store) -> None:
    await store.create_conversation(OWNER, conversation("conv", b'{"a":"1"}'), (message("c.1"), message("c.2")))
    await store.save(turn("a", conversation_id="conv", outputs=(reasoning("a.think"), message("a.out"))))
    await store.save(turn("b", conversation_id="conv", first_use=FirstUse("key", b"digest", 20_000)))
    await store.delete_conversation_item(OWNER, "conv", "c.1", NOW)
    await save_chain(store, "gone", "c", "d")
    await save_all(store, turn("fork", "c"), failed("oops", "a"))
    await store.delete_response(OWNER, "gone", NOW)
    await store.acquire(LEASE, NOW, NOW + 60)


async def test_what_was_saved_is_there_after_reopening(open_at: OpenStore) -> None:
    store = await open_at()
    await fill(store)
    assert await store.keep_ahead(OWNER, "d", b"ahead") is True
    await store.keep_learned({"m": b"1"})
    before = await everything(store)
    await store.close()
    store = await open_at()
    assert await everything(store) == before
    assert await store.acquire(Lock("name", "you"), NOW, NOW + 60) is False
    await save_chain(store, "e", after="d")
    assert await window_ids(store, "e") == both_of("gone", "c", "d", "e")


async def test_two_stores_on_one_file_see_each_other_at_once(open_at: OpenStore) -> None:
    one, two = await open_at(), await open_at()
    await fill(one)
    assert await everything(two) == await everything(one)
    await save_chain(two, "e", "f", after="d")
    assert await window_ids(one, "f") == both_of("gone", "c", "d", "e", "f")
    await two.delete_response(OWNER, "d", NOW)
    assert await one.response(OWNER, "d") is None
    await one.release(LEASE)
    assert await two.acquire(Lock("name", "you"), NOW, NOW + 60) is True
    assert await one.acquire(LEASE, NOW, NOW + 60) is False


async def test_many_open_a_new_file_at_once(open_at: OpenStore, tmp_path: Path) -> None:
    for number in range(10):
        path = str(tmp_path / f"{number}.db")
        stores = await asyncio.gather(*(open_at(path=path) for _ in range(8)))
        await asyncio.gather(*(store.save(turn(f"t{number}")) for number, store in enumerate(stores)))
        assert len(set(await asyncio.gather(*(store.secret("one") for store in stores)))) == 1
        assert sorted(await response_ids(stores[0])) == [f"t{number}" for number in range(8)]
        await asyncio.gather(*(store.close() for store in stores))


async def test_an_empty_file_is_a_new_store(open_at: OpenStore, store_path: Path) -> None:
    store_path.touch()  # noqa: ASYNC240
    store = await open_at()
    await save_chain(store, "a")
    assert await response_ids(store) == ["a"]


@pytest.mark.parametrize("name", ["a b.db", "what?mode=memory", "50%25.db", "#1.db", "日本.db", "file:x.db", "'q'.db"])
async def test_a_file_may_have_any_name(open_at: OpenStore, tmp_path: Path, name: str) -> None:
    store = await open_at(path=str(tmp_path / name))
    await save_chain(store, "a")
    await store.close()
    assert list(files_in(tmp_path)) == [name]
    assert integrity_of(tmp_path / name) == "ok"


async def test_a_store_in_memory_leaves_no_file(
    open_at: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = await open_at(path=":memory:")
    await fill(store)
    await store.close()
    assert files_in(tmp_path) == {}


async def test_two_stores_in_memory_are_two(open_at: OpenStore) -> None:
    one, two = await open_at(path=":memory:"), await open_at(path=":memory:")
    await save_chain(one, "a")
    assert await two.response(OWNER, "a") is None


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
async def test_nobody_else_may_read_the_files(open_at: OpenStore, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = await open_at()
        await fill(store)
        modes = {name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in files_in(tmp_path)}
    finally:
        os.umask(before)
    assert "responses.db" in modes
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


async def test_readers_do_not_wait_for_writers(open_at: OpenStore, store_path: Path) -> None:
    await save_chain(await open_at(), "a")
    with closing(sqlite3.connect(store_path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def told_by_connections(pragma: str) -> set[int]:
    """What the open connections of this process are set to."""
    found = set()
    for connection in [each for each in gc.get_objects() if issubclass(type(each), aiosqlite.Connection)]:
        with suppress(ValueError):  # closed already
            async with connection.execute(f"PRAGMA {pragma}") as cursor:
                found |= {row[0] for row in await cursor.fetchall()}
    if not found:
        pytest.skip("the store shows nobody its connections")
    return found


@pytest.mark.parametrize(("synchronous", "number"), [("NORMAL", 1), ("FULL", 2)])
async def test_the_connections_are_as_synchronous_as_was_set(
    open_at: OpenStore, synchronous: Literal["NORMAL", "FULL"], number: int
) -> None:
    await save_chain(await open_at(synchronous=synchronous), "a")
    assert await told_by_connections("synchronous") == {number}


async def test_the_connections_wait_as_long_as_was_set(open_at: OpenStore) -> None:
    await save_chain(await open_at(busy_timeout_s=1.25), "a")
    assert await told_by_connections("busy_timeout") == {1250}


# -- what is no store of ours ------------------------------------------------------------------------------------------


def as_text(path: Path) -> None:
    path.write_text("Dear diary,\n" * 1000)


def as_small_text(path: Path) -> None:
    path.write_text("Dear diary")


def as_torn_header(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + Random(1).randbytes(8000))


def database(*statements: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            for statement in (
                *statements,
                "CREATE TABLE diary (entry TEXT)",
                "INSERT INTO diary VALUES ('Dear diary')",
            ):
                connection.execute(statement)
            connection.commit()

    return make


FOREIGN: dict[str, Callable[[Path], None]] = {
    "text": as_text,
    "a small text": as_small_text,
    "a torn header": as_torn_header,
    "a database": database(),
    "a database of version 1": database("PRAGMA user_version = 1"),
    "a database of version 1000": database("PRAGMA user_version = 1000"),
    "a database of another application": database("PRAGMA application_id = 12345", "PRAGMA user_version = 1"),
    "a database that shrinks by itself": database("PRAGMA auto_vacuum = FULL"),
    "a database that shrinks when told": database("PRAGMA auto_vacuum = INCREMENTAL"),
    "a database in WAL mode": database("PRAGMA journal_mode = WAL"),
    "a database that has our tables' names": database("CREATE TABLE turn (id)", "CREATE TABLE item (id)"),
}


@pytest.mark.parametrize("kind", sorted(FOREIGN))
async def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(
    open_at: OpenStore, store_path: Path, kind: str
) -> None:
    FOREIGN[kind](store_path)
    before = files_in(store_path.parent)
    with pytest.raises(StoreError) as refused:
        await open_at(busy_timeout_s=0.1)
    assert str(store_path) in refused.value.message
    assert files_in(store_path.parent) == before


async def test_a_newer_file_is_refused_and_left_as_it_is(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await fill(store)
    await store.close()
    with closing(sqlite3.connect(store_path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version + 1}")
    before = files_in(store_path.parent)
    with pytest.raises(StoreError, match="newer"):
        await open_at()
    assert files_in(store_path.parent) == before


@pytest.mark.parametrize("name", ["", "nowhere/responses.db"])
async def test_a_path_where_no_file_can_be_is_refused(open_at: OpenStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError) as refused:
        await open_at(path=str(tmp_path / name))
    assert (refused.value.http_status, str(tmp_path) in refused.value.message) == (503, True)


def damage_file(path: Path, damage: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    damage(content)
    path.write_bytes(content)


async def damaged(open_at: OpenStore, path: Path, damage: Callable[[bytearray], None]) -> list[str]:
    """What is said of a damaged file, at opening or by the check."""
    store = await open_at()
    await save_chain(store, *(f"t{number}" for number in range(200)))
    await store.close()
    damage_file(path, damage)
    try:
        return await (await open_at()).problems()
    except StoreError as refused:
        return [refused.message]


def overwrite_middle(content: bytearray) -> None:
    middle = len(content) // 2
    content[middle : middle + 20_000] = Random(1).randbytes(20_000)


def cut_off(content: bytearray) -> None:
    del content[len(content) // 2 :]


@pytest.mark.parametrize("damage", [overwrite_middle, cut_off])
async def test_damage_is_found(open_at: OpenStore, store_path: Path, damage: Callable[[bytearray], None]) -> None:
    assert await damaged(open_at, store_path, damage) != []


# -- closing -----------------------------------------------------------------------------------------------------------


async def test_a_closed_store_does_no_work(open_at: OpenStore) -> None:
    store = await open_at()
    await save_chain(store, "a")
    await store.close()
    with pytest.raises(StoreError):
        await store.response(OWNER, "a")
    with pytest.raises(StoreError):
        await store.save(turn("b"))


async def test_what_was_begun_before_closing_is_whole_or_refused(open_at: OpenStore) -> None:
    store = await open_at()
    turns = [turn(f"t{number}") for number in range(50)]
    saving = [asyncio.create_task(store.save(each)) for each in turns]
    await asyncio.sleep(0)
    await store.close()
    results = await asyncio.gather(*saving, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), StoreError}
    store = await open_at()
    assert await response_ids(store) == [each.id for each, error in zip(turns, results, strict=True) if error is None]


async def test_a_closed_store_leaves_one_file(open_at: OpenStore, tmp_path: Path) -> None:
    store = await open_at()
    await fill(store)
    await store.close()
    assert list(files_in(tmp_path)) == ["responses.db"]


# -- what stands in the tables -----------------------------------------------------------------------------------------


async def test_settings_are_kept_once_for_an_owner(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    for number in range(30):
        await store.save(turn(f"t{number}", settings=b'{"n":%d}' % (number % 3), model="m"))
        await store.save(turn(f"s{number}", settings=b'{"n":%d}' % (number % 2), model="m", owner=STRANGER))
    assert rows_in(store_path)["settings"] == 5


async def test_settings_go_with_their_last_response_at_the_latest_at_a_purge(
    open_at: OpenStore, store_path: Path
) -> None:
    store = await open_at()
    await save_all(store, turn("a", settings=b"1"), turn("b", settings=b"1"), turn("c", settings=b"2"))
    found = []
    for turn_id in "abc":
        await store.delete_response(OWNER, turn_id, NOW)
        await store.purge(0, NOW)
        found.append(rows_in(store_path)["settings"])
    assert found == [2, 1, 0]


async def test_items_are_kept_once_for_a_chain(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await save_chain(store, *(f"t{number}" for number in range(50)))
    assert rows_in(store_path) == {"turn": 50, "item": 100, "item_id": 100, "thread": 1, "settings": 1}


async def test_ids_that_tell_their_response_need_no_rows(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    ids = ItemIds("resp_a")
    inputs = (message(ids("msg")), message("msg_b0001"), message("sent by the client"))
    await store.save(turn("resp_a", inputs=inputs, outputs=(message(ids("msg")),)))
    assert rows_in(store_path)["item_id"] == 2
    await store.delete_response(OWNER, "resp_a", NOW)
    assert rows_in(store_path) == NOTHING


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac", "cadb"])
async def test_rows_go_with_their_last_living_descendant(open_at: OpenStore, store_path: Path, order: str) -> None:
    store = await open_at()
    await save_chain(store, *"abcd")
    living, found, expected = set("abcd"), [], []
    for turn_id in order:
        await store.delete_response(OWNER, turn_id, NOW)
        living.remove(turn_id)
        expected.append("abcd".index(max(living)) + 1 if living else 0)
        found.append(rows_in(store_path)["turn"])
    assert found == expected
    assert rows_in(store_path) == NOTHING


async def test_rows_of_forks_go_with_their_last_living_descendant(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await save_chain(store, *"abc")
    await save_chain(store, "d", "e", after="a")
    await store.save(failed("f", "d"))
    found = []
    for turn_id in "adbecf":
        await store.delete_response(OWNER, turn_id, NOW)
        found.append(rows_in(store_path)["turn"])
    assert found == [6, 6, 6, 5, 3, 0]  # a d f stay for f
    assert rows_in(store_path) == NOTHING


async def test_a_failed_turn_keeps_the_rows_that_it_was_given(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await save_chain(store, *"ab")
    await store.save(failed("oops", "a"))
    for turn_id in "ab":
        await store.delete_response(OWNER, turn_id, NOW)
    assert rows_in(store_path)["turn"] == 2
    await store.delete_response(OWNER, "oops", NOW)
    assert rows_in(store_path) == NOTHING


async def test_a_refused_save_leaves_no_row(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await save_chain(store, "a")
    before = rows_in(store_path)
    for refused in (
        turn("b", "nobody"),
        failed("b", "nobody"),
        turn("b", conversation_id="nobody"),
        turn("b", lock=LEASE),
        failed("b", "a", lock=LEASE),
        failed("b", lock=LEASE),
    ):
        with pytest.raises(InvalidRequest):
            await store.save(refused)
        assert rows_in(store_path) == before, refused


async def test_the_rows_of_a_conversation_go_with_it_and_its_responses(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await store.create_conversation(OWNER, conversation(), (message("c.1"), message("c.2")))
    await store.save(turn("a", conversation_id="conv"))
    await store.add_items(OWNER, "conv", (message("c.3"),), NOW)
    await store.save(turn("b", conversation_id="conv"))
    await store.add_items(OWNER, "conv", (message("c.4"),), NOW)
    await store.delete_conversation_item(OWNER, "conv", "c.2", NOW)
    await store.delete_conversation(OWNER, "conv", NOW)
    assert (rows_in(store_path)["turn"], rows_in(store_path)["item"]) == (4, 6)
    await store.delete_response(OWNER, "b", NOW)
    assert (rows_in(store_path)["turn"], rows_in(store_path)["item"]) == (2, 3)
    await store.delete_response(OWNER, "a", NOW)
    assert rows_in(store_path) == NOTHING


async def test_a_conversation_whose_responses_are_deleted_goes_at_once(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    await store.save(turn("a", conversation_id="conv"))
    await store.save(failed("oops", conversation_id="conv"))
    await store.delete_response(OWNER, "a", NOW)
    await store.delete_response(OWNER, "oops", NOW)
    await store.delete_conversation(OWNER, "conv", NOW)
    assert rows_in(store_path) == NOTHING


async def test_an_empty_conversation_leaves_nothing(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await store.create_conversation(OWNER, conversation(), ())
    await store.create_conversation(OWNER, conversation("emptied"), (message("c.1"),))
    await store.delete_conversation_item(OWNER, "emptied", "c.1", NOW)
    for conversation_id in ("conv", "emptied"):
        await store.delete_conversation(OWNER, conversation_id, NOW)
    assert rows_in(store_path) == NOTHING


async def test_a_fork_keeps_what_it_needs_of_a_deleted_conversation(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    await store.save(turn("a", conversation_id="conv"))
    await store.save(turn("b", conversation_id="conv"))
    await save_chain(store, "fork", after="a")
    for turn_id in "ab":
        await store.delete_response(OWNER, turn_id, NOW)
    await store.delete_conversation(OWNER, "conv", NOW)
    assert await window_ids(store, "fork") == ["c.1", *both_of("a", "fork")]
    assert rows_in(store_path)["turn"] == 3
    await store.delete_response(OWNER, "fork", NOW)
    assert rows_in(store_path) == NOTHING


async def test_deeply_nested_items_can_be_deleted(open_at: OpenStore, store_path: Path) -> None:
    """As deep as the JSON reader of the edge goes."""
    store = await open_at()
    body = b'{"deep":' + b"[" * 1000 + b"]" * 1000 + b',"id":"a.in"}'
    await store.save(turn("a", inputs=(NewItem("a.in", body),)))
    assert await store.delete_response(OWNER, "a", NOW) is True
    assert rows_in(store_path) == NOTHING


async def test_what_was_deleted_is_nowhere_in_the_file(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    secret = [b"secret number %d, and no other" % number for number in range(6)]
    large = message("large", "?" * 50_000).body.replace(b"????", secret[0], 1)
    inputs = (NewItem("a.in", b'{"id":"a.in","text":"%b"}' % secret[1]), NewItem("large", large))
    await store.save(turn("a", inputs=inputs, settings=b'"%b"' % secret[2], body=b'"%b"' % secret[3]))
    await store.create_conversation(OWNER, conversation("conv", b'"%b"' % secret[4]), (message("c.1"),))
    await store.add_items(OWNER, "conv", (NewItem("c.2", b'{"id":"c.2","text":"%b"}' % secret[5]),), NOW)
    await save_chain(store, "b")
    await store.close()
    before = files_in(store_path.parent)[store_path.name]
    assert [content in before for content in secret] == [True] * 6
    store = await open_at()
    await store.delete_response(OWNER, "a", NOW)
    await store.delete_conversation(OWNER, "conv", NOW)
    await store.purge(0, NOW)
    await store.close()
    after = files_in(store_path.parent)[store_path.name]
    assert [content in after for content in secret] == [False] * 6


async def delete_tip(store: Store) -> None:
    await save_chain(store, "child", after="b")
    await store.delete_response(OWNER, "b", NOW)


# How what is kept ahead of the responses a, b and fork goes -> of which of them.
ERASE: dict[str, tuple[Callable[[Store], Awaitable[Any]], set[str]]] = {
    "its response": (delete_tip, {"b"}),
    "its conversation": (lambda s: s.delete_conversation(OWNER, "conv", NOW), {"a", "b", "fork"}),
    "an item": (lambda s: s.delete_conversation_item(OWNER, "conv", "c.1", NOW), {"a", "b", "fork"}),
    "a new one": (lambda s: s.keep_ahead(OWNER, "b", b"anew"), {"b"}),
    "retention": (lambda s: s.purge(2000, NOW), {"fork"}),
}


@pytest.mark.parametrize("size_bytes", [100, 50_000])
@pytest.mark.parametrize("how", sorted(ERASE))
async def test_what_was_kept_ahead_is_nowhere_in_the_file_when_it_has_gone(
    open_at: OpenStore, store_path: Path, how: str, size_bytes: int
) -> None:
    erase, gone = ERASE[how]
    store = await open_at()
    await store.create_conversation(OWNER, conversation("conv"), (message("c.1"),))
    await save_all(store, turn("a", conversation_id="conv"), turn("b", conversation_id="conv"), turn("fork", "a"))
    secrets = {turn_id: b"ahead of %b, and no other" % turn_id.encode() for turn_id in ("a", "b", "fork")}
    for turn_id, content in secrets.items():
        assert await store.keep_ahead(OWNER, turn_id, content.ljust(size_bytes, b"?")) is True
    await store.close()
    before = files_in(store_path.parent)[store_path.name]
    assert {turn_id for turn_id, content in secrets.items() if content in before} == set(secrets)
    store = await open_at()
    await erase(store)
    await store.close()
    after = files_in(store_path.parent)[store_path.name]
    assert {turn_id for turn_id, content in secrets.items() if content not in after} == gone


async def test_a_purge_leaves_no_rows_and_gives_the_space_back(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at()
    for number in range(60):
        names = [f"{number}.{place}" for place in range(5)]
        large = (message(f"{number}.large", Random(number).randbytes(30_000).hex()),)
        await save_chain(store, *names, created_at=1000)
        await store.save(turn(f"{number}.large", names[2], inputs=large, created_at=1000))
    await save_chain(store, "young", created_at=3000)
    await store.close()
    full_bytes = len(files_in(store_path.parent)[store_path.name])
    store = await open_at()
    purged = await store.purge(2000, NOW)
    assert (purged.responses, await response_ids(store)) == (360, ["young"])
    assert rows_in(store_path) == {"turn": 1, "item": 2, "item_id": 2, "thread": 1, "settings": 1}
    await store.close()
    assert len(files_in(store_path.parent)[store_path.name]) == full_bytes - purged.freed_bytes
    assert purged.freed_bytes > 60 * 60_000
    assert integrity_of(store_path) == "ok"


async def test_writers_go_on_during_a_purge(open_at: OpenStore) -> None:
    store = await open_at()
    await asyncio.gather(*(store.save(turn(f"old{number}", created_at=1000)) for number in range(1000)))
    purging = asyncio.create_task(store.purge(2000, NOW))
    saved: list[NewTurn] = []
    while not purging.done():
        saved.append(turn(f"young{len(saved)}", created_at=3000))
        await store.save(saved[-1])
    assert (await purging).responses == 1000
    assert await response_ids(store) == [each.id for each in saved]
    assert len(saved) > 3


# -- other processes ---------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


WRITES: dict[str, Callable[[RunStore], Awaitable[Any]]] = {
    "save": lambda s: s.save(turn("new", "d")),
    "delete_response": lambda s: s.delete_response(OWNER, "d", NOW),
    "create_conversation": lambda s: s.create_conversation(OWNER, conversation("new"), (message("new"),)),
    "update_conversation": lambda s: s.update_conversation(OWNER, "conv", b'{"new":"1"}'),
    "delete_conversation": lambda s: s.delete_conversation(OWNER, "conv", NOW),
    "add_items": lambda s: s.add_items(OWNER, "conv", (message("new"),), NOW),
    "delete_conversation_item": lambda s: s.delete_conversation_item(OWNER, "conv", "c.2", NOW),
    "acquire": lambda s: s.acquire(Lock("new", "me"), NOW, NOW + 60),
    "renew": lambda s: s.renew(LEASE, NOW + 90),
    "release": lambda s: s.release(LEASE),
    "keep_ahead": lambda s: s.keep_ahead(OWNER, "d", b"ahead"),
    "keep_learned": lambda s: s.keep_learned({"m": b"1"}),
    "charge": lambda s: s.charge(CHARGE),
    "secret": lambda s: s.secret("new"),
    "purge": lambda s: s.purge(NOW, NOW),
}


@pytest.mark.parametrize("verb", sorted(WRITES))
async def test_a_locked_file_refuses_every_write_whole_and_soon_takes_it(
    open_at: OpenRunStore, store_path: Path, verb: str
) -> None:
    store = await open_at(busy_timeout_s=0.05)
    await fill(store)
    before = await everything(store), rows_in(store_path)
    with ExitStack() as stack:
        stack.enter_context(locked(store_path))
        with pytest.raises(StoreError) as refused:
            await WRITES[verb](store)
        assert (refused.value.http_status, (refused.value.retry_after_s or 0) > 0) == (503, True)
        assert [await store.response(OWNER, "new"), await store.response(OWNER, "d")] == [None, kept(turn("d", "c"))]
    assert (await everything(store), rows_in(store_path)) == before
    await WRITES[verb](store)
    assert await store.problems() == []


async def test_many_saves_at_a_locked_file_are_all_refused(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at(busy_timeout_s=0.05)
    turns = [turn(f"t{number}") for number in range(50)]
    with locked(store_path):
        results = await asyncio.gather(*(store.save(each) for each in turns), return_exceptions=True)
    assert [type(result) for result in results] == [StoreError] * 50
    assert rows_in(store_path) == NOTHING
    await asyncio.gather(*(store.save(each) for each in turns))
    assert [await store.response(OWNER, each.id) for each in turns] == [kept(each) for each in turns]


async def test_a_write_waits_for_a_lock_that_is_soon_given_back(open_at: OpenStore, store_path: Path) -> None:
    store = await open_at(busy_timeout_s=30.0)
    with ExitStack() as stack:
        stack.enter_context(locked(store_path))
        saving = asyncio.create_task(store.save(turn("a")))
        assert await store.response(OWNER, "a") is None
    await saving
    assert await store.response(OWNER, "a") == kept(turn("a"))


async def test_a_new_file_that_is_locked_is_refused_and_then_opened(open_at: OpenStore, store_path: Path) -> None:
    with closing(sqlite3.connect(store_path)) as connection:
        connection.execute("PRAGMA user_version")
    with locked(store_path), pytest.raises(StoreError) as refused:
        await open_at(busy_timeout_s=0.05)
    assert (refused.value.retry_after_s or 0) > 0
    await save_chain(await open_at(), "a")


async def test_two_processes_that_write_one_file_lose_nothing(open_at: OpenStore, store_path: Path) -> None:
    """300 turns each: a chain of its own, forks of a chain that both continue, and one conversation."""
    store = await open_at()
    await save_all(store, *(told(f"resp_all.chain.{number}") for number in range(10)))
    await store.create_conversation(OWNER, conversation("resp_all.talk"), ())
    with writer("together", store_path, "resp_1") as one, writer("together", store_path, "resp_2") as two:
        assert [process.stdout.readline() for process in (one, two) if process.stdout] == ["open\n", "open\n"]
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=DEADLINE_S)[0].split() for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0]
    own = [f"resp_{run}.{kind}.{number}" for run in "12" for kind in ("chain", "shared") for number in range(100)]
    talks = [f"resp_all.talk.{run}{number:03}" for run in "12" for number in range(100)]
    assert sorted(said[0] + said[1]) == sorted(own)
    assert sorted(await response_ids(store)) == sorted([*own, *talks, *(f"resp_all.chain.{n}" for n in range(10))])
    await assert_told(store, [*own, *talks])
    assert sorted(await conversation_ids(store, "resp_all.talk") or []) == sorted(
        item.id for name in talks for item in (*told(name).inputs, *told(name).outputs)
    )
    assert await store.problems() == []


async def test_a_page_beyond_the_end_is_empty(open_at: OpenStore) -> None:
    store = await open_at()
    await save_chain(store, "a")
    assert await store.input_items(OWNER, "a", Page(after="a.in")) == Listed([], False)


# -- files of older versions: 1 had no background runs, 2 kept nothing ahead, 3 counted nothing for owners -------------


def tables_in(connection: sqlite3.Connection) -> list[str]:
    """In the order in which they were made."""
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return [name for (name,) in found]


def make_old(path: Path, version: int, filled: Path) -> None:
    """A file with the tables of an old version, and the rows of a filled one of today."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {schema.PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for migration in schema.MIGRATIONS[:version]:
            migration(connection)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("ATTACH ? AS filled", (str(filled),))
        for table in tables_in(connection):
            names = ", ".join(row[1] for row in connection.execute(f"PRAGMA main.table_info({table})"))
            connection.execute(f"DELETE FROM main.{table}")  # what triggers put there
            connection.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM filled.{table}")


@pytest.fixture(params=[1, 2, 3])
def version(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
async def before(open_at: OpenStore, store_path: Path, tmp_path: Path, version: int) -> list[Any]:
    """What a store said whose rows stand in a file of an old version now, at the path of the test."""
    store = await open_at(path=str(tmp_path / "filled.db"))
    await fill(store)
    found = await everything(store)
    await store.close()
    make_old(store_path, version, tmp_path / "filled.db")
    return found


def schema_of(path: Path) -> tuple[int, set[tuple[str, str]]]:
    """The version, and all tables, columns, indexes and triggers."""
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        made = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql NOTNULL").fetchall()
    return version, set(made)


def all_rows(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        return {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables_in(connection)}


async def test_an_old_file_is_opened_and_keeps_everything(
    open_at: OpenStore, store_path: Path, version: int, before: list[Any]
) -> None:
    assert schema_of(store_path)[0] == version
    store = await open_at()
    assert await everything(store) == before
    await save_chain(store, "e", after="d")
    assert await window_ids(store, "e") == both_of("gone", "c", "d", "e")
    assert await store.problems() == []


async def test_an_old_file_has_the_tables_of_a_new_one_once_it_was_opened(
    open_at: OpenStore, store_path: Path, tmp_path: Path, before: list[Any]
) -> None:
    await (await open_at()).close()
    await (await open_at(path=str(tmp_path / "new.db"))).close()
    assert schema_of(store_path) == schema_of(tmp_path / "new.db")
    assert schema_of(store_path)[0] == len(schema.MIGRATIONS)


async def test_an_old_file_takes_background_runs(open_at: OpenRunStore, store_path: Path, before: list[Any]) -> None:
    store = await open_at()
    await admit(store, queued("e", "d"), queued("f", conversation_id="conv"), batch=batch(0, 2))
    for held, ended in zip(
        [run.held for run in await claim(store)], [turn("e", "d"), turn("f", conversation_id="conv")], strict=True
    ):
        assert await store.log(held, batch(2)) is True
        assert await store.settle(held, ending(ended)) is True
    assert await window_ids(store, "e") == both_of("gone", "c", "d", "e")
    assert (await conversation_ids(store) or [])[-2:] == both_of("f")
    assert [await all_events(store, turn_id) for turn_id in "ef"] == [numbered(0, 1, 2)] * 2


async def test_responses_of_an_old_file_are_no_background_ones(
    open_at: OpenRunStore, store_path: Path, before: list[Any]
) -> None:
    store = await open_at()
    await sweep(store, 1e300)
    assert await store.runs() == []
    assert await everything(store) == before
    assert await store.tail(OWNER, "d", -1) is None
    assert await store.states(["d"]) == {"d": ("completed", None)}


async def test_many_open_an_old_file_at_once(open_at: OpenStore, store_path: Path, before: list[Any]) -> None:
    stores = await asyncio.gather(*(open_at(busy_timeout_s=DEADLINE_S) for _ in range(6)))
    await asyncio.gather(*(store.save(turn(f"t{number}")) for number, store in enumerate(stores)))
    assert [await stores[0].response(OWNER, f"t{number}") for number in range(6)] == [
        kept(turn(f"t{number}")) for number in range(6)
    ]
    assert await stores[0].problems() == []


async def test_an_old_file_takes_what_is_kept_ahead_and_what_is_learned(
    open_at: OpenStore, store_path: Path, before: list[Any]
) -> None:
    store = await open_at()
    assert await store.keep_ahead(OWNER, "d", b"ahead") is True
    await store.keep_learned({"m": b"1"})
    window = await store.window(OWNER, "d")
    assert window is not None
    assert (window.settings, window.body, window.ahead) == (turn("d").settings, turn("d").body, b"ahead")
    assert await store.learned() == {"m": b"1"}


async def test_an_old_file_takes_what_owners_use(open_at: OpenRunStore, store_path: Path, before: list[Any]) -> None:
    store = await open_at()
    assert await store.charge(CHARGE) == Used(False, NOW, NOW + 1, 0, 0.0)
    assert (await store.charge(msgspec.structs.replace(CHARGE, holder="other"))).elsewhere == 1


async def test_runs_of_version_2_are_carried_out_to_their_end(
    open_at: OpenRunStore, store_path: Path, tmp_path: Path
) -> None:
    filled = await open_at(path=str(tmp_path / "filled.db"))
    await admit(filled, queued("a"), queued("b"), queued("c"), batch=batch(0, 2))
    (held,) = [run.held for run in await claim(filled, 1)]
    before = await filled.runs(), await filled.queue()
    await filled.close()
    make_old(store_path, 2, tmp_path / "filled.db")
    store = await open_at()
    assert (await store.runs(), await store.queue()) == before
    assert await store.settle(held, ending(turn("a"))) is True
    assert [run.response_id for run in await claim(store)] == ["b", "c"]
    assert [await all_events(store, turn_id) for turn_id in "abc"] == [numbered(0, 1)] * 3
    assert await store.problems() == []


DIES = """
import os, sqlite3, sys
import schema

class Dying:
    def __init__(self, db, statements):
        self.db, self.left = db, statements

    def execute(self, statement):
        if self.left == 0 or statement == "COMMIT":
            os._exit(9)
        self.left -= 1
        return self.db.execute(statement)

schema.migrate(Dying(sqlite3.connect(sys.argv[1], isolation_level=None), int(sys.argv[2])), sys.argv[1])
"""


@pytest.mark.parametrize("statements", [0, 4, 8, 12, 25, 1000])
async def test_a_process_that_dies_while_it_brings_an_old_file_up_to_date_leaves_it_as_it_was(
    open_at: OpenStore, store_path: Path, before: list[Any], statements: int
) -> None:
    """`statements`: after how many of them."""
    as_it_was = schema_of(store_path), all_rows(store_path)
    command = [sys.executable, "-c", DIES, str(store_path), str(statements)]
    root = {"PYTHONPATH": str(Path(schema.__file__).parent)}
    died = await asyncio.to_thread(subprocess.run, command, env=os.environ | root, timeout=DEADLINE_S)
    assert died.returncode == 9
    assert (schema_of(store_path), all_rows(store_path)) == as_it_was
    assert await everything(await open_at()) == before


async def test_a_fault_while_an_old_file_is_brought_up_to_date_leaves_it_as_it_was(
    open_at: OpenStore, store_path: Path, before: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_was = schema_of(store_path), all_rows(store_path)

    def fail(db: sqlite3.Connection) -> None:
        db.execute("SELECT * FROM nowhere")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, fail))
        with pytest.raises(StoreError):
            await open_at()
    assert (schema_of(store_path), all_rows(store_path)) == as_it_was
    assert await everything(await open_at()) == before
