"""Two runs about the weather, each with one call: what the backend says, and what it has to be told by then."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted import Backend, Script, call_delta, chunk, plain, plain_call, streamed, streamed_calls

Json = dict[str, Any]

PARIS = '{"city":"Paris"}'
ROME = '{"city":"Rome"}'
QUESTION = "What is the weather in Paris?"
ANSWER = "It is sunny in Paris."
NEXT_QUESTION = "And in Rome?"
NEXT_ANSWER = "In Rome, too."

# Two runs, each with one call and its answer.
CALLS = (plain_call("get_weather", PARIS), plain(ANSWER), plain_call("get_weather", ROME, "call_2"), plain(NEXT_ANSWER))
STREAMED_CALLS = (
    streamed_calls(call_delta(0, PARIS, "get_weather", "call_1")),
    streamed(ANSWER[:5], ANSWER[5:]),
    streamed_calls(call_delta(0, ROME, "get_weather", "call_2")),
    streamed(NEXT_ANSWER),
)
each_way = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


THOUGHT = "I had better look."
# An upstream that is told its earlier reasoning.
TAKES_REASONING = {"dialect": "sglang"}


def scripts(stream: bool) -> tuple[Script, ...]:
    return STREAMED_CALLS if stream else CALLS


def thoughtful_scripts(stream: bool) -> tuple[Script, ...]:
    """The same, with reasoning before each call and each answer."""
    if stream:
        return tuple(Script([chunk(reasoning_content=THOUGHT), *script.steps]) for script in STREAMED_CALLS)
    return (
        plain_call("get_weather", PARIS, reasoning_content=THOUGHT),
        plain(ANSWER, reasoning_content=THOUGHT),
        plain_call("get_weather", ROME, "call_2", reasoning_content=THOUGHT),
        plain(NEXT_ANSWER, reasoning_content=THOUGHT),
    )


def chat(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def chat_call(arguments: str, call_id: str) -> Json:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


# What a backend has to be told by the end of the second run: everything, and everything once.
WHOLE_HISTORY = [
    chat("system", "Be helpful."),
    chat("user", QUESTION),
    chat_call(PARIS, "call_1"),
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny in Paris"},
    chat("assistant", ANSWER),
    chat("user", NEXT_QUESTION),
    chat_call(ROME, "call_2"),
    {"role": "tool", "tool_call_id": "call_2", "content": "sunny in Rome"},
]
# How much of it each of the four requests holds.
LENGTHS = [2, 4, 6, 8]


def assert_whole_history_once(backend: Backend, **of_assistant: str) -> None:
    """`of_assistant` is what each message of the assistant holds beside its text or call."""
    whole = [{**each, **of_assistant} if each["role"] == "assistant" else each for each in WHOLE_HISTORY]
    assert [_compact(request.body["messages"]) for request in backend.requests] == [whole[:n] for n in LENGTHS]


def _compact(messages: list[Json]) -> list[Json]:
    """With arguments as they were made, where a client took them apart and wrote them anew."""
    return [{**each, **chat_call(*_call_of(each))} if "tool_calls" in each else each for each in messages]


def _call_of(message: Json) -> tuple[str, str]:
    (call,) = message["tool_calls"]
    return json.dumps(json.loads(call["function"]["arguments"]), separators=(",", ":")), call["id"]
