"""HTTP edge and composition root: routes, server-sent events out, command line, `app` and `main()`.

May not know chat messages. `app` is an ASGI application for any server, set up by the environment or the file that
RESPONSES_PROXY_CONFIG names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec
import orjson
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
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
from auth import Owners, new_key
from background import Background
from counting import Counter, by_vocabulary
from errors import (
    MethodNotAllowed,
    NotFound,
    ProxyError,
    StoreError,
    UnsupportedParameter,
)
from event_log import Follower
from frames import DONE, encode
from jobs import CLEAR, jobs_table
from keys import KeyFile, load_keys, rotate_keys
from leases import Leases
from metrics import CONTENT_TYPE, Metrics
from once import Once
from records import ignored_of, restored
from replay import replayed
from request import parse_body, parse_request
from run_verbs import RunStore
from sealing import Seals
from settings import Settings, SettingsError, load_settings, settings_of_environ
from sources import Ids, Sources
from store import StoreSettings, open_store
from stored import STORED_ROUTES, Stored, Visit, Work
from turns import Asked, Means, Turn, Turns
from upstream import Upstream, Upstreams
from verbs import KeptResponse, Purged, Store
from vocabulary import VOCABULARIES, VocabularyError, fetch, load
from watching import Watcher
from windows import WINDOW_ROUTES, Windows
from windows import Work as WindowWork

log = logging.getLogger("responses_proxy")

CLIENT_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
IN_MEMORY = ":memory:"
PURGE_EVERY_S = 3600.0
KEEP_LEARNED_EVERY_S = 10.0
INTERRUPTED = 128 + signal.SIGINT
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
JOBS_EVERY_S = 1.0
KEPT_UP_AFTER_S = 1.0
# The request that a log line belongs to.
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")


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
    log.info("left out of %s: %s", REQUEST_ID.get(), shown)
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
        caller = self._services.owners.caller(header(scope, b"authorization"))
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

    async def _answer(self, exchange: Exchange, asked: Asked) -> None:
        if asked.request.background:
            await self._answer_queued(exchange, asked)
        elif not asked.request.stream:
            async with Watched(exchange.receive):
                turn = await self._services.turns.prepare(asked)
                response = await turn.run()
            await send_json(exchange.send, response, ignored_headers(turn.ignored))
        elif asked.request.previous_response_id:
            await self._stream_patiently(exchange, asked)
        else:
            async with Watched(exchange.receive):
                turn = await self._accepted(asked)
            await self._stream(exchange, TurnStream(turn), ignored_headers(turn.ignored))

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
        await self._stream(exchange, source, ignored_headers(turn.ignored if turn else ()))

    async def _stream(self, exchange: Exchange, source: Streamed, headers: Headers) -> None:
        await EventStream(source, headers, self._keepalive_s)(*exchange)

    async def _answer_queued(self, exchange: Exchange, asked: Asked) -> None:
        """A run that was admitted is carried out whether or not its client stays."""
        background = self._services.background
        response, ignored = await background.admit(asked)
        headers = ignored_headers(ignored)
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
        headers = [(b"idempotent-replayed", b"true"), *ignored_headers(ignored)]
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
        caller = self._services.owners.caller(request.headers.get("authorization"))
        raw = b""
        if request.method == "POST":
            raw = await read_body(request.scope, request.receive, self._limits.body_bytes)
        visit = Visit(caller.owner, request.path_params, request.query_params.multi_items(), raw)
        answer = await work(self._services.stored, visit)
        if not isinstance(answer, Follower):
            return json_response(answer)
        unused = tuple(name for name in ("include", "include[]") if name in request.query_params)
        return EventStream(answer, ignored_headers(unused), self._keepalive_s)

    async def window(self, request: Request, work: WindowWork) -> Response:
        """Counts and compactions: a client that leaves stops them."""
        caller = self._services.owners.caller(request.headers.get("authorization"))
        raw = await read_body(request.scope, request.receive, self._limits.body_bytes)
        async with Watched(request.receive):
            told = await work(self._services.windows, caller, raw)
        names = {name.decode(): value.decode() for name, value in ignored_headers(told.ignored)}
        return json_response(told.body, headers=names)

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process is up."""
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        queue = await self._services.background.store.queue()
        return Response(self._services.metrics.text(queue.queued, queue.running), media_type=CONTENT_TYPE)


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
        self._routes = routes(edge)
        self._router = Router(self._routes, redirect_slashes=False)
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
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], header]
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            route = self._direct.get((scope["method"], path), self._router)
            await route(scope, receive, send_with_id)
        except Exception as error:
            if started:  # the server cuts the answer, and logs the exception
                log.error("fault of this program in %s, after its answer began", request_id)
                raise
            response = response_to(error, request_id)
            if isinstance(error, HTTPException) and response.status_code == 405:
                response.headers["allow"] = ", ".join(sorted(self._methods(scope, path)))
            await response(scope, receive, send_with_id)

    def _methods(self, scope: Scope, path: str) -> set[str]:
        """What a path can be asked for. The router names those of its first route of that path only."""
        found = [route.methods or () for route in self._routes if route.matches(scope)[0] is not Match.NONE]
        direct = {method for method, direct_path in self._direct if direct_path == path}
        return direct.union(*found)


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


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers work with."""

    turns: Turns
    background: Background
    stored: Stored
    windows: Windows
    once: Once
    owners: Owners
    metrics: Metrics


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[ASGIApp]:
    """The application with everything it needs open. Raises: SettingsError."""
    if not settings.upstream:
        raise SettingsError(
            "no upstream: give --upstream URL, [[upstream]] in the settings file or RESPONSES_PROXY_UPSTREAM__BASE_URL"
        )
    async with contextlib.AsyncExitStack() as stack:
        store = await opened_store(settings, stack)
        upstreams = Upstreams(settings.upstream)
        stack.push_async_callback(upstreams.close)
        sources = Sources(time.time, Ids(time.time))
        leases = Leases(store, sources)
        stack.push_async_callback(leases.close)
        watcher = Watcher(store)
        counter = await make_counter(settings.compaction.vocabulary)
        means = Means(upstreams, leases, make_seals(settings), sources, watcher, counter, Metrics())
        services = await make_services(settings, store, means)
        stack.push_async_callback(services.turns.ahead.close)
        background = services.background
        purging = purge_again_and_again(store, settings.store, sources)
        means.counter.remember(await store.learned())
        learning = keep_learned_again_and_again(store, means.counter)
        for work in (upstreams.look(), purging, kept_up(watcher.run), background.run(), learning):
            stack.push_async_callback(ended, asyncio.create_task(work))
        stack.push_async_callback(background.stop)
        stack.enter_context(told_to_stop(background))
        yield Outermost(Edge(settings, services), sources.new_id)


async def opened_store(settings: Settings, stack: contextlib.AsyncExitStack) -> RunStore:
    """Raises: SettingsError."""
    try:
        store = await open_store(settings.store)
    except StoreError as error:
        raise SettingsError(f"store.path: {error.message}") from error
    stack.push_async_callback(store.close)
    return store


async def make_counter(name: str) -> Counter:
    """Counts by the vocabulary where it is on disk, else by bytes."""
    tokens_in = None if name == "off" else await asyncio.to_thread(load, name)
    return Counter(by_vocabulary(tokens_in), name) if tokens_in else Counter()


def make_seals(settings: Settings) -> Seals:
    """Raises: SettingsError."""
    given, key_file = settings.sealing.keys, key_file_of(settings)
    try:
        keys = load_keys(given, key_file)
    except (ValueError, OSError) as error:
        raise SettingsError(str(error)) from error
    return Seals(keys) if given or key_file is None else Seals(keys, KeyFile(key_file).changed)


def key_file_of(settings: Settings) -> Path | None:
    """Beside the store, where that is a file."""
    path = settings.store.path
    return None if path == IN_MEMORY else Path(f"{path}.key")


async def make_services(settings: Settings, store: RunStore, means: Means) -> Services:
    """Raises: SettingsError."""
    try:
        owners = Owners(settings.auth, await store.secret("owner"))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    turns = Turns(means, settings.turns, settings.reasoning, settings.compaction)
    background = Background(store, turns, means, settings.background)
    stored = Stored(store, background, means.sources, settings.limits, settings.turns.conversation_wait_s)
    windows = Windows(turns.pasts, turns.fitter, means.sources, settings.limits)
    return Services(turns, background, stored, windows, Once(means.leases), owners, means.metrics)


@contextlib.contextmanager
def told_to_stop(background: Background) -> Iterator[None]:
    """Runs are given back at the first signal to stop, while the server waits for the answers that it gives still."""
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}

    def tell(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed by now
            loop.call_soon_threadsafe(background.begin_to_stop)
        before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        before |= {number: found for number in STOP_SIGNALS if callable(found := signal.getsignal(number))}
    for number in before:
        signal.signal(number, tell)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is tell:  # else somebody has put theirs before it, and will call it
                signal.signal(number, handler)


async def ended(task: asyncio.Task[None]) -> None:
    """Cancels a task of the application and waits for its end."""
    task.cancel()
    await asyncio.wait({task})


async def kept_up(work: Callable[[], Awaitable[None]]) -> None:
    """Work that others wait for: a fault in it does not end it."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("begun again after a fault of this program")
        await asyncio.sleep(KEPT_UP_AFTER_S)


