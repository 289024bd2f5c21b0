"""What only a store on PostgreSQL does: its address, its schema, its connections, and statements of a turn."""

from __future__ import annotations

import asyncio
import base64
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from conftest import StartApp, settings_of
from postgres_server import Beside
from run_builders import begin, queued, waiting_ids
from scripted import Backend, Script, chunk, plain, streamed
from store_builders import NOW, OWNER, both_of, conversation, message, save_chain, turn, window_ids
from store_places import MemoryPlace, Place, PostgresPlace

import postgres_pool
from errors import StoreError
from postgres_tables import MIGRATIONS, TABLES
from proxy import main
from run_verbs import RunStore
from services import make_seals, opened, opener_of
from settings import SettingsError
from store import SQLiteStore, StoreSettings, shown
from store_postgres import PostgresStore, open_store

pytestmark = pytest.mark.stores("postgres")
MADE_TABLE = re.compile(r"CREATE (?:UNLOGGED )?TABLE (\w+)")
KEY = base64.b64encode(b"k" * 32).decode()


@pytest.fixture
def empty(place: PostgresPlace) -> Iterator[str]:
    """The address of a schema without tables."""
    name = "without_tables"
    with closing(Beside(place.url)) as beside:
        beside.do(f"DROP SCHEMA IF EXISTS {name} CASCADE; CREATE SCHEMA {name}")
        yield f"{place.url.rpartition('search_path=')[0]}search_path={name}"
        beside.do(f"DROP SCHEMA {name} CASCADE")


def form_of(member: Any) -> Any:
    """How a member of a store is used: what it takes and gives, and whether it is awaited."""
    if isinstance(member, property):
        return property, inspect.signature(member.fget)  # type: ignore[arg-type]
    assert inspect.isfunction(member), member
    return inspect.iscoroutinefunction(member), inspect.signature(member)


def verbs_of(kind: type[Any]) -> dict[str, Any]:
    """All that is public, whatever it is."""
    return {name: form_of(inspect.getattr_static(kind, name)) for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize("kind", [SQLiteStore, PostgresStore])
def test_each_store_has_the_verbs_of_the_protocol_and_no_others(kind: type[Any]) -> None:
    assert verbs_of(kind) == verbs_of(RunStore)


@pytest.mark.stores("memory", "file", "postgres")
async def test_an_open_store_has_nothing_public_but_its_verbs(kept_in: MemoryPlace | Place) -> None:
    store = await kept_in.open()
    assert {name for name in dir(store) if not name.startswith("_")} == set(verbs_of(RunStore))
    await store.close()


# -- its address -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("postgresql://me:secret@db:5432/name?sslmode=require", "postgresql://db:5432/name"),
        ("postgres://me:sec@ret@db/name", "postgres://db/name"),
        ("postgresql://me:se/c@ret@db/name", "postgresql://…"),
        ("postgresql://me:se#cr[et@db/name", "postgresql://…"),
        ("postgresql://me:se?cret@db/name", "postgresql://…"),
        ("postgresql:///name?password=secret&host=/run", "postgresql:///name"),
        ("postgresql://me:secret@[::1]:5432,other/name", "postgresql://[::1]:5432,other/name"),
        ("postgresql://me:secret@[::1/name", "postgresql://…"),
        ("postgresql://me:secret/name", "postgresql://…"),
        ("postgresql://me:se#c@ret@db/name", "postgresql://…"),
        ("responses.db", "responses.db"),
    ],
)
def test_a_store_is_shown_without_its_password(path: str, expected: str) -> None:
    assert shown(path) == expected


