"""HTTP edge and composition root: routes, server-sent events out, settings, command line, `app` and `main()`.

May not know chat messages. `app` is an ASGI application for any server, set up by the environment or the file that
RESPONSES_PROXY_CONFIG names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import difflib
import importlib.metadata
import logging
import math
import os
import re
import signal
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import orjson
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import BodyTooLarge, InvalidRequest, MethodNotAllowed, NotFound, ProxyError, UnsupportedParameter
from request import RequestLimits, parse_body, parse_request
from streaming import Event, Json, ReasoningSettings
from turns import Sources, Turn, Turns, TurnSettings
from upstream import Upstream, Upstreams, UpstreamSettings, settings_for

log = logging.getLogger("responses_proxy")

ENV_PREFIX = "RESPONSES_PROXY_"
CLIENT_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
KEEPALIVE = b": keepalive\n\n"
DONE = b"data: [DONE]\n\n"
# What the last event of a stream may take when the process is stopping.
GOODBYE_S = 1.0
# The request that a log line belongs to.
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")


# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerSettings:
    """The section `[server]`."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(le=65535)] = 8080
    keepalive_s: Annotated[float, msgspec.Meta(gt=0)] = 15.0
    shutdown_grace_s: float = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True)
class LimitSettings(RequestLimits):
    """The section `[limits]`."""

    body_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """The whole file; every section belongs to a room."""

    server: ServerSettings = field(default_factory=ServerSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    turns: TurnSettings = field(default_factory=TurnSettings)
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)
    upstream: tuple[UpstreamSettings, ...] = ()


SECTIONS: dict[str, type[Any]] = {
    "server": ServerSettings,
    "limits": LimitSettings,
    "turns": TurnSettings,
    "reasoning": ReasoningSettings,
    "upstream": UpstreamSettings,
}


class SettingsError(Exception):
    """A setting that is unknown, malformed or missing; the message is for the person at the terminal."""


