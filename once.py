"""Idempotency-Key: a request that is sent twice is carried out once.

May not know the HTTP framework, nor what a response holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from errors import InvalidRequest, StillRunning
from leases import Lease, Leases
from verbs import FirstUse, KeptResponse

KEPT_S = 24 * 3600
KEY_CHARACTERS = 255
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """What a key gives: the response it was used for before, or the right to carry out the request.

    `release` it in every case.
    """

    first_use: FirstUse
    earlier: KeptResponse | None
    lease: Lease

    async def release(self) -> None:
        await self.lease.release()


class Once:
    """The keys of all owners."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._store = leases.store
        self._clock = leases.clock

    async def claim(self, owner: str, key: str, body: bytes) -> Claim:
        """Raises: InvalidRequest when the key was used for another body, StillRunning, StoreError."""
        if not key or len(key) > KEY_CHARACTERS:
            raise InvalidRequest(f"Invalid 'Idempotency-Key': expected 1 to {KEY_CHARACTERS} characters.")
        name = hashlib.sha256(f"{owner}\0{key}".encode("utf-8", "surrogatepass")).hexdigest()
        lease = self._leases.lease(f"idempotency {name}")
        is_ours = await lease.acquire(wait_s=0)
        claim = None
        try:
            claim = await self._claimed(owner, key, body, lease)
        finally:
            if claim is None:
                await lease.release()
        if claim.earlier is None and not is_ours:
            raise _still_running()
        return claim

    async def _claimed(self, owner: str, key: str, body: bytes, lease: Lease) -> Claim:
        now = self._clock()
        digest = hashlib.sha256(body).digest()
        found = await self._store.first_use(owner, key, now)
        if found and found[0] != digest:
            raise InvalidRequest(
                "This Idempotency-Key was used for another request body within the last 24 hours.",
                code="idempotency_key_reused",
            )
        earlier = await self._store.response(owner, found[1]) if found else None
        return Claim(FirstUse(key, digest, int(now) + KEPT_S), earlier, lease)


def _still_running() -> StillRunning:
    error = StillRunning("A request with this Idempotency-Key is still being answered.", code="idempotency_key_in_use")
    error.retry_after_s = RETRY_AFTER_S
    return error
