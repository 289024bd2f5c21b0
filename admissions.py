"""Who may have something done: what owners use, told to the store that all processes share.

May not know what a request says. One write for an owner is under way at a time: what ends meanwhile, and what a turn
took, goes into the next one, which admits somebody as well. What this process has in flight is told as a whole each
time, so that a write whose outcome nobody knows is set right by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any, NamedTuple

from errors import StoreError
from leases import LEASE_S, RENEW_EVERY_S
from quota_verbs import Charge
from quotas import Account, Headers, Limits, QuotaSettings
from run_verbs import RunStore
from sources import Sources
from verbs import Lock

log = logging.getLogger("responses_proxy.admissions")

# How long after a store that could not be used it is told again.
TELL_AGAIN_S = 0.5
# How long an answer waits until the store knows that it is over, and how long a process that stops does.
KNOWN_WITHIN_S = 1.0


class Admission:
    """The right to have something done. Used as a context, or released at the end; only the first release counts."""

    def __init__(self, headers: Headers, desk: Desk | None = None, began_at: float = 0.0) -> None:
        """`desk`: of its owner, where it is in flight."""
        self.headers = headers
        self._desk = desk
        self._began_at = began_at
        self._known: asyncio.Future[None] | None = None

    def release(self) -> None:
        desk, self._desk = self._desk, None
        if desk is not None:
            self._known = desk.released(self._began_at)

    async def over(self) -> None:
        """Released, and so that other processes know it, if the store can be told in time."""
        self.release()
        known, self._known = self._known, None
        if known is not None:
            await asyncio.wait({known}, timeout=KNOWN_WITHIN_S)

    async def __aenter__(self) -> Admission:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.over()


class Wish(NamedTuple):
    """Who waits to be admitted."""

    is_held: bool
    account: asyncio.Future[Account]

    def fail(self, error: StoreError) -> None:
        if not self.account.done():
            self.account.set_exception(error)

    @property
    def is_granted_for_nobody(self) -> bool:
        """Whoever wished it was cancelled when the store had decided."""
        account = self.account
        if not account.done() or account.cancelled() or account.exception():
            return False
        return account.result().is_held


class Desk:
    """What this process has to tell of one owner, and what it wishes for. In flight is what was granted."""

    def __init__(self, home: Quotas, owner: str) -> None:
        self._home = home
        self._owner = owner
        self._in_flight = 0
        self._tokens_s = 0.0
        self._took_s: float | None = None
        self._has_news = False
        self._is_out = False  # the store could not be told last
        self._wishes: deque[Wish] = deque()
        self._listeners: list[asyncio.Future[None]] = []
        self._telling: asyncio.Task[None] | None = None

    async def admitted(self, *, is_held: bool) -> Admission:
        """Raises: RateLimited, StoreError."""
        wish = Wish(is_held, asyncio.get_running_loop().create_future())
        self._wishes.append(wish)
        self._tell()
        try:
            account = await wish.account
        except asyncio.CancelledError:
            if wish.is_granted_for_nobody:
                self._ended()
            raise
        if not account.is_granted:
            raise account.refusal()
        return Admission(account.headers, self if account.is_held else None, account.now)

    def spent(self, tokens_s: float) -> None:
        self._tokens_s += tokens_s
        self.tell_again()

    def released(self, began_at: float) -> asyncio.Future[None]:
        """Done when the store has been told so, or could not be."""
        self._took_s = max(0.0, self._home.clock() - began_at)
        known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listeners.append(known)
        self._ended()
        return known

    def _ended(self) -> None:
        self._in_flight -= 1
        self.tell_again()

    def tell_again(self) -> None:
        """What is in flight, above all."""
        self._has_news = True
        self._tell()

    def _tell(self) -> None:
        if self._telling is None:
            self._telling = self._home.own(self._tell_all())

    async def _tell_all(self) -> None:
        try:
            while self._wishes or self._has_news:
                await self._tell_once(self._wishes.popleft() if self._wishes else None)
        finally:
            self._telling = None
            self._refuse_all(not_counted())
            _hear(self._listeners)
            if not self._in_flight:
                self._home.forget(self._owner)

    async def _tell_once(self, wish: Wish | None) -> None:
        charge = self._home.charge(self._owner, self._in_flight, self._tokens_s, self._took_s)
        if wish is not None:
            charge = self._home.limits.wish(charge, is_held=wish.is_held)
        listeners, self._listeners = self._listeners, []
        self._tokens_s, self._took_s, self._has_news = 0.0, None, False
        try:
            used = await self._home.store.charge(charge)
        except StoreError as error:
            self._untold(charge, wish, error)
        else:
            self._answer(wish, self._home.limits.account(charge, used))
        finally:
            _hear(listeners)
            if wish is not None:
                wish.fail(not_counted())
        if self._is_out:
            await asyncio.sleep(TELL_AGAIN_S)

    def _answer(self, wish: Wish | None, account: Account) -> None:
        self._is_out = False
        self._in_flight += account.is_held
        if wish is None:
            return
        if not wish.account.done():
            wish.account.set_result(account)
        elif account.is_held:
            self._ended()

    def _untold(self, charge: Charge, wish: Wish | None, error: StoreError) -> None:
        """Whoever waits is refused too: each would wait as long for the same. What is in flight is told in any case."""
        if not self._is_out:
            log.warning("what an owner uses could not be counted: %s", error.message)
        self._tokens_s += 0.0 if error.is_unsure else charge.tokens_s  # once at most
        if wish is not None:
            wish.fail(error)
        self._refuse_all(error)
        self._has_news = self._is_out = bool(self._tokens_s or self._home.limits.in_flight)

    def _refuse_all(self, error: StoreError) -> None:
        while self._wishes:
            self._wishes.popleft().fail(error)


def _hear(listeners: list[asyncio.Future[None]]) -> None:
    for known in listeners:
        if not known.done():
            known.set_result(None)


def not_counted() -> StoreError:
    return StoreError("What an owner has used is not counted any more.")


class Quotas:
    """Counts what owners use, in the store. `begin` it before the first request, and `close` it before its store."""

    def __init__(self, store: RunStore, limits: Limits, sources: Sources) -> None:
        self.store = store
        self.limits = limits
        self.clock = sources.clock
        holder = sources.new_id("flights")
        self._lease = Lock(holder, holder)
        self._desks: dict[str, Desk] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._staying: asyncio.Task[None] | None = None
        self._stayed_at = 0.0

    async def begin(self) -> None:
        """What this process has in flight counts from now on, until some time after its end. Raises: StoreError."""
        if self.limits.in_flight:
            await self._stay()
            self._staying = self.own(self._stay_again_and_again())

    async def admit(self, owner: str, *, is_held: bool = True) -> Admission:
        """`is_held`: it is in flight until it is released.

        Raises: RateLimited, and then nothing is counted; StoreError.
        """
        return await self._desk(owner).admitted(is_held=is_held)

    def spent(self, owner: str, tokens: int) -> None:
        """Tokens are counted when they are known: a turn that took too many delays the next ones."""
        if cost_s := self.limits.tokens_s(tokens):
            self._desk(owner).spent(cost_s)

    def charge(self, owner: str, in_flight: int, tokens_s: float, took_s: float | None) -> Charge:
        return Charge(
            owner=owner,
            holder=self._lease.name,
            now=self.clock(),
            in_flight=in_flight,
            tokens_s=tokens_s,
            took_s=took_s,
        )

    def _desk(self, owner: str) -> Desk:
        if owner not in self._desks:
            self._desks[owner] = Desk(self, owner)
        return self._desks[owner]

    def forget(self, owner: str) -> None:
        self._desks.pop(owner, None)

    def own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("what an owner uses could not be counted", exc_info=error)

    async def _stay_again_and_again(self) -> None:
        """A lease that was lost while the store could not be used is taken again."""
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            try:
                await self._stay()
            except StoreError as error:
                log.warning("the lease of what is in flight could not be renewed: %s", error.message)

    async def _stay(self) -> None:
        """Whoever was away for too long may have been forgotten with all that it has in flight."""
        now = self.clock()
        await self.store.acquire(self._lease, now, now + LEASE_S)
        was_away = now - self._stayed_at >= LEASE_S
        self._stayed_at = now
        for desk in self._desks.values() if was_away else ():
            desk.tell_again()

    async def close(self) -> None:
        """What was used is told, if it can be in time; what was in flight here is free."""
        staying = {self._staying} if self._staying else set()
        if telling := self._tasks - staying:
            await asyncio.wait(telling, timeout=KNOWN_WITHIN_S)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if staying:
            with contextlib.suppress(StoreError):  # it runs out
                await self.store.release(self._lease)


async def opened_quotas(settings: QuotaSettings, store: RunStore, sources: Sources) -> Quotas | None:
    """None where nothing is limited, so that nothing is spent on it. Raises: StoreError."""
    limits = Limits(settings)
    if not limits.are_set:
        return None
    quotas = Quotas(store, limits, sources)
    await quotas.begin()
    return quotas
