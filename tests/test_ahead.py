"""Compaction ahead of the next turn, through the running proxy: who does it, who uses it, and when it is dropped."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from compacting import (
    ANSWER,
    DOUBLE,
    LONG,
    LOW,
    Talker,
    answered,
    asked,
    backend,
    broken,
    called,
    each_mode,
    facts_of,
    held,
    in_turn,
    kinds,
    metrics,
    record_of,
    said,
    texts_of,
    tokens_of,
    turn,
    until,
    user,
)
from conftest import App, StartApp, at, both_stores, no_task_is_left, running_app, settings_of
from controlled import Verb, controlled
from store_places import Place
from test_background import StartOnStore, on_store

__all__ = ["backend", "on_store"]
pytestmark = both_stores
Json = dict[str, Any]
AHEAD: Json = {"threshold_tokens": 1000, "ahead": True}
DONE = 'compactions_total{cause="ahead"}'


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Verb:
    """What puts the work into the store."""
    return controlled("keep_ahead", monkeypatch)


@pytest.fixture
async def app(start_app: StartApp, kept: Verb) -> App:
    return await start_app(compaction=AHEAD)


async def long_turn(app: App, kept: Verb, mode: str = "plain", **options: Any) -> Json:
    """A turn above the threshold, after which the work for the next one was done."""
    before = kept.done
    response = await turn(app, mode, f"FACT 1: red. {LONG}", **options)
    await until(lambda: kept.done > before)
    return response


async def next_turn(app: App, response: Json, mode: str = "plain") -> Json:
    return await turn(app, mode, "Go on.", previous_response_id=response["id"])


@each_mode
async def test_the_next_turn_begins_with_what_was_made_before_it(
    app: App, backend: Talker, kept: Verb, mode: str
) -> None:
    parent = await long_turn(app, kept, mode)
    assert (kinds(parent["output"]), len(backend.records)) == (["message"], 1)
    child = await next_turn(app, parent, mode)
    assert (kinds(child["output"]), len(backend.records)) == (DOUBLE, 1)
    sent = backend.turns[-1].body["messages"]
    assert (tokens_of(sent) < AHEAD["threshold_tokens"], facts_of(str(sent))) == (True, ["FACT 1: red"])
    assert sent[-1]["content"] == "Go on."
    assert child["usage"]["input_tokens"] == tokens_of(sent)
    assert (await metrics(app))[DONE] == 1


async def test_a_turn_below_the_threshold_causes_no_work(app: App, backend: Talker) -> None:
    parent = await turn(app, "plain", "Hi")
    assert kinds((await next_turn(app, parent))["output"]) == ["message"]
    assert (backend.records, len(backend.requests)) == ([], 2)


async def test_a_threshold_of_the_client_counts_too(start_app: StartApp, backend: Talker, kept: Verb) -> None:
    app = await start_app(compaction={"ahead": True})
    asked_for: Any = [{"type": "compaction", "compact_threshold": 1000}]
    parent = await long_turn(app, kept, context_management=asked_for)
    child = await turn(app, "plain", "Go on.", previous_response_id=parent["id"], context_management=asked_for)
    assert (kinds(child["output"]), len(backend.records)) == (DOUBLE, 1)


async def test_a_turn_that_is_not_kept_causes_no_work(app: App, backend: Talker) -> None:
    await turn(app, "plain", LONG, store=False)
    await turn(app, "plain", "Hi")
    assert backend.records == []


async def test_both_branches_begin_with_the_same_work(app: App, backend: Talker, kept: Verb) -> None:
    parent = await long_turn(app, kept)
    children = await asyncio.gather(*(next_turn(app, parent, mode) for mode in ("plain", "streamed", "background")))
    assert [kinds(child["output"]) for child in children] == [DOUBLE] * 3
    assert (len({child["output"][0]["id"] for child in children}), len(backend.records)) == (3, 1)
    assert [facts_of(texts_of(request.body)) for request in backend.turns[1:]] == [["FACT 1: red"]] * 3


async def test_a_conversation_begins_with_it(app: App, backend: Talker, kept: Verb) -> None:
    conversation = await app.openai.conversations.create()
    await long_turn(app, kept, conversation=conversation.id)
    child = await turn(app, "plain", "Go on.", conversation=conversation.id)
    assert (kinds(child["output"]), len(backend.records)) == (DOUBLE, 1)


async def test_a_long_chain_waits_for_no_record(app: App, backend: Talker, kept: Verb) -> None:
    """Where answers are what makes it long: records are made between two turns, and no fact is lost."""
    backend.answer = lambda body: answered(body, ANSWER * 20)
    parent: Json = {"id": None}
    for number in range(30):
        made = kept.done
        parent = await turn(app, "plain", f"FACT {number}: red.", previous_response_id=parent["id"])
        answer_tokens = parent["usage"]["output_tokens"]
        if tokens_of(backend.turns[-1].body["messages"]) + answer_tokens >= AHEAD["threshold_tokens"]:
            await until(lambda made=made: kept.done > made)
    found = await metrics(app)
    assert (found[DONE] >= 5, found['compactions_total{cause="threshold"}'] <= 1) == (True, True)
    assert set(facts_of(texts_of(backend.turns[-1].body))) == {f"FACT {number}: red" for number in range(30)}


async def test_where_compaction_cannot_help_nothing_is_made_ahead(app: App, backend: Talker) -> None:
    """Instructions take all the room: the next turn would not use it, and no turn after that."""
    parent: Json = {"id": None}
    for _ in range(3):
        options = {"previous_response_id": parent["id"], "instructions": LONG}
        parent = await turn(app, "plain", "Hi", **options)
        assert kinds(parent["output"]) == ["message"]
    await turn(app, "plain", "Hi", store=False)
    assert backend.records == []


async def test_a_call_that_waits_is_answered_after_it(app: App, backend: Talker, kept: Verb) -> None:
    backend.answer = in_turn(lambda body: called(body, "call_7"), said)
    tools: Any = [{"type": "function", "name": "look", "parameters": {}}]
    parent = await long_turn(app, kept, tools=tools)
    output = {"type": "function_call_output", "call_id": "call_7", "output": "seen"}
    child = await turn(app, "plain", [output], previous_response_id=parent["id"], tools=tools)
    assert (kinds(child["output"]), len(backend.records)) == (DOUBLE, 1)
    *_, call, result = backend.turns[-1].body["messages"]
    assert (call["tool_calls"][0]["id"], result["tool_call_id"]) == ("call_7", "call_7")


async def test_what_does_not_fit_with_the_new_input_is_made_anew(app: App, backend: Talker, kept: Verb) -> None:
    parent = await long_turn(app, kept)
    child = await turn(app, "plain", f"FACT 2: blue. {LONG * 2}", previous_response_id=parent["id"])
    assert (kinds(child["output"]), len(backend.records) >= 2) == (DOUBLE, True)
    assert facts_of(texts_of(backend.turns[-1].body)) == ["FACT 1: red", "FACT 2: blue"]


async def test_a_turn_that_comes_too_early_does_it_itself(app: App, backend: Talker, kept: Verb) -> None:
    backend.record, goes_on = held()
    parent = await turn(app, "plain", f"FACT 1: red. {LONG}")
    await backend.asked_for_record()
    backend.record = record_of
    child = await next_turn(app, parent)
    assert (kinds(child["output"]), len(backend.records)) == (DOUBLE, 2)
    goes_on.set()
    await until(lambda: kept.done)


async def test_a_record_that_fails_leaves_the_work_to_the_next_turn(app: App, backend: Talker) -> None:
    backend.record = in_turn(broken, record_of)
    parent = await turn(app, "plain", f"FACT 1: red. {LONG}")

    async def has_failed() -> bool:
        return (await metrics(app))['compaction_failures_total{cause="ahead"}'] == 1

    await until(has_failed)
    child = await next_turn(app, parent)
    assert (kinds(child["output"]), facts_of(texts_of(backend.turns[-1].body))) == (DOUBLE, ["FACT 1: red"])


# -- several processes -------------------------------------------------------------------------------------------------


async def test_another_process_uses_it(on_store: StartOnStore, backend: Talker, kept: Verb) -> None:
    first, second = [await on_store(compaction=AHEAD) for _ in range(2)]
    parent = await long_turn(first, kept)
    assert kinds((await next_turn(second, parent))["output"]) == DOUBLE
    assert len(backend.records) == 1


async def test_a_background_turn_is_followed_by_one_record_of_all_processes(
    on_store: StartOnStore, backend: Talker, kept: Verb
) -> None:
    first, second = [await on_store(compaction=AHEAD) for _ in range(2)]
    parent = await long_turn(first, kept, "background")
    children = [await next_turn(process, parent, "background") for process in (first, second)]
    assert [kinds(child["output"]) for child in children] == [DOUBLE] * 2
    assert len(backend.records) == 1


async def test_a_process_that_stops_drops_the_work(backend: Talker, place: Place) -> None:
    settings = settings_of(backend.url, **at(place, {"compaction": AHEAD}))
    backend.record, goes_on = held()
    async with running_app(settings) as app:
        parent = await turn(app, "plain", f"FACT 1: red. {LONG}")
        record = await backend.asked_for_record()
    assert await record.is_let_go()
    await no_task_is_left()
    goes_on.set()
    backend.record = record_of
    async with running_app(settings) as app:
        assert kinds((await next_turn(app, parent))["output"]) == DOUBLE
        await until(lambda: len(backend.records) == 2)


# -- what is deleted ---------------------------------------------------------------------------------------------------


def works_in(place: Place) -> int:
    return int(place.asked("SELECT count(*) FROM turn WHERE ahead IS NOT NULL")[0][0])


async def test_it_goes_with_its_response(on_store: StartOnStore, kept: Verb, place: Place) -> None:
    app = await on_store(compaction=AHEAD)
    parent = await long_turn(app, kept)
    assert works_in(place) == 1
    await app.openai.responses.delete(parent["id"])
    assert works_in(place) == 0


async def test_it_goes_with_its_conversation(on_store: StartOnStore, kept: Verb, place: Place) -> None:
    app = await on_store(compaction=AHEAD)
    conversation = await app.openai.conversations.create()
    await long_turn(app, kept, conversation=conversation.id)
    assert works_in(place) == 1
    await app.openai.conversations.delete(conversation.id)
    assert works_in(place) == 0


@pytest.mark.parametrize("when", ["before", "during"])
async def test_an_item_that_is_taken_out_is_told_to_no_model(app: App, backend: Talker, kept: Verb, when: str) -> None:
    """The work that held it is dropped; the next turn does its own, of what is left."""
    secret = {"type": "message", "role": "user", "content": "FACT 9: secret."}
    conversation = await app.openai.conversations.create(items=[secret])  # type: ignore[list-item]
    backend.record, goes_on = held()
    if when == "before":
        goes_on.set()
    made = kept.done
    await turn(app, "plain", f"FACT 1: red. {LONG}", conversation=conversation.id)
    await backend.asked_for_record()
    if when == "before":
        await until(lambda: kept.done > made)
    items = (await asked(app, f"/conversations/{conversation.id}/items?order=asc"))["data"]
    await app.openai.conversations.items.delete(items[0]["id"], conversation_id=conversation.id)
    goes_on.set()
    await until(lambda: kept.done > made)
    child = await turn(app, "plain", [user("Go on.")], conversation=conversation.id)
    assert (kinds(child["output"]), len(backend.records)) == (DOUBLE, 2)
    assert facts_of(texts_of(backend.turns[-1].body)) == ["FACT 1: red"]


async def test_without_the_setting_nothing_is_made_ahead(start_app: StartApp, backend: Talker) -> None:
    app = await start_app(compaction=LOW)
    parent = await turn(app, "plain", LONG)
    assert kinds((await next_turn(app, parent))["output"]) == DOUBLE
    assert (await metrics(app))[DONE] == 0


async def test_no_more_than_four_are_made_at_once_and_the_others_are_left_to_their_next_turn(
    app: App, backend: Talker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend.record, goes_on = held()
    # At once, before anything is learned of the model: else the later ones are compacted in their own path.
    parents = await asyncio.gather(*(turn(app, "plain", f"FACT {number}: red. {LONG}") for number in range(6)))
    await until(lambda: caplog.text.count("is left to the next turn") == 2)
    await until(lambda: len(backend.records) == 4)
    goes_on.set()
    assert kinds((await next_turn(app, parents[-1]))["output"]) == DOUBLE
