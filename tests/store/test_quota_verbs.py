"""What every store does when an owner's account is charged."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
from run_builders import OpenRunStore
from store_builders import NOW, Place

from quota_verbs import Charge, Used
from run_verbs import RunStore
from verbs import Lock

pytest_plugins = ["store_fixtures"]

ME, YOU = "flights_me", "flights_you"
WISH: dict[str, Any] = {"has_wish": True, "requests_s": 10.0, "most_requests_s": 50.0}


def charge(holder: str = ME, in_flight: int = 0, **changes: Any) -> Charge:
    given = Charge(owner="alice", holder=holder, now=NOW, in_flight=in_flight)
    return msgspec.structs.replace(given, **changes)


async def granted(store: RunStore, *charges: Charge) -> list[bool]:
    return [(await store.charge(each)).is_granted for each in charges]


async def test_a_first_charge_begins_with_all_there(store: RunStore) -> None:
    assert await store.charge(charge()) == Used(False, NOW, NOW, 0, 0.0)
    assert await store.charge(charge(owner="bob", **WISH)) == Used(True, NOW + 10, NOW, 0, 0.0)


async def test_a_wish_is_granted_as_long_as_the_time_is_near_enough(store: RunStore) -> None:
    assert await granted(store, *[charge(**WISH)] * 8) == [True] * 6 + [False] * 2
    assert await store.charge(charge()) == Used(False, NOW + 60, NOW, 0, 0.0)
    later = charge(**WISH, now=NOW + 10)
    assert await granted(store, later, later) == [True, False]


async def test_what_was_used_long_ago_is_there_again(store: RunStore) -> None:
    await store.charge(charge(**WISH, tokens_s=5.0))
    assert await store.charge(charge(now=NOW + 1000)) == Used(False, NOW + 1000, NOW + 1000, 0, 0.0)


async def test_tokens_are_charged_whether_or_not_the_wish_is_granted(store: RunStore) -> None:
    wish = charge(**WISH, most_tokens_s=30.0, tokens_s=20.0)
    assert await granted(store, wish, wish, wish) == [True, False, False]
    assert await store.charge(charge()) == Used(False, NOW + 10, NOW + 60, 0, 0.0)


async def test_without_a_wish_nothing_is_granted(store: RunStore) -> None:
    assert await granted(store, charge(most_requests_s=math.inf), charge(ME, 5)) == [False, False]


async def test_how_long_the_last_one_took_is_kept(store: RunStore) -> None:
    await store.charge(charge(took_s=3.5))
    assert (await store.charge(charge(YOU))).took_s == 3.5
    assert (await store.charge(charge(YOU, took_s=0.0))).took_s == 0.0


async def live(store: RunStore, *holders: str, until_at: float = NOW + 30) -> None:
    for holder in holders:
        assert await store.acquire(Lock(holder, holder), NOW, until_at)


async def test_what_others_have_in_flight_counts_too(store: RunStore) -> None:
    await live(store, ME, YOU)
    mine, yours = (charge(holder, in_flight, most_in_flight=3, **WISH) for holder, in_flight in ((ME, 0), (YOU, 1)))
    assert await granted(store, mine, yours) == [True, True]
    assert await granted(store, msgspec.structs.replace(mine, in_flight=1)) == [False]
    assert (await store.charge(charge(ME, 1))).elsewhere == 2
    assert (await store.charge(charge(YOU, 2))).elsewhere == 1
    assert (await store.charge(charge(YOU, 0))).elsewhere == 1
    assert (await store.charge(charge(ME, 1))).elsewhere == 0


async def test_what_is_not_to_be_in_flight_is_not_counted_there(store: RunStore) -> None:
    await live(store, ME)
    await store.charge(charge(**WISH))
    assert (await store.charge(charge(YOU))).elsewhere == 0


async def test_one_owners_flights_are_no_others(store: RunStore) -> None:
    await live(store, ME)
    await store.charge(charge(ME, 4))
    assert (await store.charge(charge(YOU, owner="bob"))).elsewhere == 0


async def test_the_flights_of_a_holder_count_until_its_lease_has_run_out(store: RunStore) -> None:
    await live(store, ME)
    await store.charge(charge(ME, 4))
    seen = [(await store.charge(charge(YOU, now=now))).elsewhere for now in (NOW + 29, NOW + 30)]
    assert seen == [4, 0]
    await live(store, ME, until_at=NOW + 90)
    assert (await store.charge(charge(YOU, now=NOW + 60))).elsewhere == 4


async def test_the_flights_of_a_holder_without_a_lease_do_not_count(store: RunStore) -> None:
    await store.charge(charge(ME, 4))
    assert (await store.charge(charge(YOU))).elsewhere == 0


async def test_an_owner_may_have_any_name(store: RunStore) -> None:
    for owner in ("", "'; --", "日本", "a\0b", "x" * 10_000):
        assert (await store.charge(charge(owner=owner, **WISH))).requests_at == NOW + 10


async def test_of_many_at_once_as_many_are_granted_as_there_is_room_for(open_in: OpenRunStore) -> None:
    stores = await asyncio.gather(*(open_in() for _ in range(4)))
    wish = msgspec.structs.replace(charge(**WISH), requests_s=2.0, most_requests_s=58.0)
    charges = (store.charge(wish) for _ in range(25) for store in stores)
    used = await asyncio.gather(*charges)
    assert (sum(each.is_granted for each in used), max(each.requests_at for each in used)) == (30, NOW + 60)


async def test_of_many_holders_at_once_as_many_are_granted_as_may_be_in_flight(open_in: OpenRunStore) -> None:
    stores = await asyncio.gather(*(open_in() for _ in range(4)))
    holders = [f"holder {number}" for number in range(20)]
    await live(stores[0], *holders)
    charges = [charge(holder, has_wish=True, most_in_flight=7) for holder in holders]
    used = await asyncio.gather(*(stores[n % 4].charge(each) for n, each in enumerate(charges)))
    assert sum(each.is_granted for each in used) == 7
    assert (await stores[0].charge(charge("somebody else"))).elsewhere == 7


async def test_a_purge_forgets_owners_that_have_used_nothing_lately(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await live(store, ME)
    await store.charge(charge(owner="at rest", **WISH))
    await store.charge(charge(owner="in debt", tokens_s=500.0))
    await store.charge(charge(ME, 1, owner="in flight"))
    await store.charge(charge(YOU, 1, owner="of a dead holder"))
    await store.purge(0.0, NOW + 20)
    assert sorted(place.asked("SELECT owner FROM account")) == [("in debt",), ("in flight",)]
    await store.purge(0.0, NOW + 600)
    assert place.asked("SELECT owner FROM account") == []
