"""Processes that share a store and seal with different keys: the one that comes later says it."""

from __future__ import annotations

import base64
from contextlib import closing

import pytest
from conftest import StartApp
from store_builders import NOW
from store_places import PostgresPlace

from run_verbs import RunStore
from sealing import Seals
from services import KEYS_LEASE_S, tell_other_keys

pytest_plugins = ["store_fixtures"]
OLD, NEW, OTHER = (mark * 32 for mark in (b"o", b"n", b"x"))


async def starts(store: RunStore, *keys: bytes, at: float = NOW) -> None:
    await tell_other_keys(store, Seals(keys), at)


async def test_replicas_with_the_same_keys_have_nothing_to_say(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await starts(store, OLD)
    assert caplog.messages == []


async def test_a_replica_whose_keys_are_others_says_it_and_no_key(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    await starts(store, OLD)
    await starts(store, OTHER, NEW)
    (message,) = caplog.messages
    assert message.startswith("sealing.keys is not what other processes on this store have")
    assert [name for name in Seals((OLD, OTHER)).key_names if name in message] == []


async def test_keys_that_are_rotated_by_the_book_are_no_surprise(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The new key last everywhere, then first, then alone."""
    for keys in ((OLD,), (OLD, NEW), (OLD, NEW), (NEW, OLD), (OLD, NEW), (NEW, OLD), (NEW,)):
        await starts(store, *keys)
    assert caplog.messages == []


async def test_a_replica_that_missed_a_rotation_says_it(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    for keys in ((OLD,), (NEW, OLD), (OLD,)):
        await starts(store, *keys)
    assert len(caplog.messages) == 1


async def test_keys_that_nobody_has_had_for_long_are_forgotten(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    await starts(store, OLD)
    await starts(store, OTHER, at=NOW + KEYS_LEASE_S)
    assert caplog.messages == []


async def test_a_process_looks_at_its_keys_when_it_starts(
    start_app: StartApp, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(PostgresPlace()) as place:
        for key in (OLD, OTHER):
            text = base64.b64encode(key).decode()
            await start_app(store={"path": place.url}, sealing={"keys": (text,)})
    assert [each.name for each in caplog.records if "sealing.keys" in each.message] == ["responses_proxy.services"]
