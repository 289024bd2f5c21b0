"""The routes about windows through the running proxy: what a compacted window holds, and how requests are counted."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from compacting import (
    BLOB,
    FILLER,
    LONG,
    TRIGGER,
    Talker,
    app,
    asked,
    assistant,
    backend,
    called,
    chain,
    compacted,
    facts_of,
    held,
    kinds,
    low,
    said,
    texts_of,
    tokens_of,
    turn,
    user,
)
from conftest import App, StartApp, both_stores
from scripted import Script, refused
from test_owners import ALICE, AUTH, BOB, Client

__all__ = ["app", "backend", "low"]
Json = dict[str, Any]
TOOLS: Any = [{"type": "function", "name": "look", "description": FILLER * 5, "parameters": {"type": "object"}}]
OLD_CALL = [
    {"type": "function_call", "call_id": "call_0", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_0", "output": "FACT 3: green"},
]
WINDOW = [user("FACT 1: red"), assistant("FACT 2: blue"), *OLD_CALL, user("Second."), assistant("Done.")]

# -- /responses/compact ------------------------------------------------------------------------------------------------


def shown(text: str) -> Json:
    return {
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": text}],
    }


def without_ids(items: list[Json]) -> list[Json]:
    return [{key: value for key, value in item.items() if key not in ("id", BLOB)} for item in items]


COMPACTION: Json = {"type": "compaction"}


@both_stores
@pytest.mark.parametrize("form", ["input", "chain", "both"])
async def test_user_messages_and_one_item_are_what_is_left(app: App, backend: Talker, form: str) -> None:
    body: Json = {"input": WINDOW}
    if form != "input":
        start = WINDOW if form == "chain" else WINDOW[:-2]
        body = {"previous_response_id": (await turn(app, "plain", start))["id"]}
    if form == "both":
        body["input"] = WINDOW[-2:]
    told = await compacted(app, body)
    assert without_ids(told["output"]) == [shown("FACT 1: red"), shown("Second."), COMPACTION]
    assert [item["id"][:4] for item in told["output"]] == ["msg_", "msg_", "cmp_"]
    assert set(told) == {"id", "object", "created_at", "output", "usage"}
    assert facts_of(texts_of(backend.records[0])) == ["FACT 1: red", "FACT 2: blue", "FACT 3: green"]


async def test_a_string_is_one_user_message(app: App, backend: Talker) -> None:
    told = await compacted(app, {"input": "FACT 1: red"})
    assert (without_ids(told["output"]), backend.requests) == ([shown("FACT 1: red"), COMPACTION], [])


async def test_a_window_that_holds_an_item_already_gets_one_that_stands_for_both(app: App, backend: Talker) -> None:
    first = (await compacted(app, {"input": WINDOW}))["output"]
    more = [user("Third."), assistant("FACT 4: grey")]
    second = (await compacted(app, {"input": [*first, *more]}))["output"]
    assert without_ids(second) == [shown("FACT 1: red"), shown("Second."), shown("Third."), COMPACTION]
    await turn(app, "plain", [*second, user("Go on.")])
    told = texts_of(backend.turns[-1].body)
    assert [told.count(fact) for fact in ("FACT 2: blue", "FACT 3: green", "FACT 4: grey")] == [1] * 3
    assert told.count("<message>") == 3


async def test_an_item_of_a_turn_gives_its_user_messages_back(app: App, backend: Talker) -> None:
    """They were inside of it."""
    item = (await turn(app, "plain", [*WINDOW, TRIGGER]))["output"]
    told = (await compacted(app, {"input": [*item, user("Third.")]}))["output"]
    assert without_ids(told) == [shown("FACT 1: red"), shown("Second."), shown("Third."), COMPACTION]


async def test_an_image_and_parts_of_a_user_stay_as_they_were(app: App) -> None:
    parts = [{"type": "input_text", "text": "See:"}, {"type": "input_image", "image_url": "data:image/png;base64,AA=="}]
    told = await compacted(app, {"input": [{"role": "user", "content": parts}, assistant("Yes.")]})
    text, image = told["output"][0]["content"]
    assert (text, image["image_url"]) == (parts[0], parts[1]["image_url"])


async def test_system_messages_are_in_the_item(app: App, backend: Talker) -> None:
    given = [{"role": "developer", "content": "Be nice."}, user("Hi"), assistant("Hello.")]
    told = (await compacted(app, {"input": given, "instructions": "Be brief."}))["output"]
    assert kinds(told) == ["message", "compaction"]
    await turn(app, "plain", [*told, user("Go on.")])
    assert backend.turns[-1].body["messages"][0] == {"role": "system", "content": "Be nice."}


@both_stores
async def test_a_call_that_waits_can_be_answered_after_it(app: App, backend: Talker) -> None:
    backend.answer = lambda body: said(body) if body["messages"][-1]["role"] == "tool" else called(body, "call_7")
    parent = await turn(app, "plain", "FACT 1: red", tools=TOOLS)
    told = (await compacted(app, {"previous_response_id": parent["id"]}))["output"]
    output = {"type": "function_call_output", "call_id": "call_7", "output": "seen"}
    child = await turn(app, "plain", [*told, output], tools=TOOLS)
    await turn(app, "plain", "Go on.", previous_response_id=child["id"], tools=TOOLS)
    record, call, result, *_ = backend.turns[-1].body["messages"]
    assert (call["tool_calls"][0]["id"], result["tool_call_id"], result["content"]) == ("call_7", "call_7", "seen")
    assert "FACT 1: red" in record["content"]


@both_stores
async def test_an_open_parent_is_a_409_and_waits_for_nothing(app: App, backend: Talker) -> None:
    backend.answer, goes_on = held(said)
    parent = await app.openai.responses.create(model="m", input="Hi", background=True)
    with pytest.raises(openai.ConflictError) as caught:
        await app.openai.responses.compact(model="m", previous_response_id=parent.id)
    assert parent.id in caught.value.message
    error = await asked(app, "/responses/input_tokens", {"previous_response_id": parent.id}, 409)
    assert parent.id in error["message"]
    goes_on.set()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": None, "previous_response_id": None}, "input"),
        ({"input": [TRIGGER]}, "input"),
        ({"model": None, "input": "Hi"}, "model"),
        ({"input": "Hi", "previous_response_id": "resp_unknown"}, "previous_response_id"),
        ({"previous_response_id": "no id"}, "previous_response_id"),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "nonsense"}]}, "input[0].type"),
    ],
    ids=str,
)
async def test_what_cannot_be_compacted_is_a_400_that_names_it(
    app: App, backend: Talker, body: Json, param: str
) -> None:
    assert ((await compacted(app, body, 400))["param"], backend.requests) == (param, [])


@both_stores
async def test_nothing_of_it_is_kept(app: App) -> None:
    parent = await chain(app)
    told = await compacted(app, {"previous_response_id": parent["id"]})
    assert [each["id"] for each in (await asked(app, "/responses"))["data"]] == [parent["id"]]
    await asked(app, f"/responses/{told['id']}", None, 404)
    body = {"model": "m", "input": "Hi", "previous_response_id": told["id"]}
    assert (await asked(app, "/responses", body, 400))["code"] == "previous_response_not_found"
    assert (await turn(app, "plain", "Hi", previous_response_id=parent["id"]))["status"] == "completed"


async def test_what_the_route_does_not_take_is_named(app: App) -> None:
    body = {"model": "m", "input": "Hi", "tools": TOOLS, "stream": True, "vendor": 1}
    async with app.post(body, "/v1/responses/compact") as answer:
        assert (answer.status, answer.headers["x-responses-proxy-ignored"]) == (200, "stream, tools, vendor")


async def test_another_owners_response_is_as_one_that_never_was(start_app: StartApp) -> None:
    app = await start_app(auth=AUTH)
    alice, bob = Client(app, ALICE), Client(app, BOB)
    parent = (await alice.respond())["id"]
    unknown = parent[:-4] + "0000"
    for path in ("/v1/responses/compact", "/v1/responses/input_tokens"):
        told = [await bob.ask("POST", path, {"model": "m", "previous_response_id": i}) for i in (parent, unknown)]
        assert told[0].without(parent) == told[1].without(unknown)
        assert told[0].status == 400


# -- items that are not ours -------------------------------------------------------------------------------------------


def flipped(blob: str) -> str:
    """Another byte in the middle."""
    at = len(blob) // 2
    return blob[:at] + ("A" if blob[at] != "A" else "B") + blob[at + 1 :]


SPOILT: dict[str, Any] = {
    "tampered": lambda item: {**item, BLOB: flipped(item[BLOB])},
    "truncated": lambda item: {**item, BLOB: item[BLOB][:-8]},
    "longer": lambda item: {**item, BLOB: item[BLOB] + "A"},
    "empty": lambda item: {**item, BLOB: ""},
    "of-nobody": lambda item: {**item, BLOB: "gAAAAABl-of-another-server"},
    "with-another-id": lambda item: {**item, "id": "cmp_other"},
    "unknown-key": lambda item: {**item, BLOB: "rp1_" + "A" * 200},
}
ROUTES = ("/responses", "/responses/compact", "/responses/input_tokens", "/conversations")
each_route = pytest.mark.parametrize("path", ROUTES)


def with_item(path: str, item: Json) -> Json:
    return {"items": [item]} if path == "/conversations" else {"model": "m", "input": [item, user("Hi")]}


@each_route
@pytest.mark.parametrize("how", SPOILT)
async def test_a_spoilt_item_is_a_400(app: App, path: str, how: str) -> None:
    item = SPOILT[how]((await compacted(app, {"input": "Hi"}))["output"][-1])
    error = await asked(app, path, with_item(path, item), 400)
    root = "items" if path == "/conversations" else "input"
    assert (error["code"], error["param"]) == ("invalid_compaction_item", f"{root}[0].{BLOB}")


@pytest.mark.parametrize("blob", [None, 7, {}], ids=str)
async def test_an_item_without_its_content_is_a_400(app: App, blob: Any) -> None:
    for path in ROUTES:
        await asked(app, path, with_item(path, {"type": "compaction", BLOB: blob}), 400)


@pytest.mark.parametrize("options", [{"stream": True}, {"background": True}], ids=["streamed", "background"])
async def test_a_spoilt_item_is_a_400_in_every_mode(app: App, options: Json) -> None:
    item = SPOILT["tampered"]((await compacted(app, {"input": "Hi"}))["output"][-1])
    error = await asked(app, "/responses", {**with_item("", item), **options}, 400)
    assert error["code"] == "invalid_compaction_item"


@both_stores
async def test_an_item_that_is_added_to_a_conversation_is_looked_at(app: App, backend: Talker) -> None:
    item = (await compacted(app, {"input": [user("Hi"), assistant("FACT 2: blue")]}))["output"][-1]
    conversation = await app.openai.conversations.create()
    path = f"/conversations/{conversation.id}/items"
    spoilt = {"items": [user("Hi"), SPOILT["tampered"](item)]}
    assert (await asked(app, path, spoilt, 400))["code"] == "invalid_compaction_item"
    await asked(app, path, {"items": [item]})
    assert (await turn(app, "plain", "Go on.", conversation=conversation.id))["status"] == "completed"
    assert "FACT 2: blue" in texts_of(backend.turns[-1].body)


@each_route
async def test_another_owners_item_is_a_400(start_app: StartApp, path: str) -> None:
    app = await start_app(auth=AUTH)
    alice, bob = Client(app, ALICE), Client(app, BOB)
    item = (await alice.made("/v1/responses/compact", {"model": "m", "input": "Hi"}))["output"][-1]
    assert (await alice.ask("POST", f"/v1{path}", with_item(path, item))).status == 200
    answer = await bob.ask("POST", f"/v1{path}", with_item(path, item))
    assert (answer.status, answer.body["error"]["code"]) == (400, "invalid_compaction_item")


@both_stores
@pytest.mark.parametrize("form", ["chain", "conversation"])
async def test_an_item_without_its_id_can_be_continued(app: App, backend: Talker, form: str) -> None:
    item = (await turn(app, "plain", [*WINDOW, TRIGGER], store=False))["output"][0]
    bare = {key: value for key, value in item.items() if key != "id"}
    past: Json
    if form == "chain":
        past = {"previous_response_id": (await turn(app, "plain", [bare, user("Hi")]))["id"]}
    else:
        past = {"conversation": (await asked(app, "/conversations", {"items": [bare]}))["id"]}
    for _ in range(2):
        child = await turn(app, "plain", "Go on.", **past)
        assert child["status"] == "completed"
    assert "FACT 3: green" in texts_of(backend.turns[-1].body)


# -- /responses/input_tokens -------------------------------------------------------------------------------------------


async def counted(app: App, **body: Any) -> int:
    told = await asked(app, "/responses/input_tokens", {"model": "m", **body})
    assert (set(told), told["object"]) == ({"object", "input_tokens"}, "response.input_tokens")
    return int(told["input_tokens"])


async def test_the_sdk_counts(app: App) -> None:
    count = await app.openai.responses.input_tokens.count(model="m", input="How are you?")
    assert (count.object, 0 < count.input_tokens < 40) == ("response.input_tokens", True)


@pytest.mark.parametrize("body", [{}, {"model": "m"}, {"input": []}, {"input": None}], ids=str)
async def test_nothing_comes_to_nothing(app: App, body: Json) -> None:
    assert (await asked(app, "/responses/input_tokens", body))["input_tokens"] == 0


MORE: dict[str, Json] = {
    "tools": {"tools": TOOLS},
    "instructions": {"instructions": LONG},
    "format": {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"title": FILLER * 9}}}},
}
PNG = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}


@both_stores
@pytest.mark.parametrize("form", ["input", "chain", "conversation"])
@pytest.mark.parametrize("more", MORE)
async def test_what_comes_beside_the_input_counts(app: App, form: str, more: str) -> None:
    """Also when the turn before had none of it."""
    past: Json = {}
    if form == "chain":
        past = {"previous_response_id": (await chain(app))["id"]}
    elif form == "conversation":
        past = {"conversation": (await app.openai.conversations.create()).id}
        await turn(app, "plain", LONG, **past)
    bare = await counted(app, input="Hi", **past)
    assert await counted(app, input="Hi", **past, **MORE[more]) >= bare + 30


async def test_an_image_counts_whatever_its_bytes(app: App) -> None:
    bare = await counted(app, input="Hi")
    assert await counted(app, input=[{"role": "user", "content": [PNG]}]) > bare + 100


@both_stores
async def test_a_long_chain_counts_as_the_backend_counted_it(app: App, backend: Talker) -> None:
    parent = await chain(app, 3)
    count = await counted(app, input="Hi", previous_response_id=parent["id"])
    await turn(app, "plain", "Hi", previous_response_id=parent["id"])
    assert count == pytest.approx(tokens_of(backend.turns[-1].body["messages"]), rel=0.02)


@both_stores
async def test_what_was_compacted_counts_no_more(low: App, backend: Talker) -> None:
    parent = await chain(low, 2)
    count = await counted(low, input="Hi", previous_response_id=parent["id"])
    await turn(low, "plain", "Hi", previous_response_id=parent["id"])
    assert count == pytest.approx(tokens_of(backend.turns[-1].body["messages"]), rel=0.1)


@both_stores
async def test_counting_keeps_nothing_and_waits_for_no_turn(app: App, backend: Talker) -> None:
    conversation = await app.openai.conversations.create()
    backend.answer, goes_on = held(said)
    turning = turn(app, "background", "Hi", conversation=conversation.id)
    run = await app.openai.responses.create(model="m", input="Hi", conversation=conversation.id, background=True)
    await backend.received()
    assert await counted(app, input="Hi", conversation=conversation.id) > 0
    goes_on.set()
    await turning
    assert len((await asked(app, "/responses"))["data"]) == 2
    listing = await asked(app, f"/conversations/{conversation.id}/items")
    assert (kinds(listing["data"]), bool(run.id)) == (["message"] * 4, True)


EXACT = {
    "llamacpp": ("/v1/chat/completions/input_tokens", lambda body: {"input_tokens": tokens_of(body["messages"])}),
    "vllm": ("/tokenize", lambda body: {"count": tokens_of(body["messages"]), "max_model_len": 9, "tokens": []}),
}
each_dialect = pytest.mark.parametrize("dialect", EXACT)


@both_stores
@each_dialect
async def test_a_backends_tokenizer_counts_exactly(start_app: StartApp, backend: Talker, dialect: str) -> None:
    path, count = EXACT[dialect]
    backend.looked_up[path] = count
    app = await start_app(upstream={"dialect": dialect})
    assert await counted(app, input=LONG) == tokens_of([{"role": "user", "content": LONG}])
    parent = await chain(app)
    exact = tokens_of([*parent_messages(backend), {"role": "user", "content": "Hi"}])
    assert await counted(app, input="Hi", previous_response_id=parent["id"]) == exact


def parent_messages(backend: Talker) -> list[Json]:
    asked_for: list[Json] = backend.turns[-1].body["messages"]
    return [*asked_for, {"role": "assistant", "content": "It was a fine day, and then it rained. "}]


@each_dialect
@pytest.mark.parametrize(
    "told",
    [None, {"count": "many", "input_tokens": -3}, [], "x", refused(500, "broken"), Script([b"{"])],
    ids=["404", "no-number", "list", "text", "500", "half"],
)
async def test_a_tokenizer_that_fails_is_an_estimate_and_no_failed_turn(
    start_app: StartApp, backend: Talker, dialect: str, told: Any
) -> None:
    estimate = await counted(await start_app(), input=LONG)
    if told is not None:
        backend.looked_up[EXACT[dialect][0]] = told
    app = await start_app(upstream={"dialect": dialect}, compaction={"threshold_tokens": 1200})
    assert await counted(app, input=LONG) == estimate
    assert (await turn(app, "plain", LONG))["status"] == "completed"


async def test_a_tokenizer_that_is_off_is_not_asked(start_app: StartApp, backend: Talker) -> None:
    backend.looked_up["/tokenize"] = {"count": 77}
    app = await start_app(upstream={"dialect": "vllm", "tokenizer": "off"})
    assert await counted(app, input=LONG) > 77


@pytest.mark.parametrize(("count", "expected"), [(5000, True), (500, False)])
async def test_near_a_threshold_the_tokenizer_decides(
    start_app: StartApp, backend: Talker, count: int, expected: bool
) -> None:
    backend.looked_up["/tokenize"] = {"count": count}
    app = await start_app(upstream={"dialect": "vllm"}, compaction={"threshold_tokens": 1000})
    response = await turn(app, "plain", [user(LONG), assistant(LONG), user("Hi")])
    assert ("compaction" in kinds(response["output"])) == expected


async def test_what_counting_does_not_take_is_named(app: App) -> None:
    async with app.post({"input": "Hi", "store": True, "vendor": 1}, "/v1/responses/input_tokens") as answer:
        assert (answer.status, answer.headers["x-responses-proxy-ignored"]) == (200, "store, vendor")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"previous_response_id": "resp_unknown"}, 400),
        ({"conversation": "conv_unknown"}, 404),
        ({"input": [{"type": "nonsense"}]}, 400),
        ({"input": 7}, 400),
    ],
    ids=str,
)
async def test_what_cannot_be_counted_is_an_error(app: App, body: Json, status: int) -> None:
    assert (await asked(app, "/responses/input_tokens", body, status))["message"]
