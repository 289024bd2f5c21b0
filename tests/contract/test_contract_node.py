"""The clients of tests/node against the running proxy: the official Node SDK and the AI SDK, each with tool loops."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import App, StartApp
from node import needs_node, node
from scripted import Backend, plain, streamed
from weather import (
    ANSWER,
    NEXT_ANSWER,
    PARIS,
    TAKES_REASONING,
    THOUGHT,
    assert_whole_history_once,
    scripts,
    thoughtful_scripts,
)

pytestmark = [needs_node, pytest.mark.timeout(120)]


@pytest.fixture
async def app(start_app: StartApp) -> App:
    return await start_app(upstream=TAKES_REASONING)


# What each answer costs the scripted backend, in tokens.
TURN_TOKENS = 18


async def outcome(app: App, script: str, scenario: str) -> Any:
    return json.loads(await node(app).run("node", script, scenario))


def told(form: str, tokens: int, **more: Any) -> list[Any]:
    """What a client makes of the two runs."""
    is_streamed = form.startswith("streamed")
    return [
        {"text": text, "deltas": text if is_streamed else "", "usage": tokens, **more} for text in (ANSWER, NEXT_ANSWER)
    ]


@pytest.mark.parametrize("form", ["plain_chain", "streamed_chain"])
async def test_runs_of_the_node_sdk_over_a_chain_send_the_whole_history_once(
    app: App, backend: Backend, form: str
) -> None:
    backend.script(*thoughtful_scripts(form.startswith("streamed")))
    assert await outcome(app, "openai.js", form) == told(form, TURN_TOKENS)
    assert_whole_history_once(backend, reasoning_content=THOUGHT)


@pytest.mark.parametrize("form", ["plain_conversation", "streamed_conversation"])
async def test_runs_of_the_node_sdk_in_a_conversation_are_kept_in_it(app: App, backend: Backend, form: str) -> None:
    backend.script(*thoughtful_scripts(form.startswith("streamed")))
    kinds = ["message", "reasoning", "function_call", "function_call_output", "reasoning", "message"] * 2
    assert await outcome(app, "openai.js", form) == {"told": told(form, TURN_TOKENS), "kinds": kinds}
    assert_whole_history_once(backend, reasoning_content=THOUGHT)


async def test_the_node_sdk_finds_what_is_stored_and_misses_what_was_deleted(app: App, backend: Backend) -> None:
    backend.script(streamed("You."))
    found = {"text": "You.", "items": ["Who?"], "error": "NotFoundError"}
    assert await outcome(app, "openai.js", "stored") == found


async def test_the_node_sdk_waits_for_a_response_in_background(app: App, backend: Backend) -> None:
    backend.script(plain("You."))
    found = {"first": "queued", "last": "completed", "text": "You."}
    assert await outcome(app, "openai.js", "background") == found


@pytest.mark.parametrize("script", ["openai.js", "ai_sdk.js"])
async def test_an_answer_is_parsed_by_its_schema(app: App, backend: Backend, script: str) -> None:
    backend.script(plain(PARIS))
    assert await outcome(app, script, "parsed") == {"city": "Paris"}
    schema = backend.requests[0].body["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"city": {"type": "string"}}


FORMS = [f"{way}_{form}" for form in ("messages", "unstored") for way in ("plain", "streamed")]


@pytest.mark.parametrize("form", FORMS)
async def test_runs_of_the_ai_sdk_send_the_whole_history_once(app: App, backend: Backend, form: str) -> None:
    backend.script(*thoughtful_scripts(form.startswith("streamed")))
    assert await outcome(app, "ai_sdk.js", form) == told(form, 2 * TURN_TOKENS, finishReason="stop")
    assert_whole_history_once(backend, reasoning_content=THOUGHT)


@pytest.mark.parametrize("form", ["plain_chain", "streamed_chain"])
async def test_runs_of_the_ai_sdk_over_a_chain_send_the_whole_history_once(
    app: App, backend: Backend, form: str
) -> None:
    """Without reasoning, which the SDK leaves out of the steps of a run that continues a response."""
    backend.script(*scripts(form.startswith("streamed")))
    assert await outcome(app, "ai_sdk.js", form) == told(form, 2 * TURN_TOKENS, finishReason="stop")
    assert_whole_history_once(backend)
