"""Turns whose window had to be made smaller: refused by the backend, badly summarised, truncated, at two processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from compacting import (
    BAD_RECORDS,
    BLOB,
    DOUBLE,
    FILLER,
    LONG,
    LOW,
    MODES,
    TRIGGER,
    Answer,
    Talker,
    app,
    asked,
    assistant,
    backend,
    broken,
    called,
    chain,
    compacted,
    each_mode,
    facts_of,
    held,
    in_turn,
    kinds,
    low,
    metrics,
    record_of,
    said,
    texts_of,
    tokens_of,
    turn,
    user,
)
from conftest import App, StartApp, both_stores
from event_grammar import check
from openai.types.conversations import ConversationItem
from pydantic import TypeAdapter
from scripted import Script, chunk, refused, sse
from store_places import Place
from test_background import StartOnStore, on_store
from test_proxy import Blocks, error_of, events_in

from keys import rotate_keys

__all__ = ["app", "backend", "low", "on_store"]
Json = dict[str, Any]
FAILED: Any = (openai.APIStatusError,)

# -- a window that the backend refuses ---------------------------------------------------------------------------------

WINDOW = 1500
# What a backend says of a window that is too full; with `{n}` the prompt and with `{w}` the window in tokens.
WORDS: dict[str, tuple[int, str, Json]] = {
    "llamacpp": (400, "request ({n} tokens) exceeds the available context size ({w} tokens), try increasing it", {}),
    "vllm": (
        400,
        "This model's maximum context length is {w} tokens. However, your request has {n} input tokens. Please reduce",
        {"code": 400},
    ),
    "openai": (400, "Your input exceeds the context window of this model.", {"code": "context_length_exceeded"}),
    "ollama": (400, "the input length exceeds the context length", {}),
    "tgi": (422, "Input validation error: `inputs` must have less than {w} tokens. Given: {n}", {}),
    "litellm": (
        500,
        "ContextWindowExceededError: request ({n} tokens) exceeds the available context size ({w} tokens)",
        {},
    ),
}
each_wording = pytest.mark.parametrize("wording", WORDS)


def full(body: Json, wording: str) -> Script:
    status, words, fields = WORDS[wording]
    message = words.format(n=tokens_of(body["messages"]), w=WINDOW)
    return refused(status, message, **fields)


def full_in_stream(body: Json, wording: str) -> Script:
    script = full(body, wording)
    error = json.loads(b"".join(step for step in script.steps if isinstance(step, bytes)))
    return Script([sse(error)]) if body.get("stream") else script


def within_window(answer: Answer, wording: str, refuse: Any = full) -> Answer:
    """The answer, where the prompt fits into the window."""
    return lambda body: answer(body) if tokens_of(body["messages"]) <= WINDOW else refuse(body, wording)


@pytest.fixture
def small(backend: Talker) -> Talker:
    """A backend with a small window, which it tells when it refuses."""
    backend.answer, backend.record = within_window(said, "llamacpp"), within_window(record_of, "llamacpp")
    return backend


WIDE = [user(f"FACT {n}: red. {FILLER * 14}") for n in range(8)]


@each_mode
@each_wording
async def test_a_window_that_is_refused_is_compacted_and_sent_once_more(
    app: App, backend: Talker, mode: str, wording: str
) -> None:
    backend.answer, backend.record = within_window(said, wording), within_window(record_of, wording)
    response = await turn(app, mode, WIDE)
    assert (kinds(response["output"]), response["status"], len(backend.turns)) == (DOUBLE, "completed", 2)
    assert tokens_of(backend.turns[1].body["messages"]) <= WINDOW
    assert len(facts_of(texts_of(backend.turns[1].body))) == len(WIDE)
    assert (await metrics(app))['compactions_total{cause="overflow"}'] == 1


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("wording", ["llamacpp", "openai"])
async def test_a_refusal_inside_a_stream_is_one_too(app: App, backend: Talker, mode: str, wording: str) -> None:
    backend.answer = within_window(said, wording, full_in_stream)
    backend.record = within_window(record_of, wording)
    response = await turn(app, mode, WIDE)
    assert (kinds(response["output"]), response["status"], len(backend.turns)) == (DOUBLE, "completed", 2)


async def test_the_stream_of_a_refused_window_is_valid(app: App, small: Talker) -> None:
    async with app.post({"model": "m", "input": WIDE, "stream": True}) as answer:
        response = check(events_in(await Blocks(answer).rest()))
    assert kinds(response["output"]) == DOUBLE


async def test_the_window_that_a_refusal_told_is_respected(app: App, small: Talker) -> None:
    """In the record's requests as well, but for the first, which was on its way before."""
    await turn(app, "plain", WIDE)
    sizes = [tokens_of(request.body["messages"]) for request in small.requests]
    assert (sizes[0] > WINDOW, max(sizes[1:]) <= WINDOW) == (True, True)


