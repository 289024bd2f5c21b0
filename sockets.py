"""One WebSocket connection: client events in, the events of responses out, and how it begins and ends.

May not know how a turn is made, nor the HTTP framework. Source: WebSocket mode of the Responses API and
ResponsesClientEvent, ResponsesServerEvent of the openai SDK 3.52, read 2026-11-20; ASGI WebSocket messages 2.4.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import orjson

from admissions import Admission, Quotas
from answers import GOODBYE_S, ClientGone, Message, Receive, Scope, Send, stopped
from auth import Caller, Owners
from errors import InvalidRequest, NotFound, ProxyError, RateLimited, UnsupportedParameter
from frames import Event
from keeper import Asked
from logs import REQUEST_ID, one_line
from observing import NOTED, Noted, Observer
from remembered import LaneMemory, Memory
from request import RequestLimits, TurnRequest, parse_body, parse_request
from stream_lanes import StreamLanes, Waiting, lane_name
from tracing import trace_of
from turns import Turn, Turns

Json = dict[str, Any]
log = logging.getLogger("responses_proxy.sockets")

PATHS = ("/v1/responses", "/responses")
# What a server says through `receive` that will stop, and waits until the connections have ended.
STOPPING = "responses_proxy.stopping"
# Close codes after which the SDKs connect again. Source: websocket_reconnection of the openai SDK.
GOING_AWAY, RESTARTING = 1001, 1012
IGNORED = "x-responses-proxy-ignored"


@dataclass(frozen=True)
class WebSocketSettings:
    """The section `[websocket]`."""

    enabled: bool = True
    life_s: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    queued: Annotated[int, msgspec.Meta(ge=0)] = 100
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024 * 1024
    ping_s: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    ping_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0


# -- what is said ------------------------------------------------------------------------------------------------------


class ClientEvent(msgspec.Struct, frozen=True):
    """What has to be known of a client's event before its turn has come."""

    type: Any = None
    stream_id: Any = None


class Create(msgspec.Struct, frozen=True):
    """A `response.create`, validated."""

    request: TurnRequest
    generates: bool


def parse_event(raw: bytes) -> ClientEvent:
    """Raises: InvalidRequest."""
    try:
        return msgspec.json.decode(raw, type=ClientEvent)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest("Expected a JSON object with a 'type'.", code="invalid_json") from error


ENVELOPE = frozenset({"type", "stream_id", "generate"})


def parse_create(body: Json, limits: RequestLimits) -> Create:
    """Raises: InvalidRequest."""
    generate, options = body.get("generate"), body.get("prompt_cache_options")
    if not isinstance(generate, bool | None):
        raise InvalidRequest("Invalid 'generate': expected a boolean.", param="generate", code="invalid_type")
    if body.get("background"):
        raise UnsupportedParameter(
            "There is no background on a WebSocket: send the request with POST /v1/responses.", param="background"
        )
    is_prewarmed = isinstance(options, dict) and options.get("prewarm") is True
    generates = generate is not False and not is_prewarmed
    given = {key: value for key, value in body.items() if key not in ENVELOPE}
    request = parse_request({**given, "stream": True}, limits, may_be_empty=not generates)
    if request.is_trigger and not generates:
        raise InvalidRequest("Nothing is compacted with 'generate': false.", param="generate")
    if body.get("stream") is False:
        request = msgspec.structs.replace(request, unused=(*request.unused, "stream"))
    return Create(request, generates)


def error_event(error: ProxyError) -> Event:
    """Source: ResponseWsError."""
    event: Event = {"type": "error", "status": error.http_status, **error.to_wire()}
    left = error.headers if isinstance(error, RateLimited) else []
    headers = {name.decode(): value.decode() for name, value in left}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if headers:
        event["error"]["headers"] = headers
    return event


def steer_failed(raw: bytes, limits: RequestLimits) -> Event:
    """Every `response.steer` is refused, and its input given back. Source: ResponseSteerFailedEvent."""
    body = parse_body(raw, limits)
    given, target = body.get("input"), body.get("previous_response_id")
    code, message = ("steering_not_supported", "Responses cannot be steered here: send it with the next one.")
    if not (isinstance(target, str) and isinstance(given, str | list)):
        code, message = ("invalid_input", "Expected 'previous_response_id' and 'input'.")
    return {
        "type": "response.steer.failed",
        "sequence_number": 0,
        "error": {"type": "invalid_request_error", "code": code, "message": message},
        "steer": {
            "input": given if isinstance(given, str | list) else "",
            "previous_response_id": target if isinstance(target, str) else "",
        },
    }


def unknown_event(kind: object) -> InvalidRequest:
    shown = repr(kind)[:64]
    return InvalidRequest(
        f"Invalid 'type': {shown}. Supported values are: 'response.create' and 'response.steer'.",
        param="type",
        code="invalid_value",
    )


def life_is_over(life_s: float) -> InvalidRequest:
    return InvalidRequest(
        f"This connection has reached its limit ({life_s / 60:g} minutes). Connect again.",
        code="websocket_connection_limit_reached",
    )