COMMANDS = (["check", "--store"], ["purge", "--store"], ["jobs", "--store"], ["keys", "rotate", "--store"])
SECRET = "s3cr3t"
UNUSABLE = [
    f"postgresql://me:{SECRET}@127.0.0.1:1/name",
    f"postgresql://me:{SECRET}@127.0.0.1:port/name",
    f"postgresql://me:{SECRET}@[::1/name",
    f"postgresql:///name?password={SECRET}&host=/nowhere",
    f"postgresql://me:[{SECRET}@127.0.0.1:1/name",
    f"postgresql://me:{SECRET}℀@127.0.0.1:1/name",
    # Not quite an address of a database, and still no file.
    f"postgresql+asyncpg://me:{SECRET}@127.0.0.1:1/name",
    f"POSTGRESQL://me:{SECRET}@127.0.0.1:1/name",
    f"postgresql:/me:{SECRET}@127.0.0.1:1/name",
    f"me:{SECRET}@127.0.0.1/name",
]


@pytest.mark.parametrize("address", UNUSABLE)
@pytest.mark.parametrize("command", COMMANDS[:3], ids="-".join)
def test_a_command_that_cannot_use_a_database_says_so_in_one_line_without_its_password(
    command: list[str], address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.START_S", 0.0)  # nobody will be there
    code = main([*command, address])
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines()), SECRET in err) == (2, "", 1, False)


@pytest.mark.parametrize("command", COMMANDS, ids="-".join)
def test_a_command_tells_nothing_of_the_password_of_its_database(
    place: PostgresPlace, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*command, f"{place.url}&password={SECRET}"])
    out, err = capsys.readouterr()
    assert (code, out != "", err, SECRET in out) == (0, True, "", False)


@pytest.mark.parametrize("command", COMMANDS[:3], ids="-".join)
def test_a_command_makes_no_tables_where_there_are_none(
    empty: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, empty]) == 2
    out, err = capsys.readouterr()
    assert (out, "holds no store of this program" in err) == ("", True)
    with closing(Beside(empty)) as beside:
        assert beside.asked("SELECT FROM pg_tables WHERE schemaname = current_schema()") == []


# What is added to an address, or its name -> why it is refused and what to do, and whether that may be over by itself.
REFUSED = {
    "_not_there": ("has no schema of the name in its address: make it with CREATE SCHEMA", False),
    "/not_there": ("has no database of that name: make it with CREATE DATABASE", False),
    "&role=pg_monitor": ("has no schema .* CREATE SCHEMA, and let the user have USAGE of it", False),
    "&search_path=public&role=pg_monitor": (
        "may not be read or written by this user: the user needs .* CREATE and USAGE",
        False,
    ),
    "&serch_path=name": ("has no setting of a name in its address: look at the options", False),
    "&max_connections=5": ("does not let its address change a setting: look at the options", False),
    "&statement_timeout=soon": ("refuses a setting in its address: look at the options", False),
    "&sslmode=verify": ("has an sslmode that does not exist: disable, allow, prefer, require,", False),
    "&sslmode=verify-full": ("cannot be verified without a root certificate: name its file in PGSSLROOTCERT", False),
    "&sslmode=verify-full&sslrootcert=/not/there": (
        "cannot be reached: there is no file as its address names it in sslrootcert",
        False,
    ),
    "&port=port": ("has an address that cannot be understood: it is written postgresql://user@host", False),
    "&default_transaction_read_only=on": ("may not be written: it is a standby, perhaps", True),
}


