"""What every store does at every verb. Ids are made of letters: `b` continues `a`, `a.in` and `a.out` are its items."""

from __future__ import annotations

import asyncio
import itertools
import random
import string
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import pytest
from store_builders import (
    ALL_ASC,
    ALL_DESC,
    NOW,
    OWNER,
    STRANGER,
    both_of,
    compaction,
    conversation,
    conversation_ids,
    failed,
    ids_in,
    input_ids,
    kept,
    message,
    reasoning,
    response_ids,
    save_all,
    save_chain,
    turn,
    walk,
    walk_back,
    window_ids,
    window_of,
)

from errors import ConversationLocked, InvalidRequest, NotFound, ProxyError, StoreError
from verbs import (
    Conversation,
    FirstUse,
    ItemIds,
    Listed,
    Lock,
    NewTurn,
    Page,
    Purged,
    Store,
    Window,
    conversation_lease,
)

pytest_plugins = ["store_fixtures"]

Order = Literal["asc", "desc"]
each_order = pytest.mark.parametrize("order", ["asc", "desc"])
each_limit = pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
# Nothing makes it shorter.
ENDLESS = "".join(random.Random(1).choices(string.ascii_letters, k=9000))
LOCK = Lock(conversation_lease("conv"), "me")


def next_to(side: str, cursor: str) -> Page:
    return Page(after=cursor) if side == "after" else Page(before=cursor)


# -- a response by itself ----------------------------------------------------------------------------------------------


async def test_a_saved_response_is_given_back_whole(store: Store) -> None:
    saved = turn("a", outputs=(reasoning("a.think"), message("a.out"), compaction("a.short")))
    await store.save(saved)
    assert await store.response(OWNER, "a") == kept(saved)


async def test_a_response_without_items_is_given_back_whole(store: Store) -> None:
    saved = turn("a", inputs=(), outputs=(), completed_at=None, status="incomplete", settings=b"{}", body=b"{}")
    await store.save(saved)
    assert await store.response(OWNER, "a") == kept(saved)
    assert await store.window(OWNER, "a") == window_of(saved, [])
    assert await store.input_items(OWNER, "a", ALL_ASC) == Listed([], False)


async def test_bytes_are_kept_as_they_are(store: Store) -> None:
    odd = '{ "id":"x.in",  "text":"\\u0000 \U0001f600 日本 \\" \' ; --" }\n'.encode()
    item = msgspec.structs.replace(message("x.in"), body=odd)
    saved = turn("x", inputs=(item,), settings=b' {"b":1,"a":2}', body=b'{"z":[ ]}')
    await store.save(saved)
    assert await store.response(OWNER, "x") == kept(saved)
    assert await store.window(OWNER, "x") == window_of(saved, [odd, saved.outputs[0].body])
    assert await store.items(OWNER, ["x.in"]) == {"x.in": odd}


async def test_an_item_of_many_megabytes_is_kept(store: Store) -> None:
    image = message("a.in", random.Random(1).randbytes(3_000_000).hex())
    await store.save(turn("a", inputs=(image,)))
    assert await store.items(OWNER, ["a.in"]) == {"a.in": image.body}


async def test_a_turn_of_a_thousand_items_keeps_their_order(store: Store) -> None:
    many = tuple(message(f"a.{number}") for number in random.Random(1).sample(range(1000), 1000))
    await store.save(turn("a", inputs=many, outputs=many[:0]))
    assert await window_ids(store, "a") == [item.id for item in many]


async def test_times_beyond_32_bits_are_kept(store: Store) -> None:
    saved = turn("a", created_at=2**33, completed_at=2**33 + 1)
    await store.save(saved)
    assert await store.response(OWNER, "a") == kept(saved)


async def test_an_unknown_response_is_none(store: Store) -> None:
    assert await store.response(OWNER, "nobody") is None
    assert await store.window(OWNER, "nobody") is None
    assert await store.input_items(OWNER, "nobody", ALL_ASC) is None


async def test_a_response_says_what_it_continues(store: Store) -> None:
    await save_chain(store, "a", "b", "c")
    await store.save(turn("fork", "a"))
    found = [await store.response(OWNER, turn_id) for turn_id in ("a", "b", "c", "fork")]
    assert [response.previous_id for response in found if response] == [None, "a", "b", "a"]


async def test_saving_after_an_unknown_response_is_refused_and_keeps_nothing(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="Previous response with id 'nobody' not found"):
        await store.save(turn("b", "nobody", first_use=FirstUse("key", b"digest", 20_000)))
    assert await store.response(OWNER, "b") is None
    assert await store.items(OWNER, ["b.in", "b.out"]) == {}
    assert await store.first_use(OWNER, "key", NOW) is None
    assert await response_ids(store) == []


async def test_an_id_that_is_taken_is_refused_and_the_first_stays(store: Store) -> None:
    await store.save(turn("a"))
    again = turn("a", body=b"{}", inputs=(message("other.in"),), outputs=())
    turns = [turn("b"), again, turn("c")]
    results = await asyncio.gather(*(store.save(each) for each in turns), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StoreError, type(None)]
    assert await store.response(OWNER, "a") == kept(turn("a"))
    assert await window_ids(store, "a") == both_of("a")
    assert await store.items(OWNER, ["other.in"]) == {}
    assert await response_ids(store) == ["a", "b", "c"]


async def test_settings_may_change_from_turn_to_turn(store: Store) -> None:
    turns = [turn(turn_id, settings=settings) for turn_id, settings in (("a", b"{}"), ("b", b"[]"), ("c", b"{}"))]
    await save_all(store, *turns)
    assert [await store.response(OWNER, each.id) for each in turns] == [kept(each) for each in turns]


# -- windows -----------------------------------------------------------------------------------------------------------


async def test_a_window_is_the_whole_chain_oldest_first(store: Store) -> None:
    turns = [turn("a"), turn("b", "a"), turn("c", "b", status="incomplete")]
    await save_all(store, *turns)
    items = [item.body for each in turns for item in (*each.inputs, *each.outputs)]
    assert await store.window(OWNER, "a") == window_of(turns[0], items[:2])
    assert await store.window(OWNER, "b") == window_of(turns[1], items[:4], 2)
    assert await store.window(OWNER, "c") == window_of(turns[2], items, 4)


async def test_a_window_tells_the_settings_and_the_body_of_its_newest_turn(store: Store) -> None:
    turns = [turn("a", settings=b'{"n":1}'), turn("b", "a", settings=b'{"n":2}')]
    await save_all(store, *turns, turn("c", "a", settings=b'{"n":3}'), turn("d", "b"))
    found = [await store.window(OWNER, turn_id) for turn_id in "ab"]
    assert found == [await store.window_before(OWNER, turn_id) for turn_id in "cd"]
    assert [(window.settings, window.body) for window in found if window] == [
        (b'{"n":1}', turns[0].body),
        (b'{"n":2}', turns[1].body),
    ]


async def test_nothing_is_told_of_a_turn_before_the_first_one(store: Store) -> None:
    await save_chain(store, "a")
    assert await store.window_before(OWNER, "a") == Window("completed", [], 0, b"", b"", None)


async def test_a_window_has_the_items_that_input_items_does_not_show(store: Store) -> None:
    await store.save(turn("a", outputs=(reasoning("a.think"), message("a.out"))))
    await store.save(turn("b", "a"))
    assert await window_ids(store, "b") == ["a.in", "a.think", "a.out", "b.in", "b.out"]


@pytest.mark.parametrize("depth", range(6))
async def test_a_fork_at_any_depth_sees_nothing_of_what_came_after_it(store: Store, depth: int) -> None:
    await save_chain(store, *"abcdef")
    await store.save(turn("fork", "abcdef"[depth]))
    await save_chain(store, "g", "h", after="f")
    await save_chain(store, "fork2", after="fork")
    trunk = "abcdef"[: depth + 1]
    assert await window_ids(store, "fork") == both_of(*trunk, "fork")
    assert await window_ids(store, "fork2") == both_of(*trunk, "fork", "fork2")
    assert await window_ids(store, "h") == both_of(*"abcdefgh")


async def test_forks_of_forks_each_see_their_own_line(store: Store) -> None:
    lines = ["abc", "abd", "abde", "abdf", "abdfg", "ah", "ahi", "ahj", "abdfk"]
    await save_chain(store, *"abc")
    for line in lines[1:]:
        await store.save(turn(line[-1], line[-2]))
    assert [await window_ids(store, line[-1]) for line in lines] == [both_of(*line) for line in lines]


async def test_many_forks_of_one_response_stand_side_by_side(store: Store) -> None:
    await save_chain(store, "a", "b")
    for number in range(20):
        await store.save(turn(f"fork{number}", "a"))
    found = [await window_ids(store, f"fork{number}") for number in range(20)]
    assert found == [both_of("a", f"fork{number}") for number in range(20)]


async def test_a_long_chain_is_one_window(store: Store) -> None:
    names = [f"t{number}" for number in range(150)]
    await save_chain(store, *names)
    window = await store.window(OWNER, names[-1])
    assert window is not None
    assert (ids_in(window.items), window.newest) == (both_of(*names), 298)


async def test_a_long_line_of_forks_is_one_window(store: Store) -> None:
    """Each turn forks from the one before, whose thread goes on without it."""
    names = [f"t{number}" for number in range(60)]
    for before, name in zip([None, *names], names, strict=False):
        if before:
            await store.save(turn(f"{before}.other", before))
        await store.save(turn(name, before))
    assert await window_ids(store, names[-1]) == both_of(*names)


async def test_a_window_begins_with_a_compaction_in_the_output(store: Store) -> None:
    await save_chain(store, "a", "b")
    c, d = turn("c", "b", outputs=(message("c.out"), compaction("c.short"), message("c.more"))), turn("d", "c")
    await save_all(store, c, d)
    short = [compaction("c.short").body, message("c.more").body]
    assert await store.window(OWNER, "c") == window_of(c, short)
    assert await store.window(OWNER, "d") == window_of(d, [*short, message("d.in").body, message("d.out").body], 2)


async def test_a_window_begins_with_a_compaction_in_the_input(store: Store) -> None:
    await save_chain(store, "a", "b")
    await store.save(turn("c", "b", inputs=(message("c.old"), compaction("c.short"), message("c.in"))))
    assert await window_ids(store, "c") == ["c.short", "c.in", "c.out"]


async def test_a_window_begins_with_the_newest_of_several_compactions(store: Store) -> None:
    await store.save(turn("a", outputs=(compaction("a.short"),)))
    await store.save(turn("b", "a", inputs=(compaction("b.short"), message("b.in"), compaction("b.short2"))))
    await save_chain(store, "c", after="b")
    assert await window_ids(store, "c") == ["b.short2", "b.out", "c.in", "c.out"]


