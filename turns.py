"""One turn, the same code for plain, streamed and background.

It finds what the request continues, renders the window, calls the backend, translates its answer, saves, and only then
says completed. May not know the HTTP framework or SQL. The clock and ids are handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import msgspec
import orjson

from ahead import Ahead
from auth import Caller
from chat_stream import ChatStream
from compaction import CompactionSettings
from counting import Counter
from dispatch import Ready, Renderer
from errors import ProxyError, UpstreamBroken, UpstreamError, WindowExceeded
from fitting import Fit, FitMeans, Fitter
from history import sealable
from leases import Leases
from metrics import Metrics, Mode, TurnMeter
from needs import Need
from observing import NOTED, Observer
from past import REASONING, OwnPlace, Pasts, Patience
from records import Notes, identified, new_turn
from replay import replayed
from request import TurnRequest, echo
from sealing import Seals
from sources import Sources
from streaming import Event, Json, ReasoningSettings, ResponseStream, StreamPlan
from translation import check_items
from upstream import Upstreams
from verbs import FirstUse, ItemIds, NewTurn
from watching import Watcher
from weighing import Prompt

log = logging.getLogger("responses_proxy.turns")

# Rough size of a token, for usage that no backend gave.
BYTES_PER_TOKEN = 4
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

    @property
    def metrics(self) -> Metrics:
        return self.observer.metrics


class Asked(msgspec.Struct, frozen=True):
    """A validated request, who sent it, the Idempotency-Key that it is the first use of, and how it came."""

    request: TurnRequest
    caller: Caller
    first_use: FirstUse | None = None
    is_over_websocket: bool = False

    @property
    def mode(self) -> Mode:
        if self.request.background:
            return "background"
        return "websocket" if self.is_over_websocket else "streamed" if self.request.stream else "plain"


# Puts a turn into the store, and with it the events before the terminal one; whether it was still ours to be put there.
Save = Callable[[NewTurn, list[Event]], Awaitable[bool]]


class Course(msgspec.Struct, frozen=True):
    """The response that a turn becomes: as it began, its ids, its first event's number. `save` None: it is not kept.

    `place`: of a response that stands in its chain already.
    """

    begun: Json
    item_ids: ItemIds
    save: Save | None
    first_number: int = 0
    place: OwnPlace | None = None


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
        course = course or self._own_course(asked.request)
        meter = self._means.metrics.turn(asked.mode)
        note(asked.request, course)
        past = await self.pasts.of(asked.request, asked.caller.owner, course.place)
        try:
            ready = await self.renderer.rendered(asked.request, past.window, past.left_out)
            prompt = Prompt(asked.request, asked.caller, past, ready.way)
            fit = Fit(self.fitter, prompt, ready.rendered.body, course.item_ids)
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

    def _own_course(self, request: TurnRequest) -> Course:
        response_id = self._means.sources.new_id("resp")
        begun = begin(request, response_id, int(self._means.sources.clock()))
        return Course(begun, ItemIds(response_id), self._save if request.is_stored else None)

    async def _save(self, turn: NewTurn, closing: list[Event]) -> bool:
        await self._means.leases.store.save(turn)
        return True

    def _turn(self, asked: Asked, course: Course, ready: Ready, fit: Fit, meter: TurnMeter) -> Turn:
        plan = self._plan(asked, ready, fit, course.first_number)
        machine = ResponseStream(course.begun, plan, course.item_ids, self._means.sources.clock)
        keeper = Keeper(asked, fit, course, ready.ignored, self.ahead, meter)
        return Turn(fit, machine, keeper, self._settings.created_after_ms / 1000)

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
            is_mere=fit.is_mere,
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


def begin(request: TurnRequest, response_id: str, created_at: int) -> Json:
    """The response to a request before there is any output."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "output": [],
        **echo(request),
    }


def note(request: TurnRequest, course: Course) -> None:
    """For the line and the spans of the request."""
    if (noted := NOTED.get()) is not None:
        noted.response_id = course.begun["id"]
        noted.conversation_id = request.conversation_id or ""


