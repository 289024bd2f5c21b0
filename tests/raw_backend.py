"""A backend that a test writes byte by byte, on a real socket: it sees what arrives, and answers as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from scripted import DEADLINE_S

PIECE_BYTES = 65_536


@dataclass
class Seen:
    """A request as it arrived; the body is read when somebody asks for it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    raw: bytes = b""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name: str) -> str | None:
        values = [value for given, value in self.headers if given.lower() == name]
        assert len(values) < 2, self.headers
        return values[0] if values else None

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, whichever way it is framed."""
        if self.header("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline(), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            assert await self.reader.readline() == b"\r\n"
            return
        left = int(self.header("content-length") or 0)
        while left:
            piece = await self.reader.read(min(left, PIECE_BYTES))
            assert piece, "the body is shorter than its length"
            left -= len(piece)
            yield piece

    async def read(self) -> bytes:
        self.raw = b"".join([piece async for piece in self.pieces()])
        return self.raw

    async def is_let_go(self) -> bool:
        """Whether the other side closes the connection."""
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(PIECE_BYTES):
                    pass
            return True

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


Answer = Callable[[Seen], Awaitable[None]]


def head(status: str = "200 OK", **headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def whole(body: bytes = b"{}", status: str = "200 OK", **headers: Any) -> Answer:
    """Reads the request, and answers with a body of known length."""

    async def answer(seen: Seen) -> None:
        await seen.read()
        shown = b"" if seen.method == "HEAD" else body
        await seen.write(
            head(status, **{"content_type": "application/json", **headers}, content_length=len(body)) + shown
        )

    return answer


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class RawBackend:
    """`backend.answer = ...` says what it does; `await backend.next()` is the next request that has arrived."""

    def __init__(self) -> None:
        self.answer: Answer = whole()
        self.seen: list[Seen] = []
        self.url = ""
        self._arrived: asyncio.Queue[Seen] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def next(self) -> Seen:
        async with asyncio.timeout(DEADLINE_S):
            return await self._arrived.get()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RawBackend]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=PIECE_BYTES)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while seen := await self._arrival(reader, writer):
                self.seen.append(seen)
                self._arrived.put_nowait(seen)
                await self.answer(seen)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _arrival(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Seen | None:
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        method, target, _ = first.split(" ")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return Seen(method, target, headers, reader, writer)
