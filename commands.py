"""The commands beside `serve`: each prints what it found or did, and tells by its exit code whether that is well.

May not know routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import copying
import sqlite_copying
from auth import new_key
from errors import ProxyError
from jobs import CLEAR, jobs_table
from keys import fresh_key, rotate_keys
from routing import Upstreams
from services import IN_MEMORY, key_file_of, opened_store, opener_of, without_login
from settings import Settings, SettingsError
from store import is_database, shown
from upkeep import purge
from upstream import Upstream
from vocabulary import VOCABULARIES, VocabularyError, fetch

JOBS_EVERY_S = 1.0


async def check(settings: Settings) -> int:
    """Prints what each backend is; 1 when one of them cannot be used."""
    upstreams = Upstreams(settings.upstream)
    try:
        found = [await _check_one(upstream, routes_of(upstream, upstreams)) for upstream in upstreams]
    finally:
        await upstreams.close()
    return 0 if found and all(found) else 1


async def check_store(settings: Settings) -> int:
    """Prints what is damaged in the store; 1 when something is."""
    async with contextlib.AsyncExitStack() as stack:
        problems = await (await opened_store(settings, stack, may_make=False)).problems()
    print("\n".join(problems) or f"{shown(settings.store.path)}: ok")
    return 1 if problems else 0


async def purge_once(settings: Settings) -> int:
    """The command `purge`, for a timer of the system."""
    async with contextlib.AsyncExitStack() as stack:
        purged = await purge(await opened_store(settings, stack, may_make=False), settings.store, time.time())
    print(f"{shown(settings.store.path)}: {purged.responses} responses purged, {purged.freed_bytes} bytes given back")
    return 0


async def show_jobs(settings: Settings, is_watched: bool) -> int:
    """The command `jobs`: the background responses that have not ended, again every second when they are watched."""
    async with contextlib.AsyncExitStack() as stack:
        store = await opened_store(settings, stack, may_make=False)
        print(jobs_table(await store.runs(), time.time()))
        while is_watched:
            await asyncio.sleep(JOBS_EVERY_S)
            print(CLEAR + jobs_table(await store.runs(), time.time()), flush=True)
    return 0


async def copy(settings: Settings, source: str | None, target: str | None) -> int:
    """The command `copy`; the place that is not given is that of the settings. 1 when the two differ in the end.

    Raises: SettingsError, StoreError.
    """
    if not source and not target:
        raise SettingsError("copy --from STORE --to STORE: files, or postgresql://… (one left out: store.path)")
    places = [source or settings.store.path, target or settings.store.path]
    _refuse_places(*places)
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(_opened_side(settings, places[0], is_source=True))
        await one.refuse_use(time.time())  # before anything is made
        other = await stack.enter_async_context(_opened_side(settings, places[1], is_source=False))
        compared, wrong = await copying.copy(one, other, time.time(), _tell_at_once)
    print("\n".join([copying.table_of(compared), *wrong]))
    if wrong:
        print(f"{shown(places[1])} is not usable: empty it, and copy again")
        return 1
    print("\n".join([f"{shown(places[0])} is copied to {shown(places[1])}, whole", *_about_keys(settings, *places)]))
    return 0


def _refuse_places(source: str, target: str) -> None:
    """Raises: SettingsError."""
    if IN_MEMORY in (source, target):
        raise SettingsError("copy: ':memory:' keeps nothing")
    if not is_database(source) and not Path(source).is_file():
        raise SettingsError(f"--from: there is no file '{source}'")
    both = [path if is_database(path) else str(Path(path).resolve()) for path in (source, target)]
    if both[0] == both[1]:
        raise SettingsError("copy: --from and --to are the same store")


def _opened_side(settings: Settings, path: str, is_source: bool) -> AbstractAsyncContextManager[copying.Side]:
    """Raises: SettingsError, StoreError."""
    own = dataclasses.replace(settings.store, path=path)
    if not is_database(path):
        return sqlite_copying.opened(own, is_source)
    opener_of(path)  # says what to install
    found: AbstractAsyncContextManager[copying.Side] = importlib.import_module("postgres_copying").opened(
        own, is_source
    )
    return found


def _tell_at_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _about_keys(settings: Settings, source: str, target: str) -> list[str]:
    """What has to become of the keys that seal; they are in no store."""
    if settings.sealing.keys:
        kept = "keep sealing.keys as it is" + ("" if is_database(target) else f", or put its keys into {target}.key")
        return [f"the keys that seal are not in the store: {kept}"]
    if is_database(source):
        return [
            f"the keys that seal are in no store: keep sealing.keys, or put its keys into {target}.key, a line each"
        ]
    if is_database(target):
        return [
            f"the keys that seal are not in the store: before the proxy starts, set sealing.keys to the lines of "
            f"{source}.key, in their order (or RESPONSES_PROXY_SEALING__KEYS, with commas between them)"
        ]
    return [f"the keys that seal are not in the store: cp -p {source}.key {target}.key"]


def print_key(settings: Settings, word: str | None) -> int:
    """The command `key`: a fresh client key, shown this once, and its line for the section [auth.keys]."""
    key, hashed = new_key()
    print(f'for the client:    {key}\nfor [auth.keys]:   name = "{hashed}"')
    return 0


def rotate(settings: Settings, word: str | None) -> int:
    """The command `keys rotate`: puts a fresh sealing key first. Raises: SettingsError."""
    key_file = key_file_of(settings)
    if is_database(settings.store.path) and not settings.sealing.keys:
        print(f"a store in a database has no key file: put this key into sealing.keys of every process\n{fresh_key()}")
        return 0
    try:
        print(rotate_keys(settings.sealing.keys, key_file))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise SettingsError(f"{key_file}: {error.strerror}") from error
    return 0


def fetch_vocabulary(settings: Settings, name: str | None) -> int:
    """The command `fetch-vocab`: brings a vocabulary onto this machine, so that requests find it; 1 when it cannot."""
    name = name or next(iter(VOCABULARIES))
    try:
        print(f"{name}: {fetch(name)}")
    except VocabularyError as error:
        print(f"responses-proxy: {error}", file=sys.stderr)
        return 1
    return 0


def routes_of(upstream: Upstream, upstreams: Upstreams) -> list[str]:
    """What is sent to one backend of several, and where it goes on, with what becomes of the aliases there."""
    first, *rest = upstreams
    if not rest:
        return []
    settings = upstream.settings
    named = [f"{alias} as {model}" for alias, model in settings.aliases.items()]
    last = ["every model that nobody names"] if upstream is first else []
    lines = [f"  serves: {', '.join([*named, *(settings.models or ['what it lists']), *last])}"]
    for other in upstreams.fallbacks(upstream):
        there = [f"{alias} as {other.settings.aliases.get(alias, alias)}" for alias in settings.aliases]
        lines.append(f"  falls back to: {other.settings.name}" + (f" ({', '.join(there)})" if there else ""))
    return lines


async def _check_one(upstream: Upstream, routes: list[str]) -> bool:
    where = f"{upstream.settings.name} ({without_login(upstream.settings.base_url)})"
    try:
        probe = await upstream.probe()
    except ProxyError as error:
        print("\n".join([f"{where}: {error.message}", *routes]))
        return False
    question = {"model": next(iter(probe.models), ""), "messages": [{"role": "user", "content": "Hello"}]}
    counts = "yes" if await upstream.count_tokens(question) else "no"
    told = f"{where}: dialect {probe.dialect.name}, {len(probe.models)} model(s), tokenizer: {counts}"
    print("\n".join([told, *routes]))
    for model in probe.models:
        window = await upstream.window_tokens(model)
        print(f"  {model}: window {f'{window} tokens' if window else 'not told'}")
    return True


# Commands that need neither a store nor a backend.
COMMANDS_ALONE: dict[str, Callable[[Settings, str | None], int]] = {
    "key": print_key,
    "keys": rotate,
    "fetch-vocab": fetch_vocabulary,
}
