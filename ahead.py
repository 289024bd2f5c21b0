"""Compaction off the path of requests: what a chain's next turn would have to wait for is made after the turn before.

May not know events, the HTTP framework or SQL. One process makes it, under a lease; every branch begins with it.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from errors import ProxyError
from fitting import AHEAD, Fitter, FoldAhead
from leases import Leases
from needs import Need
from past import Pasts
from records import counted_tokens
from sealing import Seals
from weighing import Prompt

log = logging.getLogger("responses_proxy.ahead")

# Beyond that the next turn does the work itself: the backend has turns to answer.
MOST_AT_ONCE = 4


class Ahead:
    """Looks at each turn that was kept. `close` it."""

    def __init__(self, pasts: Pasts, fitter: Fitter, leases: Leases, seals: Seals) -> None:
        self._pasts = pasts
        self._fitter = fitter
        self._leases = leases
        self._store = leases.store
        self._seals = seals
        self._free = asyncio.Semaphore(MOST_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, prompt: Prompt, response_id: str, body: bytes) -> None:
        """`body`: of the response, as it was kept."""
        if not self._fitter.settings.ahead or not prompt.request.is_stored:
            return
        if tokens := counted_tokens(body):
            task = asyncio.create_task(self._made(prompt, response_id, tokens))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a window could not be compacted ahead", exc_info=error)

    async def _made(self, prompt: Prompt, response_id: str, tokens: float) -> None:
        """Nothing waits for it: a failure is logged, and the next turn does the work."""
        try:
            limit = await self._fitter.needs.limit(prompt)
            if tokens >= limit and self._free.locked():
                log.info("%s is left to the next turn: enough is made ahead already", response_id)
            elif tokens >= limit:
                async with self._free:
                    await self._make(prompt, response_id, limit, tokens)
        except ProxyError as error:
            log.log(error.log_level, "%s could not be compacted ahead: %s", response_id, error.logged)

    async def _make(self, prompt: Prompt, response_id: str, limit: float, tokens: float) -> None:
        lease = self._leases.lease(f"{AHEAD} {response_id}")
        if not await lease.acquire(0):
            return
        try:
            child = msgspec.structs.replace(
                prompt.request, input=None, previous_response_id=response_id, conversation=None
            )
            past, _ = await self._pasts.seen(child, prompt.caller.owner)
            if past.before.ahead is None:
                whole = msgspec.structs.replace(prompt, request=child, past=past)
                need = Need("ahead", limit, tokens)
                if self._fitter.needs.helps(whole, need):
                    await self._keep(whole, response_id, need)
        finally:
            await lease.release()

    async def _keep(self, prompt: Prompt, response_id: str, need: Need) -> None:
        owner = prompt.caller.owner
        made = await self._fitter.made(prompt, need)
        payload = msgspec.json.encode(FoldAhead(made.fold, made.tokens))
        blob = self._seals.seal(AHEAD, owner, response_id, payload)
        await self._store.keep_ahead(owner, response_id, blob.encode(), prompt.past.before.items)

    async def close(self) -> None:
        """Work under way is dropped: the next turn does it."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