def load_settings(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The file, overridden by the environment, overridden by the flags. Raises: SettingsError."""
    tables = _read_file(path) if path else {}
    upstreams = list(tables.pop("upstream", ()))
    for given in (_from_environ(environ), flags):
        for section, values in given.items():
            if section == "upstream":
                upstreams[:1] = [{**(upstreams[0] if upstreams else {}), **values}]
            else:
                tables[section] = {**tables.get(section, {}), **values}
    sections = {name: _section(SECTIONS, name, table) for name, table in tables.items()}
    return Settings(**sections, upstream=tuple(_upstream(table) for table in upstreams))


def _upstream(table: Json) -> UpstreamSettings:
    """A table without a name is named after its host."""
    settings: UpstreamSettings = _section(SECTIONS, "upstream", table)
    try:
        named = settings_for(settings.base_url)
    except ValueError as error:
        raise SettingsError(f"upstream.base_url: {error}: {settings.base_url!r}") from error
    return settings if "name" in table else dataclasses.replace(settings, name=named.name)


def _read_file(path: Path) -> Json:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # neither TOML nor, perhaps, text
        raise SettingsError(f"{path}: {error}") from error
    for name, table in tables.items():
        if name not in SECTIONS:
            raise SettingsError(_unknown("section", f"[{name}]", name, SECTIONS))
        inner = table if name == "upstream" else [table]
        if not isinstance(inner, list) or not all(isinstance(each, dict) for each in inner):
            form = "[[upstream]]" if name == "upstream" else f"[{name}]"
            raise SettingsError(f"{path}: '{name}' has to be a table: {form}")
    return tables


def _from_environ(environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """RESPONSES_PROXY_SECTION__KEY; UPSTREAM means the first one, and UPSTREAM__URL is short for its base_url."""
    given: dict[str, dict[str, str]] = {}
    for name, value in environ.items():
        section, two, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if name.startswith(ENV_PREFIX) and two:
            key = "base_url" if (section, key) == ("upstream", "url") else key
            given.setdefault(section, {})[key] = value
    return given


def _section(sections: Mapping[str, type[Any]], name: str, table: Any) -> Any:
    cls = sections.get(name)
    if cls is None:
        raise SettingsError(_unknown("section", f"[{name}]", name, sections))
    known = [each.name for each in dataclasses.fields(cls)]
    for key in table:
        if key not in known:
            raise SettingsError(_unknown("setting", f"{name}.{key}", key, known))
    try:
        section = msgspec.convert(table, cls, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise SettingsError(f"[{name}]: {error}") from error
    for key in known:
        value = getattr(section, key)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise SettingsError(f"{name}.{key} has to be a number, 0 or more; got {value}")
    return section


def _unknown(what: str, shown: str, given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"unknown {what} {shown}" + (f"; did you mean '{close[0]}'?" if close else "")


# -- answers -----------------------------------------------------------------------------------------------------------


class ClientGone(Exception):
    """The client closed its connection."""


# A request that takes less than this is not watched: its answer is there before the watcher would be.
UNWATCHED_S = 0.05


class Watched:
    """Work that is cancelled when the client leaves: `async with Watched(receive): ...`. Raises: ClientGone.

    Without a watcher neither a flowing nor a silent answer would ever notice that nobody listens.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._working = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(UNWATCHED_S, self._begin)

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        assert self._working is not None
        self._working.cancel()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._timer.cancel()
        if self._watcher is None:
            return
        gone = self._watcher.done()
        self._watcher.cancel()
        await asyncio.wait({self._watcher})
        if gone and kind is asyncio.CancelledError and self._working and self._working.uncancel() == 0:
            raise ClientGone from error


def encode(events: list[Event]) -> bytes:
    """Server-sent events, LF only, each whole: a parser in use loses state between reads."""
    return b"".join([b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events])


class EventStream:
    """The ASGI response of a streamed turn: one send per read of the backend, comments in between, `[DONE]` last."""

    def __init__(self, turn: Turn, headers: list[tuple[bytes, bytes]], keepalive_s: float) -> None:
        self._turn = turn
        self._headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        self._headers += [(b"x-accel-buffering", b"no"), *headers]
        self._keepalive_s = keepalive_s
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as group:
                companion = group.create_task(self._accompany(receive, send))
                await self._pump(send)
                companion.cancel()
        except* ClientGone:
            log.info("client left a stream")
        finally:
            await self._turn.close()

    async def _pump(self, send: Send) -> None:
        time_of = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        async with contextlib.aclosing(self._turn.events()) as batches:
            try:
                async for events in batches:
                    await send({"type": "http.response.body", "body": encode(events), "more_body": True})
                    self._sent_at = time_of()
            except asyncio.CancelledError:
                await self._say_goodbye(send)
                raise
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _say_goodbye(self, send: Send) -> None:
        """The terminal event of a stream that a stopping process has to leave; a client that is gone gets nothing."""
        last = self._turn.fail(ProxyError("The proxy was stopped before the answer was finished."))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await send({"type": "http.response.body", "body": encode(last) + DONE, "more_body": False})

    async def _accompany(self, receive: Receive, send: Send) -> None:
        """Keeps a silent stream alive, and ends it when the client leaves."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(self._sent_at + self._keepalive_s):
                    message = await receive()
            except TimeoutError:
                if loop.time() >= self._sent_at + self._keepalive_s:
                    await send({"type": "http.response.body", "body": KEEPALIVE, "more_body": True})
                    self._sent_at = loop.time()
            else:
                if message["type"] == "http.disconnect":
                    raise ClientGone


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")


def error_response(error: ProxyError) -> Response:
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if error.retry_after_s is not None else None
    return json_response(error.to_wire(), error.http_status, headers)


async def send_json(send: Send, body: Any, headers: list[tuple[bytes, bytes]]) -> None:
    """A 200 with a JSON body, without the framework's part in it: every plain turn passes here."""
    raw = orjson.dumps(body)
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
    await send({"type": "http.response.start", "status": 200, "headers": fixed + headers})
    await send({"type": "http.response.body", "body": raw})


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The request body. Raises: BodyTooLarge, InvalidRequest for an encoding, ClientGone."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit_bytes:
            raise _too_large(limit_bytes)
        if name == b"content-encoding" and value != b"identity":
            raise InvalidRequest("A content-encoding is not supported here: send the body as it is.")
    pieces: list[bytes] = []
    size_bytes = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        size_bytes += len(pieces[-1])
        if size_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        more = message.get("more_body", False)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit_bytes} bytes.")


def ignored_header(names: tuple[str, ...]) -> tuple[bytes, bytes]:
    """Names of what was left out, safe for a header whatever the client wrote."""
    shown = ", ".join(name.encode("ascii", "replace").decode() for name in names)
    return b"x-responses-proxy-ignored", re.sub(r"[^ -~]", "?", shown)[:2000].encode()


# -- routes ------------------------------------------------------------------------------------------------------------


