"""A pooler in transaction mode for tests: what PgBouncer before 1.21 does, and in the worst order.

Each transaction of a client goes to the connection that was not used for the longest time, so hardly ever to the one of
the transaction before. Named statements are not followed: they are known where they were prepared. Like PgBouncer it
knows no startup parameters but a few, makes up the number of the process that it tells, and drops what a connection
says while no client has it. What `PGBOUNCER` names is used in its place.

Source: postgresql.org/docs/current/protocol-message-formats.html, pgbouncer.org/config.html
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PROTOCOL, CANCEL, SSL = 196608, 80877102, 80877103
KNOWN = {"user", "database", "client_encoding", "application_name"}
SIZE, PORT = 5, 6432
NOBODY = 65534
OK = struct.pack("!I", 0)
# After these a server says when it is ready again: Query, Sync.
ENDS_WITH_READY = (b"Q", b"S")

Key = tuple[int, int]


def numbers(body: bytes) -> Key:
    first, second = struct.unpack("!II", body)
    return first, second


def packed(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def startup(given: dict[str, str]) -> bytes:
    body = struct.pack("!I", PROTOCOL) + "".join(f"{name}\0{value}\0" for name, value in given.items()).encode() + b"\0"
    return struct.pack("!I", len(body) + 4) + body


async def message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    kind = await reader.readexactly(1)
    (length,) = struct.unpack("!I", await reader.readexactly(4))
    return kind, await reader.readexactly(length - 4)


class Server:
    """One connection to the database, and who has it just now."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.client: Client | None = None
        self.greeting = b""
        self.key: Key = (0, 0)

    async def log_in(self, given: dict[str, str]) -> None:
        self.writer.write(startup(given))
        while True:
            kind, body = await message(self.reader)
            if kind == b"S":
                self.greeting += packed(kind, body)
            if kind == b"K":
                self.key = numbers(body)
            if kind == b"Z":
                return
            if kind == b"E" or (kind == b"R" and body != OK):
                raise ConnectionError("the pooler of the tests cannot log in there")

    async def pump(self) -> None:
        """Until the connection ends."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, body = await message(self.reader)
                if self.client is not None:
                    self.client.hear(kind, body)
        self.writer.close()


class Client:
    """One connection of a program, and which of the pooler's it has."""

    def __init__(self, home: Pooler, writer: asyncio.StreamWriter) -> None:
        self.home, self.writer = home, writer
        self.key: Key = numbers(os.urandom(8))
        self.server: Server | None = None
        self.is_owed = 0

    async def say(self, kind: bytes, body: bytes) -> None:
        if self.server is None:
            self.server = await self.home.idle.get()
            self.server.client = self
        self.is_owed += kind in ENDS_WITH_READY
        self.server.writer.write(packed(kind, body))

    def hear(self, kind: bytes, body: bytes) -> None:
        self.writer.write(packed(kind, body))
        if kind != b"Z":
            return
        self.is_owed -= 1
        if body == b"I" and not self.is_owed and self.server is not None:
            self.server.client = None
            self.home.idle.put_nowait(self.server)
            self.server = None


