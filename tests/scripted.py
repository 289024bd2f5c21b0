"""A chat backend that does what a test tells it, on a real socket, and remembers what was asked of it.

Each call of `/v1/chat/completions` takes the next script, or the last one again. A script is a list of steps: bytes are
sent, an `asyncio.Event` is waited for, so that a test decides the order of things without sleeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Step = bytes | asyncio.Event
DEADLINE_S = 10.0


@dataclass
class Script:
    """One answer. `before` is waited for before the headers; `end` says how the body ends."""

    steps: Iterable[Step] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    before: asyncio.Event | None = None
    end: str = "whole"  # or "cut": the connection is dropped; or "silent": nothing more is said


@dataclass
class Received:
    """A request as the backend saw it; `gone` is set when the client closes the connection during the answer."""

    path: str
    headers: Mapping[str, str]
    raw: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> Json:
        decoded: Json = json.loads(self.raw)
        return decoded

    async def is_let_go(self) -> bool:
        async with asyncio.timeout(DEADLINE_S):
            return await self.gone.wait()


# -- pieces of answers -------------------------------------------------------------------------------------------------


def sse(*chunks: Json) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks)


def chunk(finish: str | None = None, **delta: Any) -> bytes:
    """One chunk: `chunk(content="Hi")`, `chunk("stop")`."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return sse({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


def call_delta(index: int, arguments: str, name: str | None = None, call_id: str | None = None) -> Json:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"index": index, "function": function} | ({"id": call_id, "type": "function"} if call_id else {})


USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
USAGE_CHUNK = sse({"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
END = [chunk("stop"), USAGE_CHUNK, DONE]


def streamed(*texts: str) -> Script:
    return Script([chunk(role="assistant", content=""), *(chunk(content=text) for text in texts), *END])


def streamed_calls(*deltas: Json) -> Script:
    return Script([*(chunk(tool_calls=[delta]) for delta in deltas), chunk("tool_calls"), USAGE_CHUNK, DONE])


def plain(content: str | None = "Hello there.", finish: str = "stop", **message: Any) -> Script:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    body = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
    return Script([json.dumps(body).encode()])


def plain_call(name: str, arguments: str, call_id: str = "call_1", **message: Any) -> Script:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return plain(None, "tool_calls", tool_calls=[call], **message)


def refused(status: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any) -> Script:
    body = {"error": {"message": message, "type": "some_error", **fields}}
    return Script([json.dumps(body).encode()], status, headers or {})


# -- the server --------------------------------------------------------------------------------------------------------


class Backend:
    """The scripted backend: `script(...)` says what it answers, `received()` gives the next chat request."""

    def __init__(self) -> None:
        self.models: Json = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "test"}]}
        # Path -> what is answered there, or what makes that of the request's body.
        self.looked_up: dict[str, Any] = {}
        self.requests: list[Received] = []
        self.connections = 0
        self.url = ""
        self._scripts: list[Script] = [plain()]
        self._arrived: asyncio.Queue[Received] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    def script(self, *scripts: Script) -> None:
        self._scripts = list(scripts)

    async def received(self) -> Received:
        """The next chat request that has not been asked for yet."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._arrived.get()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Backend]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    def _looked_up(self, request: Received) -> Script:
        """What is told beside the answers; 404 for what a test did not name."""
        found = {"/v1/models": self.models, **self.looked_up}.get(request.path)
        if callable(found):
            found = found(request.body)
        return refused(404, "no such route") if found is None else Script([json.dumps(found).encode()])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while request := await _read_request(reader):
                if not await self._answer(request, reader, writer):
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection can be used again."""
        if not request.path.endswith("/chat/completions"):
            script = self._looked_up(request)
        else:
            self.requests.append(request)
            self._arrived.put_nowait(request)
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        playing = asyncio.ensure_future(_play(script, writer))
        watching = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({playing, watching}, return_when=asyncio.FIRST_COMPLETED)
            played = playing.done() and playing.exception() is None
            if not played:
                request.gone.set()
            return played and script.end == "whole"
        finally:
            for task in (playing, watching):
                task.cancel()
            await asyncio.gather(playing, watching, return_exceptions=True)


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Received(first.split()[1], headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _play(script: Script, writer: asyncio.StreamWriter) -> None:
    if script.before:
        await script.before.wait()
    headers = {"content-type": "application/json", "transfer-encoding": "chunked", **script.headers}
    lines = [f"HTTP/1.1 {script.status} Scripted", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    writer.write("\r\n".join(lines).encode())
    for step in script.steps:
        if isinstance(step, asyncio.Event):
            await step.wait()
        else:
            writer.write(b"%x\r\n%b\r\n" % (len(step), step))
            await writer.drain()
            await asyncio.sleep(0)
    if script.end == "silent":
        await asyncio.Event().wait()
    if script.end == "whole":
        writer.write(b"0\r\n\r\n")
    await writer.drain()
