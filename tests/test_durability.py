"""What is kept, in real processes: after kill -9, on a full disk, a locked or damaged file, and between two of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import App, StartApp, at, running_app, settings_of
from scripted import END, Backend, Script, chunk, plain, refused, streamed
from store_places import FilePlace, Place, environ_of
from test_cli import Process, run, started
from test_proxy import Blocks, error_of, events_in

from store import shown

Json = dict[str, Any]
HI: Json = {"model": "m", "input": "Hi"}
# What is locked by a turn.
LOCKS = "SELECT name FROM lease WHERE name LIKE 'conversation %'"
STREAM: Json = {**HI, "stream": True}
KEY = {"Idempotency-Key": "k-1"}
LOCKED = {
    "message": "Another process is currently operating on this conversation. Please retry in a few seconds.",
    "type": "invalid_request_error",
    "param": "conversation",
    "code": "conversation_locked",
}
IMPATIENT = {"RESPONSES_PROXY_TURNS__CONVERSATION_WAIT_S": "0.1"}


@pytest.fixture
def impatient(place: Place) -> dict[str, str]:
    """For a process that waits neither for a conversation nor for a store that is locked."""
    return {**IMPATIENT, **environ_of({"store": place.hasty})}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "responses.db"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


Serve = Callable[..., AbstractAsyncContextManager[Process]]


@pytest.fixture
def serve(backend: Backend, place: Place) -> Serve:
    """Starts the program on the test's store: `async with serve() as process`."""

    def serve(**environ: str) -> AbstractAsyncContextManager[Process]:
        return started("proxy.py", "--upstream", backend.url, "--port", "0", **{**place.environ, **environ})

    return serve


@dataclass
class Caller:
    """A client of one process."""

    process: Process
    http: aiohttp.ClientSession

    def post(self, body: Json, path: str = "/responses", **headers: str) -> Any:
        return self.http.post(f"{self.process.url}/v1{path}", json=body, headers=headers)

    async def made(self, body: Json, path: str = "/responses", **headers: str) -> Json:
        async with self.post(body, path, **headers) as answer:
            assert answer.status == 200, await answer.text()
            made: Json = await answer.json()
            return made

    async def events(self, body: Json = STREAM) -> list[Json]:
        async with self.post(body) as answer:
            return events_in(await Blocks(answer).rest())

    async def got(self, path: str, status: int = 200) -> Json:
        async with self.http.get(f"{self.process.url}/v1{path}") as answer:
            assert answer.status == status, await answer.text()
            got: Json = await answer.json()
            return got


def held(script: Script) -> tuple[Script, asyncio.Event]:
    """A script that begins when the event is set."""
    script.before = asyncio.Event()
    return script, script.before


# -- kill -9 -----------------------------------------------------------------------------------------------------------

WORKERS = 8
SEEN_BEFORE_THE_KILL = 120


@dataclass
class Load:
    """Clients that ask without a pause, and remember every response that they were told is finished."""

    caller: Caller
    seen: list[Json] = field(default_factory=list)
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    async def work(self, number: int) -> None:
        """Chains of plain and streamed turns, until the process is gone."""
        previous: str | None = None
        with contextlib.suppress(aiohttp.ClientError, asyncio.IncompleteReadError):
            while True:
                is_streamed = number % 2 == 1
                body: Json = {"model": "streamed" if is_streamed else "plain", "input": "Hi", "stream": is_streamed}
                body["previous_response_id"] = previous
                response = await (self.streamed(body) if is_streamed else self.caller.made(body))
                self.note(response)
                previous = response["id"]

    async def streamed(self, body: Json) -> Json:
        async with self.caller.post(body) as answer:
            block = await Blocks(answer).until("event: response.completed")
        response: Json = json.loads(block.partition("data: ")[2])["response"]
        return response

    def note(self, response: Json) -> None:
        assert response["status"] == "completed"
        self.seen.append(response)
        if len(self.seen) >= SEEN_BEFORE_THE_KILL:
            self.enough.set()


@pytest.fixture
async def two_backends(backend: Backend, tmp_path: Path) -> AsyncIterator[Path]:
    """A settings file with a backend that answers plain turns, and one that streams."""
    async with Backend().running() as streaming:
        streaming.script(streamed("Hel", "lo"))
        tables = [
            f'[[upstream]]\nname = "{name}"\nmodels = ["{name}"]\nbase_url = "{url}"\ndialect = "generic"\n'
            for name, url in (("plain", backend.url), ("streamed", streaming.url))
        ]
        config = tmp_path / "config.toml"
        config.write_text("".join(tables))
        yield config


