"""A database that is stopped, killed, frozen or cut off: what clients are told, and how it goes on when it is back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest
from conftest import App, StartApp, settings_of
from losses import KEY, LIMIT_S, QUICK, SECRET, Site
from openai import InternalServerError
from postgres_program import Server
from scripted import END, Backend, Script, chunk, streamed

from errors import StoreError
from event_log import Logs, RunLog
from postgres_pool import CLOSE_S
from postgres_tables import FORGETTING
from run_verbs import Ending, Held, NewRun, QueueLimits
from services import opened_store
from settings import SettingsError
from store import StoreSettings
from store_postgres import PostgresStore, open_store
from verbs import NewTurn
from watching import Watcher

pytest_plugins = ["loss_fixtures"]

# What else a machine under load may take.
SLACK_S = 4.0
DEADLINE_S = 20.0

LOSSES: dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]] = {
    "stopped": (lambda site: site.server.stop(), lambda site: site.server.start()),
    "killed": (lambda site: site.server.kill(), lambda site: site.server.start()),
    "frozen": (lambda site: site.server.freeze(), lambda site: site.server.thaw()),
    "cut off": (lambda site: site.relay.cut(), lambda site: site.relay.heal()),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


async def lose(site: Site, loss: str) -> None:
    await on_its_side(LOSSES[loss][0], site)


async def bring_back(site: Site, loss: str) -> None:
    await on_its_side(LOSSES[loss][1], site)


async def on_its_side(act: Callable[[Site], None], site: Site) -> None:
    """A relay belongs to this loop; a server takes its time."""
    await asyncio.to_thread(act, site) if "server" in act.__code__.co_names else act(site)


class Answer(NamedTuple):
    status: int
    code: str | None
    retry_after: str | None
    text: str
    took_s: float


async def sent(app: App, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    began_at = time.monotonic()
    async with app.http.request(method, app.url + path, json=body, headers=headers) as answer:
        text = await answer.text()
        is_json = answer.content_type == "application/json"
    told = json.loads(text) if is_json else {}
    code = (told.get("error") or {}).get("code")
    return Answer(answer.status, code, answer.headers.get("retry-after"), text, time.monotonic() - began_at)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await is_so():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


async def is_ready(app: App) -> bool:
    return (await sent(app, "GET", "/readyz")).status == 200


async def is_not_ready(app: App) -> bool:
    return not await is_ready(app)


# -- requests ----------------------------------------------------------------------------------------------------------

ASKED = {"model": "m", "input": "Hi"}
ITEM = {"type": "message", "role": "user", "content": "Hi"}


def requests_of(response: str, talk: str) -> list[tuple[Any, ...]]:
    """One for each way into the store."""
    one, conversation = f"/v1/responses/{response}", f"/v1/conversations/{talk}"
    continued = {"model": "m", "previous_response_id": response}
    return [
        ("POST", "/v1/responses", ASKED),
        ("POST", "/v1/responses", {**ASKED, "background": True}),
        ("POST", "/v1/responses", {**ASKED, "background": True, "stream": True}),
        ("POST", "/v1/responses", {**ASKED, **continued}),
        ("POST", "/v1/responses", {**ASKED, "conversation": talk}),
        ("POST", "/v1/responses/compact", continued),
        ("POST", "/v1/responses/input_tokens", continued),
        ("GET", "/v1/responses"),
        ("GET", one),
        ("GET", f"{one}/input_items"),
        ("POST", f"{one}/cancel"),
        ("DELETE", one),
        ("POST", "/v1/conversations", {}),
        ("GET", conversation),
        ("POST", conversation, {"metadata": {}}),
        ("DELETE", conversation),
        ("GET", f"{conversation}/items"),
        ("POST", f"{conversation}/items", {"items": [ITEM]}),
        ("GET", f"{conversation}/items/msg_1"),
        ("DELETE", f"{conversation}/items/msg_1"),
    ]


async def begun(app: App) -> list[tuple[Any, ...]]:
    response = await app.openai.responses.create(**ASKED)
    return requests_of(response.id, (await app.openai.conversations.create()).id)


def quiet(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings, which hold no trace of a fault, nor a secret. How many there are does not depend on requests."""
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record for record in warned if record.exc_info] == []
    assert SECRET not in caplog.text
    return [record.getMessage() for record in warned]


