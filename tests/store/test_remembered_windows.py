"""The window that a connection remembers after a turn is the one that a store gives."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_builders import compaction, message, reasoning, turn

from past import NO_WINDOW
from remembered import Memory, window_after
from store import StoreSettings, open_store
from verbs import NewItem, NewTurn, Window

KINDS = {"message": message, "reasoning": reasoning, "compaction": compaction}
OUTPUTS = st.lists(st.sampled_from(sorted(KINDS)), max_size=4)
INPUTS = st.lists(st.sampled_from(["message", "reasoning", "hidden"]), max_size=4)


def item(kind: str, item_id: str) -> NewItem:
    if kind == "hidden":
        return msgspec.structs.replace(message(item_id), is_hidden=True)
    return KINDS[kind](item_id)


def turns(shapes: list[tuple[list[str], list[str]]]) -> list[NewTurn]:
    """A chain of turns with items of these kinds."""
    return [
        turn(
            f"resp_{number}",
            f"resp_{number - 1}" if number else None,
            inputs=tuple(item(kind, f"in_{number}_{at}") for at, kind in enumerate(inputs)),
            outputs=tuple(item(kind, f"out_{number}_{at}") for at, kind in enumerate(outputs)),
        )
        for number, (inputs, outputs) in enumerate(shapes)
    ]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(INPUTS, OUTPUTS), min_size=1, max_size=6))
async def test_a_remembered_window_is_what_a_store_gives(shapes: list[tuple[list[str], list[str]]]) -> None:
    store, window = await open_store(StoreSettings(path=":memory:")), NO_WINDOW
    try:
        for each in turns(shapes):
            await store.save(each)
            window = window_after(window, each)
            assert msgspec.structs.asdict(window) == msgspec.structs.asdict(await store.window(each.owner, each.id))  # type: ignore[arg-type]
    finally:
        await store.close()


def remembering(owner: str = "me", limit_bytes: int = 1000) -> tuple[Memory, NewTurn]:
    """A memory with one turn in it, in the lane that has no name."""
    memory = Memory(owner, limit_bytes)
    (kept,) = turns([(["message"], ["message"])])
    kept = msgspec.structs.replace(kept, is_brief=True)
    memory.lane(None).keep(kept, NO_WINDOW)
    return memory, kept


def test_items_are_shared_and_not_copied() -> None:
    memory, kept = remembering()
    first = memory.window("me", kept.id)
    assert isinstance(first, Window)
    second = window_after(first, turns([([], []), (["message"], [])])[1])
    assert all(one is other for one, other in zip(first.items, second.items, strict=False))


@pytest.mark.parametrize("owner", ["", "somebody else"])
def test_only_the_owner_of_the_connection_has_its_memory(owner: str) -> None:
    memory, kept = remembering()
    assert memory.lane("other").window(owner, kept.id) is None
    assert memory.lane("other").window("me", kept.id) is not None


@pytest.mark.parametrize("status", ["failed", "cancelled", "queued"])
def test_what_nothing_can_continue_changes_nothing(status: str) -> None:
    memory, kept = remembering()
    memory.lane(None).keep(msgspec.structs.replace(kept, id="resp_other", status=status), NO_WINDOW)
    assert memory.window("me", kept.id) is not None
    assert memory.window("me", "resp_other") is None
