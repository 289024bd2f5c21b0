"""Pydantic AI against the running proxy: tool loops, plain and streamed, told anew and by `previous_response_id`."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import App, StartApp
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel, OpenAIResponsesModelSettings
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider
from scripted import Backend, plain_call
from weather import (
    ANSWER,
    NEXT_ANSWER,
    NEXT_QUESTION,
    PARIS,
    QUESTION,
    TAKES_REASONING,
    THOUGHT,
    assert_whole_history_once,
    each_way,
    thoughtful_scripts,
)

# How a run is told of earlier ones: settings, and what is said of the model.
SEALED = OpenAIModelProfile(openai_supports_encrypted_reasoning_content=True)
MEMORIES: dict[str, tuple[OpenAIResponsesModelSettings, OpenAIModelProfile | None]] = {
    "sealed": ({}, SEALED),
    "sealed-unstored": ({"openai_store": False}, SEALED),
    "by-previous-id": ({"openai_previous_response_id": "auto"}, None),
}
each_memory = pytest.mark.parametrize("memory", MEMORIES)


class Place(BaseModel):
    city: str


def model_of(app: App, profile: OpenAIModelProfile | None = None) -> OpenAIResponsesModel:
    return OpenAIResponsesModel("m", provider=OpenAIProvider(openai_client=app.openai), profile=profile)


def agent_of(app: App, memory: str) -> Agent[None, str]:
    settings, profile = MEMORIES[memory]
    agent = Agent(model_of(app, profile), instructions="Be helpful.", model_settings=settings)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    return agent


async def run(agent: Agent[None, str], said: str, history: list[Any], *, stream: bool) -> tuple[str, list[Any]]:
    """What was answered, and all messages by then."""
    if not stream:
        result = await agent.run(said, message_history=history)
        return result.output, result.all_messages()
    async with agent.run_stream(said, message_history=history) as streamed:
        deltas = [delta async for delta in streamed.stream_text(delta=True, debounce_by=None)]
        return "".join(deltas), streamed.all_messages()


@each_way
@each_memory
async def test_runs_send_the_whole_history_once(
    start_app: StartApp, backend: Backend, memory: str, stream: bool
) -> None:
    app = await start_app(upstream=TAKES_REASONING)
    backend.script(*thoughtful_scripts(stream))
    agent = agent_of(app, memory)
    first, history = await run(agent, QUESTION, [], stream=stream)
    second, _ = await run(agent, NEXT_QUESTION, history, stream=stream)
    assert (first, second) == (ANSWER, NEXT_ANSWER)
    assert_whole_history_once(backend, reasoning_content=THOUGHT)


async def test_an_answer_is_a_call_with_the_fields_of_its_type(app: App, backend: Backend) -> None:
    backend.script(plain_call("final_result", PARIS))
    result = await Agent(model_of(app), output_type=Place).run("Where?")
    assert result.output == Place(city="Paris")
    assert backend.requests[0].body["tool_choice"] == "required"


async def test_the_usage_of_a_run_is_the_sum_of_its_turns(app: App, backend: Backend) -> None:
    backend.script(*thoughtful_scripts(False))
    usage = (await agent_of(app, "sealed").run(QUESTION)).usage
    assert (usage.requests, usage.input_tokens, usage.output_tokens) == (2, 22, 14)
