"""Reasoning of earlier turns: sealed for clients that keep their history, given back to the backend, hidden else."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import App, StartApp
from scripted import END, Backend, Script, chunk, plain, plain_call, streamed
from test_proxy import Blocks, events_in

Json = dict[str, Any]
THOUGHT = "Rivers first, then hills."
USER: Json = {"type": "message", "role": "user", "content": "Where is Ulm?"}
THANKS: Json = {"type": "message", "role": "user", "content": "Thanks"}
HI: Json = {"model": "m", "input": [USER]}
ENCRYPTED: Json = {"include": ["reasoning.encrypted_content"]}
STATELESS: Json = {"store": False}
IGNORED = "x-responses-proxy-ignored"
THINKING = plain("By the Danube.", reasoning_content=THOUGHT)
THINKING_STREAM = Script(
    [
        chunk(reasoning_content="Rivers first, "),
        chunk(reasoning_content="then hills."),
        chunk(content="By the Danube."),
        *END,
    ]
)
WEATHER: Json = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
# What the backend has to be given in the second turn.
REPLAYED: list[Json] = [
    {"role": "user", "content": "Where is Ulm?"},
    {"role": "assistant", "content": "By the Danube.", "reasoning_content": THOUGHT},
    {"role": "user", "content": "Thanks"},
]
FORGOTTEN: list[Json] = [REPLAYED[0], {"role": "assistant", "content": "By the Danube."}, REPLAYED[2]]

# How reasoning stands in its item.
SHOWN: dict[str, Json] = {
    "summary": {"summary": [{"type": "summary_text", "text": THOUGHT}]},
    "text": {"summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]},
    "none": {"summary": []},
}

each_exposure = pytest.mark.parametrize("expose", ["summary", "text", "none"])


async def posted(app: App, body: Json, **headers: str) -> tuple[Json, str | None]:
    """The response, and what was left out of the request."""
    async with app.post({**HI, **body}, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        response: Json = await answer.json()
        return response, answer.headers.get(IGNORED)


async def streamed_events(app: App, body: Json) -> list[Json]:
    async with app.post({**HI, **body, "stream": True}) as answer:
        return events_in(await Blocks(answer).rest())


async def output_of(app: App, backend: Backend, body: Json = STATELESS, **headers: str) -> list[Json]:
    """The items of a turn that reasoned, to be sent back."""
    backend.script(THINKING, plain())
    response, _ = await posted(app, body, **headers)
    output: list[Json] = response["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    return output


async def deepseek(start_app: StartApp, expose: str = "summary", **sections: Json) -> App:
    return await start_app(upstream={"dialect": "deepseek"}, reasoning={"expose": expose}, **sections)


def messages_of(backend: Backend) -> list[Json]:
    """What the backend was given last."""
    messages: list[Json] = backend.requests[-1].body["messages"]
    return messages


# -- sealed for the client ---------------------------------------------------------------------------------------------


@each_exposure
@pytest.mark.parametrize("body", [STATELESS, ENCRYPTED, {**STATELESS, **ENCRYPTED}], ids=["store", "include", "both"])
async def test_a_plain_response_has_it_sealed(start_app: StartApp, backend: Backend, body: Json, expose: str) -> None:
    app = await deepseek(start_app, expose)
    reasoning, _ = await output_of(app, backend, body)
    blob = reasoning.pop("encrypted_content")
    assert (blob[:4], THOUGHT in blob) == ("rp1_", False)
    assert reasoning == {"id": reasoning["id"], "type": "reasoning", **SHOWN[expose]}


@each_exposure
@pytest.mark.parametrize("body", [STATELESS, ENCRYPTED], ids=["store", "include"])
async def test_a_stream_has_it_sealed_on_the_done_item_and_in_the_final_response(
    start_app: StartApp, backend: Backend, body: Json, expose: str
) -> None:
    backend.script(THINKING_STREAM)
    events = await streamed_events(await deepseek(start_app, expose), body)
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == events[-1]["response"]["output"]
    assert [item["type"] for item in items if "encrypted_content" in item] == ["reasoning"]


async def test_a_stored_response_has_it_not_sealed_unless_asked(app: App, backend: Backend) -> None:
    reasoning, _ = await output_of(app, backend, {})
    assert "encrypted_content" not in reasoning


@pytest.mark.parametrize("body", [STATELESS, ENCRYPTED, {}], ids=["store", "include", "stored"])
async def test_hidden_reasoning_is_nowhere_in_the_answer(start_app: StartApp, backend: Backend, body: Json) -> None:
    app = await deepseek(start_app, "none")
    assert THOUGHT not in json.dumps(await output_of(app, backend, body))
    backend.script(THINKING_STREAM)
    text = json.dumps(await streamed_events(app, body))
    assert ("Rivers" in text, "hills" in text) == (False, False)


# -- given back by the client ------------------------------------------------------------------------------------------


@each_exposure
@pytest.mark.parametrize("body", [STATELESS, ENCRYPTED, {}], ids=["store", "include", "stored"])
async def test_sent_back_it_reaches_the_backend(start_app: StartApp, backend: Backend, body: Json, expose: str) -> None:
    app = await deepseek(start_app, expose)
    output = await output_of(app, backend, STATELESS)
    _, left_out = await posted(app, {**body, "input": [USER, *output, THANKS]})
    assert (messages_of(backend), left_out) == (REPLAYED, None)


@pytest.mark.parametrize("without", [["id"], ["summary"], ["id", "summary"]], ids="+".join)
async def test_sent_back_without_what_clients_leave_out_it_reaches_the_backend(
    start_app: StartApp, backend: Backend, without: list[str]
) -> None:
    app = await deepseek(start_app)
    reasoning, message = await output_of(app, backend)
    reasoning = {key: value for key, value in reasoning.items() if key not in without}
    _, left_out = await posted(app, {"input": [USER, reasoning, message, THANKS]})
    assert (messages_of(backend), left_out) == (REPLAYED, None)


async def test_the_sealed_text_counts_and_not_what_the_client_made_of_the_summary(
    start_app: StartApp, backend: Backend
) -> None:
    app = await deepseek(start_app)
    reasoning, message = await output_of(app, backend)
    reasoning["summary"] = [{"type": "summary_text", "text": "Something else."}]
    await posted(app, {"input": [USER, reasoning, message, THANKS]})
    assert messages_of(backend) == REPLAYED


async def test_sent_back_it_goes_with_the_calls_that_it_led_to(start_app: StartApp, backend: Backend) -> None:
    app = await deepseek(start_app, "none")
    call = plain_call("weather", '{"city": "Ulm"}')
    (step,) = call.steps
    assert isinstance(step, bytes)
    body = json.loads(step)
    body["choices"][0]["message"]["reasoning_content"] = THOUGHT
    backend.script(Script([json.dumps(body).encode()]), plain())
    response, _ = await posted(app, {**STATELESS, "tools": [WEATHER]})
    result = {"type": "function_call_output", "call_id": "call_1", "output": "Rain"}
    await posted(app, {**STATELESS, "tools": [WEATHER], "input": [USER, *response["output"], result]})
    function = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert messages_of(backend)[1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": THOUGHT,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
    ]


@pytest.mark.parametrize(
    ("dialect", "field"), [("llamacpp", "reasoning_content"), ("vllm", "reasoning"), ("groq", "reasoning")]
)
async def test_each_backend_gets_it_in_the_field_that_it_reads(
    start_app: StartApp, backend: Backend, dialect: str, field: str
) -> None:
    app = await start_app(upstream={"dialect": dialect}, reasoning={"expose": "none"})
    output = await output_of(app, backend)
    await posted(app, {"input": [USER, *output, THANKS]})
    assert messages_of(backend) == [REPLAYED[0], {**FORGOTTEN[1], field: THOUGHT}, REPLAYED[2]]


async def test_a_backend_that_reads_no_reasoning_gets_none(start_app: StartApp, backend: Backend) -> None:
    app = await start_app()
    output = await output_of(app, backend)
    await posted(app, {"input": [USER, *output, THANKS]})
    assert messages_of(backend) == FORGOTTEN


# -- what cannot be opened ---------------------------------------------------------------------------------------------


def altered(blob: str) -> str:
    return f"{blob[:40]}{'A' if blob[40] != 'A' else 'B'}{blob[41:]}"


@pytest.mark.parametrize(
    "change",
    [
        lambda item: {**item, "encrypted_content": altered(item["encrypted_content"])},
        lambda item: {**item, "encrypted_content": item["encrypted_content"][:-4]},
        lambda item: {**item, "encrypted_content": "gAAAAABmadeElsewhere"},
        lambda item: {**item, "id": "rs_another"},
        lambda item: {**item, "id": item["id"].upper()},
    ],
    ids=["altered", "cut", "of another server", "another id", "id in capitals"],
)
@pytest.mark.parametrize("body", [STATELESS, {}], ids=["store false", "stored"])
async def test_a_blob_that_does_not_open_is_left_out_and_named(
    start_app: StartApp, backend: Backend, change: Any, body: Json
) -> None:
    app = await deepseek(start_app, "none")
    reasoning, message = await output_of(app, backend)
    response, left_out = await posted(app, {**body, "input": [USER, change(reasoning), message, THANKS]})
    assert (response["status"], messages_of(backend)) == ("completed", FORGOTTEN)
    assert left_out == "input[1].encrypted_content"


async def test_the_blob_of_another_owner_is_left_out_and_named(start_app: StartApp, backend: Backend) -> None:
    keys = {name: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("ann", "ben")}
    app = await deepseek(start_app, "none", auth={"mode": "keys", "keys": keys})
    output = await output_of(app, backend, STATELESS, authorization="Bearer ann")
    body = {**STATELESS, "input": [USER, *output, THANKS]}
    _, left_out = await posted(app, body, authorization="Bearer ben")
    assert (messages_of(backend), left_out) == (FORGOTTEN, "input[1].encrypted_content")
    _, left_out = await posted(app, body, authorization="Bearer ann")
    assert (messages_of(backend), left_out) == (REPLAYED, None)


async def test_a_blob_of_ours_on_a_message_is_not_looked_at(start_app: StartApp, backend: Backend) -> None:
    app = await deepseek(start_app, "none")
    reasoning, message = await output_of(app, backend)
    message = {**message, "encrypted_content": reasoning["encrypted_content"]}
    _, left_out = await posted(app, {"input": [USER, message, THANKS]})
    assert (messages_of(backend), left_out) == (FORGOTTEN, None)


@pytest.mark.parametrize("blob", [None, "", 5, [], {}], ids=repr)
async def test_an_odd_blob_is_no_fault(start_app: StartApp, backend: Backend, blob: Any) -> None:
    app = await deepseek(start_app)
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": blob}
    response, _ = await posted(app, {"input": [USER, item, THANKS]})
    assert response["status"] == "completed"


# -- kept by us --------------------------------------------------------------------------------------------------------


@each_exposure
@pytest.mark.parametrize("first", [{}, ENCRYPTED], ids=["plain", "include"])
async def test_a_chain_gives_the_backend_its_reasoning_back(
    start_app: StartApp, backend: Backend, expose: str, first: Json
) -> None:
    app = await deepseek(start_app, expose)
    backend.script(THINKING, plain())
    response, _ = await posted(app, first)
    _, left_out = await posted(app, {"previous_response_id": response["id"], "input": [THANKS]})
    assert (messages_of(backend), left_out) == (REPLAYED, None)


@each_exposure
async def test_a_streamed_chain_gives_the_backend_its_reasoning_back(
    start_app: StartApp, backend: Backend, expose: str
) -> None:
    app = await deepseek(start_app, expose)
    backend.script(THINKING_STREAM, streamed("Hi"))
    *_, last = await streamed_events(app, {})
    await streamed_events(app, {"previous_response_id": last["response"]["id"], "input": [THANKS]})
    assert messages_of(backend) == REPLAYED


@each_exposure
async def test_a_conversation_gives_the_backend_its_reasoning_back(
    start_app: StartApp, backend: Backend, expose: str
) -> None:
    app = await deepseek(start_app, expose)
    backend.script(THINKING, plain())
    conversation = await app.openai.conversations.create()
    for item in (USER, THANKS):
        await posted(app, {"conversation": conversation.id, "input": [item]})
    assert messages_of(backend) == REPLAYED


async def test_items_put_into_a_conversation_give_the_backend_their_reasoning(
    start_app: StartApp, backend: Backend
) -> None:
    app = await deepseek(start_app, "none")
    output = await output_of(app, backend)
    async with app.post({"items": [USER, *output]}, "/v1/conversations") as answer:
        conversation = (await answer.json())["id"]
    await posted(app, {"conversation": conversation, "input": [THANKS]})
    assert messages_of(backend) == REPLAYED


async def test_a_reference_to_a_reasoning_item_gives_the_backend_its_text(
    start_app: StartApp, backend: Backend
) -> None:
    app = await deepseek(start_app, "none")
    output = await output_of(app, backend, {})
    given = [{"type": "item_reference", "id": item["id"]} for item in output]
    await posted(app, {"input": [USER, *given, THANKS]})
    assert messages_of(backend) == REPLAYED


async def test_a_chain_over_items_that_a_client_sent_back_goes_on(start_app: StartApp, backend: Backend) -> None:
    app = await deepseek(start_app, "none")
    output = await output_of(app, backend)
    response, _ = await posted(app, {"input": [USER, *output, THANKS]})
    _, left_out = await posted(app, {"previous_response_id": response["id"], "input": [THANKS]})
    assert (messages_of(backend)[:3], left_out) == (REPLAYED, None)


DETAILS = [
    {"type": "reasoning.text", "text": THOUGHT, "signature": "s1gn", "id": "r1", "index": 0},
    {"type": "reasoning.encrypted", "data": "b64", "id": "r2", "index": 1},
]


@each_exposure
@pytest.mark.parametrize("is_kept", [True, False], ids=["chain", "stateless"])
async def test_a_backends_own_records_are_given_back_unmodified(
    start_app: StartApp, backend: Backend, expose: str, is_kept: bool
) -> None:
    app = await start_app(upstream={"dialect": "openrouter"}, reasoning={"expose": expose})
    backend.script(plain("By the Danube.", reasoning=THOUGHT, reasoning_details=DETAILS), plain())
    first, _ = await posted(app, {} if is_kept else STATELESS)
    again = {"previous_response_id": first["id"], "input": [THANKS]}
    await posted(app, again if is_kept else {**STATELESS, "input": [USER, *first["output"], THANKS]})
    assert messages_of(backend) == [REPLAYED[0], {**FORGOTTEN[1], "reasoning_details": DETAILS}, REPLAYED[2]]


@pytest.mark.parametrize("body", [{}, STATELESS], ids=["stored", "stateless"])
async def test_a_backends_own_records_are_hidden_with_the_reasoning(
    start_app: StartApp, backend: Backend, body: Json
) -> None:
    app = await start_app(upstream={"dialect": "openrouter"}, reasoning={"expose": "none"})
    backend.script(plain("By the Danube.", reasoning=THOUGHT, reasoning_details=DETAILS))
    response, _ = await posted(app, body)
    assert THOUGHT not in json.dumps(response)


# -- in the file -------------------------------------------------------------------------------------------------------


def holding(text: str, folder: Path) -> list[str]:
    """The files in which a text stands."""
    return sorted(path.name for path in folder.iterdir() if text.encode() in path.read_bytes())


@pytest.mark.parametrize(
    "script",
    [THINKING, plain("By the Danube.", reasoning=THOUGHT, reasoning_details=DETAILS)],
    ids=["text", "records"],
)
async def test_hidden_reasoning_is_not_in_clear_in_the_file(
    start_app: StartApp, backend: Backend, tmp_path: Path, script: Script
) -> None:
    app = await deepseek(start_app, "none", store={"path": str(tmp_path / "responses.db")})
    backend.script(script)
    await posted(app, {})
    assert (holding("By the Danube.", tmp_path), holding(THOUGHT, tmp_path)) == (["responses.db-wal"], [])


async def test_hidden_reasoning_is_known_after_a_restart(start_app: StartApp, backend: Backend, tmp_path: Path) -> None:
    store = {"path": str(tmp_path / "responses.db")}
    backend.script(THINKING, plain())
    response, _ = await posted(await deepseek(start_app, "none", store=store), {})
    again = await deepseek(start_app, "none", store=store)
    await posted(again, {"previous_response_id": response["id"], "input": [THANKS]})
    assert messages_of(backend) == REPLAYED


# -- keys --------------------------------------------------------------------------------------------------------------

OLD, NEW = (base64.b64encode(letter * 32).decode() for letter in (b"o", b"n"))


@pytest.mark.parametrize("keys", [(OLD,), (NEW, OLD)], ids=["same", "new first"])
async def test_what_an_old_key_sealed_opens_for_as_long_as_the_key_is_there(
    start_app: StartApp, backend: Backend, keys: tuple[str, ...]
) -> None:
    output = await output_of(await deepseek(start_app, "none", sealing={"keys": (OLD,)}), backend)
    rotated = await deepseek(start_app, "none", sealing={"keys": keys})
    _, left_out = await posted(rotated, {"input": [USER, *output, THANKS]})
    assert (messages_of(backend), left_out) == (REPLAYED, None)


async def test_the_first_key_seals(start_app: StartApp, backend: Backend) -> None:
    output = await output_of(await deepseek(start_app, "none", sealing={"keys": (NEW, OLD)}), backend)
    _, left_out = await posted(
        await deepseek(start_app, "none", sealing={"keys": (OLD,)}), {"input": [USER, *output, THANKS]}
    )
    assert (messages_of(backend), left_out) == (FORGOTTEN, "input[1].encrypted_content")


async def test_a_blob_whose_key_is_gone_is_left_out_and_named(start_app: StartApp, backend: Backend) -> None:
    output = await output_of(await deepseek(start_app, "none", sealing={"keys": (OLD,)}), backend)
    _, left_out = await posted(
        await deepseek(start_app, "none", sealing={"keys": (NEW,)}), {"input": [USER, *output, THANKS]}
    )
    assert (messages_of(backend), left_out) == (FORGOTTEN, "input[1].encrypted_content")


async def test_a_chain_whose_key_is_gone_names_the_reasoning_that_it_left_out(
    start_app: StartApp, backend: Backend, tmp_path: Path
) -> None:
    store = {"path": str(tmp_path / "responses.db")}
    backend.script(THINKING, plain())
    first = await deepseek(start_app, "none", store=store, sealing={"keys": (OLD,)})
    response, _ = await posted(first, {})
    rotated = await deepseek(start_app, "none", store=store, sealing={"keys": (NEW,)})
    _, left_out = await posted(rotated, {"previous_response_id": response["id"], "input": [THANKS]})
    assert (messages_of(backend), left_out) == (FORGOTTEN, "history[1].encrypted_content")


# -- as the routes show it ---------------------------------------------------------------------------------------------


async def got(app: App, path: str) -> Json:
    async with app.http.get(f"{app.url}/v1{path}") as answer:
        assert answer.status == 200, await answer.text()
        body: Json = await answer.json()
        return body


@pytest.mark.parametrize("expose", ["summary", "none"])
async def test_a_retrieved_response_shows_it_when_asked(start_app: StartApp, backend: Backend, expose: str) -> None:
    app = await deepseek(start_app, expose)
    backend.script(THINKING)
    response, _ = await posted(app, ENCRYPTED)
    reasoning, message = response["output"]
    bare = {key: value for key, value in reasoning.items() if key != "encrypted_content"}
    path = f"/responses/{response['id']}"
    assert await got(app, path) == {**response, "output": [bare, message]}
    for include in ("include", "include[]"):
        assert await got(app, f"{path}?{include}=reasoning.encrypted_content") == response


async def test_the_list_of_responses_does_not_show_it(app: App, backend: Backend) -> None:
    await output_of(app, backend, ENCRYPTED)
    (listed,) = (await got(app, "/responses"))["data"]
    assert [item["type"] for item in listed["output"] if "encrypted_content" in item] == []


async def test_the_items_of_a_conversation_show_it_when_asked(start_app: StartApp, backend: Backend) -> None:
    app = await deepseek(start_app, "none")
    conversation = await app.openai.conversations.create()
    output = await output_of(app, backend, {**ENCRYPTED, "conversation": conversation.id})
    path = f"/conversations/{conversation.id}/items"
    blobs = {}
    for query in ("", "?include=reasoning.encrypted_content"):
        listed = (await got(app, path + query))["data"]
        one = await got(app, f"{path}/{output[0]['id']}{query}")
        blobs[query] = [item.get("encrypted_content") for item in (*listed, one) if item["type"] == "reasoning"]
    assert blobs == {"": [None] * 2, "?include=reasoning.encrypted_content": [output[0]["encrypted_content"]] * 2}


async def test_input_items_do_not_show_reasoning(start_app: StartApp, backend: Backend) -> None:
    app = await deepseek(start_app, "none")
    output = await output_of(app, backend)
    response, _ = await posted(app, {"input": [USER, *output, THANKS]})
    listed = await got(app, f"/responses/{response['id']}/input_items?order=asc&include=reasoning.encrypted_content")
    assert [item["type"] for item in listed["data"]] == ["message"] * 3
