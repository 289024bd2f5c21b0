"""HTTP edge: routes and their handlers.

May not know chat messages, nor how what it works with is put together.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from admissions import Admission
from answers import (
    EVENT_STREAM_HEADERS,
    EventStream,
    Headers,
    Streamed,
    TurnStream,
    WaitingStream,
    Watched,
    read_body,
    send_json,
    upstream_header,
)
from auth import Caller
from carrier import Carried
from errors import (
    RateLimited,
)
from event_log import Follower
from frames import DONE, encode
from keeper import Asked
from logs import one_line
from metrics import CONTENT_TYPE
from origins import origins_of
from passing import WITHOUT_PREFIX, template_of
from records import ignored_of, restored
from replay import replayed
from request import parse_body, parse_request
from services import Services
from settings import Settings
from sockets import no_websocket
from stored import STORED_ROUTES, Visit, Work
from turns import Turn
from verbs import KeptResponse
from windows import LIGHT_WORK, WINDOW_ROUTES
from windows import Work as WindowWork

log = logging.getLogger("responses_proxy.edge")


# -- answers -----------------------------------------------------------------------------------------------------------


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")


def ignored_headers(names: tuple[str, ...]) -> Headers:
    """Names of what was left out, safe for a header whatever the client wrote; none where nothing was."""
    if not names:
        return []
    shown = one_line(names)
    log.info("left out: %s", shown)
    return [(b"x-responses-proxy-ignored", shown.encode())]


# -- routes ------------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """One HTTP request as ASGI has it."""

    scope: Scope
    receive: Receive
    send: Send


class Passed(NamedTuple):
    """What stands in for a route where a request goes through."""

    path: str


def header(scope: Scope, name: bytes) -> str | None:
    value: bytes | None = scope["header_values"].get(name)
    return None if value is None else value.decode("latin-1")


def wants_websocket(scope: Scope) -> bool:
    return (header(scope, b"upgrade") or "").lower() == "websocket"


def no_upgrade() -> Response:
    """What makes clients fall back to HTTP."""
    error = no_websocket()
    return json_response(error.to_wire(), error.http_status, {"upgrade": "HTTP/1.1"})


async def let_go(scope: Scope) -> None:
    """What is answered from here on works no backend for this request."""
    if admission := scope.get("admission"):
        await admission.over()


def releasing(admission: Admission, send: Send) -> Send:
    """Before its client has the end of an answer, that is over for all processes."""
    left_bytes = math.inf

    async def send_on(message: Message) -> None:
        nonlocal left_bytes
        if message["type"] == "http.response.start":
            length = dict(message["headers"]).get(b"content-length", b"")
            left_bytes = int(length) if length.isdigit() else math.inf
        else:
            left_bytes -= len(message.get("body", b""))
            if left_bytes <= 0 or not message.get("more_body"):
                await admission.over()
        await send(message)

    return send_on


class Edge:
    """The HTTP handlers and what they share."""

    def __init__(self, settings: Settings, services: Services) -> None:
        self.sockets = services.sockets
        self._services = services
        self._limits = settings.limits
        self._keepalive_s = settings.server.keepalive_s
        self._quotas = services.quotas
        self.origins = origins_of(settings.server.cors_origins, settings.auth.mode)

    async def admitted(self, scope: Scope, owner: str, *, is_held: bool = True) -> Admission:
        """The right to have a backend work for an owner; what is left of its quotas goes into the answer's headers.

        Raises: RateLimited, StoreError.
        """
        if self._quotas is None:
            return Admission([])
        try:
            admission = await self._quotas.admit(owner, is_held=is_held)
        except RateLimited as error:
            scope["answer_headers"] += error.headers
            raise
        scope["answer_headers"] += admission.headers
        scope["admission"] = admission
        return admission

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/responses."""
        exchange = Exchange(scope, receive, send)
        caller = self._caller(scope)
        if self._quotas is None:
            await self._create(exchange, caller)
        else:
            async with await self.admitted(scope, caller.owner):
                await self._create(exchange, caller)

    async def _create(self, exchange: Exchange, caller: Caller) -> None:
        scope, limits = exchange.scope, self._limits
        raw = await read_body(scope, exchange.receive, limits.body_bytes)
        request = parse_request(parse_body(raw, limits), limits)
        key = header(scope, b"idempotency-key")
        asked = Asked(request, caller, admission=scope.get("admission"))
        if key is None:
            await self._answer(exchange, asked)
        elif request.is_stored:
            await self._answer_once(exchange, asked, key, raw)
        else:  # nothing of it is kept, so nothing can be given again
            request = msgspec.structs.replace(request, unused=(*request.unused, "Idempotency-Key"))
            await self._answer(exchange, msgspec.structs.replace(asked, request=request))

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

    def _turn_headers(self, turn: Turn) -> Headers:
        """Of a plain answer: who gave it, and what was left out. A stream begins before that is certain."""
        return [upstream_header(turn.upstream), *self._ignored(turn.ignored)]

    async def _answer(self, exchange: Exchange, asked: Asked) -> None:
        if asked.request.background:
            await self._answer_queued(exchange, asked)
        elif not asked.request.stream:
            async with Watched(exchange.receive):
                turn = await self._services.turns.prepare(asked)
                response = await turn.run()
            await send_json(exchange.send, response, self._turn_headers(turn))
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
        await let_go(exchange.scope)
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
        await let_go(exchange.scope)
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
        """Everything that reads or writes stored objects; an upgrade comes here from a server without WebSockets."""
        if wants_websocket(request.scope):
            return no_upgrade()
        caller = self._caller(request.scope)
        raw = b""
        if request.method == "POST":
            raw = await read_body(request.scope, request.receive, self._limits.body_bytes)
        visit = Visit(caller.owner, request.path_params, request.query_params.multi_items(), raw)
        answer = await work(self._services.stored, visit)
        if not isinstance(answer, Follower):
            return json_response(answer)
        if request.method == "HEAD":
            await answer.close()
            return Response(headers={name.decode(): value.decode() for name, value in EVENT_STREAM_HEADERS})
        unused = tuple(name for name in ("include", "include[]") if name in request.query_params)
        return EventStream(answer, self._ignored(unused), self._keepalive_s)

    async def window(self, request: Request, work: WindowWork) -> Response:
        """Counts and compactions: a client that leaves stops them."""
        caller = self._caller(request.scope)
        async with await self.admitted(request.scope, caller.owner, is_held=work not in LIGHT_WORK):
            raw = await read_body(request.scope, request.receive, self._limits.body_bytes)
            async with Watched(request.receive):
                told = await work(self._services.windows, caller, raw)
        names = {name.decode(): value.decode() for name, value in self._ignored(told.ignored)}
        return json_response(told.body, headers=names)

    async def models(self, request: Request) -> ASGIApp:
        """GET /v1/models and /v1/models/{id}; what else may be done to a model goes through."""
        if request.method not in ("GET", "HEAD"):
            return self.pass_on
        caller = self._caller(request.scope)
        catalogue, model = self._services.catalogue, request.path_params.get("model")
        async with Watched(request.receive):
            told = await (catalogue.entry(caller, model) if model else catalogue.listed(caller))
        return json_response(told)

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is no route of ours goes through to a backend as it is. Raises: NotFound for what may not."""
        if wants_websocket(scope):
            await no_upgrade()(scope, receive, send)
            return
        carrier = self._services.carrier
        target = carrier.target(scope)
        scope.setdefault("route", Passed(template_of(target)))
        caller = self._caller(scope)
        async with await self.admitted(scope, caller.owner) as admission:
            await carrier.carry(
                Carried(scope, target, caller), receive, releasing(admission, send) if self._quotas else send
            )

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process is up."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /readyz: requests are welcome here."""
        is_ready, told = await self._services.readiness.told()
        return json_response(told, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        load = await self._services.load()
        return Response(self._services.observer.metrics.text(load), media_type=CONTENT_TYPE)


MODEL_PATHS = ("/models", "/models/{model:path}")
MODEL_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PASSED_PATHS = tuple(sorted(path.decode() for path in WITHOUT_PREFIX))


def routes(edge: Edge) -> list[Route]:
    """The same routes with and without `/v1`, for clients whose base URL leaves it out."""
    found: list[Route] = [
        Route("/healthz", edge.health),
        Route("/readyz", edge.ready),
        Route("/metrics", edge.metrics),
    ]
    for prefix in ("/v1", ""):
        found += [
            Route(prefix + path, partial(edge.visit, work=work), methods=[method])
            for (method, path), work in STORED_ROUTES.items()
        ]
        found += [
            Route(prefix + path, partial(edge.window, work=window_work), methods=[method])
            for (method, path), window_work in WINDOW_ROUTES.items()
        ]
        found += [Route(prefix + path, edge.models, methods=MODEL_METHODS) for path in MODEL_PATHS]
    return found


def direct_routes(edge: Edge) -> dict[tuple[str, str], ASGIApp]:
    """The routes that every turn takes: found by one look, and answered without the framework."""
    served = {"/responses": edge.create} | dict.fromkeys(PASSED_PATHS, edge.pass_on)
    return {("POST", prefix + path): route for prefix in ("/v1", "") for path, route in served.items()}