class Edge:
    """The HTTP handlers and what they share."""

    def __init__(self, settings: Settings, turns: Turns) -> None:
        self._turns = turns
        self._limits = settings.limits
        self._keepalive_s = settings.server.keepalive_s

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/responses."""
        limits = self._limits
        request = parse_request(parse_body(await read_body(scope, receive, limits.body_bytes), limits), limits)
        turn = await self._turns.prepare(request)
        headers = [ignored_header(turn.ignored)] if turn.ignored else []
        if headers:
            log.info("left out of %s: %s", scope["request_id"], headers[0][1].decode())
        if request.stream:
            async with Watched(receive):
                await turn.accept()
            await EventStream(turn, headers, self._keepalive_s)(scope, receive, send)
        else:
            async with Watched(receive):
                response = await turn.run()
            await send_json(send, response, headers)

    async def responses(self, request: Request) -> Response:
        """GET /v1/responses: the WebSocket's place; 426 makes clients fall back to HTTP."""
        if request.headers.get("upgrade", "").lower() == "websocket":
            body = UnsupportedParameter("There is no WebSocket here; use HTTP.").to_wire()
            return json_response(body, 426, {"upgrade": "HTTP/1.1"})
        return await self.stored(request)

    async def stored(self, request: Request) -> Response:
        """Everything that reads or writes stored objects."""
        raise UnsupportedParameter(
            f"{request.method} {request.url.path} needs stored responses, which this version does not have yet."
        )

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process is up."""
        return json_response({"status": "ok"})


STORED_ROUTES = (
    "/responses/compact",
    "/responses/input_tokens",
    "/responses/{id}",
    "/responses/{id}/cancel",
    "/responses/{id}/input_items",
    "/conversations",
    "/conversations/{id}",
    "/conversations/{id}/items",
    "/conversations/{id}/items/{item}",
)


def routes(edge: Edge) -> list[Route]:
    """The same routes with and without `/v1`, for clients whose base URL leaves it out."""
    found: list[Route] = [Route("/healthz", edge.health)]
    for prefix in ("/v1", ""):
        found.append(Route(f"{prefix}/responses", edge.responses, methods=["GET"]))
        found += [Route(prefix + path, edge.stored, methods=["GET", "POST", "DELETE"]) for path in STORED_ROUTES]
    return found


def direct_routes(edge: Edge) -> dict[tuple[str, str], ASGIApp]:
    """The routes that every turn takes: found by one look, and answered without the framework."""
    return {("POST", f"{prefix}/responses"): edge.create for prefix in ("/v1", "")}


def response_to(error: Exception, request_id: str) -> Response:
    """The one place where an exception becomes an HTTP answer."""
    if isinstance(error, ProxyError):
        if error.http_status >= 500:
            log.warning("%s: %s", request_id, error.message)
        return error_response(error)
    if isinstance(error, HTTPException):
        return error_response(ROUTING_ERRORS.get(error.status_code, NotFound)("Unknown request URL or method."))
    if isinstance(error, ClientGone):
        log.info("client left %s", request_id)
        return Response(status_code=499)
    log.error("fault of this program in %s", request_id, exc_info=error)
    return error_response(ProxyError(f"Internal error; the log has it under {request_id}."))


ROUTING_ERRORS: dict[int, type[ProxyError]] = {405: MethodNotAllowed}


class Outermost:
    """Gives every request an id, and turns what goes wrong into an answer."""

    def __init__(self, edge: Edge, new_id: Callable[[str], str]) -> None:
        self._direct = direct_routes(edge)
        self._router = Router(routes(edge))
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        request_id = scope["request_id"] = _request_id(scope) or self._new_id("req")
        scope["app"] = self  # the router raises its 404 and 405 only inside an application
        REQUEST_ID.set(request_id)
        header = (b"x-request-id", request_id.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            route = self._direct.get((scope["method"], path), self._router)
            await route(scope, receive, send_with_id)
        except Exception as error:
            if started:  # the server cuts the answer, and logs the exception
                log.error("fault of this program in %s, after its answer began", request_id)
                raise
            await response_to(error, request_id)(scope, receive, send_with_id)


def _request_id(scope: Scope) -> str | None:
    """The client's own id, when it is fit for a header and a log."""
    for name, value in scope["headers"]:
        text: str = value.decode("latin-1")
        if name == b"x-request-id" and CLIENT_REQUEST_ID.match(text):
            return text
    return None


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    if "websocket.http.response" in scope.get("extensions", {}):
        await send({"type": "websocket.http.response.start", "status": 426, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b""})
    else:
        await send({"type": "websocket.close"})


class Ids:
    """Fresh ids: a prefix and 48 hex digits, as on the live API. Random bytes are fetched for many ids at once."""

    def __init__(self) -> None:
        self._pool = b""
        self._used = 0

    def __call__(self, prefix: str) -> str:
        if self._used >= len(self._pool):
            self._pool, self._used = os.urandom(24 * 256), 0
        self._used += 24
        return f"{prefix}_{self._pool[self._used - 24 : self._used].hex()}"


# -- the application ---------------------------------------------------------------------------------------------------