@pytest.mark.parametrize("added", REFUSED)
async def test_a_database_that_cannot_be_used_says_why_and_what_to_do(
    empty: str, added: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where certificates are looked for
    said, is_passing = REFUSED[added]
    path = urlsplit(empty)._replace(path=added).geturl() if added.startswith("/") else f"{empty}{added}"
    with pytest.raises(StoreError, match=f"^'postgresql://.*' {said}") as refused:
        await open_store(StoreSettings(path=path))
    assert refused.value.is_passing == is_passing
    assert [line for line in caplog.messages if "database" in line] == []


@pytest.mark.parametrize(
    "rest", ["@127.0.0.1:1/name", "@127.0.0.1:port/name", "@/name?host=/nowhere&sslmode=verify-full"]
)
async def test_a_database_that_cannot_be_opened_is_told_without_its_password(rest: str) -> None:
    with pytest.raises(StoreError) as refused:
        await open_store(StoreSettings(path=f"postgresql://me:secret{rest}"))
    assert (refused.value.retry_after_s or 0) > 0
    assert "secret" not in f"{refused.value.message}{refused.value.logged}{refused.value.__cause__!r}"
    assert refused.value.__suppress_context__


async def test_a_store_in_a_database_needs_keys_that_all_processes_have_and_makes_nothing_before(empty: str) -> None:
    path = f"{empty}&password={SECRET}"
    with pytest.raises(SettingsError, match=r"sealing\.keys .* --store postgresql://' prints one") as refused:
        async with opened(settings_of("http://backend", store={"path": path})):
            pass
    assert SECRET not in str(refused.value)
    with closing(Beside(empty)) as beside:
        assert beside.asked("SELECT FROM pg_tables WHERE schemaname = current_schema()") == []
    assert make_seals(settings_of("http://backend", store={"path": path}, sealing={"keys": (KEY,)}))


# Of an address, after its question mark -> what is said of it.
TLS = {
    "sslmode=verify-ca": "without a root certificate: name its file in PGSSLROOTCERT, or as sslrootcert in the address",
    "sslmode=require&sslcert=/nowhere/own.crt": "there is no file as its address names it in sslcert",
    f"sslmode=verify-full&sslrootcert={__file__}": "fails at TLS: look at its certificate",
}


@pytest.mark.parametrize("options", TLS)
async def test_an_address_with_certificates_that_are_not_there_is_told_so(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match=TLS[options]):
        await open_store(StoreSettings(path=f"postgresql://me@127.0.0.1:1/name?{options}"))


def test_a_rotation_for_a_database_gives_a_key_for_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "rotate", "--store", "postgresql://me:secret@db/name"]) == 0
    key = capsys.readouterr().out.splitlines()[-1]
    assert len(base64.b64decode(key)) == 32


def test_a_database_without_its_package_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "store_postgres", None)
    with pytest.raises(SettingsError, match=r"responses-proxy\[postgres\]"):
        opener_of("postgresql://db/name")


# -- its schema --------------------------------------------------------------------------------------------------------


async def test_stores_that_open_an_empty_schema_at_once_make_one_set_of_tables(empty: str) -> None:
    stores = await asyncio.gather(*(open_store(StoreSettings(path=empty)) for _ in range(6)))
    await save_chain(stores[0], "a", "b")
    assert await window_ids(stores[5], "b") == both_of("a", "b")
    for store in stores:
        await store.close()


async def test_a_schema_of_a_newer_version_is_refused_and_stays_as_it_is(empty: str) -> None:
    await (await open_store(StoreSettings(path=empty))).close()
    with closing(Beside(empty)) as beside:
        beside.do("UPDATE responses_proxy SET version = version + 1")
        with pytest.raises(StoreError, match="newer version"):
            await open_store(StoreSettings(path=empty))
        assert beside.asked("SELECT version FROM responses_proxy") == [(len(MIGRATIONS) + 1,)]


async def test_tables_of_another_program_are_left_alone(empty: str) -> None:
    with closing(Beside(empty)) as beside:
        beside.do("CREATE TABLE item (of_theirs integer)")
        with pytest.raises(StoreError, match="another program"):
            await open_store(StoreSettings(path=empty))
        found = beside.asked("SELECT relname FROM pg_class WHERE relnamespace = 'without_tables'::regnamespace")
        assert found == [("item",)]


def test_the_tables_are_those_of_the_schema() -> None:
    found = (MADE_TABLE.match(statement) for each in MIGRATIONS for statement in each)
    made = [table[1] for table in found if table]
    assert sorted(made) == sorted(TABLES)


# -- its connections ---------------------------------------------------------------------------------------------------