async def test_a_compaction_in_an_ancestor_thread_begins_the_window_of_a_fork(store: Store) -> None:
    await save_chain(store, "a")
    await store.save(turn("b", "a", outputs=(compaction("b.short"), message("b.out"))))
    await save_chain(store, "c", "d", after="b")
    await save_chain(store, "fork", "fork2", after="c")
    await save_chain(store, "deeper", after="fork")
    assert await window_ids(store, "deeper") == ["b.short", "b.out", *both_of("c", "fork", "deeper")]


async def test_a_compaction_after_the_fork_point_is_not_seen_by_the_fork(store: Store) -> None:
    await save_chain(store, "a", "b")
    await store.save(turn("c", "b", outputs=(compaction("c.short"),)))
    await store.save(turn("fork", "a"))
    assert await window_ids(store, "fork") == both_of("a", "fork")


async def test_a_compaction_in_a_fork_is_not_seen_by_its_trunk(store: Store) -> None:
    await save_chain(store, "a", "b")
    await store.save(turn("fork", "a", outputs=(compaction("fork.short"),)))
    await save_chain(store, "c", after="b")
    assert await window_ids(store, "c") == both_of(*"abc")
    assert await window_ids(store, "fork") == ["fork.short"]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_detached_turn_has_no_items_in_its_window(store: Store, status: str) -> None:
    saved = failed("oops", "b", status=status)
    await save_chain(store, "a", "b")
    await store.save(saved)
    window = await store.window(OWNER, "oops")
    assert window is not None
    assert (window.status, window.newest) == (status, len(window.items))
    assert ids_in(window.items) in ([], both_of("a", "b"))
    assert await store.response(OWNER, "oops") == kept(saved)


async def test_a_detached_turn_shows_what_the_model_was_given(store: Store) -> None:
    await save_chain(store, "a")
    await save_all(store, failed("oops", "a"), failed("alone"))
    assert await input_ids(store, "oops") == [*both_of("a"), "oops.in"]
    assert await input_ids(store, "alone") == ["alone.in"]


async def test_a_chain_goes_on_past_a_detached_turn(store: Store) -> None:
    await save_chain(store, "a")
    await store.save(failed("oops", "a"))
    await save_chain(store, "b", after="a")
    assert await window_ids(store, "b") == both_of("a", "b")


# -- what is kept ahead of a response ----------------------------------------------------------------------------------


async def ahead_of(store: Store, *turn_ids: str) -> list[bytes | None]:
    windows = [await store.window(OWNER, turn_id) for turn_id in turn_ids]
    return [window and window.ahead for window in windows]


async def keep_all_ahead(store: Store, *turn_ids: str) -> list[bytes]:
    """For each of them its own id, and more."""
    blobs = [b"ahead of %b" % turn_id.encode() for turn_id in turn_ids]
    for turn_id, blob in zip(turn_ids, blobs, strict=True):
        assert await store.keep_ahead(OWNER, turn_id, blob) is True
    return blobs


async def test_what_is_kept_ahead_is_told_with_the_window_of_its_response_only(store: Store) -> None:
    await save_chain(store, "a", "b", "c")
    before = [await store.window(OWNER, turn_id) for turn_id in "abc"]
    blobs = await keep_all_ahead(store, "b")
    after = [await store.window(OWNER, turn_id) for turn_id in "abc"]
    expected = [window and msgspec.structs.replace(window, ahead=None) for window in after]
    assert (expected, await ahead_of(store, *"abc")) == (before, [None, *blobs, None])


async def test_every_child_can_begin_with_what_was_kept_ahead_of_its_parent(store: Store) -> None:
    await save_chain(store, "a", "b")
    blobs = await keep_all_ahead(store, "a")
    await store.save(turn("fork", "a"))
    found = [await store.window_before(OWNER, turn_id) for turn_id in ("b", "fork")]
    assert [window and window.ahead for window in found] == blobs * 2


async def test_what_is_kept_ahead_can_be_kept_anew(store: Store) -> None:
    await save_chain(store, "a")
    await keep_all_ahead(store, "a")
    assert await store.keep_ahead(OWNER, "a", b"\x00\xff" * 100_000) is True
    assert await ahead_of(store, "a") == [b"\x00\xff" * 100_000]


async def test_what_is_kept_ahead_leaves_the_response_as_it_was(store: Store) -> None:
    await save_chain(store, "a")
    await keep_all_ahead(store, "a")
    assert await store.response(OWNER, "a") == kept(turn("a"))
    assert await input_ids(store, "a") == ["a.in"]


async def test_nothing_is_kept_ahead_of_a_response_that_is_not_there(store: Store) -> None:
    await save_chain(store, "a", "b")
    await store.delete_response(OWNER, "a", NOW)
    assert [await store.keep_ahead(OWNER, turn_id, b"ahead") for turn_id in ("a", "nobody")] == [False, False]
    before = await store.window_before(OWNER, "b")
    assert before is not None
    assert (ids_in(before.items), before.ahead) == (both_of("a"), None)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_nothing_is_kept_ahead_of_a_response_that_nothing_continues(store: Store, status: str) -> None:
    await store.save(failed("oops", status=status))
    assert await store.keep_ahead(OWNER, "oops", b"ahead") is False


async def test_what_is_kept_ahead_is_told_with_the_window_of_a_conversation_until_it_goes_on(store: Store) -> None:
    await save_conversation(store)
    blobs = await keep_all_ahead(store, "a", "b")
    found = [await store.conversation_window(OWNER, "conv")]
    await store.add_items(OWNER, "conv", (message("c.5"),), NOW)
    found.append(await store.conversation_window(OWNER, "conv"))
    assert [window and window.ahead for window in found] == [blobs[1], None]
    assert await ahead_of(store, "a", "b") == blobs


async def test_what_is_kept_ahead_goes_with_its_response(store: Store) -> None:
    await save_chain(store, "a", "b", "c")
    blobs = await keep_all_ahead(store, *"abc")
    await store.delete_response(OWNER, "b", NOW)
    before = await store.window_before(OWNER, "c")
    assert before is not None
    assert (ids_in(before.items), before.body, before.ahead) == (both_of("a", "b"), turn("b").body, None)
    assert await ahead_of(store, *"ac") == [blobs[0], blobs[2]]


async def test_what_is_kept_ahead_goes_with_a_response_that_is_purged(store: Store) -> None:
    await save_chain(store, "a", created_at=1000)
    await save_chain(store, "b", after="a", created_at=3000)
    blobs = await keep_all_ahead(store, *"ab")
    await store.purge(2000, NOW)
    before = await store.window_before(OWNER, "b")
    assert (before and before.ahead, await ahead_of(store, "b")) == (None, blobs[1:])


async def test_what_is_kept_ahead_goes_with_an_item_of_its_conversation(store: Store) -> None:
    """In forks too, and in forks of forks, whose windows had the item."""
    await save_conversation(store)
    await save_chain(store, "further", after="fork")
    await save_chain(store, "furthest", after="fork")
    await save_chain(store, "elsewhere")
    blobs = await keep_all_ahead(store, "a", "b", "fork", "further", "furthest", "elsewhere")
    await store.delete_conversation_item(OWNER, "conv", "nothing", NOW)
    assert await ahead_of(store, "a", "b", "fork", "further", "furthest", "elsewhere") == blobs
    await store.delete_conversation_item(OWNER, "conv", "c.1", NOW)
    assert await ahead_of(store, "a", "b", "fork", "further", "furthest", "elsewhere") == [None] * 5 + blobs[5:]
    assert await keep_all_ahead(store, "b") == await ahead_of(store, "b")


async def test_what_is_kept_ahead_stays_when_its_locked_conversation_keeps_its_items(store: Store) -> None:
    await save_conversation(store)
    blobs = await keep_all_ahead(store, "b")
    await store.acquire(LOCK, NOW, NOW + 60)
    with pytest.raises(ConversationLocked):
        await store.delete_conversation_item(OWNER, "conv", "c.1", NOW)
    assert await ahead_of(store, "b") == blobs


async def test_what_is_kept_ahead_goes_with_its_conversation(store: Store) -> None:
    await save_conversation(store)
    blobs = await keep_all_ahead(store, "a", "b", "fork")
    await store.delete_conversation(OWNER, "conv", NOW)
    assert await ahead_of(store, "a", "b", "fork") == [None, None, None]
    assert await keep_all_ahead(store, "a", "b", "fork") == blobs
    assert await ahead_of(store, "a", "b", "fork") == blobs


# -- input items -------------------------------------------------------------------------------------------------------


async def test_input_items_are_the_window_of_the_parent_and_the_own_input(store: Store) -> None:
    await save_chain(store, "a", "b", "c")
    assert [await input_ids(store, each) for each in "abc"] == [
        ["a.in"],
        ["a.in", "a.out", "b.in"],
        [*both_of("a", "b"), "c.in"],
    ]


async def test_input_items_leave_out_what_is_not_listed(store: Store) -> None:
    await store.save(
        turn("a", inputs=(message("a.in"), reasoning("a.old")), outputs=(reasoning("a.r"), message("a.o")))
    )
    await store.save(turn("b", "a", inputs=(reasoning("b.old"), message("b.in"))))
    assert await input_ids(store, "b") == ["a.in", "a.o", "b.in"]


async def test_input_items_begin_where_the_window_of_the_parent_begins(store: Store) -> None:
    await save_chain(store, "a")
    await store.save(turn("b", "a", outputs=(message("b.old"), compaction("b.short"), message("b.out"))))
    await save_chain(store, "c", after="b")
    assert await input_ids(store, "b") == ["a.in", "a.out", "b.in"]
    assert await input_ids(store, "c") == ["b.out", "c.in"]


async def test_a_compaction_in_the_own_input_hides_nothing_of_the_input(store: Store) -> None:
    """The list is what the parent's window gave, and then what the request gave."""
    await save_chain(store, "a")
    await store.save(turn("b", "a", inputs=(message("b.1"), compaction("b.short"), message("b.2"))))
    assert await input_ids(store, "b") == ["a.in", "a.out", "b.1", "b.2"]


async def test_input_items_newest_first_is_the_usual_order(store: Store) -> None:
    await save_chain(store, "a", "b")
    assert Page() == Page(limit=20, order="desc", after=None, before=None)
    assert await store.input_items(OWNER, "b", Page()) == Listed(
        [message("b.in").body, message("a.out").body, message("a.in").body], False
    )


async def save_bush(store: Store) -> tuple[str, list[str]]:
    """A response at the end of forks of forks, and what `input_items` lists for it, oldest first."""
    await save_chain(store, "a", "b", "c")
    await store.save(turn("d", "b", outputs=(reasoning("d.think"), message("d.out"), message("d.more"))))
    await save_chain(store, "e", after="d")
    await save_chain(store, "f", after="d")
    await store.save(turn("g", "f", inputs=(message("g.1"), message("g.2"), message("g.3"))))
    listed = [*both_of("a", "b"), "d.in", "d.out", "d.more", *both_of("f"), "g.1", "g.2", "g.3"]
    return "g", listed