async def purge_again_and_again(store: Store, settings: StoreSettings, sources: Sources) -> None:
    """One purge that fails does not end retention."""
    while True:
        try:
            await purge(store, settings, sources.clock())
        except StoreError as error:
            log.warning("could not purge: %s", error.message)
        except Exception:
            log.exception("could not purge")
        await asyncio.sleep(PURGE_EVERY_S)


async def keep_learned_again_and_again(store: Store, counter: Counter) -> None:
    """What was learned about models survives a restart."""
    while True:
        try:
            await asyncio.sleep(KEEP_LEARNED_EVERY_S)
        finally:
            await keep_learned(store, counter)


async def keep_learned(store: Store, counter: Counter) -> None:
    if facts := counter.changed():
        try:
            await store.keep_learned(facts)
        except StoreError as error:
            log.warning("what was learned of models could not be kept: %s", error.message)


async def purge(store: Store, settings: StoreSettings, now: float) -> Purged:
    """Forgets what is older than `retention_days`; 0 keeps everything. Raises: StoreError."""
    before_at = now - settings.retention_days * 86_400 if settings.retention_days else 0.0
    purged = await store.purge(before_at, now)
    if purged.responses:
        log.info("purged %d responses, gave back %d bytes", purged.responses, purged.freed_bytes)
    return purged


