"""What real clients sent (tests/clients, captured in November 2026) goes through, or is told what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from rendering import LIMITS

from dialects import DIALECTS
from errors import InvalidRequest
from request import TurnRequest, echo, parse_body, parse_request
from translation import Rendered, render

Json = dict[str, Any]
HERE = Path(__file__).parent / "clients"

# File and line (from 0) -> what the request needs that only a store can give.
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
    ("openai-sdk", 17): "background",
    ("openai-sdk", 18): "background",
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
    assert (len(CAPTURED), len(NEEDS_THE_STORE.keys() & BODIES.keys())) == (84, 21)


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


@pytest.mark.parametrize(("where", "what"), NEEDS_THE_STORE.items(), ids=str)
def test_a_request_that_needs_the_store_is_told_so(where: tuple[str, int], what: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{what}.* (stored responses|not in this version)") as caught:
        rendered(BODIES[where], "generic")
    assert caught.value.http_status == 400


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
