"""Bodies in and answers out as ASGI has them, without the framework: every turn passes here.

May not know routes, nor what an answer says. Source: asgi.readthedocs.io, HTTP message format 2.3.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import orjson

from errors import BodyTooLarge, InvalidRequest, ProxyError
from frames import DONE, KEEPALIVE, Event, Interrupted, encode
from turns import Turn

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
log = logging.getLogger("responses_proxy")

# What the last event of a stream may take when the process is stopping.
GOODBYE_S = 1.0


class ClientGone(Exception):
    """The client closed its connection."""


# A request that takes less than this is not watched: its answer is there before the watcher would be.
UNWATCHED_S = 0.05


class Watched:
    """Work that is cancelled when the client leaves: `async with Watched(receive): ...`. Raises: ClientGone.

    Without a watcher neither a flowing nor a silent answer would ever notice that nobody listens.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._working = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(UNWATCHED_S, self._begin)

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        assert self._working is not None
        self._working.cancel()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._timer.cancel()
        if self._watcher is None:
            return
        gone = self._watcher.done()
        self._watcher.cancel()
        await asyncio.wait({self._watcher})
        if gone and kind is asyncio.CancelledError and self._working and self._working.uncancel() == 0:
            raise ClientGone from error


EVENT_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


Piece = list[Event] | bytes


class Streamed(Protocol):
    """What can be told as server-sent events. `close` it in every case."""

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """Whole events, or their bytes; the last one is terminal.

        Raises: Interrupted when another process has to tell the rest.
        """

    def goodbye(self) -> bytes | None:
        """What is told when this process stops; None when that is not the end."""

    async def close(self) -> None: ...


class TurnStream:
    """A turn as it is told."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def pieces(self) -> AsyncGenerator[list[Event], None]:
        return self._turn.events()

    def goodbye(self) -> bytes:
        return encode(self._turn.fail(stopped()))

    async def close(self) -> None:
        await self._turn.close()


class WaitingStream:
    """A turn whose parent takes long: what is told before it can begin, and when it never does."""

    def __init__(self, preparing: asyncio.Task[Turn], refused: Callable[[ProxyError], list[Event]]) -> None:
        self._preparing = preparing
        self._refused = refused
        self._begun: TurnStream | None = None
        self._is_told = False

    async def pieces(self) -> AsyncGenerator[list[Event], None]:
        try:
            self._begun = TurnStream(await self._preparing)
        except ProxyError as error:
            self._is_told = True
            yield self._refused(error)
            return
        async with contextlib.aclosing(self._begun.pieces()) as pieces:
            async for piece in pieces:
                yield piece

    def goodbye(self) -> bytes:
        if self._begun:
            return self._begun.goodbye()
        return b"" if self._is_told else encode(self._refused(stopped()))

    async def close(self) -> None:
        self._preparing.cancel()
        await asyncio.wait({self._preparing})
        if not self._preparing.cancelled() and self._preparing.exception() is None:
            await self._preparing.result().close()


def stopped() -> ProxyError:
    return ProxyError("The proxy was stopped before the answer was finished.")


class EventStream:
    """The ASGI response of a stream: one send per read of its source, comments in between, `[DONE]` last."""

    def __init__(self, source: Streamed, headers: Headers, keepalive_s: float) -> None:
        self._source = source
        self._headers = [*EVENT_STREAM_HEADERS, *headers]
        self._keepalive_s = keepalive_s
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as group:
                companion = group.create_task(self._accompany(receive, send))
                await self._pump(send)
                companion.cancel()
        except* ClientGone:
            log.info("client left a stream")
        except* Interrupted:  # the server cuts the connection, so that the client does not take this for the end
            log.info("a stream is left to another process")
        finally:
            await self._source.close()

    async def _pump(self, send: Send) -> None:
        time_of = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        async with contextlib.aclosing(self._source.pieces()) as pieces:
            try:
                async for piece in pieces:
                    body = piece if isinstance(piece, bytes) else encode(piece)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    self._sent_at = time_of()
            except asyncio.CancelledError:
                await self._say_goodbye(send)
                raise
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _say_goodbye(self, send: Send) -> None:
        """The terminal event of a stream that a stopping process has to leave; a client that is gone gets nothing."""
        if (last := self._source.goodbye()) is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await send({"type": "http.response.body", "body": last + DONE, "more_body": False})

    async def _accompany(self, receive: Receive, send: Send) -> None:
        """Keeps a silent stream alive, and ends it when the client leaves."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(self._sent_at + self._keepalive_s):
                    message = await receive()
            except TimeoutError:
                if loop.time() >= self._sent_at + self._keepalive_s:
                    await send({"type": "http.response.body", "body": KEEPALIVE, "more_body": True})
                    self._sent_at = loop.time()
            else:
                if message["type"] == "http.disconnect":
                    raise ClientGone


def upstream_header(name: str) -> tuple[bytes, bytes]:
    """Who gave an answer; of its name, what a header may hold."""
    return b"x-responses-proxy-upstream", re.sub(r"[^ -~]", "?", name).encode()


async def send_json(send: Send, body: Any, headers: Headers) -> None:
    """A 200 with a JSON body, without the framework's part in it: every plain turn passes here."""
    raw = orjson.dumps(body)
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
    await send({"type": "http.response.start", "status": 200, "headers": fixed + headers})
    await send({"type": "http.response.body", "body": raw})


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The request body. Raises: BodyTooLarge, InvalidRequest for an encoding, ClientGone."""
    values = scope["header_values"]
    length = values.get(b"content-length", b"")
    if length.isdigit() and int(length) > limit_bytes:
        raise too_large(limit_bytes)
    if values.get(b"content-encoding", b"identity") != b"identity":
        raise InvalidRequest("A content-encoding is not supported here: send the body as it is.")
    pieces: list[bytes] = []
    size_bytes = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        size_bytes += len(pieces[-1])
        if size_bytes > limit_bytes:
            raise too_large(limit_bytes)
        more = message.get("more_body", False)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit_bytes} bytes.")
