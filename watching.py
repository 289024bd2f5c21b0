"""Who waits for a response to change, in whichever process that happens.

May not know what a change means. Within the process a change is told, and to other processes where the store can do so;
what they write is seen, too, by a number of the store that differs then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from errors import StoreError
from run_verbs import QUEUE, RunStore

log = logging.getLogger("responses_proxy.watching")

# Whether the store hears what others announce -> how often that number is asked for, and how much later when nobody
# waits. What is not heard is what a process wrote just before it died, or lost its connection.
PACES_S = {False: (0.1, 0.4), True: (1.0, 4.0)}

# Who waits looks again after that time even when nobody told of a change.
LOOK_AGAIN_S = 5.0

State = tuple[str, int | None]


class Watch:
    """One who waits for one response. Only one task may wait at it: it is told once."""

    def __init__(self) -> None:
        self._has_changed = asyncio.Event()

    def tell(self) -> None:
        self._has_changed.set()

    async def changed(self, timeout_s: float | None = None) -> bool:
        """Whether the response has changed since the last call, or does so in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_changed.wait()
        had_changed = self._has_changed.is_set()
        self._has_changed.clear()
        return had_changed


class Watcher:
    """Tells everybody who waits. `run` it for as long as anybody does."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._watches: dict[str, set[Watch]] = {}
        self._states: dict[str, State] = {}
        # Told whenever another process has changed something, whatever it was, and how often that was.
        self.anything = Watch()
        self.version = 0
        self._seen = 0
        self._missed = Watch()
        self._attending = 0
        self._is_attended = asyncio.Event()

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """What other processes write matters soon."""
        self._attending += 1
        self._is_attended.set()
        try:
            yield
        finally:
            self._attending -= 1
            if not self._attending:
                self._is_attended.clear()

    @contextlib.contextmanager
    def watching(self, response_id: str) -> Iterator[Watch]:
        """Look at the response after this has begun, so that no change is missed."""
        watch = Watch()
        watches = self._watches.setdefault(response_id, set())
        watches.add(watch)
        try:
            with self.attending():
                yield watch
        finally:
            watches.discard(watch)
            if not watches:
                self._watches.pop(response_id, None)
                self._states.pop(response_id, None)

    def tell(self, response_id: str) -> None:
        """This process has changed the response."""
        self._tell_here(response_id)
        self._store.announce(response_id)

    def tell_queue(self) -> None:
        """This process has put a run in line that others may claim, or has stopped one that they may hold."""
        self.anything.tell()
        self._store.announce(QUEUE)

    def _tell_here(self, response_id: str) -> None:
        for watch in self._watches.get(response_id, ()):
            watch.tell()

    def tell_all(self) -> None:
        """Everybody who waits has to look up."""
        for response_id in self._watches:
            self._tell_here(response_id)

    async def run(self) -> None:
        """Tells what others have written, until it is cancelled. A store that cannot be read is asked again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._store.hear(self._hear))
            group.create_task(self._look_again_and_again())

    def _hear(self, news: frozenset[str] | None) -> None:
        if news is None:
            with self.attending():  # which ends the longer pause
                self._missed.tell()
            return
        for response_id in news:
            self._tell_here(response_id)
        if QUEUE in news:
            self._tell_anything()

    def _tell_anything(self) -> None:
        self.version += 1
        self.anything.tell()

    async def _look_again_and_again(self) -> None:
        while True:
            try:
                seen = await self._store.version()
                if seen != self._seen:
                    await self._look()
                    self._seen = seen
                    self._tell_anything()
            except StoreError as error:
                log.log(error.log_level, "could not look for changes: %s", error.message)
            await self._pause()

    async def _pause(self) -> None:
        look_every_s, idle_s = PACES_S[self._store.hears]
        if not await self._missed.changed(look_every_s):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(idle_s):
                    await self._is_attended.wait()

    async def _look(self) -> None:
        watched = list(self._watches)
        states = await self._store.states(watched) if watched else {}
        for response_id in watched:
            state = states.get(response_id, GONE)
            if self._states.get(response_id) != state and response_id in self._watches:
                self._states[response_id] = state
                self._tell_here(response_id)


GONE: State = ("", None)
