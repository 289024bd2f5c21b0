"""What statements of PostgreSQL do to each other that run at the same time, from two stores on one database.

On SQLite there is one writer, so nothing of this can happen there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from random import Random
from typing import Any

import pytest
from postgres_server import Beside
from run_builders import (
    UNLIMITED,
    admit,
    all_events,
    batch,
    begin,
    cancel,
    claim,
    ending,
    events_after,
    new_run,
    queued,
    sweep,
)
from store_builders import (
    ALL_ASC,
    DEADLINE_S,
    NOW,
    OWNER,
    both_of,
    conversation,
    ids_in,
    input_ids,
    message,
    save_chain,
    turn,
    window_ids,
)
from store_places import PostgresPlace

from errors import InvalidRequest, ProxyError
from run_verbs import Held, QueueLimits, Run, RunStore
from verbs import FirstUse, Listed, Lock, conversation_lease

Stores = list[RunStore]

pytestmark = pytest.mark.stores("postgres")


@pytest.fixture
def url(place: PostgresPlace) -> str:
    return place.url


@pytest.fixture
async def stores(place: PostgresPlace) -> AsyncIterator[Stores]:
    """Two processes' worth of connections, which leave nothing behind that a statement must not."""
    stores = [await place.open(pool_size=6) for _ in range(2)]
    yield stores
    assert await stores[0].problems() == []
    for store in stores:
        await store.close()


async def test_of_children_that_come_at_once_each_has_its_parents_window_and_its_own(stores: Stores) -> None:
    await save_chain(stores[0], "root")
    for number in range(10):
        children = [f"c{number}.{place}" for place in range(8)]
        await asyncio.gather(*(stores[n % 2].save(turn(child, "root")) for n, child in enumerate(children)))
        for child in children:
            await save_chain(stores[0], f"{child}.next", after=child)
            assert await window_ids(stores[1], f"{child}.next") == both_of("root", child, f"{child}.next")


async def test_children_that_come_while_their_parent_goes_are_refused_or_whole(stores: Stores) -> None:
    one, two = stores
    for number in range(40):
        parent, child = f"p{number}", f"c{number}"
        await one.save(turn(parent))
        saving = asyncio.create_task(one.save(turn(child, parent)))
        deleting = asyncio.create_task(two.delete_response(OWNER, parent, NOW))
        (refused, _) = await asyncio.gather(saving, deleting, return_exceptions=True)
        assert refused is None or isinstance(refused, InvalidRequest)
        assert await window_ids(one, child) == (None if refused else both_of(parent, child))


async def until_waiting(beside: Beside, count: int) -> None:
    """Until so many statements wait for what another one holds."""
    waiting = "SELECT FROM pg_stat_activity WHERE application_name = 'responses-proxy' AND wait_event_type = 'Lock'"
    async with asyncio.timeout(DEADLINE_S):
        while len(beside.asked(waiting)) < count:  # noqa: ASYNC110 - the server cannot tell
            await asyncio.sleep(0.005)


async def test_a_parent_that_goes_while_its_child_is_being_written_is_kept_for_it(stores: Stores, url: str) -> None:
    """A fork, which does not move the tip of the thread that it leaves."""
    one, two = stores
    await save_chain(one, "p", "other")
    await one.delete_response(OWNER, "p", NOW)
    with closing(Beside(url)) as beside, closing(Beside(url)) as other:
        other.do(f"BEGIN; INSERT INTO first_use VALUES ('{OWNER}', 'key', '', 'other', 0)")
        saving = asyncio.create_task(one.save(turn("c", "p", first_use=FirstUse("key", b"digest", 20_000))))
        await until_waiting(beside, 1)
        deleting = asyncio.create_task(two.delete_response(OWNER, "other", NOW))
        await until_waiting(beside, 2)
        other.do("ROLLBACK")
        await asyncio.gather(saving, deleting)
    assert await window_ids(one, "c") == both_of("p", "c")


