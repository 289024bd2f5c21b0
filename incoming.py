"""A client's body as it comes in, and whether the client stays.

May not know where the body goes, nor what is in it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Self

from answers import UNWATCHED_S, ClientGone, Receive, Scope, read_body, too_large
from errors import ProxyError
from relaying import Body


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