async def test_what_a_client_saw_completed_is_there_after_kill_9(
    two_backends: Path, http: aiohttp.ClientSession, place: Place
) -> None:
    arguments = ("proxy.py", "--config", str(two_backends), "--port", "0")
    async with started(*arguments, **place.environ) as process:
        load = Load(Caller(process, http))
        workers = [asyncio.create_task(load.work(number)) for number in range(WORKERS)]
        async with asyncio.timeout(30):
            await load.enough.wait()
        await process.stop(signal.SIGKILL)
        await asyncio.gather(*workers)
    async with started(*arguments, **place.environ) as process:
        again = Caller(process, http)
        assert [await again.got(f"/responses/{response['id']}") for response in load.seen] == load.seen
        for response in load.seen[-WORKERS:]:
            following = await again.made({"model": "plain", "input": "Hi", "previous_response_id": response["id"]})
            assert following["status"] == "completed"
    assert command("check", "--store", place.address) == good(place)


async def test_a_key_is_known_after_kill_9(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, place: Place
) -> None:
    async with serve() as process:
        first = await Caller(process, http).made(HI, **KEY)
        await process.stop(signal.SIGKILL)
        place.asked("UPDATE lease SET until_at = 0")  # had the key not been given back yet
    async with serve() as process:
        assert (await Caller(process, http).made(HI, **KEY), len(backend.requests)) == (first, 1)


# -- a disk that is full -----------------------------------------------------------------------------------------------


Block = Callable[[Process], AbstractContextManager[None]]


@pytest.fixture(params=["full", "locked"])
def blocked(request: pytest.FixtureRequest, place: Place) -> Block:
    """Keeps a process from writing its store for a while: `with blocked(process): ...`."""
    return lambda process: place.full(process.process.pid) if request.param == "full" else place.locked()


# How the message of the refusal goes on.
UNWRITABLE = re.compile(
    r"The store of responses (is locked by another process|cannot be read or written|has no space left on its disk)\."
)


def assert_unavailable(answer: aiohttp.ClientResponse, error: Json) -> None:
    assert UNWRITABLE.fullmatch(error.pop("message"))
    assert error == {"type": "server_error", "param": None, "code": "store_unavailable"}
    assert answer.headers["retry-after"] == "1"


async def test_a_plain_turn_that_cannot_be_kept_is_a_503(
    serve: Serve, http: aiohttp.ClientSession, blocked: Block, impatient: dict[str, str]
) -> None:
    async with serve(**impatient) as process:
        caller = Caller(process, http)
        await caller.made(HI)
        with blocked(process):
            async with caller.post(HI) as answer:
                assert_unavailable(answer, await error_of(answer, 503))
    assert "Traceback" not in process.output


async def test_a_stream_that_cannot_be_kept_ends_with_response_failed(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, blocked: Block, impatient: dict[str, str]
) -> None:
    backend.script(plain(), streamed("Hel", "lo"))
    async with serve(**impatient) as process:
        caller = Caller(process, http)
        await caller.made(HI)
        with blocked(process):
            events = await caller.events()
        response = events[-1]["response"]
        assert [event["type"] for event in events if event["type"] in TERMINAL] == ["response.failed"]
        assert UNWRITABLE.fullmatch(response["error"].pop("message"))
        assert (events[-1]["type"], response["status"]) == ("response.failed", "failed")
        assert response["error"] == {"code": "server_error"}
        await caller.got(f"/responses/{response['id']}", 404)
    assert "Traceback" not in process.output


TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


async def test_what_was_kept_can_be_read_while_nothing_can_be_written(
    serve: Serve, http: aiohttp.ClientSession, blocked: Block, impatient: dict[str, str]
) -> None:
    async with serve(**impatient) as process:
        caller = Caller(process, http)
        conversation = await caller.made({}, "/conversations")
        response = await caller.made({**HI, "conversation": conversation["id"]})
        paths = [f"/responses/{response['id']}", "/responses", f"/responses/{response['id']}/input_items"]
        paths += [f"/conversations/{conversation['id']}", f"/conversations/{conversation['id']}/items"]
        before = [await caller.got(path) for path in paths]
        with blocked(process):
            assert [await caller.got(path) for path in paths] == before


