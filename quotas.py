"""How much each owner may ask for: requests at once, requests a minute, tokens a minute. The arithmetic, and its words.

May not do I/O, nor know what a request says. Of a minute's allowance one time is kept: that at which all of it is there
again. Source: the `x-ratelimit-*` headers of the OpenAI API, read 2026-11-21.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from errors import RateLimited
from quota_verbs import Charge, Used

Headers = list[tuple[bytes, bytes]]

MINUTE_S = 60.0
# What is missing for less than this is there: floating point.
ROUNDING_S = 1e-6
# The shortest and the longest wait that is guessed for a request at once.
SHORTEST_S, LONGEST_S = 1.0, 60.0


@dataclass(frozen=True)
class QuotaSettings:
    """What of the section `[limits]` is counted for each owner; 0: no limit."""

    in_flight_per_owner: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class Bucket:
    """A minute's allowance, which comes back steadily; it may fall below nothing, and then takes longer."""

    __slots__ = ("limit", "used_s")

    def __init__(self, limit: int, used_s: float = 0.0) -> None:
        """`used_s`: how long until all of it is there again."""
        self.limit = limit
        self.used_s = max(0.0, used_s)

    def cost_s(self, amount: float) -> float:
        """How much longer it takes then until all is there again; without a limit, no longer."""
        return amount * MINUTE_S / self.limit if self.limit else 0.0

    def most_s(self, wanted: float) -> float:
        """How long it may take at most until all is there again, when so much is to be left."""
        return MINUTE_S - self.cost_s(wanted) + ROUNDING_S if self.limit else math.inf

    def wait_s(self, wanted: float) -> float:
        """How long until so much is left."""
        return self.used_s - MINUTE_S + self.cost_s(wanted) if self.used_s > self.most_s(wanted) else 0.0

    def headers(self, name: str) -> Headers:
        left = (MINUTE_S - self.used_s + ROUNDING_S) * self.limit / MINUTE_S
        values = {
            "limit": str(self.limit),
            "remaining": str(max(0, math.floor(left))),
            "reset": duration(self.wait_s(self.limit)),
        }
        return [(f"x-ratelimit-{key}-{name}".encode(), value.encode()) for key, value in values.items()]


class Limits:
    """What is wished for by a request, and what a request or a turn costs."""

    def __init__(self, settings: QuotaSettings) -> None:
        self.in_flight = settings.in_flight_per_owner
        self._requests = Bucket(settings.requests_per_minute)
        self._tokens = Bucket(settings.tokens_per_minute)

    @property
    def are_set(self) -> bool:
        return bool(self.in_flight or self._requests.limit or self._tokens.limit)

    def tokens_s(self, tokens: int) -> float:
        return self._tokens.cost_s(tokens)

    def wish(self, charge: Charge, *, is_held: bool) -> Charge:
        """That charge with the wish for one request."""
        return msgspec.structs.replace(
            charge,
            has_wish=True,
            requests_s=self._requests.cost_s(1),
            most_requests_s=self._requests.most_s(1),
            most_tokens_s=self._tokens.most_s(1),
            most_in_flight=self.in_flight if is_held and self.in_flight else None,
        )

    def account(self, charge: Charge, used: Used) -> Account:
        times = {"requests": (self._requests, used.requests_at), "tokens": (self._tokens, used.tokens_at)}
        buckets = {name: Bucket(each.limit, at - charge.now) for name, (each, at) in times.items() if each.limit}
        return Account(buckets, charge, used)


class Account:
    """What one owner has left after a charge."""

    def __init__(self, buckets: dict[str, Bucket], charge: Charge, used: Used) -> None:
        self.now = charge.now
        self.is_granted = used.is_granted
        self.is_held = used.is_granted and charge.most_in_flight is not None
        self._buckets = buckets
        self._charge = charge
        self._used = used

    @property
    def headers(self) -> Headers:
        return [header for name, bucket in self._buckets.items() for header in bucket.headers(name)]

    def _waits(self) -> dict[str, float]:
        """What is used up -> how long until it is there again; a guess for requests in flight."""
        waits = {f"{bucket.limit} {name} per minute": bucket.wait_s(1) for name, bucket in self._buckets.items()}
        most = self._charge.most_in_flight
        if most and self._charge.in_flight + self._used.elsewhere >= most:
            waits[f"{most} requests at once"] = min(max(self._used.took_s / most, SHORTEST_S), LONGEST_S)
        return waits

    def refusal(self) -> RateLimited:
        """Codex reads the wait in the message, others in Retry-After."""
        waits = self._waits()
        what = max(waits, key=lambda each: waits[each])
        wait_s = _whole_ms(waits[what]) / 1000
        refusal = RateLimited(f"Rate limit reached: {what}. Please try again in {wait_s:g}s.")
        refusal.retry_after_s = wait_s
        refusal.headers = self.headers
        return refusal


def _whole_ms(seconds: float) -> int:
    return math.ceil(round(seconds * 1000, 3))


def duration(seconds: float) -> str:
    """As the OpenAI API writes one: 0s, 12ms, 1.5s, 6m0s, 1h0m0s."""
    ms = _whole_ms(seconds)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    large = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{large}{rest_ms / 1000:g}s"