class Pooler:
    """Serves at a socket in a folder, in front of the database of that address, for as long as it is `running`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.host = query.pop("host", "") or parts.hostname or ""
        self.port = int(query.pop("port", "") or parts.port or 5432)
        self.given = {"user": parts.username or "postgres", "database": parts.path[1:] or "postgres", **query}
        self.idle: asyncio.Queue[Server] = asyncio.Queue()
        self.clients: dict[Key, Client] = {}
        self.is_over = False
        self.greeting = b""
        self.servers: list[Server] = []
        self.tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[None]:
        for _ in range(SIZE):
            await self.add_server()
        listener = await asyncio.start_unix_server(self.serve, folder / f".s.PGSQL.{PORT}")
        try:
            yield
        finally:
            listener.close()
            self.is_over = True
            for client in self.clients.values():
                client.writer.close()
            for server in self.servers:
                server.writer.close()
            await asyncio.wait(self.tasks)
            await asyncio.gather(*(server.writer.wait_closed() for server in self.servers), return_exceptions=True)

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.host.startswith("/"):
            return await asyncio.open_unix_connection(f"{self.host}/.s.PGSQL.{self.port}")
        return await asyncio.open_connection(self.host, self.port)

    async def add_server(self) -> None:
        server = Server(*await self.dial())
        await server.log_in(self.given)
        self.servers.append(server)
        self.own(asyncio.create_task(server.pump()))
        self.greeting = server.greeting
        self.idle.put_nowait(server)

    def own(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.own(asyncio.current_task())
        client = Client(self, writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            if await self.welcomes(client, reader):
                self.clients[client.key] = client
                while (found := await message(reader))[0] != b"X":
                    await client.say(*found)
        self.clients.pop(client.key, None)
        if client.server is not None:  # in the middle of a transaction, which ends with its connection
            client.server.writer.close()
            if not self.is_over:
                await self.add_server()
        writer.close()

    async def welcomes(self, client: Client, reader: asyncio.StreamReader) -> bool:
        code, body = await self.first_of(client, reader)
        if code == CANCEL:
            await self.cancel(numbers(body))
            return False
        names = {name for name in body.decode().split("\0")[::2] if name}
        if names - KNOWN:
            text = f"unsupported startup parameter: {', '.join(sorted(names - KNOWN))}"
            client.writer.write(packed(b"E", f"SFATAL\0C08P01\0M{text}\0\0".encode()))
            return False
        key = packed(b"K", struct.pack("!II", *client.key))
        client.writer.write(packed(b"R", OK) + self.greeting + key + packed(b"Z", b"I"))
        return True

    async def first_of(self, client: Client, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        """The first message of a client, once it knows that nothing is encrypted."""
        while True:
            length, code = numbers(await reader.readexactly(8))
            body = await reader.readexactly(length - 8)
            if code != SSL:
                return code, body
            client.writer.write(b"N")

    async def cancel(self, key: Key) -> None:
        client = self.clients.get(key)
        if client is not None and client.server is not None:
            _, writer = await self.dial()
            writer.write(struct.pack("!IIII", 16, CANCEL, *client.server.key))
            writer.close()


# -- the real one ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pgbouncer(program: str, pooler: Pooler, folder: Path) -> AsyncIterator[None]:
    schema = pooler.given["search_path"]
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        f"""[databases]
* = host={pooler.host} port={pooler.port} user={pooler.given["user"]} connect_query='SET search_path TO {schema}'
[pgbouncer]
listen_port = {PORT}
unix_socket_dir = {folder}
auth_type = any
pool_mode = transaction
default_pool_size = {SIZE}
server_round_robin = 1
"""
    )
    as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    if as_user:
        os.chown(folder, NOBODY, NOBODY)
    process = await asyncio.create_subprocess_exec(program, "-q", settings, **as_user)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(20):
            while not await serves(folder):  # noqa: ASYNC110 - it says nothing when it does
                await asyncio.sleep(0.01)
        yield
    finally:
        process.terminate()
        await process.wait()


async def serves(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_unix_connection(folder / f".s.PGSQL.{PORT}")
        writer.close()
        return True
    return False


@contextlib.asynccontextmanager
async def pooled(url: str) -> AsyncIterator[str]:
    """The address of a pooler in front of that database and schema."""
    folder = Path(tempfile.mkdtemp(prefix="pool-"))  # short: the path of a socket may have 107 bytes
    pooler, program = Pooler(url), os.environ.get("PGBOUNCER")
    try:
        async with pgbouncer(program, pooler, folder) if program else pooler.running(folder):
            yield f"postgresql://{pooler.given['user']}@/{pooler.given['database']}?host={folder}&port={PORT}"
    finally:
        shutil.rmtree(folder)
