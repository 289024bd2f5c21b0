"""Windows on a real llama.cpp server with the tiny model: what they are counted at, and how chats go on past them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice, pairwise
from typing import Any, NamedTuple

import openai
import pytest
from conftest import App, llamacpp_server, running_app, settings_of
from openai import AsyncOpenAI
from openai.types import responses as types
from scripted import Backend
from sdk import assert_response, events_of

from upstream import UpstreamSettings

Json = dict[str, Any]

WINDOW_TOKENS = 1024
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SEARCH: Any = {**WEATHER, "name": "search", "description": "Search the web"}
TERSE = "You are a terse agent. Answer in English."
STILL: Any = {"temperature": 0, "max_output_tokens": 100}


@pytest.fixture(scope="module")
def llamacpp() -> Iterator[str]:
    """A llama.cpp server with a window of 1024 tokens."""
    with llamacpp_server("--ctx", str(WINDOW_TOKENS), "--slots", "1") as url:
        yield url


def started(url: str, *, tokenizer: str = "auto", recorder: str = "", **compaction: Any) -> Any:
    """`recorder`: where the records are written, if not by the tiny model, which often writes without end."""
    sections = {"compaction": {"vocabulary": "off", "model": "recorder" if recorder else "", **compaction}}
    settings = settings_of(url, upstream={"dialect": "auto", "tokenizer": tokenizer}, **sections)
    if recorder:
        second = UpstreamSettings(name="recorder", base_url=recorder, models=("recorder",), dialect="generic")
        settings = replace(settings, upstream=(*settings.upstream, second))
    return running_app(settings)


@pytest.fixture
async def client(llamacpp: str) -> AsyncIterator[AsyncOpenAI]:
    """Of a proxy that has the backend count."""
    async with started(llamacpp) as app:
        yield app.openai


# -- counts ------------------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """What was said of a prompt before it was sent, and by the backend after it."""

    text: str
    before: int
    after: int

    def is_off(self, part: float) -> bool:
        return abs(self.before - self.after) > part * self.after


async def counted(client: AsyncOpenAI, turns: list[str], **options: Any) -> list[Count]:
    """A chain of turns; a call of a tool is answered before the next text is sent."""
    counts: list[Count] = []
    previous_id = None
    for text in turns:
        sent: Any = [{"role": "user", "content": text}]
        while sent:
            asked: Any = {"model": "m", "input": sent, "previous_response_id": previous_id, **options}
            before = await client.responses.input_tokens.count(**asked)
            response = await client.responses.create(**asked, **STILL)
            assert response.usage
            counts.append(Count(text, before.input_tokens, response.usage.input_tokens))
            calls = [item for item in response.output if isinstance(item, types.ResponseFunctionToolCall)]
            sent = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
            previous_id = response.id
    return counts


TRIP = (
    "I am planning a trip to Norway in May with my two children, and we would like to see the fjords. My daughter is "
    "eleven and does not like long walks. Is there a boat or a train that we could take, and what should we bring?"
)
SERVER = (
    "My server answers slowly since yesterday evening. I have restarted it twice, but nothing has changed. The disk is "
    "half empty and the load is low. Where would you look first, and how can I tell whether it is the network?"
)
LETTER = "Write a short letter to my landlord: the heating has been cold for a week, and I have called three times."
REPORT = "The report is due on Friday. Is the first paragraph clear enough for people who do not know the project?"
# What is asked beside the texts of a chain, and those.
Chain = tuple[Json, list[str]]
LEARNED_FROM: list[Chain] = [
    ({}, [SERVER, "Tell me a story", "Think hard", "Write a poem"]),
    ({"instructions": TERSE}, [LETTER, "Think hard: what is six times seven?", "Count to twenty", "Hi there"]),
    ({"tools": [WEATHER]}, ["What is the weather in Oslo?", "Tell me a story", "What is the weather in Rome?"]),
    ({"tools": [WEATHER, SEARCH]}, ["What is the weather in Cairo?", "Please think hard about it."]),
]
COUNTED: list[Chain] = [
    ({}, [f"{TRIP} {REPORT}", "Think hard: what is six times seven?", "Tell me a long story.", "Say hello."]),
    ({"instructions": "Be brief."}, [TRIP, "Please think hard about it.", "Weather in Oslo", "Write a poem"]),
    ({"tools": [WEATHER]}, ["Please tell me the weather in Paris.", "Tell me a long story.", "Weather in Lima"]),
    ({"tools": [SEARCH, WEATHER], "instructions": TERSE}, [f"Hello. {REPORT}", "How is the weather in Doha today?"]),
    ({}, [f"Hello. {SERVER}", "Count to twenty", LETTER, "Think hard", "Hi there"]),
]


async def test_without_a_tokenizer_counts_are_near_what_the_backend_says_later(llamacpp: str) -> None:
    async with started(llamacpp, tokenizer="off") as app:
        for options, texts in LEARNED_FROM:
            await counted(app.openai, texts, **options)
        chains = [await counted(app.openai, texts, **options) for options, texts in COUNTED]
    assert [chain[0] for chain in chains if chain[0].is_off(0.15)] == []
    assert [count for chain in chains for count in chain[1:] if count.is_off(0.02)] == []


@pytest.mark.parametrize("options", [{}, {"instructions": TERSE}, {"tools": [WEATHER, SEARCH]}])
async def test_a_count_by_the_backend_is_exact(client: AsyncOpenAI, options: Json) -> None:
    counts = await counted(client, ["What is the weather in Paris?", "Think hard", TRIP], **options)
    assert [count.before for count in counts] == [count.after for count in counts]


async def test_a_count_in_a_conversation_is_exact(client: AsyncOpenAI) -> None:
    begun: Any = [{"type": "message", "role": "user", "content": LETTER}]
    conversation = await client.conversations.create(items=begun)
    for text in ("Hello", "Think hard", TRIP):
        asked: Any = {"model": "m", "input": text, "conversation": conversation.id}
        before = await client.responses.input_tokens.count(**asked)
        response = await client.responses.create(**asked, **STILL)
        assert response.usage
        assert before.input_tokens == response.usage.input_tokens


# -- chats that grow ---------------------------------------------------------------------------------------------------

# What a user says over and over, and how long the model may answer.
SAID = [TRIP, REPORT, "Tell me a story", SERVER, "Think hard", LETTER]
BRIEF: Any = {"temperature": 0, "max_output_tokens": 32}


@pytest.fixture(scope="module")
def fitting_turns(llamacpp: str) -> int:
    """How many turns of the chat there are before the backend refuses the window."""
    return asyncio.run(turns_until_refused(llamacpp))


async def turns_until_refused(llamacpp: str) -> int:
    previous_id = None
    async with started(llamacpp, on_overflow=False) as app:
        for at, text in enumerate(cycle(SAID)):
            try:
                asked: Any = {"model": "m", "input": text, "previous_response_id": previous_id}
                previous_id = (await app.openai.responses.create(**asked, **BRIEF)).id
            except openai.BadRequestError as error:
                if error.code == "context_length_exceeded":
                    return at
                raise
    raise AssertionError("nothing was refused")


async def plain(client: AsyncOpenAI, **asked: Any) -> Any:
    return await client.responses.create(model="m", **asked)


async def streamed(client: AsyncOpenAI, **asked: Any) -> Any:
    events = await events_of(client, **asked)
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    response = events[-1].response
    assert added == [item.type for item in response.output]
    return response


async def chat(turn: Any, client: AsyncOpenAI, texts: Iterable[str], **asked: Any) -> list[Any]:
    """A chain of turns; the responses."""
    responses: list[Any] = []
    for text in texts:
        previous_id = responses[-1].id if responses else None
        responses.append(await turn(client, input=text, previous_response_id=previous_id, **BRIEF, **asked))
    return responses


def is_compacted(response: Any) -> bool:
    return bool(response.output[0].type == "compaction")


def assert_sound(responses: list[Any], limit_tokens: int) -> None:
    """Each turn has an answer; no prompt is above the limit; what was compacted stays below it for a while."""
    for response in responses:
        assert_response(response.to_dict())
        assert response.status in ("completed", "incomplete")
        assert response.output[-1].type in ("message", "reasoning")
        assert is_compacted(response) or response.usage.input_tokens <= limit_tokens
    compacted = [at for at, response in enumerate(responses) if is_compacted(response)]
    assert len(compacted) >= 2
    assert all(later - earlier > 1 for earlier, later in pairwise(compacted))


async def compactions(app: App) -> dict[str, int]:
    """How many there were, by cause."""
    async with app.http.get(f"{app.url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = [line.partition("{cause=")[2] for line in lines if line.startswith("responses_proxy_compactions_total{")]
    return {cause.strip('"'): int(float(count)) for cause, _, count in (line.partition("} ") for line in found)}


@pytest.mark.parametrize("turn", [plain, streamed])
@pytest.mark.parametrize(
    ("cause", "compaction", "limit_tokens"),
    [
        ("threshold", {"threshold_fraction": 0.7}, int(0.7 * WINDOW_TOKENS)),
        ("threshold", {"threshold_tokens": 700}, 700),
        ("overflow", {}, WINDOW_TOKENS),
    ],
)
async def test_a_chat_goes_on_past_three_windows(
    llamacpp: str, backend: Backend, fitting_turns: int, turn: Any, cause: str, compaction: Json, limit_tokens: int
) -> None:
    async with started(llamacpp, recorder=backend.url, **compaction) as app:
        responses = await chat(turn, app.openai, islice(cycle(SAID), 3 * fitting_turns + 2))
        made = await compactions(app)
    assert_sound(responses, limit_tokens)
    assert made == {cause: sum(map(is_compacted, responses))}


# -- what clients ask for ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> Iterator[str]:
    """A llama.cpp server with a window of 2048 tokens, because the least threshold of a client is 1000."""
    with llamacpp_server("--ctx", "2048", "--slots", "1") as url:
        yield url


LONG = [" ".join(SAID[:4]), " ".join(SAID[3:])]


@pytest.mark.parametrize("turn", [plain, streamed])
async def test_a_client_sets_a_threshold(wide: str, backend: Backend, turn: Any) -> None:
    async with started(wide, recorder=backend.url) as app:
        managed: Any = [{"type": "compaction", "compact_threshold": 1000}]
        responses = await chat(turn, app.openai, islice(cycle(LONG), 12), context_management=managed)
        made = await compactions(app)
    assert_sound(responses, 1000)
    assert made == {"threshold": sum(map(is_compacted, responses))}


async def test_a_window_that_was_compacted_for_a_client_goes_on(wide: str) -> None:
    async with started(wide) as app:
        responses = await chat(plain, app.openai, LONG)
        window = await app.openai.responses.compact(model="m", previous_response_id=responses[-1].id)
        assert [item.type for item in window.output] == ["message"] * len(LONG) + ["compaction"]
        assert window.usage.output_tokens > 0
        # The SDK has no type for a user's message in an output, and would warn of it.
        shown = [item.to_dict(warnings=False) for item in window.output]
        kept: Any = [*shown, {"role": "user", "content": "Hello"}]
        count = await app.openai.responses.input_tokens.count(model="m", input=kept)
        response = await app.openai.responses.create(model="m", input=kept, store=False, **BRIEF)
    assert response.output_text
    assert response.usage
    assert response.usage.input_tokens == count.input_tokens


@pytest.mark.parametrize("turn", [plain, streamed])
async def test_a_window_is_compacted_when_a_client_says_so(wide: str, turn: Any) -> None:
    async with started(wide) as app:
        before = (await chat(turn, app.openai, LONG * 2))[-1]
        trigger: Any = [{"type": "compaction_trigger"}]
        compacted = await turn(app.openai, input=trigger, previous_response_id=before.id)
        after = await turn(app.openai, input="Hello", previous_response_id=compacted.id, **BRIEF)
        made = await compactions(app)
    assert [item.type for item in compacted.output] == ["compaction"]
    assert after.usage.input_tokens < before.usage.input_tokens
    assert made == {"trigger": 1}
