"""What is learned of a model's tokens, through the running proxy: it makes first estimates better, and is kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from compacting import FILLER, MODES, Talker, answered, asked, backend, turn
from conftest import App, StartApp, at, running_app, settings_of
from controlled import controlled
from replicas import StartReplica, replica
from scripted import DEADLINE_S, Script
from store_places import Place

from errors import StoreError

__all__ = ["backend", "replica"]
Json = dict[str, Any]
# A model whose vocabulary has far more tokens for a text than others have.
WEIGHT = 3


def count_of(messages: list[Json]) -> int:
    return sum(20 + WEIGHT * len(message["content"]) // 4 for message in messages)


def counted(body: Json) -> Script:
    """An answer with the counts of that model."""
    script = answered(body, "Yes.")
    usage = {"prompt_tokens": count_of(body["messages"]), "completion_tokens": 3, "total_tokens": 0}
    told = json.loads(b"".join(step for step in script.steps if isinstance(step, bytes)))
    return Script([json.dumps({**told, "usage": usage}).encode()])


def kept_at(place: Place) -> dict[str, bytes]:
    return dict(place.asked("SELECT name, value FROM learned"))


async def estimate(app: App, text: str) -> int:
    told = await asked(app, "/responses/input_tokens", {"model": "m", "input": text})
    return int(told["input_tokens"])


async def taught(app: App) -> None:
    for length in range(1, 12):
        await turn(app, "plain", FILLER * length)


QUESTION = FILLER * 30
TRUE = count_of([{"content": QUESTION}])


async def test_what_is_learned_of_a_model_is_kept_over_a_restart(backend: Talker, place: Place) -> None:
    backend.answer = counted
    settings = settings_of(backend.url, **at(place, {}))
    async with running_app(settings) as app:
        at_first = await estimate(app, QUESTION)
        await taught(app)
        learned = await estimate(app, QUESTION)
    assert [name.endswith(" m") for name in kept_at(place)] == [True]
    async with running_app(settings) as app:
        after = await estimate(app, QUESTION)
    assert at_first < TRUE / 2
    assert (learned, after) == (pytest.approx(TRUE, rel=0.05), learned)


async def test_another_process_goes_on_learning_where_the_first_one_was(backend: Talker, place: Place) -> None:
    backend.answer = counted
    settings = settings_of(backend.url, **at(place, {}))
    seen = []
    for _ in range(2):
        async with running_app(settings) as app:
            await taught(app)
        ((value,),) = (kept_at(place).values(),)
        seen.append(json.loads(value)[0])
    assert seen == [11, 22]


async def test_what_one_process_learns_another_one_knows_soon(
    replica: StartReplica, backend: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upkeep.SHARE_LEARNED_EVERY_S", 0.01)
    backend.answer = counted
    one, two = await replica(), await replica()
    await estimate(two, QUESTION)
    await taught(one)
    async with asyncio.timeout(DEADLINE_S):
        while await estimate(two, QUESTION) != pytest.approx(TRUE, rel=0.05):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_what_two_processes_learn_at_once_is_all_kept(
    replica: StartReplica, backend: Talker, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upkeep.SHARE_LEARNED_EVERY_S", 0.001)
    backend.answer = counted
    apps = [await replica() for _ in range(2)]
    await asyncio.gather(*(taught(app) for app in apps))
    async with asyncio.timeout(DEADLINE_S):
        while seen_at(place) != 22:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def seen_at(place: Place) -> int:
    """How many counts were learned from, by what is kept."""
    found = place.asked("SELECT value FROM learned")
    return int(json.loads(found[0][0])[0]) if found else 0


async def test_what_could_not_be_kept_is_kept_later(
    start_app: StartApp, backend: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upkeep.SHARE_LEARNED_EVERY_S", 0.001)
    app = await start_app()
    keeping = controlled("keep_learned", monkeypatch)
    keeping.failure = StoreError("The store of responses may not be written.")
    backend.answer = counted
    await taught(app)
    await keeping.once_more("failed", times=3)
    learned = await estimate(app, QUESTION)
    keeping.failure = None
    await keeping.once_more("done")
    assert (learned, await estimate(app, QUESTION)) == (pytest.approx(TRUE, rel=0.05), learned)


async def test_what_a_model_taught_decides_when_a_first_turn_is_compacted(start_app: StartApp, backend: Talker) -> None:
    backend.answer = counted
    app = await start_app(compaction={"threshold_tokens": 1200})
    first = await turn(app, "plain", QUESTION)
    await taught(app)
    second = await turn(app, "plain", QUESTION)
    assert [each["output"][0]["type"] for each in (first, second)] == ["message", "compaction"]


async def test_another_model_is_not_known_by_it(start_app: StartApp, backend: Talker) -> None:
    backend.answer = counted
    app = await start_app()
    before = await estimate(app, QUESTION)
    for length in range(1, 12):
        await app.openai.responses.create(model="other", input=FILLER * length)
    assert await estimate(app, QUESTION) == before


async def test_without_a_file_it_is_learned_and_forgotten(backend: Talker) -> None:
    backend.answer = counted
    settings = settings_of(backend.url)
    found = []
    for _ in range(2):
        async with running_app(settings) as app:
            found.append(await estimate(app, QUESTION))
            await taught(app)
            assert await estimate(app, QUESTION) == pytest.approx(TRUE, rel=0.05)
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", MODES)
async def test_a_backend_that_counts_nothing_or_nonsense_teaches_nothing(
    start_app: StartApp, backend: Talker, mode: str
) -> None:
    app = await start_app()
    before = await estimate(app, QUESTION)
    backend.answer = lambda body: without_usage(answered(body, "Yes."))
    await turn(app, mode, FILLER)
    assert await estimate(app, QUESTION) == before


def without_usage(script: Script) -> Script:
    raw = b"".join(step for step in script.steps if isinstance(step, bytes))
    if raw.startswith(b"data:"):
        blocks = [block for block in raw.split(b"\n\n") if b'"usage"' not in block]
        return Script([b"\n\n".join(blocks)])
    return Script([json.dumps({key: value for key, value in json.loads(raw).items() if key != "usage"}).encode()])
