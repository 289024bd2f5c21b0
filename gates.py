"""How many calls a backend has at once, who waits for it in line, and what is noted of how each call ended.

May not know what a call is. Of one process: several of them share no count.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import NamedTuple, Protocol

from circuits import Circuit
from upstream_errors import UpstreamBusy, UpstreamError

# When a client that was turned away may come again: places become free all the time.
BUSY_RETRY_AFTER_S = 2.0


class Observer(Protocol):
    """Is told, by the backends' names, of calls that were not made, and of those that another backend got."""

    def turned_away(self, upstream: str, error: UpstreamError) -> None:
        """UpstreamBusy or CircuitOpen: no call was made."""

    def fell_back(self, upstream: str, to: str, error: UpstreamError) -> None:
        """A request goes on with another backend."""


class Terms(NamedTuple):
    """What the caller can do beside this call: ask another backend; wait in line for as long as it takes."""

    has_other: bool = False
    is_patient: bool = False


NO_TERMS, PATIENT, WITH_OTHER = Terms(), Terms(is_patient=True), Terms(has_other=True)


class Gate:
    """Lets in so many at once, in the order in which they came; `most_in` 0: all."""

    def __init__(self, name: str, most_in: int, most_waiting: int, wait_s: float) -> None:
        self.inside = 0
        self._name = name
        self._most_in = most_in
        self._most_waiting = most_waiting
        self._wait_s = wait_s
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    def enter_at_once(self) -> bool:
        """Whether there was a place, which is taken then; nobody passes those who wait."""
        if self._most_in and (self._line or self.inside >= self._most_in):
            return False
        self.inside += 1
        return True

    async def enter_in_turn(self, *, is_patient: bool) -> None:
        """Waits in line. Raises: UpstreamBusy when the line is full, or after `wait_s`; neither for the patient."""
        if not is_patient and len(self._line) >= self._most_waiting:
            raise self._busy(f"{len(self._line)} requests wait for it already")
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        has_come = False
        try:
            done, _ = await asyncio.wait({turn}, timeout=None if is_patient else self._wait_s)
            has_come = bool(done)
        finally:
            if not has_come:
                self._let_out_of_line(turn)
        if not has_come:
            raise self._busy(f"no place became free within {self._wait_s:g} s")

    def _let_out_of_line(self, turn: asyncio.Future[None]) -> None:
        """Whose turn came in the very moment in which they left gives it on."""
        if turn.done():
            self.leave()
        else:
            self._line.remove(turn)

    def leave(self) -> None:
        """The place goes to the next in line."""
        if self._line:
            self._line.popleft().set_result(None)
        else:
            self.inside -= 1

    def _busy(self, reason: str) -> UpstreamBusy:
        error = UpstreamBusy(f"Upstream '{self._name}' is busy: {reason}.")
        error.retry_after_s = BUSY_RETRY_AFTER_S
        return error


class Guard(NamedTuple):
    """What stands before one backend."""

    name: str
    gate: Gate
    circuit: Circuit
    observer: Observer


class Hold:
    """One call of a backend within its limits: `async with` begins it and takes how the block ends for its outcome.

    An UpstreamError has failed, a block that ends went well, and of anything else (a client that leaves) nothing is
    said. What the backend holds on to beyond the block is taken over with `keep`, and ended by `end`.
    """

    __slots__ = ("_guard", "_is_held", "_is_judged", "_is_kept", "_terms")

    def __init__(self, guard: Guard, terms: Terms) -> None:
        self._guard = guard
        self._terms = terms
        self._is_held = False
        self._is_kept = False
        self._is_judged = False

    async def __aenter__(self) -> Hold:
        """Raises: UpstreamBusy, CircuitOpen."""
        if self._guard.circuit.is_open or not self._guard.gate.enter_at_once():
            await self._be_let_in()
        self._is_held = True
        return self

    async def _be_let_in(self) -> None:
        guard, (has_other, is_patient) = self._guard, self._terms
        try:
            guard.circuit.check(has_other)
            if not guard.gate.enter_at_once():
                await guard.gate.enter_in_turn(is_patient=is_patient)
            self._is_held = True
            guard.circuit.enter(has_other)
        except UpstreamError as error:
            self._let_go()
            guard.observer.turned_away(guard.name, error)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None or not self._is_kept:
            self.end(error)

    def keep(self) -> Hold:
        """The block may end without the call: `end` it."""
        self._is_kept = True
        self._guard.circuit.heard()
        return self

    def end(self, error: BaseException | None = None) -> None:
        """What comes first counts. None: it went well; what is no UpstreamError: it was given up."""
        if not self._is_held:
            return
        self._let_go()
        if self._is_judged:
            return
        if error is None:
            self._guard.circuit.went_well()
        elif isinstance(error, UpstreamError):
            self.failed(error)

    def give_up(self) -> None:
        """Ends what nobody wants any more: that tells nothing of the backend."""
        self._is_judged = True
        self.end()

    def failed(self, error: UpstreamError) -> None:
        """Notes a failure that is not raised, such as that of an answer that is passed on as it is."""
        self._is_judged = True
        self._guard.circuit.failed(error)

    def _let_go(self) -> None:
        if self._is_held:
            self._is_held = False
            self._guard.gate.leave()
