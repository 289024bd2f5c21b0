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

from auth import Caller
from errors import InvalidRequest, ProxyError, UpstreamBroken
from history import HISTORY, sealable
from leases import Leases
from past import REASONING, OwnPlace, Past, Pasts, Patience
from records import identified, new_turn
from replay import replayed
from request import TurnRequest, echo, refuse_unused
from sealing import Seals
from sources import Sources
from streaming import Event, Json, ReasoningSettings, ResponseStream, StreamPlan
from translation import Rendered, check_items, has_files, render
from upstream import ChatStream, Upstream, Upstreams
from verbs import FirstUse, ItemIds, NewTurn
from watching import Watcher

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


class Asked(msgspec.Struct, frozen=True):
    """A validated request, who sent it, and the Idempotency-Key that it is the first use of."""

    request: TurnRequest
    caller: Caller
    first_use: FirstUse | None = None


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


class _Ready(msgspec.Struct, frozen=True):
    """A rendered request and where it goes; `ignored` names what was left out."""

    upstream: Upstream
    rendered: Rendered
    ignored: tuple[str, ...]


class Turns:
    """Makes turns out of validated requests."""

    def __init__(self, means: Means, settings: TurnSettings, reasoning: ReasoningSettings) -> None:
        self._means = means
        self._settings = settings
        self._reasoning = reasoning
        patience = Patience(settings.conversation_wait_s, settings.parent_wait_s)
        self._pasts = Pasts(means.leases, means.seals, means.watcher, patience)

    async def prepare(self, asked: Asked, course: Course | None = None) -> Turn:
        """A turn ready to be run; `close` it in every case. Raises: ProxyError."""
        course = course or self._own_course(asked.request)
        past = await self._pasts.of(asked.request, asked.caller.owner, course.place)
        try:
            return self._turn(asked, past, course, await self._rendered(asked.request, past))
        except BaseException:
            await past.release()
            raise

    async def look(self, asked: Asked) -> tuple[list[Json], tuple[str, ...]]:
        """The items of a request that is to be run later, references replaced, and names of what will be left out.

        Raises: InvalidRequest, NotFound, StoreError; what depends on a parent that runs still is found at the run.
        """
        request = asked.request
        past, parent_has_ended = await self._pasts.seen(request, asked.caller.owner)
        if parent_has_ended:
            return past.own, (await self._rendered(request, past)).ignored
        check_items(past.own, "input")
        return past.own, (await self._ready(request, [], ())).ignored

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

    async def _rendered(self, request: TurnRequest, past: Past) -> _Ready:
        """Raises: InvalidRequest."""
        ready = await self._ready(request, past.window, past.left_out)
        if not ready.rendered.body["messages"]:
            raise InvalidRequest("Invalid 'input': nothing in it is for the model.", param="input")
        return ready

    async def _ready(self, request: TurnRequest, window: list[Json], left_out: tuple[str, ...]) -> _Ready:
        upstream, model = self._means.upstreams.route(request.model)
        dialect = await upstream.dialect()
        if has_files(window):
            rendered = await asyncio.to_thread(render, request, window, dialect, model)
        else:
            rendered = render(request, window, dialect, model)
        ignored = rendered.ignored + left_out
        self._refuse_ignored(ignored)
        if request.stream or request.background:
            rendered.body["stream"] = True
            if dialect.stream_usage:
                rendered.body["stream_options"] = {"include_usage": True}
        return _Ready(upstream, rendered, ignored)

    def _refuse_ignored(self, ignored: tuple[str, ...]) -> None:
        """Raises: UnsupportedParameter where the settings are strict."""
        if self._settings.strict and (refused := tuple(name for name in ignored if not name.startswith(HISTORY))):
            raise refuse_unused(refused)

    def _turn(self, asked: Asked, past: Past, course: Course, ready: _Ready) -> Turn:
        plan = self._plan(asked, ready, course.first_number)
        machine = ResponseStream(course.begun, plan, course.item_ids, self._means.sources.clock)
        keeper = Keeper(asked, past, course.item_ids, ready.ignored, course.save) if course.save else None
        wait_s = self._settings.created_after_ms / 1000
        call = Call(ready.upstream, ready.rendered.body, asked.caller.bearer, wait_s)
        return Turn(call, machine, past, keeper, ready.ignored)

    def _plan(self, asked: Asked, ready: _Ready, first_number: int) -> StreamPlan:
        request, rendered = asked.request, ready.rendered
        return StreamPlan(
            refs=rendered.refs,
            taken_call_ids=rendered.call_ids,
            logprobs=request.includes("message.output_text.logprobs"),
            parallel=request.parallel_tool_calls is not False,
            expose=self._reasoning.expose,
            think=ready.upstream.settings.think,
            silent=not request.stream,
            first_number=first_number,
            seal=self._seal_of(asked.caller.owner) if self._carries_reasoning(request) else None,
            estimate_input_tokens=lambda: len(orjson.dumps(rendered.body)) // BYTES_PER_TOKEN,
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


class Keeper(msgspec.Struct, frozen=True):
    """Puts the response of one turn into the store."""

    asked: Asked
    past: Past
    item_ids: ItemIds
    ignored: tuple[str, ...]
    save: Save

    async def keep(self, response: Json, closing: list[Event]) -> None:
        """Whole, or not at all. Raises: StoreError, NotFound, ConversationLocked."""
        inputs = identified(self.past.own, self.item_ids)
        turn = new_turn(self.asked.caller.owner, response, inputs, self.asked.request, self.ignored)
        lease = None if turn.is_detached else self.past.lease
        first_use = None if turn.is_detached else self.asked.first_use
        if lease or first_use:
            turn = msgspec.structs.replace(turn, lock=lease and lease.lock, first_use=first_use)
        is_saved = await self.save(turn, closing)
        if lease and is_saved:
            await lease.was_given_back()


class Call(msgspec.Struct, frozen=True):
    """A chat request on its way to a backend. `bearer` is the client's own key, where it is passed on."""

    upstream: Upstream
    body: Json
    bearer: str | None
    created_after_s: float


class Turn:
    """One call of a backend and the response it becomes; `ignored` names what was left out of the request."""

    def __init__(
        self, call: Call, machine: ResponseStream, past: Past, keeper: Keeper | None, ignored: tuple[str, ...]
    ) -> None:
        self.ignored = ignored
        self._call = call
        self._machine = machine
        self._past = past
        self._keeper = keeper
        self._accepting: asyncio.Task[ChatStream] | None = None
        self._is_told = False
        self._is_kept = False
        self._unsaid: list[Event] = []

    async def run(self) -> Json:
        """The finished response of a plain turn. Raises: UpstreamError, StoreError."""
        try:
            call = self._call
            self._machine.feed(await call.upstream.complete(call.body, call.bearer))
            self._machine.close()
            response = self._machine.snapshot()
            if self._keeper is not None:
                await self._keeper.keep(response, [])
            return response
        finally:
            await self._past.release()

    async def accept(self) -> None:
        """Calls the backend and waits for its word, but no longer than `created_after_ms`.

        Raises: UpstreamError when the backend refuses at once. After that, failures are events.
        """
        accepting = self._call_backend()
        try:
            done, _ = await asyncio.wait({accepting}, timeout=self._call.created_after_s)
            if done and accepting.exception():
                accepting.result()
        except BaseException:
            await self.close()
            raise

    def _call_backend(self) -> asyncio.Task[ChatStream]:
        call = self._call
        self._accepting = asyncio.create_task(call.upstream.stream(call.body, call.bearer))
        return self._accepting

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The events of a turn in batches; the last one is terminal, whatever happens."""
        try:
            yield self._machine.start()
            async with contextlib.aclosing(self._answer()) as batches:
                async for batch in batches:
                    yield batch
        except ProxyError as error:
            log.warning("turn failed: %s", error.message)
            yield await self._failed(error)
        except Exception:
            log.exception("turn failed on a fault of this proxy")
            yield await self._failed(ProxyError("The proxy failed while it translated the answer."))
        finally:
            await self.close()

    async def _answer(self) -> AsyncGenerator[list[Event], None]:
        machine = self._machine
        stream = await (self._accepting or self._call_backend())
        async for chunks in stream:
            events: list[Event] = []
            for chunk in chunks:
                events += machine.feed(chunk)
            if events:
                yield events
        if not stream.done and not machine.ended:
            raise UpstreamBroken("The backend closed its stream before the answer was finished.")
        yield await self._finished()

    async def _finished(self) -> list[Event]:
        """The last events, once the response is in the store; a response that cannot be kept has failed."""
        last = self._machine.close()
        if self._keeper is not None:
            saving = asyncio.ensure_future(self._keeper.keep(self._machine.snapshot(), last))
            try:
                await asyncio.shield(saving)
            except ProxyError as error:
                log.warning("turn could not be kept: %s", error.message)
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
        return last + self._machine.finish()

    async def _failed(self, error: ProxyError) -> list[Event]:
        """The terminal event, and a record of the failure where one can be kept: clients know the id by now."""
        last = self.fail(error)
        if self._keeper is not None:
            try:
                await self._keeper.keep(self._machine.snapshot(), [])
            except ProxyError as failure:
                log.warning("a failed turn could not be kept: %s", failure.message)
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
        accepting, self._accepting = self._accepting, None
        try:
            if accepting is not None:
                accepting.cancel()
                accepting.add_done_callback(_let_go)  # holds even when this is cancelled
                await asyncio.wait({accepting})
        finally:
            await self._past.release()


def _let_go(accepting: asyncio.Task[ChatStream]) -> None:
    if not accepting.cancelled() and accepting.exception() is None:
        accepting.result().close()
