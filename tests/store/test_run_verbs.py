"""What stores do at the verbs of background runs. Ids are as in test_store_verbs.py; `me` and `you` are holders."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import msgspec
import pytest
from run_builders import (
    BRIEF_S,
    LEASE_S,
    LOG_S,
    RUN_TABLES,
    UNLIMITED,
    OpenRunStore,
    admit,
    all_events,
    batch,
    begin,
    brief,
    cancel,
    claim,
    claim_ids,
    claim_one,
    counted_in,
    ending,
    events_after,
    finish,
    lengths_in,
    new_run,
    numbered,
    queued,
    run_ids,
    run_rows_in,
    status_of,
    sweep,
    waiting_ids,
)
from store_builders import (
    ALL_ASC,
    NOW,
    OWNER,
    STRANGER,
    Place,
    both_of,
    compaction,
    conversation,
    conversation_ids,
    failed,
    input_ids,
    kept,
    message,
    reasoning,
    response_ids,
    rows_in,
    save_all,
    save_chain,
    turn,
    window_ids,
    window_of,
)

from errors import ConversationLocked, InvalidRequest, NotFound, ProxyError, QueueFull, StillRunning, StoreError
from run_verbs import Batch, Held, QueueLimits, QueueState, Run, RunInfo, RunStore, Stopped, Tail
from verbs import FirstUse, ItemIds, Lock, NewTurn, Page, Window, conversation_lease

pytest_plugins = ["store_fixtures"]

NO_ROWS = dict.fromkeys(RUN_TABLES, 0)
LOCK = Lock(conversation_lease("conv"), "me")
EXPIRED = NOW + LEASE_S + 1


@pytest.fixture(autouse=True)
def queue_is_counted_right(store_path: Path) -> Iterator[None]:
    """Whatever a test does: the lengths of the queue are those of the runs that stand in it."""
    yield
    if store_path.exists():
        with closing(sqlite3.connect(store_path)) as connection:
            assert lengths_in(connection) == counted_in(connection)


async def begin_talk(store: RunStore, *items: str) -> None:
    await store.create_conversation(OWNER, conversation(), tuple(message(item) for item in items))


def in_talk(turn_id: str, **changes: Any) -> NewTurn:
    """A queued turn of the conversation."""
    return queued(turn_id, conversation_id="conv", **changes)


def joined(turn_id: str, **changes: Any) -> NewTurn:
    """A turn of the conversation at its end."""
    return turn(turn_id, conversation_id="conv", **changes)


# -- admission ---------------------------------------------------------------------------------------------------------


async def test_an_admitted_response_is_there_as_queued_with_its_inputs(store: RunStore) -> None:
    await admit(store, queued("a"))
    assert await store.response(OWNER, "a") == kept(queued("a"))
    assert await input_ids(store, "a") == ["a.in"]
    assert await response_ids(store) == ["a"]
    assert await store.items(OWNER, ["a.in"]) == {"a.in": message("a.in").body}


async def test_an_admitted_response_is_its_owners_only(store: RunStore) -> None:
    await admit(store, queued("a"))
    assert await store.response(STRANGER, "a") is None
    assert await store.tail(STRANGER, "a", -1) is None


async def test_the_window_of_an_unfinished_response_has_its_status_and_no_items(store: RunStore) -> None:
    await admit(store, queued("a"))
    assert await store.window(OWNER, "a") == window_of(queued("a"), [])
    await claim_one(store, "a")
    assert await store.window(OWNER, "a") == window_of(queued("a", status="in_progress"), [])


async def test_nothing_is_kept_ahead_of_a_response_before_it_has_ended(store: RunStore) -> None:
    await admit(store, queued("a"))
    found = [await store.keep_ahead(OWNER, "a", b"queued")]
    held = await claim_one(store, "a")
    found.append(await store.keep_ahead(OWNER, "a", b"in progress"))
    await store.settle(held, ending(turn("a")))
    found.append(await store.keep_ahead(OWNER, "a", b"ended"))
    assert found == [False, False, True]
    assert await store.window(OWNER, "a") == window_of(
        turn("a"), [message(item_id).body for item_id in both_of("a")], ahead=b"ended"
    )


async def test_nothing_is_kept_ahead_of_a_brief_response(store: RunStore) -> None:
    await store.settle(await begin(store, brief("a")), ending(turn("a")))
    assert await status_of(store, "a") == "completed"
    assert await store.keep_ahead(OWNER, "a", b"ahead") is False


async def test_a_run_begins_with_what_was_kept_ahead_of_its_parent(store: RunStore) -> None:
    await save_chain(store, "a")
    await store.keep_ahead(OWNER, "a", b"ahead")
    await admit(store, queued("b", "a"), brief("c", "a"))
    found = [await store.window_before(OWNER, turn_id) for turn_id in "bc"]
    assert [window and window.ahead for window in found] == [b"ahead", b"ahead"]


async def test_an_admitted_run_is_shown_to_people(store: RunStore) -> None:
    await admit(store, queued("a"))
    await admit(store, queued("b", "a", owner=OWNER), batch=batch(0, 2), admitted_at=NOW + 1.5)
    assert await store.runs() == [
        RunInfo(False, "a", OWNER, NOW, 0, None, None),
        RunInfo(True, "b", OWNER, NOW + 1.5, 0, 2, None),
    ]
    assert await store.queue() == QueueState(2, 0)


async def test_a_run_is_admitted_with_its_first_events(store: RunStore) -> None:
    await admit(store, queued("a"), batch=batch(0, 2))
    assert await store.tail(OWNER, "a", -1) == Tail("queued", [(0, b"0. 1. ")], False)


async def test_a_run_without_events_has_no_log(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    assert await store.tail(OWNER, "a", -1) is None
    assert await store.settle(held, ending(turn("a"))) is True
    assert await store.tail(OWNER, "a", -1) is None


async def assert_refused(store: RunStore, new: NewTurn, error: type[ProxyError], limits: QueueLimits) -> ProxyError:
    """Nothing is left of a refused admission, and what was there stays as it was."""
    before = await store.runs(), await store.queue(), await response_ids(store)
    new = msgspec.structs.replace(new, first_use=FirstUse("key", b"digest", 20_000))
    with pytest.raises(error) as refused:
        await store.admit(new_run(new, batch=batch(0)), limits)
    assert (await store.runs(), await store.queue(), await response_ids(store)) == before
    assert await store.response(new.owner, new.id) is None
    assert await store.items(new.owner, [item.id for item in new.inputs]) == {}
    assert await store.first_use(new.owner, "key", NOW) is None
    assert await store.tail(new.owner, new.id, -1) is None
    return refused.value


async def test_more_of_an_owner_than_its_limit_is_refused(store: RunStore) -> None:
    limits = QueueLimits(per_owner=2, total=100)
    for turn_id in "ab":
        await store.admit(new_run(queued(turn_id)), limits)
    error = await assert_refused(store, queued("c"), QueueFull, limits)
    assert (error.http_status, (error.retry_after_s or 0) > 0) == (429, True)
    await store.admit(new_run(queued("c", owner=STRANGER)), limits)


async def test_more_than_the_limit_of_all_owners_is_refused(store: RunStore) -> None:
    limits = QueueLimits(per_owner=2, total=3)
    for turn_id, owner in (("a", OWNER), ("b", STRANGER), ("c", STRANGER)):
        await store.admit(new_run(queued(turn_id, owner=owner)), limits)
    error = await assert_refused(store, queued("d"), QueueFull, limits)
    assert (error.retry_after_s or 0) > 0


async def test_runs_that_are_carried_out_do_not_count_as_queued(store: RunStore) -> None:
    limits = QueueLimits(per_owner=1, total=1)
    for turn_id in "abc":
        await store.admit(new_run(queued(turn_id)), limits)
        await claim_one(store, turn_id)
    assert await store.queue() == QueueState(0, 3)


async def test_runs_that_wait_for_others_count_as_queued(store: RunStore) -> None:
    limits = QueueLimits(per_owner=1, total=100)
    await begin(store, queued("a"))
    await store.admit(new_run(queued("b", "a")), limits)
    await assert_refused(store, queued("c"), QueueFull, limits)


async def test_a_queue_that_was_full_takes_the_next_once_one_has_left(store: RunStore) -> None:
    limits = QueueLimits(per_owner=1, total=1)
    await store.admit(new_run(queued("a")), limits)
    await assert_refused(store, queued("b"), QueueFull, limits)
    await cancel(store, "a")
    await store.admit(new_run(queued("b")), limits)
    assert await claim_ids(store) == ["b"]


async def test_a_full_queue_refuses_some_of_many_at_once_and_keeps_the_others(store: RunStore) -> None:
    runs = [new_run(queued(f"t{number}")) for number in range(20)]
    limits = QueueLimits(per_owner=5, total=100)
    results = await asyncio.gather(*(store.admit(run, limits) for run in runs), return_exceptions=True)
    taken = [run.turn.id for run, result in zip(runs, results, strict=True) if result is None]
    assert (len(taken), {type(result) for result in results}) == (5, {type(None), QueueFull})
    assert sorted(await response_ids(store)) == sorted(await run_ids(store)) == sorted(taken)


async def test_a_first_use_is_kept_from_admission_to_the_end(store: RunStore) -> None:
    held = await begin(store, queued("a", first_use=FirstUse("key", b"digest", 20_000)))
    assert await store.first_use(OWNER, "key", NOW) == (b"digest", "a")
    await store.settle(held, ending(turn("a")))
    assert await store.first_use(OWNER, "key", NOW) == (b"digest", "a")


@pytest.mark.parametrize(
    ("new", "error"),
    [
        (queued("b", "nobody"), InvalidRequest),
        (queued("b", "a", owner=STRANGER), InvalidRequest),
        (in_talk("b"), NotFound),
        (queued("b", conversation_id="mine", owner=STRANGER), NotFound),
    ],
    ids=["unknown parent", "foreign parent", "unknown conversation", "foreign conversation"],
)
async def test_a_run_that_continues_nothing_that_is_there_is_refused(
    store: RunStore, new: NewTurn, error: type[ProxyError]
) -> None:
    await begin(store, queued("a"))
    await store.create_conversation(OWNER, conversation("mine"), ())
    await assert_refused(store, new, error, UNLIMITED)


async def test_an_id_that_is_taken_is_not_admitted_and_the_first_stays(store: RunStore) -> None:
    await admit(store, queued("a"), batch=batch(0))
    results = await asyncio.gather(*(admit(store, queued(each)) for each in "bac"), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StoreError, type(None)]
    assert await run_ids(store) == ["a", "b", "c"]
    assert await all_events(store, "a") == numbered(0)


# -- claims ------------------------------------------------------------------------------------------------------------


async def test_a_claim_gives_all_that_the_run_needs(store: RunStore) -> None:
    new = queued("a", inputs=(message("a.1"), reasoning("a.2"), message("a.3")), created_at=1234)
    await admit(store, new, request=b"request", bearer="sealed", batch=batch(0, 2))
    (run,) = await claim(store)
    bodies = [item.body for item in new.inputs]
    assert run == Run(Held(ANY, 1), "a", OWNER, 1234, bodies, 1, b"request", "sealed", 2)


async def test_a_run_without_events_and_key_is_claimed_without_them(store: RunStore) -> None:
    await admit(store, queued("a", inputs=()))
    (run,) = await claim(store)
    assert (run.inputs, run.bearer, run.next_number) == ([], None, None)


async def test_a_claimed_run_is_in_progress_and_has_a_holder(store: RunStore) -> None:
    await begin(store, queued("a"))
    assert await status_of(store, "a") == "in_progress"
    assert await store.runs() == [RunInfo(False, "a", OWNER, NOW, 1, None, "me")]
    assert await store.queue() == QueueState(0, 1)


async def test_a_claimed_run_is_not_claimed_again(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    assert await claim_ids(store, 1) == ["a"]
    assert await claim_ids(store, holder="you") == ["b"]
    assert await claim_ids(store) == []


async def test_an_empty_queue_gives_nothing(store: RunStore) -> None:
    assert await claim(store) == []
    assert await store.runs() == []
    assert await store.queue() == QueueState(0, 0)


@pytest.mark.parametrize("limit", range(5))
async def test_a_claim_takes_no_more_than_it_was_told(store: RunStore, limit: int) -> None:
    await admit(store, *(queued(turn_id) for turn_id in "abc"))
    assert await claim_ids(store, limit) == list("abc")[:limit]
    assert await store.queue() == QueueState(3 - min(limit, 3), min(limit, 3))


async def admit_of(store: RunStore, *turn_ids: str) -> None:
    """Runs whose owners are the first letters of their names."""
    await admit(store, *(queued(turn_id, owner=turn_id[0]) for turn_id in turn_ids))


async def claim_each(store: RunStore) -> list[str]:
    """All runs in line, one claim each."""
    found: list[str] = []
    while claimed := await claim_ids(store, 1):
        found += claimed
    return found


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_owners_take_turns_and_each_owners_runs_come_in_order(store: RunStore, limit: int) -> None:
    await admit_of(store, "a1", "a2", "a3", "b1", "b2", "c1", "a4")
    found: list[str] = []
    while claimed := await claim_ids(store, limit):
        found += claimed
    assert found == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_the_round_goes_by_who_came_first_and_not_by_name(store: RunStore) -> None:
    await admit_of(store, "c1", "a1", "b1", "a2", "c2", "b2")
    assert await claim_ids(store) == ["c1", "a1", "b1", "c2", "a2", "b2"]


async def test_a_new_owner_comes_at_the_end_of_the_round(store: RunStore) -> None:
    await admit_of(store, "a1", "a2", "a3", "b1", "b2", "b3")
    assert await claim_ids(store, 1) == ["a1"]
    await admit_of(store, "c1", "c2")
    assert await claim_each(store) == ["b1", "a2", "c1", "b2", "a3", "c2", "b3"]


async def test_an_owner_whose_last_run_was_taken_comes_again_at_the_end_of_the_round(store: RunStore) -> None:
    await admit_of(store, "a1", "b1", "b2", "c1", "c2")
    assert await claim_ids(store, 1) == ["a1"]
    await admit_of(store, "a2")
    assert await claim_each(store) == ["b1", "c1", "a2", "b2", "c2"]


async def test_one_who_asks_again_and_again_waits_for_one_run_of_a_long_queue_at_most(store: RunStore) -> None:
    await admit_of(store, *(f"a{number:02}" for number in range(20)))
    found: list[str] = []
    for number in range(5):
        await admit_of(store, f"b{number}")
        found += await claim_ids(store, 2)
    assert sorted(each for each in found if each[0] == "b") == [f"b{number}" for number in range(5)]


async def test_an_owner_with_only_waiting_runs_does_not_block_others(store: RunStore) -> None:
    await begin(store, queued("a1", owner="a"))
    await admit(store, *(queued(turn_id, "a1", owner="a") for turn_id in ("a2", "a3")))
    await admit_of(store, "b1", "b2")
    assert await claim_ids(store) == ["b1", "b2"]
    assert await store.queue() == QueueState(2, 3)


async def test_a_waiting_run_does_not_block_the_later_ones_of_its_owner(store: RunStore) -> None:
    await begin(store, queued("a"))
    await admit(store, queued("b", "a"), queued("c"))
    assert await claim_ids(store) == ["c"]


async def test_generations_and_attempts_grow_with_every_claim(store: RunStore) -> None:
    await admit(store, queued("a"))
    found = []
    for _ in range(3):
        (run,) = await claim(store)
        found.append((run.held.generation, run.attempt))
        assert await sweep(store, EXPIRED) == 1
    assert found == [(1, 1), (2, 2), (3, 3)]
    assert await store.runs() == [RunInfo(False, "a", OWNER, NOW, 3, None, None)]


async def test_runs_have_numbers_of_their_own(store: RunStore) -> None:
    await admit(store, queued("a"))
    (first,) = await claim(store)
    await store.settle(first.held, ending(turn("a")))
    await admit(store, queued("b"))
    (second,) = await claim(store)
    assert second.held.run > first.held.run


async def test_many_who_claim_at_once_share_the_runs(open_in: OpenRunStore) -> None:
    stores = [await open_in() for _ in range(4)]
    await admit(stores[0], *(queued(f"t{number}") for number in range(40)))
    found = await asyncio.gather(*(claim_ids(each, 3, f"p{n}") for n in range(5) for each in stores))
    assert sorted(turn_id for claimed in found for turn_id in claimed) == sorted(f"t{number}" for number in range(40))


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_a_child_of_an_unfinished_parent_waits_for_its_end(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b", "a"))
    assert await waiting_ids(store) == ["b"]
    held = await claim_one(store, "a")
    assert await claim(store) == []
    await store.settle(held, ending(turn("a")))
    assert await waiting_ids(store) == []
    assert await claim_ids(store) == ["b"]


async def test_a_child_of_an_ended_parent_waits_for_nothing(store: RunStore) -> None:
    await save_chain(store, "a")
    await finish(store, turn("b", "a"))
    await admit(store, queued("c", "b"), queued("d", "a"))
    assert await claim_ids(store) == ["c", "d"]


async def test_a_chain_that_was_admitted_at_once_runs_one_after_the_other(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b", "a"), queued("c", "b"))
    for turn_id, parent in (("a", None), ("b", "a"), ("c", "b")):
        (run,) = await claim(store)
        assert run.response_id == turn_id
        assert await store.settle(run.held, ending(turn(turn_id, parent))) is True
    assert await window_ids(store, "c") == both_of(*"abc")
    assert await input_ids(store, "c") == ["a.in", "a.out", "b.in", "b.out", "c.in"]


async def test_all_children_of_a_parent_are_woken_by_its_end(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await admit(store, queued("b", "a"), queued("c", "a"))
    await store.settle(held, ending(turn("a")))
    runs = await claim(store)
    for run in runs:
        await store.settle(run.held, ending(turn(run.response_id, "a")))
    assert [await window_ids(store, turn_id) for turn_id in "bc"] == [both_of("a", "b"), both_of("a", "c")]


async def test_the_end_of_another_run_wakes_nobody(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"), queued("c", "a"))
    runs = await claim(store)
    await store.settle(runs[1].held, ending(turn("b")))
    await store.let_go(runs[0].held)
    assert await claim(store) == []


async def test_a_child_is_woken_when_its_parent_fails(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await admit(store, queued("b", "a"))
    oops = failed("a", outputs=())
    await store.settle(held, ending(oops))
    assert await claim_ids(store) == ["b"]
    assert await store.window(OWNER, "a") == window_of(oops, [])


@pytest.mark.parametrize("is_claimed", [False, True])
@pytest.mark.parametrize("how", ["cancelled", "deleted"])
async def test_a_child_is_woken_when_its_parent_is_stopped(store: RunStore, how: str, is_claimed: bool) -> None:
    await admit(store, queued("a"), queued("b", "a"))
    if is_claimed:
        await claim_one(store, "a")
    await (cancel(store, "a") if how == "cancelled" else store.delete_response(OWNER, "a", NOW))
    assert await claim_ids(store) == ["b"]


GIVE_BACK: dict[str, Callable[[RunStore, Held], Awaitable[Any]]] = {
    "expired": lambda store, held: sweep(store, EXPIRED),
    "released": lambda store, held: store.release_run(held),
    "released with all": lambda store, held: store.release_runs("me"),
}


@pytest.mark.parametrize("how", sorted(GIVE_BACK))
async def test_a_child_waits_on_while_its_parent_is_back_in_line(store: RunStore, how: str) -> None:
    held = await begin(store, queued("a"))
    await admit(store, queued("b", "a"))
    await GIVE_BACK[how](store, held)
    assert await claim_ids(store) == ["a"]


async def test_a_child_of_a_cancelled_parent_waits_for_nothing(store: RunStore) -> None:
    await begin(store, queued("a"))
    await cancel(store, "a")
    await admit(store, queued("b", "a"))
    assert await claim_ids(store) == ["b"]


async def test_runs_of_a_conversation_run_one_after_the_other(store: RunStore) -> None:
    await begin_talk(store)
    await admit(store, in_talk("a"), in_talk("b"), in_talk("c"))
    assert await waiting_ids(store) == ["b", "c"]
    for turn_id in "abc":
        (run,) = await claim(store)
        assert run.response_id == turn_id
        await store.settle(run.held, ending(joined(turn_id)))
    assert await conversation_ids(store) == both_of(*"abc")


async def test_runs_of_two_conversations_do_not_wait_for_each_other(store: RunStore) -> None:
    for name in ("one", "two"):
        await store.create_conversation(OWNER, conversation(name), ())
    await admit(store, *(queued(f"{name}.a", conversation_id=name) for name in ("one", "two")), queued("b"))
    assert await claim_ids(store) == ["one.a", "two.a", "b"]


@pytest.mark.parametrize("end", ["failed", "cancelled", "deleted"])
async def test_a_run_of_a_conversation_is_woken_by_every_end_of_the_one_before(store: RunStore, end: str) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a"))
    await admit(store, in_talk("b"))
    assert await claim(store) == []
    if end == "failed":
        await store.settle(held, ending(failed("a")))
    elif end == "cancelled":
        await cancel(store, "a")
    else:
        await store.delete_response(OWNER, "a", NOW)
    assert await claim_ids(store) == ["b"]


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
async def test_cancelling_a_run_in_the_middle_of_a_conversation_does_not_wake_the_one_behind_it(
    store: RunStore, how: str
) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a"))
    await admit(store, in_talk("b"), in_talk("c"))
    await (cancel(store, "b") if how == "cancelled" else store.delete_response(OWNER, "b", NOW))
    assert await claim(store) == []
    await store.settle(held, ending(joined("a")))
    assert await claim_ids(store) == ["c"]


async def test_a_run_of_a_conversation_does_not_wait_for_a_stopped_one(store: RunStore) -> None:
    await begin_talk(store)
    await begin(store, in_talk("a"))
    await cancel(store, "a")
    await admit(store, in_talk("b"))
    assert await claim_ids(store) == ["b"]


async def test_a_child_of_a_response_that_will_join_a_conversation_is_told_to_try_again(store: RunStore) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a"))
    error = await assert_refused(store, queued("b", "a"), StillRunning, UNLIMITED)
    assert (error.http_status, (error.retry_after_s or 0) > 0) == (409, True)
    await store.settle(held, ending(joined("a")))
    await finish(store, turn("b", "a"))
    assert await window_ids(store, "b") == both_of("a", "b")
    assert await conversation_ids(store) == both_of("a")


async def test_another_owners_unfinished_response_in_a_conversation_is_an_unknown_parent(store: RunStore) -> None:
    await begin_talk(store)
    await begin(store, in_talk("a"))
    error = await assert_refused(store, queued("b", "a", owner=STRANGER), InvalidRequest, UNLIMITED)
    assert error.error_code == "previous_response_not_found"


# -- leases ------------------------------------------------------------------------------------------------------------


async def test_a_holder_holds_what_it_has_claimed(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"), queued("c"))
    mine = [run.held for run in await claim(store, 2)]
    theirs = [run.held for run in await claim(store, 2, "you")]
    assert await store.held("me") == mine
    assert await store.held("you") == theirs
    assert await store.held("nobody") == []


async def test_a_lease_runs_out_after_its_time_and_not_before(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    assert await store.expired(NOW + LEASE_S) == []
    assert await store.expired(NOW + LEASE_S + 0.001) == [held]
    assert await store.held("me") == [held]
    await store.free(held, NOW + LEASE_S + 0.001)
    assert await store.held("me") == await store.expired(EXPIRED) == []
    assert await claim_ids(store, holder="you") == ["a"]


async def test_those_claims_have_expired_whose_time_is_over(store: RunStore) -> None:
    await admit(store, *(queued(turn_id) for turn_id in "abcd"))
    held = [run.held for run in await store.claim("me", NOW + 5, 2) + await store.claim("you", NOW + 10, 1)]
    found = [await store.expired(NOW + seconds) for seconds in (4, 6, 11)]
    assert found == [[], held[:2], held]


async def test_a_claim_that_was_renewed_meanwhile_is_not_freed(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    assert await store.expired(EXPIRED) == [held]
    await store.renew_runs("me", EXPIRED)
    await store.free(held, EXPIRED)
    assert await store.held("me") == [held]
    await store.free(held, float("inf"))
    assert await store.held("me") == []


async def test_a_renewed_lease_lasts_longer(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    assert await store.renew_runs("me", EXPIRED + 10) == [held]
    assert await store.expired(EXPIRED + 10) == []
    assert await store.expired(EXPIRED + 11) == [held]


async def test_a_holder_renews_its_own_leases_only(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    mine = await claim_one(store, "a")
    theirs = await claim_one(store, "b", "you")
    assert await store.renew_runs("me", EXPIRED + 10) == [mine]
    assert await store.expired(EXPIRED) == [theirs]


async def test_a_lost_lease_is_not_renewed(store: RunStore) -> None:
    await begin(store, queued("a"))
    await sweep(store, EXPIRED)
    assert await store.renew_runs("me", EXPIRED + 10) == []
    held = await claim_one(store, "a", "you")
    assert await store.renew_runs("me", EXPIRED + 10) == []
    assert await store.held("you") == [held]


async def test_released_runs_are_in_line_as_if_they_had_not_been_claimed(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"), queued("c"))
    await claim(store, 2)
    await store.release_runs("me")
    assert await store.held("me") == []
    assert await store.queue() == QueueState(3, 0)
    runs = await claim(store, holder="you")
    assert [(run.response_id, run.attempt, run.held.generation) for run in runs] == [
        ("a", 1, 2),
        ("b", 1, 2),
        ("c", 1, 1),
    ]


async def test_a_holder_releases_its_own_runs_only(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    await claim_one(store, "a")
    held = await claim_one(store, "b", "you")
    await store.release_runs("me")
    assert await store.held("you") == [held]
    assert [info.attempts for info in await store.runs()] == [0, 1]
    assert await claim_ids(store) == ["a"]


async def test_a_released_run_is_in_line_as_if_it_had_not_been_claimed(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"), queued("c"))
    first, second = await claim(store, 2)
    await store.release_run(first.held)
    assert await store.held("me") == [second.held]
    assert [info.attempts for info in await store.runs()] == [0, 1, 0]
    (run,) = await claim(store, 1, "you")
    assert (run.response_id, run.attempt, run.held.generation) == ("a", 1, 2)


async def test_a_run_that_is_released_twice_is_released_once(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    for _ in range(2):
        await store.release_run(held)
    (run,) = await claim(store)
    assert (run.attempt, run.held.generation) == (1, 2)


async def test_an_old_claim_releases_nothing(store: RunStore) -> None:
    old = await begin(store, queued("a"))
    await sweep(store, EXPIRED)
    held = await claim_one(store, "a", "you")
    await store.release_run(old)
    assert await store.held("you") == [held]
    assert [info.attempts for info in await store.runs()] == [2]


async def test_a_stopped_run_that_is_released_is_let_go_of(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await cancel(store, "a")
    await store.release_run(held)
    assert await store.is_held(held.run) is False
    assert await claim(store) == []


async def test_a_stopped_run_is_not_carried_out_for_people(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await cancel(store, "a")
    assert await store.queue() == QueueState(0, 0)
    assert await store.is_held(held.run) is True


async def test_a_freed_run_is_in_line_and_the_attempt_counts(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    first, second = await claim(store)
    await store.free(first.held, EXPIRED)
    assert await store.held("me") == [second.held]
    (run,) = await claim(store)
    assert (run.response_id, run.attempt, run.held.generation) == ("a", 2, 2)


async def test_an_old_claim_frees_nothing(store: RunStore) -> None:
    old = await begin(store, queued("a"))
    await sweep(store, EXPIRED)
    held = await claim_one(store, "a", "you")
    await store.free(old, EXPIRED)
    assert await store.held("you") == [held]


async def test_a_stopped_run_that_is_freed_is_let_go_of(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await cancel(store, "a")
    await store.free(held, EXPIRED)
    assert await claim(store) == []
    assert await store.queue() == QueueState(0, 0)
    assert await status_of(store, "a") == "cancelled"


async def test_a_stopped_run_is_held_until_it_is_let_go(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await cancel(store, "a")
    assert await store.is_held(held.run) is True
    await store.let_go(held)
    assert await store.is_held(held.run) is False


async def test_a_second_stop_names_the_run_that_is_still_held(store: RunStore) -> None:
    """Who cancels again waits for the backend as the first one does."""
    held = await begin(store, queued("a"))
    stopped = [await store.stop(OWNER, "a", NOW, NOW) for _ in range(2)]
    assert [(each.was_running, each.run) for each in stopped if each] == [(True, held.run), (False, held.run)]
    await store.let_go(held)
    again = await store.stop(OWNER, "a", NOW, NOW)
    assert again is not None
    assert again.run is None


async def test_a_run_that_was_not_stopped_is_not_let_go(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await store.let_go(held)
    assert await store.held("me") == [held]
    assert await store.is_held(held.run) is True
    assert await store.settle(held, ending(turn("a"))) is True
    assert await store.is_held(held.run) is False


async def test_an_old_claim_lets_go_of_nothing(store: RunStore) -> None:
    old = await begin(store, queued("a"))
    await sweep(store, EXPIRED)
    held = await claim_one(store, "a", "you")
    await cancel(store, "a")
    await store.let_go(old)
    assert await store.is_held(held.run) is True


async def test_one_run_is_let_go_and_no_other(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    first, second = [run.held for run in await claim(store)]
    await cancel(store, "a")
    await cancel(store, "b")
    await store.let_go(first)
    assert [await store.is_held(each.run) for each in (first, second)] == [False, True]


async def test_a_stopped_run_is_gone_with_its_holder(store: RunStore) -> None:
    """Renewals do not prolong it, and nobody claims it."""
    held = await begin(store, queued("a"))
    await cancel(store, "a")
    assert await store.renew_runs("me", EXPIRED + 100) == []
    assert await store.expired(EXPIRED) == [held]
    await store.free(held, NOW + LEASE_S)
    assert await store.is_held(held.run) is True
    await store.free(held, EXPIRED)
    assert await store.is_held(held.run) is False
    assert await claim(store) == await store.expired(EXPIRED + 100) == []


async def test_a_holder_that_releases_its_runs_lets_go_of_the_stopped_ones(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    first, second = [run.held for run in await claim(store)]
    await cancel(store, "a")
    await store.release_runs("me")
    assert [await store.is_held(each.run) for each in (first, second)] == [False, True]
    assert await claim_ids(store) == ["b"]


async def test_a_holder_that_releases_its_runs_lets_go_of_no_others(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await cancel(store, "a")
    await store.release_runs("you")
    assert await store.is_held(held.run) is True


async def test_a_claim_whose_lease_ran_out_is_good_until_another_has_it(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    await sweep(store, EXPIRED)
    assert await store.log(held, batch(1)) is True
    assert await store.settle(held, ending(turn("a"))) is True
    assert await claim(store) == []
    assert await store.response(OWNER, "a") == kept(turn("a"))


async def test_an_old_generation_writes_nothing(store: RunStore) -> None:
    old = await begin(store, queued("a"), batch=batch(0))
    await sweep(store, EXPIRED)
    held = await claim_one(store, "a", "you")
    assert await store.log(old, batch(1)) is False
    assert await store.settle(old, ending(turn("a"), batch(1))) is False
    assert await store.response(OWNER, "a") == kept(queued("a", status="in_progress"))
    assert await all_events(store, "a") == numbered(0)
    assert await store.settle(held, ending(turn("a"))) is True


async def test_a_generation_that_nobody_has_writes_nothing(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    for other in (Held(held.run, held.generation + 1), Held(held.run + 1, held.generation)):
        assert await store.log(other, batch(1)) is False
        assert await store.settle(other, ending(turn("a"))) is False
    assert await all_events(store, "a") == numbered(0)


async def test_who_claims_again_goes_on_after_the_last_number(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0, 2))
    await store.log(held, batch(2, 3))
    await sweep(store, EXPIRED)
    (run,) = await claim(store)
    assert run.next_number == 5
    assert await store.log(run.held, batch(5, 2)) is True
    assert await all_events(store, "a") == numbered(*range(7))


# -- logs --------------------------------------------------------------------------------------------------------------


async def log_three(store: RunStore) -> Held:
    """The events 0 to 6 in the batches 0-1, 2-4, 5 and 6."""
    held = await begin(store, queued("a"), batch=batch(0, 2))
    for events in (batch(2, 3), batch(5), batch(6)):
        assert await store.log(held, events) is True
    return held


@pytest.mark.parametrize("after", [-(10**30), -1000, -2, *range(-1, 6)])
async def test_a_tail_gives_all_behind_a_number(store: RunStore, after: int) -> None:
    await log_three(store)
    tail = await store.tail(OWNER, "a", after)
    assert events_after(tail, after) == numbered(*range(max(after + 1, 0), 7))
    assert tail is not None
    assert (tail.status, tail.has_more) == ("in_progress", False)


@pytest.mark.parametrize("after", [6, 7, 1000, 2**28 - 2, 2**28 - 1, 2**28, 2**31, 2**62, 2**63, 10**30])
async def test_a_tail_beyond_the_end_has_nothing_new(store: RunStore, after: int) -> None:
    await log_three(store)
    await begin(store, queued("b"), batch=batch(0, 9))
    assert events_after(await store.tail(OWNER, "a", after), after) == []


async def test_a_tail_begins_with_the_batch_that_holds_the_next_number(store: RunStore) -> None:
    await log_three(store)
    found = [await store.tail(OWNER, "a", after) for after in (-1, 0, 1, 3, 4, 5)]
    assert [tail.batches[0][0] for tail in found if tail] == [0, 0, 2, 2, 5, 6]


async def test_events_are_kept_as_they_are(store: RunStore) -> None:
    frames = b"data: {}\n\n\0\xff' ; --"
    held = await begin(store, queued("a"), batch=Batch(0, 1, frames))
    await store.log(held, Batch(1, 2, b""))
    assert await store.tail(OWNER, "a", -1) == Tail("in_progress", [(0, frames), (1, b"")], False)


async def test_a_tail_says_how_the_response_stands(store: RunStore) -> None:
    found = []
    await admit(store, queued("a"), batch=batch(0))
    found.append(await store.tail(OWNER, "a", -1))
    held = await claim_one(store, "a")
    found.append(await store.tail(OWNER, "a", -1))
    await store.settle(held, ending(turn("a", status="incomplete")))
    found.append(await store.tail(OWNER, "a", -1))
    assert [tail.status for tail in found if tail] == ["queued", "in_progress", "incomplete"]


@pytest.mark.parametrize("count", [63, 64, 65, 128, 200])
async def test_a_long_log_is_given_in_parts(store: RunStore, count: int) -> None:
    held = await begin(store, queued("a"), batch=batch(0, 2))
    for number in range(1, count):
        await store.log(held, batch(2 * number, 2))
    tail = await store.tail(OWNER, "a", -1)
    assert tail is not None
    assert tail.has_more or len(tail.batches) == count
    for after in (-1, 0, 1, count, 2 * count - 2):
        assert await all_events(store, "a", after) == numbered(*range(after + 1, 2 * count))


async def test_of_a_very_long_log_not_all_is_given_at_once(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    await asyncio.gather(*(store.log(held, batch(number)) for number in range(1, 1000)))
    tail = await store.tail(OWNER, "a", -1)
    assert tail is not None
    assert (tail.has_more, len(tail.batches) < 1000) == (True, True)


async def test_a_batch_that_comes_again_with_more_events_stands_once(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0, 2))
    assert await store.log(held, batch(2, 1)) is True
    assert await store.log(held, batch(2, 3)) is True
    assert await store.log(held, batch(5)) is True
    assert await all_events(store, "a") == numbered(*range(6))
    await store.free(held, EXPIRED)
    (run,) = await claim(store)
    assert run.next_number == 6


async def test_the_last_batch_may_come_again_with_the_end(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0, 2))
    await store.log(held, batch(2, 1))
    await store.settle(held, ending(turn("a"), batch(2, 2)))
    assert await all_events(store, "a") == numbered(*range(4))


async def test_logs_of_two_runs_do_not_mix(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"), queued("c"), batch=batch(0))
    runs = await claim(store)
    for number in (1, 2, 3):
        for run in runs:
            await store.log(run.held, batch(number, mark=run.response_id))
    found = [await store.tail(OWNER, turn_id, 0) for turn_id in "abc"]
    expected = [b"".join(b"%d%b. " % (number, mark) for number in (1, 2, 3)) for mark in (b"a", b"b", b"c")]
    assert [b"".join(frames for _, frames in tail.batches) for tail in found if tail] == expected


async def test_nothing_is_logged_for_a_stopped_run(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    await cancel(store, "a")
    assert await store.log(held, batch(1)) is False
    assert await all_events(store, "a") == numbered(0)


async def test_what_has_no_log_has_no_tail(store: RunStore) -> None:
    await save_chain(store, "a")
    await begin(store, queued("b"))
    await admit(store, queued("c"), batch=batch(0))
    await store.delete_response(OWNER, "c", NOW)
    assert [await store.tail(OWNER, turn_id, -1) for turn_id in ("a", "b", "c", "nobody")] == [None] * 4


async def test_a_log_is_forgotten_at_its_time_and_not_before(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    await store.settle(held, ending(turn("a"), batch(1)))
    await sweep(store, NOW + LOG_S - 0.001)
    assert await all_events(store, "a") == numbered(0, 1)
    await sweep(store, NOW + LOG_S)
    assert await store.tail(OWNER, "a", -1) is None
    assert await store.response(OWNER, "a") == kept(turn("a"))


async def test_the_log_of_a_run_that_goes_on_is_not_forgotten(store: RunStore) -> None:
    await admit(store, queued("a"), batch=batch(0))
    await sweep(store, 1e300)
    held = await claim_one(store, "a")
    await sweep(store, 1e300)
    assert await all_events(store, "a") == numbered(0)
    assert await store.log(held, batch(1)) is True


async def test_a_sweep_forgets_one_log_and_leaves_the_others(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"), queued("c"), batch=batch(0, 3))
    runs = await claim(store)
    await store.settle(runs[1].held, ending(turn("b"), batch(3)))
    await sweep(store, NOW + LOG_S)
    assert [await store.tail(OWNER, turn_id, -1) is None for turn_id in "abc"] == [False, True, False]


async def test_a_sweep_forgets_hundreds_of_logs_and_brief_responses(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    names = [f"t{number}" for number in range(250)]
    await asyncio.gather(*(admit(store, brief(name), batch=batch(0)) for name in names))
    runs = await claim(store)
    await asyncio.gather(
        *(store.settle(run.held, ending(turn(run.response_id, is_brief=True, is_detached=True))) for run in runs)
    )
    await sweep(store, NOW + LOG_S)
    assert run_rows_in(place) | {"log": 0, "event": 0} == run_rows_in(place)
    await sweep(store, NOW + BRIEF_S)
    assert run_rows_in(place) == NO_ROWS


# -- states ------------------------------------------------------------------------------------------------------------


async def test_states_tell_status_and_whether_more_is_logged(store: RunStore) -> None:
    await admit(store, queued("a"), batch=batch(0, 2))
    found = [(await store.states(["a"]))["a"]]
    held = await claim_one(store, "a")
    found.append((await store.states(["a"]))["a"])
    for events in (batch(2, 3), batch(5)):
        await store.log(held, events)
        found.append((await store.states(["a"]))["a"])
    await store.settle(held, ending(turn("a"), batch(6)))
    found.append((await store.states(["a"]))["a"])
    assert [status for status, _ in found] == ["queued", *["in_progress"] * 3, "completed"]
    newest = [number or 0 for _, number in found]
    assert newest[0] == newest[1] < newest[2] < newest[3] < newest[4]


async def test_states_tell_of_no_number_where_there_is_no_log(store: RunStore) -> None:
    await save_chain(store, "a")
    await finish(store, turn("c"))
    await admit(store, queued("b"))
    assert await store.states(["c", "a", "b"]) == {
        "a": ("completed", None),
        "b": ("queued", None),
        "c": ("completed", None),
    }


async def test_the_number_of_a_state_is_that_of_its_own_log(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    before = await store.states(["a"])
    other = await begin(store, queued("b"), batch=batch(0))
    await store.log(other, batch(1, 50))
    assert await store.states(["a"]) == before
    after = (await store.states(["b"]))["b"]
    await store.log(held, batch(1))
    assert (await store.states(["b", "a"]))["b"] == after


async def test_states_leave_out_what_is_not_there(store: RunStore) -> None:
    await save_chain(store, "a", "b")
    await store.delete_response(OWNER, "a", NOW)
    assert await store.states([]) == {}
    assert await store.states(["a", "nobody", 'o"dd\\', "b"]) == {"b": ("completed", None)}


async def test_states_of_a_forgotten_log_have_no_number(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    await store.settle(held, ending(turn("a")))
    await sweep(store, NOW + LOG_S)
    assert await store.states(["a"]) == {"a": ("completed", None)}


async def test_the_version_differs_when_another_connection_has_written(open_in: OpenRunStore) -> None:
    one, two = await open_in(), await open_in()
    held = await begin(one, queued("a"), batch=batch(0))
    seen = [await two.version()]
    for write in (one.log(held, batch(1)), cancel(one, "a"), one.delete_response(OWNER, "a", NOW)):
        await write
        seen.append(await two.version())
    assert len(set(seen)) == 4


async def test_the_version_stays_while_nobody_writes(open_in: OpenRunStore) -> None:
    one, two = await open_in(), await open_in()
    await admit(one, queued("a"), batch=batch(0))
    seen = await two.version()
    await one.tail(OWNER, "a", -1)
    await two.tail(OWNER, "a", -1)
    await one.runs()
    assert await two.version() == seen


async def test_the_version_can_be_asked_beside_other_reads(store: RunStore) -> None:
    await admit(store, queued("a"))
    results = await asyncio.gather(*(each for _ in range(20) for each in (store.version(), store.states(["a"]))))
    assert results[1::2] == [{"a": ("queued", None)}] * 20


async def test_the_version_of_a_closed_store_is_refused(open_in: OpenRunStore) -> None:
    store = await open_in()
    await store.close()
    with pytest.raises(StoreError):
        await store.version()


# -- ends --------------------------------------------------------------------------------------------------------------


async def test_a_run_that_ended_is_an_ordinary_response(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    done = turn("a", outputs=(reasoning("a.think"), message("a.out")), status="incomplete", completed_at=None)
    assert await store.settle(held, ending(done)) is True
    assert await store.response(OWNER, "a") == kept(done)
    assert await window_ids(store, "a") == ["a.in", "a.think", "a.out"]
    assert await input_ids(store, "a") == ["a.in"]
    assert await store.items(OWNER, ["a.in", "a.out"]) == {each: message(each).body for each in ("a.in", "a.out")}
    assert (await store.runs(), await store.queue()) == ([], QueueState(0, 0))


async def test_an_end_may_change_settings_and_model(store: RunStore) -> None:
    held = await begin(store, queued("a", settings=b"1"))
    done = turn("a", settings=b"2", model="other", completed_at=7)
    await store.settle(held, ending(done))
    assert await store.response(OWNER, "a") == kept(done)
    assert (await store.responses(OWNER, ALL_ASC, "other")).rows == [kept(done)]
    assert (await store.responses(OWNER, ALL_ASC, "m")).rows == []


async def test_an_end_brings_the_last_events(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0, 2))
    await store.settle(held, ending(turn("a"), batch(2, 2)))
    assert await store.tail(OWNER, "a", -1) == Tail("completed", [(0, b"0. 1. "), (2, b"2. 3. ")], False)


async def test_an_end_without_events_leaves_the_log_as_it_is(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0, 2))
    await store.settle(held, ending(turn("a")))
    assert await all_events(store, "a") == numbered(0, 1)


async def test_a_run_ends_once(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    assert await store.settle(held, ending(turn("a"))) is True
    assert await store.settle(held, ending(failed("a"), batch(1))) is False
    assert await store.log(held, batch(1)) is False
    assert await store.response(OWNER, "a") == kept(turn("a"))
    assert await all_events(store, "a") == numbered(0)


async def test_a_failure_keeps_the_inputs_that_were_admitted(store: RunStore) -> None:
    await save_chain(store, "a")
    held = await begin(store, queued("b", "a"))
    oops = failed("b", inputs=(), outputs=(), body=b'{"error":{}}')
    assert await store.settle(held, ending(oops)) is True
    assert await store.response(OWNER, "b") == msgspec.structs.replace(kept(oops), previous_id="a")
    assert await input_ids(store, "b") == ["a.in", "a.out", "b.in"]
    assert await store.window(OWNER, "b") == window_of(oops, [])


async def test_a_chain_goes_on_from_a_run_that_ended(store: RunStore) -> None:
    await save_chain(store, "a")
    await finish(store, turn("b", "a"))
    await save_chain(store, "c", after="b")
    await finish(store, turn("d", "a"))
    assert await window_ids(store, "c") == both_of(*"abc")
    assert await window_ids(store, "d") == both_of(*"ad")


async def test_a_window_begins_with_the_compaction_that_a_run_made(store: RunStore) -> None:
    await save_chain(store, "a")
    await finish(store, turn("b", "a", outputs=(compaction("b.short"), message("b.out"))))
    await save_chain(store, "c", after="b")
    assert await window_ids(store, "c") == ["b.short", "b.out", "c.in", "c.out"]


async def test_a_window_begins_with_the_compaction_that_was_admitted(store: RunStore) -> None:
    inputs = (message("b.old"), compaction("b.short"), message("b.in"))
    await save_chain(store, "a")
    held = await begin(store, queued("b", "a", inputs=inputs))
    await store.settle(held, ending(turn("b", inputs=())))
    assert await window_ids(store, "b") == ["b.short", "b.in", "b.out"]


async def test_items_of_a_run_are_found_by_ids_that_tell_their_response(store: RunStore) -> None:
    ids = ItemIds("resp_a")
    given, made = message(ids("msg")), message(ids("msg"))
    held = await begin(store, queued("resp_a", inputs=(given,)))
    await store.settle(held, ending(turn("resp_a", inputs=(given,), outputs=(made,))))
    assert set(await store.items(OWNER, [given.id, made.id])) == {given.id, made.id}


async def test_an_end_is_seen_whole_or_not_at_all(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    looking = [asyncio.create_task(store.tail(OWNER, "a", -1)) for _ in range(20)]
    settling = asyncio.create_task(store.settle(held, ending(turn("a"), batch(1))))
    looking += [asyncio.create_task(store.tail(OWNER, "a", -1)) for _ in range(20)]
    assert await settling is True
    found = {(tail.status, len(tail.batches)) for tail in await asyncio.gather(*looking) if tail}
    assert found <= {("in_progress", 1), ("completed", 2)}


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_what_a_run_began_with_is_the_window_of_its_parent(store: RunStore, is_deleted: bool) -> None:
    await save_chain(store, "a", "b")
    await admit(store, queued("c", "b"), queued("d", "a"), brief("e", "b"))
    windows = [await store.window(OWNER, turn_id) for turn_id in "ba"]
    if is_deleted:
        for turn_id in "ab":
            await store.delete_response(OWNER, turn_id, NOW)
    found = [await store.window_before(OWNER, turn_id) for turn_id in "cde"]
    assert found == [windows[0], windows[1], windows[0]]


async def test_what_a_run_began_with_is_its_owners_and_nothing_for_a_first_turn(store: RunStore) -> None:
    await admit(store, queued("a"))
    assert await store.window_before(OWNER, "a") == Window("completed", [], 0)
    assert await store.window_before(STRANGER, "a") is None
    assert await store.window_before(OWNER, "nobody") is None


async def test_a_run_whose_parent_runs_still_began_with_what_is_not_there_yet(store: RunStore) -> None:
    await save_chain(store, "z")
    await admit(store, queued("a", "z"), queued("b", "a"))
    assert await store.window_before(OWNER, "b") == window_of(queued("a"), [])
    await store.settle(await claim_one(store, "a"), ending(turn("a")))
    assert await store.window_before(OWNER, "b") == await store.window(OWNER, "a")


# -- ends in a conversation --------------------------------------------------------------------------------------------


async def test_a_queued_response_takes_no_place_in_its_conversation(store: RunStore) -> None:
    await begin_talk(store, "c.1")
    await begin(store, in_talk("a"))
    assert await conversation_ids(store) == ["c.1"]
    assert await input_ids(store, "a") == ["c.1", "a.in"]
    window = await store.conversation_window(OWNER, "conv")
    assert window == Window("completed", [message("c.1").body], 0)


async def test_a_run_joins_its_conversation_behind_what_was_added_meanwhile(store: RunStore) -> None:
    await begin_talk(store, "c.1")
    held = await begin(store, in_talk("b"))
    await store.save(joined("a"))
    await store.add_items(OWNER, "conv", (message("c.2"),), NOW)
    assert await store.settle(held, ending(joined("b"))) is True
    await store.save(joined("c"))
    line = ["c.1", *both_of("a"), "c.2", *both_of("b", "c")]
    assert await conversation_ids(store) == line
    assert await input_ids(store, "b") == [*line[:4], "b.in"]
    assert await input_ids(store, "c") == [*line[:6], "c.in"]
    assert await store.response(OWNER, "b") == kept(turn("b"))


async def test_the_lists_of_a_conversation_that_a_run_joined_are_paged_right(store: RunStore) -> None:
    await begin_talk(store, "c.1")
    held = await begin(store, in_talk("b"))
    await store.save(joined("a"))
    await store.settle(held, ending(joined("b")))
    await store.save(joined("d"))
    line = ["c.1", *both_of("a", "b", "d")]
    for place, item_id in enumerate(line):
        listed = await store.conversation_items(OWNER, "conv", Page(limit=2, order="asc", after=item_id))
        assert listed is not None
        assert listed.rows == [message(each).body for each in line[place + 1 : place + 3]]
        assert listed.has_more == (place + 3 < len(line))


async def test_items_of_a_run_that_joined_are_found_by_id(store: RunStore) -> None:
    await begin_talk(store)
    ids = ItemIds("resp_a")
    given, made = (message(ids("msg")), message("own")), (message(ids("msg")),)
    held = await begin(store, in_talk("resp_a", inputs=given))
    await store.save(joined("b"))
    await store.settle(held, ending(joined("resp_a", inputs=given, outputs=made)))
    for item in (*given, *made):
        assert await store.items(OWNER, [item.id]) == {item.id: item.body}
        assert await store.conversation_item(OWNER, "conv", item.id) == item.body


async def test_the_first_use_of_a_run_that_joined_names_it_still(store: RunStore) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a", first_use=FirstUse("key", b"digest", 20_000)))
    await store.save(joined("b"))
    await store.settle(held, ending(joined("a")))
    assert await store.first_use(OWNER, "key", NOW) == (b"digest", "a")


async def test_the_log_of_a_run_that_joined_can_be_read_on_and_is_forgotten_in_time(store: RunStore) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a"), batch=batch(0, 2))
    await store.save(joined("b"))
    await store.settle(held, ending(joined("a"), batch(2)))
    assert await store.tail(OWNER, "a", -1) == Tail("completed", [(0, b"0. 1. "), (2, b"2. ")], False)
    assert (await store.states(["a"]))["a"][1] is not None
    await sweep(store, NOW + LOG_S)
    assert await store.tail(OWNER, "a", -1) is None


async def test_a_run_that_joined_is_held_by_its_conversation(store: RunStore) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a"))
    await store.settle(held, ending(joined("a")))
    assert (await store.purge(NOW, NOW)).responses == 0
    assert await store.response(OWNER, "a") == kept(turn("a"))


async def test_a_run_that_joined_leaves_no_rows_of_its_place_in_the_queue(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await begin_talk(store, "c.1")
    held = await begin(store, in_talk("a"), batch=batch(0))
    await store.save(joined("b"))
    await store.settle(held, ending(joined("a")))
    expected = {"turn": 3, "item": 5, "item_id": 5, "thread": 1, "run": 0, "log": 1, "event": 1, "queue": 0}
    assert run_rows_in(place) == expected


async def test_a_run_gives_the_lock_of_its_conversation_back(store: RunStore) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a"))
    assert await store.acquire(LOCK, NOW, NOW + 60) is True
    assert await store.settle(held, ending(joined("a", lock=LOCK))) is True
    assert await store.acquire(Lock(LOCK.name, "you"), NOW, NOW + 60) is True


async def assert_unsettled(store: RunStore, held: Held, new: NewTurn, error: type[ProxyError]) -> None:
    """The end is refused, and nothing of it was written."""
    before = await store.runs(), await store.held("me"), await store.response(OWNER, new.id), await response_ids(store)
    with pytest.raises(error):
        await store.settle(held, ending(new, batch(1)))
    after = await store.runs(), await store.held("me"), await store.response(OWNER, new.id), await response_ids(store)
    assert after == before
    assert await all_events(store, new.id) == numbered(0)
    assert set(await store.items(OWNER, [f"{new.id}.in", f"{new.id}.out"])) == {f"{new.id}.in"}
    assert await store.log(held, batch(1)) is True


async def test_a_run_whose_conversation_was_deleted_meanwhile_is_not_kept(store: RunStore) -> None:
    await begin_talk(store, "c.1")
    held = await begin(store, in_talk("a"), batch=batch(0))
    await store.delete_conversation(OWNER, "conv", NOW)
    await assert_unsettled(store, held, joined("a"), NotFound)
    assert await store.settle(held, ending(failed("a", inputs=(), outputs=()))) is True
    assert await status_of(store, "a") == "failed"
    assert await input_ids(store, "a") == ["c.1", "a.in"]


@pytest.mark.parametrize("lost", ["to another", "by release", "never had"])
async def test_a_run_that_lost_the_lock_of_its_conversation_is_not_kept(store: RunStore, lost: str) -> None:
    await begin_talk(store)
    held = await begin(store, in_talk("a"), batch=batch(0))
    if lost != "never had":
        await store.acquire(LOCK, NOW, NOW + 60)
    if lost == "by release":
        await store.release(LOCK)
    if lost == "to another":
        assert await store.acquire(Lock(LOCK.name, "you"), NOW + 60, NOW + 120) is True
    await assert_unsettled(store, held, joined("a", lock=LOCK), ConversationLocked)
    assert await conversation_ids(store) == []
    assert await store.acquire(Lock(LOCK.name, "you"), NOW, NOW + 60) is True


async def test_refused_ends_among_others_take_nothing_with_them(store: RunStore) -> None:
    await begin_talk(store)
    await admit(store, queued("a"), in_talk("b"), queued("c"))
    held = [run.held for run in await claim(store)]
    ends = [ending(turn("a")), ending(joined("b", lock=LOCK)), ending(turn("c"))]
    settling = (store.settle(*each) for each in zip(held, ends, strict=True))
    results = await asyncio.gather(*settling, return_exceptions=True)
    assert [type(result) for result in results] == [bool, ConversationLocked, bool]
    assert [await status_of(store, turn_id) for turn_id in "abc"] == ["completed", "in_progress", "completed"]


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_a_run_that_was_not_completed_joins_no_conversation(store: RunStore, end: str) -> None:
    await begin_talk(store, "c.1")
    held = await begin(store, in_talk("a"))
    await store.save(joined("b"))
    if end == "failed":
        assert await store.settle(held, ending(joined("a", status="failed", is_detached=True))) is True
    else:
        await cancel(store, "a")
    await store.save(joined("d"))
    assert await conversation_ids(store) == ["c.1", *both_of("b", "d")]
    assert await input_ids(store, "a") == ["c.1", "a.in"]
    assert await status_of(store, "a") == end
    assert (await store.purge(NOW, NOW)).responses == 1


async def test_runs_of_one_conversation_settle_in_any_order(store: RunStore) -> None:
    """Two that run at once, because the first one's process stood still."""
    await begin_talk(store)
    first = await begin(store, in_talk("a"))
    await cancel(store, "a")
    second = await begin(store, in_talk("b"))
    await store.save(joined("c"))
    assert await store.settle(first, ending(joined("a"))) is False
    assert await store.settle(second, ending(joined("b"))) is True
    assert await conversation_ids(store) == both_of("c", "b")


