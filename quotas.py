"""How much each owner may ask for: requests at once, requests a minute, tokens a minute.

May not do I/O, nor know what a request says. The clock is handed in. What is counted is of this process alone; a store
that several processes share may give the same two answers (`Quotas`).
Source: the `x-ratelimit-*` headers of the OpenAI API, read 2026-11-21.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from errors import RateLimited

Headers = list[tuple[bytes, bytes]]

MINUTE_S = 60.0
# What is missing by less than this is there: floating point.
ROUNDING = 1e-6
# The shortest and the longest wait that is guessed for a request at once.
SHORTEST_S, LONGEST_S = 1.0, 60.0


@dataclass(frozen=True)
class QuotaSettings:
    """What of the section `[limits]` is counted for each owner; 0: no limit."""

    in_flight_per_owner: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class Admission:
    """The right to have something done. Used as a context, or released at the end; only the first release counts."""

    def __init__(self, headers: Headers, give_back: Callable[[], None] | None = None) -> None:
        self.headers = headers
        self._give_back = give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


class Quotas(Protocol):
    """Counts what owners ask for."""

    async def admit(self, owner: str, *, is_held: bool = True) -> Admission:
        """`is_held`: it is in flight until it is released. Raises: RateLimited, and then nothing is counted."""

    def spent(self, owner: str, tokens: int) -> None:
        """Tokens are counted when they are known: a turn that took too many delays the next ones."""


class Bucket:
    """A minute's allowance, which comes back steadily; it may fall below nothing, and then takes longer."""

    __slots__ = ("_at_s", "_left", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._left = float(limit)
        self._at_s = now

    def left(self, now: float) -> float:
        return min(self.limit, self._left + (now - self._at_s) * self.limit / MINUTE_S)

    def take(self, amount: int, now: float) -> None:
        self._left, self._at_s = self.left(now) - amount, now

    def wait_s(self, wanted: float, now: float) -> float:
        """How long until so much is left."""
        missing = wanted - self.left(now)
        return missing * MINUTE_S / self.limit if missing > ROUNDING else 0.0

    def headers(self, name: str, now: float) -> Headers:
        values = {
            "limit": str(self.limit),
            "remaining": str(max(0, math.floor(self.left(now) + ROUNDING))),
            "reset": duration(self.wait_s(self.limit, now)),
        }
        return [(f"x-ratelimit-{key}-{name}".encode(), value.encode()) for key, value in values.items()]


class Account:
    """What one owner has left."""

    def __init__(self, settings: QuotaSettings, now: float) -> None:
        limits = {"requests": settings.requests_per_minute, "tokens": settings.tokens_per_minute}
        self.buckets = {name: Bucket(limit, now) for name, limit in limits.items() if limit}
        self.in_flight = 0
        # How long the last request in flight took.
        self.took_s = 0.0

    def is_at_rest(self, now: float) -> bool:
        """Whether it is as good as new."""
        return not self.in_flight and not any(bucket.wait_s(bucket.limit, now) for bucket in self.buckets.values())

    def take(self, name: str, amount: int, now: float) -> None:
        if bucket := self.buckets.get(name):
            bucket.take(amount, now)

    def headers(self, now: float) -> Headers:
        return [header for name, bucket in self.buckets.items() for header in bucket.headers(name, now)]

    def waits(self, in_flight_limit: int, now: float) -> dict[str, float]:
        """What is used up -> how long until it is there again; a guess for requests in flight."""
        waits = {f"{bucket.limit} {name} per minute": bucket.wait_s(1.0, now) for name, bucket in self.buckets.items()}
        if in_flight_limit and self.in_flight >= in_flight_limit:
            guess_s = min(max(self.took_s / in_flight_limit, SHORTEST_S), LONGEST_S)
            waits[f"{in_flight_limit} requests at once"] = guess_s
        return {what: wait_s for what, wait_s in waits.items() if wait_s}


class OwnQuotas:
    """The quotas of one process. It remembers the owners whose allowance is not whole again."""

    def __init__(self, settings: QuotaSettings, clock: Callable[[], float]) -> None:
        """`clock`: seconds that never go back."""
        self._settings = settings
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._forget_at = clock() + MINUTE_S

    def __len__(self) -> int:
        return len(self._accounts)

    async def admit(self, owner: str, *, is_held: bool = True) -> Admission:
        now = self._clock()
        account = self._account(owner, now)
        waits = account.waits(self._settings.in_flight_per_owner if is_held else 0, now)
        if waits:
            raise _refusal(waits, account.headers(now))
        account.take("requests", 1, now)
        if not is_held:
            return Admission(account.headers(now))
        account.in_flight += 1
        return Admission(account.headers(now), partial(self._released, account, now))

    def spent(self, owner: str, tokens: int) -> None:
        now = self._clock()
        self._account(owner, now).take("tokens", tokens, now)

    def _released(self, account: Account, began_at: float) -> None:
        account.in_flight -= 1
        account.took_s = self._clock() - began_at

    def _account(self, owner: str, now: float) -> Account:
        if now >= self._forget_at:
            self._forget_at = now + MINUTE_S
            self._accounts = {name: kept for name, kept in self._accounts.items() if not kept.is_at_rest(now)}
        if owner not in self._accounts:
            self._accounts[owner] = Account(self._settings, now)
        return self._accounts[owner]


def own_quotas(settings: QuotaSettings, clock: Callable[[], float]) -> OwnQuotas | None:
    """None where nothing is limited, so that nothing is spent on it."""
    limits = (settings.in_flight_per_owner, settings.requests_per_minute, settings.tokens_per_minute)
    return OwnQuotas(settings, clock) if any(limits) else None


def _refusal(waits: dict[str, float], headers: Headers) -> RateLimited:
    """Codex reads the wait in the message, others in Retry-After."""
    what = max(waits, key=lambda each: waits[each])
    wait_s = math.ceil(waits[what] * 1000) / 1000
    refusal = RateLimited(f"Rate limit reached: {what}. Please try again in {wait_s:g}s.")
    refusal.retry_after_s = wait_s
    refusal.headers = headers
    return refusal


def duration(seconds: float) -> str:
    """As the OpenAI API writes one: 0s, 12ms, 1.5s, 6m0s, 1h0m0s."""
    ms = math.ceil(round(seconds * 1000, 3))
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    large = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{large}{rest_ms / 1000:g}s"
