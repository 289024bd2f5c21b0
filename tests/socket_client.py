"""A client of the proxy's WebSocket, for tests: it says what it is told to, and sorts what it hears by lane."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from compacting import without_compacting
from conftest import App
from event_grammar import check
from scripted import DEADLINE_S

Json = dict[str, Any]
PATH = "/v1/responses"
LAST = {"response.completed", "response.incomplete", "response.failed", "error"}


class Socket:
    """One connection."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self._heard: defaultdict[str | None, deque[Json]] = defaultdict(deque)

    async def create(self, said: Any, **fields: Any) -> None:
        """A response that is not stored, unless the fields say otherwise."""
        body = {"type": "response.create", "model": "m", "input": said, "store": False, **fields}
        await self.ws.send_str(json.dumps({key: value for key, value in body.items() if value is not None}))

    async def hear(self, lane: str | None = None) -> Json:
        """The next event of a lane."""
        async with asyncio.timeout(DEADLINE_S):
            while not self._heard[lane]:
                event: Json = await self.ws.receive_json()
                self._heard[event.get("stream_id")].append(event)
        return self._heard[lane].popleft()

    async def until(self, kind: str, lane: str | None = None) -> Json:
        while (event := await self.hear(lane))["type"] != kind:
            assert event["type"] not in LAST, event
        return event

    async def events(self, lane: str | None = None) -> list[Json]:
        """The events of a lane up to the one that ends a response, or refuses it."""
        events = [await self.hear(lane)]
        while events[-1]["type"] not in LAST:
            events.append(await self.hear(lane))
        return events

    async def ended(self, lane: str | None = None) -> Json:
        """The response that a lane tells of next, whole and valid."""
        events = await self.events(lane)
        is_asked_for = any(event["type"] == "response.compaction.compacting" for event in events)
        return check(without_compacting(events) if is_asked_for else events)

    async def turn(self, said: Any, *, lane: str | None = None, **fields: Any) -> Json:
        await self.create(said, stream_id=lane, **fields)
        return await self.ended(lane)

    async def refused(self, lane: str | None = None) -> Json:
        """The error frame that a lane hears next, after a look at its shape."""
        event = await self.hear(lane)
        assert event["type"] == "error", event
        assert set(event) - {"stream_id"} == {"type", "status", "error"}
        assert set(event["error"]) - {"headers"} == {"message", "type", "param", "code"}
        return {"status": event["status"], **event["error"]}

    async def not_found(self, parent: Json, lane: str | None = None, **fields: Any) -> None:
        """Fails unless the response cannot be continued."""
        await self.create("More?", stream_id=lane, previous_response_id=parent["id"], **fields)
        error = await self.refused(lane)
        assert (error["status"], error["code"]) == (400, "previous_response_not_found")
        assert error["param"] == "previous_response_id"

    async def closed(self) -> int | None:
        """The code of the close frame that comes next."""
        async with asyncio.timeout(DEADLINE_S):
            message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE, message
        await self.ws.close()
        return self.ws.close_code


@contextlib.asynccontextmanager
async def connected(app: App, path: str = PATH, **options: Any) -> AsyncIterator[Socket]:
    async with app.http.ws_connect(app.url + path, **{"autoclose": False, **options}) as ws:
        yield Socket(ws)


async def handshake_refused(app: App, path: str = PATH, **options: Any) -> aiohttp.WSServerHandshakeError:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await app.http.ws_connect(app.url + path, **options)
    assert caught.value.headers
    assert caught.value.headers["x-request-id"]
    assert caught.value.headers["content-type"] == "application/json"
    return caught.value
