"""The verbs of a store about background runs, and the values that they take and give.

May not do I/O. Requests, bodies and events are opaque bytes here. A run is a background turn that has not ended. Who
claims it holds it under a lease and a generation; what is written with an older generation is not taken any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from quota_verbs import QuotaStore
from verbs import KeptResponse, NewTurn, Store

UNFINISHED = frozenset({"queued", "in_progress"})
# In what processes tell each other: runs may be claimed, or have been stopped.
QUEUE = "*"
# Is told what others have announced, ids of responses and QUEUE; None: something of it may be missing.
Tell = Callable[[frozenset[str] | None], None]


class Batch(msgspec.Struct, frozen=True):
    """The events with numbers from `first` to below `end`, as clients are sent them."""

    first: int
    end: int
    frames: bytes


class NewRun(msgspec.Struct, frozen=True):
    """A run to be queued. `request` is without its input, which is the turn's; `batch` None: no events are kept."""

    turn: NewTurn
    request: bytes
    admitted_at: float
    bearer: str | None = None
    batch: Batch | None = None


class QueueLimits(msgspec.Struct, frozen=True):
    """How many runs may be queued."""

    per_owner: int
    total: int


class Held(msgspec.Struct, frozen=True):
    """A claim on a run."""

    run: int
    generation: int

    @property
    def holder(self) -> str:
        """Who holds the leases that go with this claim; the next claim of the run takes them away."""
        return f"run {self.run}.{self.generation}"


class Run(msgspec.Struct, frozen=True):
    """A run that was claimed; `inputs` holds the JSON of its own items in order."""

    held: Held
    response_id: str
    owner: str
    created_at: int
    inputs: list[bytes]
    attempt: int
    request: bytes
    bearer: str | None
    next_number: int | None


class OwnPlace(msgspec.Struct, frozen=True):
    """Where a response stands already that is made only now, and who makes it."""

    response_id: str
    holder: str


class Ending(msgspec.Struct, frozen=True):
    """How a run ends: its response, the last events before the terminal one, and how long what is kept lives."""

    turn: NewTurn
    batch: Batch | None
    log_until_at: float
    lives_until: float


class Stopped(msgspec.Struct, frozen=True):
    """A response after a cancel; `run` is the number of its run while a process still carries it out."""

    response: KeptResponse
    was_running: bool
    run: int | None


class Tail(msgspec.Struct, frozen=True):
    """The next logged events of a response, each batch with the number of its first one.

    `has_more`: of what is logged now, not all was given.
    """

    status: str
    batches: list[tuple[int, bytes]]
    has_more: bool


class RunInfo(msgspec.Struct, frozen=True):
    """A run as people want to see it; `holder` None: queued."""

    is_waiting: bool
    response_id: str
    owner: str
    admitted_at: float
    attempts: int
    events: int | None
    holder: str | None


class QueueState(msgspec.Struct, frozen=True):
    """How many runs there are just now."""

    queued: int
    running: int


class RunStore(Store, QuotaStore, Protocol):
    """A store that keeps runs, and what owners have used, too. Times are Unix seconds and come from the caller."""

    async def admit(self, run: NewRun, limits: QueueLimits) -> None:
        """Keeps the response as queued and its run, or nothing of them.

        Raises: QueueFull, and as `save` does.
        """

    async def claim(self, holder: str, until_at: float, limit: int) -> list[Run]:
        """The next runs in line: owners take turns, and each owner's runs come in the order of their admission."""

    async def renew_runs(self, holder: str, until_at: float) -> list[Held]:
        """Prolongs the leases of a holder; what it holds still."""

    async def held(self, holder: str) -> list[Held]:
        """What a holder holds, without the runs that it has to let go."""

    async def release_runs(self, holder: str) -> None:
        """Puts all of the holder's runs back in line, as if they had not been claimed."""

    async def free(self, held: Held, before_at: float) -> None:
        """Ends a claim whose lease ends before that time: its attempt counts, and the run goes back in line."""

    async def release_run(self, held: Held) -> None:
        """Puts one run back in line, as if it had not been claimed."""

    async def log(self, held: Held, batch: Batch) -> bool:
        """Adds events to a run's log; False when the claim is lost, and nothing was written."""

    async def settle(self, held: Held, ending: Ending) -> bool:
        """Ends a run: its response, its last events, its row. False when the claim is lost, and nothing was written.

        Raises: NotFound and ConversationLocked, as `save` does.
        """

    async def let_go(self, held: Held) -> None:
        """Says that a stopped run is not carried out any more."""

    async def stop(self, owner: str, response_id: str, log_until_at: float, lives_until: float) -> Stopped | None:
        """Cancels a response that has not ended; one that has stays as it is. None for an unknown one.

        Its log is readable until `log_until_at`; a response that is short-lived lives until `lives_until`.
        """

    async def is_held(self, run: int) -> bool:
        """Whether some process has the run still."""

    async def tail(self, owner: str, response_id: str, after: int) -> Tail | None:
        """What was logged behind the event of that number. None when there is no log of that response (any more)."""

    async def states(self, response_ids: list[str]) -> dict[str, tuple[str, int | None]]:
        """Of responses that are still there: status, and a number that grows with what is logged."""

    async def version(self) -> int:
        """A number that differs as soon as somebody else, another process for instance, has written."""

    def announce(self, what: str) -> None:
        """This process has changed a response, or the QUEUE; others hear of it soon, if the store can tell them."""

    async def hear(self, tell: Tell) -> None:
        """Tells what others announce, until it is cancelled; of a store that cannot, this ends at once."""

    @property
    def hears(self) -> bool:
        """Whether what others announce is heard just now."""

    async def expired(self, now: float) -> list[Held]:
        """Claims whose leases have run out, stopped runs among them."""

    async def forget_ended(self, now: float) -> None:
        """Erases logs and short-lived responses whose time is over."""

    async def runs(self) -> list[RunInfo]:
        """All runs of all owners, in the order of their admission."""

    @property
    def waiting(self) -> int:
        """How many writes of this process have not begun."""

    async def size_bytes(self) -> int:
        """What the store takes on disk, about."""

    async def queue(self) -> QueueState:
        """How many runs wait, and how many are carried out, in all processes."""