def no_websocket() -> ProxyError:
    """A status that makes clients fall back to HTTP."""
    error = UnsupportedParameter("There is no WebSocket here; use HTTP.")
    error.http_status = 426
    return error


# -- the client's end --------------------------------------------------------------------------------------------------


class Client:
    """The client's end of a connection. One message is sent after the other, and waited for: nothing piles up here."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.is_gone = False
        self._receive = receive
        self._send = send
        self._sending = asyncio.Lock()

    async def heard(self) -> Message:
        """The next message. Raises: ClientGone."""
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._left()
        return message

    async def tell(self, events: list[Event], stream_id: str | None) -> None:
        """Raises: ClientGone."""
        async with self._sending:
            for event in events:
                named = event if stream_id is None else {**event, "stream_id": stream_id}
                await self._say({"type": "websocket.send", "text": orjson.dumps(named).decode()})

    async def close(self, code: int) -> None:
        """Raises: ClientGone."""
        async with self._sending:
            await self._say({"type": "websocket.close", "code": code})

    async def _say(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # what a server raises who knows that the client left; ASGI 2.4
            self._left()

    def _left(self) -> None:
        self.is_gone = True
        raise ClientGone


# -- a connection ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SocketMeans:
    """What connections are served with."""

    turns: Turns
    settings: WebSocketSettings
    limits: RequestLimits
    most_waiting_bytes: int
    new_id: Callable[[str], str]
    quotas: Quotas | None
    observer: Observer


@dataclass(frozen=True, slots=True)
class Ending:
    """Why nothing new is begun, the code that the connection is closed with, and whether the client is told before."""

    error: ProxyError
    code: int
    is_told: bool


class Connection:
    """`serve` it once. Every task of it has ended when that returns."""

    def __init__(self, means: SocketMeans, caller: Caller, client: Client) -> None:
        settings = means.settings
        self._means = means
        self._caller = caller
        self._client = client
        self._lanes = StreamLanes(settings.queued, means.most_waiting_bytes)
        self._memory = Memory(caller.owner, settings.memory_bytes)
        self._ending: Ending | None = None
        self._is_refusing = False
        self._is_over = asyncio.Event()

    async def serve(self) -> None:
        """Raises: CancelledError when the server cannot wait for it; what runs has been told so."""
        try:
            await self._live()
        except asyncio.CancelledError:
            with contextlib.suppress(ClientGone, TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self._client.close(RESTARTING)
            raise

    async def _live(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._group:
                reading = self._group.create_task(self._read())
                await self._is_over.wait()
                reading.cancel()
            await self._end_with(self._ending)
        except* ClientGone:
            log.info("client left a socket")

    async def _end_with(self, ending: Ending | None) -> None:
        assert ending is not None
        if ending.is_told:
            await self._client.tell([error_event(ending.error)], None)
        await self._client.close(ending.code)

    async def _read(self) -> None:
        settings = self._means.settings
        ends_at = asyncio.get_running_loop().time() + settings.life_s
        while True:
            try:
                async with asyncio.timeout_at(None if self._ending else ends_at):
                    message = await self._client.heard()
            except TimeoutError:
                await self._begin_to_end(Ending(life_is_over(settings.life_s), GOING_AWAY, is_told=True))
                continue
            if message["type"] == STOPPING:
                await self._begin_to_end(Ending(stopped(), RESTARTING, is_told=False))
            else:
                await self._take(message)

    async def _begin_to_end(self, ending: Ending) -> None:
        """What runs goes on; what waits is refused."""
        waiting = self._lanes.emptied()
        self._ending, self._is_refusing = ending, True
        for request in waiting:
            await self._refuse(ending.error, request.stream_id)
        self._is_refusing = False
        self._look_around()

    async def _take(self, message: Message) -> None:
        stream_id = None
        try:
            if (text := message.get("text")) is None:
                raise InvalidRequest("Expected JSON in a text message, not a binary one.", code="invalid_json")
            raw = text.encode()
            event = parse_event(raw)
            stream_id = lane_name(event.stream_id)
            if event.type == "response.steer":
                await self._client.tell([steer_failed(raw, self._means.limits)], None)
            elif event.type == "response.create":
                self._admit(Waiting(stream_id, raw))
            else:
                raise unknown_event(event.type)
        except ProxyError as error:
            await self._refuse(error, stream_id)

    async def _refuse(self, error: ProxyError, stream_id: str | None) -> None:
        await self._client.tell([error_event(error)], stream_id)

    def _admit(self, request: Waiting) -> None:
        if self._ending is not None:
            raise self._ending.error
        self._lanes.add(request)
        self._look_around()

    def _look_around(self) -> None:
        """Begins what can begin; a connection that is to end does so when nothing runs."""
        while request := self._lanes.next():
            self._group.create_task(self._answer(request))
        if self._ending is not None and not self._lanes.running and not self._is_refusing:
            self._is_over.set()

    # -- one response --------------------------------------------------------------------------------------------------

    async def _answer(self, request: Waiting) -> None:
        """Nothing that goes wrong with it ends the connection, but for a client that left."""
        request_id = self._means.new_id("req")
        REQUEST_ID.set(request_id)
        NOTED.set(Noted())
        try:
            await self._respond(request, self._memory.lane(request.stream_id))
        except ProxyError as error:
            if error.http_status >= 500:
                log.log(error.log_level, "%s: %s", request_id, error.logged)
            await self._refuse(error, request.stream_id)
        except ClientGone:
            raise
        except Exception:
            log.exception("fault of this program in %s", request_id)
            fault = ProxyError(f"Internal error; the log has it under {request_id}.")
            await self._refuse(fault, request.stream_id)
        self._lanes.done(request)
        self._look_around()

    async def _respond(self, request: Waiting, lane: LaneMemory) -> None:
        """Raises: ProxyError before anything was said."""
        if self._means.quotas is None:
            await self._continue(request, lane)
        else:
            async with await self._means.quotas.admit(self._caller.owner) as admission:
                await self._continue(request, lane, admission)

    async def _continue(self, request: Waiting, lane: LaneMemory, admission: Admission | None = None) -> None:
        body = parse_body(request.raw, self._means.limits)
        is_failed = True
        try:
            turn = await self._accepted(body, lane, admission)
            is_failed = await self._tell(turn, request.stream_id)
        finally:
            if is_failed:
                lane.forget(body.get("previous_response_id"))

    async def _accepted(self, body: Json, lane: LaneMemory, admission: Admission | None) -> Turn:
        create = parse_create(body, self._means.limits)
        asked = Asked(create.request, self._caller, None, lane, create.generates, admission)
        turn = await self._means.turns.prepare(asked)
        await turn.accept()
        return turn

    async def _tell(self, turn: Turn, stream_id: str | None) -> bool:
        """Whether the response failed."""
        try:
            return await self._tell_all(turn, stream_id)
        except asyncio.CancelledError:
            await self._say_goodbye(turn, stream_id)
            raise
        finally:
            await turn.close()

    async def _tell_all(self, turn: Turn, stream_id: str | None) -> bool:
        last = ""
        self._means.observer.ignored(turn.ignored)
        async with contextlib.aclosing(turn.events()) as batches:
            async for batch in batches:
                await self._client.tell(batch if last else _naming(batch, turn.ignored), stream_id)
                last = batch[-1]["type"] if batch else last
        return last == "response.failed"

    async def _say_goodbye(self, turn: Turn, stream_id: str | None) -> None:
        """The terminal event of a response that a stopping process has to leave; a client that is gone gets nothing."""
        if self._client.is_gone:
            return
        with contextlib.suppress(ClientGone, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._client.tell(turn.fail(stopped()), stream_id)


def _naming(events: list[Event], ignored: tuple[str, ...]) -> list[Event]:
    """The first one with the names that an HTTP answer has in its header."""
    if not ignored:
        return events
    names = one_line(ignored)
    log.info("left out of %s: %s", REQUEST_ID.get(), names)
    return [{**events[0], IGNORED: names}, *events[1:]]


# -- upgrades ----------------------------------------------------------------------------------------------------------


class Sockets:
    """The ASGI application for WebSockets: admits them or refuses them, and serves them."""

    def __init__(self, means: SocketMeans, owners: Owners) -> None:
        self._means = means
        self._owners = owners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`scope`: with the `header_values` and the `request_id` of the edge."""
        await receive()
        headers = [(b"x-request-id", scope["request_id"].encode())]
        try:
            caller = self._admitted(scope)
        except ProxyError as error:
            await refuse_upgrade(scope, send, error, headers)
            return
        metrics = self._means.observer.metrics
        await send({"type": "websocket.accept", "headers": headers})
        metrics.websockets_open += 1
        try:
            await Connection(self._means, caller, Client(receive, send)).serve()
        finally:
            metrics.websockets_open -= 1

    def _admitted(self, scope: Scope) -> Caller:
        """Raises: NotFound, Unauthorized, UnsupportedParameter."""
        if scope["path"].removeprefix(scope.get("root_path", "")) not in PATHS:
            raise NotFound("Unknown request URL or method.")
        if not self._means.settings.enabled:
            raise no_websocket()
        given = scope["header_values"].get(b"authorization")
        return self._owners.caller(None if given is None else given.decode("latin-1"), trace_of(scope["headers"]))


async def refuse_upgrade(scope: Scope, send: Send, error: ProxyError, headers: list[tuple[bytes, bytes]]) -> None:
    """As an HTTP answer, where the server can give one."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close"})
        return
    given = [(b"content-type", b"application/json"), *headers]
    await send({"type": "websocket.http.response.start", "status": error.http_status, "headers": given})
    await send({"type": "websocket.http.response.body", "body": orjson.dumps(error.to_wire())})
