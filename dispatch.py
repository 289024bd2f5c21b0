"""A window on its way to a backend: which one, in which dialect, and the chat request that it becomes.

May not know the store, nor events.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from dialects import Dialect
from errors import InvalidRequest
from history import HISTORY
from request import TurnRequest, refuse_unused
from translation import Rendered, has_files, render
from upstream import Upstream, Upstreams

Json = dict[str, Any]


class Way(msgspec.Struct, frozen=True):
    """The backend of a request, its dialect, and the model's name there."""

    upstream: Upstream
    dialect: Dialect
    model: str

    @property
    def name(self) -> str:
        """Of the model, in all backends."""
        return f"{self.upstream.settings.name} {self.model}"


class Ready(msgspec.Struct, frozen=True):
    """A rendered request and where it goes; `ignored` names what was left out."""

    way: Way
    rendered: Rendered
    ignored: tuple[str, ...]


class Renderer:
    """Renders requests; `strict`: what would be left out is refused."""

    def __init__(self, upstreams: Upstreams, *, strict: bool) -> None:
        self._upstreams = upstreams
        self._strict = strict

    async def way(self, model: str) -> Way:
        upstream, name = self._upstreams.route(model)
        return Way(upstream, await upstream.dialect(), name)

    async def rendered(self, request: TurnRequest, window: list[Json], left_out: tuple[str, ...]) -> Ready:
        """Raises: InvalidRequest for what cannot be rendered, or comes to nothing."""
        ready = await self.ready(request, window, left_out)
        if not ready.rendered.body["messages"] or (request.is_trigger and not window):
            raise InvalidRequest("Invalid 'input': nothing in it is for the model.", param="input")
        return ready

    async def ready(self, request: TurnRequest, window: list[Json], left_out: tuple[str, ...]) -> Ready:
        """Raises: InvalidRequest."""
        way = await self.way(request.model)
        if has_files(window):
            rendered = await asyncio.to_thread(render, request, window, way.dialect, way.model)
        else:
            rendered = render(request, window, way.dialect, way.model)
        ignored = rendered.ignored + left_out
        self.refuse_ignored(ignored)
        if request.stream or request.background:
            rendered.body["stream"] = True
            if way.dialect.stream_usage:
                rendered.body["stream_options"] = {"include_usage": True}
        return Ready(way, rendered, ignored)

    def refuse_ignored(self, ignored: tuple[str, ...]) -> None:
        """Raises: UnsupportedParameter where the settings are strict."""
        if self._strict and (refused := tuple(name for name in ignored if not name.startswith(HISTORY))):
            raise refuse_unused(refused)
