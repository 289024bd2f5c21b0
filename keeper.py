"""What is asked of a turn, the response that it begins as, and what is kept of it.

May not know events but the last ones of a turn, the HTTP framework or SQL.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from admissions import Admission, Quotas
from ahead import Ahead
from auth import Caller
from fitting import Fit
from metrics import Mode, TurnMeter
from observing import NOTED
from past import Place
from records import Notes, decoded, identified, new_items, new_turn
from remembered import LaneMemory, Remembered
from request import TurnRequest, echo
from streaming import Event, Json, ResponseStream
from verbs import FirstUse, ItemIds, NewTurn


class Asked(msgspec.Struct, frozen=True):
    """A validated request, who sent it, and the Idempotency-Key that it is the first use of.

    `lane`: the memory of the connection that it came by, if it has one. Without `generates` no model is asked.
    """

    request: TurnRequest
    caller: Caller
    first_use: FirstUse | None = None
    lane: LaneMemory | None = None
    generates: bool = True
    admission: Admission | None = None

    @property
    def mode(self) -> Mode:
        if self.request.background:
            return "background"
        return "websocket" if self.lane is not None else "streamed" if self.request.stream else "plain"


# Puts a turn into the store, and with it the events before the terminal one; whether it was still ours to be put there.
Save = Callable[[NewTurn, list[Event]], Awaitable[bool]]


class Course(msgspec.Struct, frozen=True):
    """The response that a turn becomes: as it began, its ids, its first event's number. `save` None: it is not kept.

    `place`: of a response that stands in its chain already, or in a lane of a connection.
    """

    begun: Json
    item_ids: ItemIds
    save: Save | None
    first_number: int = 0
    place: Place | None = None


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
    """Puts the response of one turn into the store, and into the memory of its connection."""

    asked: Asked
    fit: Fit
    course: Course
    ahead: Ahead
    quotas: Quotas | None
    meter: TurnMeter

    def count(self, machine: ResponseStream) -> None:
        """Tells the quotas what the turn took, compaction and all, and that it is over: while it is kept."""
        if self.quotas is not None and (usage := machine.snapshot()["usage"]):
            self.quotas.spent(self.asked.caller.owner, usage["total_tokens"])
        if self.asked.admission is not None:
            self.asked.admission.release()

    async def keep(self, machine: ResponseStream, closing: list[Event]) -> None:
        """Whole, or not at all; before its client has the end of it, the turn is over for all processes.

        Raises: StoreError, NotFound, ConversationLocked.
        """
        try:
            await self._keep(machine, closing)
        finally:
            if self.asked.admission is not None:
                await self.asked.admission.over()

    async def _keep(self, machine: ResponseStream, closing: list[Event]) -> None:
        save, lane = self.course.save, self.asked.lane
        if save is None and lane is None:
            return
        turn = self._new_turn(machine)
        if save is not None:
            await self._save(save, turn, closing)
        if lane is not None:
            lane.keep(turn, self.fit.prompt.past.given)

    def _new_turn(self, machine: ResponseStream) -> NewTurn:
        past, response = self.fit.prompt.past, machine.snapshot()
        inputs = identified(past.own, self.course.item_ids)
        items = self.fit.window_items(response["output"]) if self.asked.request.conversation_id else None
        notes = Notes(self.fit.ignored, self.fit.window_tokens(machine.counted), items)
        return new_turn(self.asked.caller.owner, response, inputs, self.asked.request, notes)

    async def _save(self, save: Save, turn: NewTurn, closing: list[Event]) -> None:
        past = self.fit.prompt.past
        if isinstance(past.given, Remembered):  # the store cannot link to what it does not have
            earlier = new_items(decoded(past.given.items))
            turn = msgspec.structs.replace(turn, previous_id=None, inputs=(*earlier, *turn.inputs))
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
