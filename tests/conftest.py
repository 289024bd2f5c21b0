"""Fixtures that many tests share: backends, the running proxy, and clients of it. All on real sockets of loopback."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import postgres_server
import pytest
import uvicorn
from openai import AsyncOpenAI
from scripted import DEADLINE_S, Backend
from store_places import FilePlace, MemoryPlace, Place, PostgresPlace

from proxy import server_config
from settings import Settings
from upstream import UpstreamSettings

ROOT = Path(__file__).parent.parent


@dataclass
class App:
    """A running proxy: its address, and clients that speak to it."""

    url: str
    openai: AsyncOpenAI
    http: aiohttp.ClientSession

    def post(self, body: Any, path: str = "/v1/responses", **options: Any) -> Any:
        """`async with app.post({...}) as answer`; a `dict` is sent as JSON, bytes as they are."""
        kind = "data" if isinstance(body, bytes) else "json"
        return self.http.post(self.url + path, **{kind: body}, **options)


StartApp = Callable[..., Awaitable[App]]


def settings_of(backend_url: str, **sections: dict[str, Any]) -> Settings:
    """Settings for tests: a backend of the generic dialect, no patience with retries or at the end, and no file."""
    upstream = {"dialect": "generic", "retries": 0, "base_url": backend_url} | sections.pop("upstream", {})
    settings = Settings(upstream=(UpstreamSettings(**upstream),))
    quick = {"server": {"shutdown_grace_s": 5.0}, "store": {"path": ":memory:"}}
    for name, values in {**quick, **sections}.items():
        settings = replace(settings, **{name: replace(getattr(settings, name), **values)})
    return settings


def listening_socket() -> socket.socket:
    """Names its protocol: only then does asyncio send small writes at once, without waiting 40 ms for the peer."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


@contextlib.asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[str]:
    """The address of the real application under a real uvicorn server in this loop."""
    listener = listening_socket()
    config = server_config(settings)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await _shut_down(server, listener)


async def _shut_down(server: uvicorn.Server, listener: socket.socket) -> None:
    """As the server does it, but for its pause of 0.1 s, which a server without connections does not need."""
    deadline = time.monotonic() + 0.05
    while server.server_state.connections and time.monotonic() < deadline:  # noqa: ASYNC110 - the clients are closing
        await asyncio.sleep(0)
    if server.server_state.connections or server.server_state.tasks:
        await server.shutdown([listener])
        return
    for each in server.servers:
        each.close()
    listener.close()
    await server.lifespan.shutdown()


@contextlib.asynccontextmanager
async def running_app(settings: Settings) -> AsyncIterator[App]:
    async with served(settings) as url, aiohttp.ClientSession() as http:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="client-key", max_retries=0)
        async with client:
            yield App(url, client, http)


@pytest.fixture(scope="session", autouse=True)
def postgres_ends() -> Iterator[None]:
    """The server that the tests have started, if any has."""
    yield
    postgres_server.end()


# -- where state is kept -----------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[Path], MemoryPlace | Place]] = {
    "memory": lambda folder: MemoryPlace(),
    "file": lambda folder: FilePlace(folder / "responses.db"),
    "postgres": lambda folder: PostgresPlace(),
}


# For a test, or a module of tests, for which it matters what keeps the state.
both_stores = pytest.mark.stores("memory", "postgres")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test runs over each kind of store that its nearest mark `stores` names: over both kinds, where it has a `place`
    and no mark. What several processes share is a file where the mark says memory.
    """
    mark = metafunc.definition.get_closest_marker("stores")
    kinds = mark.args if mark else ("file", "postgres")
    own = [str(each.args[0]) for each in metafunc.definition.iter_markers("parametrize")]
    if any("place" in re.split(r"\W+", names) for names in own):
        return
    if "place" in metafunc.fixturenames:
        shared = dict.fromkeys("file" if kind == "memory" else kind for kind in kinds)
        metafunc.parametrize("place", list(shared), indirect=True)
    elif mark and "kept_in" in metafunc.fixturenames:
        metafunc.parametrize("kept_in", kinds, indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where a store is that several processes may share: a new file, or an empty database."""
    place = PLACES[request.param](tmp_path)
    assert not isinstance(place, MemoryPlace)
    yield place
    place.close()


@pytest.fixture
def kept_in(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryPlace | Place]:
    """Where the proxies of a test keep their state: in memory, at its `place`, or where the mark `stores` says."""
    if "place" in request.fixturenames:
        yield request.getfixturevalue("place")
        return
    place = PLACES[getattr(request, "param", "memory")](tmp_path)
    yield place
    place.close()


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with Backend().running() as backend:
        yield backend


def at(place: MemoryPlace | Place, sections: dict[str, Any]) -> dict[str, Any]:
    """The settings of a proxy that keeps its state at a place; what they say themselves comes first."""
    named = {name: {**values, **sections.get(name, {})} for name, values in place.settings.items()}
    return {**sections, **named}


@pytest.fixture
async def start_app(backend: Backend, kept_in: MemoryPlace | Place) -> AsyncIterator[StartApp]:
    """Starts the proxy in front of the scripted backend: `await start_app(turns={"strict": True})`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**sections: dict[str, Any]) -> App:
            return await stack.enter_async_context(running_app(settings_of(backend.url, **at(kept_in, sections))))

        yield start
    await no_task_is_left()


@pytest.fixture
async def app(start_app: StartApp) -> App:
    return await start_app()


@pytest.fixture
def client(app: App) -> AsyncOpenAI:
    return app.openai


async def no_task_is_left() -> None:
    """Fails when the proxy forgot a task: each has an owner that ends it."""

    def left() -> list[str]:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        return [repr(task) for task in tasks if "/site-packages/" not in repr(task) and "scripted.py" not in repr(task)]

    deadline = time.monotonic() + DEADLINE_S
    while left() and time.monotonic() < deadline:  # noqa: ASYNC110 - tasks end by themselves
        await asyncio.sleep(0.01)
    assert left() == []


# -- a real backend ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def llamacpp_server(*options: str) -> Iterator[str]:
    """The base URL of a real llama.cpp server with the tiny model."""
    command = [sys.executable, str(ROOT / "demo" / "llamacpp_server.py"), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().removeprefix("listening on ").strip()
            wait_for_200(f"{address}/health")
            yield f"{address}/v1"
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="session")
def llamacpp() -> Iterator[str]:
    """A llama.cpp server with a window of 1024 tokens for each of two requests at once."""
    with llamacpp_server() as url:
        yield url


def wait_for_200(url: str, deadline_s: float = 30) -> None:
    deadline = time.monotonic() + deadline_s
    while not _answers_200(url):
        assert time.monotonic() < deadline, f"{url} did not answer 200 in time"
        time.sleep(0.02)


def _answers_200(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False
