"""A database of its own for a module of tests that lose it. A plugin that they name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from losses import SECRET, Site
from postgres_program import Server
from postgres_server import OPTIONS, server_with
from relay import Relay


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # What was acknowledged has to survive a kill.
    options = {"port": str(free_port()), "listen_addresses": "127.0.0.1", "synchronous_commit": "on"}
    server = server_with({**OPTIONS, **options})
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
async def site(server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr("postgres_pool.GRACE_S", 0.5)
    async with Relay(server.port).running() as relay:
        yield Site(server, relay, f"postgresql://postgres:{SECRET}@127.0.0.1:{relay.port}/postgres")
    await asyncio.to_thread(server.restore)
