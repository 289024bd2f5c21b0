"""A process of its own that writes a store: `python store_writer.py together|endless|full PATH RUN`."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from store_builders import NOW, OWNER, conversation, told, told_items

from errors import StoreError
from store import StoreSettings, open_store
from verbs import Store

TOGETHER = 100
ENDLESS = 5000  # and yet it ends, should nobody kill it
BATCH_EVERY = 3


def say(line: str) -> None:
    print(line, flush=True)


async def save_kind(store: Store, run: str, kind: str, count: int) -> None:
    """Turns one after the other, each said as soon as it is saved; a talk has batches of items among them."""
    for number in range(count):
        name = f"{run}.{kind}.{number}"
        if kind == "talk" and number % BATCH_EVERY == 0:
            await store.add_items(OWNER, f"{run}.talk", told_items(name), NOW)
        else:
            await store.save(told(name))
        say(name)


async def save_kinds(store: Store, run: str, kinds: str, count: int) -> None:
    await asyncio.gather(*(save_kind(store, run, kind, count) for kind in kinds.split()))


async def together(store: Store, run: str) -> None:
    """Writes beside another process, once both have opened the file. The run ends with a digit."""
    say("open")
    sys.stdin.readline()
    await asyncio.gather(
        save_kinds(store, run, "chain shared", TOGETHER),
        *(store.save(told(f"resp_all.talk.{run[-1]}{number:03}")) for number in range(TOGETHER)),
    )


async def endless(store: Store, run: str) -> None:
    """Writes until it is killed."""
    await store.create_conversation(OWNER, conversation(f"{run}.talk"), ())
    await save_kinds(store, run, "chain fork talk", ENDLESS)


def limit_files(size_bytes: int) -> None:
    """No file may grow further. Python ignores SIGXFSZ, so that a write fails instead."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))


def largest_file_bytes(directory: Path) -> int:
    return max(file.stat().st_size for file in directory.iterdir())


async def errors_of(*awaitables: Awaitable[Any]) -> list[Exception | None]:
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    return [result if isinstance(result, Exception) else None for result in results]


async def full(store: Store, run: str) -> None:
    """Writes until no file may grow, reads meanwhile, and goes on in the same process when there is room again.

    The run tells the room in bytes.
    """
    await store.create_conversation(OWNER, conversation("talk"), told_items("begin"))
    await save_kind(store, "resp_all", "chain", 20)
    limit_files(largest_file_bytes(Path(sys.argv[2]).parent) + int(run.removeprefix("resp_")))
    saved, refused, errors = [f"resp_all.chain.{number}" for number in range(20)], [], []
    for number in range(0, 12_000, 3):
        names = [f"{run}.shared.{number + more}" for more in range(3)]
        failures = await errors_of(*(store.save(told(name)) for name in names))
        errors += [failure for failure in failures if failure]
        refused += [name for name, failure in zip(names, failures, strict=True) if failure]
        saved += [name for name, failure in zip(names, failures, strict=True) if not failure]
        if len(refused) >= 30:
            break
    others = await errors_of(store.add_items(OWNER, "talk", told_items("more") * 500, NOW))
    readable = [name for name in saved[:20] if await store.response(OWNER, name) is not None]
    limit_files(resource.RLIM_INFINITY)
    await save_kind(store, f"{run}2", "chain", 20)
    saved += [f"{run}2.chain.{number}" for number in range(20)]
    say(
        json.dumps(
            {
                "saved": saved,
                "refused": refused,
                "readable": readable,
                "errors": sorted({type(error).__name__ for error in errors}),
                "retry_after_s": [error.retry_after_s for error in errors if isinstance(error, StoreError)],
                "others": [type(failure).__name__ for failure in others],
            }
        )
    )


async def main(what: str, path: str, run: str) -> None:
    store = await open_store(StoreSettings(path=path))
    try:
        await {"together": together, "endless": endless, "full": full}[what](store, run)
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
