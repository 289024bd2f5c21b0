"""Compaction through the official SDKs: long conversations, what is told of it, triggers, and sessions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import openai
import pytest
from agents import Agent, OpenAIResponsesModel, Runner, SQLiteSession, function_tool, set_tracing_disabled
from agents.memory import OpenAIResponsesCompactionSession
from compacting import (
    ANSWER,
    BLOB,
    BYTES_PER_TOKEN,
    DOUBLE,
    FILLER,
    LONG,
    LOW,
    MODES,
    SUMMARY_OUTPUT_TOKENS,
    TRIGGER,
    Talker,
    answered,
    app,
    asked,
    assistant,
    backend,
    called,
    chain,
    each_mode,
    ended,
    held,
    kinds,
    low,
    said,
    texts_of,
    tokens_of,
    turn,
    user,
    without_compacting,
)
from conftest import App, StartApp, at, both_stores, running_app, settings_of
from event_grammar import check
from openai.types.responses import ResponseCompactionCompactingEvent, ResponseCompactionItem
from scripted import Script
from sdk import events_of, types_of
from store_places import Place
from test_background import check_run, on_store
from test_proxy import Blocks, events_in

__all__ = ["app", "backend", "low", "on_store"]
Json = dict[str, Any]

# -- long conversations ------------------------------------------------------------------------------------------------

THRESHOLD = 3000
TURNS = 200
A_TURN = 130  # tokens of the longest one, its answer included
PLANTED = {n: f"FACT {n}: v{n * 7919 % 1000}" for n in range(0, TURNS, 9)}


def words_of(number: int) -> str:
    """Facts are told by the user, or by the backend in its answer."""
    planted = PLANTED.get(number, "")
    told = planted.replace("FACT", "TELL") if number % 2 else planted
    return f"{told} This is turn {number}. {FILLER * (1 + number % 4)}"


class Talk:
    """A conversation in one of the forms in which clients keep it."""

    def __init__(self, app: App, form: str, **options: Any) -> None:
        self._app = app
        self._form = form
        self._options = options
        self._held: list[Json] = []

    async def begin(self) -> None:
        if self._form == "conversation":
            self._options["conversation"] = (await self._app.openai.conversations.create()).id
        elif self._form != "chain":
            self._options["store"] = False

    async def say(self, text: str, mode: str) -> Json:
        is_kept_here = self._form in ("unpruned", "pruned")
        response = await turn(self._app, mode, [*self._held, user(text)], **self._options)
        if self._form == "chain":
            self._options["previous_response_id"] = response["id"]
        elif is_kept_here:
            self._held += [user(text), *response["output"]]
        if self._form == "pruned" and response["output"][0]["type"] == "compaction":
            self._held = list(response["output"])
        return response


def messages_of(raw: bytes) -> bytes:
    """The messages of a request as they were sent, without the bracket at their end."""
    rest = raw[raw.index(b'"messages":') + len(b'"messages":') :].decode()
    return rest[: json.JSONDecoder().raw_decode(rest)[1] - 1].encode()


def has_stable_prefixes(backend: Talker, is_compacted: list[bool]) -> bool:
    """Whether each prompt begins with all bytes of the one before it, up to a compaction."""
    sent = [messages_of(request.raw) for request in backend.turns]
    pairs = zip(sent, sent[1:], is_compacted[1:], strict=False)
    return all(after.startswith(before) != was_compacted for before, after, was_compacted in pairs)


ASKED: Any = [{"type": "compaction", "compact_threshold": THRESHOLD}]
CONFIGURED = {"threshold_tokens": THRESHOLD}


@both_stores
@pytest.mark.parametrize(
    ("form", "settings", "options"),
    [
        ("chain", CONFIGURED, {}),
        ("chain", {}, {"context_management": ASKED}),
        ("conversation", CONFIGURED, {}),
        ("unpruned", {}, {"context_management": ASKED}),
        ("pruned", CONFIGURED, {}),
    ],
    ids=["chain-configured", "chain-asked", "conversation", "unpruned", "pruned"],
)
async def test_two_hundred_turns_fit_lose_no_fact_and_leave_prompts_stable(
    start_app: StartApp, backend: Talker, form: str, settings: Json, options: Json
) -> None:
    talk = Talk(await start_app(compaction=settings), form, **options)
    await talk.begin()
    responses = [await talk.say(words_of(number), MODES[number % 3]) for number in range(TURNS)]
    is_compacted = [kinds(response["output"]) == DOUBLE for response in responses]
    assert max(tokens_of(request.body["messages"]) for request in backend.requests) <= THRESHOLD + A_TURN
    assert 3 <= sum(is_compacted) <= TURNS // 25
    assert len(backend.records) == sum(is_compacted)
    last = texts_of(backend.turns[-1].body)
    assert [fact for fact in PLANTED.values() if fact not in last] == []
    assert has_stable_prefixes(backend, is_compacted)


async def test_without_a_threshold_nothing_is_compacted(app: App, backend: Talker) -> None:
    response = await chain(app, 10)
    assert (kinds(response["output"]), backend.records) == (["message"], [])


async def test_a_threshold_that_a_client_leaves_to_us_is_a_part_of_the_window(start_app: StartApp) -> None:
    app = await start_app(upstream={"window_tokens": 2000})
    entries: Any = [{"type": "compaction"}]
    lengths = [
        kinds((await turn(app, "plain", [user(FILLER * n)], context_management=entries))["output"]) for n in (80, 90)
    ]
    assert lengths == [["message"], DOUBLE]


async def test_a_custom_prompt_and_model_write_the_record(start_app: StartApp, backend: Talker) -> None:
    backend.prompt = "Make it short."
    app = await start_app(compaction={**LOW, "prompt": backend.prompt, "model": "small"})
    await chain(app, 2)
    assert [record["model"] for record in backend.records] == ["small"]
    assert "FACT 1: red" in texts_of(backend.turns[-1].body)


@both_stores
async def test_calls_stay_with_their_outputs(low: App, backend: Talker) -> None:
    """In every prompt, wherever it was cut; and what a tool told is in the record."""
    long_call = json.dumps({"where": FILLER * 4})
    answers = {"tool": said, "user": lambda body: called(body, "call_0", "look", long_call)}
    backend.answer = lambda body: answers[body["messages"][-1]["role"]](body)
    tools: Any = [{"type": "function", "name": "look", "parameters": {}}]
    parent, count = None, 30
    for number in range(count):
        asked_for = await turn(low, "plain", f"Look. {FILLER * (number % 3)}", previous_response_id=parent, tools=tools)
        tie = asked_for["output"][-1]["call_id"]
        output = {
            "type": "function_call_output",
            "call_id": tie,
            "output": f"FACT {number}: seen. {FILLER * (number % 5)}",
        }
        parent = (await turn(low, "streamed", [output], previous_response_id=asked_for["id"], tools=tools))["id"]
    for request in backend.turns:
        messages = request.body["messages"]
        ties = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert ties == [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    last = texts_of(backend.turns[-1].body)
    assert (len(backend.records) > 4, [n for n in range(count) if f"FACT {n}: seen" not in last]) == (True, [])


# -- on the wire -------------------------------------------------------------------------------------------------------

COMPACTED_TYPES = [
    *("created", "in_progress", "output_item.added", "output_item.done", "output_item.added", "content_part.added"),
    *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
]


@both_stores
@each_mode
async def test_the_item_comes_first_in_the_output(low: App, mode: str) -> None:
    parent = await chain(low)
    response = await turn(low, mode, LONG, previous_response_id=parent["id"])
    assert (kinds(response["output"]), response["status"]) == (DOUBLE, "completed")
    item = response["output"][0]
    assert set(item) == {"id", "type", BLOB}
    assert (item["id"].startswith("cmp_"), bool(item[BLOB])) == (True, True)
    assert (await low.openai.responses.retrieve(response["id"])).to_dict() == response


@both_stores
async def test_the_item_comes_first_in_the_stream(low: App) -> None:
    parent = await chain(low)
    events = await events_of(low.openai, input=LONG, previous_response_id=parent["id"])
    assert types_of(events) == COMPACTED_TYPES
    response = check([event.to_dict() for event in events])
    added, done = events[2].item, events[3].item
    assert isinstance(done, ResponseCompactionItem)
    assert (added.id, added.encrypted_content, done.to_dict()) == (done.id, "", response["output"][0])


async def background_events(app: App, **options: Any) -> list[Json]:
    async with app.post({"model": "m", "background": True, "stream": True, **options}) as answer:
        return events_in(await Blocks(answer).rest())


async def replayed(app: App, response_id: str) -> list[Json]:
    async with app.http.get(f"{app.url}/v1/responses/{response_id}?stream=true") as answer:
        return events_in(await Blocks(answer).rest())


@both_stores
async def test_the_stream_in_background_is_valid_and_can_be_read_again(low: App) -> None:
    parent = await chain(low)
    events = await background_events(low, input=LONG, previous_response_id=parent["id"])
    response = check_run(events)
    assert kinds(response["output"]) == DOUBLE
    assert await replayed(low, response["id"]) == events


@both_stores
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_an_idempotent_request_is_answered_with_the_same_item_again(
    low: App, backend: Talker, stream: bool
) -> None:
    parent = await chain(low)
    body = {"model": "m", "input": LONG, "previous_response_id": parent["id"], "stream": stream}
    told = []
    for _ in range(2):
        async with low.post(body, headers={"Idempotency-Key": "k"}) as answer:
            told.append(check(events_in(await Blocks(answer).rest())) if stream else await answer.json())
    assert (kinds(told[0]["output"]), told[1]) == (DOUBLE, told[0])
    assert len(backend.records) == 1


@both_stores
async def test_the_item_is_the_same_wherever_it_is_shown(low: App) -> None:
    parent = await chain(low)
    events = await background_events(low, input=LONG, previous_response_id=parent["id"])
    response = events[-1]["response"]
    item = response["output"][0]
    shown = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    listed = (await asked(low, "/responses?limit=1"))["data"][0]
    assert [shown[0], listed["output"][0]] == [item] * 2


SECRET = "The record says: dromedary."


@both_stores
@each_mode
async def test_the_record_is_nowhere_in_clear(
    low: App, backend: Talker, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    caplog.set_level(logging.DEBUG)
    backend.record = lambda body: answered(body, SECRET)
    response = await turn(low, mode, LONG, previous_response_id=(await chain(low))["id"])
    child = await turn(low, mode, [user("Go on.")], previous_response_id=response["id"])
    seen = [response, child, await asked(low, f"/responses/{child['id']}/input_items"), await asked(low, "/responses")]
    seen += await background_events(low, input=LONG, previous_response_id=response["id"])
    assert "dromedary" in texts_of(backend.turns[-1].body)
    assert "dromedary" not in json.dumps(seen) + caplog.text


@both_stores
@each_mode
async def test_what_the_record_took_is_in_the_usage(low: App, backend: Talker, mode: str) -> None:
    parent = await chain(low)
    usage = (await turn(low, mode, LONG, previous_response_id=parent["id"]))["usage"]
    sent = sum(tokens_of(request.body["messages"]) for request in backend.requests[1:])
    made = SUMMARY_OUTPUT_TOKENS + len(ANSWER) // BYTES_PER_TOKEN
    assert [usage[key] for key in ("input_tokens", "output_tokens", "total_tokens")] == [sent, made, sent + made]


@both_stores
async def test_the_usage_with_a_record_does_not_make_the_next_turn_compact(low: App, backend: Talker) -> None:
    response = await turn(low, "plain", LONG, previous_response_id=(await chain(low))["id"])
    assert response["usage"]["total_tokens"] > 2 * LOW["threshold_tokens"]
    child = await turn(low, "plain", "Go on.", previous_response_id=response["id"])
    assert kinds(child["output"]) == ["message"]


@both_stores
async def test_metadata_and_parameters_are_the_clients(low: App, backend: Talker) -> None:
    own: Any = {"metadata": {"a": "b"}, "temperature": 0.3, "instructions": "Be brief."}
    response = await turn(low, "plain", LONG, previous_response_id=(await chain(low))["id"], **own)
    assert {key: response[key] for key in own} == own
    record, sent = (request.body for request in backend.requests[-2:])
    assert (record.get("temperature"), sent["temperature"]) == (None, 0.3)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


@both_stores
async def test_input_items_begin_behind_the_item_and_do_not_show_it(low: App) -> None:
    response = await turn(low, "plain", LONG, previous_response_id=(await chain(low))["id"])
    child = await turn(low, "plain", "Go on.", previous_response_id=response["id"])
    shown = []
    for response_id in (response["id"], child["id"]):
        listing = low.openai.responses.input_items.list(response_id, order="asc")
        shown.append([item.role async for item in listing])  # type: ignore[union-attr]
    assert shown == [["user", "assistant", "user"], ["assistant", "user"]]


async def test_a_run_that_is_carried_out_twice_has_one_item(backend: Talker, place: Place) -> None:
    settings = settings_of(backend.url, **at(place, {"compaction": LOW}))
    async with running_app(settings) as first:
        parent = await chain(first)
        backend.answer, goes_on = held(said)
        body: Any = {"model": "m", "input": LONG, "previous_response_id": parent["id"], "background": True}
        async with first.post({**body, "stream": True}) as answer:
            blocks = Blocks(answer)
            response_id = json.loads((await blocks.next()).partition("data: ")[2])["response"]["id"]
            await blocks.until("event: response.output_item.done")
        while not backend.turns[-1].body.get("stream"):
            await backend.received()
    goes_on.set()
    async with running_app(settings) as second:
        response = (await ended(second.openai, response_id)).to_dict()
        events = await replayed(second, response_id)
    assert (kinds(response["output"]), len(backend.records)) == (DOUBLE, 2)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert (kinds(done), done[-2:]) == (["compaction", *DOUBLE], response["output"])
    assert len({item["id"] for item in done}) == 3


# -- triggers ----------------------------------------------------------------------------------------------------------

EARLIER = [user("FACT 1: red"), assistant("FACT 2: blue")]


@both_stores
@each_mode
@pytest.mark.parametrize("form", ["chain", "conversation", "stateless"])
async def test_a_trigger_gives_the_item_and_the_next_turn_goes_on_from_it(
    app: App, backend: Talker, mode: str, form: str
) -> None:
    past: Any = {"store": False}
    before = EARLIER
    if form == "chain":
        past, before = {"previous_response_id": (await turn(app, "plain", EARLIER))["id"]}, []
    elif form == "conversation":
        conversation = await app.openai.conversations.create(items=EARLIER)  # type: ignore[arg-type]
        past, before = {"conversation": conversation.id}, []
    response = await turn(app, mode, [*before, TRIGGER], **past)
    assert (kinds(response["output"]), response["status"]) == (["compaction"], "completed")
    assert (len(backend.records), response["usage"]["output_tokens"]) == (1, SUMMARY_OUTPUT_TOKENS)
    if form != "stateless":
        assert TRIGGER["type"] not in kinds((await asked(app, f"/responses/{response['id']}/input_items"))["data"])
    if form == "chain":
        past = {"previous_response_id": response["id"]}
    rest = response["output"] if form == "stateless" else []
    assert kinds((await turn(app, mode, [*rest, user("Go on.")], **past))["output"]) == ["message"]
    record, acknowledged, last = backend.turns[-1].body["messages"]
    assert ["FACT 1: red" in record["content"], "FACT 2: blue" in record["content"]] == [True, True]
    assert (acknowledged["role"], last["content"]) == ("assistant", "Go on.")


async def test_the_stream_of_a_trigger_says_that_it_is_compacting(app: App) -> None:
    events = await events_of(app.openai, input=[*EARLIER, TRIGGER], store=False)
    added, compacting, done, completed = events[2:]
    assert isinstance(compacting, ResponseCompactionCompactingEvent)
    assert (added.item.id, compacting.item_id, compacting.output_index) == (done.item.id, done.item.id, 0)
    response = check(without_compacting([event.to_dict() for event in events]))
    assert response["output"] == [done.item.to_dict()] == completed.response.to_dict()["output"]


async def test_the_stream_of_a_trigger_in_background_is_valid(app: App) -> None:
    events = await background_events(app, input=[*EARLIER, TRIGGER])
    response = check_run(without_compacting(events))
    assert kinds(response["output"]) == ["compaction"]
    assert await replayed(app, response["id"]) == events


@pytest.mark.parametrize(
    "said", [[TRIGGER], [TRIGGER, *EARLIER], [*EARLIER, TRIGGER, TRIGGER]], ids=["alone", "1", "2"]
)
@pytest.mark.parametrize("options", [{}, {"stream": True}, {"background": True}], ids=MODES)
async def test_a_trigger_with_nothing_before_it_or_something_after_it_is_a_400(
    app: App, backend: Talker, said: Any, options: Json
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await app.openai.responses.create(model="m", input=said, **options)
    assert (str(caught.value.param).startswith("input"), backend.requests) == (True, [])


CODEX = Path(__file__).parent.parent / "clients" / "codex.jsonl"


async def test_what_codex_sends_around_a_compaction_goes_through(app: App, backend: Talker) -> None:
    trigger, following = (json.loads(line)["body"] for line in CODEX.read_text().splitlines()[17:19])
    assert (trigger["input"][-1], trigger["stream"], trigger["store"]) == (TRIGGER, True, False)
    async with app.post(trigger) as answer:
        (item,) = check(without_compacting(events_in(await Blocks(answer).rest())))["output"]
    assert "echo alpha" in backend.records[0]["messages"][1]["content"]
    said = [item if each["type"] == "compaction" else each for each in following["input"]]
    async with app.post({**following, "input": said}) as answer:
        assert kinds(check(events_in(await Blocks(answer).rest()))["output"]) == ["message"]
    told = texts_of(backend.turns[-1].body)
    assert [told.count(each) for each in ("running in the Codex CLI", "<skills_instructions>", "<record>")] == [1, 1, 1]


# -- /responses/compact ------------------------------------------------------------------------------------------------


@both_stores
async def test_a_compacted_window_parses_and_begins_a_new_chain(app: App, backend: Talker) -> None:
    compacted = await app.openai.responses.compact(model="m", input=EARLIER)  # type: ignore[arg-type]
    assert (compacted.object, [item.type for item in compacted.output]) == (
        "response.compaction",
        ["message", "compaction"],
    )
    assert (compacted.usage.output_tokens, compacted.usage.input_tokens) == (
        5,
        tokens_of(backend.records[0]["messages"]),
    )
    window: Any = compacted.model_dump(warnings=False, exclude_unset=True)[
        "output"
    ]  # user messages are not in its union
    first = await app.openai.responses.create(model="m", input=[*window, user("Go on.")])
    await app.openai.responses.create(model="m", input="And on.", previous_response_id=first.id)
    told = texts_of(backend.turns[-1].body)
    assert [told.count(each) for each in ("FACT 1: red", "FACT 2: blue", "Go on.", "And on.")] == [2, 1, 1, 1]


# -- the agents SDK ----------------------------------------------------------------------------------------------------


@function_tool
def look(where: str) -> str:
    """What is to be seen somewhere."""
    return f"FACT {where}: seen"


def looking(body: Json) -> Script:
    """Calls the tool where the user names a place, and then tells what it saw."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return answered(body, "I see.")
    number = last["content"].split()[-1]
    return called(body, f"call_{number}", "look", json.dumps({"where": number}))


@pytest.mark.parametrize("mode", ["previous_response_id", "input", "auto"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_a_session_that_compacts_itself_loses_no_fact(app: App, backend: Talker, mode: Any, stream: bool) -> None:
    set_tracing_disabled(True)
    backend.answer = looking
    model = OpenAIResponsesModel(model="gpt-4.1", openai_client=app.openai)
    agent = Agent("Watch", instructions="Look out.", model=model, tools=[look])
    inner = SQLiteSession("s")
    session = OpenAIResponsesCompactionSession("s", inner, client=app.openai, compaction_mode=mode)
    sizes = []
    for number in range(8):
        if stream:
            result = Runner.run_streamed(agent, f"Look at {number}", session=session)
            assert [event async for event in result.stream_events()]
        else:
            assert (await Runner.run(agent, f"Look at {number}", session=session)).final_output == "I see."
        sizes.append(len(await inner.get_items()))
    inner.close()
    told = texts_of(backend.turns[-1].body)
    assert [n for n in range(8) if f"FACT {n}: seen" not in told or f"Look at {n}" not in told] == []
    assert (len(backend.records) >= 1, max(sizes) < 4 * 8) == (True, True)