async def test_the_window_that_a_refusal_told_is_known_to_later_turns(app: App, small: Talker) -> None:
    """A threshold that a client leaves to us is a part of it."""
    await turn(app, "plain", WIDE)
    asked_for: Any = [{"type": "compaction"}]
    response = await turn(app, "plain", WIDE, context_management=asked_for)
    found = await metrics(app)
    causes = [found[f'compactions_total{{cause="{cause}"}}'] for cause in ("overflow", "threshold")]
    assert (kinds(response["output"]), causes) == (DOUBLE, [1, 1])


@both_stores
async def test_a_chain_whose_window_was_refused_goes_on(app: App, small: Talker) -> None:
    parent = await turn(app, "plain", WIDE)
    for mode in MODES * 3:
        parent = await turn(app, mode, f"More. {FILLER * 14}", previous_response_id=parent["id"])
        assert parent["status"] == "completed"
    assert len(facts_of(texts_of(small.turns[-1].body))) == len(WIDE)


@pytest.mark.parametrize("settings", [{}, {"compaction": {"on_overflow": False}}], ids=["twice", "passed-on"])
async def test_what_stays_refused_is_context_length_exceeded(
    start_app: StartApp, backend: Talker, settings: Json
) -> None:
    app = await start_app(**settings)
    backend.answer = lambda body: full(body, "openai")
    with pytest.raises(openai.BadRequestError) as caught:
        await turn(app, "plain", WIDE)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    failed = await turn(app, "background", WIDE)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "context_length_exceeded")
    assert len(backend.turns) == (2 if settings else 4)


async def test_what_stays_refused_fails_a_stream_that_has_begun(app: App, backend: Talker) -> None:
    backend.answer = lambda body: full(body, "openai")
    async with app.post({"model": "m", "input": WIDE, "stream": True}) as answer:
        response = check(events_in(await Blocks(answer).rest()))
    assert (response["status"], response["error"]["code"]) == ("failed", "context_length_exceeded")


async def test_a_refusal_that_is_passed_on_is_a_400_of_a_stream(start_app: StartApp, backend: Talker) -> None:
    app = await start_app(compaction={"on_overflow": False})
    backend.answer = lambda body: full(body, "openai")
    async with app.post({"model": "m", "input": WIDE, "stream": True}) as answer:
        assert (await error_of(answer, 400))["code"] == "context_length_exceeded"
    assert (len(backend.requests), backend.records) == (1, [])


async def test_a_window_that_was_compacted_and_is_refused_is_compacted_once_more(
    start_app: StartApp, small: Talker
) -> None:
    """The threshold was higher than the window, of which nobody knew; the next time it is known."""
    app = await start_app(compaction={"threshold_tokens": 5000})
    body = {"model": "m", "input": [user(f"FACT 1: red. {FILLER * 400}"), user("Hi")], "stream": True}
    outputs = []
    for _ in range(2):
        async with app.post(body) as answer:
            outputs.append(kinds(check(events_in(await Blocks(answer).rest()))["output"]))
    assert outputs == [["compaction", *DOUBLE], DOUBLE]
    assert "FACT 1: red" in texts_of(small.turns[-1].body)


