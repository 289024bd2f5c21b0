"""A store that is copied, file or database into file or database: whatever the verbs answer, they answer there too."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from compacting import until
from conftest import ROOT, settings_of
from postgres_server import Beside
from run_builders import admit, batch, brief, cancel, claim_ids, claim_one, ending, finish, queued
from store_builders import (
    ALL_ASC,
    NOW,
    OWNER,
    STRANGER,
    compaction,
    conversation,
    failed,
    message,
    reasoning,
    save_all,
    save_chain,
    turn,
)
from store_places import FilePlace, PostgresPlace

import copying
import postgres_copying
import services
import sqlite_copying
from errors import StoreError
from postgres_tables import MIGRATIONS
from postgres_tables import TABLES as DATABASE_TABLES
from proxy import main
from run_verbs import RunStore
from services import opener_of
from store import StoreSettings, is_database
from verbs import FirstUse, ItemIds, Lock, Page, conversation_lease

KEY = base64.b64encode(b"k" * 32).decode()
ROUTES = ["file file", "file database file", "database file database", "database other"]


@pytest.fixture
def database() -> Iterator[str]:
    with closing(PostgresPlace()) as place:
        yield place.url
    with closing(Beside(place.url)) as beside:  # what a test left unfinished
        beside.do(f"DROP TABLE IF EXISTS copy_progress; UPDATE responses_proxy SET version = {len(MIGRATIONS)}")


@pytest.fixture
def other(database: str) -> Iterator[str]:
    """A schema without tables."""
    with closing(Beside(database)) as beside:
        beside.do("DROP SCHEMA IF EXISTS copied CASCADE; CREATE SCHEMA copied")
        yield f"{database.rpartition('search_path=')[0]}search_path=copied"
        beside.do("DROP SCHEMA copied CASCADE")


@contextlib.asynccontextmanager
async def opened(path: str) -> AsyncIterator[RunStore]:
    store = await opener_of(path)(StoreSettings(path=path, pool_size=2))
    try:
        yield store
    finally:
        await store.close()


def side(path: str, is_source: bool) -> Any:
    kind = postgres_copying if is_database(path) else sqlite_copying
    return kind.opened(StoreSettings(path=path), is_source)


async def copied(source: str, target: str, now: float = NOW) -> tuple[list[copying.Compared], list[str]]:
    async with side(source, True) as one, side(target, False) as another:
        return await copying.copy(one, another, now, lambda line: None)


async def fill(store: RunStore) -> None:
    """Something of everything that a store can hold."""
    await store.secret("owner")
    await store.keep_learned({"model": b"fact"})
    await save_chain(store, "a", "b", "c", "d")
    await save_all(store, turn("fork", "b", settings=b"other"), turn("fork2", "fork"), failed("x", "c"))
    ids = ItemIds("resp_own")
    own = turn("resp_own", "d", inputs=(message(ids("msg")),), outputs=(reasoning(ids("rs")), message(ids("msg"))))
    await save_all(store, own, turn("fold", "d", outputs=(compaction("cmp"), message("m"))), turn("after", "fold"))
    assert await store.keep_ahead(OWNER, "after", b"ahead" * 1000)
    await save_all(store, turn("gone"), turn("heir", "gone"), turn("theirs", owner=STRANGER))
    await store.delete_response(OWNER, "gone", NOW)
    await store.save(turn("keyed", first_use=FirstUse("key", b"digest", int(NOW) + 1000)))
    await fill_conversation(store)
    await fill_runs(store)


async def fill_conversation(store: RunStore) -> None:
    await store.create_conversation(OWNER, conversation("talk", b'{"a":"b"}'), (message("put1"), message("put2")))
    await store.create_conversation(OWNER, conversation("empty"), ())
    await store.save(turn("t1", conversation_id="talk"))
    await admit(store, queued("t2", conversation_id="talk"))
    held = await claim_one(store, "t2")
    await store.add_items(OWNER, "talk", (message("put3"),), NOW)
    await store.save(turn("t3", conversation_id="talk"))
    assert await store.settle(held, ending(turn("t2", conversation_id="talk")))
    await store.delete_conversation_item(OWNER, "talk", "put2", NOW)
    await store.delete_conversation_item(OWNER, "talk", "t1.out", NOW)


async def fill_runs(store: RunStore) -> None:
    await admit(store, queued("s1"), batch=batch(0, 2))
    held = await claim_one(store, "s1")
    assert await store.log(held, batch(2, 3))
    assert await store.settle(held, ending(turn("s1"), batch(5)))
    await finish(store, turn("s2", "s1"))
    await admit(store, brief("brief"))
    await admit(store, queued("q1"), queued("q2", "q1"), queued("qt", conversation_id="talk"))
    await admit(store, queued("q3", owner=STRANGER), queued("q4"), batch=batch(0), bearer="sealed")
    assert (await cancel(store, "q4")) is not None
    (held,) = [run.held for run in await store.claim("dead", NOW - 1, 1)]
    await store.log(held, batch(1))


async def answers(store: RunStore) -> dict[str, Any]:
    """What the verbs say of everything."""
    every = {
        owner: [kept.id for kept in (await store.responses(owner, Page(1000, "asc"), None)).rows]
        for owner in (OWNER, STRANGER)
    }
    told: dict[str, Any] = {"order": every, "learned": await store.learned(), "secret": await store.secret("owner")}
    for owner, ids in every.items():
        for name in [*ids, "brief", "gone", "qt", "q4"]:
            told[f"{owner} {name}"] = [
                await store.response(owner, name),
                await store.window(owner, name),
                await store.window_before(owner, name),
                await store.input_items(owner, name, ALL_ASC),
                await store.input_items(owner, name, Page(3, "desc")),
                await store.tail(owner, name, -1),
            ]
    for name in ("talk", "empty"):
        told[name] = (
            [
                await store.conversation(OWNER, name),
                await store.conversation_window(OWNER, name),
                await store.conversation_items(OWNER, name, ALL_ASC),
                await store.conversation_items(OWNER, name, Page(2, "asc", after="put1")),
                await store.conversation_items(OWNER, name, Page(2, "desc")),
                await store.conversation_item(OWNER, name, "put3"),
            ]
            if name == "talk"
            else [await store.conversation_window(OWNER, name)]
        )
    told["use"] = await store.first_use(OWNER, "key", NOW)
    told["items"] = await store.items(OWNER, ["a.in", "put1", "put2", "t1.out", "gone.in", "resp_own.in", "cmp"])
    told["runs"] = [await store.runs(), await store.queue(), await store.expired(NOW)]
    return told


def joined_late(ids: list[str]) -> list[str]:
    """As a file lists them: a response that joined its conversation late comes behind those that it stands behind."""
    assert ids.index("t2") < ids.index("t3")
    rest = [name for name in ids if name != "t2"]
    return [*rest[: rest.index("t3") + 1], "t2", *rest[rest.index("t3") + 1 :]]


async def goes_on(store: RunStore) -> list[Any]:
    """What happens with new turns, and which runs come next."""
    for held in await store.expired(NOW):
        await store.free(held, NOW)
    await save_chain(store, "new1", "new2", after="d")
    await save_chain(store, "new3", after="c")
    await store.save(turn("new4", conversation_id="talk"))
    await admit(store, queued("new5"), batch=batch(0))
    claims = [await claim_ids(store, 1) for _ in range(6)]
    listed = (await store.responses(OWNER, Page(8), None)).rows
    return [claims, listed, await store.conversation_items(OWNER, "talk", ALL_ASC), await store.problems()]


@pytest.mark.parametrize("route", ROUTES)
async def test_every_verb_answers_as_it_did(route: str, tmp_path: Path, database: str, other: str) -> None:
    first = route.split()[0]
    names = {"file": str(tmp_path / "0.db"), "database": database, "other": other}
    places = [names[first]]
    for n, kind in enumerate(route.split()[1:], 1):
        places.append(other if kind == "database" and first == "database" else names[kind].replace("0.db", f"{n}.db"))
    async with opened(places[0]) as store:
        await fill(store)
        expected = await answers(store)
    for source, target in pairwise(places):
        compared, wrong = await copied(source, target)
        assert wrong == []
        assert [each.table for each in compared] == list(copying.TABLES)
        assert all(each.source_rows == each.target_rows > 0 for each in compared)
    nexts = []
    for place in places:
        async with opened(place) as store:
            found = await answers(store)
            if first == "database" and place is not database and route != "database other":
                assert found["order"] == {**expected["order"], OWNER: joined_late(expected["order"][OWNER])}
                del found["order"]
            assert found == {name: told for name, told in expected.items() if name in found}
            nexts.append(await goes_on(store))
    assert nexts[1:] == nexts[:-1]


# -- what stands in the way --------------------------------------------------------------------------------------------


async def test_a_store_that_somebody_works_on_is_not_copied(tmp_path: Path, database: str) -> None:
    file = str(tmp_path / "a.db")
    async with opened(file):
        with pytest.raises(StoreError, match="in use by another process"):
            await copied(file, database)
    async with opened(database) as store:
        await store.acquire(Lock(conversation_lease("talk"), "me"), NOW, NOW + 30)
    with pytest.raises(StoreError, match="1 leases are held; stop the proxies first"):
        await copied(database, file)


async def test_what_a_stopped_or_killed_proxy_leaves_in_a_database_does_not_keep_it_from_being_copied(
    tmp_path: Path, database: str
) -> None:
    file = str(tmp_path / "a.db")
    settings = settings_of("http://127.0.0.1:1/v1", store={"path": database}, sealing={"keys": (KEY,)})
    with closing(Beside(database)) as beside:
        async with services.opened(settings):
            duties = "SELECT WHERE 2 = (SELECT count(*) FROM lease WHERE name IN ('duty retention', 'duty forgetting'))"
            await until(lambda: beside.asked(duties))
            with pytest.raises(StoreError, match="leases are held; stop the proxies first"):
                await copied(database, file, time.time())
        assert beside.asked("SELECT name FROM lease") == [("sealing keys",)]
        beside.do(f"INSERT INTO lease VALUES ('duty retention', 'killed', {time.time() + 3600})")
    assert (await copied(database, file, time.time()))[1] == []


async def test_a_target_with_something_in_it_is_left_alone(tmp_path: Path, database: str) -> None:
    file = str(tmp_path / "a.db")
    for place in (file, database):
        async with opened(place) as store:
            await store.save(turn("there"))
    for source, target in ((file, database), (database, file)):
        with pytest.raises(StoreError, match="is not empty"):
            await copied(source, target)
    async with opened(database) as store:
        assert await store.response(OWNER, "there") is not None


# -- ends in the middle ------------------------------------------------------------------------------------------------

KILLED = """
import asyncio, os, sys
sys.path[:0] = {paths!r}
import copying, postgres_copying, sqlite_copying
copying.PAGE_ROWS = postgres_copying.PAGE_ROWS = sqlite_copying.PAGE_ROWS = 3
left = {left}
def die(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
def before(kind, name):
    own = getattr(kind, name)
    async def dying(*given):
        die()
        return await own(*given)
    setattr(kind, name, dying)
class Dying(dict):
    def __getitem__(self, table):
        put = dict.__getitem__(self, table)
        return lambda *given: (put(*given), die())
if {where!r} == "between":
    before(postgres_copying.DatabaseSide, "put"); before(sqlite_copying.FileSide, "put")
else:
    before(postgres_copying.DatabaseSide, "_note"); sqlite_copying.PUTS = Dying(sqlite_copying.PUTS)
from test_copying import copied
asyncio.run(copied({source!r}, {target!r}))
"""


def copy_until_killed(source: str, target: str, left: int, where: str) -> int:
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "store")]
    code = KILLED.format(paths=paths, left=left, where=where, source=source, target=target)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50, cwd="/").returncode


@pytest.mark.parametrize("where", ["between", "in a page"])
@pytest.mark.parametrize("to_database", [True, False])
async def test_a_copy_that_is_killed_goes_on(
    tmp_path: Path, database: str, other: str, to_database: bool, where: str
) -> None:
    source, target = (str(tmp_path / "a.db"), database) if to_database else (database, str(tmp_path / "a.db"))
    async with opened(source) as store:
        await fill(store)
        expected = await answers(store)
    for left in (1, 5, 9, 9, 2):
        assert await asyncio.to_thread(copy_until_killed, source, target, left, where) == -signal.SIGKILL
        with pytest.raises(StoreError, match="has not ended: run 'responses-proxy copy'"):
            await opener_of(target)(StoreSettings(path=target))
    told: list[str] = []
    async with side(source, True) as one, side(target, False) as another:
        compared, wrong = await copying.copy(one, another, NOW, told.append)
    assert (wrong, all(each.is_same for each in compared)) == ([], True)
    async with opened(target) as store:
        found = await answers(store)
    if not to_database:
        expected["order"][OWNER] = joined_late(expected["order"][OWNER])
    assert found == expected


async def test_an_unfinished_copy_is_not_mixed_with_another_store(tmp_path: Path, database: str) -> None:
    source = str(tmp_path / "a.db")
    async with opened(source) as store:
        await fill(store)
    assert copy_until_killed(source, database, 9, "between") == -signal.SIGKILL
    async with opened(source) as store:
        await store.save(turn("later"))
    with pytest.raises(StoreError, match="unfinished copy of another store, or of this one as it was"):
        await copied(source, database)


async def test_a_row_that_changed_on_the_way_is_noticed(tmp_path: Path, database: str) -> None:
    source = str(tmp_path / "a.db")
    async with opened(source) as store:
        await fill(store)
    assert copy_until_killed(source, database, 40, "between") == -signal.SIGKILL
    with closing(Beside(database)) as beside:
        beside.do("UPDATE turn SET body = 'x' WHERE id = 'a'")
    compared, wrong = await copied(source, database)
    assert [each.table for each in compared if not each.is_same] == ["turn"]
    assert wrong == ["turn is not the same in both"]
    with pytest.raises(StoreError, match="has not ended"):
        await opener_of(database)(StoreSettings(path=database))


# -- what later engineers may forget -----------------------------------------------------------------------------------

# Columns of one store that the other has not, or has otherwise.
FILE_COLUMNS = {
    "settings": ("seq", "owner", "digest", "model", "body"),
    "thread": ("seq", "parent", "parent_depth", "is_conversation"),
    "item": ("seq", "kind", "is_removed", "body"),
    "queue": ("owner", "length", "served"),
    "event": ("seq", "body"),
    "item_id": ("id", "item"),
}
DATABASE_COLUMNS = {"settings": ("digest", "model", "body")}
LEASE = {"lease": ("name", "holder", "until_at")}
USED = ("owner", "requests_at", "tokens_at", "took_s")
FILE_LEFT = {**LEASE, "account": USED, "flight": ("owner", "holder", "requests")}
DATABASE_LEFT = {**LEASE, "account": (*USED, "flights", "is_granted")}


async def test_every_column_of_a_file_is_known_to_the_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with opened(str(path)):
        pass
    with closing(FilePlace(path)) as place:
        tables = [name for (name,) in place.asked("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {t: {row[1] for row in place.asked(f"PRAGMA table_info({t})")} for t in tables}
    del found["sqlite_sequence"]
    assert found == {name: set(columns) for name, columns in {**copying.TABLES, **FILE_COLUMNS, **FILE_LEFT}.items()}


def test_every_column_of_a_database_is_known_to_the_copy(database: str) -> None:
    with closing(Beside(database)) as beside:
        rows = beside.asked(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()"
        )
    found = {table: {column for name, column in rows if name == table} for table, _ in rows}
    del found["responses_proxy"]
    assert found == {
        name: set(columns) for name, columns in {**copying.TABLES, **DATABASE_COLUMNS, **DATABASE_LEFT}.items()
    }


def test_every_table_is_copied_or_has_a_reason_to_stay() -> None:
    assert {*copying.TABLES, *copying.LEFT_BEHIND} == {*DATABASE_TABLES, *FILE_LEFT, *DATABASE_LEFT}


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_tells_what_it_did_and_what_is_left(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / "a.db")
    asyncio.run(_filled(file))
    assert main(["copy", "--from", file, "--to", f"{database}&password=secret"]) == 0
    said = capsys.readouterr()
    assert "secret  same" not in said.out
    assert "password" not in said.out + said.err
    assert f"set sealing.keys to the lines of {file}.key" in said.out
    assert main(["copy", "--from", database, "--to", str(tmp_path / "b.db")]) == 0
    assert f"{tmp_path / 'b.db'}.key" in capsys.readouterr().out
    assert os.stat(tmp_path / "b.db").st_mode & 0o777 == 0o600


def test_a_copy_that_is_refused_makes_nothing(
    tmp_path: Path, database: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.db"
    assert main(["copy", "--from", other, "--to", str(file)]) == 1
    assert "holds no store of this program" in capsys.readouterr().err
    with closing(Beside(database)) as beside:
        assert beside.asked("SELECT FROM pg_tables WHERE schemaname = 'copied'") == []
        beside.do(f"INSERT INTO lease VALUES ('talk', 'me', {time.time() + 30})")
    assert main(["copy", "--from", database, "--to", str(file)]) == 1
    assert "is in use" in capsys.readouterr().err
    assert not file.exists()


async def _filled(file: str) -> None:
    async with opened(file) as store:
        await save_chain(store, "a", "b")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "copy --from STORE --to STORE"),
        (["--from", "nowhere.db", "--to", "b.db"], "there is no file 'nowhere.db'"),
        (["--from", ":memory:", "--to", "b.db"], "':memory:' keeps nothing"),
        (["--from", "postgresql://me:hush@db/x", "--to", "postgresql://me:hush@db/x"], "are the same store"),
    ],
)
def test_a_copy_that_makes_no_sense_is_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy", *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "hush" not in said


def test_a_database_without_its_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.db").touch()
    monkeypatch.setitem(sys.modules, "store_postgres", None)
    assert main(["copy", "--from", str(tmp_path / "a.db"), "--to", "postgresql://db/name"]) == 2
    assert "responses-proxy[postgres]" in capsys.readouterr().err
