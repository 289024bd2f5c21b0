"""The logs of streamed runs: what an attempt writes there, how it ends, and what readers are told of it.

May not know the HTTP framework, SQL or what an event says. The terminal event is in no log: a reader makes it from the
response that was kept, so that both cannot disagree.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import frames
from errors import InvalidRequest, StoreError
from records import restored
from replay import terminal
from run_verbs import UNFINISHED, Batch, Ending, Run, RunStore, Tail
from verbs import NewTurn, no_response
from watching import GONE, LOOK_AGAIN_S, Watcher

Json = dict[str, Any]
Event = dict[str, Any]
T = TypeVar("T")
log = logging.getLogger("responses_proxy.event_log")

# How long a response with `store: false` can be polled after its end. Source: developers.openai.com, background guide.
BRIEF_S = 600.0
# How often events that wait are written.
FLUSH_EVERY_S = 0.05
# How long after a store that could not be used it is tried again.
TRY_AGAIN_S = 0.5


async def persistently(work: Callable[[], Awaitable[T]]) -> T:
    """What the work returns, as soon as the store lets it; it is asked until then, or until this is cancelled."""
    while True:
        try:
            return await work()
        except StoreError as error:
            log.log(error.log_level, "tried again in %g s: %s", TRY_AGAIN_S, error.message)
        await asyncio.sleep(TRY_AGAIN_S)


class Logs:
    """The logs of all runs of a store, each readable for `retention_s` after its run."""

    def __init__(self, store: RunStore, watcher: Watcher, clock: Callable[[], float], retention_s: float) -> None:
        self.store = store
        self.watcher = watcher
        self.is_interrupted = False
        # Id of a response that this process is making -> its newest batch, so that readers here need not ask the store.
        self.newest: dict[str, Batch] = {}
        self._clock = clock
        self._retention_s = retention_s

    def interrupt(self) -> None:
        """Readers go on at another process."""
        self.is_interrupted = True
        self.watcher.tell_all()

    def lifetimes(self) -> tuple[float, float]:
        """Until when the log and the response live, each only if it is short-lived, of a run that ends now."""
        now = self._clock()
        return now + self._retention_s, now + BRIEF_S

    def followed(self, owner: str, response: Json) -> Follower:
        """All events of a response that was admitted as a stream just now."""
        return Follower(self, owner, response, -1)

    async def follower(self, owner: str, response_id: str, after: int = -1) -> Follower:
        """Raises: NotFound; InvalidRequest for a response whose events are not kept, or not any more."""
        kept = await self.store.response(owner, response_id)
        if kept is None:
            raise no_response(response_id)
        response = restored(kept)
        if not response["background"]:
            raise _no_stream("it was not created with background=true")
        if not await self.is_kept(response_id):
            raise _no_stream("it was not created with stream=true or the stream TTL has expired")
        return Follower(self, owner, response, after)

    async def is_kept(self, response_id: str) -> bool:
        """Whether there is a log of the response."""
        return (await self.store.states([response_id])).get(response_id, GONE)[1] is not None


class RunLog:
    """The events of one attempt and its end. After a lost claim nothing is written any more."""

    def __init__(self, home: Logs, run: Run) -> None:
        self.is_over = False
        self.is_settled = False
        # Whether an end was sent of which nobody knows whether it was kept.
        self._is_unsure = False
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
        """All at the same moments, so that one transaction takes the events of many runs."""
        time_of = asyncio.get_running_loop().time
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            try:
                await self._flush()
                await asyncio.sleep(FLUSH_EVERY_S - time_of() % FLUSH_EVERY_S)
            except StoreError as error:
                log.log(error.log_level, "events of %s wait: %s", self._run.response_id, error.message)
                self._has_some.set()
                await asyncio.sleep(TRY_AGAIN_S)

    async def _flush(self) -> None:
        """Raises: StoreError."""
        async with self._writing:
            batch, count = self._batch(), len(self._waiting)
            if batch is None or self.is_over:
                return
            self.is_over = not await self._home.store.log(self._run.held, batch)
            if not self.is_over:
                self._home.newest[self._run.response_id] = batch
            self._first = batch.end
            del self._waiting[:count]
        self._home.watcher.tell(self._run.response_id)

    def _batch(self) -> Batch | None:
        return Batch(self._first, self._end, b"".join(self._waiting)) if self._waiting else None

    def close(self) -> None:
        """The attempt has ended; nothing more is added."""
        self._home.newest.pop(self._run.response_id, None)

    async def settle(self, turn: NewTurn, closing: list[Event]) -> bool:
        """Ends the run, unless the claim is lost: whether it did.

        A store that cannot be written is tried until it can be, because the answer is there.

        Raises: NotFound, ConversationLocked.
        """
        self.add(closing)
        async with self._writing:
            if not self.is_over:
                self.is_settled = await persistently(lambda: self._settle(turn))
                self.is_over = True
        self._home.watcher.tell(self._run.response_id)
        return self.is_settled

    async def _settle(self, turn: NewTurn) -> bool:
        ending = Ending(turn, self._batch(), *self._home.lifetimes())
        try:
            if await self._home.store.settle(self._run.held, ending):
                return True
        except StoreError:
            self._is_unsure = True
            raise
        return self._is_unsure and await self._was_settled(turn)

    async def _was_settled(self, turn: NewTurn) -> bool:
        """Whether the claim is gone because this very end was kept, and only the answer was lost."""
        kept = await self._home.store.response(self._run.owner, turn.id)
        return kept is not None and (kept.status, kept.completed_at, kept.body) == (
            turn.status,
            turn.completed_at,
            turn.body,
        )


class Follower:
    """The events of a background response behind a number: from the log, then as they come, and a terminal one."""

    def __init__(self, home: Logs, owner: str, response: Json, after: int) -> None:
        self._home = home
        self._owner = owner
        self._response = response
        self._after = after
        self._last = -1

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Raises: Interrupted when the process stops before."""
        home, response_id = self._home, self._response["id"]
        with home.watcher.watching(response_id) as watch:
            while (tail := self._just_written() or await self._read()) is not None:
                if data := self._new(tail):
                    yield data
                if tail.has_more:
                    continue
                if tail.status not in UNFINISHED:
                    break
                if home.is_interrupted:
                    raise frames.Interrupted
                await watch.changed(LOOK_AGAIN_S)
        if tail is None or self._after <= self._last:
            number = max(self._after, self._last) + 1
            yield frames.encode([terminal(await self._ended(), number)])

    def goodbye(self) -> None:
        """What is told ends with the run, and not with this process."""

    async def close(self) -> None:
        """Nothing is held between two events."""

    def _just_written(self) -> Tail | None:
        """What this process has logged last, when that goes on where the reader stands."""
        told, batch = max(self._after, self._last), self._home.newest.get(self._response["id"])
        if batch is None or not batch.first <= told + 1 < batch.end:
            return None
        return Tail("in_progress", [(batch.first, batch.frames)], has_more=False)

    async def _read(self) -> Tail | None:
        told = max(self._after, self._last)
        return await persistently(lambda: self._home.store.tail(self._owner, self._response["id"], told))

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
        kept = await persistently(lambda: self._home.store.response(self._owner, self._response["id"]))
        return restored(kept) if kept else {**self._response, "status": "cancelled", "output": []}


def _no_stream(reason: str) -> InvalidRequest:
    return InvalidRequest(f"This response cannot be streamed because {reason}.", param="stream")