@each_order
@each_limit
async def test_input_items_are_paged_across_forks(store: Store, order: Order, limit: int) -> None:
    turn_id, listed = await save_bush(store)
    expected = listed if order == "asc" else listed[::-1]

    async def give(page: Page) -> Listed[bytes] | None:
        return await store.input_items(OWNER, turn_id, page)

    assert await walk(give, limit, order) == expected
    assert await walk_back(give, limit, order, expected[-1]) == expected[:-1]


async def assert_every_page(give: Callable[[Page], Awaitable[Listed[str]]], ascending: list[str]) -> None:
    """Each cursor alone and each pair, with several limits, against slices of the list."""
    cursors = [None, *ascending]
    for order, limit in itertools.product(("asc", "desc"), (1, 3, 100)):
        rows = ascending if order == "asc" else ascending[::-1]
        for after, before in itertools.product(cursors, cursors):
            begin = 0 if after is None else rows.index(after) + 1
            end = len(rows) if before is None else rows.index(before)
            part = rows[begin:end]
            if limit < len(part) and after and before:
                continue  # next to which of the two is not said
            next_to_the_cursor = part[-limit:] if before and not after else part[:limit]
            page = Page(limit, order, after, before)  # type: ignore[arg-type]
            assert await give(page) == Listed(next_to_the_cursor, len(part) > limit), page


async def test_every_page_of_input_items_is_the_slice_next_to_its_cursor(store: Store) -> None:
    turn_id, listed = await save_bush(store)

    async def give(page: Page) -> Listed[str]:
        found = await store.input_items(OWNER, turn_id, page)
        assert found is not None
        return Listed(ids_in(found.rows), found.has_more)

    await assert_every_page(give, listed)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("cursor", ["nobody", "b.out", "c.in", "a.think", "a"])
async def test_a_cursor_that_input_items_does_not_list_is_refused(store: Store, side: str, cursor: str) -> None:
    """Its own output, a later turn's item, an item that is not listed, and the response itself are no cursors."""
    await store.save(turn("a", outputs=(reasoning("a.think"), message("a.out"))))
    await save_chain(store, "b", "c", after="a")
    with pytest.raises(InvalidRequest) as refused:
        await store.input_items(OWNER, "b", next_to(side, cursor))
    assert (refused.value.param, refused.value.http_status) == (side, 400)


# -- the list of responses ---------------------------------------------------------------------------------------------


async def test_responses_are_listed_newest_first(store: Store) -> None:
    turns = [turn("b", created_at=1000), turn("a", created_at=2000), failed("c", "a", created_at=3000)]
    await save_all(store, *turns)
    assert await store.responses(OWNER, Page(), None) == Listed([kept(each) for each in turns[::-1]], False)
    assert await store.responses(OWNER, ALL_ASC, None) == Listed([kept(each) for each in turns], False)


async def test_responses_are_listed_in_the_order_in_which_they_were_saved(store: Store) -> None:
    """A long turn that began before a short one is saved after it."""
    await save_all(store, turn("short", created_at=2000), turn("long", created_at=1000), turn("next", created_at=3000))
    assert await response_ids(store) == ["short", "long", "next"]