async def test_turns_that_need_no_store_go_on_while_nothing_can_be_written(
    serve: Serve, http: aiohttp.ClientSession, blocked: Block, impatient: dict[str, str], backend: Backend
) -> None:
    async with serve(**impatient) as process:
        caller = Caller(process, http)
        first = await caller.made(HI)
        with blocked(process):
            await caller.made({**HI, "store": False})
            await caller.made({**HI, "store": False, "previous_response_id": first["id"]})
            assert len(backend.requests[-1].body["messages"]) == 3


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/conversations", {}, {}),
        ("/conversations/{conversation}", {"metadata": {"a": "b"}}, {}),
        ("/conversations/{conversation}/items", {"items": [{"role": "user", "content": "x"}]}, {}),
        ("/responses", {**HI, "conversation": "{conversation}"}, {}),
        ("/responses", HI, KEY),
    ],
    ids=["create", "update", "add items", "turn", "key"],
)
async def test_every_write_is_a_503_while_nothing_can_be_written(
    serve: Serve,
    http: aiohttp.ClientSession,
    blocked: Block,
    impatient: dict[str, str],
    path: str,
    body: Json,
    headers: dict[str, str],
) -> None:
    async with serve(**impatient) as process:
        caller = Caller(process, http)
        conversation = (await caller.made({}, "/conversations"))["id"]
        path, body = json.loads(json.dumps([path, body]).replace("{conversation}", conversation))
        with blocked(process):
            async with caller.post(body, path, **headers) as answer:
                assert_unavailable(answer, await error_of(answer, 503))
        await caller.made(body, path, **headers)
    assert "Traceback" not in process.output


async def test_turns_succeed_in_the_same_process_when_there_is_space_again(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, blocked: Block, impatient: dict[str, str], place: Place
) -> None:
    async with serve(**impatient) as process:
        caller = Caller(process, http)
        first = await caller.made(HI)
        with blocked(process):
            for _ in range(3):
                async with caller.post({**HI, "previous_response_id": first["id"]}) as answer:
                    assert answer.status == 503
        again = await caller.made({**HI, "previous_response_id": first["id"]})
        assert await caller.got(f"/responses/{again['id']}") == again
        backend.script(streamed("Hel", "lo"))
        *_, last = await caller.events({**STREAM, "previous_response_id": again["id"]})
        assert await caller.got(f"/responses/{last['response']['id']}") == last["response"]
        listed = await caller.got("/responses?order=asc")
        assert [each["id"] for each in listed["data"]] == [first["id"], again["id"], last["response"]["id"]]
    assert command("check", "--store", place.address) == good(place)


async def test_a_conversation_is_free_again_when_its_turn_could_not_be_kept(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, blocked: Block, impatient: dict[str, str]
) -> None:
    async with serve(**impatient) as process:
        caller = Caller(process, http)
        body = {**HI, "conversation": (await caller.made({}, "/conversations"))["id"]}
        script, goes_on = held(plain())
        backend.script(script, plain())
        running = asyncio.create_task(answer_of(caller, body))
        await backend.received()
        with blocked(process):
            goes_on.set()
            assert (await running)[0] == 503
        assert (await answer_of(caller, body))[0] == 200


async def answer_of(caller: Caller, body: Json, headers: dict[str, str] | None = None) -> tuple[int, Json]:
    async with caller.post(body, **(headers or {})) as answer:
        return answer.status, await answer.json()


# -- two processes on one store ----------------------------------------------------------------------------------------


@pytest.fixture
async def two(serve: Serve, http: aiohttp.ClientSession) -> AsyncIterator[tuple[Caller, Caller]]:
    """Two processes on one store."""
    async with serve(**IMPATIENT) as one, serve(**IMPATIENT) as other:
        yield Caller(one, http), Caller(other, http)


Two = tuple[Caller, Caller]


async def test_a_chain_goes_on_in_another_process(two: Two, backend: Backend) -> None:
    previous: str | None = None
    for turn in range(6):
        caller = two[turn % 2]
        response = await caller.made({**HI, "previous_response_id": previous})
        assert await two[(turn + 1) % 2].got(f"/responses/{response['id']}") == response
        previous = response["id"]
        assert len(backend.requests[-1].body["messages"]) == 2 * turn + 1