# -- cancelling --------------------------------------------------------------------------------------------------------


async def test_a_queued_run_is_cancelled_and_out_of_the_line(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    cancelled = kept(queued("a", status="cancelled"))
    assert await cancel(store, "a") == Stopped(cancelled, True, None)
    assert await store.response(OWNER, "a") == cancelled
    assert await run_ids(store) == ["b"]
    assert await claim_ids(store) == ["b"]


async def test_a_held_run_is_cancelled_and_its_holder_has_to_let_go(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    first, second = [run.held for run in await claim(store)]
    assert await cancel(store, "a") == Stopped(kept(queued("a", status="cancelled")), True, first.run)
    assert await store.held("me") == [second]
    assert await run_ids(store) == ["b"]
    assert await store.window(OWNER, "a") == window_of(queued("a", status="cancelled"), [])
    assert await input_ids(store, "a") == ["a.in"]


async def test_a_waiting_run_is_cancelled(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b", "a"))
    stopped = await cancel(store, "b")
    assert stopped is not None
    assert (stopped.was_running, stopped.run) == (True, None)
    await store.settle(await claim_one(store, "a"), ending(turn("a")))
    assert await claim(store) == []


async def test_a_run_whose_lease_ran_out_is_cancelled_like_a_queued_one(store: RunStore) -> None:
    held = await begin(store, queued("a"))
    await sweep(store, EXPIRED)
    assert await cancel(store, "a") == Stopped(kept(queued("a", status="cancelled")), True, None)
    assert await store.settle(held, ending(turn("a"))) is False
    assert await claim(store) == []


async def test_a_completion_that_comes_after_a_cancel_loses(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    await cancel(store, "a")
    assert await store.settle(held, ending(turn("a"), batch(1))) is False
    assert await store.response(OWNER, "a") == kept(queued("a", status="cancelled"))
    assert await all_events(store, "a") == numbered(0)
    await store.let_go(held)
    assert await store.settle(held, ending(turn("a"), batch(1))) is False
    assert await status_of(store, "a") == "cancelled"


async def test_a_cancel_and_an_end_at_once_have_one_winner(store: RunStore) -> None:
    for turn_id in ("a", "b", "c", "d"):
        held = await begin(store, queued(turn_id))
        both = [store.settle(held, ending(turn(turn_id))), cancel(store, turn_id)]
        results = await asyncio.gather(*(both if turn_id in "ab" else both[::-1]))
        stopped = next(result for result in results if isinstance(result, Stopped))
        assert (True in results) != stopped.was_running
        assert stopped.response == await store.response(OWNER, turn_id)
        assert stopped.response.status == ("cancelled" if stopped.was_running else "completed")


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
async def test_a_response_that_has_ended_is_not_cancelled(store: RunStore, status: str) -> None:
    await finish(store, turn("a", status=status))
    await store.save(turn("b", status=status))
    for done in (turn("a", status=status), turn("b", status=status)):
        assert await cancel(store, done.id) == Stopped(kept(done), False, None)
        assert await store.response(OWNER, done.id) == kept(done)


async def test_cancelling_twice_is_cancelling_once(store: RunStore) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    cancelled = kept(queued("a", status="cancelled"))
    await cancel(store, "a")
    assert await cancel(store, "a", now=NOW + 1000) == Stopped(cancelled, False, held.run)
    assert await store.is_held(held.run) is True
    await sweep(store, NOW + LOG_S)
    assert await store.tail(OWNER, "a", -1) is None


async def test_only_what_is_there_is_cancelled(store: RunStore) -> None:
    await admit(store, queued("a"), queued("b"))
    await store.delete_response(OWNER, "b", NOW)
    assert await cancel(store, "a", STRANGER) is None
    assert await cancel(store, "b") is None
    assert await cancel(store, "nobody") is None
    assert await store.response(OWNER, "a") == kept(queued("a"))
    assert await claim_ids(store) == ["a"]


async def test_the_log_of_a_cancelled_response_can_be_read_until_its_time(store: RunStore) -> None:
    await admit(store, queued("a"), batch=batch(0, 2))
    await cancel(store, "a")
    await sweep(store, NOW + LOG_S - 0.001)
    assert await store.tail(OWNER, "a", 0) == Tail("cancelled", [(0, b"0. 1. ")], False)
    await sweep(store, NOW + LOG_S)
    assert await store.tail(OWNER, "a", 0) is None


async def test_what_a_cancelled_run_was_to_do_is_erased_at_once(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await begin(store, queued("a"), request=b"secret request", bearer="sealed key")
    await cancel(store, "a")
    assert place.asked("SELECT request, bearer FROM run") == [(b"", None)]


async def test_cancelled_runs_do_not_hinder_the_round(store: RunStore) -> None:
    await admit_of(store, "a1", "a2", "b1", "b2")
    await cancel(store, "a1", "a")
    await cancel(store, "b2", "b")
    assert await claim_ids(store) == ["a2", "b1"]


# -- deleting ----------------------------------------------------------------------------------------------------------


async def test_a_running_response_that_is_deleted_is_stopped_and_its_log_erased(
    open_in: OpenRunStore, place: Place
) -> None:
    store = await open_in()
    held = await begin(store, queued("a"), batch=batch(0))
    await store.log(held, batch(1))
    assert await store.delete_response(OWNER, "a", NOW) is True
    assert run_rows_in(place) == {**NO_ROWS, "run": 1}
    assert await store.held("me") == await store.runs() == []
    assert await store.log(held, batch(2)) is False
    assert await store.settle(held, ending(turn("a"), batch(2))) is False
    assert await store.is_held(held.run) is True
    await store.let_go(held)
    assert run_rows_in(place) == NO_ROWS


async def test_a_queued_response_that_is_deleted_leaves_nothing(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await admit(store, queued("a"), batch=batch(0))
    await store.delete_response(OWNER, "a", NOW)
    assert run_rows_in(place) == NO_ROWS
    assert await claim(store) == []


async def test_an_ended_response_that_is_deleted_takes_its_log_with_it(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await admit(store, queued("a"), queued("b"), batch=batch(0, 2))
    for run in await claim(store):
        await store.settle(run.held, ending(turn(run.response_id), batch(2)))
    await store.delete_response(OWNER, "a", NOW)
    assert await all_events(store, "b") == numbered(0, 1, 2)
    await store.delete_response(OWNER, "b", NOW)
    assert run_rows_in(place) == NO_ROWS


async def test_an_old_run_touches_nothing_of_a_new_one_on_the_row_of_its_response(store: RunStore) -> None:
    """A turn's number is used again once the last turn is deleted."""
    old = await begin(store, queued("a"), batch=batch(0, mark="+"))
    await store.delete_response(OWNER, "a", NOW)
    await admit(store, queued("b"), batch=batch(0))
    assert await store.settle(old, ending(turn("a"), batch(1))) is False
    assert await store.log(old, batch(1)) is False
    assert await store.response(OWNER, "b") == kept(queued("b"))
    held = await claim_one(store, "b", "you")
    assert await store.settle(old, ending(turn("a"), batch(1))) is False
    await store.let_go(old)
    assert await store.held("you") == [held]
    assert await all_events(store, "b") == numbered(0)
    assert await store.settle(held, ending(turn("b"))) is True
    assert await store.response(OWNER, "b") == kept(turn("b"))


async def test_a_new_run_is_stopped_though_an_old_one_stands_on_the_row_of_its_response(store: RunStore) -> None:
    old = await begin(store, queued("a"))
    await store.delete_response(OWNER, "a", NOW)
    new = await begin(store, queued("b"))
    stopped = await cancel(store, "b")
    assert stopped is not None
    assert (stopped.was_running, stopped.run) == (True, new.run)
    assert [await store.is_held(each.run) for each in (old, new)] == [True, True]


async def test_a_queued_run_is_stopped_by_itself_though_an_old_one_stands_on_the_row_of_its_response(
    store: RunStore,
) -> None:
    await begin(store, queued("a"))
    await store.delete_response(OWNER, "a", NOW)
    await admit(store, queued("b"))
    assert await cancel(store, "b") == Stopped(kept(queued("b", status="cancelled")), True, None)
    await store.save(turn("c"))
    assert await cancel(store, "c") == Stopped(kept(turn("c")), False, None)


async def test_a_child_of_a_new_run_waits_though_an_old_one_stands_on_the_row_of_its_parent(store: RunStore) -> None:
    await begin(store, queued("a"))
    await store.delete_response(OWNER, "a", NOW)
    held = await begin(store, queued("b"))
    await admit(store, queued("c", "b"))
    assert await claim(store) == []
    await store.settle(held, ending(turn("b")))
    assert await claim_ids(store) == ["c"]


async def test_a_deleted_parent_leaves_its_waiting_child_what_it_was_given(store: RunStore) -> None:
    await save_chain(store, "a")
    held = await begin(store, queued("b", "a"))
    await admit(store, queued("c", "b"))
    await store.delete_response(OWNER, "b", NOW)
    await store.let_go(held)
    assert await store.window(OWNER, "b") is None
    assert await claim_ids(store) == ["c"]
    assert await input_ids(store, "c") == ["a.in", "a.out", "b.in", "c.in"]


async def test_a_purge_of_an_old_background_response_erases_its_log(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    held = await begin(store, queued("a", created_at=100), batch=batch(0))
    await store.settle(held, ending(turn("a", created_at=100), batch(1)))
    await begin(store, queued("b", created_at=300), batch=batch(0))
    assert (await store.purge(200, NOW)).responses == 1
    assert await all_events(store, "b") == numbered(0)
    await store.delete_response(OWNER, "b", NOW)
    await sweep(store, EXPIRED)
    assert run_rows_in(place) == NO_ROWS


@pytest.mark.parametrize("is_claimed", [False, True])
async def test_a_purge_stops_a_run_of_an_old_response(store: RunStore, is_claimed: bool) -> None:
    await admit(store, queued("a", created_at=100), queued("b", created_at=300))
    held = await claim_one(store, "a") if is_claimed else Held(1, 1)
    assert (await store.purge(200, NOW)).responses == 1
    assert await store.settle(held, ending(turn("a"))) is False
    assert await claim_ids(store) == ["b"]


# -- with `store: false` -----------------------------------------------------------------------------------------------


def brief_end(turn_id: str, **changes: Any) -> NewTurn:
    return turn(turn_id, is_brief=True, is_detached=True, **changes)


async def test_a_brief_response_can_be_retrieved_and_streamed(store: RunStore) -> None:
    held = await begin(store, brief("a"), batch=batch(0))
    assert await store.response(OWNER, "a") == kept(queued("a", status="in_progress"))
    assert await store.settle(held, ending(brief_end("a"), batch(1))) is True
    assert await store.response(OWNER, "a") == kept(turn("a"))
    assert await all_events(store, "a") == numbered(0, 1)
    assert await input_ids(store, "a") == ["a.in"]


@pytest.mark.parametrize("is_ended", [False, True])
async def test_a_brief_response_is_in_no_list_and_cannot_be_continued(store: RunStore, is_ended: bool) -> None:
    await save_all(store, turn("z"))
    held = await begin(store, brief("a"))
    if is_ended:
        await store.settle(held, ending(brief_end("a")))
    assert await response_ids(store) == ["z"]
    with pytest.raises(InvalidRequest):
        await store.responses(OWNER, Page(after="a"), None)
    assert await store.window(OWNER, "a") is None
    assert await store.items(OWNER, ["a.in", "a.out"]) == {}
    await assert_refused(store, queued("b", "a"), InvalidRequest, UNLIMITED)
    with pytest.raises(InvalidRequest):
        await store.save(turn("b", "a"))


async def test_a_brief_response_can_be_cancelled(store: RunStore) -> None:
    held = await begin(store, brief("a"))
    assert await cancel(store, "a") == Stopped(kept(queued("a", status="cancelled")), True, held.run)
    await sweep(store, NOW + BRIEF_S - 0.001)
    assert await status_of(store, "a") == "cancelled"
    await sweep(store, NOW + BRIEF_S)
    assert await store.response(OWNER, "a") is None


async def test_a_brief_response_lives_until_its_time_and_leaves_nothing(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    held = await begin(store, brief("a"), batch=batch(0))
    await store.settle(held, ending(brief_end("a"), batch(1)))
    await sweep(store, NOW + BRIEF_S - 0.001)
    assert await store.response(OWNER, "a") == kept(turn("a"))
    await sweep(store, NOW + BRIEF_S)
    assert await store.response(OWNER, "a") is None
    assert run_rows_in(place) == NO_ROWS


async def test_a_brief_response_lives_as_long_as_its_run(store: RunStore) -> None:
    await admit(store, brief("a"))
    await sweep(store, 1e300)
    held = await claim_one(store, "a")
    await sweep(store, 1e300)
    assert await store.settle(held, ending(brief_end("a"), now=NOW + 5000)) is True
    await sweep(store, NOW + 5000 + BRIEF_S - 0.001)
    assert await store.response(OWNER, "a") == kept(turn("a"))


async def test_an_ordinary_response_outlives_the_time_of_brief_ones(store: RunStore) -> None:
    await finish(store, turn("a"))
    await admit(store, queued("b"))
    await cancel(store, "b")
    await sweep(store, 1e300)
    assert [await status_of(store, turn_id) for turn_id in "ab"] == ["completed", "cancelled"]
    assert await response_ids(store) == ["a", "b"]


async def test_a_brief_child_leaves_the_chain_as_it_was(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await save_chain(store, "a")
    before = run_rows_in(place)
    held = await begin(store, brief("b", "a"))
    await save_chain(store, "c", after="a")
    assert await input_ids(store, "b") == ["a.in", "a.out", "b.in"]
    await store.settle(held, ending(brief_end("b", previous_id="a")))
    await sweep(store, NOW + BRIEF_S)
    assert await window_ids(store, "c") == both_of("a", "c")
    await store.delete_response(OWNER, "c", NOW)
    assert run_rows_in(place) == before


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "deleted"])
async def test_the_settings_of_a_brief_response_go_with_it_and_no_others(
    open_in: OpenRunStore, place: Place, end: str
) -> None:
    store = await open_in()
    await save_chain(store, "z")
    held = await begin(store, brief("a"))
    if end in ("cancelled", "deleted"):
        await (cancel(store, "a") if end == "cancelled" else store.delete_response(OWNER, "a", NOW))
    else:
        await store.settle(held, ending(brief_end("a", status=end, settings=b"{}")))
        assert await store.response(OWNER, "a") == kept(turn("a", status=end, settings=b"{}"))
    await sweep(store, NOW + BRIEF_S)
    assert rows_in(place) == {"turn": 1, "item": 2, "item_id": 2, "thread": 1, "settings": 1}
    assert await store.response(OWNER, "z") == kept(turn("z"))


async def test_a_brief_run_of_a_conversation_joins_it_not(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await begin_talk(store, "c.1")
    before = run_rows_in(place)
    held = await begin(store, brief("a", conversation_id="conv"))
    await store.settle(held, ending(brief_end("a", conversation_id="conv")))
    assert await conversation_ids(store) == ["c.1"]
    assert await input_ids(store, "a") == ["c.1", "a.in"]
    await sweep(store, NOW + BRIEF_S)
    assert run_rows_in(place) == before


async def test_a_brief_response_that_is_deleted_leaves_nothing(open_in: OpenRunStore, place: Place) -> None:
    store = await open_in()
    await admit(store, brief("a"), batch=batch(0))
    assert await store.delete_response(OWNER, "a", NOW) is True
    assert run_rows_in(place) == NO_ROWS


async def test_a_brief_child_keeps_its_deleted_parent_for_its_own_time_only(
    open_in: OpenRunStore, place: Place
) -> None:
    store = await open_in()
    await save_chain(store, "a")
    held = await begin(store, brief("b", "a"))
    await store.delete_response(OWNER, "a", NOW)
    assert await input_ids(store, "b") == ["a.in", "a.out", "b.in"]
    await store.settle(held, ending(brief_end("b")))
    await sweep(store, NOW + BRIEF_S)
    assert run_rows_in(place) == NO_ROWS


# -- reopening, and several stores on one file -------------------------------------------------------------------------


async def test_runs_and_logs_are_there_after_reopening(open_in: OpenRunStore) -> None:
    store = await open_in()
    await admit(store, queued("a"), queued("b", "a"), batch=batch(0, 2))
    held = await claim_one(store, "a")
    before = await store.runs(), await store.queue(), await store.tail(OWNER, "a", -1)
    await store.close()
    store = await open_in()
    assert (await store.runs(), await store.queue(), await store.tail(OWNER, "a", -1)) == before
    assert await store.settle(held, ending(turn("a"), batch(2))) is True
    assert await claim_ids(store, holder="you") == ["b"]


async def test_one_store_cancels_what_another_carries_out(open_in: OpenRunStore) -> None:
    one, two = await open_in(), await open_in()
    held = await begin(one, queued("a"), batch=batch(0))
    stopped = await cancel(two, "a")
    assert stopped is not None
    assert stopped.run == held.run
    assert await one.settle(held, ending(turn("a"))) is False
    assert await two.is_held(held.run) is True
    await one.let_go(held)
    assert await two.is_held(held.run) is False


ENDS: dict[str, Callable[[RunStore, Held], Awaitable[Any]]] = {
    "settled": lambda store, held: store.settle(held, ending(turn("a"), batch(1))),
    "cancelled": lambda store, held: cancel(store, "a"),
    "deleted": lambda store, held: store.delete_response(OWNER, "a", NOW),
}


@pytest.mark.parametrize("end", sorted(ENDS))
async def test_another_owners_runs_and_logs_are_left_alone(store: RunStore, end: str) -> None:
    held = await begin(store, queued("a"), batch=batch(0))
    await admit(store, queued("b", owner=STRANGER), batch=batch(0))
    before = (await store.runs())[1], await store.tail(STRANGER, "b", -1), await store.response(STRANGER, "b")
    await ENDS[end](store, held)
    await sweep(store, NOW + BRIEF_S)
    after = (await store.runs())[0], await store.tail(STRANGER, "b", -1), await store.response(STRANGER, "b")
    assert after == before


# -- a file that is locked ---------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[RunStore, Held], Awaitable[Any]]] = {
    "admit": lambda s, held: admit(s, queued("new"), batch=batch(0)),
    "claim": lambda s, held: claim(s, holder="you"),
    "renew_runs": lambda s, held: s.renew_runs("me", EXPIRED + 10),
    "release_runs": lambda s, held: s.release_runs("me"),
    "free": lambda s, held: s.free(held, EXPIRED),
    "release_run": lambda s, held: s.release_run(held),
    "let_go": lambda s, held: s.let_go(held),
    "log": lambda s, held: s.log(held, batch(1)),
    "settle": lambda s, held: s.settle(held, ending(turn("a"), batch(1))),
    "stop": lambda s, held: cancel(s, "a"),
    "forget_ended": lambda s, held: s.forget_ended(NOW),
}


@pytest.mark.parametrize("verb", sorted(WRITES))
async def test_a_locked_file_refuses_what_is_written_of_runs_and_soon_takes_it(
    open_at: OpenRunStore, store_path: Path, verb: str
) -> None:
    store = await open_at(busy_timeout_s=0.05)
    held = await begin(store, queued("a"), batch=batch(0))
    await admit(store, queued("b"))
    before = await store.runs(), await store.tail(OWNER, "a", -1), await store.response(OWNER, "a")
    with closing(sqlite3.connect(store_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError) as refused:
            await WRITES[verb](store, held)
        assert (refused.value.retry_after_s or 0) > 0
        assert (await store.runs(), await store.tail(OWNER, "a", -1), await store.response(OWNER, "a")) == before
    await WRITES[verb](store, held)
    assert await store.problems() == []