class Keeper(msgspec.Struct, frozen=True):
    """Puts the response of one turn into the store."""

    asked: Asked
    fit: Fit
    course: Course
    ignored: tuple[str, ...]
    ahead: Ahead
    meter: TurnMeter

    async def keep(self, machine: ResponseStream, closing: list[Event]) -> None:
        """Whole, or not at all. Raises: StoreError, NotFound, ConversationLocked."""
        save = self.course.save
        if save is None:
            return
        past, response = self.fit.prompt.past, machine.snapshot()
        inputs = identified(past.own, self.course.item_ids)
        items = self.fit.window_items(response["output"]) if self.asked.request.conversation_id else None
        notes = Notes(self.ignored, self.fit.window_tokens(machine.counted), items)
        turn = new_turn(self.asked.caller.owner, response, inputs, self.asked.request, notes)
        lease = None if turn.is_detached else past.lease
        first_use = None if turn.is_detached else self.asked.first_use
        if lease or first_use:
            turn = msgspec.structs.replace(turn, lock=lease and lease.lock, first_use=first_use)
        began_at = self.meter.clock()
        is_saved = await save(turn, closing)
        self.meter.saved(began_at)
        if lease and is_saved:
            await lease.was_given_back()
        if is_saved and not turn.is_detached:
            self.ahead.consider(self.fit.prompt, turn.id, turn.body)


class Turn:
    """One call of a backend and the response it becomes; `ignored` names what was left out of the request."""

    def __init__(self, fit: Fit, machine: ResponseStream, keeper: Keeper, created_after_s: float) -> None:
        self.ignored = keeper.ignored
        self._fit = fit
        self._machine = machine
        self._keeper = keeper
        self._meter = keeper.meter
        self._created_after_s = created_after_s
        self._accepting: asyncio.Task[ChatStream | Need] | None = None
        self._is_told = False
        self._is_kept = False
        self._unsaid: list[Event] = []

    async def run(self) -> Json:
        """The finished response of a plain turn. Raises: UpstreamError, StoreError."""
        try:
            with self._meter:
                if need := await self._fit.look():
                    await self._compact(need)
                if not self._fit.is_mere:
                    self._machine.feed(await self._completion())
                self._machine.close()
                await self._keeper.keep(self._machine, [])
                self._learn()
                response = self._machine.snapshot()
                self._meter.status = response["status"]
                return response
        finally:
            await self._fit.prompt.past.release()

    async def _completion(self) -> Json:
        """Asked for once more when the window was too full at first."""
        upstream, passed = self._fit.prompt.way.upstream, self._fit.prompt.caller.passed
        try:
            return await upstream.complete(self._fit.body, passed)
        except WindowExceeded as refused:
            await self._change(refused)
            return await upstream.complete(self._fit.body, passed)

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

    async def _change(self, refused: WindowExceeded) -> list[Event]:
        """What makes a window fit that the backend refused. Raises: WindowExceeded when nothing does."""
        fitted = await self._fit.change(refused)
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
        """What the backend answers, or why it cannot be asked yet."""
        if need := await self._fit.look():
            return need
        prompt = self._fit.prompt
        return await prompt.way.upstream.stream(self._fit.body, prompt.caller.passed)

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The events of a turn in batches; the last one is terminal, whatever happens."""
        try:
            yield self._machine.start()
            async with contextlib.aclosing(self._made()) as batches:
                async for batch in batches:
                    yield batch
        except ProxyError as error:
            log.warning("turn failed: %s", error.logged)
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
        try:
            async with contextlib.aclosing(self._relayed()) as batches:
                async for batch in batches:
                    yield batch
        except WindowExceeded as refused:
            if self._machine.has_answer:
                raise
            await self._let_go()
            yield await self._change(refused)
            async with contextlib.aclosing(self._relayed()) as batches:
                async for batch in batches:
                    yield batch
        yield await self._finished()

    async def _relayed(self) -> AsyncGenerator[list[Event], None]:
        """What the backend says, after the compaction that the window needs."""
        stream = await (self._accepting or self._call_backend())
        if isinstance(stream, Need):
            yield await self._compact(stream)
            stream = stream if self._fit.is_mere else await self._call_backend()
        if isinstance(stream, Need):
            return
        async for chunks in stream:
            events: list[Event] = []
            for chunk in chunks:
                events += self._machine.feed(chunk)
            if events:
                self._meter.told()
                yield events
        if not stream.done and not self._machine.ended:
            raise stream.failed(UpstreamBroken("The backend closed its stream before the answer was finished."))

    async def _finished(self) -> list[Event]:
        """The last events, once the response is in the store; a response that cannot be kept has failed."""
        last = self._machine.close()
        saving = asyncio.ensure_future(self._keeper.keep(self._machine, last))
        try:
            await asyncio.shield(saving)
        except ProxyError as error:
            log.warning("turn could not be kept: %s", error.logged)
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
        try:
            await self._keeper.keep(self._machine, [])
        except ProxyError as failure:
            log.warning("a failed turn could not be kept: %s", failure.logged)
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


def _closed(accepting: asyncio.Task[ChatStream | Need]) -> None:
    if accepting.cancelled() or accepting.exception() is not None:
        return
    if isinstance(stream := accepting.result(), ChatStream):
        stream.close()