app = Application(settings_of_environ)


# -- command line ------------------------------------------------------------------------------------------------------


COMMANDS = ("serve", "check", "purge", "key", "keys", "jobs", "fetch-vocab")
# Command -> what may follow it.
WORDS: dict[str, tuple[str | None, ...]] = {"keys": ("rotate",), "fetch-vocab": (None, *VOCABULARIES)}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="responses-proxy", description="The Responses API in front of any chat-completions backend."
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="serve", help="serve is the default")
    parser.add_argument("word", nargs="?", help="keys: rotate; fetch-vocab: which vocabulary (o200k_base)")
    parser.add_argument("--upstream", metavar="URL", help="base URL of the backend, e.g. http://localhost:11434/v1")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8080)")
    parser.add_argument("--config", metavar="FILE", help="settings file, see config.example.toml")
    parser.add_argument(
        "--store",
        metavar="FILE",
        nargs="?",
        const="",
        help="file that keeps responses (responses.db), or :memory:; `check --store` looks for damage in it",
    )
    parser.add_argument("--watch", action="store_true", help="`jobs --watch` shows them again every second")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    args = parser.parse_intermixed_args(argv)
    words = WORDS.get(args.command, (None,))
    if args.word not in words:
        parser.error(f"after '{args.command}' comes {' or '.join(filter(None, words)) or 'no other word'}")
    return args


