"""The outermost layer of the HTTP edge: request ids, welcome pages, what an exception becomes, and what is counted.

May not know what a route does.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from answers import (
    ClientGone,
)
from edge import Edge, direct_routes, header, json_response, routes
from errors import (
    ForeignOrigin,
    MethodNotAllowed,
    NotFound,
    ProxyError,
)
from logs import REQUEST_ID
from observing import Observer, route_of
from origins import Origins
from sockets import refuse_upgrade

log = logging.getLogger("responses_proxy.edge")

# How long a browser remembers what pages may do.
PREFLIGHT_KEPT_S = 600
CLIENT_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


def error_response(error: ProxyError) -> Response:
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if error.retry_after_s is not None else None
    return json_response(error.to_wire(), error.http_status, headers)


def response_to(error: Exception, request_id: str) -> Response:
    """The one place where an exception becomes an HTTP answer."""
    if isinstance(error, ProxyError):
        if error.http_status >= 500:
            log.log(error.log_level, "answered %d: %s", error.http_status, error.logged)
        return error_response(error)
    if isinstance(error, HTTPException):
        return error_response(ROUTING_ERRORS.get(error.status_code, NotFound)("Unknown request URL or method."))
    if isinstance(error, ClientGone):
        log.info("client left")
        return Response(status_code=499)
    log.error("fault of this program in %s", request_id, exc_info=error)
    return error_response(ProxyError(f"Internal error; the log has it under {request_id}."))


ROUTING_ERRORS: dict[int, type[ProxyError]] = {405: MethodNotAllowed}


class Outermost:
    """Gives every request an id, and turns what goes wrong into an answer."""

    def __init__(self, edge: Edge, observer: Observer, new_id: Callable[[str], str]) -> None:
        self._direct = direct_routes(edge)
        # What they are told as.
        self._told_as = {key: f"{key[0]} /v1{key[1].removeprefix('/v1')}" for key in self._direct}
        self._routes = routes(edge)
        self._router = Router(self._routes, redirect_slashes=False, default=edge.pass_on)
        self._sockets = edge.sockets
        self._origins = edge.origins
        self._observer = observer
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["header_values"] = dict(scope["headers"])
        request_id = scope["request_id"] = _request_id(scope) or self._new_id("req")
        REQUEST_ID.set(request_id)
        added = scope["answer_headers"] = [(b"x-request-id", request_id.encode())]
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
            return
        scope["app"] = self  # the router raises its 404 and 405 only inside an application
        seen = scope["seen"] = self._observer.request(scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        direct = self._direct.get((scope["method"], path))
        told_as = self._told_as.get((scope["method"], path))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *added]
                seen.answered(message["status"], message["headers"], told_as or route_of(scope))
            await send(message)

        try:
            if self._origins is not None:
                refuse_foreign(self._origins, scope)
            await (direct or self._router)(scope, receive, send_with_id)
        except Exception as error:
            if started:  # the server cuts the answer, and logs the exception
                log.error("fault of this program in %s, after its answer began", request_id)
                raise
            response = response_to(error, request_id)
            if isinstance(error, HTTPException) and response.status_code == 405:
                response.headers["allow"] = ", ".join(sorted(self._methods(scope, path)))
            await response(scope, receive, send_with_id)
        finally:
            seen.ended(told_as or route_of(scope))

    def _methods(self, scope: Scope, path: str) -> set[str]:
        """What a path can be asked for. The router names those of its first route of that path only."""
        found = [route.methods or () for route in self._routes if route.matches(scope)[0] is not Match.NONE]
        direct = {method for method, direct_path in self._direct if direct_path == path}
        return direct.union(*found)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Browsers let any page open one, so the page is looked at here."""
        try:
            if self._origins is not None:
                refuse_foreign(self._origins, scope)
        except ForeignOrigin as error:
            await receive()
            await refuse_upgrade(scope, send, error, scope["answer_headers"])
        else:
            await self._sockets(scope, receive, send)


def refuse_foreign(origins: Origins, scope: Scope) -> None:
    """Raises: ForeignOrigin."""
    server = scope.get("server")
    origins.check(scope["header_values"], server[0] if server else "")


# What pages may read of an answer, beside what they always may.
EXPOSED_HEADERS = (
    "x-request-id",
    "x-responses-proxy-ignored",
    "x-responses-proxy-upstream",
    "x-upstream-request-id",
    "idempotent-replayed",
    "retry-after",
    *(f"x-ratelimit-{key}-{name}" for name in ("requests", "tokens") for key in ("limit", "remaining", "reset")),
)


def with_cors(served: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Lets browsers send requests of these pages, and show them every answer; errors too."""
    if not origins:
        return served
    return CORSMiddleware(
        served,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
        max_age=PREFLIGHT_KEPT_S,
    )


def _request_id(scope: Scope) -> str | None:
    """The client's own id, when it is fit for a header and a log."""
    given = header(scope, b"x-request-id")
    return given if given and CLIENT_REQUEST_ID.match(given) else None
