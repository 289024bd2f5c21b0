"""Requests that are carried through to a backend, or on to the next one: the body out as it comes in, the answer back.

May not know routes, nor what is asked or answered, but for the model that a body names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote

from answers import ClientGone, Receive, Scope, Send, upstream_header
from auth import Caller
from errors import InvalidRequest, ProxyError
from gates import NO_TERMS, WITH_OTHER, Terms
from incoming import Incoming
from passing import (
    Allowed,
    PassthroughSettings,
    given_headers,
    keeps_nothing,
    model_in,
    sent_headers,
    target_of,
    with_model,
)
from relaying import Body, Outgoing, Relayed
from routing import Upstreams, may_go_on
from upstream import Upstream
from upstream_errors import UpstreamError

log = logging.getLogger("responses_proxy.carrier")


class Way(NamedTuple):
    """A backend for a request, and the body that goes there.

    `spoken_to`: the backend that the client's own key may go to; `others`: those that are left to answer in place of
    this one, best first; `because`: why the one that the model belongs to did not; `given`: the body as the client
    wrote it, which names the `model`.
    """

    upstream: Upstream
    body: Body
    spoken_to: Upstream
    others: tuple[Upstream, ...] = ()
    because: UpstreamError | None = None
    given: bytes = b""
    model: str = ""

    @property
    def terms(self) -> Terms:
        return WITH_OTHER if self.others else NO_TERMS


class Carried(NamedTuple):
    """A client's request, and what a backend is asked for."""

    scope: Scope
    target: str
    caller: Caller

    @property
    def content_type(self) -> str:
        value: bytes = self.scope["header_values"].get(b"content-type", b"")
        return value.decode("latin-1")

    def outgoing(self, way: Way) -> Outgoing:
        """The client's own credentials go to the backend that it speaks to, and to no other one."""
        is_theirs = self.caller.bearer is not None and way.upstream is way.spoken_to
        headers = sent_headers(self.scope["headers"], with_credentials=is_theirs)
        if isinstance(way.body, Incoming) and way.body.length:
            headers.append(("content-length", way.body.length.decode("ascii")))
        return Outgoing(self.scope["method"], self.target, headers, way.body)

    def passed(self, way: Way) -> Mapping[str, str]:
        return self.caller.passed if way.upstream is way.spoken_to else self.caller.trace


class Carrier:
    """Carries requests to the backends."""

    def __init__(self, upstreams: Upstreams, limit_bytes: int, settings: PassthroughSettings) -> None:
        self._upstreams = upstreams
        self._limit_bytes = limit_bytes
        self._allowed = Allowed(settings)
        tables = [upstream.settings for upstream in upstreams]
        self._goes_by_model = len(tables) > 1 or any(each.aliases for each in tables)

    def target(self, scope: Scope) -> str:
        """What a backend is to be asked for. Raises: NotFound, MethodNotAllowed, InvalidRequest."""
        target = target_of(scope["method"], _raw_path(scope), scope["query_string"])
        self._allowed.check(target)
        return target

    async def carry(self, carried: Carried, receive: Receive, send: Send) -> None:
        """Raises: ProxyError, ClientGone; once the answer has begun, a fault cuts the connection instead."""
        has_begun = False
        try:
            async with Incoming(carried.scope, receive, self._limit_bytes) as incoming:
                way, relayed = await self._open(carried, incoming)
                has_begun = True
                await _answer(relayed, way, carried.scope, send)
        except (ClientGone, ProxyError) as fault:
            if not has_begun:
                raise
            # Nothing more is sent: the server cuts the connection, so that nobody takes this for the end.
            log.warning("an answer was cut: %s", getattr(fault, "logged", "its client left"))
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _open(self, carried: Carried, incoming: Incoming) -> tuple[Way, Relayed]:
        """The first answer that is for the client. Raises: ProxyError, ClientGone."""
        way = await self._way(carried, incoming)
        while True:
            relayed, error = await _tried(carried, way)
            way_on = self._way_on(carried, way, error) if error else None
            if way_on is None:
                return way, _settled(way, relayed, error)
            if relayed is not None:
                relayed.close()
            way = way_on

    async def _way(self, carried: Carried, incoming: Incoming) -> Way:
        """A body is looked at only where its model decides something."""
        first = next(iter(self._upstreams))
        if not (self._goes_by_model and incoming.is_there):
            return Way(first, await incoming.begun(), first)
        raw = await incoming.whole()
        model = model_in(raw, carried.content_type)
        if model is None:
            return Way(first, raw, first)
        if not self._upstreams.names(model):
            await self._upstreams.known(model)
        upstream, name = self._upstreams.route(model)
        others = self._upstreams.fallbacks(upstream) if keeps_nothing(carried.scope["method"], carried.target) else ()
        body = _named(raw, carried, model, name)
        return Way(upstream, body, self._upstreams.spoken_to(model), others, given=raw, model=model)

    def _way_on(self, carried: Carried, way: Way, error: UpstreamError) -> Way | None:
        """To the next backend that may answer; None where none is left, or the request itself is at fault."""
        if not (way.others and may_go_on(error, at_fallback=way.because is not None)):
            return None
        upstream, *others = way.others
        try:
            body = _named(way.given, carried, way.model, upstream.settings.aliases.get(way.model, way.model))
        except InvalidRequest:  # the client is told why the one before did not answer
            return None
        self._upstreams.falls_back(way.upstream, upstream, error)
        return way._replace(upstream=upstream, body=body, others=tuple(others), because=way.because or error)


async def _tried(carried: Carried, way: Way) -> tuple[Relayed | None, UpstreamError | None]:
    """The answer, and what says that another backend may have a better one."""
    try:
        relayed = await way.upstream.relay(carried.outgoing(way), carried.passed(way), way.terms)
    except UpstreamError as error:
        return None, error
    return relayed, relayed.refusal


def _settled(way: Way, relayed: Relayed | None, error: UpstreamError | None) -> Relayed:
    """The last answer as it is. Raises: UpstreamError without one, and for a fallback that was not set up for this."""
    if relayed is None:
        assert error is not None
        raise error
    if error and way.because and may_go_on(error, at_fallback=True) and not may_go_on(error, at_fallback=False):
        relayed.close()
        raise way.because
    return relayed


def _named(raw: bytes, carried: Carried, model: str, name: str) -> bytes:
    """The body with the name that a model has at a backend. Raises: InvalidRequest."""
    return raw if name == model else with_model(raw, carried.content_type, name)


def _raw_path(scope: Scope) -> bytes:
    """Servers need not tell it; the decoded path cannot say which of its slashes were encoded."""
    raw_path: bytes = scope.get("raw_path") or quote(scope["path"]).encode("ascii")
    return raw_path.removeprefix(scope.get("root_path", "").encode("ascii", "replace"))


async def _answer(relayed: Relayed, way: Way, scope: Scope, send: Send) -> None:
    """All but the end of an answer, which is not told before it is sure."""
    try:
        named = upstream_header(way.upstream.settings.name)
        headers = given_headers(relayed.status, relayed.headers, (*scope["answer_headers"], named))
        await send({"type": "http.response.start", "status": relayed.status, "headers": [*headers, named]})
        await relayed.pour(lambda data: send({"type": "http.response.body", "body": data, "more_body": True}))
    finally:
        relayed.close()