def version() -> str:
    try:
        return importlib.metadata.version("responses-proxy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def settings_of_args(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings of a command line. Raises: SettingsError."""
    server = {key: value for key in ("host", "port") if (value := getattr(args, key)) is not None}
    upstream = {"base_url": args.upstream} if args.upstream else {}
    store = {"path": args.store} if args.store else {}
    given = (("server", server), ("upstream", upstream), ("store", store))
    flags = {name: values for name, values in given if values}
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


class Server(uvicorn.Server):
    """A second signal of either kind ends it at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> int:
    """Serves until a signal. Foreground turns get `shutdown_grace_s`."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)  # the server raises the signal once more when it has stopped
    server = Server(server_config(settings))
    gc.collect()
    gc.freeze()  # what the program consists of is never garbage
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


async def check_store(settings: Settings) -> int:
    """Prints what is damaged in the store; 1 when something is."""
    async with contextlib.AsyncExitStack() as stack:
        problems = await (await opened_store(settings, stack)).problems()
    print("\n".join(problems) or f"{settings.store.path}: ok")
    return 1 if problems else 0


async def purge_once(settings: Settings) -> int:
    """The command `purge`, for a timer of the system."""
    async with contextlib.AsyncExitStack() as stack:
        purged = await purge(await opened_store(settings, stack), settings.store, time.time())
    print(f"{settings.store.path}: {purged.responses} responses purged, {purged.freed_bytes} bytes given back")
    return 0


async def show_jobs(settings: Settings, is_watched: bool) -> int:
    """The command `jobs`: the background responses that have not ended, again every second when they are watched."""
    async with contextlib.AsyncExitStack() as stack:
        store = await opened_store(settings, stack)
        print(jobs_table(await store.runs(), time.time()))
        while is_watched:
            await asyncio.sleep(JOBS_EVERY_S)
            print(CLEAR + jobs_table(await store.runs(), time.time()), flush=True)
    return 0


def print_key(settings: Settings, word: str | None) -> int:
    """The command `key`: a fresh client key, shown this once, and its line for the section [auth.keys]."""
    key, hashed = new_key()
    print(f'for the client:    {key}\nfor [auth.keys]:   name = "{hashed}"')
    return 0


def rotate(settings: Settings, word: str | None) -> int:
    """The command `keys rotate`: puts a fresh sealing key first. Raises: SettingsError."""
    key_file = key_file_of(settings)
    try:
        print(rotate_keys(settings.sealing.keys, key_file))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise SettingsError(f"{key_file}: {error.strerror}") from error
    return 0


def fetch_vocabulary(settings: Settings, name: str | None) -> int:
    """The command `fetch-vocab`: brings a vocabulary onto this machine, so that requests find it; 1 when it cannot."""
    name = name or next(iter(VOCABULARIES))
    try:
        print(f"{name}: {fetch(name)}")
    except VocabularyError as error:
        print(f"responses-proxy: {error}", file=sys.stderr)
        return 1
    return 0


async def _check_one(upstream: Upstream) -> bool:
    where = f"{upstream.settings.name} ({upstream.settings.base_url})"
    try:
        probe = await upstream.probe()
    except ProxyError as error:
        print(f"{where}: {error.message}")
        return False
    question = {"model": next(iter(probe.models), ""), "messages": [{"role": "user", "content": "Hello"}]}
    counts = "yes" if await upstream.count_tokens(question) else "no"
    print(f"{where}: dialect {probe.dialect.name}, {len(probe.models)} model(s), tokenizer: {counts}")
    for model in probe.models:
        window = await upstream.window_tokens(model)
        print(f"  {model}: window {f'{window} tokens' if window else 'not told'}")
    return True


# Commands that need neither a store nor a backend.
COMMANDS_ALONE: dict[str, Callable[[Settings, str | None], int]] = {
    "key": print_key,
    "keys": rotate,
    "fetch-vocab": fetch_vocabulary,
}


def main(argv: list[str] | None = None) -> int:
    """The console script."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        settings = settings_of_args(args, os.environ)
        start_logging(settings.server.log_level)
        return run_command(args, settings)
    except SettingsError as error:
        print(f"responses-proxy: {error}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"responses-proxy: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def run_command(args: argparse.Namespace, settings: Settings) -> int:
    """The exit code of a command. Raises: SettingsError, StoreError."""
    if args.command in COMMANDS_ALONE:
        return COMMANDS_ALONE[args.command](settings, args.word)
    if args.command in ("purge", "jobs") or (args.command == "check" and args.store is not None):
        if not Path(settings.store.path).is_file():
            raise SettingsError(f"store.path: there is no file '{settings.store.path}'")
        if args.command == "jobs":
            return asyncio.run(show_jobs(settings, args.watch))
        return asyncio.run(purge_once(settings) if args.command == "purge" else check_store(settings))
    if not settings.upstream:
        raise SettingsError("no upstream: give --upstream URL or [[upstream]] in the settings file")
    return asyncio.run(check(settings)) if args.command == "check" else serve(settings)


if __name__ == "__main__":
    sys.exit(main())
