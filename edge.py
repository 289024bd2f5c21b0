"""HTTP edge: routes, handlers, and what an exception becomes.

May not know chat messages, nor how what it works with is put together.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from answers import (
    EVENT_STREAM_HEADERS,
    ClientGone,
    EventStream,
    Headers,
    Streamed,
    TurnStream,
    WaitingStream,
    Watched,
    read_body,
    send_json,
)
from auth import Caller
from errors import (
    MethodNotAllowed,
    NotFound,
    ProxyError,
    UnsupportedParameter,
)
from event_log import Follower
from frames import DONE, encode
from logs import REQUEST_ID
from metrics import CONTENT_TYPE
from observing import Observer, route_of
from records import ignored_of, restored
from replay import replayed
from request import parse_body, parse_request
from services import Services
from settings import Settings
from stored import STORED_ROUTES, Visit, Work
from turns import Asked, Turn
from verbs import KeptResponse
from windows import WINDOW_ROUTES
from windows import Work as WindowWork

log = logging.getLogger("responses_proxy.edge")

CLIENT_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


# -- answers -----------------------------------------------------------------------------------------------------------


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")


def error_response(error: ProxyError) -> Response:
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if error.retry_after_s is not None else None
    return json_response(error.to_wire(), error.http_status, headers)


def ignored_headers(names: tuple[str, ...]) -> Headers:
    """Names of what was left out, safe for a header whatever the client wrote; none where nothing was."""
    if not names:
        return []
    shown = re.sub(r"[^ -~]", "?", ", ".join(name.encode("ascii", "replace").decode() for name in names))[:2000]
    log.info("left out: %s", shown)
    return [(b"x-responses-proxy-ignored", shown.encode())]


# -- routes ------------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """One HTTP request as ASGI has it."""

    scope: Scope
    receive: Receive
    send: Send


def header(scope: Scope, name: bytes) -> str | None:
    value: bytes | None = scope["header_values"].get(name)
    return None if value is None else value.decode("latin-1")


class Edge:
    """The HTTP handlers and what they share."""

    def __init__(self, settings: Settings, services: Services) -> None:
        self._services = services
        self._limits = settings.limits
        self._keepalive_s = settings.server.keepalive_s

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/responses."""
        limits = self._limits
        exchange = Exchange(scope, receive, send)
        caller = self._caller(scope)
        raw = await read_body(scope, receive, limits.body_bytes)
        request = parse_request(parse_body(raw, limits), limits)
        key = header(scope, b"idempotency-key")
        if key is None:
            await self._answer(exchange, Asked(request, caller))
        elif request.is_stored:
            await self._answer_once(exchange, Asked(request, caller), key, raw)
        else:  # nothing of it is kept, so nothing can be given again
            request = msgspec.structs.replace(request, unused=(*request.unused, "Idempotency-Key"))
            await self._answer(exchange, Asked(request, caller))

    def _caller(self, scope: Scope) -> Caller:
        """Raises: Unauthorized."""
        seen = scope["seen"]
        caller = self._services.owners.caller(header(scope, b"authorization"), seen.trace)
        seen.owner = caller.owner
        return caller

    def _ignored(self, names: tuple[str, ...]) -> Headers:
        """Counts them too."""
        self._services.observer.ignored(names)
        return ignored_headers(names)

    async def _answer(self, exchange: Exchange, asked: Asked) -> None:
        if asked.request.background:
            await self._answer_queued(exchange, asked)
        elif not asked.request.stream:
            async with Watched(exchange.receive):
                turn = await self._services.turns.prepare(asked)
                response = await turn.run()
            await send_json(exchange.send, response, self._ignored(turn.ignored))
        elif asked.request.previous_response_id:
            await self._stream_patiently(exchange, asked)
        else:
            async with Watched(exchange.receive):
                turn = await self._accepted(asked)
            await self._stream(exchange, TurnStream(turn), self._ignored(turn.ignored))

    async def _accepted(self, asked: Asked) -> Turn:
        turn = await self._services.turns.prepare(asked)
        await turn.accept()
        return turn

    async def _stream_patiently(self, exchange: Exchange, asked: Asked) -> None:
        """A stream whose parent may run still: it begins without a word of the backend when that takes too long."""
        preparing = asyncio.create_task(self._accepted(asked))
        waiting = WaitingStream(preparing, partial(self._services.turns.refused, asked.request))
        turn = None
        try:
            async with Watched(exchange.receive):
                await asyncio.wait({preparing}, timeout=self._keepalive_s)
            if preparing.done():
                turn = preparing.result()
        except BaseException:
            await waiting.close()
            raise
        source = TurnStream(turn) if turn else waiting
        await self._stream(exchange, source, self._ignored(turn.ignored if turn else ()))

    async def _stream(self, exchange: Exchange, source: Streamed, headers: Headers) -> None:
        await EventStream(source, headers, self._keepalive_s)(*exchange)

    async def _answer_queued(self, exchange: Exchange, asked: Asked) -> None:
        """A run that was admitted is carried out whether or not its client stays."""
        background = self._services.background
        response, ignored = await background.admit(asked)
        headers = self._ignored(ignored)
        if asked.request.stream:
            await self._stream(exchange, background.logs.followed(asked.caller.owner, response), headers)
        else:
            await send_json(exchange.send, response, headers)

    async def _answer_once(self, exchange: Exchange, asked: Asked, key: str, raw: bytes) -> None:
        claim = await self._services.once.claim(asked.caller.owner, key, raw)
        try:
            if claim.earlier is None:
                await self._answer(exchange, msgspec.structs.replace(asked, first_use=claim.first_use))
            else:
                await self._answer_again(exchange, asked, claim.earlier)
        finally:
            await claim.release()

    async def _answer_again(self, exchange: Exchange, asked: Asked, earlier: KeptResponse) -> None:
        response, ignored = restored(earlier), ignored_of(earlier)
        headers = [(b"idempotent-replayed", b"true"), *self._ignored(ignored)]
        logs = self._services.background.logs
        if asked.request.stream and asked.request.background and await logs.is_kept(response["id"]):
            await self._stream(exchange, logs.followed(asked.caller.owner, response), headers)
        elif asked.request.stream:
            started = {"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM_HEADERS, *headers]}
            await exchange.send(started)
            await exchange.send({"type": "http.response.body", "body": encode(replayed(response)) + DONE})
        else:
            await send_json(exchange.send, response, headers)

    async def visit(self, request: Request, work: Work) -> ASGIApp:
        """Everything that reads or writes stored objects; 426 makes clients of a WebSocket fall back to HTTP."""
        if request.headers.get("upgrade", "").lower() == "websocket":
            body = UnsupportedParameter("There is no WebSocket here; use HTTP.").to_wire()
            return json_response(body, 426, {"upgrade": "HTTP/1.1"})
        caller = self._caller(request.scope)
        raw = b""
        if request.method == "POST":
            raw = await read_body(request.scope, request.receive, self._limits.body_bytes)
        visit = Visit(caller.owner, request.path_params, request.query_params.multi_items(), raw)
        answer = await work(self._services.stored, visit)
        if not isinstance(answer, Follower):
            return json_response(answer)
        unused = tuple(name for name in ("include", "include[]") if name in request.query_params)
        return EventStream(answer, self._ignored(unused), self._keepalive_s)

    async def window(self, request: Request, work: WindowWork) -> Response:
        """Counts and compactions: a client that leaves stops them."""
        caller = self._caller(request.scope)
        raw = await read_body(request.scope, request.receive, self._limits.body_bytes)
        async with Watched(request.receive):
            told = await work(self._services.windows, caller, raw)
        names = {name.decode(): value.decode() for name, value in self._ignored(told.ignored)}
        return json_response(told.body, headers=names)

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process is up."""
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        load = await self._services.load()
        return Response(self._services.observer.metrics.text(load), media_type=CONTENT_TYPE)


def routes(edge: Edge) -> list[Route]:
    """The same routes with and without `/v1`, for clients whose base URL leaves it out."""
    found: list[Route] = [Route("/healthz", edge.health), Route("/metrics", edge.metrics)]
    for prefix in ("/v1", ""):
        found += [
            Route(prefix + path, partial(edge.visit, work=work), methods=[method])
            for (method, path), work in STORED_ROUTES.items()
        ]
        found += [
            Route(prefix + path, partial(edge.window, work=window_work), methods=[method])
            for (method, path), window_work in WINDOW_ROUTES.items()
        ]
    return found


def direct_routes(edge: Edge) -> dict[tuple[str, str], ASGIApp]:
    """The routes that every turn takes: found by one look, and answered without the framework."""
    return {("POST", f"{prefix}/responses"): edge.create for prefix in ("/v1", "")}


def response_to(error: Exception, request_id: str) -> Response:
    """The one place where an exception becomes an HTTP answer."""
    if isinstance(error, ProxyError):
        if error.http_status >= 500:
            log.warning("answered %d: %s", error.http_status, error.logged)
        return error_response(error)
    if isinstance(error, HTTPException):
        return error_response(ROUTING_ERRORS.get(error.status_code, NotFound)("Unknown request URL or method."))
    if isinstance(error, ClientGone):
        log.info("client left")
        return Response(status_code=499)
    log.error("fault of this program in %s", request_id, exc_info=error)
    return error_response(ProxyError(f"Internal error; the log has it under {request_id}."))


ROUTING_ERRORS: dict[int, type[ProxyError]] = {405: MethodNotAllowed}


# What the direct routes are told as.
TURNS = "POST /v1/responses"


class Outermost:
    """Gives every request an id, and turns what goes wrong into an answer."""

    def __init__(self, edge: Edge, observer: Observer, new_id: Callable[[str], str]) -> None:
        self._direct = direct_routes(edge)
        self._observer = observer
        self._router = Router(routes(edge))
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        scope["header_values"] = dict(scope["headers"])
        request_id = scope["request_id"] = _request_id(scope) or self._new_id("req")
        scope["app"] = self  # the router raises its 404 and 405 only inside an application
        REQUEST_ID.set(request_id)
        header = (b"x-request-id", request_id.encode())
        seen = scope["seen"] = self._observer.request(scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        direct = self._direct.get((scope["method"], path))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], header]
                seen.answered(message["status"], message["headers"], TURNS if direct else route_of(scope))
            await send(message)

        try:
            await (direct or self._router)(scope, receive, send_with_id)
        except Exception as error:
            if started:  # the server cuts the answer, and logs the exception
                log.error("fault of this program in %s, after its answer began", request_id)
                raise
            await response_to(error, request_id)(scope, receive, send_with_id)
        finally:
            seen.ended(TURNS if direct else route_of(scope))


def _request_id(scope: Scope) -> str | None:
    """The client's own id, when it is fit for a header and a log."""
    given = header(scope, b"x-request-id")
    return given if given and CLIENT_REQUEST_ID.match(given) else None


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    if "websocket.http.response" in scope.get("extensions", {}):
        await send({"type": "websocket.http.response.start", "status": 426, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b""})
    else:
        await send({"type": "websocket.close"})