async def test_sealed_reasoning_opens_in_another_process(two: Two, backend: Backend) -> None:
    backend.script(plain("Hi", reasoning_content="A thought."), plain())
    first = await two[0].made({**HI, "store": False})
    async with two[1].post({**HI, "input": [*first["output"], {"role": "user", "content": "x"}]}) as answer:
        assert (answer.status, answer.headers.get("x-responses-proxy-ignored")) == (200, None)


async def test_a_key_is_known_in_another_process(two: Two, backend: Backend) -> None:
    first = await two[0].made(HI, **KEY)
    assert (await two[1].made(HI, **KEY), len(backend.requests)) == (first, 1)


async def test_a_key_that_another_process_uses_just_now_is_a_409(two: Two, backend: Backend) -> None:
    script, goes_on = held(plain())
    backend.script(script)
    running = asyncio.create_task(two[0].made(HI, **KEY))
    await backend.received()
    async with two[1].post(HI, **KEY) as answer:
        error = await error_of(answer, 409)
    goes_on.set()
    assert (error["code"], (await running)["status"]) == ("idempotency_key_in_use", "completed")


async def test_a_conversation_that_another_process_writes_is_locked(two: Two, backend: Backend) -> None:
    conversation = (await two[0].made({}, "/conversations"))["id"]
    body = {**HI, "conversation": conversation}
    script, goes_on = held(plain())
    backend.script(script, plain())
    running = asyncio.create_task(two[0].made(body))
    await backend.received()
    added = {"items": [{"role": "user", "content": "x"}]}
    for given, path in ((body, "/responses"), (added, f"/conversations/{conversation}/items")):
        async with two[1].post(given, path) as answer:
            assert await error_of(answer, 400) == LOCKED
    goes_on.set()
    await running
    assert len(backend.requests) == 1
    await two[1].made(body)
    assert len(backend.requests[-1].body["messages"]) == 3


async def test_a_locked_conversation_can_be_read_by_another_process(two: Two, backend: Backend) -> None:
    conversation = (await two[0].made({}, "/conversations"))["id"]
    script, goes_on = held(plain())
    backend.script(script, plain())
    running = asyncio.create_task(two[0].made({**HI, "conversation": conversation}))
    await backend.received()
    assert (await two[1].got(f"/conversations/{conversation}/items"))["data"] == []
    assert (await two[1].made({**HI, "conversation": conversation, "store": False}))["status"] == "completed"
    goes_on.set()
    await running


async def test_turns_of_two_processes_in_one_conversation_follow_each_other(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend
) -> None:
    patient = {"RESPONSES_PROXY_TURNS__CONVERSATION_WAIT_S": "60", "RESPONSES_PROXY_STORE__BUSY_TIMEOUT_S": "60"}
    async with serve(**patient) as one, serve(**patient) as other:
        callers = (Caller(one, http), Caller(other, http))
        conversation = (await callers[0].made({}, "/conversations"))["id"]
        body = {**HI, "conversation": conversation}
        await asyncio.gather(*(callers[turn % 2].made(body) for turn in range(12)))
    lengths = sorted(len(request.body["messages"]) for request in backend.requests)
    assert lengths == [2 * turn + 1 for turn in range(12)]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "stream"])
async def test_a_conversation_is_free_when_the_lease_of_a_dead_process_has_run_out(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, place: Place, is_streamed: bool
) -> None:
    script, _ = held(plain())
    backend.script(script, plain())
    async with serve(**IMPATIENT) as one, serve(**IMPATIENT) as other:
        callers = (Caller(one, http), Caller(other, http))
        body = {**HI, "conversation": (await callers[0].made({}, "/conversations"))["id"]}
        running = asyncio.create_task(until_it_dies(callers[0], {**body, "stream": is_streamed}))
        await backend.received()
        await one.stop(signal.SIGKILL)
        await running
        async with callers[1].post(body) as answer:
            assert await error_of(answer, 400) == LOCKED
        place.asked("UPDATE lease SET until_at = until_at - 30")
        assert (await callers[1].made(body))["status"] == "completed"
        assert len(backend.requests[-1].body["messages"]) == 1


