"""What the handlers work with: opened in order, kept up, and closed in the other order.

May not know routes or the HTTP framework.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import importlib.metadata
import itertools
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from admissions import Quotas, opened_quotas
from auth import Owners
from background import Background
from carrier import Carrier
from catalogue import Catalogue
from counting import Counter, by_vocabulary
from errors import StoreError
from keys import KeyFile, load_keys
from leases import Leases
from metrics import Load, Metrics
from observing import Observer
from once import Once
from quotas import QuotaSettings
from readiness import Readiness
from routing import Upstreams
from run_verbs import RunStore
from sealing import Seals
from settings import Settings, SettingsError
from sockets import SocketMeans, Sockets
from sources import Ids, Sources
from store import StoreSettings, is_database, open_store, shown
from stored import Stored
from tracing import Tracing
from turns import Means, Turns
from upkeep import ended, kept_up, purge_again_and_again, share_learned_again_and_again, told_to_stop
from verbs import Lock
from vocabulary import load
from watching import Watcher
from windows import Windows

log = logging.getLogger("responses_proxy.services")

IN_MEMORY = ":memory:"
# Held by the name of the key that seals, so that a process that has other keys cannot get it.
KEYS_LEASE = "sealing keys"
DAY_S = 24 * 3600
KEYS_LEASE_S = 30 * DAY_S
AUTH_MODES = {
    "none": "none, everybody is one owner",
    "keys": "keys of {} client(s)",
    "passthrough": "passthrough, the backend judges the client's own key",
}
# What a scrape waits for the store; it has a deadline of its own.
LOAD_S = 2.0
# How long a database that starts beside this process is waited for, and how often it is tried.
START_S, START_AGAIN_S = 30.0, 1.0
QUOTA_KEYS = frozenset(field.name for field in dataclasses.fields(QuotaSettings))


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers work with."""

    turns: Turns
    background: Background
    stored: Stored
    windows: Windows
    sockets: Sockets
    catalogue: Catalogue
    carrier: Carrier
    once: Once
    owners: Owners
    observer: Observer
    sources: Sources
    readiness: Readiness
    quotas: Quotas | None

    async def load(self) -> Load:
        """What is to be told of the store; what it cannot tell just now is no number."""
        store = self.background.store
        try:
            async with asyncio.timeout(LOAD_S):
                queue, size_bytes = await store.queue(), await store.size_bytes()
            return Load(queue.queued, queue.running, store.waiting, size_bytes)
        except StoreError as error:
            log.log(error.log_level, "the queue could not be read: %s", error.message)
        except TimeoutError:
            log.debug("the queue could not be read in time")
        return Load(math.nan, math.nan, store.waiting, math.nan)


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Services]:
    """Raises: SettingsError."""
    if not settings.upstream:
        raise SettingsError(
            "no upstream: give --upstream URL, [[upstream]] in the settings file or RESPONSES_PROXY_UPSTREAM__BASE_URL"
        )
    refuse_without_keys(settings)
    async with contextlib.AsyncExitStack() as stack:
        store = await opened_store(settings, stack)
        observer = await opened_observer(settings, stack)
        upstreams = Upstreams(settings.upstream, observer)
        stack.push_async_callback(upstreams.close)
        sources = Sources(time.time, Ids(time.time))
        leases = Leases(store, sources)
        stack.push_async_callback(leases.close)
        watcher = Watcher(store)
        counter = await make_counter(settings.compaction.vocabulary)
        if quotas := await opened_quotas(settings.limits, store, sources):
            stack.push_async_callback(quotas.close)
        means = Means(upstreams, leases, make_seals(settings), sources, watcher, counter, observer, quotas)
        services = await make_services(settings, store, means)
        if is_database(settings.store.path):
            await tell_other_keys(store, means.seals, sources.clock())
        stack.push_async_callback(services.readiness.close)
        stack.push_async_callback(services.turns.ahead.close)
        stack.push_async_callback(services.catalogue.close)
        background = services.background
        purging = purge_again_and_again(store, settings.store, sources)
        means.counter.remember(await store.learned())
        learning = share_learned_again_and_again(leases, means.counter)
        for work in (upstreams.look(), purging, kept_up(watcher.run), background.run(), learning):
            stack.push_async_callback(ended, asyncio.create_task(work))
        stack.push_async_callback(background.stop)
        stack.enter_context(told_to_stop(background))
        tell_settings(settings)
        yield services


async def opened_store(settings: Settings, stack: contextlib.AsyncExitStack, may_make: bool = True) -> RunStore:
    """`may_make`: in a database without one, which is waited for, then. Raises: SettingsError."""
    opening = partial(opener_of(settings.store.path, may_make), settings.store)
    try:
        store = await (_opened_in_time(opening) if may_make else opening())
    except StoreError as error:
        raise SettingsError(f"store.path: {error.message}") from error
    stack.push_async_callback(store.close)
    return store


async def _opened_in_time(opening: Callable[[], Awaitable[RunStore]]) -> RunStore:
    """A database that refuses this program is not waited for. Raises: StoreError."""
    now = asyncio.get_running_loop().time
    give_up_at = now() + START_S
    for attempt in itertools.count():
        try:
            return await opening()
        except StoreError as error:
            if not error.is_passing or now() >= give_up_at:
                raise
            if not attempt:
                log.warning("waiting for the database for %g s: %s", START_S, error.message)
        await asyncio.sleep(START_AGAIN_S * (0.5 + random.random()))
    raise AssertionError("it has returned or raised")


