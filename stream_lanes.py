"""Which request of a connection is answered next: in order within a lane, lanes side by side, not too many at once.

May not do I/O, nor know what a request says. Source: WebSocket mode of the Responses API, read 2026-11-20.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

from errors import InvalidRequest, QueueFull

AT_ONCE = 16
NAMED_LANES = 32
NAME_FORM = re.compile(r"[A-Za-z0-9_.-]{1,256}")


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has not begun; `stream_id` None: of the lane that has no name."""

    stream_id: str | None
    raw: bytes


@dataclass(slots=True)
class _Lane:
    """`is_busy`: one of its requests is being answered."""

    waiting: deque[Waiting] = field(default_factory=deque)
    is_busy: bool = False


def lane_name(given: object) -> str | None:
    """The lane that a `stream_id` names. Raises: InvalidRequest."""
    if given is None:
        return None
    if isinstance(given, str) and NAME_FORM.fullmatch(given):
        return given
    raise InvalidRequest(
        "Invalid 'stream_id': expected 1 to 256 letters, digits, '_', '.' or '-'.",
        param="stream_id",
        code="invalid_stream_id",
    )


class StreamLanes:
    """The lanes of one connection. What waits comes to at most so many requests, and so many bytes."""

    def __init__(self, most_waiting: int, most_waiting_bytes: int) -> None:
        self.running = 0
        self._most_waiting = most_waiting
        self._most_waiting_bytes = most_waiting_bytes
        self._waiting = 0
        self._waiting_bytes = 0
        self._lanes: dict[str | None, _Lane] = {None: _Lane()}
        # Lanes whose first request could begin, the one that became so first at the left.
        self._ready: deque[_Lane] = deque()

    def add(self, request: Waiting) -> None:
        """Raises: InvalidRequest for one lane too many, QueueFull."""
        lane = self._lanes.get(request.stream_id)
        if lane is None and len(self._lanes) > NAMED_LANES:
            raise InvalidRequest(
                f"This connection has {NAMED_LANES} named lanes already: use one of them, or connect again.",
                param="stream_id",
                code="websocket_stream_limit_reached",
            )
        if self._waits(lane):
            self._refuse_surplus(request)
        lane = self._lanes.setdefault(request.stream_id, lane or _Lane())
        lane.waiting.append(request)
        self._waiting += 1
        self._waiting_bytes += len(request.raw)
        if not lane.is_busy and len(lane.waiting) == 1:
            self._ready.append(lane)

    def _waits(self, lane: _Lane | None) -> bool:
        return self.running + len(self._ready) >= AT_ONCE or (lane is not None and (lane.is_busy or bool(lane.waiting)))

    def _refuse_surplus(self, request: Waiting) -> None:
        is_full = self._waiting >= self._most_waiting
        if is_full or self._waiting_bytes + len(request.raw) > self._most_waiting_bytes:
            raise QueueFull(
                f"Too many requests wait on this connection: at most {self._most_waiting}, of "
                f"{self._most_waiting_bytes} bytes together."
            )

    def next(self) -> Waiting | None:
        """What can begin now, if anything; say when it is `done`."""
        if not self._ready or self.running >= AT_ONCE:
            return None
        lane = self._ready.popleft()
        lane.is_busy = True
        self.running += 1
        return self._taken(lane)

    def _taken(self, lane: _Lane) -> Waiting:
        request = lane.waiting.popleft()
        self._waiting -= 1
        self._waiting_bytes -= len(request.raw)
        return request

    def done(self, request: Waiting) -> None:
        lane = self._lanes[request.stream_id]
        lane.is_busy = False
        self.running -= 1
        if lane.waiting:
            self._ready.append(lane)

    def emptied(self) -> list[Waiting]:
        """All that waits, which does so no longer."""
        self._ready.clear()
        return [self._taken(lane) for lane in self._lanes.values() for _ in range(len(lane.waiting))]