class Application:
    """The ASGI application; it opens what it needs when the server starts it."""

    def __init__(self, load: Callable[[], Settings]) -> None:
        self._load = load
        self._served: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._served is None:
            raise RuntimeError("the server has to run the lifespan protocol (uvicorn: --lifespan on)")
        else:
            await self._served(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            settings = self._load()
            async with opened(settings) as self._served:
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except SettingsError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.shutdown.complete"})


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[ASGIApp]:
    """The application with everything it needs open. Raises: SettingsError."""
    if not settings.upstream:
        raise SettingsError(
            "no upstream: give --upstream URL, [[upstream]] in the settings file or RESPONSES_PROXY_UPSTREAM__BASE_URL"
        )
    upstreams = Upstreams(settings.upstream)
    looking = asyncio.create_task(upstreams.look())
    try:
        yield build_app(settings, upstreams)
    finally:
        looking.cancel()
        await asyncio.wait({looking})
        await upstreams.close()


def build_app(settings: Settings, upstreams: Upstreams) -> ASGIApp:
    """Routes and error handlers around one set of backends."""
    ids = Ids()
    turns = Turns(upstreams, settings.turns, settings.reasoning, Sources(time.time, ids))
    return Outermost(Edge(settings, turns), ids)


def settings_of_environ() -> Settings:
    """What `uvicorn proxy:app` runs with."""
    path = os.environ.get("RESPONSES_PROXY_CONFIG")
    return load_settings(Path(path) if path else None, os.environ, {})


app = Application(settings_of_environ)


# -- command line ------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="responses-proxy", description="The Responses API in front of any chat-completions backend."
    )
    parser.add_argument("command", nargs="?", choices=("serve", "check"), default="serve", help="serve is the default")
    parser.add_argument("--upstream", metavar="URL", help="base URL of the backend, e.g. http://localhost:11434/v1")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8080)")
    parser.add_argument("--config", metavar="FILE", help="settings file, see config.example.toml")
    parser.add_argument("--store", metavar="FILE", help="refused: this version stores nothing yet")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    return parser.parse_args(argv)


def version() -> str:
    try:
        return importlib.metadata.version("responses-proxy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def settings_of_args(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings of a command line. Raises: SettingsError."""
    if args.store:
        raise SettingsError("--store: this version stores nothing yet; leave it out")
    server = {key: value for key in ("host", "port") if (value := getattr(args, key)) is not None}
    upstream = {"base_url": args.upstream} if args.upstream else {}
    flags = {name: values for name, values in (("server", server), ("upstream", upstream)) if values}
    path = args.config or environ.get("RESPONSES_PROXY_CONFIG")
    return load_settings(Path(path) if path else None, environ, flags)


class _NamesRequest(logging.Filter):
    """Puts the request id on every log line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def start_logging(level: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_NamesRequest())
    form = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, handlers=[handler])


def server_config(settings: Settings) -> uvicorn.Config:
    """How the program serves itself."""
    return uvicorn.Config(
        Application(lambda: settings),
        host=settings.server.host,
        port=settings.server.port,
        log_level=settings.server.log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=75,  # longer than clients keep an idle connection, so that they do not meet it half closed
        timeout_graceful_shutdown=math.ceil(settings.server.shutdown_grace_s),
    )


def serve(settings: Settings) -> int:
    """Serves until a signal. Foreground turns get `shutdown_grace_s`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)  # the server raises the signal once more when it has stopped
    server = uvicorn.Server(server_config(settings))
    server.run()
    return 0 if server.started else 1


def _stop(number: int, frame: object) -> None:
    sys.exit(0)


async def check(settings: Settings) -> int:
    """Prints what each backend is; 1 when one of them cannot be used."""
    upstreams = Upstreams(settings.upstream)
    try:
        found = [await _check_one(upstream) for upstream in upstreams]
    finally:
        await upstreams.close()
    return 0 if found and all(found) else 1


async def _check_one(upstream: Upstream) -> bool:
    where = f"{upstream.settings.name} ({upstream.settings.base_url})"
    try:
        probe = await upstream.probe()
    except ProxyError as error:
        print(f"{where}: {error.message}")
        return False
    print(f"{where}: dialect {probe.dialect.name}, {len(probe.models)} model(s)")
    for model in probe.models:
        window = probe.windows.get(model)
        print(f"  {model}: window {f'{window} tokens' if window else 'not told'}")
    return True


def main(argv: list[str] | None = None) -> int:
    """The console script."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        settings = settings_of_args(args, os.environ)
        if not settings.upstream:
            raise SettingsError("no upstream: give --upstream URL or [[upstream]] in the settings file")
    except SettingsError as error:
        print(f"responses-proxy: {error}", file=sys.stderr)
        return 2
    start_logging(settings.server.log_level)
    if args.command == "check":
        return asyncio.run(check(settings))
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
