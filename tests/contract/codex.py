"""Codex as its users run it: a process of its own, with a home of its own, that reaches nothing but loopback."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node import COMMANDS
from processes import Client

Json = dict[str, Any]
Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

COMMAND = COMMANDS / "codex"
# Codex says of the third that it is for places without anything of worth. It stands in a folder of the test.
FLAGS = ("--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--strict-config")


def mcp_server(name: str, script: Path) -> str:
    """The settings of an MCP server that is a script."""
    return f"\n[mcp_servers.{name}]\ncommand = {json.dumps(sys.executable)}\nargs = [{json.dumps(str(script))}]\n"


# -- what Codex can reach ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(connected: Connected) -> AsyncIterator[int]:
    """The port of a server of loopback."""
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@dataclass
class World:
    """What stands for the rest of the world: it refuses everybody, and remembers who was asked for."""

    asked: list[str] = field(default_factory=list)

    async def refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readline()).decode().strip())
        writer.close()


@dataclass
class Line:
    """Passes on what goes between Codex and the proxy, and remembers with what each connection began."""

    port: int
    began: list[str] = field(default_factory=list)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readline()
        self.began.append(first.decode().strip())
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        far_writer.write(first)
        await asyncio.gather(_pass(reader, far_writer), _pass(far_reader, writer))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


# -- Codex -------------------------------------------------------------------------------------------------------------


@dataclass
class Codex:
    """One home and one project folder; each `run` is a process."""

    config: Path
    client: Client

    @property
    def project(self) -> Path:
        return self.client.folder

    def change(self, said: str, instead: str) -> None:
        """Rewrites a part of the settings, which has to be there."""
        config = self.config.read_text()
        assert said in config
        self.config.write_text(config.replace(said, instead))

    async def run(self, *arguments: str) -> list[Json]:
        """The events that Codex wrote in a run that went well."""
        written = await self.client.run(COMMAND, "exec", *FLAGS, *arguments)
        return [json.loads(line) for line in written.splitlines()]


def installed(folder: Path, config: str, world_port: int) -> Codex:
    """Codex with these settings, which are all that it knows."""
    home, project = folder / "home", folder / "project"
    project.mkdir(parents=True)
    (home / ".codex").mkdir(parents=True)
    (home / ".codex" / "config.toml").write_text(config)
    elsewhere = f"http://127.0.0.1:{world_port}"
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), elsewhere)
    own = {"HOME": str(home), "CODEX_HOME": str(home / ".codex")}
    environment = {"PATH": os.environ["PATH"], "NO_PROXY": "127.0.0.1", **proxies, **own}
    return Codex(home / ".codex" / "config.toml", Client(project, environment))


def done(events: list[Json], kind: str) -> list[Json]:
    """The items of one kind that were completed."""
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item for item in items if item["type"] == kind]


def said(events: list[Json]) -> str:
    """The last thing that Codex said."""
    text: str = done(events, "agent_message")[-1]["text"]
    return text