# -- a record that cannot be made --------------------------------------------------------------------------------------

each_bad_record = pytest.mark.parametrize("bad", BAD_RECORDS)


@both_stores
@each_mode
@each_bad_record
async def test_a_turn_above_its_threshold_goes_on_without_a_record(
    low: App, backend: Talker, mode: str, bad: str
) -> None:
    parent = await chain(low)
    backend.record = BAD_RECORDS[bad]
    response = await turn(low, mode, LONG, previous_response_id=parent["id"])
    assert (kinds(response["output"]), response["status"]) == (["message"], "completed")
    assert texts_of(backend.turns[-1].body).count(LONG) == 2
    assert (await metrics(low))['compaction_failures_total{cause="threshold"}'] == 1
    backend.record = record_of
    child = await turn(low, mode, "Go on.", previous_response_id=response["id"])
    assert (kinds(child["output"]), "FACT 1: red" in texts_of(backend.turns[-1].body)) == (DOUBLE, True)


@both_stores
@each_bad_record
async def test_a_bad_record_is_asked_for_once_more(low: App, backend: Talker, bad: str) -> None:
    parent = await chain(low)
    backend.record = in_turn(BAD_RECORDS[bad], record_of)
    response = await turn(low, "plain", LONG, previous_response_id=parent["id"])
    assert kinds(response["output"]) == (["message"] if bad == "broken" else DOUBLE)
    words = [record["messages"][1]["content"].splitlines()[-1] for record in backend.records]
    last = {"empty": "The last attempt was empty.", "too-long": "The last attempt was too long."}.get(bad, "too long.")
    assert len(words) == (1 if bad == "broken" else 2)
    assert bad == "broken" or (last not in words[0] and words[1].endswith(last))


@both_stores
@each_bad_record
async def test_a_trigger_and_the_route_are_told_that_the_compaction_failed(app: App, backend: Talker, bad: str) -> None:
    parent = await chain(app)
    backend.record = BAD_RECORDS[bad]
    past = {"previous_response_id": parent["id"]}
    trigger = {"model": "m", "input": [TRIGGER], **past}
    told = [await asked(app, "/responses", trigger, 502), await compacted(app, past, 502)]
    assert [error["code"] for error in told] == ["compaction_failed"] * 2
    found = await metrics(app)
    assert [found[f'compaction_failures_total{{cause="{cause}"}}'] for cause in ("trigger", "route")] == [1, 1]
    assert (await turn(app, "plain", "Go on.", **past))["status"] == "completed"


@both_stores
@each_bad_record
async def test_a_streamed_trigger_that_fails_shows_no_half_of_an_item(app: App, backend: Talker, bad: str) -> None:
    parent = await chain(app)
    backend.record = BAD_RECORDS[bad]
    body = {"model": "m", "input": [TRIGGER], "previous_response_id": parent["id"], "stream": True}
    async with app.post(body) as answer:
        events = events_in(await Blocks(answer).rest())
    assert [event["sequence_number"] for event in events] == list(range(5))
    types = [event["type"].removeprefix("response.") for event in events]
    assert types == ["created", "in_progress", "output_item.added", "compaction.compacting", "failed"]
    response = events[-1]["response"]
    assert (response["output"], response["error"]["code"]) == ([], "server_error")
    assert (await asked(app, f"/responses/{response['id']}"))["status"] == "failed"


@both_stores
@pytest.mark.parametrize("bad", ["broken", "empty"])
async def test_an_overflow_without_a_record_is_the_backends_own(app: App, backend: Talker, bad: str) -> None:
    parent = await chain(app)
    backend.record, backend.answer = BAD_RECORDS[bad], lambda body: full(body, "llamacpp")
    past = {"previous_response_id": parent["id"]}
    error = await asked(app, "/responses", {"model": "m", "input": LONG, **past}, 400)
    assert (error["code"], "1500 tokens" in error["message"]) == ("context_length_exceeded", True)
    assert (await metrics(app))['compaction_failures_total{cause="overflow"}'] == 1
    backend.answer = said
    assert (await turn(app, "plain", "Go on.", **past))["status"] == "completed"


