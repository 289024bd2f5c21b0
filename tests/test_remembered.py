"""What a connection remembers of what is not stored: the same as a store would, folds and counts included."""

from __future__ import annotations

import json
from typing import Any

import pytest
from compacting import (
    BLOB,
    DOUBLE,
    LONG,
    LOW,
    TRIGGER,
    Talker,
    answered,
    app,
    assistant,
    backend,
    compacted,
    facts_of,
    in_turn,
    kinds,
    low,
    said,
    texts_of,
    tokens_of,
    user,
)
from conftest import App, StartApp
from scripted import refused
from socket_client import Json, Socket, connected

__all__ = ["app", "backend", "low"]
COMPACT_AT_4000 = [{"type": "compaction", "compact_threshold": 4000}]


async def facts(client: Socket, numbers: range, **fields: Any) -> Json:
    """The last response of a chain of long turns with a fact in each."""
    response: Json = {"id": None}
    for number in numbers:
        told = f"FACT {number}: red. {LONG}"
        response = await client.turn(told, previous_response_id=response["id"], **fields)
    return response


def facts_told(backend: Talker) -> set[str]:
    """What the backend was told in the last turn."""
    return set(facts_of(texts_of(backend.turns[-1].body)))


FACTS = {f"FACT {number}: red" for number in range(1, 6)}


async def test_a_chain_over_the_threshold_is_compacted_and_goes_on_from_the_fold(low: App, backend: Talker) -> None:
    async with connected(low) as client:
        last = await facts(client, range(1, 6))
        assert kinds(last["output"]) == DOUBLE
        records = len(backend.records)
        await client.turn("And now?", previous_response_id=last["id"])
    assert facts_told(backend) == FACTS
    assert tokens_of(backend.turns[-1].body["messages"]) < LOW["threshold_tokens"]
    assert len(backend.records) == records


async def test_a_trigger_compacts_what_is_remembered(app: App, backend: Talker) -> None:
    async with connected(app) as client:
        last = await facts(client, range(1, 6))
        fold = await client.turn([TRIGGER], previous_response_id=last["id"])
        assert kinds(fold["output"]) == ["compaction"]
        assert fold["output"][0][BLOB]
        turns = len(backend.turns)
        await client.turn("And now?", previous_response_id=fold["id"])
        assert len(backend.turns) == turns + 1
    assert facts_told(backend) == FACTS


async def test_a_window_that_the_backend_refuses_is_compacted_from_memory(app: App, backend: Talker) -> None:
    full = refused(400, "This model's maximum context length is 3000 tokens. Your request has 3100 input tokens.")
    async with connected(app) as client:
        last = await facts(client, range(1, 6))
        backend.answer = in_turn(lambda body: full, said)
        last = await client.turn("And now?", previous_response_id=last["id"])
        assert kinds(last["output"]) == DOUBLE
        await client.turn("And then?", previous_response_id=last["id"])
    assert facts_told(backend) == FACTS


async def test_an_item_that_a_client_carried_takes_the_place_of_what_is_remembered(app: App, backend: Talker) -> None:
    async with connected(app) as client:
        last = await facts(client, range(1, 6))
        fold = await client.turn([TRIGGER], previous_response_id=last["id"])
        begun = await client.turn([*fold["output"], user("And now?")], lane="b")
        await client.turn("And then?", lane="b", previous_response_id=begun["id"])
    assert facts_told(backend) == FACTS


async def test_what_stands_before_a_carried_item_is_remembered_through_it(app: App, backend: Talker) -> None:
    fold = (await compacted(app, {"input": "FACT 1: red. " + LONG}))["output"][-1]
    async with connected(app) as client:
        first = await client.turn([{"type": "message", "role": "developer", "content": "Be brief."}, user("A")])
        second = await client.turn([fold, user("B")], previous_response_id=first["id"])
        await client.turn("C", previous_response_id=second["id"])
    assert backend.turns[-1].body["messages"][0] == {"role": "system", "content": "Be brief."}


async def test_what_the_backend_counted_is_remembered(app: App, backend: Talker) -> None:
    """A few words, of which the backend says that they are many tokens."""
    backend.answer = lambda body: answered(body, "one", output_tokens=5000)
    async with connected(app) as client:
        first = await client.turn("A", context_management=COMPACT_AT_4000)
        assert (kinds(first["output"]), first["usage"]["output_tokens"]) == (["message"], 5000)
        second = await client.turn("B", previous_response_id=first["id"], context_management=COMPACT_AT_4000)
        assert kinds(second["output"]) == DOUBLE


SAID: list[Any] = [
    "A",
    [user("B"), assistant("Half of it."), user("C")],
    [{"type": "message", "role": "developer", "content": "Be brief."}, user("D")],
    [{"type": "additional_tools", "role": "developer", "tools": [{"type": "function", "name": "look"}]}, user("E")],
    [TRIGGER],
    "F",
    [{"type": "configuration_update", "reasoning": {"effort": "low"}}, user("G")],
]


@pytest.mark.parametrize("start", [0, 2, 4])
async def test_a_backend_is_told_the_same_of_a_remembered_chain_as_of_a_stored_one(
    start_app: StartApp, backend: Talker, start: int
) -> None:
    told: list[list[Json]] = []
    for store in (True, False):
        app = await start_app(compaction={"threshold_tokens": 3000})  # one that has learned nothing of the model yet
        backend.requests.clear()
        async with connected(app) as client:
            response = await facts(client, range(1, 4), store=store)
            for each in SAID[start:]:
                response = await client.turn(each, previous_response_id=response["id"], store=store)
        told.append([json.loads(request.raw) for request in backend.requests])
    assert told[0] == told[1]
    assert len(told[0]) > len(SAID[start:]) + 3
