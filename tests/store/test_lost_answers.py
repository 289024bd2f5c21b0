"""Writes whose answers are lost on the way: each is made once, and told as made, where that can be known."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from losses import QUICK, Site
from store_builders import NOW, OWNER, message, turn

from quota_verbs import Charge, Used
from run_verbs import NewRun, QueueLimits, RunStore
from store import StoreSettings
from store_postgres import open_store
from verbs import Conversation, Listed, Lock, Page

pytest_plugins = ["loss_fixtures"]


@pytest.fixture
async def store(site: Site) -> AsyncIterator[RunStore]:
    """On one connection, which knows its statements already."""
    store = await open_store(StoreSettings(path=site.url, **{**QUICK, "pool_size": 1}))
    yield store
    await store.close()


def own(name: str) -> str:
    return f"{name}_{uuid.uuid4().hex}"


# Verb -> what makes the arguments of a call of it.
async def a_turn(store: RunStore) -> tuple[Any, ...]:
    return (turn(own("resp")),)


async def a_run(store: RunStore) -> tuple[Any, ...]:
    return NewRun(turn(own("resp"), status="queued", completed_at=None), b"{}", NOW), QueueLimits(100, 100)


async def a_conversation(store: RunStore) -> tuple[Any, ...]:
    name = own("conv")
    return OWNER, Conversation(name, NOW, b"{}"), (message(f"{name}.in"),)


async def items_of_a_conversation(store: RunStore) -> tuple[Any, ...]:
    owner, conversation, _ = given = await a_conversation(store)
    await store.create_conversation(*given)
    return owner, conversation.id, (message(own("msg")),), NOW


async def a_kept_response(store: RunStore) -> tuple[Any, ...]:
    (kept,) = await a_turn(store)
    await store.save(kept)
    return OWNER, kept.id, NOW


async def a_kept_conversation(store: RunStore) -> tuple[Any, ...]:
    owner, conversation, _ = given = await a_conversation(store)
    await store.create_conversation(*given)
    return owner, conversation.id, NOW


async def a_queued_response(store: RunStore) -> tuple[Any, ...]:
    run, limits = await a_run(store)
    await store.admit(run, limits)
    return OWNER, run.turn.id, NOW, NOW


async def a_lock(store: RunStore) -> tuple[Any, ...]:
    return Lock(own("name"), "me"), NOW, NOW + 60


MADE = {
    "save": a_turn,
    "admit": a_run,
    "create_conversation": a_conversation,
    "add_items": items_of_a_conversation,
    "delete_response": a_kept_response,
    "delete_conversation": a_kept_conversation,
    "stop": a_queued_response,
    "acquire": a_lock,
}


@pytest.mark.parametrize("verb", MADE)
async def test_a_write_whose_answer_was_lost_is_made_once_and_told_as_made(
    site: Site, store: RunStore, verb: str
) -> None:
    usual = await getattr(store, verb)(*await MADE[verb](store))
    given = await MADE[verb](store)
    site.relay.loses_answer = True
    told = await getattr(store, verb)(*given)
    assert not site.relay.loses_answer
    assert type(told) is type(usual)
    assert told == usual or verb == "stop"
    assert await is_made(store, verb, given)


async def is_made(store: RunStore, verb: str, given: tuple[Any, ...]) -> bool:
    """Once, and whole."""
    page = Page(limit=100)
    if verb in ("save", "admit"):
        kept = given[0] if verb == "save" else given[0].turn
        return [await store.response(OWNER, kept.id)] != [None]
    if verb == "create_conversation":
        return len((await store.conversation_items(OWNER, given[1].id, page) or Listed([], False)).rows) == 1
    if verb == "add_items":
        return len((await store.conversation_items(OWNER, given[1], page) or Listed([], False)).rows) == 2
    if verb == "delete_conversation":
        return await store.conversation(OWNER, given[1]) is None
    kept = await store.response(OWNER, given[1]) if verb in ("delete_response", "stop") else None
    return kept is None if verb != "stop" else kept is not None and kept.status == "cancelled"


async def test_a_charge_whose_answer_was_lost_is_on_the_account_once(site: Site, store: RunStore) -> None:
    """Even where it has used up what there was: who is granted something is told so."""
    owner = own("owner")
    wish = Charge(
        **{"owner": owner, "holder": "me", "now": NOW, "in_flight": 0, "tokens_s": 20.0},
        **{"has_wish": True, "requests_s": 60.0, "most_requests_s": 0.0},
    )
    await store.charge(Charge(owner=owner, holder="me", now=NOW, in_flight=0))
    site.relay.loses_answer = True
    assert await store.charge(wish) == Used(True, NOW + 60, NOW + 20, 0, 0.0)
    assert not site.relay.loses_answer
    assert await store.charge(wish) == Used(False, NOW + 60, NOW + 40, 0, 0.0)
