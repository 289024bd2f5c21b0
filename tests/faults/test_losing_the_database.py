"""A database that is stopped, killed, frozen or cut off: what clients are told, and how it goes on when it is back."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import aiohttp
import pytest
from conftest import App, StartApp
from postgres_server import Server
from relay import Relay
from scripted import END, Backend, Script, chunk, streamed

KEY = base64.b64encode(bytes(32)).decode()
SECRET = "a-word-that-passes"
# A second of patience where the default has ten.
LIMIT_S = 3.0
QUICK = {"statement_timeout_s": LIMIT_S, "busy_timeout_s": 1.0, "connect_timeout_s": 2.0, "pool_size": 4}
# What else a machine under load may take.
SLACK_S = 4.0
DEADLINE_S = 20.0


class Site(NamedTuple):
    """A database, and the way to it."""

    server: Server
    relay: Relay
    url: str

    def store(self, **more: Any) -> dict[str, Any]:
        return {"store": {"path": self.url, **QUICK, **more}, "sealing": {"keys": (KEY,)}}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(port=str(free_port()), listen_addresses="127.0.0.1")
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


LOSSES: dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]] = {
    "stopped": (lambda site: site.server.stop(), lambda site: site.server.start()),
    "killed": (lambda site: site.server.kill(), lambda site: site.server.start()),
    "frozen": (lambda site: site.server.freeze(), lambda site: site.server.thaw()),
    "cut off": (lambda site: site.relay.cut(), lambda site: site.relay.heal()),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


async def lose(site: Site, loss: str) -> None:
    await on_its_side(LOSSES[loss][0], site)


async def bring_back(site: Site, loss: str) -> None:
    await on_its_side(LOSSES[loss][1], site)


async def on_its_side(act: Callable[[Site], None], site: Site) -> None:
    """A relay belongs to this loop; a server takes its time."""
    act(site) if "relay" in act.__code__.co_names else await asyncio.to_thread(act, site)
