"""Three backends, of which one is dead, one is slow and one fails half of the time, and clients in all forms at once.

Every request has one clear end, no backend has more than its places, and no response is pieced together from two calls.
The seed of what happens is CHAOS_SEED, and CHAOS_REQUESTS how many clients there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest
from conftest import App, listening_socket, no_task_is_left, running_app, settings_of
from event_grammar import check, parse
from scripted import DONE, Backend, Received, Script, Step, chunk, plain, refused

from upstream import UpstreamSettings

Json = dict[str, Any]
SEED = int(os.environ.get("CHAOS_SEED", "1"))
REQUESTS = int(os.environ.get("CHAOS_REQUESTS", "300"))
AT_ONCE = 60
# What one request may take, with all backends that it goes through, before it counts as hanging.
PATIENCE_S = 15.0
ENDED = {"completed", "incomplete", "failed", "cancelled"}
PIECES = 6


# -- backends ----------------------------------------------------------------------------------------------------------


class Chaotic(Backend):
    """Counts how many requests it works on at once, and writes the name of the request in every word of its answer."""

    def __init__(self, name: str, choose: Callable[[Json, str], Script]) -> None:
        super().__init__()
        self.name = name
        self.choose = choose
        self.models = {"data": []}
        self.inside = 0
        self.most_inside = 0

    async def _answer(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if not request.path.endswith("/chat/completions"):
            return await super()._answer(request, reader, writer)
        for _ in range(20):  # turns of the loop, in which the ends of earlier requests are noticed
            await asyncio.sleep(0)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            self.script(self.choose(request.body, f"{self.name}-{len(self.requests)} "))
            return await super()._answer(request, reader, writer)
        finally:
            self.inside -= 1


def later(delay_s: float) -> asyncio.Event:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(delay_s, event.set)
    return event


def well(body: Json, word: str) -> Script:
    if not body.get("stream"):
        return plain(word * PIECES)
    return Script([chunk(role="assistant", content=""), *[chunk(content=word)] * PIECES, chunk("stop"), DONE])


def trickling(script: Script, pause_s: float) -> Iterator[Step]:
    for step in script.steps:
        yield later(pause_s)
        yield step


class Slow:
    """Its first byte comes late, and now and then not in time; then it trickles."""

    def __init__(self, random: random.Random) -> None:
        self._random = random

    def __call__(self, body: Json, word: str) -> Script:
        if self._random.random() < 0.1:
            return Script(before=asyncio.Event())
        script = well(body, word)
        before = later(self._random.uniform(0.0, 0.1))
        return Script(trickling(script, self._random.uniform(0.0, 0.01)), before=before)


class Flaky:
    """Every second request of it fails, each time otherwise."""

    def __init__(self, random: random.Random) -> None:
        self._random = random

    def __call__(self, body: Json, word: str) -> Script:
        if self._random.random() < 0.5:
            return well(body, word)
        said = chunk(role="assistant", content="")
        faults = [
            refused(500, "oh"),
            refused(503, "later", {"Retry-After": "0.01"}),
            refused(429, "slower"),
            Script(end="cut"),
            Script([b"<html>"]),
            Script([said], end="cut"),
            Script([said, b"data: {oops\n\n"]),
            Script([said, chunk(content=word), chunk(content=word)], end="cut"),
            Script([said, chunk(content=word), b"data: {oops\n\n"]),
            Script([said, chunk(content=word)]),
            Script([said, chunk(content=word)], end="silent"),
        ]
        return self._random.choice(faults)


class Dead:
    """Drops every connection, and does not even listen after so many of them."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._listener = listening_socket()
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        asyncio.get_running_loop().add_reader(self._listener, self._drop)
        try:
            yield
        finally:
            self._stop()

    def _drop(self) -> None:
        connection, _ = self._listener.accept()
        connection.close()
        self._left -= 1
        if self._left == 0:
            self._stop()

    def _stop(self) -> None:
        if self._listener.fileno() != -1:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()


