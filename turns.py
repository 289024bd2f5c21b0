"""One turn, the same code for plain, streamed and background.

It finds what the request continues, renders the window, calls the backend, translates its answer, saves, and only then
says completed. May not know the HTTP framework or SQL. The clock and ids are handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import orjson

from admissions import Quotas
from ahead import Ahead
from chat_stream import ChatStream
from chunks import BYTES_PER_TOKEN
from compaction import CompactionSettings
from counting import Counter
from dispatch import Ready, Renderer
from errors import ProxyError, StoreError
from fitting import Fit, FitMeans, Fitter
from history import sealable
from keeper import Asked, Course, Keeper, begin, note
from leases import Leases
from metrics import Metrics, TurnMeter
from needs import Need
from observing import Observer
from past import REASONING, Pasts, Patience
from remembered import LaneMemory
from replay import replayed
from request import TurnRequest
from routing import Upstreams
from sealing import Seals
from sources import Sources
from stream_plan import ReasoningSettings, StreamPlan
from streaming import Event, Json, ResponseStream
from translation import check_items
from upstream_errors import UpstreamError, WindowExceeded
from verbs import ItemIds, NewTurn
from watching import Watcher
from weighing import Prompt

log = logging.getLogger("responses_proxy.turns")

# What a save that has begun gets when its turn is cancelled.
SAVE_S = 5.0


@dataclass(frozen=True)
class TurnSettings:
    """The section `[turns]`."""

    created_after_ms: int = 100
    conversation_wait_s: float = 2.0
    parent_wait_s: float = 10.0
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Means:
    """What turns are made with."""

    upstreams: Upstreams
    leases: Leases
    seals: Seals
    sources: Sources
    watcher: Watcher
    counter: Counter
    observer: Observer
    quotas: Quotas | None = None

    @property
    def metrics(self) -> Metrics:
        return self.observer.metrics


class Turns:
    """Makes turns out of validated requests."""

    def __init__(
        self, means: Means, settings: TurnSettings, reasoning: ReasoningSettings, compaction: CompactionSettings
    ) -> None:
        self._means = means
        self._settings = settings
        self._reasoning = reasoning
        patience = Patience(settings.conversation_wait_s, settings.parent_wait_s)
        self.pasts = Pasts(means.leases, means.seals, means.watcher, patience)
        self.renderer = Renderer(means.upstreams, strict=settings.strict)
        fitting = FitMeans(compaction, self.renderer, means.counter, means.seals, means.observer, means.sources.clock)
        self.fitter = Fitter(fitting)
        self.ahead = Ahead(self.pasts, self.fitter, means.leases, means.seals)

    async def prepare(self, asked: Asked, course: Course | None = None) -> Turn:
        """A turn ready to be run; `close` it in every case. Raises: ProxyError."""
        course = course or self._own_course(asked.request, asked.lane)
        meter = self._means.metrics.turn(asked.mode)
        note(asked.request, course)
        past = await self.pasts.of(asked.request, asked.caller.owner, course.place)
        try:
            render = self.renderer.rendered if asked.generates else self.renderer.ready
            ready = await render(asked.request, past.window, past.left_out)
            prompt = Prompt(asked.request, asked.caller, past, ready.way)
            fit = Fit(self.fitter, prompt, ready, course.item_ids)
            return self._turn(asked, course, ready, fit, meter)
        except BaseException:
            await past.release()
            raise

    async def look(self, asked: Asked) -> tuple[list[Json], tuple[str, ...]]:
        """The items of a request that is to be run later, references replaced, and names of what will be left out.

        Raises: InvalidRequest, NotFound, StoreError; what depends on a parent that runs still is found at the run.
        """
        request = asked.request
        past, parent_has_ended = await self.pasts.seen(request, asked.caller.owner)
        if parent_has_ended:
            return past.own, (await self.renderer.rendered(request, past.window, past.left_out)).ignored
        check_items(past.own, "input")
        return past.own, (await self.renderer.ready(request, [], ())).ignored

    def refused(self, request: TurnRequest, error: ProxyError) -> list[Event]:
        """The events of a stream that had to begin before its turn could, and never could."""
        failed = {"status": "failed", "error": error.to_response_error()}
        return replayed({**self._own_course(request).begun, **failed})

    def _own_course(self, request: TurnRequest, lane: LaneMemory | None = None) -> Course:
        response_id = self._means.sources.new_id("resp")
        begun = begin(request, response_id, int(self._means.sources.clock()))
        return Course(begun, ItemIds(response_id), self._save if request.is_stored else None, place=lane)

    async def _save(self, turn: NewTurn, closing: list[Event]) -> bool:
        await self._means.leases.store.save(turn)
        return True

    def _turn(self, asked: Asked, course: Course, ready: Ready, fit: Fit, meter: TurnMeter) -> Turn:
        plan = self._plan(asked, ready, fit, course.first_number)
        machine = ResponseStream(course.begun, plan, course.item_ids, self._means.sources.clock)
        keeper = Keeper(asked, fit, course, self.ahead, self._means.quotas, meter)
        kind = Turn if asked.generates else WarmUp
        return kind(fit, machine, keeper, self._settings.created_after_ms / 1000)

    def _plan(self, asked: Asked, ready: Ready, fit: Fit, first_number: int) -> StreamPlan:
        request, rendered = asked.request, ready.rendered
        return StreamPlan(
            refs=rendered.refs,
            taken_call_ids=rendered.call_ids,
            logprobs=request.includes("message.output_text.logprobs"),
            parallel=request.parallel_tool_calls is not False,
            expose=self._reasoning.expose,
            think=ready.way.upstream.settings.think,
            silent=not request.stream,
            first_number=first_number,
            is_mere=fit.is_mere or not asked.generates,
            seal=self._seal_of(asked.caller.owner) if self._carries_reasoning(request) else None,
            estimate_input_tokens=lambda: len(orjson.dumps(fit.body)) // BYTES_PER_TOKEN,
        )

    def _carries_reasoning(self, request: TurnRequest) -> bool:
        """Who keeps the history has to keep reasoning that is not shown, too: a stateless client, or our own store."""
        is_hidden = self._reasoning.expose == "none"
        return is_hidden or not request.is_stored or request.includes("reasoning.encrypted_content")

    def _seal_of(self, owner: str) -> Callable[[str, str, list[Json]], str]:
        seals = self._means.seals
        return lambda item_id, text, details: seals.seal(REASONING, owner, item_id, sealable(text, details))


class Turn:
    """One call of a backend and the response it becomes."""

    def __init__(self, fit: Fit, machine: ResponseStream, keeper: Keeper, created_after_s: float) -> None:
        self._fit = fit
        self._machine = machine
        self._keeper = keeper
        self._meter = keeper.meter
        self._created_after_s = created_after_s
        self._accepting: asyncio.Task[ChatStream | Need] | None = None
        self._is_told = False
        self._is_kept = False
        self._unsaid: list[Event] = []

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of what was left out of the request."""
        return self._fit.ignored

    @property
    def upstream(self) -> str:
        """Who was asked last, by its name in the settings."""
        return self._fit.prompt.way.upstream.settings.name

    async def run(self) -> Json:
        """The finished response of a plain turn. Raises: UpstreamError, StoreError."""
        try:
            with self._meter:
                await self._look()
                if not self._fit.is_mere:
                    self._machine.feed(await self._completion())
                self._machine.close()
                self._keeper.count(self._machine)
                await self._keeper.keep(self._machine, [])
                self._learn()
                response = self._machine.snapshot()
                self._meter.status = response["status"]
                return response
        finally:
            await self._fit.prompt.past.release()

    async def _look(self) -> None:
        if need := await self._fit.look():
            await self._compact(need)

    async def _completion(self) -> Json:
        """Asked for again when the window was too full, or elsewhere when the backend fails. Raises: UpstreamError."""
        while True:
            try:
                return await self._fit.complete()
            except UpstreamError as error:
                await self._other_try(error)
                await self._look()

    async def _compact(self, need: Need) -> list[Event]:
        """The events of the compaction item; a turn that fits the backend still goes on without one.

        Raises: UpstreamError.
        """
        try:
            fitted = await self._fit.compact(need)
        except UpstreamError as error:
            if need.cause != "threshold":
                raise
            log.warning("the turn goes on as it is: %s", error.logged)
            return []
        return self._machine.compacted(fitted.item, fitted.made.usage)

    async def _other_try(self, error: UpstreamError) -> list[Event]:
        """What lets the backend be asked again: a window that fits, or another backend. Raises: the error."""
        if not isinstance(error, WindowExceeded):
            await self._fit.go_on(error)
            self._machine.expect(self._fit.prompt.way.upstream.settings.think)
            return []
        fitted = await self._fit.change(error)
        return self._machine.compacted(fitted.item, fitted.made.usage) if fitted else []

    async def accept(self) -> None:
        """Calls the backend and waits for its word, but no longer than `created_after_ms`.

        Raises: UpstreamError when the backend refuses at once. After that, failures are events.
        """
        accepting = self._call_backend()
        try:
            done, _ = await asyncio.wait({accepting}, timeout=self._created_after_s)
            if done and (error := accepting.exception()):
                self._refused(error)
        except BaseException:
            await self.close()
            raise

    def _refused(self, error: BaseException) -> None:
        """A window that is too full is compacted while the client hears the first events."""
        if not (isinstance(error, WindowExceeded) and self._fit.can_change(error)):
            self._meter.ended("failed")
            raise error

    def _call_backend(self) -> asyncio.Task[ChatStream | Need]:
        self._accepting = asyncio.create_task(self._asked())
        return self._accepting

    async def _asked(self) -> ChatStream | Need:
        """What the backend answers, or another one in its place; or why it cannot be asked yet."""
        while True:
            if need := await self._fit.look():
                return need
            try:
                return await self._fit.stream()
            except WindowExceeded:
                raise
            except UpstreamError as error:
                await self._other_try(error)

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The events of a turn in batches; the last one is terminal, whatever happens."""
        try:
            yield self._machine.start()
            async with contextlib.aclosing(self._made()) as batches:
                async for batch in batches:
                    yield batch
        except ProxyError as error:
            log.log(error.log_level, "turn failed: %s", error.logged)
            yield await self._failed(error)
        except Exception:
            log.exception("turn failed on a fault of this proxy")
            yield await self._failed(ProxyError("The proxy failed while it translated the answer."))
        finally:
            await self.close()

    async def _made(self) -> AsyncGenerator[list[Event], None]:
        """All events after the first, but for the terminal one of a failure."""
        if self._fit.is_mere:
            yield self._machine.compacting(self._fit.item_id)
        async with contextlib.aclosing(self._tried()) as batches:
            async for batch in batches:
                yield batch
        yield await self._finished()

    async def _tried(self) -> AsyncGenerator[list[Event], None]:
        """What the backend says, or says at another try, as long as it has said nothing."""
        try:
            async with contextlib.aclosing(self._relayed()) as batches:
                async for batch in batches:
                    yield batch
        except UpstreamError as error:
            if self._machine.has_answer or self._fit.is_mere:
                raise
            await self._let_go()
            yield await self._other_try(error)
            async with contextlib.aclosing(self._tried()) as batches:
                async for batch in batches:
                    yield batch

    async def _relayed(self) -> AsyncGenerator[list[Event], None]:
        """What the backend says, after the compaction that the window needs."""
        stream = await (self._accepting or self._call_backend())
        while isinstance(stream, Need):
            yield await self._compact(stream)
            if self._fit.is_mere:
                return
            stream = await self._call_backend()
        async for chunks in stream:
            events: list[Event] = []
            for chunk in chunks:
                events += self._machine.feed(chunk)
            if events:
                self._meter.told()
                yield events
        if not stream.done and not self._machine.ended:
            raise stream.cut_short()

    async def _finished(self) -> list[Event]:
        """The last events, once the response is in the store; a response that cannot be kept has failed."""
        last = self._machine.close()
        self._keeper.count(self._machine)
        saving = asyncio.ensure_future(self._keeper.keep(self._machine, last))
        try:
            await asyncio.shield(saving)
        except ProxyError as error:
            log.log(error.log_level, "turn could not be kept: %s", error.logged)
            return last + await self._failed(error)
        except asyncio.CancelledError:
            self._unsaid = last
            try:
                await asyncio.wait({saving}, timeout=SAVE_S)
            finally:
                saving.cancel()
            self._is_kept = saving.done() and not saving.cancelled() and saving.exception() is None
            raise
        self._is_told = True
        self._learn()
        return last + self._machine.finish()

    def _learn(self) -> None:
        """Counting never fails a turn."""
        try:
            self._fit.learn(self._machine.counted)
        except Exception:
            log.exception("nothing could be learned from the usage of a turn")

    async def _failed(self, error: ProxyError) -> list[Event]:
        """The terminal event, and a record of the failure where one can be kept: clients know the id by now."""
        last = self.fail(error)
        if isinstance(error, StoreError):  # the client need not wait for another one
            return last
        try:
            await self._keeper.keep(self._machine, [])
        except ProxyError as failure:
            log.log(failure.log_level, "a failed turn could not be kept: %s", failure.logged)
        return last

    def fail(self, error: ProxyError) -> list[Event]:
        """The terminal event of a turn that cannot go on; nothing when one was given before.

        A response that was kept at the last moment has not failed: then its last events are given.
        """
        if self._is_told:
            return []
        self._is_told = True
        return self._unsaid + (self._machine.finish() if self._is_kept else self._machine.fail(error))

    async def close(self) -> None:
        """Lets go of the backend and of what the turn held; a backend that is still generating is stopped by it."""
        self._meter.ended(self._machine.snapshot()["status"] if self._is_told or self._is_kept else "cancelled")
        try:
            await self._let_go()
        finally:
            await self._fit.prompt.past.release()

    async def _let_go(self) -> None:
        accepting, self._accepting = self._accepting, None
        if accepting is not None:
            accepting.cancel()
            accepting.add_done_callback(_closed)  # holds even when this is cancelled
            await asyncio.wait({accepting})


class WarmUp(Turn):
    """A turn without an answer: it is checked, kept and told of, and no backend is asked."""

    async def accept(self) -> None:
        pass

    async def _made(self) -> AsyncGenerator[list[Event], None]:
        yield await self._finished()


def _closed(accepting: asyncio.Task[ChatStream | Need]) -> None:
    if accepting.cancelled() or accepting.exception() is not None:
        return
    if isinstance(stream := accepting.result(), ChatStream):
        stream.close()