async def test_a_key_is_free_when_the_lease_of_a_dead_process_has_run_out(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, place: Place
) -> None:
    script, _ = held(plain())
    backend.script(script, plain())
    async with serve(**IMPATIENT) as one, serve(**IMPATIENT) as other:
        running = asyncio.create_task(until_it_dies(Caller(one, http), HI, KEY))
        await backend.received()
        await one.stop(signal.SIGKILL)
        await running
        assert (await answer_of(Caller(other, http), HI, KEY))[0] == 409
        place.asked("UPDATE lease SET until_at = until_at - 30")
        assert (await answer_of(Caller(other, http), HI, KEY))[0] == 200


async def test_a_turn_that_lost_its_lease_is_not_kept(two: Two, backend: Backend, place: Place) -> None:
    body = {**HI, "conversation": (await two[0].made({}, "/conversations"))["id"]}
    script, goes_on = held(plain())
    backend.script(script, plain())
    running = asyncio.create_task(answer_of(two[0], body))
    await backend.received()
    place.asked("UPDATE lease SET until_at = 0")
    await two[1].made(body)
    goes_on.set()
    status, answered = await running
    assert (status, answered["error"]) == (400, LOCKED)
    assert len((await two[1].got(f"/conversations/{body['conversation']}/items"))["data"]) == 2


async def until_it_dies(caller: Caller, body: Json, headers: dict[str, str] | None = None) -> None:
    with contextlib.suppress(aiohttp.ClientError):
        async with caller.post(body, **(headers or {})) as answer:
            await answer.read()


# -- a client that leaves, and requests that are wrong -----------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "stream"])
async def test_a_client_that_leaves_frees_its_conversation(
    start_app: StartApp, backend: Backend, place: Place, is_streamed: bool
) -> None:
    app = await start_app(turns={"conversation_wait_s": 60.0})
    conversation = await app.openai.conversations.create()
    body = {**HI, "conversation": conversation.id}
    script, _ = held(plain())
    backend.script(script, plain())
    leaving = asyncio.create_task(asked(app, {**body, "stream": is_streamed}))
    received = await backend.received()
    leaving.cancel()
    await asyncio.wait({leaving})
    assert await received.is_let_go()
    assert await asked(app, body) == 200
    assert place.asked(LOCKS) == []


async def test_a_client_that_leaves_while_it_waits_for_a_conversation_leaves_nothing_behind(
    start_app: StartApp, backend: Backend, place: Place
) -> None:
    app = await start_app(turns={"conversation_wait_s": 60.0})
    conversation = await app.openai.conversations.create()
    body = {**HI, "conversation": conversation.id}
    script, goes_on = held(plain())
    backend.script(script, plain())
    first = asyncio.create_task(asked(app, body))
    await backend.received()
    leaving = asyncio.create_task(asked(app, {**body, "input": "from one who left"}))
    await asyncio.wait({leaving}, timeout=0.2)  # it has to wait; whether it got so far, nobody tells
    leaving.cancel()
    await asyncio.wait({leaving})
    goes_on.set()
    assert (await first, await asked(app, body)) == (200, 200)
    listed = await app.openai.conversations.items.list(conversation.id)
    assert "from one who left" not in listed.to_json()


async def asked(app: App, body: Json) -> int:
    async with app.post(body) as answer:
        await answer.read()
        return int(answer.status)


@pytest.mark.parametrize("item", [{"id": []}, {"id": {"a": 1}}, {"type": {"a": 1}}], ids=str)
async def test_a_wrong_item_is_a_400_and_does_not_lock_its_conversation(
    start_app: StartApp, place: Place, item: Json
) -> None:
    app = await start_app(turns={"conversation_wait_s": 0.1})
    conversation = await app.openai.conversations.create()
    body = {"model": "m", "conversation": conversation.id}
    statuses = [await asked(app, {**body, "input": [{"role": "user", "content": "Hi", **item}]})]
    statuses.append(await asked(app, {**body, "input": "Hi"}))
    assert (statuses, place.asked(LOCKS)) == ([400, 200], [])


ODD_ITEMS: list[Json] = [
    {"type": "shell_call_output", "call_id": "c", "output": ["a", {"type": "input_image", "image_url": "data:,"}]},
    {"type": "web_search_call", "output": ["a", {"type": "input_image", "image_url": "data:,"}]},
    {"type": "computer_call_output", "call_id": "x", "output": [None, {"type": "computer_screenshot"}]},
    {"type": "file_search_call", "content": [5, {"type": "output_text", "logprobs": [1]}]},
]


