"""What real clients sent (tests/clients, captured in November 2026) goes through, or is told what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import App
from rendering import LIMITS
from scripted import Backend, Script, plain, plain_call

from dialects import DIALECTS
from request import TurnRequest, echo, parse_body, parse_request
from translation import Rendered, render

Json = dict[str, Any]
HERE = Path(__file__).parent / "clients"

# File and line (from 0) -> what the request needs beside itself: what was stored before, or a part of the API.
NEEDS_THE_STORE = {
    ("agents", 4): "previous_response_id",
    ("agents", 5): "previous_response_id",
    ("agents", 7): "conversation",
    ("agents", 8): "conversation",
    ("agents", 16): "compaction",
    ("agents", 17): "compaction",
    ("agents", 21): "compaction",
    ("ai-sdk", 9): "previous_response_id",
    ("ai-sdk", 10): "references",
    ("codex", 17): "compaction",
    ("codex", 18): "compaction",
    ("langchain", 3): "previous_response_id",
    ("openai-sdk", 7): "previous_response_id",
    ("openai-sdk", 11): "previous_response_id",
    ("openai-sdk", 12): "previous_response_id",
    ("openai-sdk", 22): "compaction",
    ("openai-sdk", 28): "conversation",
    ("pydantic-ai", 3): "previous_response_id",
    ("pydantic-ai", 4): "previous_response_id",
}


def captured() -> list[tuple[str, int, Json]]:
    found = []
    for file in sorted(HERE.glob("*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines()):
            sent = json.loads(line)
            if (sent["method"], sent["path"]) == ("POST", "/v1/responses"):
                found.append((file.stem, number, sent["body"]))
    return found


CAPTURED = captured()
BODIES = {(file, number): body for file, number, body in CAPTURED}
SERVED = [pytest.param(body, id=f"{f}-{n}") for f, n, body in CAPTURED if (f, n) not in NEEDS_THE_STORE]


def request_of(body: Json) -> TurnRequest:
    return parse_request(parse_body(orjson.dumps(body), LIMITS), LIMITS)


def rendered(body: Json, dialect: str) -> Rendered:
    request = request_of(body)
    return render(request, request.items, DIALECTS[dialect], request.model)


def test_the_captures_are_all_there() -> None:
    assert (len(CAPTURED), len(NEEDS_THE_STORE.keys() & BODIES.keys())) == (84, 19)


@pytest.mark.parametrize("body", SERVED)
def test_a_captured_request_is_rendered_in_every_dialect(body: Json) -> None:
    for dialect in DIALECTS:
        chat = orjson.loads(orjson.dumps(rendered(body, dialect).body))
        calls = [call["id"] for m in chat["messages"] for call in m.get("tool_calls", ())]
        outputs = [m["tool_call_id"] for m in chat["messages"] if m["role"] == "tool"]
        assert (calls, True) == (outputs, bool(chat["messages"]))
        assert chat.get("tools") != []


@pytest.mark.parametrize("body", SERVED)
def test_a_captured_request_is_echoed(body: Json) -> None:
    echoed = orjson.loads(orjson.dumps(echo(request_of(body))))
    sent = {key: body.get(key) for key in ("model", "instructions", "tool_choice", "max_output_tokens")}
    assert {**sent, "tool_choice": sent["tool_choice"] or "auto"} == {key: echoed[key] for key in sent}
    assert len(body.get("tools") or ()) == len(echoed["tools"])


WITH_COMPACTION = [where for where, what in NEEDS_THE_STORE.items() if what == "compaction"]
STATEFUL = [where for where in NEEDS_THE_STORE if where not in WITH_COMPACTION]


@pytest.mark.parametrize("where", WITH_COMPACTION, ids=str)
async def test_a_captured_request_with_a_compaction_is_answered(app: App, where: tuple[str, int]) -> None:
    """With an item that was compacted here, where the capture has one of another server."""
    async with app.post({"model": "m", "input": "Earlier"}, "/v1/responses/compact") as answer:
        ours = (await answer.json())["output"][-1]
    body = BODIES[where]
    said = [ours if item.get("type") == "compaction" else item for item in body["input"]]
    async with app.post({**body, "input": said, "stream": False}) as answer:
        response = await answer.json()
    is_trigger = said[-1].get("type") == "compaction_trigger"
    assert (answer.status, response.get("status")) == (200, "completed"), response
    assert [item["type"] for item in response["output"]] == ["compaction" if is_trigger else "message"]


@pytest.mark.parametrize("where", [where for where in WITH_COMPACTION if where != ("codex", 17)], ids=str)
async def test_a_compaction_item_of_another_server_is_a_400(app: App, where: tuple[str, int]) -> None:
    async with app.post(BODIES[where]) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, "invalid_compaction_item")


# Type of an output -> the tool whose calls have such an output, and the arguments with which a backend calls it.
CALLED = {"function_call_output": ("function", "{}"), "custom_tool_call_output": ("custom", '{"input":"echo"}')}
EARLIER: Json = {"model": "m", "input": "Earlier", "tools": [{"type": t, "name": t} for t, _ in CALLED.values()]}


def earlier_answer(body: Json) -> Script:
    """What the model has to have said before a captured request: the call whose output it brings, or any text."""
    first = body["input"][0] if isinstance(body["input"], list) else {}
    if first.get("type") not in CALLED:
        return plain("Noted.")
    return plain_call(*CALLED[first["type"]], first["call_id"])


async def with_its_past(app: App, backend: Backend, body: Json) -> Json:
    """A captured request after what it names has been made here, with the ids that this got."""
    backend.script(earlier_answer(body), plain())
    conversation = await app.openai.conversations.create()
    async with app.post({**EARLIER, **({"conversation": conversation.id} if "conversation" in body else {})}) as answer:
        response = await answer.json()
    ids = {"previous_response_id": response["id"], "conversation": conversation.id}
    said = body["input"]
    if isinstance(said, list):
        item_id = response["output"][0]["id"]
        said = [{**item, "id": item_id} if item.get("type") == "item_reference" else item for item in said]
    return {**body, **{key: given for key, given in ids.items() if key in body}, "input": said}


@pytest.mark.parametrize("where", STATEFUL, ids=str)
async def test_a_captured_request_is_answered_when_what_it_names_exists(
    app: App, backend: Backend, where: tuple[str, int]
) -> None:
    body = await with_its_past(app, backend, BODIES[where])
    async with app.post(body) as answer:
        response = await answer.json()
    assert (answer.status, response.get("status")) == (200, "completed"), response
    assert response["previous_response_id"] == body.get("previous_response_id")
    assert response["conversation"] == ({"id": body["conversation"]} if "conversation" in body else None)


@pytest.mark.parametrize("where", [where for where in STATEFUL if NEEDS_THE_STORE[where] != "references"], ids=str)
async def test_a_captured_request_is_told_to_the_backend_after_its_past(
    app: App, backend: Backend, where: tuple[str, int]
) -> None:
    body = await with_its_past(app, backend, BODIES[where])
    async with app.post(body) as answer:
        await answer.read()
    messages = [m for m in backend.requests[-1].body["messages"] if m["role"] != "system"]
    (question, earlier), new = messages[:2], messages[2:]
    assert question == {"role": "user", "content": "Earlier"}
    assert earlier["content"] == ("" if earlier.get("tool_calls") else "Noted.")
    calls = [call["id"] for call in earlier.get("tool_calls", ())]
    assert (calls, len(new)) == ([m["tool_call_id"] for m in new if m["role"] == "tool"], len(request_of(body).items))


async def test_a_captured_reference_is_told_to_the_backend_as_what_it_names(app: App, backend: Backend) -> None:
    body = await with_its_past(app, backend, BODIES["ai-sdk", 10])
    async with app.post(body) as answer:
        await answer.read()
    roles = [(message["role"], message["content"]) for message in backend.requests[-1].body["messages"]]
    question, call, output, reference, last = roles
    assert (reference, last) == (("assistant", "Noted."), ("user", "thanks, bye"))
    assert [question[0], call[0], output[0]] == ["user", "assistant", "tool"]


def test_codex_is_offered_its_namespaced_tools_under_legal_names() -> None:
    names = [tool["function"]["name"] for tool in rendered(BODIES["codex", 0], "generic").body["tools"]]
    assert [names[0], *(n for n in names if "spawn" in n)] == ["exec_command", "multi_agent_v1__spawn_agent"]


def tool_names(body: Json) -> set[str]:
    return {tool["function"]["name"] for tool in rendered(body, "generic").body["tools"]}


def test_codex_finds_tools_by_its_own_search_in_mid_conversation() -> None:
    body = BODIES["codex", 6]
    found = tool_names(body) - tool_names({**body, "input": body["input"][:-2]})
    wanted = {f"multi_agent_v1__{name}_agent" for name in ("spawn", "resume", "close")}
    assert (wanted, True) == (found, "tool_search" in tool_names(body))


def test_codex_is_told_that_nobody_here_searches_the_web() -> None:
    assert "tools[8].type=web_search" in rendered(BODIES["codex", 0], "generic").ignored