PLACES = {"slow": 4, "flaky": 6, "alone": 2, "dead": 3}
# Model -> its backend, and those that may answer in its place.
WAYS = {
    "dead-model": ("dead", ("flaky", "slow")),
    "flaky-model": ("flaky", ("slow", "dead")),
    "slow-model": ("slow", ("flaky",)),
    "alone-model": ("alone", ()),
}
LIMITS: Json = {
    "dialect": "generic",
    "retries": 1,
    "retry_backoff_s": 0.01,
    "connect_timeout_s": 2.0,
    "first_byte_timeout_s": 0.5,
    "idle_timeout_s": 0.4,
    "total_timeout_s": 1.0,
    "queue_wait_s": 0.5,
    "max_waiting": 20,
    "circuit_failures": 3,
    "circuit_open_s": 0.1,
}


@dataclass
class Bench:
    """The proxy, its backends, and what came of the requests."""

    app: App
    backends: dict[str, Chaotic]
    random: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    chance = random.Random(SEED)
    slow, dead = Chaotic("slow", Slow(chance)), Dead(REQUESTS // 10)
    flaky, alone = (Chaotic(name, Flaky(chance)) for name in ("flaky", "alone"))
    async with contextlib.AsyncExitStack() as stack:
        for backend in (slow, flaky, alone):
            await stack.enter_async_context(backend.running())
        stack.enter_context(dead.running())
        urls = {"slow": slow.url, "flaky": flaky.url, "alone": alone.url, "dead": dead.url}
        upstreams = [
            UpstreamSettings(
                name=name,
                base_url=urls[name],
                models=(model,),
                fallback=others,
                max_in_flight=PLACES[name],
                **LIMITS,
            )
            for model, (name, others) in WAYS.items()
        ]
        settings = replace(settings_of(slow.url, background={"workers": 12}), upstream=tuple(upstreams))
        app = await stack.enter_async_context(running_app(settings))
        yield Bench(app, {each.name: each for each in (slow, flaky, alone)}, chance)
    await no_task_is_left()


# -- clients -----------------------------------------------------------------------------------------------------------


def words_of(response: Json) -> set[str]:
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    return set("".join(part["text"] for part in parts).split())


class Client:
    """One request, and what there is to say against its end."""

    def __init__(self, bench: Bench, model: str) -> None:
        self.bench = bench
        self.app = bench.app
        self.body: Json = {"model": model, "input": "Hi"}

    async def plain(self, **more: Any) -> Json | None:
        async with self.app.post({**self.body, **more}) as answer:
            if (response := await self._read(answer)) is None:
                return None
            if not more.get("background"):
                (word,) = words_of(response)
                assert word.startswith(answer.headers["x-responses-proxy-upstream"])
            return self._ended(response)

    async def streamed(self, **more: Any) -> Json | None:
        async with self.app.post({**self.body, "stream": True, **more}) as answer:
            if answer.status != 200:
                return await self._read(answer)
            lines = [line async for line in answer.content]
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        assert lines[-2] == b"data: [DONE]\n"
        if more.get("background"):
            assert [event["type"] for event in events if event["type"].removeprefix("response.") in ENDED] == [
                events[-1]["type"]
            ]
        else:
            parse(events[:-1])  # the last one may tell a backend's own code, which the SDK's types do not have
            check(events)
        return self._ended(events[-1]["response"])

    async def background(self) -> Json | None:
        async with self.app.post({**self.body, "background": True}) as answer:
            response = await self._read(answer)
        while response is not None and response["status"] not in ENDED:
            await asyncio.sleep(0.02)
            async with self.app.http.get(f"{self.app.url}/v1/responses/{response['id']}") as answer:
                response = await self._read(answer)
        return response and self._ended(response)

    async def background_streamed(self) -> Json | None:
        return await self.streamed(background=True)

    async def chained(self) -> Json | None:
        response = await self.plain()
        if response is None:
            return None
        self.bench.ends["continued"] += 1
        return await self.streamed(previous_response_id=response["id"])

    async def passed_on(self) -> Json | None:
        """A chat request that goes through: whole, cut, or an error of the backend's or of ours."""
        body = {"model": self.body["model"], "messages": [{"role": "user", "content": "Hi"}]}
        async with self.app.post(body, "/v1/chat/completions") as answer:
            try:
                raw = await answer.read()
            except aiohttp.ClientPayloadError:
                self.bench.ends["passed on and cut"] += 1
                return None
        assert answer.status in (200, 429, 500, 502, 503, 504), raw
        self.bench.ends[f"passed on {answer.status}"] += 1
        if answer.status == 200 and raw.startswith(b"{"):  # garbage goes through as well
            (word,) = set(json.loads(raw)["choices"][0]["message"]["content"].split())
            assert word.startswith(answer.headers["x-responses-proxy-upstream"])
        return None

    async def leaving(self) -> Json | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.bench.random.uniform(0.0, 0.3)):
                await self.streamed()
        return None

    async def _read(self, answer: Any) -> Json | None:
        """The response; an error has to be in the form of the API, with a status that its client understands."""
        told: Json = await answer.json()
        if answer.status == 200:
            return told
        assert answer.status in (429, 502, 503, 504), told
        assert set(told["error"]) == {"message", "type", "param", "code"}
        self.bench.ends[f"HTTP {answer.status}"] += 1
        return None

    def _ended(self, response: Json) -> Json:
        """What was said comes from one call of one backend, and is whole where the response is."""
        assert response["status"] in ENDED | {"queued"}
        words = words_of(response)
        assert len(words) <= 1, words
        if response["status"] == "completed":
            assert words
        else:
            assert response["error"], response
        self.bench.ends[response["status"]] += 1
        return response