@pytest.mark.parametrize("item", ODD_ITEMS, ids=lambda item: item["type"])
async def test_what_was_taken_can_be_listed(app: App, item: Json) -> None:
    call = {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}}
    calls = [call] if item["type"] == "shell_call_output" else []
    async with app.post({**HI, "input": [{"role": "user", "content": "x"}, *calls, item]}) as answer:
        taken = await answer.json()
    if answer.status == 200:
        async with app.http.get(f"{app.url}/v1/responses/{taken['id']}/input_items") as answer:
            assert answer.status == 200
    else:
        assert answer.status == 400


@pytest.mark.parametrize(
    "item",
    [
        {"type": "additional_tools", "tools": 5},
        {"type": "additional_tools"},
        {"type": "configuration_update", "reasoning": {"effort": 5}},
        {"type": "tool_search_output", "call_id": None, "tools": 5},
    ],
    ids=str,
)
async def test_an_item_that_no_turn_could_render_does_not_get_into_a_conversation(app: App, item: Json) -> None:
    async with app.post({"items": [item]}, "/v1/conversations") as answer:
        await error_of(answer, 400)


async def test_a_wrong_value_after_a_history_is_named_by_its_place_in_the_input(app: App) -> None:
    async with app.post(HI) as answer:
        previous = (await answer.json())["id"]
    item = {"type": "configuration_update", "reasoning": {"effort": 5}}
    async with app.post({**HI, "previous_response_id": previous, "input": [item]}) as answer:
        error = await error_of(answer, 400)
    assert error["param"] == "input[0].reasoning.effort"


@pytest.mark.parametrize("reference", [{}, {"id": None}, {"id": 5}, {"id": []}], ids=str)
async def test_a_reference_without_an_id_is_a_400_that_names_it(app: App, reference: Json) -> None:
    async with app.post({**HI, "input": [{"type": "item_reference", **reference}]}) as answer:
        error = await error_of(answer, 400)
    assert error["param"] == "input[0].id"


async def test_a_message_about_an_id_is_no_longer_than_it_has_to_be(app: App) -> None:
    for name, prefix in (("previous_response_id", "resp_"), ("conversation", "conv_")):
        async with app.post({**HI, name: prefix + "9" * 1_000_000}) as answer:
            assert len(await answer.read()) < 10_000


async def test_ten_times_as_many_references_do_not_take_a_hundred_times_as_long(app: App) -> None:
    """All readers wait for as long as they are looked up."""
    took_s = []
    for count in (300, 3000):
        async with app.post({**HI, "input": [{"role": "user", "content": "x"}] * count}) as answer:
            digits = (await answer.json())["id"].removeprefix("resp_")
        references = [{"type": "item_reference", "id": f"msg_{digits}{place:04x}"} for place in range(1, count + 1)]
        took_s.append(min([await seconds_of(app, references) for _ in range(3)]))
    assert took_s[1] < 30 * took_s[0]


async def seconds_of(app: App, items: list[Json]) -> float:
    """Of the processor, which do not depend on what else the machine does."""
    began_at = time.process_time()
    async with app.post({**HI, "input": items}) as answer:
        assert answer.status == 200
    return time.process_time() - began_at


# -- store: false ------------------------------------------------------------------------------------------------------

MARKS = {what: f"mark-of-the-{what}-7d1c" for what in ("input", "output", "instructions", "metadata", "user")}
MARKED: Json = {
    "model": "m",
    "input": MARKS["input"],
    "instructions": MARKS["instructions"],
    "metadata": {"a": MARKS["metadata"]},
    "user": MARKS["user"],
}
ANSWERS = {
    "plain": plain(MARKS["output"]),
    "stream": streamed(MARKS["output"]),
    "cut stream": Script([chunk(content=MARKS["output"])], end="cut"),
    "failed stream": Script([chunk(content=MARKS["output"]), chunk("error"), *END[1:]]),
    "refused": refused(500, MARKS["output"]),
    "refused stream": refused(400, MARKS["output"]),
    "garbled": Script([MARKS["output"].encode()]),
}


