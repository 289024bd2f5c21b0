"""What a request continues: the window of a chain or a conversation, the items it refers to, and the right to write.

May not know chat messages, the HTTP framework or SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from folding import COMPACTION, Contents, folded, folds_in, laid_out, opened
from history import HISTORY, check_ids, mended, references, refuse_repeated, resolved, unsealed, with_blob_ids
from leases import Lease, Leases
from records import decoded
from remembered import LaneMemory
from request import TurnRequest
from run_verbs import UNFINISHED, OwnPlace
from sealing import Seals
from translation import check_items
from verbs import CONTINUED, Window, cannot_continue, conversation_lease, locked, no_conversation, still_running
from watching import LOOK_AGAIN_S, Watcher

Json = dict[str, Any]

# What sealed reasoning is bound to, beside its owner and id.
REASONING = "reasoning"
NO_WINDOW = Window("completed", [], 0)


class Past(msgspec.Struct, frozen=True):
    """What a turn begins with. `release` it in every case.

    `own`: the request's items, references replaced; `left_out`: names of what could not be used; `before`: the window
    as it was given, unless a compaction item of the request takes its place; `given`: the window as it was given.
    """

    contents: Contents
    own: list[Json]
    left_out: tuple[str, ...] = ()
    lease: Lease | None = None
    before: Window = NO_WINDOW
    given: Window = NO_WINDOW

    @property
    def window(self) -> list[Json]:
        """All items for the model, oldest first."""
        return laid_out(self.contents)

    async def release(self) -> None:
        if self.lease is not None:
            await self.lease.release()


@dataclass(frozen=True, slots=True)
class Patience:
    """What a turn waits for: its conversation, which another turn holds, and a parent that runs in background."""

    conversation_s: float
    parent_s: float


# Where a turn stands that is no first one: in a chain already, or in a lane of a connection, which remembers windows.
Place = OwnPlace | LaneMemory


class Pasts:
    """Finds the past of each request."""

    def __init__(self, leases: Leases, seals: Seals, watcher: Watcher, patience: Patience) -> None:
        self._leases = leases
        self._store = leases.store
        self._seals = seals
        self._watcher = watcher
        self._patience = patience

    async def of(self, request: TurnRequest, owner: str, place: Place | None = None) -> Past:
        """An OwnPlace is behind the parent, whatever has become of the parent's id.

        Raises: InvalidRequest, NotFound, ConversationLocked, StillRunning, StoreError.
        """
        items = request.items
        if _is_alone(request):
            return _alone(items)
        check_ids(items, "input")
        lease = await self._lock(request, owner, place)
        past = None
        try:
            window = await self._ended_window(request, owner, place)
            past = await self._found(request, owner, window, lease)
        finally:
            if past is None and lease is not None:
                await lease.release()
        return past

    async def seen(self, request: TurnRequest, owner: str) -> tuple[Past, bool]:
        """What a turn would begin with just now, without the right to write; and whether its parent has ended.

        Before that, its own items are all there is to see. Raises: InvalidRequest, NotFound, StoreError.
        """
        items = request.items
        if _is_alone(request):
            return _alone(items), True
        check_ids(items, "input")
        window = await self._window(request, owner, None)
        if window.status in UNFINISHED:
            own = await self.own(items, owner)
            self.check_folds(own, owner, "input")
            return Past(Contents(), own), False
        return await self._found(request, owner, window, None), True

    async def _ended_window(self, request: TurnRequest, owner: str, place: Place | None) -> Window:
        """Waits for a parent that runs still. Raises: StillRunning when it does so for too long."""
        parent = request.previous_response_id or ""
        window = await self._window(request, owner, place)
        if window.status not in UNFINISHED:
            return window
        with contextlib.suppress(TimeoutError), self._watcher.watching(parent) as watch:
            async with asyncio.timeout(self._patience.parent_s):
                while (window := await self._window(request, owner, place)).status in UNFINISHED:
                    await watch.changed(LOOK_AGAIN_S)
                return window
        raise still_running(parent)

    async def _found(self, request: TurnRequest, owner: str, window: Window, lease: Lease | None) -> Past:
        new = await self.own(request.items, owner)
        history = decoded(window.items)
        refuse_repeated(history, new)
        if folds_in(new):
            check_items(new, "input")
        open_fold = partial(self._seals.open, COMPACTION, owner)
        contents = folded(opened(history, open_fold, HISTORY), opened(new, open_fold, "input"))
        is_folded = folds_in(history[window.newest :])
        newest = 0 if is_folded else len(contents.history) - (len(history) - window.newest)
        kept, left_out = mended(contents.history, newest, window.status == "completed", contents.new)
        open_seal = partial(self._seals.open, REASONING, owner)
        earlier, lost = unsealed(kept, open_seal, HISTORY)
        current, foreign = unsealed(contents.new, open_seal, "input")
        contents = msgspec.structs.replace(contents, history=earlier, new=current)
        is_replaced = any(item.get("type") == COMPACTION for item in new)
        before = NO_WINDOW if is_replaced else window
        return Past(contents, new, (*left_out, *lost, *foreign), lease, before, window)

    def check_folds(self, items: list[Json], owner: str, root: str) -> None:
        """Raises: InvalidRequest for a compaction item that no window could be laid out from."""
        opened(items, partial(self._seals.open, COMPACTION, owner), root)

    async def own(self, items: list[Json], owner: str) -> list[Json]:
        """New items as they are kept, but for ids that nobody gave. Raises: NotFound, StoreError."""
        if ids := references(items):
            found = await self._store.items(owner, ids)
            items = resolved(items, dict(zip(found, decoded(list(found.values())), strict=True)))
        return with_blob_ids(items, lambda kind, blob: self._seals.item_id(kind, owner, blob))

    async def _lock(self, request: TurnRequest, owner: str, place: Place | None) -> Lease | None:
        """Only who adds to a conversation locks it. Raises: ConversationLocked, NotFound."""
        if not request.conversation_id or not request.is_stored:
            return None
        if await self._store.conversation(owner, request.conversation_id) is None:
            raise no_conversation(request.conversation_id, "conversation")
        holder = place.holder if isinstance(place, OwnPlace) else None
        lease = self._leases.lease(conversation_lease(request.conversation_id), holder)
        # In background nobody waits, and who holds the conversation gives it back.
        if await lease.acquire(math.inf if request.background else self._patience.conversation_s):
            return lease
        raise locked()

    async def _window(self, request: TurnRequest, owner: str, place: Place | None) -> Window:
        if request.conversation_id:
            window = await self._store.conversation_window(owner, request.conversation_id)
            if window is None:
                raise no_conversation(request.conversation_id, "conversation")
            return window
        if not request.previous_response_id:
            return NO_WINDOW
        window = await self._window_after(parent := request.previous_response_id, owner, place)
        if window is None or window.status not in CONTINUED | UNFINISHED:
            raise cannot_continue(parent, f"is {window.status} and cannot be continued" if window else "not found")
        return window

    async def _window_after(self, parent: str, owner: str, place: Place | None) -> Window | None:
        """From the memory of a connection, where it has it, else from the store."""
        if isinstance(place, OwnPlace):
            return await self._store.window_before(owner, place.response_id)
        return (place and place.window(owner, parent)) or await self._store.window(owner, parent)


def _alone(items: list[Json]) -> Past:
    return Past(Contents(new=items), items)


def _is_alone(request: TurnRequest) -> bool:
    """Whether it continues nothing and refers to nothing."""
    return isinstance(request.input, str) and not request.previous_response_id and not request.conversation