FORMS: tuple[Callable[[Client], Any], ...] = (
    Client.plain,
    Client.streamed,
    Client.background,
    Client.background_streamed,
    Client.chained,
    Client.passed_on,
    Client.leaving,
)


async def one_client(bench: Bench, free: asyncio.Semaphore, number: int) -> None:
    form, model = bench.random.choice(FORMS), bench.random.choice([*WAYS])
    async with free:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await form(Client(bench, model))
        except (AssertionError, TimeoutError, ValueError, KeyError) as error:
            bench.faults.append(f"{number} {form.__name__} {model}: {error!r}")


async def test_every_request_has_one_clear_end_whatever_the_backends_do(bench: Bench) -> None:
    free = asyncio.Semaphore(AT_ONCE)
    await asyncio.gather(*(one_client(bench, free, number) for number in range(REQUESTS)))
    assert bench.faults == []
    assert bench.ends["completed"] > REQUESTS / 10, bench.ends
    assert bench.ends["failed"] + sum(n for end, n in bench.ends.items() if end.startswith("HTTP")), bench.ends
    await every_place_is_free_again(bench)
    assert {name: each.most_inside for name, each in bench.backends.items()} == {n: PLACES[n] for n in bench.backends}


async def every_place_is_free_again(bench: Bench) -> None:
    """As many requests as there are places are carried out at once, when all is well."""
    for backend in bench.backends.values():
        backend.choose = well
    for name, backend in bench.backends.items():
        client = Client(bench, f"{name}-model")
        async with asyncio.timeout(PATIENCE_S):
            while not await is_answered_by(client, name):  # noqa: ASYNC110 - its circuit is open for a moment
                await asyncio.sleep(0.01)
            await all_places_are_taken(client, backend)


async def is_answered_by(client: Client, name: str) -> bool:
    response = await client.plain()
    return response is not None and next(iter(words_of(response))).startswith(name)


async def all_places_are_taken(client: Client, backend: Chaotic) -> None:
    goes_on = asyncio.Event()
    backend.choose = lambda body, word: Script(well(body, word).steps, before=goes_on)
    async with asyncio.TaskGroup() as group:
        for _ in range(PLACES[backend.name]):
            group.create_task(client.plain())
        while backend.inside < PLACES[backend.name]:  # noqa: ASYNC110 - the requests arrive by themselves
            await asyncio.sleep(0.005)
        goes_on.set()
