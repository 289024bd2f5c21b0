"""Work that goes on beside requests, and how it ends: retention, what was learned, the word that the process stops.

May not know routes or the HTTP framework.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

from background import Background
from counting import Counter
from duties import Duty
from errors import StoreError
from leases import Leases
from sources import Sources
from store import StoreSettings
from verbs import Purged, Store

log = logging.getLogger("responses_proxy.upkeep")

PURGE_EVERY_S = 3600.0
SHARE_LEARNED_EVERY_S = 10.0
# How long what was learned waits for another process that writes its own.
SHARE_WAIT_S = 1.0
KEPT_UP_AFTER_S = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def told_to_stop(background: Background) -> Iterator[None]:
    """Runs are given back at the first signal to stop, while the server waits for the answers that it gives still."""
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}

    def tell(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed by now
            loop.call_soon_threadsafe(background.begin_to_stop)
        before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        before |= {number: found for number in STOP_SIGNALS if callable(found := signal.getsignal(number))}
    for number in before:
        signal.signal(number, tell)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is tell:  # else somebody has put theirs before it, and will call it
                signal.signal(number, handler)


async def ended(task: asyncio.Task[None]) -> None:
    """Cancels a task of the application and waits for its end."""
    task.cancel()
    await asyncio.wait({task})


async def kept_up(work: Callable[[], Awaitable[None]]) -> None:
    """Work that others wait for: a fault in it does not end it."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("begun again after a fault of this program")
        await asyncio.sleep(KEPT_UP_AFTER_S)


async def purge_again_and_again(store: Store, settings: StoreSettings, sources: Sources) -> None:
    """By one of the processes that share a store. One purge that fails does not end retention."""
    duty = Duty(store, sources, "retention", PURGE_EVERY_S)
    try:
        while True:
            await _purge_on_duty(duty, store, settings, sources.clock)
            await asyncio.sleep(PURGE_EVERY_S)
    finally:
        with contextlib.suppress(StoreError):  # it runs out
            await duty.give_up()


async def _purge_on_duty(duty: Duty, store: Store, settings: StoreSettings, clock: Callable[[], float]) -> None:
    try:
        if await duty.is_ours():
            await purge(store, settings, clock())
    except StoreError as error:
        log.log(error.log_level, "could not purge: %s", error.message)
    except Exception:
        log.exception("could not purge")


async def share_learned_again_and_again(leases: Leases, counter: Counter) -> None:
    """What was learned about models survives a restart, and is known to all processes."""
    try:
        while True:
            await asyncio.sleep(SHARE_LEARNED_EVERY_S)
            await share_learned(leases, counter)
    finally:
        if counter.has_news:
            await share_learned(leases, counter)


async def share_learned(leases: Leases, counter: Counter) -> None:
    try:
        if not counter.has_news:
            counter.remember(await leases.store.learned())
        else:
            await _keep_learned(leases, counter)
    except StoreError as error:
        log.log(error.log_level, "what was learned of models could not be kept: %s", error.message)
    except Exception:
        log.exception("what was learned of models could not be kept")


async def _keep_learned(leases: Leases, counter: Counter) -> None:
    """What others have learned meanwhile stays: one process at a time reads it, adds to it, and writes."""
    lease = leases.lease("learned")
    if not await lease.acquire(SHARE_WAIT_S):
        return
    try:
        counter.remember(await leases.store.learned())
        told = counter.tell()
        try:
            await leases.store.keep_learned({name: each.kept for name, each in told.items()})
        except BaseException:
            counter.take_back(told)
            raise
    finally:
        await lease.release()


async def purge(store: Store, settings: StoreSettings, now: float) -> Purged:
    """Forgets what is older than `retention_days`; 0 keeps everything. Raises: StoreError."""
    before_at = now - settings.retention_days * 86_400 if settings.retention_days else 0.0
    purged = await store.purge(before_at, now)
    if purged.responses:
        log.info("purged %d responses, gave back %d bytes", purged.responses, purged.freed_bytes)
    return purged
