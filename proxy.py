"""The composition root and the one file that is run: `app` and `main()`.

May not know what a request says. `app` is an ASGI application for any server, set up by the environment or by the file
that RESPONSES_PROXY_CONFIG names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import sys
from asyncio import BaseTransport
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from answers import Receive, Scope, Send
from commands import COMMANDS_ALONE, check, check_store, copy, purge_once, show_jobs
from edge import Edge
from errors import StoreError
from listening import HeadLimit, tell_where, unix_listener
from logs import SOCKET_LOG, start_logging
from outermost import Outermost, with_cors
from services import opened, version
from settings import Settings, SettingsError, load_settings, settings_of_environ
from sockets import STOPPING
from store import is_database
from upkeep import STOP_SIGNALS
from vocabulary import VOCABULARIES

INTERRUPTED = 128 + signal.SIGINT


# -- the application ---------------------------------------------------------------------------------------------------


class Application:
    """The ASGI application; it opens what it needs when the server starts it."""

    def __init__(self, load: Callable[[], Settings]) -> None:
        self._load = load
        self._served: Callable[[Scope, Receive, Send], Awaitable[None]] | None = None

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
            async with opened(settings) as services:
                served = Outermost(Edge(settings, services), services.observer, services.sources.new_id)
                self._served = with_cors(served, settings.server.cors_origins)
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except (SettingsError, StoreError) as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.shutdown.complete"})


def settings_for_server() -> Settings:
    """What `uvicorn proxy:app` runs with, its log lines among it. Raises: SettingsError."""
    settings = settings_of_environ()
    start_logging(settings.server.log_level, settings.server.log_format)
    return settings


app = Application(settings_for_server)


# -- command line ------------------------------------------------------------------------------------------------------


COMMANDS = ("serve", "check", "purge", "key", "keys", "jobs", "copy", "fetch-vocab")
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
    parser.add_argument("--unix-socket", metavar="PATH", help="file to listen on, instead of an address and a port")
    parser.add_argument("--config", metavar="FILE", help="settings file, see config.example.toml")
    parser.add_argument(
        "--store",
        metavar="FILE",
        nargs="?",
        const="",
        help="file that keeps responses (responses.db), or :memory:; `check --store` looks for damage in it",
    )
    parser.add_argument(
        "--from", metavar="STORE", dest="source", help="copy: the store that is copied, a file or a database"
    )
    parser.add_argument("--to", metavar="STORE", dest="target", help="copy: the store that it becomes, empty as yet")
    parser.add_argument("--watch", action="store_true", help="`jobs --watch` shows them again every second")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    args = parser.parse_intermixed_args(argv)
    words = WORDS.get(args.command, (None,))
    if args.word not in words:
        parser.error(f"after '{args.command}' comes {' or '.join(filter(None, words)) or 'no other word'}")
    return args


def settings_of_args(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings of a command line. Raises: SettingsError."""
    server = {key: value for key in ("host", "port", "unix_socket") if (value := getattr(args, key)) is not None}
    upstream = {"base_url": args.upstream} if args.upstream else {}
    store = {"path": args.store} if args.store else {}
    given = (("server", server), ("upstream", upstream), ("store", store))
    flags = {name: values for name, values in given if values}
    path = args.config or environ.get("RESPONSES_PROXY_CONFIG")
    return load_settings(Path(path) if path else None, environ, flags)


class SocketProtocol(WebSocketsSansIOProtocol):
    """A WebSocket that a stopping server leaves to the application, which ends it when its responses have ended."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.logger = logging.getLogger(SOCKET_LOG)

    async def send(self, message: Any) -> None:
        """A refusal ends the handshake, too; the server would log an error for each."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent:
            self.queue.put_nowait(cast(Any, {"type": STOPPING}))
        else:
            super().shutdown()


def server_config(settings: Settings) -> uvicorn.Config:
    """How the program serves itself."""
    return uvicorn.Config(
        Application(lambda: settings),
        host=settings.server.host,
        port=settings.server.port,
        http=HeadLimit,
        log_level=settings.server.log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws=SocketProtocol,
        ws_max_size=settings.limits.body_bytes,
        ws_ping_interval=settings.websocket.ping_s,
        ws_ping_timeout=settings.websocket.ping_timeout_s,
        ws_per_message_deflate=False,  # a deflated event costs more time than its bytes do on the way
        timeout_keep_alive=75,  # longer than clients keep an idle connection, so that they do not meet it half closed
        timeout_graceful_shutdown=math.ceil(settings.server.shutdown_grace_s),
    )


class Server(uvicorn.Server):
    """Says where it listens; a second signal of either kind ends it at once."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(server_config(settings))
        self._settings = settings

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        addresses = [listener.getsockname() for server in self.servers for listener in server.sockets]
        tell_where(self._settings.server, self._settings.auth.mode, addresses)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> int:
    """Serves until a signal. Foreground turns get `shutdown_grace_s`. Raises: SettingsError."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)  # the server raises the signal once more when it has stopped
    server = Server(settings)
    path, mode = settings.server.unix_socket, int(settings.server.unix_socket_mode, 8)
    gc.collect()
    gc.freeze()  # what the program consists of is never garbage
    with unix_listener(path, mode) if path else contextlib.nullcontext() as listener:
        server.run([listener] if listener else None)
    return 0 if server.started else 1


def _stop(number: int, frame: object) -> None:
    sys.exit(0)


def main(argv: list[str] | None = None) -> int:
    """The console script."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        settings = settings_of_args(args, os.environ)
        start_logging(settings.server.log_level, settings.server.log_format, is_served=args.command == "serve")
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
    if args.command == "copy":
        return asyncio.run(copy(settings, args.source, args.target))
    if args.command in ("purge", "jobs") or (args.command == "check" and args.store is not None):
        if not is_database(settings.store.path) and not Path(settings.store.path).is_file():
            raise SettingsError(f"store.path: there is no file '{settings.store.path}'")
        if args.command == "jobs":
            return asyncio.run(show_jobs(settings, args.watch))
        return asyncio.run(purge_once(settings) if args.command == "purge" else check_store(settings))
    if not settings.upstream:
        raise SettingsError("no upstream: give --upstream URL or [[upstream]] in the settings file")
    return asyncio.run(check(settings)) if args.command == "check" else serve(settings)


if __name__ == "__main__":
    sys.exit(main())