async def test_a_run_that_somebody_is_taking_is_passed_over(stores: Stores, url: str) -> None:
    await admit(stores[0], queued("a"), queued("b"))
    with closing(Beside(url)) as other:
        other.do("BEGIN; SELECT FROM run ORDER BY seq LIMIT 1 FOR UPDATE")
        assert [run.response_id for run in await claim(stores[0])] == ["b"]
        other.do("ROLLBACK")
    assert [run.response_id for run in await claim(stores[0])] == ["a"]


async def test_a_batch_that_was_given_up_and_arrives_late_takes_no_events_away(stores: Stores) -> None:
    held = await begin(stores[0], queued("a"), batch=batch(0))
    assert await stores[0].log(held, batch(1, 3))
    assert not await stores[1].log(held, batch(1, 2))
    assert await stores[0].log(held, batch(4, 1))
    assert events_after(await stores[0].tail(OWNER, "a", -1), -1) == ["0.", "1.", "2.", "3.", "4."]


async def streamed(store: RunStore, *names: str) -> list[Held]:
    for name in names:
        await admit(store, queued(name), batch=batch(0))
    return [run.held for run in await claim(store)]


async def test_events_of_runs_that_come_at_once_are_written_together(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, names = await streamed(stores[0], "a", "b", "c"), ("a", "b", "c")
    monkeypatch.delattr("postgres_runs.log")
    for first, count in ((1, 3), (1, 4), (5, 1)):  # the second is the first one again, whose answer was lost
        logged = (stores[0].log(each, batch(first, count, mark="abc"[place])) for place, each in enumerate(held))
        assert await asyncio.gather(*logged) == [True] * 3
    for name in names:
        tail = await stores[1].tail(OWNER, name, -1)
        assert tail is not None
        assert tail.batches[1:] == [(1, batch(1, 4, name).frames), (5, batch(5, 1, name).frames)]


async def test_of_several_batches_of_a_run_that_come_at_once_each_is_written(stores: Stores) -> None:
    one, two = await streamed(stores[0], "a", "b")
    logged = [(one, batch(1)), (two, batch(1)), (one, batch(2)), (two, batch(2))]
    assert await asyncio.gather(*(stores[0].log(*each) for each in logged)) == [True] * 4
    for name in ("a", "b"):
        assert await all_events(stores[1], name) == ["0.", "1.", "2."]


async def test_of_runs_that_log_together_one_that_is_lost_writes_nothing(stores: Stores) -> None:
    held = await streamed(stores[0], "a", "b", "c")
    await cancel(stores[1], "a")
    await stores[1].release_run(held[1])
    (again,) = await claim(stores[1])
    found = await asyncio.gather(*(stores[0].log(each, batch(1)) for each in (*held, again.held)))
    assert found == [False, False, True, True]
    assert await all_events(stores[1], "b") == ["0.", "1."]


async def test_a_run_that_somebody_else_writes_holds_up_no_other_ones_events(stores: Stores, url: str) -> None:
    held = await streamed(stores[0], "a", "b", "c")
    with closing(Beside(url)) as beside, closing(Beside(url)) as other:
        other.do("BEGIN; SELECT FROM run ORDER BY seq LIMIT 1 FOR UPDATE")
        logging = [asyncio.create_task(stores[0].log(each, batch(1))) for each in held]
        await until_waiting(beside, 1)
        assert await asyncio.gather(*logging[1:]) == [True] * 2
        assert not logging[0].done()
        other.do("ROLLBACK")
        assert await logging[0]


async def test_runs_that_are_admitted_while_their_parent_ends_are_never_stuck(stores: Stores) -> None:
    one, two = stores
    for number in range(40):
        parent, children = f"p{number}", [f"c{number}.{place}" for place in range(3)]
        await admit(one, queued(parent))
        (run,) = await claim(one, 1)
        settling = one.settle(run.held, ending(turn(parent))) if number % 2 else cancel(one, parent)
        admitting = [two.admit(new_run(queued(child, parent)), UNLIMITED) for child in children]
        await asyncio.gather(settling, *admitting)
        await one.let_go(run.held)
        assert sorted(each.response_id for each in await claim(two)) == children
        await sweep(one, 1e9)
        for child in children:
            await cancel(one, child)


async def test_a_queue_that_many_fill_at_once_takes_no_more_than_its_limit(stores: Stores) -> None:
    limits = QueueLimits(per_owner=7, total=11)
    owners = [OWNER if number % 3 else "stranger" for number in range(40)]
    admits = [stores[n % 2].admit(new_run(queued(f"r{n}", owner=owner)), limits) for n, owner in enumerate(owners)]
    await asyncio.gather(*admits, return_exceptions=True)
    found = [run.owner for run in await stores[0].runs()]
    assert (len(found), found.count(OWNER) <= 7, found.count("stranger") <= 7) == (11, True, True)


async def test_a_run_is_claimed_once_by_many_at_once(stores: Stores) -> None:
    await admit(stores[0], *(queued(f"r{number}", owner=f"o{number % 5}") for number in range(60)))
    found = await asyncio.gather(*(claim(stores[n % 2], 4, f"p{n}") for n in range(30)))
    ids = [run.response_id for runs in found for run in runs]
    assert sorted(ids) == sorted(f"r{number}" for number in range(60))


async def test_items_and_turns_of_a_conversation_have_one_order(stores: Stores) -> None:
    await stores[0].create_conversation(OWNER, conversation(), ())

    async def add(number: int) -> None:
        with contextlib.suppress(ProxyError):  # locked
            await stores[number % 2].add_items(OWNER, "conv", (message(f"i{number}"),), NOW)

    async def take_turn(number: int) -> None:
        lock = Lock(conversation_lease("conv"), f"holder {number}")
        if await stores[number % 2].acquire(lock, NOW, NOW + 60):
            before = await stores[1].conversation_window(OWNER, "conv")
            await stores[number % 2].save(turn(f"t{number}", conversation_id="conv", lock=lock))
            assert before is not None
            assert await input_ids(stores[0], f"t{number}") == [*ids_in(before.items), f"t{number}.in"]

    await asyncio.gather(*(work(number) for number in range(30) for work in (add, take_turn)))


async def claim_and_settle(store: RunStore) -> list[Run]:
    runs = await claim(store, 2)
    for run in runs:
        await store.settle(run.held, ending(turn(run.response_id)))
    return runs


Something = Callable[[RunStore, str, str], Awaitable[Any]]
# What a client does with a new id and one that is or was somewhere.
SOMETHING: list[Something] = [
    lambda store, new, old: store.save(turn(new, old)),
    lambda store, new, old: store.save(turn(new)),
    lambda store, new, old: store.save(turn(new, conversation_id="conv")),
    lambda store, new, old: store.admit(new_run(queued(new, old)), UNLIMITED),
    lambda store, new, old: store.admit(new_run(queued(new, old)), UNLIMITED),
    lambda store, new, old: store.admit(new_run(queued(new, conversation_id="conv")), UNLIMITED),
    lambda store, new, old: claim_and_settle(store),
    lambda store, new, old: claim_and_settle(store),
    lambda store, new, old: cancel(store, old),
    lambda store, new, old: store.delete_response(OWNER, old, NOW),
    lambda store, new, old: store.release_runs("me"),
    lambda store, new, old: store.purge(1500 if "3" in new else 0, NOW),
]


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_meets_nothing_is_torn_and_nothing_stuck(stores: Stores, seed: int) -> None:
    random = Random(seed)
    names = ["root"]
    await save_chain(stores[0], "root")
    await stores[0].create_conversation(OWNER, conversation(), ())

    async def one_client(number: int) -> None:
        for step in range(12):
            new = f"n{number}.{step}"
            with contextlib.suppress(InvalidRequest):
                await random.choice(SOMETHING)(stores[number % 2], new, random.choice(names))
            names.append(new)

    await asyncio.gather(*(one_client(number) for number in range(10)))
    await stores[0].release_runs("me")
    await sweep(stores[0], 1e9)
    while await claim_and_settle(stores[1]):
        pass
    assert await stores[0].runs() == []
    for name in names:
        await stores[0].delete_response(OWNER, name, NOW)
    await stores[0].delete_conversation(OWNER, "conv", NOW)
    left = await stores[0].purge(1e9, NOW)
    assert (left.responses, await stores[0].responses(OWNER, ALL_ASC, None)) == (0, Listed([], False))
