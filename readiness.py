"""Whether this process can do its work: the store can be written, and a backend answers.

May not know the HTTP framework. However often it is asked, it looks every few seconds at most. What it tells names no
address: everybody may ask.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from errors import ProxyError, StoreError
from looks import Look
from routing import Upstreams
from sources import Sources
from upstream import Upstream
from upstream_errors import UpstreamRefused, UpstreamTimeout, UpstreamUnreachable
from verbs import Lock, Store

log = logging.getLogger("responses_proxy.readiness")

# How old a look may be, how long an answer waits for one (an orchestrator asks with 1 s), and how long one may take.
FRESH_S, WAIT_S, LOOK_S = 5.0, 0.8, 5.0
OK = "ok"
NOT_LOOKED_AT = "not looked at yet"
TOO_LATE = "no answer in time"


class Readiness:
    """Looks at the store and the backends when it is asked. `close` it before them."""

    def __init__(self, store: Store, upstreams: Upstreams, sources: Sources, is_stopping: Callable[[], bool]) -> None:
        self._store = store
        self._upstreams = upstreams
        self._sources = sources
        self._is_stopping = is_stopping
        self._lock = Lock(sources.new_id("ready"), "readiness")
        self._looks = Look(self._look)
        self._store_state = NOT_LOOKED_AT
        self._states = {upstream.settings.name: NOT_LOOKED_AT for upstream in upstreams}
        self._answering: frozenset[str] = frozenset()

    async def told(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests should be sent here, and why."""
        if not self._is_stopping():
            self._looks.again(FRESH_S)
            await self._looks.wait(WAIT_S)
        is_ready = self._store_state == OK and bool(self._answering) and not self._is_stopping()
        status = "stopping" if self._is_stopping() else "ready" if is_ready else "not ready"
        return is_ready, {"status": status, "store": self._store_state, "upstreams": dict(self._states)}

    async def _look(self) -> None:
        await asyncio.gather(self._look_at_store(), *(self._look_at(upstream) for upstream in self._upstreams))

    async def _look_at_store(self) -> None:
        """Takes a lease that has run out already, and gives it back: a write that leaves nothing."""
        now = self._sources.clock()
        try:
            async with asyncio.timeout(LOOK_S):
                await self._store.acquire(self._lock, now, now)
                await self._store.release(self._lock)
        except TimeoutError:
            state = TOO_LATE
        except StoreError as error:
            state = error.message
        else:
            state = OK
        _tell_change("the store", self._store_state, state)
        self._store_state = state

    async def _look_at(self, upstream: Upstream) -> None:
        """A refusal is an answer: lists of models need not be there, nor be for everybody.

        One that is late once may be busy with answers: it is late twice in a row before it counts.
        """
        name = upstream.settings.name
        was_in_time = name in self._answering and self._states[name] != TOO_LATE
        state, is_answering = OK, True
        try:
            async with asyncio.timeout(LOOK_S):
                await upstream.probe()
        except TimeoutError:
            state, is_answering = TOO_LATE, was_in_time
        except ProxyError as error:
            state = _said(error)
            is_answering = was_in_time if state == TOO_LATE else _is_answer(error)
        _tell_change(f"upstream '{name}'", self._states[name], state)
        self._states[name] = state
        self._answering = self._answering | {name} if is_answering else self._answering - {name}

    async def close(self) -> None:
        await self._looks.close()


def _is_answer(error: ProxyError) -> bool:
    return isinstance(error, UpstreamRefused) and error.http_status < 500


def _said(error: ProxyError) -> str:
    if isinstance(error, UpstreamRefused):
        return f"answered {error.http_status}" if error.http_status < 500 else "answered with an error"
    if isinstance(error, UpstreamTimeout):
        return TOO_LATE
    return "cannot be reached" if isinstance(error, UpstreamUnreachable) else "did not answer with a list of models"


def _tell_change(what: str, before: str, now: str) -> None:
    if now != before and (now != OK or before != NOT_LOOKED_AT):
        log.log(logging.INFO if now == OK else logging.WARNING, "%s: %s", what, now)