LONG = {
    ("settings", "body"),
    ("turn", "body"),
    ("turn", "ahead"),
    ("item", "body"),
    ("run", "request"),
    ("event", "body"),
}
COMPRESSED = """SELECT attrelid::regclass::text, attname::text FROM pg_attribute WHERE attcompression = 'l'
    AND attrelid = ANY(?::regclass[])"""
HAS_LZ4 = "SELECT 'lz4' = ANY(enumvals) FROM pg_settings WHERE name = 'default_toast_compression'"


def test_what_may_be_long_is_compressed_the_fast_way_where_the_server_has_it(place: PostgresPlace) -> None:
    ((has_lz4,),) = place.asked(HAS_LZ4)
    assert set(place.asked(COMPRESSED, list(TABLES))) == (LONG if has_lz4 else set())


async def test_connections_that_were_cut_are_made_again(place: PostgresPlace) -> None:
    store = await place.open()
    await save_chain(store, "a")
    place.asked("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'responses-proxy'")
    results = [await asyncio.gather(store.response(OWNER, "a"), return_exceptions=True) for _ in range(5)]
    assert all(isinstance(result, StoreError) for (result,) in results[:1] if isinstance(result, Exception))
    assert [result.id for (result,) in results[1:]] == ["a"] * 4  # type: ignore[union-attr]
    await store.close()


async def test_a_statement_that_takes_too_long_is_refused_and_works_later(place: PostgresPlace) -> None:
    store = await place.open(statement_timeout_s=0.2)
    place.asked("SELECT 1")
    with closing(Beside(place.url)) as other:
        other.do("BEGIN; LOCK TABLE turn")
        with pytest.raises(StoreError) as refused:
            await store.save(turn("a"))
        assert (refused.value.retry_after_s or 0) > 0
        other.do("ROLLBACK")
    await store.save(turn("a"))
    assert await window_ids(store, "a") == both_of("a")
    await store.close()


async def test_a_transaction_whose_end_is_cancelled_too_leaves_no_connection_in_it(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await place.open(pool_size=1)
    await store.create_conversation(OWNER, conversation("conv"), ())
    undoing, usual = asyncio.Event(), asyncpg.transaction.Transaction.rollback

    async def rollback(self: asyncpg.transaction.Transaction) -> None:
        undoing.set()
        await asyncio.Event().wait()

    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told["message"]))
    monkeypatch.setattr(asyncpg.transaction.Transaction, "rollback", rollback)
    with place.locked():
        adding = asyncio.create_task(store.add_items(OWNER, "conv", (message("m"),), NOW))
        while not place.asked("SELECT FROM pg_locks WHERE NOT granted"):  # noqa: ASYNC110 - the server cannot tell
            await asyncio.sleep(0.01)
        adding.cancel()
        await undoing.wait()
        adding.cancel()
        await asyncio.wait({adding})
    monkeypatch.setattr(asyncpg.transaction.Transaction, "rollback", usual)
    assert await store.add_items(OWNER, "conv", (message("m"),), NOW)
    assert complaints == []
    await store.close()


async def test_who_waits_too_long_for_a_connection_is_refused_and_counted(place: PostgresPlace) -> None:
    store = await place.open(pool_size=1, busy_timeout_s=0.2)
    with closing(Beside(place.url)) as other:
        other.do("BEGIN; LOCK TABLE turn")
        first = asyncio.create_task(store.save(turn("a")))
        await asyncio.sleep(0)
        second = asyncio.create_task(store.save(turn("b")))
        with pytest.raises(StoreError):
            await second
        assert store.waiting == 0
        other.do("ROLLBACK")
    await first
    await store.close()


async def test_statements_need_not_be_prepared(place: PostgresPlace) -> None:
    store = await place.open(prepared_statements=False)
    await save_chain(store, "a", "b")
    await begin(store, queued("c", "b"))
    assert await window_ids(store, "b") == both_of("a", "b")
    await store.close()