async def test_a_background_trigger_that_fails_is_a_failed_response(app: App, backend: Talker) -> None:
    backend.record = broken
    response = await turn(app, "background", [user("Hi"), assistant("Hello."), TRIGGER])
    assert (response["status"], response["output"], response["error"]["code"]) == ("failed", [], "server_error")


@both_stores
async def test_a_record_that_takes_too_long_has_failed(start_app: StartApp, backend: Talker) -> None:
    app = await start_app(compaction={**LOW, "timeout_s": 0.05})
    parent = await chain(app)
    backend.record, _ = held()
    past = {"previous_response_id": parent["id"]}
    error = await compacted(app, past, 502)
    assert (error["code"], "took longer than 0.05 s" in error["message"]) == ("compaction_failed", True)
    assert kinds((await turn(app, "plain", LONG, **past))["output"]) == ["message"]


@both_stores
@pytest.mark.parametrize("status", [429, 503])
async def test_a_model_that_writes_later_says_so_to_the_client(app: App, backend: Talker, status: int) -> None:
    parent = await chain(app)
    backend.record = lambda body: refused(status, "later")
    await compacted(app, {"previous_response_id": parent["id"]}, status)


@both_stores
async def test_a_refusal_is_passed_on_where_the_answer_alone_would_fill_the_window(app: App, backend: Talker) -> None:
    parent = await chain(app)
    backend.answer = lambda body: full(body, "llamacpp")
    body = {"model": "m", "input": "Hi", "previous_response_id": parent["id"], "max_output_tokens": 1200}
    assert (await asked(app, "/responses", body, 400))["code"] == "context_length_exceeded"
    assert backend.records == []


# -- clients that leave, and records that take their time --------------------------------------------------------------

SLOW = {"server": {"keepalive_s": 0.05}, "compaction": LOW}


@both_stores
@pytest.mark.parametrize(
    ("path", "options"),
    [("responses", {}), ("responses", {"stream": True}), ("responses", {"t": True}), ("responses/compact", {})],
    ids=["plain", "streamed", "trigger", "route"],
)
async def test_a_client_that_leaves_stops_the_record(low: App, backend: Talker, path: str, options: Json) -> None:
    parent = await chain(low)
    backend.record, goes_on = held()
    said: Any = [user(LONG), *([TRIGGER] if options.pop("t", False) else [])]
    body = {"model": "m", "input": said, "previous_response_id": parent["id"], **options}

    async def ask() -> None:
        async with low.post(body, f"/v1/{path}") as answer:
            await answer.read()

    asking = asyncio.create_task(ask())
    record = await backend.asked_for_record()
    asking.cancel()
    assert await record.is_let_go()
    goes_on.set()
    assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError)


@both_stores
async def test_the_stream_begins_and_is_kept_alive_while_the_record_is_written(
    start_app: StartApp, backend: Talker
) -> None:
    app = await start_app(**SLOW)
    parent = await chain(app)
    backend.record, goes_on = held()
    body = {"model": "m", "input": LONG, "previous_response_id": parent["id"], "stream": True}
    async with app.post(body) as answer:
        blocks = Blocks(answer)
        seen = [await blocks.next() for _ in range(4)]
        assert [block.split("\n")[0] for block in seen[:2]] == [
            "event: response.created",
            "event: response.in_progress",
        ]
        assert [block[0] for block in seen[2:]] == [":", ":"]
        goes_on.set()
        rest = await blocks.rest()
    assert kinds(check(events_in([*(block.strip() for block in seen), *rest]))["output"]) == DOUBLE


@both_stores
async def test_a_cancel_during_the_record_stops_it(low: App, backend: Talker) -> None:
    parent = await chain(low)
    backend.record, goes_on = held()
    run = await low.openai.responses.create(model="m", input=LONG, previous_response_id=parent["id"], background=True)
    record = await backend.asked_for_record()
    cancelled = await low.openai.responses.cancel(run.id)
    assert (cancelled.status, cancelled.output, record.gone.is_set()) == ("cancelled", [], True)
    goes_on.set()


