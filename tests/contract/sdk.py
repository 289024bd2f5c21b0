"""What the official SDK says of an event or a response: its own types, applied strictly."""

from __future__ import annotations

from typing import Any, get_args

from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent

EVENT_CLASS_OF: dict[str, type[Any]] = {
    get_args(cls.model_fields["type"].annotation)[0]: cls for cls in get_args(get_args(ResponseStreamEvent)[0])
}
# Source: ResponseResource of the Open Responses schema. The first set may not be null.
NEVER_NULL_KEYS = {
    *("id", "object", "created_at", "status", "model", "output", "tools", "tool_choice", "truncation", "text", "store"),
    *("parallel_tool_calls", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "temperature"),
    *("background", "service_tier", "metadata"),
}
REQUIRED_KEYS = NEVER_NULL_KEYS | {
    *("completed_at", "incomplete_details", "previous_response_id", "instructions", "error", "reasoning", "usage"),
    *("max_output_tokens", "max_tool_calls", "safety_identifier", "prompt_cache_key"),
}
# Keys that are left out rather than null, wherever they stand.
OMITTED_KEYS = {"logprobs", "phase", "verbosity", "content", "encrypted_content"}


def assert_response(response: dict[str, Any]) -> None:
    """The response has every key of the schema, no forbidden null, and parses strictly."""
    assert set(response) >= REQUIRED_KEYS
    assert [key for key in NEVER_NULL_KEYS if response[key] is None] == []
    assert forbidden_nulls(response) == []
    Response.model_validate(response)


def forbidden_nulls(value: Any, path: str = "") -> list[str]:
    """Where a key is null that has to be left out."""
    if isinstance(value, list):
        return [found for index, each in enumerate(value) for found in forbidden_nulls(each, f"{path}[{index}]")]
    if not isinstance(value, dict):
        return []
    nulls = [f"{path}.{key}" for key in OMITTED_KEYS & set(value) if value[key] is None]
    return nulls + [found for key, each in value.items() for found in forbidden_nulls(each, f"{path}.{key}")]


def assert_events(events: list[Any]) -> None:
    """Each event is of its own class and strictly valid; numbers have no gap; exactly one event is terminal."""
    for event in events:
        assert type(event) is EVENT_CLASS_OF[event.type]
        type(event).model_validate(event.to_dict())
        assert forbidden_nulls(event.to_dict()) == []
        if "response" in event.to_dict():
            assert_response(event.to_dict()["response"])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    terminal = {"response.completed", "response.incomplete", "response.failed"}
    assert [event.type for event in events if event.type in terminal] == [events[-1].type]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]


async def events_of(client: AsyncOpenAI, **parameters: Any) -> list[Any]:
    """All events of a streamed turn, each checked."""
    async with await client.responses.create(model="m", stream=True, **parameters) as stream:
        events = [event async for event in stream]
    assert_events(events)
    return events


def types_of(events: list[Any]) -> list[str]:
    """The types of the events, one for each run of deltas."""
    types = [event.type.removeprefix("response.") for event in events]
    return [each for index, each in enumerate(types) if index == 0 or each != types[index - 1]]
