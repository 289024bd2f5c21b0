"""Where the program listens, as real processes: unix sockets, what the log says at the start, and too large heads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import pytest
from conftest import ROOT, App, served, settings_of
from openai import AsyncOpenAI
from scripted import DEADLINE_S, Backend, streamed
from test_cli import HI, environment, run, started

from listening import HEAD_BYTES, HeadLimit, tell_where, unix_listener
from proxy import parse_args, settings_of_args
from settings import ServerSettings, SettingsError


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "p.sock")


async def until_said(process: asyncio.subprocess.Process, words: str) -> str:
    """What a process wrote up to the line that holds these words."""
    assert process.stderr is not None
    said = ""
    async with asyncio.timeout(30):
        while words not in said.rpartition("\n")[0]:
            line = (await process.stderr.readline()).decode()
            assert line, f"it ended early: {said}"
            said += line
    return said


@contextlib.asynccontextmanager
async def on_socket(backend: Backend, path: str, *more: str, **extra: str) -> AsyncIterator[tuple[Any, str]]:
    """A proxy that listens on a unix socket, and what it said until then."""
    command = ("proxy.py", "--upstream", backend.url, "--unix-socket", path, *more)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *command), cwd=ROOT, env=environment(**extra), stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process, await until_said(process, "listening on the unix socket")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def mode_of(path: str) -> int | None:
    """The mode of a socket; None where there is none."""
    found = Path(path)
    return stat.S_IMODE(found.stat().st_mode) if found.is_socket() else None


async def answer_on(path: str) -> dict[str, Any]:
    connector = aiohttp.UnixConnector(path)
    url = "http://localhost/v1/responses"
    async with aiohttp.ClientSession(connector=connector) as session, session.post(url, json=HI) as answer:
        body: dict[str, Any] = await answer.json()
    return body


# -- unix sockets ------------------------------------------------------------------------------------------------------


async def test_a_unix_socket_serves_and_is_removed_at_the_end(backend: Backend, path: str) -> None:
    async with on_socket(backend, path) as (process, said):
        assert (await answer_on(path))["status"] == "completed"
        assert mode_of(path) == 0o660
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            await process.communicate()
    assert (process.returncode, mode_of(path)) == (0, None)
    assert f"listening on the unix socket {path} (mode 0660); server.host and server.port are not used" in said
    assert "http://127.0.0.1:8080" not in said


async def test_the_official_sdk_speaks_over_a_unix_socket(backend: Backend, path: str) -> None:
    backend.script(streamed("Hello", " there."))
    async with on_socket(backend, path):
        http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=path))
        client = AsyncOpenAI(base_url="http://localhost/v1", api_key="unused", http_client=http)
        async with client, client.responses.stream(model="m", input="Hi") as stream:
            types = [event.type async for event in stream]
            text = (await stream.get_final_response()).output_text
    assert (types[0], types[-1], text) == ("response.created", "response.completed", "Hello there.")


async def test_the_mode_of_the_file_can_be_set(backend: Backend, path: str) -> None:
    async with on_socket(backend, path, RESPONSES_PROXY_SERVER__UNIX_SOCKET_MODE="0600"):
        assert mode_of(path) == 0o600


async def test_what_a_killed_process_left_does_not_hinder_the_next_one(backend: Backend, path: str) -> None:
    async with on_socket(backend, path) as (process, _):
        process.kill()
        await process.communicate()
    assert mode_of(path) is not None
    async with on_socket(backend, path):
        assert (await answer_on(path))["status"] == "completed"


async def test_a_socket_that_another_process_serves_is_left_alone(backend: Backend, path: str) -> None:
    async with on_socket(backend, path):
        done = await asyncio.to_thread(run, "--upstream", backend.url, "--unix-socket", path)
        expected = f"responses-proxy: server.unix_socket: {path}: another process listens there\n"
        assert (done.returncode, done.stderr) == (2, expected)
        assert (await answer_on(path))["status"] == "completed"


def test_a_file_that_is_no_socket_is_left_alone(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(SettingsError, match="is there already, and is not a socket"), unix_listener(path, 0o660):
        pass
    assert Path(path).read_text() == "mine"


@pytest.mark.parametrize(("name", "said"), [("no/p.sock", "No such file or directory"), ("x" * 200, "too long")])
def test_a_path_that_cannot_be_used_is_told(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said), unix_listener(str(tmp_path / name), 0o660):
        pass


def test_the_socket_of_who_came_after_is_not_removed(path: str) -> None:
    with unix_listener(path, 0o660):
        Path(path).unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(path)
    assert Path(path).is_socket()
    other.close()


def test_the_flag_sets_the_socket() -> None:
    settings = settings_of_args(parse_args(["--upstream", "http://x/v1", "--unix-socket", "/run/p.sock"]), {})
    assert settings.server.unix_socket == "/run/p.sock"


@pytest.mark.parametrize("mode", ["", "660 ", "0o660", "888", "rw"])
def test_a_mode_that_is_none_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="unix_socket_mode: expected"):
        ServerSettings(unix_socket_mode=mode)


# -- what is said ------------------------------------------------------------------------------------------------------


async def test_the_log_says_at_the_start_what_it_works_with(backend: Backend, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    login = backend.url.replace("http://", "http://me:s3cret@")
    config.write_text(
        f"[server]\nport = 0\ncors_origins = ['https://chat.example']\n[limits]\nrequests_per_minute = 60\n"
        f"[store]\npath = '{tmp_path}/r.db'\n[[upstream]]\nname = 'one'\nbase_url = '{login}'\nmodels = ['a*', 'b']\n"
    )
    environ = {"RESPONSES_PROXY_STORE__PATH": f"{tmp_path}/r.db"}
    async with started("proxy.py", "--config", str(config), **environ) as process:
        await process.stop()
    said = [line.partition("]: ")[2] for line in process.output.splitlines() if " INFO responses_proxy." in line]
    assert said[:5] == [
        f"upstream 'one': {backend.url}, for a*, b",
        f"store: {tmp_path}/r.db, kept for 30 days",
        "auth: none, everybody is one owner",
        "limits per owner: requests_per_minute = 60",
        "web pages: https://chat.example",
    ]
    assert f"listening on {process.url}" in said
    assert ("s3cret" in process.output, "WARNING" in process.output) == (False, False)


@pytest.mark.parametrize(
    ("host", "auth_mode", "is_warned"),
    [
        ("127.0.0.1", "none", False),
        ("::1", "none", False),
        ("0.0.0.0", "none", True),
        ("::", "none", True),
        ("192.168.1.5", "none", True),
        ("fe80::1%eth0", "none", True),
        ("0.0.0.0", "keys", False),
    ],
)
def test_an_open_door_is_warned_of(
    caplog: pytest.LogCaptureFixture, host: str, auth_mode: str, is_warned: bool
) -> None:
    caplog.set_level(logging.INFO)
    tell_where(ServerSettings(), auth_mode, [(host, 8080)])
    first, *warnings = [(each.levelname, each.getMessage()) for each in caplog.records]
    assert first == ("INFO", f"listening on http://{f'[{host}]' if ':' in host else host}:8080")
    said = f"auth.mode is 'none': whoever reaches {host} sees and changes everything"
    assert warnings == ([("WARNING", said)] if is_warned else [])


# -- heads -------------------------------------------------------------------------------------------------------------


class Wire:
    """A connection to the proxy, byte by byte."""

    def __init__(self, app: App) -> None:
        self._port = int(app.url.rpartition(":")[2])

    async def __aenter__(self) -> Wire:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def say(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def status(self) -> bytes:
        """Of the next answer, read whole."""
        async with asyncio.timeout(DEADLINE_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await self._reader.readexactly(int(length or 0))
        return head.split()[1]

    async def is_closed(self) -> bool:
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                await self._reader.read()
        return True


GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
LARGE = b"x" * HEAD_BYTES


@pytest.mark.parametrize(
    "head",
    [
        GET + b"large: " + LARGE,
        GET + b"large: " + LARGE + b"\r\n\r\n",
        GET + b"a: b\r\n" * (HEAD_BYTES // 4) + b"\r\n",
        b"GET /healthz?" + LARGE,
        b"GET /healthz?" + LARGE + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["endless header", "large header", "many headers", "endless url", "large url"],
)
async def test_a_head_that_is_too_large_is_a_431(app: App, head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with Wire(app) as wire:
        await wire.say(head)
        assert await wire.status() == b"431"
        assert await wire.is_closed()
    assert f"the head of a request has more than {HEAD_BYTES} bytes" in caplog.text


async def test_a_head_that_comes_in_pieces_is_counted_whole(app: App) -> None:
    async with Wire(app) as wire:
        with contextlib.suppress(ConnectionError):
            await wire.say(GET)
            for _ in range(200):
                await wire.say(b"x: " + b"y" * 1000 + b"\r\n")
        assert await wire.is_closed()


async def test_a_large_body_is_no_large_head_and_each_head_is_counted_by_itself(app: App) -> None:
    body = b"x" * 4 * HEAD_BYTES
    post = b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with aiohttp.ClientSession() as session:
        for _ in range(20):
            headers = {"padding": "x" * (HEAD_BYTES // 8)}
            async with session.get(f"{app.url}/healthz", headers=headers) as answer:
                assert answer.status == 200
            async with session.post(f"{app.url}/v1/responses", data=body, headers=headers) as answer:
                assert answer.status == 400
    async with Wire(app) as wire:
        await wire.say(post + body)
        assert await wire.status() == b"400"
    async with Wire(app) as wire, Wire(app) as other:
        await wire.say(b"POST /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert await wire.status() == b"405"
        await wire.say(GET)
        await other.say(GET + b"\r\n")
        assert await other.status() == b"200"  # so the half of a head before it was read
        await wire.say(b"\r\n")
        assert await wire.status() == b"200"


# -- upgrades that nobody carries out ----------------------------------------------------------------------------------

ASKED = json.dumps({"model": "m", "input": "Hi"}).encode()
H2C = (
    b"POST /v1/responses HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAEA\r\ncontent-type: application/json\r\n"
)
SIZED = H2C + b"content-length: %d\r\n\r\n" % len(ASKED)
CHUNKED = H2C + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(ASKED), ASKED)


@pytest.mark.parametrize(
    "pieces",
    [
        [SIZED + ASKED],
        [SIZED, ASKED],
        [SIZED, ASKED[:5], ASKED[5:]],
        [H2C[:40], SIZED[40:] + ASKED[:3], ASKED[3:]],
        [CHUNKED],
    ],
    ids=["at once", "head and body", "a body in pieces", "a head in pieces", "chunked"],
)
async def test_an_upgrade_to_http_2_is_left_alone_and_its_body_is_read(app: App, pieces: list[bytes]) -> None:
    """As Java's own client asks on every first request."""
    async with Wire(app) as wire:
        for piece in pieces:
            await wire.say(piece)
        assert await wire.status() == b"200"
        await wire.say(GET + b"\r\n")
        assert await wire.status() == b"200"


