"""The verb of a store about what owners have used, and the values that it takes and gives.

May not do I/O. What an owner has used of a minute's allowance is a time: the one at which all of it is there again.
What is in flight belongs to a holder, and counts for as long as the lease of that name has not run out.
"""

from __future__ import annotations

import math
from typing import Protocol

import msgspec


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """What a holder tells of an owner, and what it wishes for.

    `in_flight`: all that the holder has in flight for the owner, without what it wishes for. `tokens_s` and
    `requests_s`: by how much later all is there again. `took_s` None: nothing has ended since it was last told.
    A wish is granted where neither time is further off than `most_…_s`, and less than `most_in_flight` is in flight;
    `most_in_flight` None: what is wished for is not in flight.
    """

    owner: str
    holder: str
    now: float
    in_flight: int
    tokens_s: float = 0.0
    took_s: float | None = None
    has_wish: bool = False
    requests_s: float = 0.0
    most_requests_s: float = math.inf
    most_tokens_s: float = math.inf
    most_in_flight: int | None = None


class Used(msgspec.Struct, frozen=True):
    """What an owner has used, after a charge. `elsewhere`: what other holders have in flight."""

    is_granted: bool
    requests_at: float
    tokens_at: float
    elsewhere: int
    took_s: float


class QuotaStore(Protocol):
    """A store that keeps what owners have used. Times are Unix seconds and come from the caller."""

    async def charge(self, charge: Charge) -> Used:
        """Puts what was used on the owner's account, and what is wished for if there is enough left for that."""
