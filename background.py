"""The durable queue of background turns: admit, claim, lease, renew, recover, cancel.

May not know the HTTP framework, SQL or chat messages. The row in the store is the run: whoever holds it under a lease
carries it out, and whatever is written for it carries the generation of the claim.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import msgspec

import frames
from auth import Caller
from duties import Duty
from errors import InvalidRequest, ProxyError, StoreError
from event_log import TRY_AGAIN_S, Logs, RunLog, persistently
from keeper import Asked, Course, begin
from logs import REQUEST_ID
from observing import NOTED, Noted
from records import Notes, bare_turn, decoded, identified, ignored_of, new_turn, restored
from request import TurnRequest
from run_verbs import Batch, Held, NewRun, OwnPlace, QueueLimits, Run, RunStore, Stopped
from tracing import Attributes, Trace
from turns import Means, Turns
from verbs import ItemIds, KeptResponse, NewTurn, no_response
from watching import LOOK_AGAIN_S

Json = dict[str, Any]
Event = dict[str, Any]
log = logging.getLogger("responses_proxy.background")

Step = Callable[[], Awaitable[object]]

# What the client's own key is sealed as.
BEARER = "bearer"
# How long a cancel waits for the process that carries out the run.
CANCEL_WAIT_S = 2.0
ASK_AGAIN_S = 0.02
NEVER = -1
# How often a lease is renewed before it would run out.
RENEWALS_A_LEASE = 3


@dataclass(frozen=True)
class BackgroundSettings:
    """The section `[background]`."""

    workers: int = 8
    queue_per_owner: int = 1000
    queue_total: int = 10_000
    run_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    lease_s: Annotated[float, msgspec.Meta(ge=0.1)] = 15.0
    max_attempts: Annotated[int, msgspec.Meta(ge=1)] = 3
    stream_retention_s: float = 3600.0


class Attempt(NamedTuple):
    """One carrying out of a run by this process."""

    task: asyncio.Task[None]
    log: RunLog

    def end(self) -> None:
        """Cancels it once: a second time would cut its clean-up short."""
        if not self.task.cancelling():
            self.task.cancel()


# -- the queue ---------------------------------------------------------------------------------------------------------


class Background:
    """Takes runs in, and carries out as many at once as there are workers. `run` it; `stop` it before its store."""

    def __init__(self, store: RunStore, turns: Turns, means: Means, settings: BackgroundSettings) -> None:
        self.store = store
        self.watcher = means.watcher
        self.logs = Logs(store, means.watcher, means.sources.clock, settings.stream_retention_s)
        self._stopping: asyncio.Task[None] | None = None
        self.pasts = turns.pasts
        self._turns = turns
        self._seals = means.seals
        self._sources = means.sources
        self._settings = settings
        self._observer = means.observer
        self._metrics = means.observer.metrics
        self._holder = means.sources.new_id("proc")
        self._forgetting = Duty(store, means.sources, "forgetting", settings.lease_s)
        self._attempts: dict[Held, Attempt] = {}
        self._claiming = asyncio.Lock()
        # What others had written when its claims were looked at.
        self._seen = NEVER
        # Claims that seemed to be held by nobody at the last look.
        self._suspects: dict[str, set[Held]] = {"forgotten": set(), "expired": set()}

    @property
    def is_stopping(self) -> bool:
        return self._stopping is not None

    async def admit(self, asked: Asked) -> tuple[Json, tuple[str, ...]]:
        """The response as it is queued, and the names of what was left out of its request. Raises: ProxyError."""
        own, ignored = await self._turns.look(asked)
        request, owner, now = asked.request, asked.caller.owner, self._sources.clock()
        response_id = self._sources.new_id("resp")
        response = {**begin(request, response_id, int(now)), "status": "queued"}
        turn = new_turn(owner, response, identified(own, ItemIds(response_id)), request, Notes(ignored))
        run = NewRun(
            msgspec.structs.replace(turn, first_use=asked.first_use),
            request=msgspec.json.encode(msgspec.structs.replace(request, input=None)),
            admitted_at=now,
            bearer=self._sealed(asked.caller, response_id),
            batch=_beginning(response) if request.stream else None,
        )
        limits = QueueLimits(self._settings.queue_per_owner, self._settings.queue_total)
        await self.store.admit(run, limits)
        self._tell_of_a_run_in_line()
        if (noted := NOTED.get()) is not None:
            noted.response_id = response_id
        return response, ignored

    def _sealed(self, caller: Caller, response_id: str) -> str | None:
        if caller.bearer is None:
            return None
        return self._seals.seal(BEARER, caller.owner, response_id, caller.bearer.encode(errors="surrogatepass"))

    async def cancel(self, owner: str, response_id: str) -> KeptResponse:
        """The response after it was cancelled, or as it had ended before. Raises: NotFound, InvalidRequest."""
        kept = (await self._stop_run(owner, response_id)).response
        if not restored(kept)["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.")
        return kept

    async def delete(self, owner: str, response_id: str) -> None:
        """A response that has not ended is cancelled before. Raises: NotFound, StoreError."""
        await self._stop_run(owner, response_id)
        if not await self.store.delete_response(owner, response_id, self._sources.clock()):
            raise no_response(response_id)
        self.watcher.tell(response_id)

    async def _stop_run(self, owner: str, response_id: str) -> Stopped:
        """When this returns, no backend works for the response any more, unless its process does not answer."""
        stopped = await self.store.stop(owner, response_id, *self.logs.lifetimes())
        if stopped is None:
            raise no_response(response_id)
        if stopped.was_running:
            self._metrics.cancels.inc()
            self.watcher.tell(response_id)
            self.watcher.tell_queue()
        if stopped.run is not None:
            await self._until_let_go(response_id, stopped.run)
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
        """Claims and carries out runs until it is cancelled."""
        pause_s = self._settings.lease_s / RENEWALS_A_LEASE
        async with asyncio.TaskGroup() as group:
            news = partial(self.watcher.anything.changed, LOOK_AGAIN_S)
            group.create_task(self._again_and_again(self._dispatch, news))
            for work in (self._renew, self._forget):
                group.create_task(self._again_and_again(work, partial(asyncio.sleep, pause_s)))

    async def _again_and_again(self, work: Step, pause: Step) -> None:
        """What fails is tried again: no run may be stuck by it."""
        while not self.is_stopping:
            try:
                await work()
            except StoreError as error:
                log.log(error.log_level, "the queue cannot be read or written: %s", error.message)
                await asyncio.sleep(TRY_AGAIN_S)
            except Exception:
                log.exception("the queue could not be looked after")
                await asyncio.sleep(TRY_AGAIN_S)
            else:
                await pause()

    async def _renew(self) -> None:
        """Keeps what it holds, and ends claims whose process is gone.

        Those are the claims that had run out at the last look, too: after a jump of the clock all seem to have.
        """
        now = self._sources.clock()
        held = set(await self.store.renew_runs(self._holder, now + self._settings.lease_s))
        if self._attempts.keys() - held:
            self._seen = NEVER
            self.watcher.anything.tell()
        await self._free_those_still_in("forgotten", held - self._attempts.keys(), math.inf)
        await self._free_those_still_in("expired", set(await self.store.expired(now)), now)

    async def _free_those_still_in(self, name: str, found: set[Held], before_at: float) -> None:
        for held in found & self._suspects[name]:
            log.info("run %d is taken from a process that does not carry it out", held.run)
            await self.store.free(held, before_at)
            self._tell_of_a_run_in_line()
        self._suspects[name] = found

    async def _forget(self) -> None:
        if await self._forgetting.is_ours():
            await self.store.forget_ended(self._sources.clock())

    async def _dispatch(self) -> None:
        seen = self.watcher.version
        if self._attempts and seen != self._seen:
            await self._end_lost(await self.store.held(self._holder))
        self._seen = seen
        async with self._claiming:
            await self._claim(self._free)

    async def _claim(self, free: int) -> None:
        if free > 0:
            until_at = self._sources.clock() + self._settings.lease_s
            runs = await self.store.claim(self._holder, until_at, free)
            for run in runs:
                if not self.is_stopping:
                    self._begin(run)
            if len(runs) == free:  # there may be more in line
                self.watcher.tell_queue()

    @property
    def _free(self) -> int:
        """How many more runs this process may carry out."""
        return 0 if self.is_stopping else max(self._settings.workers - len(self._attempts), 0)

    def _tell_of_a_run_in_line(self) -> None:
        """Others are told when this process has to leave it to them."""
        if self._free:
            self.watcher.anything.tell()
        else:
            self.watcher.tell_queue()

    async def _end_lost(self, still_held: list[Held]) -> None:
        """Attempts whose run was stopped, or is somebody else's by now."""
        running = {held for held, attempt in self._attempts.items() if not attempt.log.is_settled}
        lost = running - set(still_held)
        await asyncio.gather(*map(self._end_attempt, lost))

    async def _end_attempt(self, held: Held) -> None:
        attempt = self._attempts.get(held)
        if attempt is not None:
            attempt.end()
            await asyncio.wait({attempt.task})
        await self.store.let_go(held)

    def _begin(self, run: Run) -> None:
        self._metrics.attempts.inc()
        if run.attempt > 1:
            self._metrics.takeovers.inc()
        run_log = RunLog(self.logs, run)
        task = asyncio.create_task(self._carry_out(run, run_log))
        self._attempts[run.held] = Attempt(task, run_log)
        task.add_done_callback(lambda _: self._ended(run.held))

    def _ended(self, held: Held) -> None:
        self._attempts.pop(held, None)
        self.watcher.anything.tell()

    async def _carry_out(self, run: Run, run_log: RunLog) -> None:
        """One attempt, which ends with a response that is kept, whatever happens but the end of this process."""
        REQUEST_ID.set(run.response_id)  # of this task
        NOTED.set(Noted())
        try:
            async with asyncio.timeout(self._settings.run_timeout_s) as limit:
                step = self._observer.step("background response", attributes=_noted(run))
                with step, self.watcher.attending():  # to a cancel, above all
                    await self._attempt(run, run_log, limit, step.trace)
        except TimeoutError:
            message = f"The response took longer than {self._settings.run_timeout_s:g} seconds."
            await self._fail(run, run_log, ProxyError(message))
        except ProxyError as error:
            log.warning("%s failed: %s", run.response_id, error.logged)
            await self._fail(run, run_log, error)
        except Exception:
            log.exception("%s failed on a fault of this proxy", run.response_id)
            await self._fail(run, run_log, ProxyError("The proxy failed while it carried out the response."))
        if not run_log.is_settled:  # it was cancelled meanwhile, and who looks for such runs finds none here any more
            await persistently(lambda: self.store.let_go(run.held))

    async def _attempt(self, run: Run, run_log: RunLog, limit: asyncio.Timeout, trace: Trace) -> None:
        """Raises: ProxyError for a turn that cannot be begun."""

        async def save(turn: NewTurn, closing: list[Event]) -> bool:
            if not limit.expired():
                limit.reschedule(None)  # the answer is there, however long it takes to keep it
            return await run_log.settle(turn, closing)

        if run.attempt > self._settings.max_attempts:
            raise ProxyError(f"Given up: the process that carried it out ended {run.attempt - 1} times before it did.")
        request = _request(run)
        asked = Asked(request, Caller(run.owner, self._bearer(run), trace))
        begun = begin(request, run.response_id, run.created_at)
        told = run.next_number or 0
        ids = ItemIds(run.response_id, len(run.inputs) + told)  # an item that was told took an event at least
        place = OwnPlace(run.response_id, run.held.holder)
        course = Course(begun, ids, save, told, place)
        turn = await persistently(lambda: self._turns.prepare(asked, course))
        flushing = asyncio.create_task(run_log.flush_again_and_again())
        try:
            async with contextlib.aclosing(turn.events()) as batches:
                async for events in batches:
                    run_log.add(events)
        finally:
            flushing.cancel()
            await asyncio.wait({flushing})
            run_log.close()
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
        kept = await persistently(lambda: self.store.response(run.owner, run.response_id))
        if kept is not None:
            response = {**restored(kept), "status": "failed", "error": error.to_response_error()}
            await run_log.settle(bare_turn(run.owner, response, Notes(ignored_of(kept))), [])

    def begin_to_stop(self) -> asyncio.Task[None]:
        """Carries nothing out any more, and gives what it held to whoever comes next."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._give_back())
        return self._stopping

    async def stop(self) -> None:
        await self.begin_to_stop()

    async def _give_back(self) -> None:
        self.logs.interrupt()
        self.watcher.anything.tell()
        try:
            await asyncio.gather(*(self._give_back_one(*each) for each in list(self._attempts.items())))
            async with self._claiming:  # a claim that has begun would come after it, else
                await self.store.release_runs(self._holder)
            self.watcher.tell_queue()
            await self._forgetting.give_up()
        except StoreError as error:
            log.log(error.log_level, "leases could not be given back: %s", error.message)

    async def _give_back_one(self, held: Held, attempt: Attempt) -> None:
        attempt.end()
        await asyncio.wait({attempt.task})
        await self.store.release_run(held)
        self.watcher.tell_queue()


def _beginning(response: Json) -> Batch:
    """What is told of a streamed response while it is queued."""
    names = ("created", "queued")
    events = [{"type": f"response.{name}", "sequence_number": n, "response": response} for n, name in enumerate(names)]
    return Batch(0, len(events), frames.encode(events))


def _noted(run: Run) -> Attributes:
    return {"gen_ai.response.id": run.response_id, "responses_proxy.run.attempt": run.attempt}


def _request(run: Run) -> TurnRequest:
    request = msgspec.json.decode(run.request, type=TurnRequest)
    return msgspec.structs.replace(request, input=decoded(run.inputs))
