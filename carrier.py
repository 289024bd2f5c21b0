"""Requests that are carried through to a backend, as ASGI has them: the body out as it comes in, the answer back.

May not know routes, nor what is asked or answered, but for the model that a body names.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from answers import UNWATCHED_S, ClientGone, Receive, Scope, Send, read_body, too_large
from auth import Caller
from errors import ProxyError
from passing import given_headers, model_in, sent_headers, target_of, with_model
from relaying import Body, Outgoing, Relayed
from routing import Upstreams
from upstream import Upstream

log = logging.getLogger("responses_proxy.carrier")


class Incoming:
    """A client's body as it comes in and, once it is in, whether the client stays: `async with Incoming(...)`.

    The work inside is cancelled when the client leaves, or sends more than it may. Raises: ClientGone, BodyTooLarge.
    """

    def __init__(self, scope: Scope, receive: Receive, limit_bytes: int) -> None:
        self._scope = scope
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._left_bytes = limit_bytes
        self._first = b""
        self._more = True
        self._fault: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._working = asyncio.current_task()
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        cancelled = kind is asyncio.CancelledError and self._fault is not None
        if cancelled and self._working is not None and self._working.uncancel() == 0:
            assert self._fault is not None
            raise self._fault from error

    @property
    def length(self) -> bytes:
        """As the client tells it; a body in pieces has none."""
        values = self._scope["header_values"]
        length: bytes = b"" if b"transfer-encoding" in values else values.get(b"content-length", b"")
        return length

    @property
    def is_there(self) -> bool:
        return b"transfer-encoding" in self._scope["header_values"] or bool(self.length.strip(b"0"))

    async def whole(self) -> bytes:
        """All of it. Raises: BodyTooLarge, InvalidRequest for an encoding, ClientGone."""
        raw = await read_body(self._scope, self._receive, self._limit_bytes)
        self._watch_soon()
        return raw

    async def begun(self) -> Body:
        """None without a body, bytes where all of it is there already, else itself: the pieces as they come."""
        if not self.is_there:
            self._watch_soon()
            return None
        if self.length and int(self.length) > self._limit_bytes:
            raise too_large(self._limit_bytes)
        self._first = await self._next()
        return self if self._more else self._first

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Runs in a task of the HTTP client, so what goes wrong is told to the one that works."""
        piece, self._first = self._first, b""
        try:
            while not piece and self._more:
                piece = await self._next()
        except (ClientGone, ProxyError) as fault:
            self._fail(fault)
            raise
        if not piece:
            raise StopAsyncIteration
        return piece

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        self._left_bytes -= len(piece)
        if self._left_bytes < 0:
            raise too_large(self._limit_bytes)
        self._more = message.get("more_body", False)
        if not self._more:
            self._watch_soon()
        return piece

    def _fail(self, fault: Exception) -> None:
        self._fault = fault
        assert self._working is not None
        self._working.cancel()

    def _watch_soon(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(UNWATCHED_S, self._watch)

    def _watch(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._until_gone())

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientGone())


class Way(NamedTuple):
    """Where a request goes, and the body that goes there."""

    upstream: Upstream
    body: Body


class Carrier:
    """Carries requests to the backends."""

    def __init__(self, upstreams: Upstreams, limit_bytes: int) -> None:
        self._upstreams = upstreams
        self._limit_bytes = limit_bytes
        settings = [upstream.settings for upstream in upstreams]
        self._goes_by_model = len(settings) > 1 or any(each.aliases for each in settings)

    async def carry(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        """Raises: ProxyError, ClientGone; once the answer has begun, a fault cuts the connection instead."""
        target = target_of(scope["method"], _raw_path(scope), scope["query_string"])
        has_begun = False
        try:
            async with Incoming(scope, receive, self._limit_bytes) as incoming:
                relayed = await self._open(scope, incoming, target, caller)
                has_begun = True
                await _answer(relayed, send)
        except (ClientGone, ProxyError) as fault:
            if not has_begun:
                raise
            # Nothing more is sent: the server cuts the connection, so that nobody takes this for the end.
            log.warning("an answer was cut: %s", getattr(fault, "message", "its client left"))
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _open(self, scope: Scope, incoming: Incoming, target: str, caller: Caller) -> Relayed:
        way = await self._way(scope, incoming)
        headers = sent_headers(scope["headers"], with_credentials=caller.bearer is not None)
        if way.body is incoming and incoming.length:
            headers.append(("content-length", incoming.length.decode("ascii")))
        return await way.upstream.relay(Outgoing(scope["method"], target, headers, way.body), caller.passed)

    async def _way(self, scope: Scope, incoming: Incoming) -> Way:
        """A body is looked at only where its model decides something."""
        if not (self._goes_by_model and incoming.is_there):
            return Way(next(iter(self._upstreams)), await incoming.begun())
        raw = await incoming.whole()
        content_type = scope["header_values"].get(b"content-type", b"").decode("latin-1")
        model = model_in(raw, content_type)
        if model is None:
            return Way(next(iter(self._upstreams)), raw)
        upstream, name = self._upstreams.route(model)
        return Way(upstream, raw if name == model else with_model(raw, content_type, name))


def _raw_path(scope: Scope) -> bytes:
    """Servers need not tell it; the decoded path cannot say which of its slashes were encoded."""
    raw_path: bytes = scope.get("raw_path") or quote(scope["path"]).encode("ascii")
    return raw_path.removeprefix(scope.get("root_path", "").encode("ascii", "replace"))


async def _answer(relayed: Relayed, send: Send) -> None:
    """All but the end of an answer, which is not told before it is sure."""
    try:
        headers = given_headers(relayed.status, relayed.headers)
        await send({"type": "http.response.start", "status": relayed.status, "headers": headers})
        await relayed.pour(lambda data: send({"type": "http.response.body", "body": data, "more_body": True}))
    finally:
        relayed.close()