async def test_the_body_of_an_upgrade_is_no_request(app: App) -> None:
    hidden = GET + b"\r\n"
    async with Wire(app) as wire:
        await wire.say(H2C + b"content-length: %d\r\n\r\n" % len(hidden))
        await wire.say(hidden)
        assert await wire.status() == b"400"
        await wire.say(b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await wire.status() == b"404"


async def test_the_head_behind_a_large_body_is_counted_by_itself(app: App) -> None:
    body = b"x" * (HEAD_BYTES + 2000)
    async with Wire(app) as wire:
        await wire.say(b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
        await wire.say(body + GET)
        assert await wire.status() == b"400"
        await wire.say(b"\r\n")
        assert await wire.status() == b"200"


# -- at the end --------------------------------------------------------------------------------------------------------


async def test_a_request_that_is_on_its_way_when_the_program_stops_is_answered(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("listening.LINGER_S", 0.5)
    shutdown, is_stopping = HeadLimit.shutdown, asyncio.Event()

    def told(connection: HeadLimit) -> None:
        shutdown(connection)
        is_stopping.set()

    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(settings_of(backend.url)))
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        async with aiohttp.request("GET", f"{url}/healthz") as answer:  # connections are accepted in their order
            assert answer.status == 200
        monkeypatch.setattr(HeadLimit, "shutdown", told)
        stopping = asyncio.create_task(stack.aclose())
        async with asyncio.timeout(DEADLINE_S):
            await is_stopping.wait()
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
            await stopping
        writer.close()