@each_loss
async def test_whatever_needs_a_lost_database_is_a_503_in_time(
    site: Site, start_app: StartApp, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = await start_app(**site.store())
    requests = await begun(app)
    await lose(site, loss)
    answers = await asyncio.gather(*(sent(app, *each) for each in requests), sent_once(app))
    assert {(each.status, each.code, each.retry_after) for each in answers} == {(503, "store_unavailable", "1")}
    assert max(each.took_s for each in answers) < LIMIT_S + SLACK_S
    assert (await sent(app, "GET", "/healthz")).status == 200
    await until(partial(is_not_ready, app))
    assert "responses_proxy_runs_queued NaN" in (await sent(app, "GET", "/metrics")).text
    assert len(quiet(caplog)) < len(requests)
    await bring_back(site, loss)
    await until(partial(is_ready, app))
    await until(partial(are_served, app))


async def are_served(app: App) -> bool:
    """What was given up while it was away may hold a place in the pool for a moment still: then clients try again."""
    try:
        requests = await begun(app)
    except InternalServerError:
        return False
    again = await asyncio.gather(*(sent(app, *each) for each in requests))
    return max(each.status for each in again) < 500


async def sent_once(app: App) -> Answer:
    return await sent(app, "POST", "/v1/responses", ASKED, **{"Idempotency-Key": "a"})


@each_loss
async def test_a_turn_that_is_not_stored_does_not_notice(
    site: Site, start_app: StartApp, backend: Backend, loss: str
) -> None:
    app = await start_app(**site.store())
    backend.script(streamed("Hel", "lo"))
    await lose(site, loss)
    async with asyncio.timeout(LIMIT_S / 2):
        events = await app.openai.responses.create(**ASKED, store=False, stream=True)
        types = [event.type async for event in events]
    assert types[-1] == "response.completed"
    await bring_back(site, loss)


@each_loss
async def test_an_answer_that_cannot_be_kept_is_not_told_as_completed(
    site: Site, start_app: StartApp, backend: Backend, loss: str
) -> None:
    app = await start_app(**site.store())
    rest = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), rest, chunk(content="lo"), *END]))
    stream = await app.openai.responses.create(**ASKED, stream=True)
    events = [await anext(stream)]
    await lose(site, loss)
    rest.set()
    async with asyncio.timeout(LIMIT_S + SLACK_S):
        events += [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert "store of responses" in events[-1].response.error.message
    await bring_back(site, loss)


# -- a database that refuses -------------------------------------------------------------------------------------------

ENDED = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'lost'"
# What is told of it -> what is done to the database, and what undoes that.
REFUSALS = {
    "takes no more connections": ("ALTER DATABASE lost CONNECTION LIMIT 0", "ALTER DATABASE lost CONNECTION LIMIT -1"),
    "has no database of that name": ("ALTER DATABASE lost RENAME TO kept", "ALTER DATABASE kept RENAME TO lost"),
    "refuses the user or the password": ("ALTER ROLE visitor NOLOGIN", "ALTER ROLE visitor LOGIN"),
    "may not be written": (
        "ALTER DATABASE lost SET default_transaction_read_only = on",
        "ALTER DATABASE lost RESET default_transaction_read_only",
    ),
}


@pytest.fixture
def visitor(site: Site) -> Site:
    """A user who is not above the limits, in a database of its own."""
    for statement in ("DROP DATABASE IF EXISTS lost", "DROP ROLE IF EXISTS visitor", "CREATE ROLE visitor LOGIN"):
        site.server.do(statement)
    site.server.do("CREATE DATABASE lost OWNER visitor")
    return site._replace(url=f"postgresql://visitor:{SECRET}@127.0.0.1:{site.relay.port}/lost")


@pytest.mark.parametrize("reason", REFUSALS)
async def test_a_database_that_refuses_is_a_503_that_says_why(
    visitor: Site, start_app: StartApp, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = await start_app(**visitor.store())
    requests = (await begun(app))[:3]
    refuse, welcome = REFUSALS[reason]
    await asyncio.to_thread(sever, visitor.server, refuse)
    await until(partial(is_told, app, reason))
    answers = await asyncio.gather(*(sent(app, *each) for each in requests))
    assert {(each.status, each.code, each.retry_after) for each in answers} == {(503, "store_unavailable", "1")}
    assert [each.text for each in answers if reason not in each.text] == []
    assert max(each.took_s for each in answers) < LIMIT_S + SLACK_S
    assert quiet(caplog)
    await asyncio.to_thread(sever, visitor.server, welcome)
    await until(partial(is_ready, app))
    assert {(await sent(app, *each)).status for each in requests} == {200}


async def is_told(app: App, reason: str) -> bool:
    return reason in (await sent(app, "POST", "/v1/conversations", {})).text


def sever(server: Server, change: str) -> None:
    """No session goes on that began before the change, nor begins while it is made."""
    last = ("ALTER ROLE visitor NOLOGIN", ENDED, change, "ALTER ROLE visitor LOGIN")
    for statement in last if "RENAME" in change else (change, ENDED):
        server.do(statement)


# -- runs in background ------------------------------------------------------------------------------------------------


@each_loss
async def test_a_run_goes_on_without_the_database_and_is_kept_when_it_is_back(
    site: Site, start_app: StartApp, backend: Backend, loss: str
) -> None:
    app = await start_app(**site.store(), background={"lease_s": 60.0})
    begin, rest = asyncio.Event(), asyncio.Event()
    backend.script(Script([chunk(content="Hel"), begin, chunk(content="lo"), rest, *END]))
    stream = await app.openai.responses.create(**ASKED, background=True, stream=True)
    events = [await until_text(stream)]
    await lose(site, loss)
    begin.set()
    rest.set()
    await until(partial(is_not_ready, app))
    await bring_back(site, loss)
    async with asyncio.timeout(DEADLINE_S):
        events += [event async for event in stream]
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Hello"
    assert len(backend.requests) == 1
    assert await numbers(app, events[-1].response.id) == list(range(events[-1].sequence_number + 1))
    assert "run_takeovers_total 0.0" in (await sent(app, "GET", "/metrics")).text


async def until_text(stream: Any) -> Any:
    async for event in stream:
        if event.type == "response.output_text.delta":
            return event
    raise AssertionError("the stream has no text")


async def numbers(app: App, response_id: str) -> list[int]:
    stream = await app.openai.responses.retrieve(response_id, stream=True)
    return [event.sequence_number async for event in stream]


async def test_a_run_whose_holder_alone_lost_the_database_is_made_once_by_another(
    site: Site, start_app: StartApp, backend: Backend
) -> None:
    held, short = asyncio.Event(), {"background": {"lease_s": 1.0}}
    backend.script(Script([chunk(content="first"), held, *END]), streamed("second"))
    cut_off = await start_app(**site.store(), **short)
    response = await cut_off.openai.responses.create(**ASKED, background=True)
    await backend.received()
    beside = {"store": {**site.store()["store"], "path": site.server.url}, "sealing": {"keys": (KEY,)}}
    other = await start_app(**beside, **short)
    site.relay.cut()
    held.set()
    await until(lambda: has_ended(other, response.id))
    site.relay.heal()
    await until(partial(is_ready, cut_off))
    kept = [await app.openai.responses.retrieve(response.id) for app in (cut_off, other)]
    assert [(each.status, each.output_text) for each in kept] == [("completed", "second")] * 2


async def has_ended(app: App, response_id: str) -> bool:
    return (await app.openai.responses.retrieve(response_id)).status == "completed"


async def test_an_end_whose_answer_was_lost_is_taken_for_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("event_log.TRY_AGAIN_S", 0.01)
    store = await open_store(StoreSettings(path=site.url, **QUICK))
    settle, kept = PostgresStore.settle, []

    async def unheard(self: PostgresStore, held: Held, ending: Ending) -> bool:
        kept.append(await settle(self, held, ending))
        if len(kept) == 1:
            raise StoreError("The store of responses has lost its connection.")
        return kept[-1]

    monkeypatch.setattr(PostgresStore, "settle", unheard)
    for is_others, expected in ((False, True), (True, False)):
        kept.clear()
        turn = ended_turn()
        await store.admit(NewRun(msgspec.structs.replace(turn, status="queued"), b"{}", 0.0), QueueLimits(100, 100))
        (run,) = await store.claim("me", time.time() + 60, 1)
        if is_others:
            other = msgspec.structs.replace(turn, body=b'{"by":"another"}')
            await settle(store, run.held, Ending(other, None, 0.0, 0.0))
        run_log = RunLog(Logs(store, Watcher(store), time.time, 60.0), run)
        assert await run_log.settle(turn, []) is expected
        assert kept == [not is_others, False]
    await store.close()


def ended_turn() -> NewTurn:
    return NewTurn(
        id=f"resp_{uuid.uuid4().hex}",
        owner="owner",
        status="completed",
        created_at=1,
        completed_at=2,
        model="m",
        settings=b"{}",
        body=b"{}",
    )


# -- connections that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["stopped", "killed", "cut off"])
async def test_the_first_request_after_it_is_back_gets_a_new_connection(
    site: Site, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postgres_pool.IDLE_S", 0.0)
    monkeypatch.setattr("postgres_pool.PING_S", 0.1)
    store = await open_store(StoreSettings(path=site.url, **QUICK))
    await asyncio.gather(*(store.queue() for _ in range(4)))
    await lose(site, loss)
    await bring_back(site, loss)
    assert await store.response("owner", "resp_none") is None
    await store.close()


async def test_a_connection_that_was_idle_is_used_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postgres_pool.IDLE_S", 0.0)
    store = await open_store(StoreSettings(path=site.url, **QUICK))
    assert [await store.response("owner", "resp_none") for _ in range(3)] == [None] * 3
    await store.close()


async def test_a_database_that_is_away_is_tried_by_one_at_a_time(site: Site) -> None:
    store = await open_store(StoreSettings(path=site.url, **QUICK))
    await lose(site, "stopped")
    began_at, before = time.monotonic(), site.relay.connections
    asked = await asyncio.gather(*(store.queue() for _ in range(100)), return_exceptions=True)
    assert {type(each) for each in asked} == {StoreError}
    tries = site.relay.connections - before
    assert 0 < tries <= 10 * (time.monotonic() - began_at) + 5
    await store.close()


async def test_news_that_cannot_be_told_are_no_warning_at_each_try(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postgres_news.FIRST_PAUSE_S", 0.01)
    caplog.set_level(logging.DEBUG, "responses_proxy.postgres_news")
    store = await open_store(StoreSettings(path=site.url, **QUICK))
    await lose(site, "stopped")
    hearing = asyncio.create_task(store.hear(lambda news: None))
    store.announce("resp_a")

    def untold() -> list[int]:
        return [record.levelno for record in caplog.records if "could not be told" in record.getMessage()]

    async def are_several() -> bool:
        return len(untold()) > 1

    await until(are_several)
    assert set(untold()) == {logging.DEBUG}
    hearing.cancel()
    await asyncio.wait({hearing})
    await store.close()


async def test_a_frozen_database_holds_nothing_for_ever(site: Site) -> None:
    store = await open_store(StoreSettings(path=site.url, **QUICK))
    await lose(site, "frozen")
    began_at = time.monotonic()
    asked = await asyncio.gather(*(store.queue() for _ in range(12)), return_exceptions=True)
    assert {type(each) for each in asked} == {StoreError}
    await store.close()
    assert time.monotonic() - began_at < LIMIT_S + CLOSE_S + SLACK_S


# -- the beginning -----------------------------------------------------------------------------------------------------


async def test_a_database_that_is_not_there_yet_is_waited_for(
    site: Site, start_app: StartApp, caplog: pytest.LogCaptureFixture
) -> None:
    await lose(site, "stopped")
    starting = asyncio.create_task(start_app(**site.store()))
    await until(lambda: is_logged(caplog, "waiting for the database"))
    await bring_back(site, "stopped")
    assert (await sent(await starting, "GET", "/readyz")).status == 200
    assert len([line for line in quiet(caplog) if "waiting" in line]) == 1


async def is_logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def test_a_database_that_refuses_is_not_waited_for(visitor: Site) -> None:
    visitor.server.do("ALTER ROLE visitor NOLOGIN")
    settings = settings_of("http://backend", **visitor.store())
    async with asyncio.timeout(SLACK_S), contextlib.AsyncExitStack() as stack:
        with pytest.raises(SettingsError, match="refuses the user or the password"):
            await opened_store(settings, stack)


async def test_a_database_that_never_comes_ends_the_program_with_a_word(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.START_S", 0.1)
    settings = settings_of("http://backend", **site.store())
    await lose(site, "stopped")
    async with contextlib.AsyncExitStack() as stack:
        with pytest.raises(SettingsError, match=r"store\.path: '.*' (cannot be reached|has lost its connection)"):
            await opened_store(settings, stack)


@pytest.mark.parametrize(("apart_s", "said"), [(0.0, None), (30.0, "30.* s ahead of"), (-30.0, "30.* s behind")])
async def test_a_clock_that_is_not_the_databases_is_told(
    site: Site, apart_s: float, said: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postgres_opening.time", SimpleNamespace(time=lambda: time.time() + apart_s))
    await (await open_store(StoreSettings(path=site.url, **QUICK))).close()
    told = [line for line in quiet(caplog) if "clock" in line]
    assert bool(told) == bool(said)
    assert re.search(said or "", "".join(told))


async def test_work_that_may_take_long_is_given_up_at_once_at_the_end(site: Site) -> None:
    store = await open_store(StoreSettings(path=site.url, **QUICK))
    beside = await asyncpg.connect(site.server.url)
    await beside.execute(f"SELECT pg_advisory_lock({FORGETTING})")
    purging = asyncio.create_task(store.purge(0.0, 0.0))
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory'"
    await until(partial(beside.fetchval, waits))
    await lose(site, "frozen")
    purging.cancel()
    async with asyncio.timeout(SLACK_S):
        await asyncio.wait({purging})
    assert purging.cancelled()
    await store.close()
    beside.terminate()
