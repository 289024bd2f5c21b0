"""What one connection remembers: the window after the latest response of each of its lanes, where no store has it.

May not do I/O. It goes with the connection. A window shares its items with the one it goes on from.
"""

from __future__ import annotations

from dataclasses import dataclass

from verbs import CONTINUED, NewTurn, Window


class Remembered(Window, frozen=True):
    """A window that stands in no store."""


def window_after(before: Window, turn: NewTurn) -> Remembered:
    """What a child of this turn begins with, as a store would give it; `before`: what the turn began with."""
    new = [item for item in (*turn.inputs, *turn.outputs) if not item.is_hidden]
    fold = next((at for at in reversed(range(len(new))) if new[at].is_compaction), None)
    earlier = before.items if fold is None else []
    items = [*earlier, *(item.body for item in new[fold:])]
    return Remembered(turn.status, items, len(earlier), turn.body, turn.settings)


@dataclass(frozen=True, slots=True)
class _Latest:
    """The latest response of a lane, and the window after it."""

    response_id: str
    window: Remembered
    held_bytes: int


class Memory:
    """Of one connection, which is one owner's. Beyond `limit_bytes` the lane that was used longest ago is forgotten."""

    def __init__(self, owner: str, limit_bytes: int) -> None:
        self._owner = owner
        self._limit_bytes = limit_bytes
        self._latest: dict[str | None, _Latest] = {}  # by lane, the one that was used last at the end

    def lane(self, name: str | None) -> LaneMemory:
        return LaneMemory(self, name)

    def window(self, owner: str, response_id: str) -> Remembered | None:
        """Of the latest response of any lane."""
        if owner != self._owner:
            return None
        name = next((name for name, latest in self._latest.items() if latest.response_id == response_id), None)
        if (latest := self._latest.get(name)) is None or latest.response_id != response_id:
            return None
        self._latest[name] = self._latest.pop(name)
        return latest.window

    def keep(self, lane: str | None, response_id: str, window: Remembered | None) -> None:
        """`window` None: the store has it."""
        self._latest.pop(lane, None)
        if window is not None:
            self._latest[lane] = _Latest(response_id, window, sum(map(len, window.items)))
            self._make_room()

    def forget(self, lane: str | None, response_id: object) -> None:
        """Unless it is another lane's."""
        if (latest := self._latest.get(lane)) and latest.response_id == response_id:
            del self._latest[lane]

    def _make_room(self) -> None:
        while sum(latest.held_bytes for latest in self._latest.values()) > self._limit_bytes:
            del self._latest[next(iter(self._latest))]


@dataclass(frozen=True, slots=True)
class LaneMemory:
    """The memory of a connection as the turns of one lane have it."""

    memory: Memory
    name: str | None

    def window(self, owner: str, response_id: str) -> Remembered | None:
        return self.memory.window(owner, response_id)

    def keep(self, turn: NewTurn, before: Window) -> None:
        """A turn that can be continued becomes the latest of the lane."""
        if turn.status in CONTINUED:
            self.memory.keep(self.name, turn.id, window_after(before, turn) if turn.is_brief else None)

    def forget(self, response_id: object) -> None:
        """What a turn that failed wanted to continue."""
        self.memory.forget(self.name, response_id)