@both_stores
async def test_a_turn_that_breaks_after_its_compaction_fails_with_the_item(low: App, backend: Talker) -> None:
    parent = await chain(low)
    backend.answer = lambda body: Script([chunk(content="Hel")], end="cut")
    body = {"model": "m", "input": LONG, "previous_response_id": parent["id"], "stream": True}
    async with low.post(body) as answer:
        response = check(events_in(await Blocks(answer).rest()))
    assert (response["status"], kinds(response["output"])) == ("failed", DOUBLE)
    backend.answer = said
    child = await turn(low, "plain", "Go on.", previous_response_id=parent["id"])
    assert (child["status"], facts_of(texts_of(backend.turns[-1].body))) == ("completed", ["FACT 1: red"])


# -- conversations -----------------------------------------------------------------------------------------------------

ITEM: TypeAdapter[Any] = TypeAdapter(ConversationItem)


@both_stores
async def test_a_conversation_shows_items_of_the_sdk_only(low: App) -> None:
    conversation = await low.openai.conversations.create()
    for given in (LONG, LONG, [TRIGGER]):
        await turn(low, "plain", given, conversation=conversation.id)
    items = (await asked(low, f"/conversations/{conversation.id}/items?order=asc"))["data"]
    assert [ITEM.validate_python(item).type for item in items] == ["message"] * 3 + [*DOUBLE, "compaction"]


@both_stores
async def test_a_conversation_whose_item_is_taken_out_is_whole_again(low: App, backend: Talker) -> None:
    conversation = await low.openai.conversations.create()
    for number in range(2):
        response = await turn(low, "plain", f"FACT {number}: red. {LONG}", conversation=conversation.id)
    item, _ = response["output"]
    await low.openai.conversations.items.delete(item["id"], conversation_id=conversation.id)
    before = len(backend.records)
    child = await turn(low, "plain", "Go on.", conversation=conversation.id)
    assert (kinds(child["output"]), len(backend.records) > before) == (DOUBLE, True)
    assert set(facts_of(texts_of(backend.records[before]))) == {"FACT 0: red", "FACT 1: red"}


# -- truncation --------------------------------------------------------------------------------------------------------


async def truncated_chain(app: App, backend: Talker, mode: str = "plain") -> list[list[str]]:
    """The facts in the prompts of a chain that is truncated."""
    parent: Json = {"id": None}
    for n in range(8):
        options = {"previous_response_id": parent["id"], "truncation": "auto"}
        parent = await turn(app, mode, f"FACT {n}: red. {FILLER * 20}", **options)
        assert (kinds(parent["output"]), parent["truncation"]) == (["message"], "auto")
    items = await asked(app, f"/responses/{parent['id']}/input_items?limit=100")
    assert (len(items["data"]), backend.records) == (15, [])
    return [facts_of(texts_of(request.body)) for request in backend.turns]


@each_mode
async def test_a_window_that_is_known_is_truncated_at_its_oldest_turns(
    start_app: StartApp, backend: Talker, mode: str
) -> None:
    app = await start_app(upstream={"window_tokens": WINDOW})
    told = await truncated_chain(app, backend, mode)
    assert [facts[-1] for facts in told] == [f"FACT {n}: red" for n in range(8)]
    assert told[-1] == [f"FACT {n}: red" for n in range(8 - len(told[-1]), 8)]
    assert (2 <= len(told[-1]) <= 4, max(tokens_of(r.body["messages"]) for r in backend.requests) <= WINDOW) == (
        True,
        True,
    )


async def test_a_window_that_is_refused_is_truncated_where_that_is_asked_for(app: App, small: Talker) -> None:
    told = await truncated_chain(app, small)
    assert (told[-1][-1], 2 <= len(told[-1]) <= 4) == ("FACT 7: red", True)


