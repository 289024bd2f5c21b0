"""A window on its way to a backend: which one, in which dialect, and the chat request that it becomes.

May not know the store, nor events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from auth import Caller
from dialects import Dialect
from errors import InvalidRequest
from gates import NO_TERMS, PATIENT, WITH_OTHER, Terms
from history import HISTORY
from request import TurnRequest, refuse_unused
from routing import Upstreams, may_go_on
from translation import Rendered, has_files, render
from upstream import Upstream
from upstream_errors import UpstreamError

Json = dict[str, Any]


class Way(msgspec.Struct, frozen=True):
    """A backend for a request, its dialect, and the model's name there.

    `spoken_to`: the backend that the client's own key may go to; `others`: those that are left to answer in place of
    this one, best first; `because`: why the one that the model belongs to did not.
    """

    upstream: Upstream
    dialect: Dialect
    model: str
    spoken_to: Upstream
    others: tuple[Upstream, ...] = ()
    because: UpstreamError | None = None

    @property
    def name(self) -> str:
        """Of the model, in all backends."""
        return f"{self.upstream.settings.name} {self.model}"

    @property
    def is_fallback(self) -> bool:
        return self.because is not None

    def headers(self, caller: Caller, spoken_to: Upstream) -> Mapping[str, str]:
        """What of the caller's goes along: its own key to the backend that it speaks to, and to no other one."""
        return caller.passed if self.upstream is spoken_to else caller.trace

    def terms(self, request: TurnRequest) -> Terms:
        """Nobody waits for a background turn: it stands in line for as long as it takes."""
        if self.others:
            return WITH_OTHER
        return PATIENT if request.background else NO_TERMS


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
        """To the backend that the model belongs to."""
        if only := self._upstreams.only:
            return Way(only, await only.dialect(), model, only)
        if not self._upstreams.names(model):
            await self._upstreams.known(model)
        upstream, name = self._upstreams.route(model)
        spoken_to, others = self._upstreams.spoken_to(model), self._upstreams.fallbacks(upstream)
        return Way(upstream, await upstream.dialect(), name, spoken_to, others)

    async def way_on(self, model: str, way: Way, error: UpstreamError) -> Way:
        """To the next backend that may answer in the place of one that failed.

        Raises: the error, where the request itself is at fault or no backend is left.
        """
        because = way.because or error
        if not may_go_on(error, at_fallback=way.is_fallback):
            raise error
        if not way.others:
            raise error if may_go_on(error, at_fallback=False) else because
        upstream, *others = way.others
        self._upstreams.falls_back(way.upstream, upstream, error)
        name = upstream.settings.aliases.get(model, model)
        return Way(upstream, await upstream.dialect(), name, way.spoken_to, tuple(others), because)

    async def rendered(
        self, request: TurnRequest, window: list[Json], left_out: tuple[str, ...], way: Way | None = None
    ) -> Ready:
        """Raises: InvalidRequest for what cannot be rendered, or comes to nothing."""
        ready = await self.ready(request, window, left_out, way)
        if not ready.rendered.body["messages"] or (request.is_trigger and not window):
            raise InvalidRequest("Invalid 'input': nothing in it is for the model.", param="input")
        return ready

    async def ready(
        self, request: TurnRequest, window: list[Json], left_out: tuple[str, ...], way: Way | None = None
    ) -> Ready:
        """`way`: where it is known already. Raises: InvalidRequest."""
        way = way or await self.way(request.model)
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