def opener_of(path: str, may_make: bool = True) -> Callable[[StoreSettings], Awaitable[RunStore]]:
    """What opens a store of this kind. Raises: SettingsError for a database without the package that speaks to it."""
    if not is_database(path):
        return open_store
    try:
        found: Callable[..., Awaitable[RunStore]] = importlib.import_module("store_postgres").open_store
    except ModuleNotFoundError as error:
        needed = "pip install 'responses-proxy[postgres]'"
        raise SettingsError(
            f"store.path: a database needs the extra 'postgres': {needed} ({error.name} is missing)"
        ) from error
    return partial(found, may_make=may_make)


def version() -> str:
    try:
        return importlib.metadata.version("responses-proxy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


async def opened_observer(settings: Settings, stack: contextlib.AsyncExitStack) -> Observer:
    """Raises: SettingsError for spans without the packages that record them."""
    tracing = opened_tracing() if settings.tracing.enabled else None
    if tracing is not None:
        stack.push_async_callback(tracing.close)
    return Observer(Metrics(version()), tracing, has_access_log=settings.server.access_log)


def opened_tracing() -> Tracing:
    """Imports what it takes only now: that costs memory and time at the start. Raises: SettingsError."""
    try:
        found: Tracing = importlib.import_module("spans").opened(version())
    except ModuleNotFoundError as error:
        needed = "pip install 'responses-proxy[otel]'"
        raise SettingsError(f"tracing.enabled needs the extra 'otel': {needed} ({error.name} is missing)") from error
    return found


async def make_counter(name: str) -> Counter:
    """Counts by the vocabulary where it is on disk, else by bytes."""
    tokens_in = None if name == "off" else await asyncio.to_thread(load, name)
    return Counter(by_vocabulary(tokens_in), name) if tokens_in else Counter()


def refuse_without_keys(settings: Settings) -> None:
    """Before the database is waited for, and tables are made in it. Raises: SettingsError."""
    if is_database(settings.store.path) and not settings.sealing.keys:
        raise SettingsError(
            "sealing.keys has to be set for a store in a database: all processes that share it need the same keys, and "
            "there is no file beside it to keep them; 'responses-proxy keys rotate --store postgresql://' prints one"
        )


def make_seals(settings: Settings) -> Seals:
    """Raises: SettingsError."""
    given, key_file = settings.sealing.keys, key_file_of(settings)
    try:
        keys = load_keys(given, key_file)
    except (ValueError, OSError) as error:
        raise SettingsError(str(error)) from error
    return Seals(keys) if given or key_file is None else Seals(keys, KeyFile(key_file).changed)


async def tell_other_keys(store: RunStore, seals: Seals, now: float) -> None:
    """Says it when processes that share the store seal with other keys: what one has sealed, the others refuse."""
    locks = [Lock(KEYS_LEASE, name) for name in seals.key_names]
    try:
        known = [lock for lock in locks if await store.acquire(lock, now, now + KEYS_LEASE_S)]
        if known and known[0] is not locks[0]:  # they were rotated: the first one counts from now on
            await store.release(known[0])
            await store.acquire(locks[0], now, now + KEYS_LEASE_S)
    except StoreError as error:
        log.warning("the sealing keys could not be compared with those of other processes: %s", error.message)
        return
    if not known:
        log.error(
            "sealing.keys is not what other processes on this store have, or had in the last %d days: reasoning and "
            "compaction items that they sealed are refused here, and background runs of clients with keys of their own "
            "fail. Give every process the same keys",
            KEYS_LEASE_S / DAY_S,
        )


def key_file_of(settings: Settings) -> Path | None:
    """Beside the store, where that is a file."""
    path = settings.store.path
    return None if path == IN_MEMORY or is_database(path) else Path(f"{path}.key")


async def make_services(settings: Settings, store: RunStore, means: Means) -> Services:
    """Raises: SettingsError."""
    try:
        owners = Owners(settings.auth, await store.secret("owner"))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    turns = Turns(means, settings.turns, settings.reasoning, settings.compaction)
    background = Background(store, turns, means, settings.background)
    stored = Stored(store, background, means.sources, settings.limits, settings.turns.conversation_wait_s)
    windows = Windows(turns.pasts, turns.fitter, means.sources, settings.limits)
    limits, new_id = settings.limits, means.sources.new_id
    socket_means = SocketMeans(
        turns, settings.websocket, limits, limits.body_bytes, new_id, means.quotas, means.observer
    )
    return Services(
        turns=turns,
        background=background,
        stored=stored,
        windows=windows,
        sockets=Sockets(socket_means, owners),
        catalogue=Catalogue(means.upstreams),
        carrier=Carrier(means.upstreams, limits.body_bytes, settings.passthrough),
        once=Once(means.leases),
        owners=owners,
        observer=means.observer,
        sources=means.sources,
        readiness=Readiness(store, means.upstreams, means.sources, lambda: background.is_stopping),
        quotas=means.quotas,
    )


def tell_settings(settings: Settings) -> None:
    """What this process works with, for whoever reads its log: one line each."""
    for upstream in settings.upstream:
        served = ", ".join((*upstream.models, *upstream.aliases)) or "every model that no other one serves"
        log.info("upstream '%s': %s, for %s", upstream.name, without_login(upstream.base_url), served)
    path, days = settings.store.path, settings.store.retention_days
    kept = f"for {days:g} days" if days else "for ever"
    where = shown(path) if is_database(path) else Path(path).absolute()
    log.info("store: %s", f"{where}, kept {kept}" if path != IN_MEMORY else "in memory, until the end")
    log.info("auth: %s", AUTH_MODES[settings.auth.mode].format(len(settings.auth.keys)))
    limits = {key: value for key, value in dataclasses.asdict(settings.limits).items() if key in QUOTA_KEYS and value}
    if limits:
        log.info("limits per owner: %s", ", ".join(f"{key} = {value}" for key, value in limits.items()))
    if settings.server.cors_origins:
        log.info("web pages: %s", ", ".join(settings.server.cors_origins))


def without_login(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