@both_stores
async def test_a_call_stays_with_its_output_where_a_window_is_truncated(start_app: StartApp, backend: Talker) -> None:
    app = await start_app(upstream={"window_tokens": 2000})
    backend.answer = lambda body: said(body) if body["messages"][-1]["role"] == "tool" else called(body, "call_0")
    tools: Any = [{"type": "function", "name": "look", "parameters": {}}]
    parent: Any = None
    for n in range(6):
        options = {"tools": tools, "truncation": "auto"}
        first = await turn(app, "plain", f"{n} {FILLER * 10}", previous_response_id=parent, **options)
        output = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": FILLER * 10}
        parent = (await turn(app, "plain", [output], previous_response_id=first["id"], **options))["id"]
    for request in backend.turns:
        messages = request.body["messages"]
        ties = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert ties == [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        assert messages[0]["role"] == "user"
    assert len(backend.turns[-1].body["messages"]) < 12


async def test_without_truncation_a_known_window_is_sent_as_it_is(start_app: StartApp, backend: Talker) -> None:
    app = await start_app(upstream={"window_tokens": WINDOW})
    response = await chain(app, 3)
    assert (kinds(response["output"]), texts_of(backend.turns[-1].body).count(LONG)) == (["message"], 3)


# -- two processes -----------------------------------------------------------------------------------------------------


async def test_a_chain_goes_on_at_another_process_across_its_compactions(
    on_store: StartOnStore, backend: Talker
) -> None:
    pair = [await on_store(compaction=LOW) for _ in range(2)]
    parent: Json = {"id": None}
    counts = []
    for n in range(12):
        text = f"FACT {n}: red. {FILLER * 8}"
        parent = await turn(pair[n % 2], MODES[n % 3], text, previous_response_id=parent["id"])
        counts.append(kinds(parent["output"]) == DOUBLE)
    assert (2 <= sum(counts) <= 6, len(backend.records)) == (True, sum(counts))
    assert set(facts_of(texts_of(backend.turns[-1].body))) == {f"FACT {n}: red" for n in range(12)}


@pytest.mark.stores("file")
async def test_items_of_before_and_after_a_rotation_of_keys_open_at_both_processes(
    on_store: StartOnStore, backend: Talker, place: Place
) -> None:
    pair = [await on_store() for _ in range(2)]
    before = (await compacted(pair[0], {"input": "FACT 1: red"}))["output"]
    rotate_keys((), Path(f"{place.address}.key"))
    after = (await compacted(pair[1], {"input": "FACT 2: blue"}))["output"]
    assert before[-1][BLOB][:8] != after[-1][BLOB][:8]
    for process in pair:
        for window in (before, after):
            assert (await turn(process, "plain", [*window, user("Go on.")]))["status"] == "completed"
    assert [facts_of(texts_of(request.body)) for request in backend.turns] == [["FACT 1: red"], ["FACT 2: blue"]] * 2


@pytest.mark.stores("file")
async def test_a_chain_with_a_compaction_goes_on_after_a_rotation(
    on_store: StartOnStore, backend: Talker, place: Place
) -> None:
    process = await on_store(compaction=LOW)
    parent = await chain(process, 2)
    rotate_keys((), Path(f"{place.address}.key"))
    for _ in range(2):
        parent = await turn(process, "plain", LONG, previous_response_id=parent["id"])
        assert kinds(parent["output"]) == DOUBLE
    assert "FACT 1: red" in texts_of(backend.turns[-1].body)


# -- whose key it is ---------------------------------------------------------------------------------------------------


@each_mode
async def test_the_record_is_asked_for_with_the_clients_own_key(
    start_app: StartApp, backend: Talker, mode: str
) -> None:
    app = await start_app(auth={"mode": "passthrough"}, compaction={**LOW, "ahead": True})
    await turn(app, mode, f"FACT 1: red. {LONG}")
    ahead = await backend.asked_for_record()
    trigger = await turn(app, mode, [user("Hi"), assistant("Hello."), TRIGGER])
    assert (kinds(trigger["output"]), len(backend.records)) == (["compaction"], 2)
    assert {request.headers["authorization"] for request in (ahead, *backend.requests)} == {"Bearer client-key"}