def marks_in(place: Place) -> dict[str, list[str]]:
    return {what: place.holding(mark) for what, mark in MARKS.items()}


def found_in(*names: str) -> dict[str, list[str]]:
    return {what: list(names) for what in MARKS}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("past", ["nothing", "chain", "conversation"])
async def test_store_false_leaves_nothing_on_disk(backend: Backend, place: Place, kind: str, past: str) -> None:
    backend.script(plain(), ANSWERS[kind])
    async with running_app(settings_of(backend.url, **at(place, {}))) as app:
        conversation = (await app.openai.conversations.create()).id
        first = await app.openai.responses.create(**HI, conversation=conversation)
        continued = {"chain": {"previous_response_id": first.id}, "conversation": {"conversation": conversation}}
        body = {**MARKED, **continued.get(past, {}), "store": False, "stream": "stream" in kind}
        async with app.post(body, headers=KEY) as answer:
            await answer.read()
        running = marks_in(place)
    stopped = marks_in(place)
    assert (running, stopped) == (found_in(), found_in())


async def test_what_is_stored_is_found_by_the_same_search(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, place: Place
) -> None:
    backend.script(plain(MARKS["output"]))
    async with serve() as process:
        await Caller(process, http).made(MARKED)
        running = marks_in(place)
        await process.stop()
    stopped = marks_in(place)
    if isinstance(place, FilePlace):
        assert (running, stopped) == (found_in("responses.db-wal"), found_in("responses.db"))
    else:
        shared = {"instructions": ["settings"], "user": ["settings"]}
        tables = {"input": ["item"], "output": ["item"], "metadata": ["turn"], **shared}
        assert (running, stopped) == (tables, tables)


async def test_what_was_deleted_is_not_in_the_store_when_the_process_has_ended(
    serve: Serve, http: aiohttp.ClientSession, backend: Backend, place: Place
) -> None:
    backend.script(plain(), plain(MARKS["output"]), plain())
    async with serve() as process:
        caller = Caller(process, http)
        _, response, _ = [await caller.made(body) for body in (HI, MARKED, HI)]
        async with http.delete(f"{process.url}/v1/responses/{response['id']}") as answer:
            assert answer.status == 200
        await process.stop()
    assert command("purge", "--store", place.address)[0] == 0
    assert marks_in(place) == found_in()


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def kept(backend: Backend, place: Place) -> Json:
    """A response in the store, beside enough others for many pages; no proxy runs."""
    async with running_app(settings_of(backend.url, **at(place, {}))) as app:
        for number in range(40):
            response = await app.openai.responses.create(model="m", input=f"{number} " * 4000)
    return {"id": response.id}


def command(*arguments: str, **environ: str) -> tuple[int, str, str]:
    done = run(*arguments, **environ)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def good(place: Place) -> tuple[int, str, str]:
    """What the check of a store without damage gives."""
    return 0, f"{shown(place.address)}: ok\n", ""


async def test_check_store_says_that_a_good_store_is_good(kept: Json, place: Place) -> None:
    assert command("check", "--store", place.address) == good(place)


async def test_check_store_works_while_a_proxy_runs(serve: Serve, http: aiohttp.ClientSession, place: Place) -> None:
    async with serve() as process:
        await Caller(process, http).made(HI)
        assert await asyncio.to_thread(command, "check", "--store", place.address) == good(place)


def damage(file: Path, start: float) -> None:
    """Overwrites pages from a part of the file on."""
    content = bytearray(file.read_bytes())
    first = int(len(content) * start) // 16384 * 16384
    content[first : first + 4 * 16384] = b"\x5a" * (4 * 16384)
    file.write_bytes(content)


@pytest.mark.stores("file")
@pytest.mark.parametrize("start", [0.25, 0.5, 0.75])
async def test_check_store_finds_damage(kept: Json, file: Path, start: float) -> None:
    damage(file, start)
    code, found, errors = command("check", "--store", str(file))
    assert (code, "ok" in found, bool(found or errors)) == (1, False, True)


@pytest.mark.stores("file")
async def test_check_store_finds_a_file_that_is_no_database(kept: Json, file: Path) -> None:
    damage(file, 0)
    code, found, errors = command("check", "--store", str(file))
    message = f"responses-proxy: store.path: '{file}' is not a database.\n"
    assert (code, found, errors) == (2, "", message)


