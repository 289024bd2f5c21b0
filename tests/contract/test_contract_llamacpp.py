"""The official SDK against the running proxy in front of a real llama.cpp server with the tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from conftest import App, running_app, settings_of
from openai import AsyncOpenAI
from openai.types import responses as types
from sdk import assert_events, assert_response, events_of, types_of

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HELLO: dict[str, Any] = {"input": "Hello", "temperature": 0, "max_output_tokens": 200}


@pytest.fixture
async def app(llamacpp: str) -> AsyncIterator[App]:
    async with running_app(settings_of(llamacpp, upstream={"dialect": "auto", "retries": 2})) as app:
        yield app


@pytest.fixture
def client(app: App) -> AsyncOpenAI:
    return app.openai


async def test_a_plain_turn_parses_and_has_every_key(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="m", **HELLO)
    assert response.output_text == "Hello! How can I help you today?"
    assert response.usage
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0
    assert_response(response.to_dict())


async def test_a_streamed_turn_is_valid_event_by_event(client: AsyncOpenAI) -> None:
    events = await events_of(client, **{**HELLO, "input": "Tell me a story"})
    text = "".join(event.delta for event in events if isinstance(event, types.ResponseTextDeltaEvent))
    assert text.startswith("Once upon a time")
    assert events[-1].response.output_text == text
    assert events[-1].response.usage.output_tokens > 0


async def test_the_model_thinks_in_a_reasoning_item(client: AsyncOpenAI) -> None:
    events = await events_of(client, **{**HELLO, "input": "Think hard"})
    assert "reasoning_summary_text.delta" in types_of(events)
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]


async def test_plain_and_streamed_turns_say_the_same(client: AsyncOpenAI) -> None:
    plain = await client.responses.create(model="m", **HELLO)
    streamed = (await events_of(client, **HELLO))[-1].response

    def without_ids(response: Any) -> list[Any]:
        return [{**item, "id": None} for item in response.to_dict()["output"]]

    assert without_ids(plain) == without_ids(streamed)


async def test_the_stream_helper_gives_the_final_response(client: AsyncOpenAI) -> None:
    async with client.responses.stream(model="m", **HELLO) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text == "Hello! How can I help you today?"


async def test_a_tool_loop_goes_both_ways(client: AsyncOpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = {**HELLO, "tools": [WEATHER]}
    first = await client.responses.create(model="m", **{**asked, "input": question})
    (call,) = [item for item in first.output if isinstance(item, types.ResponseFunctionToolCall)]
    assert (call.name, call.status) == ("get_weather", "completed")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    replay = [*question, *(item.to_dict() for item in first.output), output]
    second = await client.responses.create(model="m", **{**asked, "input": replay})
    assert second.status == "completed"
    assert second.output_text


async def test_a_streamed_tool_call_is_valid_event_by_event(client: AsyncOpenAI) -> None:
    asked = {**HELLO, "input": "What is the weather in Paris?", "tools": [WEATHER]}
    events = await events_of(client, **asked)
    assert "function_call_arguments.delta" in types_of(events)
    assert events[-1].response.output[-1].name == "get_weather"


async def test_a_turn_cut_by_its_token_limit_is_incomplete(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="m", input="Tell me a story", max_output_tokens=16, temperature=0)
    assert response.status == "incomplete"
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_a_window_that_is_too_full_is_compacted_and_sent_again(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="m", input="word " * 5000)
    assert response.output[0].type == "compaction"


async def test_a_full_window_is_a_bad_request_where_that_is_set(llamacpp: str) -> None:
    async with running_app(settings_of(llamacpp, compaction={"on_overflow": False})) as app:
        with pytest.raises(openai.BadRequestError) as caught:
            await app.openai.responses.create(model="m", input="word " * 5000)
    assert caught.value.code == "context_length_exceeded"


async def test_json_mode_gives_json(client: AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    response = await client.responses.create(model="m", input="Hello", text=text, max_output_tokens=100)
    assert_response(response.to_dict())
    assert response.text
    assert response.text.to_dict()["format"]["name"] == "x"


async def test_two_streams_at_once_do_not_mix(client: AsyncOpenAI) -> None:
    async with (
        await client.responses.create(model="m", stream=True, **HELLO) as hello,
        await client.responses.create(model="m", stream=True, **{**HELLO, "input": "Tell me a story"}) as story,
    ):
        hello_events = [event async for event in hello]
        story_events = [event async for event in story]
    for events in (hello_events, story_events):
        assert_events(events)
    assert hello_events[-1].response.output_text.startswith("Hello!")  # type: ignore[union-attr]
    assert story_events[-1].response.output_text.startswith("Once")  # type: ignore[union-attr]