async def test_an_id_that_no_text_can_hold_is_unknown(place: PostgresPlace) -> None:
    store = await place.open()
    await save_chain(store, "a")
    assert await store.response(OWNER, "a\0") is None
    assert await store.window(OWNER, "a\0") is None
    assert await store.items(OWNER, ["a.in\0"]) == {}
    assert await store.states(["a\0"]) == {}
    assert await store.delete_response(OWNER, "a\0", NOW) is False
    await store.save(turn("b", model="m\0"))
    assert await waiting_ids(store) == []
    await store.close()


# -- statements --------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many statements each task group has made: all of them go through these."""
    found: Counter[str] = Counter()
    for name in ("rows", "row"):
        asked = getattr(postgres_pool.Transaction, name)

        async def counted(self: Any, statement: Any, values: Any, asked: Any = asked) -> Any:
            found[statement.text] += 1
            return await asked(self, statement, values)

        monkeypatch.setattr(postgres_pool.Transaction, name, counted)
    return found


async def test_a_turn_of_a_chain_takes_two_statements(
    start_app: StartApp, place: PostgresPlace, made: Counter[str]
) -> None:
    app = await start_app(store={"path": place.url}, sealing={"keys": (KEY,)}, background={"workers": 0})
    first = await app.openai.responses.create(model="m", input="Hi")
    made.clear()
    for _ in range(TURNS):
        second = await app.openai.responses.create(model="m", input="Hi", previous_response_id=first.id)
        assert (second.status, second.previous_response_id) == ("completed", first.id)
    assert of_a_turn(made) == 2, made


# So many that what the process asks now and then beside them makes no statement more for each.
TURNS = 20


def of_a_turn(made: Counter[str]) -> int:
    return sum(count for text, count in made.items() if "pg_current_snapshot" not in text) // TURNS


LIMITS = {"in_flight_per_owner": 5, "requests_per_minute": 600, "tokens_per_minute": 10_000}


@pytest.mark.parametrize("stream", [False, True])
async def test_with_all_limits_a_turn_of_a_chain_takes_four_statements(
    start_app: StartApp, place: PostgresPlace, backend: Backend, made: Counter[str], stream: bool
) -> None:
    store = {"store": {"path": place.url}, "sealing": {"keys": (KEY,)}, "background": {"workers": 0}}
    app = await start_app(**store, limits=LIMITS)
    first = await app.openai.responses.create(model="m", input="Hi")
    made.clear()
    body = {"model": "m", "input": "Hi", "previous_response_id": first.id, "stream": stream}
    for _ in range(TURNS):
        backend.script(streamed("Hello") if stream else plain())
        async with app.post(body) as answer:
            assert (answer.status, b"completed" in await answer.read()) == (200, True)
    assert of_a_turn(made) == 4, made


# -- several processes -------------------------------------------------------------------------------------------------


async def test_a_response_that_one_process_admits_is_made_by_another(start_app: StartApp, place: PostgresPlace) -> None:
    shared: dict[str, dict[str, Any]] = {"store": {"path": place.url}, "sealing": {"keys": (KEY,)}}
    asked = await start_app(**shared, background={"workers": 0})
    await start_app(**shared)
    events = await asked.openai.responses.create(model="m", input="Hi", background=True, stream=True)
    types = [event.type async for event in events]
    assert (types[0], types[-1]) == ("response.created", "response.completed")


async def test_a_response_is_cancelled_by_another_process_than_makes_it(
    start_app: StartApp, backend: Backend, place: PostgresPlace
) -> None:
    shared: dict[str, dict[str, Any]] = {"store": {"path": place.url}, "sealing": {"keys": (KEY,)}}
    asked = await start_app(**shared, background={"workers": 0})
    await start_app(**shared)
    backend.script(Script((chunk(content="Hel"),), end="silent"))
    response = await asked.openai.responses.create(model="m", input="Hi", background=True)
    request = await backend.received()
    cancelled = await asked.openai.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    assert (await asked.openai.responses.retrieve(response.id)).status == "cancelled"
    assert await request.is_let_go()
