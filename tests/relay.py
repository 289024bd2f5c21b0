"""A way to a server that a test can break: it stops forwarding, or loses an answer, while both ends believe in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Relay:
    """Forwards connections to a port of loopback. `running` it."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = 0
        self.connections = 0
        # Whether the next thing that the server says is lost, and its connection with it.
        self.loses_answer = False
        self._flows = asyncio.Event()
        self._flows.set()
        self._open: set[asyncio.Task[None]] = set()
        self._dead: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Relay]:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            tasks = list(self._open)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self._flows.clear()

    def heal(self) -> None:
        """New connections come through. Those from before stay silent, as after a way that has lost its state."""
        self._dead |= self._open
        self._flows.set()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        self._open.add(own)
        self.connections += 1
        try:
            with contextlib.suppress(OSError, ExceptionGroup, asyncio.CancelledError):
                await self._flows.wait()
                their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._to)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._pump(own, reader, their_writer, is_answer=False))
                        group.create_task(self._pump(own, their_reader, writer, is_answer=True))
                finally:
                    their_writer.close()
        finally:
            self._open.discard(own)
            self._dead.discard(own)
            writer.close()

    async def _pump(
        self, own: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        """Raises: ConnectionResetError at its end, so that the other direction ends too."""
        while data := await reader.read(65536):
            await self._flows.wait()
            if is_answer and self.loses_answer:
                self.loses_answer = False
                break
            if own not in self._dead:
                writer.write(data)
                await writer.drain()
        raise ConnectionResetError
