"""The durable queue of background turns: admit, claim, lease, renew, recover, cancel; and tails of their event logs.

May not know the HTTP framework, SQL or chat messages. The row in the store is the run: whoever holds it under a lease
carries it out, and whatever is written for it carries the generation of the claim.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec

import frames
from auth import Caller
from errors import InvalidRequest, ProxyError, StoreError
from metrics import Metrics
from records import bare_turn, decoded, identified, ignored_of, new_turn, restored
from replay import terminal
from request import TurnRequest
from run_verbs import UNFINISHED, Batch, Ending, Held, NewRun, QueueLimits, Run, RunStore, Stopped, Tail
from turns import Asked, Course, Means, Turns, begin
from verbs import ItemIds, NewTurn, no_response

Json = dict[str, Any]
Event = dict[str, Any]
log = logging.getLogger("responses_proxy.background")

# What the client's own key is sealed as.
BEARER = "bearer"
# How long a response with `store: false` can be polled after its end. Source: developers.openai.com, background guide.
BRIEF_S = 600.0
# How often events that wait are written.
FLUSH_EVERY_S = 0.05
# How long after a store that could not be written it is tried again.
TRY_AGAIN_S = 0.5
# How long a cancel waits for the process that carries out the run.
CANCEL_WAIT_S = 2.0
ASK_AGAIN_S = 0.02
# A log is looked at again after that time even when nobody tells of a change.
LOOK_AGAIN_S = 5.0
# How many items one attempt may make, so that no two attempts give the same id.
ITEMS_AN_ATTEMPT = 4096


@dataclass(frozen=True)
class BackgroundSettings:
    """The section `[background]`."""

    workers: int = 8
    queue_per_owner: int = 1000
    queue_total: int = 10_000
    run_timeout_s: float = 3600.0
    lease_s: float = 15.0
    max_attempts: int = 3
    stream_retention_s: float = 3600.0


# -- what one attempt writes -------------------------------------------------------------------------------------------


class RunLog:
    """The events of one attempt and its end. After a lost claim nothing is written any more."""

    def __init__(self, home: Background, run: Run) -> None:
        self.is_over = False
        self._home = home
        self._run = run
        self._is_streamed = run.next_number is not None
        self._end = self._first = run.next_number or 0
        self._waiting: list[bytes] = []
        self._has_some = asyncio.Event()
        self._writing = asyncio.Lock()

    def add(self, events: list[Event]) -> None:
        """Events that are written soon."""
        if events and self._is_streamed and not self.is_over:
            self._waiting.append(frames.encode(events))
            self._end = events[-1]["sequence_number"] + 1
            self._has_some.set()

    async def flush_again_and_again(self) -> None:
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            await self._flush()
            await asyncio.sleep(FLUSH_EVERY_S)

    async def _flush(self) -> None:
        async with self._writing:
            batch, count = self._batch(), len(self._waiting)
            if batch is None or self.is_over:
                return
            try:
                self.is_over = not await self._home.store.log(self._run.held, batch)
            except StoreError as error:
                log.warning("events of %s wait: %s", self._run.response_id, error.message)
                self._has_some.set()
                return
            self._first = batch.end
            del self._waiting[:count]
        self._home.watcher.tell(self._run.response_id)

    def _batch(self) -> Batch | None:
        return Batch(self._first, self._end, b"".join(self._waiting)) if self._waiting else None

    async def settle(self, turn: NewTurn, closing: list[Event]) -> None:
        """Ends the run. A store that cannot be written is tried until it can be, because the answer is there.

        Raises: NotFound, ConversationLocked.
        """
        self.add(closing)
        async with self._writing:
            while not self.is_over:
                try:
                    await self._home.store.settle(self._run.held, self._home.ending(turn, self._batch()))
                    self.is_over = True
                except StoreError as error:
                    log.warning("%s ended and cannot be kept yet: %s", self._run.response_id, error.message)
                    await asyncio.sleep(TRY_AGAIN_S)
        self._home.watcher.tell(self._run.response_id)


# -- the queue ---------------------------------------------------------------------------------------------------------


class Background:
    """Takes runs in, and carries out as many at once as there are workers. `run` it; `stop` it before its store."""

    def __init__(
        self, store: RunStore, turns: Turns, means: Means, settings: BackgroundSettings, metrics: Metrics
    ) -> None:
        self.store = store
        self.watcher = means.watcher
        self.is_stopping = False
        self._turns = turns
        self._seals = means.seals
        self._sources = means.sources
        self._settings = settings
        self._metrics = metrics
        self._holder = means.sources.new_id("proc")
        self._attempts: dict[Held, asyncio.Task[None]] = {}
        self._renew_at = 0.0

    async def admit(self, asked: Asked) -> tuple[Json, tuple[str, ...]]:
        """The response as it is queued, and the names of what was left out of its request. Raises: ProxyError."""
        own, ignored = await self._turns.look(asked)
        request, owner, now = asked.request, asked.caller.owner, self._sources.clock()
        response_id = self._sources.new_id("resp")
        response = {**begin(request, response_id, int(now)), "status": "queued"}
        turn = new_turn(owner, response, identified(own, ItemIds(response_id)), request, ignored)
        run = NewRun(
            msgspec.structs.replace(turn, first_use=asked.first_use),
            request=msgspec.json.encode(msgspec.structs.replace(request, input=None)),
            admitted_at=now,
            bearer=self._sealed(asked.caller, response_id),
            batch=_beginning(response) if request.stream else None,
        )
        limits = QueueLimits(self._settings.queue_per_owner, self._settings.queue_total)
        await self.store.admit(run, limits)
        self.watcher.anything.tell()
        return response, ignored

    def _sealed(self, caller: Caller, response_id: str) -> str | None:
        if caller.bearer is None:
            return None
        return self._seals.seal(BEARER, caller.owner, response_id, caller.bearer.encode(errors="surrogatepass"))

    async def cancel(self, owner: str, response_id: str) -> Json:
        """The response after it was cancelled, or as it had ended before. Raises: NotFound, InvalidRequest."""
        stopped = await self._stop_run(owner, response_id)
        response = restored(stopped.response)
        if not response["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.")
        return response

    async def delete(self, owner: str, response_id: str) -> None:
        """A response that has not ended is cancelled before. Raises: NotFound, StoreError."""
        await self._stop_run(owner, response_id)
        if not await self.store.delete_response(owner, response_id, self._sources.clock()):
            raise no_response(response_id)
        self.watcher.tell(response_id)

    async def _stop_run(self, owner: str, response_id: str) -> Stopped:
        """When this returns, no backend works for the response any more, unless its process does not answer."""
        now = self._sources.clock()
        until_at = now + self._settings.stream_retention_s
        stopped = await self.store.stop(owner, response_id, until_at, now + BRIEF_S)
        if stopped is None:
            raise no_response(response_id)
        if stopped.was_running:
            self._metrics.cancels.inc()
            self.watcher.tell(response_id)
            self.watcher.anything.tell()
        if stopped.held is not None:
            await self._until_let_go(response_id, stopped.held)
        return stopped

    async def _until_let_go(self, response_id: str, run: int) -> None:
        own = [held for held in self._attempts if held.run == run]
        await asyncio.gather(*map(self._end_attempt, own))
        with contextlib.suppress(TimeoutError), self.watcher.watching(response_id) as watch:
            async with asyncio.timeout(CANCEL_WAIT_S):
                while await self.store.is_held(run):
                    await watch.changed(ASK_AGAIN_S)

    # -- carrying out --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Claims and carries out runs until it is cancelled. A store that fails is asked again."""
        while not self.is_stopping:
            try:
                await self._look_after()
            except StoreError as error:
                log.warning("the queue cannot be read or written: %s", error.message)
                await asyncio.sleep(TRY_AGAIN_S)
            await self.watcher.anything.changed(max(self._renew_at - self._sources.clock(), 0))

    async def _look_after(self) -> None:
        now = self._sources.clock()
        if now >= self._renew_at:
            await self.store.sweep_runs(now)
            held = await self.store.renew_runs(self._holder, now + self._settings.lease_s)
            await self._end_lost(held)
            for forgotten in set(held) - self._attempts.keys():
                await self.store.free(forgotten)
            self._renew_at = now + self._settings.lease_s / 3
        elif self._attempts:
            await self._end_lost(await self.store.held(self._holder))
        free = self._settings.workers - len(self._attempts)
        if free > 0 and not self.is_stopping:
            until_at = self._sources.clock() + self._settings.lease_s
            for run in await self.store.claim(self._holder, until_at, free):
                if not self.is_stopping:
                    self._begin(run)

    async def _end_lost(self, still_held: list[Held]) -> None:
        """Attempts whose run was stopped, or is somebody else's by now."""
        lost = self._attempts.keys() - set(still_held)
        await asyncio.gather(*map(self._end_attempt, lost))

    async def _end_attempt(self, held: Held) -> None:
        attempt = self._attempts.get(held)
        if attempt is not None:
            attempt.cancel()
            await asyncio.wait({attempt})
        await self.store.let_go(held)

    def _begin(self, run: Run) -> None:
        self._metrics.attempts.inc()
        if run.attempt > 1:
            self._metrics.takeovers.inc()
        task = asyncio.create_task(self._carry_out(run))
        self._attempts[run.held] = task
        task.add_done_callback(lambda _: self._ended(run.held))

    def _ended(self, held: Held) -> None:
        self._attempts.pop(held, None)
        self.watcher.anything.tell()

    async def _carry_out(self, run: Run) -> None:
        """One attempt, which ends with a response that is kept, whatever happens but the end of this process."""
        run_log = RunLog(self, run)
        try:
            async with asyncio.timeout(self._settings.run_timeout_s):
                await self._attempt(run, run_log)
        except TimeoutError:
            message = f"The response took longer than {self._settings.run_timeout_s:g} seconds."
            await self._fail(run, run_log, ProxyError(message))
        except ProxyError as error:
            log.warning("%s failed: %s", run.response_id, error.message)
            await self._fail(run, run_log, error)
        except Exception:
            log.exception("%s failed on a fault of this proxy", run.response_id)
            await self._fail(run, run_log, ProxyError("The proxy failed while it carried out the response."))

    async def _attempt(self, run: Run, run_log: RunLog) -> None:
        """Raises: ProxyError for a turn that cannot be begun."""
        if run.attempt > self._settings.max_attempts:
            raise ProxyError(f"Given up: the process that carried it out ended {run.attempt - 1} times before it did.")
        request = _request(run)
        asked = Asked(request, Caller(run.owner, self._bearer(run)))
        taken = len(run.inputs) + ITEMS_AN_ATTEMPT * (run.held.generation - 1)
        begun = begin(request, run.response_id, run.created_at)
        course = Course(begun, ItemIds(run.response_id, taken), run_log.settle, run.next_number or 0)
        turn = await self._turns.prepare(asked, course)
        flushing = asyncio.create_task(run_log.flush_again_and_again())
        try:
            async with contextlib.aclosing(turn.events()) as batches:
                async for events in batches:
                    run_log.add(events)
        finally:
            flushing.cancel()
            await asyncio.wait({flushing})
            await turn.close()

    def _bearer(self, run: Run) -> str | None:
        """Raises: ProxyError when the keys that sealed it are gone."""
        if run.bearer is None:
            return None
        bearer = self._seals.open(BEARER, run.owner, run.response_id, run.bearer)
        if bearer is None:
            raise ProxyError("The client's key cannot be opened any more: the sealing keys have changed.")
        return bearer.decode(errors="surrogatepass")

    async def _fail(self, run: Run, run_log: RunLog, error: ProxyError) -> None:
        """Ends a run whose turn could not say so itself."""
        kept = await self.store.response(run.owner, run.response_id)
        if kept is not None:
            response = {**restored(kept), "status": "failed", "error": error.to_response_error()}
            await run_log.settle(bare_turn(run.owner, response, ignored_of(kept)), [])

    def ending(self, turn: NewTurn, batch: Batch | None) -> Ending:
        """How a run ends just now."""
        now = self._sources.clock()
        return Ending(turn, batch, now + self._settings.stream_retention_s, now + BRIEF_S)

    async def stop(self) -> None:
        """Carries nothing out any more, and gives what it held to whoever comes next."""
        if self.is_stopping:
            return
        self.is_stopping = True
        self.watcher.tell_all()
        self.watcher.anything.tell()
        attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.cancel()
        if attempts:
            await asyncio.wait(attempts)
        try:
            await self.store.release_runs(self._holder)
        except StoreError as error:
            log.warning("leases could not be given back: %s", error.message)

    # -- tails ---------------------------------------------------------------------------------------------------------

    async def follower(self, owner: str, response_id: str, after: int = -1) -> Follower:
        """Raises: NotFound; InvalidRequest for a response whose events are not kept, or not any more."""
        kept = await self.store.response(owner, response_id)
        if kept is None:
            raise no_response(response_id)
        response = restored(kept)
        if not response["background"]:
            raise _no_stream("it was not created with background=true")
        state = (await self.store.states([response_id])).get(response_id)
        if state is None or state[1] is None:
            raise _no_stream("it was not created with stream=true or the stream TTL has expired")
        return Follower(self, owner, response, after)


