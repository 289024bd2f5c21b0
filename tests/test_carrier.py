"""Requests that go through to a backend, on real sockets: every byte, both ways, and what either side's end does."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import openai
import pytest
from conftest import App, llamacpp_server, no_task_is_left, running_app, settings_of
from openai import AsyncOpenAI
from raw_backend import RawBackend, Seen, framed, head, whole
from scripted import DEADLINE_S, DONE, chunk
from socket_client import handshake_refused
from test_proxy import error_of
from yarl import URL

import relaying
from upstream import UpstreamSettings

MIB = 1024 * 1024
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**CHAT, "stream": True}
EVENTS = {"content_type": "text/event-stream", "transfer_encoding": "chunked"}
StartRaw = Callable[..., Awaitable[App]]


@pytest.fixture
async def raw() -> AsyncIterator[RawBackend]:
    async with RawBackend().running() as backend:
        yield backend


@pytest.fixture
async def other() -> AsyncIterator[RawBackend]:
    async with RawBackend().running() as backend:
        yield backend


@pytest.fixture
async def start(raw: RawBackend, other: RawBackend) -> AsyncIterator[StartRaw]:
    """Starts the proxy in front of the raw backend; `second` is a table for the other one."""
    async with contextlib.AsyncExitStack() as stack:

        async def started(second: dict[str, Any] | None = None, **sections: Any) -> App:
            settings = settings_of(raw.url, **sections)
            if second is not None:
                table = UpstreamSettings(name="other", base_url=other.url, dialect="generic", **second)
                settings = replace(settings, upstream=(*settings.upstream, table))
            return await stack.enter_async_context(running_app(settings))

        yield started
    await no_task_is_left()


@pytest.fixture
async def app(start: StartRaw) -> App:
    return await start()


def told(seen: Seen) -> dict[str, str]:
    """The headers of a request, but for those that the connection needs."""
    return {name.lower(): value for name, value in seen.headers if name.lower() not in ("host", "content-length")}


async def speak(app: App, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which this has been said: for what no client library says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(app.url.rpartition(":")[2]))
    writer.write(text)
    return reader, writer


async def status_of(app: App, request: bytes) -> int:
    reader, writer = await speak(app, request)
    async with asyncio.timeout(DEADLINE_S):
        line = await reader.readline()
    writer.transport.abort()
    return int(line.split()[1])


# -- answers -----------------------------------------------------------------------------------------------------------


CHUNKS = [chunk(role="assistant"), b": comment of a backend\n\n", chunk(content="Hé"), b'data: {"a":1}\r\n\r\n', DONE]
ZIPPABLE = {"accept-encoding": "gzip, br;q=0.1"}
ZIPPED = gzip.compress(b"".join(CHUNKS))


@pytest.mark.parametrize(
    ("pieces", "encoding"),
    [(CHUNKS, "identity"), ([ZIPPED[:9], ZIPPED[9:30], ZIPPED[30:]], "gzip"), ([b"not zipped at all"], "gzip")],
)
async def test_each_write_of_a_backend_arrives_as_it_was(
    raw: RawBackend, start: StartRaw, pieces: list[bytes], encoding: str
) -> None:
    """The next piece is written when the last one has arrived; comments of ours would stand between them."""
    app = await start(server={"keepalive_s": 0.001})
    arrived = asyncio.Queue[None]()

    async def answer(seen: Seen) -> None:
        await seen.read()
        await seen.write(head(**EVENTS, content_encoding=encoding))
        for piece in pieces:
            await arrived.get()
            await seen.write(framed(piece))
        await arrived.get()
        await seen.write(b"0\r\n\r\n")

    raw.answer = answer
    url = f"{app.url}/v1/chat/completions"
    async with app.http.post(url, json=STREAM, headers=ZIPPABLE, auto_decompress=False) as answered:
        assert (answered.status, answered.headers["content-type"]) == (200, "text/event-stream")
        assert answered.headers["content-encoding"] == encoding
        for piece in pieces:
            await asyncio.sleep(0.005)  # longer than the pause after which a comment would come
            arrived.put_nowait(None)
            async with asyncio.timeout(DEADLINE_S):
                assert await answered.content.readany() == piece
        arrived.put_nowait(None)
        assert await answered.content.read() == b""
    assert raw.seen[-1].header("accept-encoding") == ZIPPABLE["accept-encoding"]
    assert raw.seen[-1].body == STREAM


async def test_the_bytes_of_a_request_arrive_as_they_were(raw: RawBackend, app: App) -> None:
    body = b' {"model" : "m",\n"x": 1.0e0, "x":2}\xff'
    async with app.http.post(URL(f"{app.url}/v1/chat/completions?a=%2F&a=b", encoded=True), data=body) as answer:
        assert await answer.read() == b"{}"
    seen = raw.seen[-1]
    assert (seen.method, seen.target, seen.raw) == ("POST", "/v1/chat/completions?a=%2F&a=b", body)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT", "PATCH", "OPTIONS", "POST", "PROPFIND"])
async def test_every_method_goes_through_with_its_query(raw: RawBackend, app: App, method: str) -> None:
    raw.answer = whole(b"some body", x_own="1")
    async with app.http.request(method, f"{app.url}/v1/files/f%2F1?limit=2") as answer:
        body = await answer.read()
    assert (raw.seen[-1].method, raw.seen[-1].target) == (method, "/v1/files/f%2F1?limit=2")
    assert body == (b"" if method == "HEAD" else b"some body")
    assert (answer.headers["content-length"], answer.headers["x-own"]) == ("9", "1")


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_a_body_goes_with_any_method(raw: RawBackend, app: App, method: str) -> None:
    async with app.http.request(method, f"{app.url}/v1/x", data=b"body") as answer:
        assert answer.status == 200
    assert raw.seen[-1].raw == b"body"


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/embeddings", "/rerank"])
@pytest.mark.parametrize("prefix", ["/v1", ""])
async def test_named_paths_go_through_with_and_without_the_prefix(
    raw: RawBackend, app: App, prefix: str, path: str
) -> None:
    async with app.post(CHAT, prefix + path) as answer:
        assert answer.status == 200
    assert raw.seen[-1].target == f"/v1{path}"


async def test_headers_arrive_as_they_were_and_none_is_added(raw: RawBackend, app: App) -> None:
    text = (
        b"POST /v1/audio/speech HTTP/1.1\r\nhost: proxy\r\nx-a: 1\r\nX-A: 2\r\naccept-encoding: br\r\ncookie: a=b\r\n"
        b"connection: close, x-hop\r\nx-hop: 1\r\nte: trailers\r\nauthorization: Bearer mine\r\ncontent-length: 2\r\n"
        b"x-bytes: \xc3\xa9\r\n\r\n{}"
    )
    reader, writer = await speak(app, text)
    async with asyncio.timeout(DEADLINE_S):
        await reader.read()
    writer.close()
    assert raw.seen[-1].headers == [
        ("Host", raw.url.removeprefix("http://").removesuffix("/v1")),
        ("x-a", "1"),
        ("x-a", "2"),
        ("accept-encoding", "br"),
        ("x-bytes", "é".encode().decode("latin-1")),
        ("Content-Length", "2"),
    ]


async def test_the_headers_of_an_answer_arrive_as_they_were(raw: RawBackend, app: App) -> None:
    raw.answer = whole(
        b"x", x_request_id="theirs", set_cookie="a=b", connection="x-hop", x_hop="1", x_a="é", date="theirs"
    )
    async with app.http.get(f"{app.url}/v1/x", headers={"x-request-id": "mine"}) as answer:
        assert answer.headers["x-upstream-request-id"] == "theirs"
        assert answer.headers.getall("x-request-id") == ["mine"]
        assert "theirs" not in answer.headers.getall("date", [])
        assert {"set-cookie", "x-hop"}.isdisjoint({name.lower() for name in answer.headers})
        assert (b"x-a", "é".encode("latin-1")) in answer.raw_headers


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        ("201 Created", {}),
        ("301 Moved Permanently", {"location": "http://elsewhere.example/x"}),
        ("307 Temporary Redirect", {"location": "/v1/other"}),
        ("401 Unauthorized", {"www_authenticate": "Bearer"}),
        ("404 Not Found", {}),
        ("429 Too Many Requests", {"retry_after": "7"}),
        ("500 Internal Server Error", {}),
        ("503 Service Unavailable", {}),
    ],
)
async def test_any_status_arrives_with_its_body_and_is_not_tried_again(
    raw: RawBackend, start: StartRaw, status: str, headers: dict[str, str]
) -> None:
    app = await start(upstream={"retries": 2})
    raw.answer = whole(b'{"error":"its own words"}', status, **headers)
    async with app.post(CHAT, "/v1/chat/completions", allow_redirects=False) as answer:
        assert await answer.read() == b'{"error":"its own words"}'
    assert answer.status == int(status[:3])
    assert {name.replace("_", "-"): answer.headers[name.replace("_", "-")] for name in headers} == {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    assert len([seen for seen in raw.seen if seen.method == "POST"]) == 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_an_answer_that_has_no_body_ends(raw: RawBackend, app: App, status: str) -> None:
    async def answer(seen: Seen) -> None:
        await seen.write(head(status, **({"content_length": 9} if status.startswith("304") else {})))

    raw.answer = answer
    for _ in range(2):  # the connection can be used again
        async with app.http.get(f"{app.url}/v1/x") as answered:
            assert (answered.status, await answered.read()) == (int(status[:3]), b"")


# -- large bodies ------------------------------------------------------------------------------------------------------


PIECE = bytes(range(256)) * 256
TWENTY_MB = 320  # pieces


async def endless(pieces: int, counted: list[int]) -> AsyncIterator[bytes]:
    for _ in range(pieces):
        counted[0] += len(PIECE)
        yield PIECE


def sha256_of(pieces: int) -> str:
    return hashlib.sha256(PIECE * pieces).hexdigest()


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_20_mb_go_out_and_back_and_are_never_held(raw: RawBackend, app: App, is_chunked: bool) -> None:
    async def echo(seen: Seen) -> None:
        digest = hashlib.sha256()
        async for piece in seen.pieces():
            digest.update(piece)
        await seen.write(head(content_length=TWENTY_MB * len(PIECE), x_digest=digest.hexdigest()))
        for _ in range(TWENTY_MB):
            await seen.write(PIECE)

    raw.answer = echo
    digest, expected = hashlib.sha256(), sha256_of(TWENTY_MB)
    headers = {} if is_chunked else {"content-length": str(TWENTY_MB * len(PIECE))}
    async with app.http.get(f"{app.url}/healthz"):
        pass
    tracemalloc.start()
    try:
        url, body = f"{app.url}/v1/embeddings", endless(TWENTY_MB, [0])
        async with app.http.post(url, data=body, headers=headers, skip_auto_headers=["Content-Type"]) as answer:
            assert answer.headers["x-digest"] == expected
            async for data in answer.content.iter_any():
                digest.update(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert digest.hexdigest() == expected
    assert peak_bytes < 8 * MIB
    assert raw.seen[-1].header("content-length") == headers.get("content-length")
    assert raw.seen[-1].header("content-type") is None


async def test_a_backend_that_does_not_read_stalls_its_client(raw: RawBackend, app: App) -> None:
    read = asyncio.Event()
    sent = [0]

    async def slow(seen: Seen) -> None:
        await read.wait()
        await whole()(seen)

    raw.answer = slow
    async with asyncio.TaskGroup() as group:
        posting = group.create_task(post_pieces(app, 960, sent))
        await raw.next()
        done, _ = await asyncio.wait({posting}, timeout=1)
        assert not done
        assert sent[0] < 40 * MIB
        read.set()
    assert posting.result() == 200
    assert hashlib.sha256(raw.seen[-1].raw).hexdigest() == sha256_of(960)


async def post_pieces(app: App, pieces: int, sent: list[int]) -> int:
    async with app.http.post(f"{app.url}/v1/embeddings", data=endless(pieces, sent)) as answer:
        return answer.status


async def test_a_client_that_does_not_read_stalls_its_backend(raw: RawBackend, app: App) -> None:
    written = [0]
    stalled = asyncio.Event()

    async def flood(seen: Seen) -> None:
        await seen.write(head(transfer_encoding="chunked"))
        while written[0] < 60 * MIB:
            await seen.write(framed(PIECE))
            written[0] += len(PIECE)
        stalled.set()

    raw.answer = flood
    reader, writer = await speak(app, b"GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readline()
    writer.transport.pause_reading()
    await raw.next()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stalled.wait(), 1)
    assert written[0] < 40 * MIB
    writer.transport.abort()


async def test_an_answer_that_comes_before_the_body_is_in_ends_the_upload(raw: RawBackend, app: App) -> None:
    async def refuse(seen: Seen) -> None:
        await seen.write(head("413 Payload Too Large", content_length=2) + b"no")
        assert await seen.is_let_go()
        seen.gone.set()

    raw.answer = refuse
    reader, writer = await speak(app, b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    async with asyncio.timeout(DEADLINE_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        assert (await reader.readuntil(b"no")).endswith(b"no")
        await raw.seen[-1].gone.wait()
    writer.close()


async def test_a_client_that_waits_for_100_is_told_to_go_on(raw: RawBackend, app: App) -> None:
    text = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
    reader, writer = await speak(app, text)
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"12345")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    assert (raw.seen[-1].raw, raw.seen[-1].header("expect")) == (b"12345", None)
    writer.close()


# -- limits ------------------------------------------------------------------------------------------------------------


async def test_a_declared_body_over_the_limit_is_refused_before_it_is_sent(raw: RawBackend, start: StartRaw) -> None:
    app = await start(limits={"body_bytes": 1000})
    assert await status_of(app, b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n") == 413
    assert raw.seen == []


async def test_a_body_that_grows_over_the_limit_is_stopped_on_its_way(raw: RawBackend, start: StartRaw) -> None:
    app = await start(limits={"body_bytes": 3 * len(PIECE)})
    async with app.http.post(f"{app.url}/v1/embeddings", data=endless(9, [0])) as answer:
        assert (await error_of(answer, 413))["code"] == "request_too_large"
    assert all(not seen.raw for seen in raw.seen)


# -- ends --------------------------------------------------------------------------------------------------------------


def watching(begin: bytes) -> Callable[[Seen], Awaitable[None]]:
    """Begins an answer, and waits until nobody listens."""

    async def answer(seen: Seen) -> None:
        await seen.read()
        await seen.write(begin)
        await seen.is_let_go()
        seen.gone.set()

    return answer


@pytest.mark.parametrize("begin", [b"", head(**EVENTS), head(**EVENTS) + framed(CHUNKS[0])])
async def test_a_client_that_leaves_ends_the_request_of_the_backend(raw: RawBackend, app: App, begin: bytes) -> None:
    raw.answer = watching(begin)
    body = json.dumps(STREAM).encode()
    text = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    reader, writer = await speak(app, text + body)
    seen = await arrived(raw)
    if begin:
        async with asyncio.timeout(DEADLINE_S):
            await reader.readuntil(CHUNKS[0] if CHUNKS[0] in begin else b"\r\n\r\n")
    writer.close()
    async with asyncio.timeout(DEADLINE_S):
        await seen.gone.wait()


async def arrived(raw: RawBackend) -> Seen:
    """The next request that a client made."""
    while (seen := await raw.next()).target == "/v1/models":
        pass
    return seen


async def test_a_client_that_leaves_in_its_upload_ends_the_request_of_the_backend(raw: RawBackend, app: App) -> None:
    async def answer(seen: Seen) -> None:
        assert await seen.is_let_go()
        seen.gone.set()

    raw.answer = answer
    _, writer = await speak(app, b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    seen = await arrived(raw)
    writer.close()
    async with asyncio.timeout(DEADLINE_S):
        await seen.gone.wait()


@pytest.mark.parametrize(
    "begin",
    [
        head(**EVENTS) + framed(CHUNKS[0]),
        head(**EVENTS) + b"ff\r\nhalf",
        head(content_length=99) + b"half",
        head(**EVENTS),
    ],
)
async def test_an_answer_that_breaks_off_is_cut_and_not_ended(
    raw: RawBackend, app: App, caplog: pytest.LogCaptureFixture, begin: bytes
) -> None:
    async def answer(seen: Seen) -> None:
        await seen.read()
        await seen.write(begin)
        seen.writer.close()

    raw.answer = answer
    async with app.post(STREAM, "/v1/chat/completions") as answered:
        assert answered.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answered.read()
    assert "an answer was cut: Upstream 'default' closed the connection" in caplog.text
    assert "fault of this program" not in caplog.text


async def test_a_silent_answer_is_cut(raw: RawBackend, start: StartRaw, caplog: pytest.LogCaptureFixture) -> None:
    app = await start(upstream={"name": "slow", "idle_timeout_s": 0.05})
    raw.answer = watching(head(**EVENTS) + framed(CHUNKS[0]))
    async with app.post(STREAM, "/v1/chat/completions") as answered:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answered.read()
    assert "Upstream 'slow' sent nothing for 0.05 s in the middle of its answer." in caplog.text


async def test_an_answer_that_runs_too_long_is_cut(
    raw: RawBackend, start: StartRaw, caplog: pytest.LogCaptureFixture
) -> None:
    app = await start(upstream={"total_timeout_s": 0.1})

    async def answer(seen: Seen) -> None:
        await seen.write(head(**EVENTS))
        while True:
            await seen.write(framed(b"x"))
            await asyncio.sleep(0.005)

    raw.answer = answer
    async with app.http.get(f"{app.url}/v1/x") as answered:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answered.read()
    assert "ran for 0.1 s" in caplog.text


async def test_a_slow_client_is_not_taken_for_a_silent_backend(raw: RawBackend, start: StartRaw) -> None:
    app = await start(upstream={"first_byte_timeout_s": 0.2})
    reader, writer = await speak(app, b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{")
    await arrived(raw)
    await asyncio.sleep(0.4)  # longer than the backend may take
    writer.write(b"}")
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.close()


async def test_a_backend_that_does_not_answer_is_a_504(raw: RawBackend, start: StartRaw) -> None:
    app = await start(upstream={"first_byte_timeout_s": 0.05})
    raw.answer = watching(b"")
    for data in (b"{}", endless(1, [0])):
        async with app.http.post(f"{app.url}/v1/embeddings", data=data) as answer:
            assert (await error_of(answer, 504))["code"] == "upstream_timeout"


async def test_a_backend_that_cannot_be_reached_is_a_502(start: StartRaw) -> None:
    app = await start(upstream={"base_url": "http://127.0.0.1:9/v1"})
    async with app.post(CHAT, "/v1/chat/completions") as answer:
        assert "cannot be reached" in (await error_of(answer, 502))["message"]


@pytest.mark.parametrize(
    "line", [b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"HTTP/1.1 700 Odd\r\n\r\n", b"hello\r\n"]
)
async def test_what_is_no_answer_is_a_502(raw: RawBackend, app: App, line: bytes) -> None:
    async def answer(seen: Seen) -> None:
        await seen.read()
        await seen.write(line)
        seen.writer.close()

    raw.answer = answer
    async with app.post(CHAT, "/v1/chat/completions") as answered:
        await error_of(answered, 502)


def once_a_connection() -> Callable[[Seen], Awaitable[None]]:
    """Answers the first request of a connection, and closes it at the second one."""
    used = set[asyncio.StreamWriter]()

    async def answer(seen: Seen) -> None:
        if seen.writer in used:
            seen.writer.close()
            return
        used.add(seen.writer)
        await whole()(seen)

    return answer


async def test_a_connection_that_was_closed_in_the_pool_is_not_noticed(raw: RawBackend, app: App) -> None:
    raw.answer = once_a_connection()
    for _ in range(3):
        async with app.post(CHAT, "/v1/chat/completions") as answered:
            assert answered.status == 200
    assert len(raw.seen) == 5


async def test_a_body_that_was_on_its_way_is_not_sent_again(raw: RawBackend, app: App) -> None:
    raw.answer = once_a_connection()
    statuses = [await post_pieces(app, 40, [0]) for _ in range(3)]
    assert statuses == [200, 502, 200]
    assert len(raw.seen) == 3


async def test_what_breaks_after_a_while_is_not_asked_again(
    raw: RawBackend, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "CLOSED_WITHIN_S", 0.0)
    raw.answer = once_a_connection()
    for status in (200, 502, 200):
        async with app.post(CHAT, "/v1/chat/completions") as answered:
            assert answered.status == status
    assert len(raw.seen) == 3


# -- who asks ----------------------------------------------------------------------------------------------------------


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


KEYS = {"mode": "keys", "keys": {"alice": hashed("client-key")}}
OURS = {"api_key": "ours", "headers": {"X-Api-Key": "ours too", "content-type": "text/odd"}}
MINE = {"authorization": "Bearer client-key", "x-api-key": "mine"}


@pytest.mark.parametrize("auth", [{}, KEYS])
async def test_a_backend_gets_the_key_of_the_settings(raw: RawBackend, start: StartRaw, auth: Any) -> None:
    app = await start(auth=auth, upstream=OURS)
    async with app.post(CHAT, "/v1/chat/completions", headers=MINE) as answer:
        assert answer.status == 200
    sent = told(raw.seen[-1])
    assert (sent["authorization"], sent["x-api-key"]) == ("Bearer ours", "ours too")
    assert sent["content-type"] == "application/json"


async def test_a_backend_without_a_key_gets_none(raw: RawBackend, app: App) -> None:
    async with app.post(CHAT, "/v1/chat/completions", headers=MINE) as answer:
        assert answer.status == 200
    assert {"authorization", "x-api-key"}.isdisjoint(told(raw.seen[-1]))


async def test_the_clients_own_key_is_passed_on(raw: RawBackend, start: StartRaw) -> None:
    app = await start(auth={"mode": "passthrough"}, upstream={"api_key": "ours"})
    async with app.post(CHAT, "/v1/chat/completions", headers=MINE) as answer:
        assert answer.status == 200
    sent = told(raw.seen[-1])
    assert (sent["authorization"], sent["x-api-key"]) == ("Bearer client-key", "mine")


@pytest.mark.parametrize("auth", [KEYS, {"mode": "passthrough"}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/anything", "/v1/models", "/v1/models/m"])
async def test_a_client_without_a_key_reaches_no_backend(
    raw: RawBackend, start: StartRaw, auth: Any, path: str
) -> None:
    app = await start(auth=auth)
    async with app.http.get(app.url + path) as answer:
        assert (await error_of(answer, 401))["code"] == "invalid_api_key"
    assert raw.seen == []


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/responses/x/y", 404),
        ("PATCH", "/v1/responses", 405),
        ("PUT", "/v1/conversations/x", 405),
        ("GET", "/v1/conversations", 405),
        ("GET", "/v1//responses", 404),
        ("GET", "/files", 404),
        ("GET", "/audio/speech", 404),
        ("DELETE", "/models/m", 404),
        ("GET", "/", 404),
        ("TRACE", "/v1/x", 405),
        ("GET", "/v1/a/../b", 400),
        ("GET", "/v1/a/%2e%2e/b", 400),
        ("GET", "/v1/%2e%2e%2fadmin", 400),
        ("GET", "/v1/../admin", 400),
    ],
)
async def test_paths_that_are_ours_or_nobodys_reach_no_backend(
    raw: RawBackend, app: App, method: str, path: str, status: int
) -> None:
    assert await status_of(app, f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()) == status
    assert [seen for seen in raw.seen if seen.target != "/v1/models"] == []


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/v1/x", "http://user@127.0.0.1:9/v1/x", "/v1/x#frag"])
async def test_no_form_of_a_target_leads_to_another_host(raw: RawBackend, app: App, target: str) -> None:
    assert await status_of(app, f"GET {target} HTTP/1.1\r\nhost: 127.0.0.1:9\r\n\r\n".encode()) == 200
    assert raw.seen[-1].target == "/v1/x"
    assert raw.seen[-1].header("host") == raw.url.removeprefix("http://").removesuffix("/v1")


@pytest.mark.parametrize("is_enabled", [True, False])
async def test_no_websocket_goes_through(raw: RawBackend, start: StartRaw, is_enabled: bool) -> None:
    refusal = await handshake_refused(await start(websocket={"enabled": is_enabled}), "/v1/realtime")
    assert refusal.status == 404
    assert [seen for seen in raw.seen if seen.target != "/v1/models"] == []


@pytest.mark.parametrize(("key", "status"), [(b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n", 404), (b"", 400)])
async def test_a_websocket_does_not_go_through(raw: RawBackend, app: App, key: bytes, status: int) -> None:
    upgrade = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n" + key
    assert await status_of(app, b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n") == status
    assert [seen for seen in raw.seen if seen.target != "/v1/models"] == []


async def test_a_model_can_be_deleted_at_its_backend(raw: RawBackend, app: App) -> None:
    async with app.http.delete(f"{app.url}/v1/models/org/m") as answer:
        assert answer.status == 200
    assert (raw.seen[-1].method, raw.seen[-1].target) == ("DELETE", "/v1/models/org/m")


# -- which backend -----------------------------------------------------------------------------------------------------


SECOND = {"models": ("big-*",), "aliases": {"gpt-5": "org/qwen"}}


def form(model: str | None) -> aiohttp.FormData:
    data = aiohttp.FormData()
    data.add_field("file", b"RIFF gpt-5", filename="gpt-5.wav", content_type="audio/wav")
    if model:
        data.add_field("model", model)
    return data


@pytest.mark.parametrize(
    ("data", "is_second"),
    [
        (b'{"model":"big-one"}', True),
        (b'{"model":"small"}', False),
        (b'{"input":"big-one"}', False),
        (b"no json: big-one", False),
        (form("big-one"), True),
        (form(None), False),
    ],
)
async def test_the_model_in_a_body_decides_where_it_goes(
    raw: RawBackend, other: RawBackend, start: StartRaw, data: Any, is_second: bool
) -> None:
    app = await start(second=SECOND)
    async with app.http.post(f"{app.url}/v1/embeddings", data=data) as answer:
        assert answer.status == 200
    posted = [[seen for seen in backend.seen if seen.method == "POST"] for backend in (raw, other)]
    assert [len(each) for each in posted] == [1 - is_second, is_second]
    if isinstance(data, bytes):
        assert posted[is_second][0].raw == data


async def test_an_alias_is_replaced_in_a_body_of_json(other: RawBackend, start: StartRaw) -> None:
    app = await start(second=SECOND)
    async with app.post(b'{ "x":"gpt-5", "model" :"gpt-5","n":1.0}', "/v1/chat/completions") as answer:
        assert answer.status == 200
    assert other.seen[-1].raw == b'{ "x":"gpt-5", "model" :"org/qwen","n":1.0}'


async def test_an_alias_is_replaced_in_a_form(raw: RawBackend, start: StartRaw) -> None:
    app = await start(upstream={"aliases": {"gpt-5": "org/qwen"}})
    async with app.http.post(f"{app.url}/v1/audio/transcriptions", data=form("gpt-5")) as answer:
        assert answer.status == 200
    body = raw.seen[-1].raw
    assert body.count(b"gpt-5") == 2
    assert b'name="model"\r\n\r\norg/qwen\r\n--' in body


async def test_a_large_body_with_an_alias_goes_out_with_its_new_length(raw: RawBackend, start: StartRaw) -> None:
    app = await start(upstream={"aliases": {"a": "a-much-longer-name"}})
    body = b'{"input":"%b","model":"a"}' % (b"x" * 3 * MIB)
    async with app.http.post(f"{app.url}/v1/embeddings", data=io.BytesIO(body)) as answer:
        assert answer.status == 200
    assert raw.seen[-1].raw == body.replace(b'"a"', b'"a-much-longer-name"')


async def test_a_compressed_body_is_refused_where_its_model_has_to_be_known(start: StartRaw) -> None:
    app = await start(second=SECOND)
    async with app.post(b"x", "/v1/embeddings", headers={"content-encoding": "gzip"}) as answer:
        assert "content-encoding" in (await error_of(answer, 400))["message"]


async def test_a_compressed_body_goes_through_where_it_has_not(raw: RawBackend, app: App) -> None:
    body = gzip.compress(b"{}")
    async with app.post(body, "/v1/embeddings", headers={"content-encoding": "gzip"}) as answer:
        assert answer.status == 200
    assert (raw.seen[-1].raw, raw.seen[-1].header("content-encoding")) == (body, "gzip")


# -- the official client -----------------------------------------------------------------------------------------------


COMPLETION = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello"}}],
}
EMBEDDINGS = {
    "object": "list",
    "model": "m",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}],
    "usage": {"prompt_tokens": 1, "total_tokens": 1},
}
FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 4,
    "created_at": 1,
    "filename": "a.jsonl",
    "purpose": "batch",
    "status": "processed",
}


async def test_the_official_client_completes_a_chat(raw: RawBackend, app: App) -> None:
    raw.answer = whole(json.dumps(COMPLETION).encode())
    completion = await app.openai.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert completion.choices[0].message.content == "Hello"


async def test_the_official_client_streams_a_chat(raw: RawBackend, app: App) -> None:
    async def answer(seen: Seen) -> None:
        await seen.read()
        pieces = [chunk(content="Hel"), chunk(content="lo"), chunk("stop"), DONE]
        await seen.write(head(**EVENTS) + b"".join(framed(piece) for piece in pieces) + b"0\r\n\r\n")

    raw.answer = answer
    stream = await app.openai.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    assert "".join([each.choices[0].delta.content or "" async for each in stream]) == "Hello"


async def test_the_official_client_gets_embeddings(raw: RawBackend, app: App) -> None:
    raw.answer = whole(json.dumps(EMBEDDINGS).encode())
    found = await app.openai.embeddings.create(model="m", input="Hi", encoding_format="float")
    assert found.data[0].embedding == [0.5, 1.0]


async def test_the_official_client_transcribes_audio(raw: RawBackend, start: StartRaw) -> None:
    app = await start(upstream={"aliases": {"whisper-1": "large-v3"}})
    raw.answer = whole(b'{"text":"Hello"}')
    said = await app.openai.audio.transcriptions.create(model="whisper-1", file=("a.wav", b"RIFF", "audio/wav"))
    assert said.text == "Hello"
    assert b"\r\n\r\nlarge-v3\r\n" in raw.seen[-1].raw


async def test_the_official_client_uploads_a_file(raw: RawBackend, app: App) -> None:
    raw.answer = whole(json.dumps(FILE).encode())
    uploaded = await app.openai.files.create(file=("a.jsonl", b"{}\n" * 100_000), purpose="batch")
    assert uploaded.id == "file-1"
    assert raw.seen[-1].raw.count(b"{}\n") == 100_000


async def test_the_official_client_reads_a_backends_error(raw: RawBackend, app: App) -> None:
    error = {"message": "Slow down", "type": "tokens", "param": None, "code": "rate_limit_exceeded"}
    raw.answer = whole(json.dumps({"error": error}).encode(), "429 Too Many Requests")
    with pytest.raises(openai.RateLimitError, match="Slow down") as caught:
        await app.openai.embeddings.create(model="m", input="Hi")
    assert caught.value.code == "rate_limit_exceeded"


# -- a real backend ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def real(llamacpp: str) -> AsyncIterator[AsyncOpenAI]:
    async with running_app(settings_of(llamacpp, upstream={"aliases": {"gpt-5": "tiny-think"}})) as app:
        yield app.openai
    await no_task_is_left()


async def test_llamacpp_completes_and_streams_through_the_proxy(real: AsyncOpenAI) -> None:
    options: Any = {
        "model": "gpt-5",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    completion = await real.chat.completions.create(**options)
    assert completion.usage
    assert completion.usage.completion_tokens == 8
    stream = await real.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = [each async for each in stream]
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 8
    text = await real.completions.create(model="tiny-think", prompt="Once", max_tokens=4)
    assert text.choices[0].text


async def test_llamacpp_lists_its_model_and_an_alias(real: AsyncOpenAI) -> None:
    assert [model.id async for model in real.models.list()] == ["tiny-think", "gpt-5"]
    assert (await real.models.retrieve("gpt-5")).owned_by == "llamacpp"


async def test_llamacpp_says_itself_what_it_does_not_have(real: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="embeddings"):
        await real.embeddings.create(model="tiny-think", input="Hi")
    with pytest.raises(openai.APIStatusError, match="reranking"):
        await real.post("/rerank", body={"model": "tiny-think", "query": "Hi", "documents": ["a"]}, cast_to=object)


@pytest.fixture
def embedding_llamacpp() -> Iterator[str]:
    with llamacpp_server("--embeddings") as url:
        yield url


async def test_llamacpp_embeds_through_the_proxy_as_without_it(embedding_llamacpp: str) -> None:
    async with AsyncOpenAI(base_url=embedding_llamacpp, api_key="x", max_retries=0) as bare:
        expected = await bare.embeddings.create(model="tiny-think", input=["Hi", "there"])
    async with running_app(settings_of(embedding_llamacpp)) as app:
        found = await app.openai.embeddings.create(model="tiny-think", input=["Hi", "there"])
    assert found.data == expected.data