async def test_every_page_of_responses_is_the_slice_next_to_its_cursor(store: Store) -> None:
    names = [f"t{number}" for number in range(9)]
    for number, name in enumerate(names):
        await store.save(turn(name, names[number // 2] if number > 1 else None, created_at=1000 + number))

    async def give(page: Page) -> Listed[str]:
        found = await store.responses(OWNER, page, None)
        return Listed([response.id for response in found.rows], found.has_more)

    await assert_every_page(give, names)


@each_order
@each_limit
async def test_responses_of_one_second_are_all_paged(store: Store, order: Order, limit: int) -> None:
    names = [f"t{number}" for number in range(7)]
    await save_all(store, *(turn(name) for name in names))
    found: list[str] = []
    while True:
        listed = await store.responses(OWNER, Page(limit, order, found[-1] if found else None), None)
        found += [response.id for response in listed.rows]
        if not listed.has_more:
            break
    assert sorted(found) == names
    assert found == [response.id for response in (await store.responses(OWNER, Page(100, order), None)).rows]


def of_models(settings: bytes) -> list[NewTurn]:
    """Six turns of two models in turn, each second older."""
    models = [("even", "odd")[number % 2] for number in range(6)]
    return [
        turn(f"t{number}", created_at=number, model=model, settings=settings.replace(b"?", model.encode()))
        for number, model in enumerate(models)
    ]


@pytest.mark.parametrize("settings", [b'{"model":"?"}', b"{}"], ids=["own settings", "same settings"])
async def test_responses_are_listed_by_model(store: Store, settings: bytes) -> None:
    turns = of_models(settings)
    await save_all(store, *turns)
    odd = [kept(each) for each in turns[1::2]]
    assert await store.responses(OWNER, ALL_ASC, "odd") == Listed(odd, False)
    assert await store.responses(OWNER, Page(2, "asc"), "odd") == Listed(odd[:2], True)
    assert await store.responses(OWNER, Page(2, "asc", after="t1"), "odd") == Listed(odd[1:], False)
    assert await store.responses(OWNER, Page(1, "asc", before="t5"), "odd") == Listed(odd[1:2], True)
    assert await store.responses(OWNER, ALL_ASC, "nobody") == Listed([], False)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("cursor", ["nobody", "gone", "a.in", "conv", "of another model"])
async def test_a_cursor_that_responses_do_not_list_is_refused(store: Store, side: str, cursor: str) -> None:
    await store.create_conversation(OWNER, conversation(), (message("c"),))
    await save_all(store, turn("a"), turn("gone"), turn("of another model", model="other", settings=b"other"))
    await store.delete_response(OWNER, "gone", NOW)
    with pytest.raises(InvalidRequest) as refused:
        await store.responses(OWNER, next_to(side, cursor), "m")
    assert (refused.value.param, refused.value.http_status) == (side, 400)


# -- deleting responses ------------------------------------------------------------------------------------------------


async def test_a_deleted_response_is_unknown_to_every_verb(store: Store) -> None:
    await store.save(turn("a", first_use=FirstUse("key", b"digest", 20_000)))
    assert await store.delete_response(OWNER, "a", NOW) is True
    assert await store.delete_response(OWNER, "a", NOW) is False
    assert await store.response(OWNER, "a") is None
    assert await store.responses(OWNER, Page(), None) == Listed([], False)
    assert await store.window(OWNER, "a") is None
    assert await store.input_items(OWNER, "a", Page()) is None
    assert await store.items(OWNER, ["a.in", "a.out"]) == {}
    assert await store.first_use(OWNER, "key", NOW) is None
    with pytest.raises(InvalidRequest):
        await store.save(turn("b", "a"))


async def test_deleting_an_unknown_response_is_false(store: Store) -> None:
    assert await store.delete_response(OWNER, "nobody", NOW) is False


@pytest.mark.parametrize("gone", ["a", "b", "ab", "ba"])
async def test_descendants_of_deleted_responses_keep_their_window(store: Store, gone: str) -> None:
    await save_chain(store, *"abc")
    before = await store.response(OWNER, "c")
    for turn_id in gone:
        assert await store.delete_response(OWNER, turn_id, NOW) is True
    assert await window_ids(store, "c") == both_of(*"abc")
    assert await input_ids(store, "c") == [*both_of("a", "b"), "c.in"]
    assert await store.response(OWNER, "c") == before
    assert [await store.response(OWNER, turn_id) for turn_id in gone] == [None] * len(gone)
    assert await response_ids(store) == [turn_id for turn_id in "abc" if turn_id not in gone]


async def test_a_deleted_response_with_descendants_is_unknown_to_every_verb(store: Store) -> None:
    await store.save(turn("a", first_use=FirstUse("key", b"digest", 20_000)))
    await save_chain(store, "b", after="a")
    assert await store.delete_response(OWNER, "a", NOW) is True
    assert await store.delete_response(OWNER, "a", NOW) is False
    assert await store.response(OWNER, "a") is None
    assert await store.window(OWNER, "a") is None
    assert await store.input_items(OWNER, "a", Page()) is None
    assert await store.items(OWNER, [*both_of("a", "b")]) == {
        "b.in": message("b.in").body,
        "b.out": message("b.out").body,
    }
    assert await store.first_use(OWNER, "key", NOW) is None


async def test_a_parent_that_is_deleted_while_its_child_runs_carries_the_child_if_others_stand_on_it(
    store: Store,
) -> None:
    await save_chain(store, "a", "b")
    await store.delete_response(OWNER, "a", NOW)
    await store.save(turn("c", "a"))
    assert await window_ids(store, "c") == both_of("a", "c")


async def test_deleting_a_fork_leaves_the_trunk_and_deleting_the_trunk_leaves_the_fork(store: Store) -> None:
    await save_chain(store, *"abc")
    await save_chain(store, "d", "e", after="a")
    for turn_id in "de":
        await store.delete_response(OWNER, turn_id, NOW)
    assert await window_ids(store, "c") == both_of(*"abc")
    await save_chain(store, "f", after="b")
    for turn_id in "abc":
        await store.delete_response(OWNER, turn_id, NOW)
    assert await window_ids(store, "f") == both_of(*"abf")


async def test_the_tip_can_be_deleted_and_the_chain_goes_on_without_it(store: Store) -> None:
    await save_chain(store, *"abc")
    await store.delete_response(OWNER, "c", NOW)
    await save_chain(store, "d", "e", after="b")
    assert await window_ids(store, "e") == both_of(*"abde")
    await save_chain(store, "f", after="b")
    assert await window_ids(store, "f") == both_of(*"abf")


async def test_a_deleted_response_with_a_fork_is_not_seen_by_a_new_child_of_its_parent(store: Store) -> None:
    await save_chain(store, *"abc")
    await save_chain(store, "fork", after="b")
    for turn_id in "bc":
        await store.delete_response(OWNER, turn_id, NOW)
    await save_chain(store, "d", "e", after="a")
    assert await window_ids(store, "e") == both_of(*"ade")
    assert await window_ids(store, "fork") == [*both_of(*"ab", "fork")]


async def test_a_detached_turn_keeps_its_input_when_its_parent_is_deleted(store: Store) -> None:
    await save_chain(store, "a")
    await store.save(failed("oops", "a"))
    await store.delete_response(OWNER, "a", NOW)
    assert await input_ids(store, "oops") == [*both_of("a"), "oops.in"]


async def test_a_deleted_id_may_not_come_back_with_a_descendant(store: Store) -> None:
    """The tombstone of `a` is `c`'s ground; what is saved later does not wake it."""
    await save_chain(store, *"abc")
    await store.delete_response(OWNER, "a", NOW)
    await save_chain(store, "d", after="c")
    assert await response_ids(store) == ["b", "c", "d"]
    assert await window_ids(store, "d") == both_of(*"abcd")


# -- items -------------------------------------------------------------------------------------------------------------


async def test_items_are_found_by_id_in_responses_and_conversations(store: Store) -> None:
    await store.save(turn("a", outputs=(reasoning("a.think"), compaction("a.short"))))
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    await store.save(failed("oops"))
    wanted = [message("a.in"), reasoning("a.think"), compaction("a.short"), message("c.1"), message("oops.in")]
    assert await store.items(OWNER, [*(item.id for item in wanted), "nobody"]) == {i.id: i.body for i in wanted}


async def test_no_ids_are_no_items(store: Store) -> None:
    assert await store.items(OWNER, []) == {}


async def test_thousands_of_ids_are_asked_for_at_once(store: Store) -> None:
    await save_chain(store, "a")
    ids = ["a.in", *(f"nobody{number}" for number in range(40_000))]
    assert await store.items(OWNER, ids) == {"a.in": message("a.in").body}


async def test_an_id_asked_for_twice_is_one_item(store: Store) -> None:
    await save_chain(store, "a")
    assert await store.items(OWNER, ["a.in", "a.in"]) == {"a.in": message("a.in").body}


async def test_owners_may_have_items_of_the_same_id(store: Store) -> None:
    mine, theirs = message("same", "mine"), message("same", "theirs")
    await store.save(turn("a", inputs=(mine,)))
    await store.save(turn("b", inputs=(theirs,), owner=STRANGER))
    assert await store.items(OWNER, ["same"]) == {"same": mine.body}
    assert await store.items(STRANGER, ["same"]) == {"same": theirs.body}


async def test_an_item_may_have_an_endless_id(store: Store) -> None:
    await store.save(turn("a", inputs=(message(ENDLESS),)))
    await store.create_conversation(OWNER, conversation("conv"), (message(ENDLESS, "here"),))
    assert await store.items(OWNER, [ENDLESS]) == {ENDLESS: message(ENDLESS, "here").body}
    assert await store.conversation_item(OWNER, "conv", ENDLESS) == message(ENDLESS, "here").body


async def test_an_item_that_is_sent_again_stands_in_both_turns(store: Store) -> None:
    """A client that sends the output of the turn before as input, with its id."""
    await save_chain(store, "a")
    await store.save(turn("b", inputs=(message("a.in"), message("a.out"), message("b.in"))))
    assert await window_ids(store, "b") == ["a.in", "a.out", "b.in", "b.out"]
    assert await store.items(OWNER, ["a.in"]) == {"a.in": message("a.in").body}
    await store.delete_response(OWNER, "a", NOW)
    assert await window_ids(store, "b") == ["a.in", "a.out", "b.in", "b.out"]
    assert await store.items(OWNER, ["a.in"]) == {"a.in": message("a.in").body}


# One id that tells its response, `resp_a`, and one that does not.
each_form = pytest.mark.parametrize("item_id", ["msg_a0001", "same"])
PLACES_OF_ITEMS = ["input", "output", "conversation", "batch"]


async def put(store: Store, place: str, item_id: str) -> None:
    """An item whose text is the place: in a response of its own, or in a conversation."""
    item = message(item_id, place)
    if place == "conversation":
        await store.create_conversation(OWNER, conversation("created"), (item,))
    elif place == "batch":
        await store.add_items(OWNER, "conv", (item,), NOW)
    else:
        own: dict[str, Any] = {f"{place}s": (item,)}
        await store.save(turn(place, **own))
        await store.save(turn(f"{place}.child", place))  # stands on the item, also when its response is deleted


async def test_an_id_that_was_used_before_the_response_that_it_tells_of_is_the_newest_ones(store: Store) -> None:
    """A client sees the id in a stream, and can use it before that response is saved."""
    older, newer = message("msg_b0001", "elsewhere"), message("msg_b0001", "its own")
    await save_all(store, turn("resp_a", inputs=(older,)), turn("resp_b", inputs=(newer,)))
    assert await store.items(OWNER, ["msg_b0001"]) == {"msg_b0001": newer.body}


async def test_an_id_that_a_conversation_has_is_refused(store: Store) -> None:
    """It would stand twice in one list, and no page could tell behind which of them it goes on."""
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    with pytest.raises(InvalidRequest, match=r"Duplicate item found with id c\.1"):
        await store.add_items(OWNER, "conv", (message("c.2"), message("c.1", "again")), NOW)
    assert await conversation_ids(store) == ["c.1"]


async def take(store: Store, place: str, item_id: str) -> None:
    if place in ("conversation", "batch"):
        conversation_id = "created" if place == "conversation" else "conv"
        await store.delete_conversation_item(OWNER, conversation_id, item_id, NOW)
    else:
        await store.delete_response(OWNER, place, NOW)


@each_form
@pytest.mark.parametrize("newest", PLACES_OF_ITEMS)
async def test_an_id_that_several_living_items_have_is_the_newest_ones(store: Store, item_id: str, newest: str) -> None:
    """Clients choose the ids of their items, and may use one in many chains and conversations."""
    last = PLACES_OF_ITEMS.index(newest) + 1
    places = [*PLACES_OF_ITEMS[last:], *PLACES_OF_ITEMS[:last]]
    await store.create_conversation(OWNER, conversation(), ())
    await store.save(turn("resp_a", inputs=(message(item_id, "the first"),)))
    for place in places:
        await put(store, place, item_id)
        assert await store.items(OWNER, [item_id]) == {item_id: message(item_id, place).body}
    for gone, before in itertools.pairwise([*places[::-1], "the first"]):
        await take(store, gone, item_id)
        assert await store.items(OWNER, [item_id, "resp_a.out"]) == {
            item_id: message(item_id, before).body,
            "resp_a.out": message("resp_a.out").body,
        }


@each_form
async def test_an_id_that_stands_twice_in_a_response_is_the_later_items(store: Store, item_id: str) -> None:
    """Outputs of calls may be sent so; the response's own output comes after them."""
    inputs = (message(item_id, "first"), message("a.in"), message(item_id, "second"))
    await store.save(turn("resp_a", inputs=inputs))
    assert await store.items(OWNER, [item_id]) == {item_id: message(item_id, "second").body}
    await store.save(turn("resp_b", "resp_a", inputs=inputs, outputs=(message(item_id, "third"),)))
    assert (await store.items(OWNER, ["a.in", item_id]))[item_id] == message(item_id, "third").body


# -- ids that tell their response --------------------------------------------------------------------------------------


def own_turn(turn_id: str, previous_id: str | None = None, **changes: Any) -> NewTurn:
    """A turn whose items have ids that tell it: `msg_<letter>0001` the input, then reasoning, and the output."""
    ids = ItemIds(turn_id)
    inputs, think, output = (message(ids("msg")),), reasoning(ids("rs")), message(ids("msg"))
    return turn(turn_id, previous_id, **{"inputs": inputs, "outputs": (think, output), **changes})


def ids_of(*letters: str) -> list[str]:
    return [f"{kind}_{letter}{place}" for letter in letters for kind, place in OWN_PLACES]


OWN_PLACES = [("msg", "0001"), ("rs", "0002"), ("msg", "0003")]


async def save_own_chain(store: Store, letters: str, **changes: Any) -> None:
    for before, letter in zip(["", *letters], letters, strict=False):
        await store.save(own_turn(f"resp_{letter}", f"resp_{before}" if before else None, **changes))


async def test_items_are_found_by_ids_that_tell_their_response(store: Store) -> None:
    await save_own_chain(store, "abc")
    wanted = ids_of("a", "c")
    found = await store.items(OWNER, [*wanted, "msg_a0009", "msg_z0001", "rs_a0001", "msg_0001", "_", ""])
    assert found == {item_id: (reasoning if "rs" in item_id else message)(item_id).body for item_id in wanted}
    assert list(await store.items(STRANGER, wanted)) == []
    assert await window_ids(store, "resp_c") == ids_of("a", "b", "c")


async def test_items_of_a_deleted_response_are_not_found_by_ids_that_tell_it(store: Store) -> None:
    await save_own_chain(store, "abc")
    await store.delete_response(OWNER, "resp_a", NOW)
    await store.delete_response(OWNER, "resp_c", NOW)
    assert list(await store.items(OWNER, ids_of("a", "b", "c"))) == ids_of("b")
    assert await window_ids(store, "resp_b") == ids_of("a", "b")


async def test_an_item_that_tells_another_response_is_found_where_it_was_sent_again(store: Store) -> None:
    await save_own_chain(store, "a")
    again = (message("msg_a0001", "again"), message("msg_b0001"), message("msg_z0001"))
    await store.save(own_turn("resp_b", inputs=again))
    assert await input_ids(store, "resp_b") == ["msg_a0001", "msg_b0001", "msg_z0001"]
    await store.delete_response(OWNER, "resp_a", NOW)
    found = await store.items(OWNER, [item.id for item in again])
    assert found == {item.id: item.body for item in again}
    await store.delete_response(OWNER, "resp_b", NOW)
    assert await store.items(OWNER, [item.id for item in again]) == {}


async def test_an_item_that_tells_the_response_of_another_owner_is_ones_own(store: Store) -> None:
    await save_own_chain(store, "a", owner=STRANGER)
    mine = message("msg_a0001", "mine")
    await store.save(turn("b", inputs=(mine,)))
    await store.create_conversation(OWNER, conversation(), (message("msg_a0003", "mine too"),))
    assert await store.items(OWNER, ids_of("a")) == {
        "msg_a0001": mine.body,
        "msg_a0003": message("msg_a0003", "mine too").body,
    }
    assert await store.items(STRANGER, ["msg_a0001"]) == {"msg_a0001": message("msg_a0001").body}
    assert await store.conversation_item(OWNER, "conv", "msg_a0001") is None
    assert await store.conversation_item(OWNER, "conv", "msg_a0003") == message("msg_a0003", "mine too").body


@each_order
@each_limit
async def test_lists_are_paged_by_ids_that_tell_their_response(store: Store, order: Order, limit: int) -> None:
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    for letter in "abc":
        await store.save(own_turn(f"resp_{letter}", conversation_id="conv"))
    await store.save(own_turn("resp_d", "resp_b"))
    in_conversation = ["c.1", *ids_of("a", "b", "c")]
    listed = ["c.1", *(item_id for item_id in ids_of("a", "b") if "msg" in item_id), "msg_d0001"]

    async def inputs(page: Page) -> Listed[bytes] | None:
        return await store.input_items(OWNER, "resp_d", page)

    async def items(page: Page) -> Listed[bytes] | None:
        return await store.conversation_items(OWNER, "conv", page)

    for give, ascending in ((inputs, listed), (items, in_conversation)):
        expected = ascending if order == "asc" else ascending[::-1]
        assert await walk(give, limit, order) == expected
        assert await walk_back(give, limit, order, expected[-1]) == expected[:-1]


@pytest.mark.parametrize("cursor", ["rs_a0002", "msg_b0003", "msg_c0001", "msg_a0009"])
async def test_an_id_that_tells_a_response_is_no_cursor_where_it_is_not_listed(store: Store, cursor: str) -> None:
    await save_own_chain(store, "abc")
    with pytest.raises(InvalidRequest):
        await store.input_items(OWNER, "resp_b", Page(after=cursor))


async def test_an_item_whose_id_tells_its_response_is_taken_out_of_a_conversation(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    for letter in "ab":
        await store.save(own_turn(f"resp_{letter}", conversation_id="conv"))
    assert await store.conversation_item(OWNER, "conv", "msg_a0003") == message("msg_a0003").body
    assert await store.delete_conversation_item(OWNER, "conv", "msg_a0003", NOW) is True
    assert await store.delete_conversation_item(OWNER, "conv", "msg_a0003", NOW) is False
    assert await store.conversation_item(OWNER, "conv", "msg_a0003") is None
    assert await conversation_ids(store) == [*ids_of("a")[:2], *ids_of("b")]
    assert await window_ids(store, "resp_b") == [*ids_of("a")[:2], *ids_of("b")]
    assert await store.items(OWNER, ["msg_a0003"]) == {"msg_a0003": message("msg_a0003").body}
    with pytest.raises(InvalidRequest):
        await store.conversation_items(OWNER, "conv", Page(after="msg_a0003"))


# -- conversations -----------------------------------------------------------------------------------------------------


async def test_a_conversation_is_given_back_whole(store: Store) -> None:
    made = Conversation("conv", 1234, b'{"topic":"caf\xc3\xa9"}')
    await store.create_conversation(OWNER, made, ())
    assert await store.conversation(OWNER, "conv") == made


async def test_an_unknown_conversation_is_answered_as_such(store: Store) -> None:
    assert await store.conversation(OWNER, "nobody") is None
    assert await store.update_conversation(OWNER, "nobody", b"{}") is None
    assert await store.delete_conversation(OWNER, "nobody", NOW) is False
    assert await store.conversation_window(OWNER, "nobody") is None
    assert await store.add_items(OWNER, "nobody", (message("i"),), NOW) is False
    assert await store.conversation_items(OWNER, "nobody", Page()) is None
    assert await store.conversation_item(OWNER, "nobody", "i") is None
    assert await store.delete_conversation_item(OWNER, "nobody", "i", NOW) is False
    with pytest.raises(NotFound):
        await store.save(turn("a", conversation_id="nobody"))
    assert await store.items(OWNER, ["i", "a.in"]) == {}
    assert await store.response(OWNER, "a") is None


async def test_metadata_is_replaced(store: Store) -> None:
    await store.create_conversation(OWNER, conversation("conv", b'{"a":"1"}'), ())
    await store.create_conversation(OWNER, conversation("other", b'{"c":"3"}'), ())
    updated = Conversation("conv", 1000, b'{"b":"2"}')
    assert await store.update_conversation(OWNER, "conv", b'{"b":"2"}') == updated
    assert await store.conversation(OWNER, "conv") == updated
    assert await store.conversation(OWNER, "other") == conversation("other", b'{"c":"3"}')


async def test_a_new_conversation_is_empty(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    window = await store.conversation_window(OWNER, "conv")
    assert window is not None
    assert (window.items, window.newest) == ([], 0)
    assert await store.conversation_items(OWNER, "conv", Page()) == Listed([], False)


async def test_the_first_turn_of_an_empty_conversation_has_its_own_items_only(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    await store.save(turn("a", conversation_id="conv"))
    assert await window_ids(store, "a") == both_of("a")
    assert await input_ids(store, "a") == ["a.in"]
    assert await conversation_ids(store) == both_of("a")


async def save_conversation(store: Store) -> list[str]:
    """A conversation of batches and responses; its ids, oldest first. `oops` failed, `fork` continues elsewhere."""
    await store.create_conversation(OWNER, conversation(), (message("c.1"), message("c.2")))
    await store.save(turn("a", conversation_id="conv", outputs=(reasoning("a.think"), message("a.out"))))
    assert await store.add_items(OWNER, "conv", (message("c.3"), message("c.4")), NOW) is True
    await store.save(failed("oops", conversation_id="conv"))
    await store.save(turn("b", conversation_id="conv"))
    await store.save(turn("fork", "a"))
    return ["c.1", "c.2", "a.in", "a.think", "a.out", "c.3", "c.4", "b.in", "b.out"]


async def test_a_conversation_holds_batches_and_responses_in_order(store: Store) -> None:
    items = await save_conversation(store)
    assert await conversation_ids(store) == items
    listed = await store.conversation_items(OWNER, "conv", ALL_DESC)
    assert listed is not None
    assert (ids_in(listed.rows), listed.has_more) == (items[::-1], False)


async def test_the_window_of_a_conversation_is_that_of_its_newest_turn(store: Store) -> None:
    items = await save_conversation(store)
    window = await store.conversation_window(OWNER, "conv")
    assert window == await store.window(OWNER, "b")
    assert window is not None
    assert (ids_in(window.items), window.newest, window.status) == (items, 7, "completed")
    assert (window.body, window.settings) == (turn("b").body, turn("b").settings)


async def test_the_window_of_a_conversation_ends_with_the_newest_batch(store: Store) -> None:
    items = await save_conversation(store)
    await store.add_items(OWNER, "conv", (message("c.5"), message("c.6")), NOW)
    window = await store.conversation_window(OWNER, "conv")
    assert window is not None
    assert (ids_in(window.items), window.newest) == ([*items, "c.5", "c.6"], 9)
    assert (window.body, window.settings) == (b"", b"")


async def test_responses_of_a_conversation_see_what_was_there_before_them(store: Store) -> None:
    items = await save_conversation(store)
    assert await window_ids(store, "a") == items[:5]
    assert await window_ids(store, "b") == items
    assert await input_ids(store, "a") == ["c.1", "c.2", "a.in"]
    assert await input_ids(store, "b") == ["c.1", "c.2", "a.in", "a.out", "c.3", "c.4", "b.in"]


async def test_a_response_of_a_conversation_continues_no_response(store: Store) -> None:
    saved = turn("a", conversation_id="conv")
    await store.create_conversation(OWNER, conversation(), ())
    await store.save(saved)
    assert await store.response(OWNER, "a") == kept(saved)


async def test_a_child_of_a_response_in_a_conversation_joins_no_conversation(store: Store) -> None:
    """Whether it is the newest or not."""
    items = await save_conversation(store)
    await save_chain(store, "of_newest", "further", after="b")
    await save_chain(store, "of_older", after="a")
    assert await conversation_ids(store) == items
    assert await window_ids(store, "further") == [*items, *both_of("of_newest", "further")]
    assert await window_ids(store, "of_older") == [*items[:5], *both_of("of_older")]
    assert await window_ids(store, "fork") == [*items[:5], *both_of("fork")]
    await store.save(turn("c", conversation_id="conv"))
    assert await conversation_ids(store) == [*items, *both_of("c")]


async def test_a_failed_turn_of_a_conversation_joins_it_not(store: Store) -> None:
    items = await save_conversation(store)
    await store.save(failed("oops2", conversation_id="conv"))
    assert await conversation_ids(store) == items
    assert await input_ids(store, "oops") == ["c.1", "c.2", "a.in", "a.out", "c.3", "c.4", "oops.in"]
    window = await store.conversation_window(OWNER, "conv")
    assert window == await store.window(OWNER, "b")


async def test_the_window_of_a_conversation_begins_with_the_newest_compaction(store: Store) -> None:
    await save_conversation(store)
    await store.add_items(OWNER, "conv", (message("c.5"), compaction("c.short"), message("c.6")), NOW)
    await store.save(turn("c", conversation_id="conv"))
    assert await window_ids(store, "c") == ["c.short", "c.6", *both_of("c")]
    assert await input_ids(store, "c") == ["c.6", "c.in"]
    assert len(await conversation_ids(store) or []) == 14


async def test_two_conversations_are_two(store: Store) -> None:
    await store.create_conversation(OWNER, conversation("one"), (message("one.1"),))
    await store.create_conversation(OWNER, conversation("two"), (message("two.1"),))
    await save_all(store, turn("a", conversation_id="one"), turn("b", conversation_id="two"))
    assert await conversation_ids(store, "one") == ["one.1", *both_of("a")]
    assert await conversation_ids(store, "two") == ["two.1", *both_of("b")]


async def test_no_items_added_change_nothing(store: Store) -> None:
    items = await save_conversation(store)
    assert await store.add_items(OWNER, "conv", (), NOW) is True
    await store.save(turn("c", conversation_id="conv"))
    assert await conversation_ids(store) == [*items, *both_of("c")]


async def test_every_page_of_a_conversation_is_the_slice_next_to_its_cursor(store: Store) -> None:
    items = await save_conversation(store)

    async def give(page: Page) -> Listed[str]:
        found = await store.conversation_items(OWNER, "conv", page)
        assert found is not None
        return Listed(ids_in(found.rows), found.has_more)

    await assert_every_page(give, items)


@each_order
@each_limit
async def test_conversation_items_are_paged_across_turns(store: Store, order: Order, limit: int) -> None:
    items = await save_conversation(store)
    await store.delete_conversation_item(OWNER, "conv", "a.out", NOW)
    items.remove("a.out")
    expected = items if order == "asc" else items[::-1]

    async def give(page: Page) -> Listed[bytes] | None:
        return await store.conversation_items(OWNER, "conv", page)

    assert await walk(give, limit, order) == expected
    assert await walk_back(give, limit, order, expected[-1]) == expected[:-1]


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("cursor", ["nobody", "fork.in", "oops.in", "c.3", "conv"])
async def test_a_cursor_that_is_not_in_the_conversation_is_refused(store: Store, side: str, cursor: str) -> None:
    await save_conversation(store)
    await store.delete_conversation_item(OWNER, "conv", "c.3", NOW)
    with pytest.raises(InvalidRequest) as refused:
        await store.conversation_items(OWNER, "conv", next_to(side, cursor))
    assert (refused.value.param, refused.value.http_status) == (side, 400)


async def test_an_item_of_a_conversation_is_found_by_id(store: Store) -> None:
    items = await save_conversation(store)
    found = [await store.conversation_item(OWNER, "conv", item_id) for item_id in items]
    assert [body is not None and ids_in([body]) == [item_id] for body, item_id in zip(found, items, strict=True)]
    assert ids_in([body for body in found if body]) == items


@pytest.mark.parametrize("item_id", ["nobody", "fork.in", "oops.in", "else"])
async def test_an_item_that_is_elsewhere_is_not_in_the_conversation(store: Store, item_id: str) -> None:
    await save_conversation(store)
    await store.create_conversation(OWNER, conversation("other"), (message("else"),))
    assert await store.conversation_item(OWNER, "conv", item_id) is None
    assert await store.delete_conversation_item(OWNER, "conv", item_id, NOW) is False


async def test_an_item_that_is_taken_out_is_out_of_every_window(store: Store) -> None:
    items = await save_conversation(store)
    assert await store.delete_conversation_item(OWNER, "conv", "c.2", NOW) is True
    assert await store.delete_conversation_item(OWNER, "conv", "c.2", NOW) is False
    items.remove("c.2")
    assert await store.conversation_item(OWNER, "conv", "c.2") is None
    assert await store.items(OWNER, ["c.2"]) == {}
    assert await conversation_ids(store) == items
    assert await window_ids(store, "b") == items
    assert await window_ids(store, "fork") == [*items[:4], *both_of("fork")]
    window = await store.conversation_window(OWNER, "conv")
    assert window is not None
    assert (ids_in(window.items), window.newest) == (items, 6)
    assert await input_ids(store, "a") == ["c.1", "a.in"]


@pytest.mark.parametrize("item_id", ["a.in", "a.out"])
async def test_an_item_that_is_taken_out_stays_with_the_response_that_made_it(store: Store, item_id: str) -> None:
    items = await save_conversation(store)
    before = await store.response(OWNER, "a"), await input_ids(store, "a")
    assert await store.delete_conversation_item(OWNER, "conv", item_id, NOW) is True
    items.remove(item_id)
    assert (await store.response(OWNER, "a"), await input_ids(store, "a")) == before
    assert await store.items(OWNER, [item_id]) == {item_id: message(item_id).body}
    assert await conversation_ids(store) == items
    assert await window_ids(store, "b") == items
    assert await input_ids(store, "b") == [i for i in items if i not in ("a.think", "b.out")]


async def test_an_item_that_is_taken_out_of_the_newest_turn_is_not_counted(store: Store) -> None:
    items = await save_conversation(store)
    await store.delete_conversation_item(OWNER, "conv", "b.in", NOW)
    window = await store.conversation_window(OWNER, "conv")
    assert window is not None
    assert (ids_in(window.items), window.newest) == ([*items[:7], "b.out"], 7)


async def test_a_compaction_that_is_taken_out_begins_no_window(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), (message("c.1"), compaction("c.short"), message("c.2")))
    await store.save(turn("a", conversation_id="conv"))
    await store.delete_conversation_item(OWNER, "conv", "c.short", NOW)
    assert await window_ids(store, "a") == ["c.1", "c.2", *both_of("a")]


async def test_the_compaction_before_the_one_that_is_taken_out_begins_the_window(store: Store) -> None:
    batch = (message("c.1"), compaction("c.short"), message("c.2"), compaction("c.shorter"), message("c.3"))
    await store.create_conversation(OWNER, conversation(), batch)
    outputs = (compaction("a.short"), message("a.2"), compaction("a.shorter"), message("a.3"))
    await store.save(turn("a", conversation_id="conv", outputs=outputs))
    found = [await window_ids(store, "a")]
    for item_id in ("a.shorter", "a.short", "c.shorter", "c.short"):
        await store.delete_conversation_item(OWNER, "conv", item_id, NOW)
        found.append(await window_ids(store, "a"))
    assert found == [
        ["a.shorter", "a.3"],
        ["a.short", "a.2", "a.3"],
        ["c.shorter", "c.3", "a.in", "a.2", "a.3"],
        ["c.short", "c.2", "c.3", "a.in", "a.2", "a.3"],
        ["c.1", "c.2", "c.3", "a.in", "a.2", "a.3"],
    ]


async def test_all_items_can_be_taken_out(store: Store) -> None:
    for item_id in await save_conversation(store):
        assert await store.delete_conversation_item(OWNER, "conv", item_id, NOW) is True
    window = await store.conversation_window(OWNER, "conv")
    assert window is not None
    assert (window.items, window.newest) == ([], 0)
    await store.save(turn("c", conversation_id="conv"))
    assert await window_ids(store, "c") == both_of("c")


async def test_a_response_of_a_conversation_can_be_deleted_and_its_items_stay(store: Store) -> None:
    items = await save_conversation(store)
    assert await store.delete_response(OWNER, "a", NOW) is True
    assert await store.response(OWNER, "a") is None
    assert await conversation_ids(store) == items
    assert await window_ids(store, "b") == items
    await store.delete_response(OWNER, "b", NOW)
    assert await conversation_ids(store) == items
    await store.save(turn("c", conversation_id="conv"))
    assert await window_ids(store, "c") == [*items, *both_of("c")]


async def test_a_deleted_conversation_is_unknown_to_every_verb(store: Store) -> None:
    await save_conversation(store)
    assert await store.delete_conversation(OWNER, "conv", NOW) is True
    assert await store.delete_conversation(OWNER, "conv", NOW) is False
    assert await store.conversation(OWNER, "conv") is None
    assert await store.update_conversation(OWNER, "conv", b"{}") is None
    assert await store.conversation_window(OWNER, "conv") is None
    assert await store.add_items(OWNER, "conv", (message("i"),), NOW) is False
    assert await store.conversation_items(OWNER, "conv", Page()) is None
    assert await store.conversation_item(OWNER, "conv", "c.1") is None
    assert await store.delete_conversation_item(OWNER, "conv", "c.1", NOW) is False
    with pytest.raises(NotFound):
        await store.save(turn("c", conversation_id="conv"))


async def test_an_empty_conversation_can_be_deleted(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    assert await store.delete_conversation(OWNER, "conv", NOW) is True
    assert await store.conversation(OWNER, "conv") is None


async def test_responses_of_a_deleted_conversation_stay_whole(store: Store) -> None:
    items = await save_conversation(store)
    before = [await store.response(OWNER, each) for each in ("a", "b", "fork", "oops")]
    await store.delete_conversation(OWNER, "conv", NOW)
    assert [await store.response(OWNER, each) for each in ("a", "b", "fork", "oops")] == before
    assert await window_ids(store, "b") == items
    assert await input_ids(store, "b") == ["c.1", "c.2", "a.in", "a.out", "c.3", "c.4", "b.in"]
    assert await window_ids(store, "fork") == [*items[:5], *both_of("fork")]
    await save_chain(store, "c", "d", after="b")
    assert await window_ids(store, "d") == [*items, *both_of("c", "d")]


async def test_items_that_no_response_needs_go_with_their_conversation(store: Store) -> None:
    items = await save_conversation(store)
    await store.add_items(OWNER, "conv", (message("c.5"),), NOW)
    await store.delete_conversation(OWNER, "conv", NOW)
    assert await store.items(OWNER, ["c.5"]) == {}
    assert await window_ids(store, "b") == items


async def test_items_that_were_taken_out_stay_out_when_the_conversation_is_deleted(store: Store) -> None:
    items = await save_conversation(store)
    for item_id in ("c.1", "a.out"):
        await store.delete_conversation_item(OWNER, "conv", item_id, NOW)
        items.remove(item_id)
    await store.delete_conversation(OWNER, "conv", NOW)
    assert await window_ids(store, "b") == items
    assert await store.response(OWNER, "a") == kept(turn("a", outputs=(reasoning("a.think"), message("a.out"))))


async def test_a_conversation_may_begin_with_thousands_of_items(store: Store) -> None:
    many = tuple(message(f"c.{number}") for number in range(2000))
    await store.create_conversation(OWNER, conversation(), many)
    assert await conversation_ids(store) == [item.id for item in many][:1000]
    listed = await store.conversation_items(OWNER, "conv", Page(5000, "asc"))
    assert listed == Listed([item.body for item in many], False)


# -- other owners ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ids:
    response: str
    item: str
    conversation: str
    conversation_item: str
    key: str


KNOWN = Ids("a", "a.in", "conv", "c.1", "key")
UNKNOWN = Ids("unknown1", "unknown2", "unknown3", "unknown4", "unknown5")

Ask = Callable[[Store, str, Ids], Awaitable[Any]]
ASK: dict[str, Ask] = {
    "save after a response": lambda s, o, i: s.save(turn("new", i.response, owner=o)),
    "save a failure after a response": lambda s, o, i: s.save(failed("new", i.response, owner=o)),
    "save in a conversation": lambda s, o, i: s.save(turn("new", owner=o, conversation_id=i.conversation)),
    "save a failure in a conversation": lambda s, o, i: s.save(failed("new", owner=o, conversation_id=i.conversation)),
    "response": lambda s, o, i: s.response(o, i.response),
    "responses after": lambda s, o, i: s.responses(o, Page(after=i.response), None),
    "responses before": lambda s, o, i: s.responses(o, Page(before=i.response), None),
    "delete_response": lambda s, o, i: s.delete_response(o, i.response, NOW),
    "window": lambda s, o, i: s.window(o, i.response),
    "window_before": lambda s, o, i: s.window_before(o, i.response),
    "keep_ahead": lambda s, o, i: s.keep_ahead(o, i.response, b"mine"),
    "input_items": lambda s, o, i: s.input_items(o, i.response, Page()),
    "input_items after": lambda s, o, i: s.input_items(o, i.response, Page(after=i.item)),
    "items": lambda s, o, i: s.items(o, [i.item, i.conversation_item]),
    "conversation": lambda s, o, i: s.conversation(o, i.conversation),
    "update_conversation": lambda s, o, i: s.update_conversation(o, i.conversation, b'{"mine":"1"}'),
    "delete_conversation": lambda s, o, i: s.delete_conversation(o, i.conversation, NOW),
    "conversation_window": lambda s, o, i: s.conversation_window(o, i.conversation),
    "add_items": lambda s, o, i: s.add_items(o, i.conversation, (message("new"),), NOW),
    "conversation_items": lambda s, o, i: s.conversation_items(o, i.conversation, Page()),
    "conversation_items after": lambda s, o, i: s.conversation_items(o, i.conversation, Page(after=i.item)),
    "conversation_item": lambda s, o, i: s.conversation_item(o, i.conversation, i.conversation_item),
    "delete_conversation_item": lambda s, o, i: s.delete_conversation_item(o, i.conversation, i.conversation_item, NOW),
    "first_use": lambda s, o, i: s.first_use(o, i.key, NOW),
}


async def outcome(ask: Ask, store: Store, owner: str, ids: Ids) -> Any:
    """The answer, or the error with the ids left out."""
    try:
        return await ask(store, owner, ids)
    except ProxyError as error:
        wire = repr((type(error), error.to_wire(), error.http_status))
        for known in msgspec.to_builtins(ids).values():
            wire = wire.replace(f"'{known}'", "'?'")
        return wire


async def all_of(store: Store) -> list[Any]:
    """Everything that the owner can read of the known objects."""
    asked = ("response", "window", "input_items", "items", "conversation", "conversation_window")
    more = ("conversation_items", "conversation_item", "first_use")
    found = [await ASK[name](store, OWNER, KNOWN) for name in (*asked, *more)]
    return [*found, await store.responses(OWNER, Page(), None), await store.responses(STRANGER, Page(), None)]


@pytest.mark.parametrize("locked", [False, True], ids=["free", "locked"])
@pytest.mark.parametrize("verb", sorted(ASK))
async def test_another_owners_object_is_answered_like_an_unknown_one(store: Store, verb: str, locked: bool) -> None:
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    await store.save(turn("a", conversation_id="conv", first_use=FirstUse("key", b"digest", 20_000)))
    if locked:
        assert await store.acquire(LOCK, NOW, NOW + 60)
    before = await all_of(store)
    foreign = await outcome(ASK[verb], store, STRANGER, KNOWN)
    assert await all_of(store) == before
    assert foreign == await outcome(ASK[verb], store, STRANGER, UNKNOWN)
    if not locked:
        assert foreign == await outcome(ASK[verb], store, OWNER, UNKNOWN)
        mine = await outcome(ASK[verb], store, OWNER, KNOWN)
        assert mine != foreign or verb.startswith("save")
    assert await store.response(STRANGER, "new") is None


async def test_owners_list_their_own_responses_only(store: Store) -> None:
    mine, theirs = turn("a"), turn("b", owner=STRANGER)
    await save_all(store, mine, theirs)
    assert await store.responses(OWNER, Page(), None) == Listed([kept(mine)], False)
    assert await store.responses(STRANGER, Page(), None) == Listed([kept(theirs)], False)
    assert await store.responses("nobody", Page(), None) == Listed([], False)


async def test_an_empty_owner_is_an_owner(store: Store) -> None:
    await save_all(store, turn("a", owner=""), turn("b"))
    assert await store.response("", "a") == kept(turn("a"))
    assert await store.response("", "b") is None
    assert await store.response(OWNER, "a") is None


# -- leases ------------------------------------------------------------------------------------------------------------

ME, YOU = Lock("name", "me"), Lock("name", "you")


async def test_a_free_lease_is_acquired_by_one_only(store: Store) -> None:
    assert await store.acquire(ME, 100.0, 160.0) is True
    assert await store.acquire(YOU, 101.0, 161.0) is False
    assert await store.acquire(Lock("other", "you"), 101.0, 161.0) is True


async def test_the_holder_acquires_its_lease_again(store: Store) -> None:
    await store.acquire(ME, 100.0, 160.0)
    assert await store.acquire(ME, 150.0, 210.0) is True
    assert await store.acquire(YOU, 200.0, 260.0) is False


async def test_a_lease_that_had_run_out_is_acquired(store: Store) -> None:
    await store.acquire(ME, 100.0, 160.0)
    assert await store.acquire(YOU, 160.5, 200.0) is True
    assert await store.acquire(ME, 161.0, 200.0) is False


async def test_a_released_lease_is_free(store: Store) -> None:
    await store.acquire(ME, 100.0, 160.0)
    await store.release(ME)
    assert await store.acquire(YOU, 101.0, 161.0) is True


async def test_only_the_holder_releases(store: Store) -> None:
    await store.acquire(ME, 100.0, 160.0)
    await store.release(YOU)
    await store.release(Lock("other", "me"))
    assert await store.acquire(YOU, 101.0, 161.0) is False


async def test_a_lease_that_is_renewed_lasts_longer(store: Store) -> None:
    await store.acquire(ME, 100.0, 160.0)
    assert await store.renew(ME, 220.0) is True
    assert await store.acquire(YOU, 200.0, 260.0) is False
    assert await store.acquire(YOU, 221.0, 260.0) is True


async def test_a_lost_lease_is_not_renewed(store: Store) -> None:
    assert await store.renew(ME, 160.0) is False
    await store.acquire(ME, 100.0, 160.0)
    await store.acquire(YOU, 161.0, 200.0)
    assert await store.renew(ME, 300.0) is False
    assert await store.acquire(ME, 201.0, 300.0) is True
    await store.release(ME)
    assert await store.renew(ME, 300.0) is False


async def test_one_of_many_at_once_acquires(store: Store) -> None:
    locks = [Lock("name", f"holder{number}") for number in range(50)]
    got = await asyncio.gather(*(store.acquire(lock, 100.0, 160.0) for lock in locks))
    assert got.count(True) == 1
    assert await store.renew(locks[got.index(True)], 170.0) is True


async def test_a_turn_is_saved_under_its_lock_and_gives_it_back(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    await store.acquire(LOCK, NOW, NOW + 60)
    await store.save(turn("a", conversation_id="conv", lock=LOCK))
    assert await conversation_ids(store) == both_of("a")
    assert await store.renew(LOCK, NOW + 60) is False
    assert await store.acquire(Lock(conversation_lease("conv"), "you"), NOW, NOW + 60) is True


async def test_a_turn_without_a_lock_leaves_the_lock_of_another(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    await store.acquire(LOCK, NOW, NOW + 60)
    await store.save(turn("a", conversation_id="conv"))
    assert await store.renew(LOCK, NOW + 60) is True


async def test_a_lock_gives_one_turn(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    await store.acquire(LOCK, NOW, NOW + 60)
    turns = [turn(f"t{number}", conversation_id="conv", lock=LOCK) for number in range(10)]
    results = await asyncio.gather(*(store.save(each) for each in turns), return_exceptions=True)
    saved = [each.id for each, error in zip(turns, results, strict=True) if error is None]
    assert len(saved) == 1
    assert {type(error) for error in results} == {type(None), ConversationLocked}
    assert await conversation_ids(store) == both_of(*saved)


async def test_a_lock_of_a_lease_that_ran_out_is_good_until_another_has_it(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    await store.acquire(LOCK, NOW - 120, NOW - 60)
    await store.save(turn("a", conversation_id="conv", lock=LOCK))
    assert await conversation_ids(store) == both_of("a")


async def lose_to_another(store: Store) -> None:
    await store.acquire(LOCK, NOW, NOW + 1)
    await store.acquire(Lock(conversation_lease("conv"), "you"), NOW + 2, NOW + 60)


async def lose_by_release(store: Store) -> None:
    await store.acquire(LOCK, NOW, NOW + 60)
    await store.release(LOCK)


async def never_had(_store: Store) -> None:
    pass


@pytest.mark.parametrize("lose", [lose_to_another, lose_by_release, never_had])
async def test_a_turn_that_lost_its_lock_is_not_saved(store: Store, lose: Callable[[Store], Awaitable[None]]) -> None:
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    await lose(store)
    first_use = FirstUse("key", b"digest", 20_000)
    for refused in (turn("a", conversation_id="conv"), failed("a", conversation_id="conv")):
        with pytest.raises(ConversationLocked):
            await store.save(msgspec.structs.replace(refused, lock=LOCK, first_use=first_use))
        assert await store.response(OWNER, "a") is None
        assert await store.items(OWNER, both_of("a")) == {}
        assert await store.first_use(OWNER, "key", NOW) is None
        assert await conversation_ids(store) == ["c.1"]


async def test_a_locked_conversation_is_changed_by_nobody_else(store: Store) -> None:
    items = await save_conversation(store)
    await store.acquire(LOCK, NOW, NOW + 60)
    with pytest.raises(ConversationLocked):
        await store.add_items(OWNER, "conv", (message("c.5"),), NOW + 59)
    with pytest.raises(ConversationLocked):
        await store.delete_conversation_item(OWNER, "conv", "c.1", NOW + 59)
    assert await conversation_ids(store) == items
    assert await store.items(OWNER, ["c.5"]) == {}


async def test_another_conversation_is_not_locked(store: Store) -> None:
    await store.create_conversation(OWNER, conversation("other"), (message("o.1"),))
    await store.acquire(LOCK, NOW, NOW + 60)
    assert await store.add_items(OWNER, "other", (message("o.2"),), NOW) is True
    assert await store.delete_conversation_item(OWNER, "other", "o.1", NOW) is True
    assert await conversation_ids(store, "other") == ["o.2"]


@pytest.mark.parametrize("how", ["ran out", "released"])
async def test_a_conversation_whose_lease_is_over_can_be_changed(store: Store, how: str) -> None:
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    await store.acquire(LOCK, NOW, NOW + 60)
    if how == "released":
        await store.release(LOCK)
    now = NOW + (61 if how == "ran out" else 1)
    assert await store.add_items(OWNER, "conv", (message("c.2"),), now) is True
    assert await store.delete_conversation_item(OWNER, "conv", "c.1", now) is True
    assert await conversation_ids(store) == ["c.2"]


async def test_a_lock_is_an_error_that_clients_know(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    await store.acquire(LOCK, NOW, NOW + 60)
    with pytest.raises(ConversationLocked) as locked:
        await store.add_items(OWNER, "conv", (message("i"),), NOW)
    assert (locked.value.error_code, bool(locked.value.message)) == ("conversation_locked", True)


# -- first uses --------------------------------------------------------------------------------------------------------


async def test_a_first_use_is_kept_with_its_response(store: Store) -> None:
    await store.save(turn("a", first_use=FirstUse("key", b"\x00digest\xff", 20_000)))
    assert await store.first_use(OWNER, "key", NOW) == (b"\x00digest\xff", "a")
    assert await store.first_use(OWNER, "other", NOW) is None


async def test_a_first_use_is_forgotten_in_time(store: Store) -> None:
    await store.save(turn("a", first_use=FirstUse("key", b"digest", 20_000)))
    assert await store.first_use(OWNER, "key", 19_999.0) == (b"digest", "a")
    assert await store.first_use(OWNER, "key", 20_001.0) is None
    assert await store.response(OWNER, "a") == kept(turn("a"))


async def test_a_forgotten_key_is_used_again(store: Store) -> None:
    await store.save(turn("a", created_at=1000, first_use=FirstUse("key", b"1", 2000)))
    await store.save(turn("b", created_at=3000, first_use=FirstUse("key", b"2", 4000)))
    assert await store.first_use(OWNER, "key", 3500.0) == (b"2", "b")


async def test_a_key_whose_response_was_deleted_is_used_again(store: Store) -> None:
    await store.save(turn("a", first_use=FirstUse("key", b"1", 20_000)))
    await store.delete_response(OWNER, "a", NOW)
    await store.save(turn("b", first_use=FirstUse("key", b"2", 20_000)))
    assert await store.first_use(OWNER, "key", NOW) == (b"2", "b")


async def test_owners_have_keys_of_their_own(store: Store) -> None:
    await store.save(turn("a", first_use=FirstUse("key", b"1", 20_000)))
    await store.save(turn("b", owner=STRANGER, first_use=FirstUse("key", b"2", 20_000)))
    assert await store.first_use(OWNER, "key", NOW) == (b"1", "a")
    assert await store.first_use(STRANGER, "key", NOW) == (b"2", "b")


async def test_a_purged_response_has_no_first_use(store: Store) -> None:
    await store.save(turn("a", created_at=1000, first_use=FirstUse("key", b"1", 20_000)))
    await store.purge(2000, NOW)
    assert await store.first_use(OWNER, "key", NOW) is None


async def test_a_first_use_outlives_a_purge_that_its_response_outlives(store: Store) -> None:
    await store.save(turn("a", created_at=3000, first_use=FirstUse("key", b"1", 20_000)))
    await store.purge(2000, NOW)
    assert await store.first_use(OWNER, "key", NOW) == (b"1", "a")


# -- housekeeping ------------------------------------------------------------------------------------------------------


async def test_a_secret_is_made_once(store: Store) -> None:
    first = await store.secret("one")
    assert len(first) == 32
    assert await store.secret("one") == first
    other = await store.secret("other")
    assert (len(other), other == first) == (32, False)


async def test_a_secret_asked_for_by_many_at_once_is_one(store: Store) -> None:
    assert len(set(await asyncio.gather(*(store.secret("one") for _ in range(20))))) == 1


async def test_what_was_learned_is_the_newest_of_each_name(store: Store) -> None:
    assert await store.learned() == {}
    await store.keep_learned({"m": b"1", "other": b"\x00\xff"})
    await store.keep_learned({"m": b"2", "": b""})
    await store.keep_learned({})
    assert await store.learned() == {"m": b"2", "other": b"\x00\xff", "": b""}


async def test_of_a_model_with_an_endless_name_nothing_need_be_kept_and_the_others_are(store: Store) -> None:
    await store.keep_learned({ENDLESS: b"1", "m": b"2"})
    assert (await store.learned())["m"] == b"2"


async def test_what_was_learned_outlives_every_response(store: Store) -> None:
    await save_chain(store, "a")
    await store.keep_learned({"m": b"1"})
    await store.purge(NOW, NOW)
    assert await store.learned() == {"m": b"1"}


async def test_a_healthy_store_has_no_problems(store: Store) -> None:
    await save_conversation(store)
    assert await store.problems() == []


async def test_a_purge_of_nothing_does_nothing(store: Store) -> None:
    assert await store.purge(NOW, NOW) == Purged(0, 0)
    await save_chain(store, "a", created_at=2000)
    assert (await store.purge(2000, NOW)).responses == 0
    assert await response_ids(store) == ["a"]


async def test_a_purge_makes_old_responses_unknown(store: Store) -> None:
    await save_all(
        store, *(turn(f"t{at}", created_at=at) for at in (1000, 1999, 2000, 2001)), failed("f", created_at=5)
    )
    assert (await store.purge(2000, NOW)).responses == 3
    assert await response_ids(store) == ["t2000", "t2001"]
    assert await store.response(OWNER, "t1999") is None
    assert await store.items(OWNER, both_of("t1999", "t2000")) == {
        item_id: message(item_id).body for item_id in both_of("t2000")
    }
    assert (await store.purge(2000, NOW)).responses == 0


async def test_a_purge_is_for_all_owners(store: Store) -> None:
    await save_all(store, turn("a"), turn("b", owner=STRANGER))
    assert (await store.purge(2000, NOW)).responses == 2
    assert [await store.response(OWNER, "a"), await store.response(STRANGER, "b")] == [None, None]


async def test_a_purge_leaves_young_descendants_their_window(store: Store) -> None:
    await save_chain(store, "a", "b", created_at=1000)
    await save_chain(store, "c", "d", after="b", created_at=3000)
    await save_chain(store, "fork", after="a", created_at=3000)
    assert (await store.purge(2000, NOW)).responses == 2
    assert await response_ids(store) == ["c", "d", "fork"]
    assert await window_ids(store, "d") == both_of(*"abcd")
    assert await window_ids(store, "fork") == both_of("a", "fork")
    assert await input_ids(store, "c") == [*both_of("a", "b"), "c.in"]


async def test_a_purge_counts_no_response_twice(store: Store) -> None:
    await save_chain(store, "a", created_at=1000)
    await save_chain(store, "b", after="a", created_at=3000)
    assert [(await store.purge(at, NOW)).responses for at in (2000, 2000, 4000, 4000)] == [1, 0, 1, 0]


async def test_a_purge_leaves_what_a_conversation_holds(store: Store) -> None:
    items = await save_conversation(store)
    purged = await store.purge(5000, NOW)
    assert purged.responses == 2  # the failed turn and the fork are not the conversation's
    assert await response_ids(store) == ["a", "b"]
    assert await conversation_ids(store) == items
    assert await window_ids(store, "b") == items


async def test_responses_of_a_deleted_conversation_begin_to_age(store: Store) -> None:
    await save_conversation(store)
    await store.delete_conversation(OWNER, "conv", NOW)
    assert await response_ids(store) == ["a", "oops", "b", "fork"]
    assert (await store.purge(NOW + 1, NOW)).responses == 4
    assert await response_ids(store) == []


async def test_responses_of_a_deleted_conversation_age_from_its_end(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), (message("c.1"),))
    await store.save(turn("a", conversation_id="conv", created_at=1000))
    await store.delete_conversation(OWNER, "conv", NOW)
    assert (await store.purge(NOW, NOW)).responses == 0
    assert await window_ids(store, "a") == ["c.1", *both_of("a")]
    assert (await store.purge(NOW + 1, NOW)).responses == 1


async def test_a_purge_leaves_living_leases(store: Store) -> None:
    await store.acquire(ME, NOW, NOW + 60)
    await store.acquire(Lock("old", "me"), NOW - 60, NOW - 1)
    await store.purge(NOW, NOW)
    assert await store.renew(ME, NOW + 60) is True
    assert await store.acquire(Lock("old", "you"), NOW, NOW + 60) is True


# -- many at once ------------------------------------------------------------------------------------------------------


async def test_two_hundred_turns_saved_at_once_are_all_there(store: Store) -> None:
    await save_chain(store, "root")
    turns = [turn(f"t{number}", "root" if number % 2 else None) for number in range(200)]
    await asyncio.gather(*(store.save(each) for each in turns))
    assert [await store.response(OWNER, each.id) for each in turns] == [kept(each) for each in turns]
    assert sorted(await response_ids(store)) == sorted(["root", *(each.id for each in turns)])
    for each in turns:
        assert await window_ids(store, each.id) == both_of(*(["root"] if each.previous_id else []), each.id)


async def test_two_children_saved_at_once_do_not_see_each_other(store: Store) -> None:
    await save_chain(store, "a")
    await asyncio.gather(store.save(turn("left", "a")), store.save(turn("right", "a")))
    await asyncio.gather(store.save(turn("left2", "left")), store.save(turn("right2", "right")))
    assert await window_ids(store, "left2") == both_of("a", "left", "left2")
    assert await window_ids(store, "right2") == both_of("a", "right", "right2")


async def test_chains_that_grow_at_once_stay_apart(store: Store) -> None:
    async def grow(name: str) -> list[str]:
        names = [f"{name}{number}" for number in range(12)]
        await save_chain(store, *names, after="root")
        return names

    await save_chain(store, "root")
    chains = await asyncio.gather(*(grow(name) for name in "abcdefgh"))
    assert [await window_ids(store, chain[-1]) for chain in chains] == [both_of("root", *chain) for chain in chains]


async def test_everything_put_into_a_conversation_at_once_is_there_once(store: Store) -> None:
    await store.create_conversation(OWNER, conversation(), ())
    turns = [turn(f"t{number}", conversation_id="conv") for number in range(30)]
    batches = [(message(f"i{number}.1"), message(f"i{number}.2")) for number in range(30)]
    saves = [store.save(each) for each in turns]
    await asyncio.gather(*saves, *(store.add_items(OWNER, "conv", batch, NOW) for batch in batches))
    found = await conversation_ids(store) or []
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert sorted(pairs) == sorted([(f"t{n}.in", f"t{n}.out") for n in range(30)] + [(a.id, b.id) for a, b in batches])
    for each in turns:
        assert await window_ids(store, each.id) == found[: found.index(f"{each.id}.out") + 1]


async def test_a_reader_sees_a_whole_turn_or_none(store: Store) -> None:
    turns = [turn(f"t{number}") for number in range(50)]
    saving = asyncio.gather(*(store.save(each) for each in turns))
    while not saving.done():
        for each in turns[::7]:
            response, window = await store.response(OWNER, each.id), await store.window(OWNER, each.id)
            assert response in (None, kept(each))
            assert window is None or ids_in(window.items) == both_of(each.id)
            assert response is None or window is not None
    await saving
    assert [await store.response(OWNER, each.id) for each in turns] == [kept(each) for each in turns]


async def test_a_reader_beside_deletions_sees_a_whole_window_or_none(store: Store) -> None:
    for begin in range(0, 400, 50):
        names = [f"t{number}" for number in range(begin, begin + 50)]
        await asyncio.gather(*(store.save(turn(name)) for name in names))
        deleting = asyncio.gather(*(store.delete_response(OWNER, name, NOW) for name in names))
        windows, listed = await asyncio.gather(
            asyncio.gather(*(window_ids(store, name) for name in names)), store.responses(OWNER, ALL_ASC, None)
        )
        await deleting
        assert [pair for pair in zip(windows, names, strict=True) if pair[0] not in (None, both_of(pair[1]))] == []
        assert [response for response in listed.rows if not response.outputs] == []


async def test_refused_saves_among_others_take_nothing_with_them(store: Store) -> None:
    turns = [turn(f"t{number}", "nobody" if number % 3 == 0 else None) for number in range(60)]
    results = await asyncio.gather(*(store.save(each) for each in turns), return_exceptions=True)
    assert [type(result) for result in results] == [InvalidRequest if n % 3 == 0 else type(None) for n in range(60)]
    assert sorted(await response_ids(store)) == sorted(each.id for each in turns if each.previous_id is None)


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_a_cancelled_save_is_whole_or_nothing_and_hinders_nobody(store: Store, steps: int) -> None:
    """A client that goes away cancels its turn at any step of the loop."""
    turns = [turn(f"t{number}") for number in range(20)]
    tasks = [asyncio.create_task(store.save(each)) for each in turns]
    for _ in range(steps):
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for result in results[1::2] if result] == []
    await save_chain(store, "after", "after2")
    assert await window_ids(store, "after2") == both_of("after", "after2")
    for each, result in zip(turns, results, strict=True):
        response = await store.response(OWNER, each.id)
        assert response == kept(each) or (response is None and isinstance(result, asyncio.CancelledError))
        assert await window_ids(store, each.id) == (both_of(each.id) if response else None)
        assert set(await store.items(OWNER, both_of(each.id))) == set(both_of(each.id) if response else [])


async def test_deleting_and_saving_at_once_leaves_whole_windows(store: Store) -> None:
    """A child is refused, or has its parent's items: whichever came first."""
    for number in range(30):
        parent, child = f"p{number}", f"c{number}"
        await store.save(turn(parent))
        saving = store.save(turn(child, parent))
        both = [saving, store.delete_response(OWNER, parent, NOW)]
        await asyncio.gather(*(both if number % 2 else reversed(both)), return_exceptions=True)
        assert await window_ids(store, child) in (None, both_of(parent, child))
        assert await store.response(OWNER, parent) is None