class Follower:
    """The events of a background response behind a number: from the log, then as they come, and a terminal one."""

    def __init__(self, home: Background, owner: str, response: Json, after: int) -> None:
        self._home = home
        self._owner = owner
        self._response = response
        self._after = after
        self._last = -1

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Raises: Interrupted when the process stops before."""
        home, response_id = self._home, self._response["id"]
        with home.watcher.watching(response_id) as watch:
            while tail := await self._read():
                if data := self._new(tail):
                    yield data
                if tail.has_more:
                    continue
                if tail.status not in UNFINISHED:
                    break
                if home.is_stopping:
                    raise frames.Interrupted
                await watch.changed(LOOK_AGAIN_S)
        if self._after <= self._last:
            yield frames.encode([terminal(await self._ended(), self._last + 1)])

    def goodbye(self) -> None:
        """What is told ends with the run, and not with this process."""

    async def close(self) -> None:
        """Nothing is held between two events."""

    async def _read(self) -> Tail | None:
        """A store that cannot be read just now is asked again."""
        while True:
            try:
                return await self._home.store.tail(self._owner, self._response["id"], max(self._after, self._last))
            except StoreError as error:
                log.warning("a reader waits: %s", error.message)
                await asyncio.sleep(TRY_AGAIN_S)

    def _new(self, tail: Tail) -> bytes:
        """Those of the events that were not told yet."""
        told = max(self._after, self._last)
        pieces: list[bytes] = []
        for first, batch in tail.batches:
            piece, self._last = frames.after(told, first, batch)
            pieces.append(piece)
        return b"".join(pieces)

    async def _ended(self) -> Json:
        """The response at its end; one that is gone was cancelled before."""
        kept = await self._home.store.response(self._owner, self._response["id"])
        return restored(kept) if kept else {**self._response, "status": "cancelled", "output": []}


def _no_stream(reason: str) -> InvalidRequest:
    return InvalidRequest(f"This response cannot be streamed because {reason}.", param="stream")


def _beginning(response: Json) -> Batch:
    """What is told of a streamed response while it is queued."""
    names = ("created", "queued")
    events = [{"type": f"response.{name}", "sequence_number": n, "response": response} for n, name in enumerate(names)]
    return Batch(0, len(events), frames.encode(events))


def _request(run: Run) -> TurnRequest:
    request = msgspec.json.decode(run.request, type=TurnRequest)
    return msgspec.structs.replace(request, input=decoded(run.inputs))