def test_check_store_does_not_make_a_file(tmp_path: Path) -> None:
    code, found, _ = command("check", "--store", str(tmp_path / "mistyped.db"))
    assert (code != 0, "ok" in found, list(tmp_path.iterdir())) == (True, False, [])


@pytest.mark.stores("file")
async def test_a_damaged_file_is_refused_or_served_but_never_a_traceback(
    kept: Json, file: Path, serve: Serve, http: aiohttp.ClientSession
) -> None:
    damage(file, 0.5)
    async with serve() as process:
        caller = Caller(process, http)
        async with caller.post({**HI, "previous_response_id": kept["id"]}) as answer:
            body = await answer.json()
        if answer.status != 200:
            assert (answer.status, body["error"]["code"]) == (503, "store_unavailable")
        await process.stop()
    assert "Traceback" not in process.output


async def test_purge_forgets_what_is_old(kept: Json, place: Place, serve: Serve, http: aiohttp.ClientSession) -> None:
    """A file gives its space back; a database keeps it for what comes."""
    place.asked("UPDATE turn SET ages_from = ages_from - 31 * 86400 WHERE id != ?", kept["id"])
    code, said, errors = command("purge", "--store", place.address)
    found = re.fullmatch(rf"{re.escape(shown(place.address))}: (\d+) responses purged, (\d+) bytes given back\n", said)
    assert found
    is_file = isinstance(place, FilePlace)
    assert (code, found[1], int(found[2]) > 0, "purged 39 responses" in errors) == (0, "39", is_file, True)
    async with serve() as process:
        listed = await Caller(process, http).got("/responses")
        assert [each["id"] for each in listed["data"]] == [kept["id"]]


def purged_nothing(place: Place) -> tuple[int, str, str]:
    return 0, f"{shown(place.address)}: 0 responses purged, 0 bytes given back\n", ""


async def test_purge_of_nothing_says_so(kept: Json, place: Place) -> None:
    assert command("purge", "--store", place.address) == purged_nothing(place)


async def test_purge_keeps_all_when_told_to(kept: Json, place: Place) -> None:
    place.asked("UPDATE turn SET ages_from = 0")
    said = command("purge", "--store", place.address, RESPONSES_PROXY_STORE__RETENTION_DAYS="0")
    assert said == purged_nothing(place)


async def test_purge_of_a_locked_store_fails_with_one_line(kept: Json, place: Place) -> None:
    place.asked("UPDATE turn SET ages_from = 0")
    with place.locked():
        code, said, errors = await asyncio.to_thread(
            command, "purge", **environ_of({"store": {**place.settings["store"], **place.hasty}})
        )
    assert (code != 0, said, len(errors.splitlines())) == (True, "", 1)


async def test_purge_works_while_a_proxy_runs(serve: Serve, http: aiohttp.ClientSession, place: Place) -> None:
    async with serve() as process:
        caller = Caller(process, http)
        response = await caller.made(HI)
        place.asked("UPDATE turn SET ages_from = 0")
        assert (await asyncio.to_thread(command, "purge", "--store", place.address))[0] == 0
        await caller.got(f"/responses/{response['id']}", 404)
        assert (await caller.made(HI))["status"] == "completed"


def test_purge_of_another_programs_file_leaves_it_alone(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE other (a)")
    before = file.read_bytes()
    message = f"responses-proxy: store.path: '{file}' is a database of another program.\n"
    assert command("purge", "--store", str(file)) == (2, "", message)
    assert file.read_bytes() == before


@pytest.mark.stores("file")
async def test_key_makes_a_key_that_opens_the_proxy(serve: Serve, http: aiohttp.ClientSession) -> None:
    code, said, errors = command("key")
    found = re.fullmatch(r'for the client:    (\S+)\nfor \[auth\.keys\]:   name = "(\S+)"\n', said)
    assert found
    assert (code, errors) == (0, "")
    auth = {"RESPONSES_PROXY_AUTH__MODE": "keys", "RESPONSES_PROXY_AUTH__KEYS": f"name={found[2]}"}
    async with serve(**auth) as process:
        caller = Caller(process, http)
        statuses = [(await answer_of(caller, HI, {"authorization": f"Bearer {key}"}))[0] for key in (found[1], "x")]
    assert statuses == [200, 401]
