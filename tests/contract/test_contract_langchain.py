"""LangChain against the running proxy: tool loops, plain and streamed, told anew and by `previous_response_id`."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import App, StartApp
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from scripted import Backend, plain
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

each_memory = pytest.mark.parametrize("previous", [False, True], ids=["told-anew", "by-previous-id"])


@pytest.fixture
async def app(start_app: StartApp) -> App:
    return await start_app(upstream=TAKES_REASONING)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


class Place(BaseModel):
    city: str


def model_of(app: App, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model="m", base_url=f"{app.url}/v1", api_key="unused", use_responses_api=True, **options)


async def answer_of(model: Any, messages: list[BaseMessage], *, stream: bool) -> BaseMessage:
    """The whole answer; of a stream, the sum of its chunks."""
    if not stream:
        return await model.ainvoke(messages)
    chunks = [chunk async for chunk in model.astream(messages)]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.text == "".join(chunk.text for chunk in chunks)
    return whole


async def run(model: Any, messages: list[BaseMessage], *, stream: bool) -> None:
    """Carries calls out until there is none left; what was said is added to the messages."""
    while True:
        answer = await answer_of(model, messages, stream=stream)
        messages.append(answer)
        if not answer.tool_calls:
            return
        messages.extend([await get_weather.ainvoke(call) for call in answer.tool_calls])


@each_way
@each_memory
async def test_runs_send_the_whole_history_once(app: App, backend: Backend, previous: bool, stream: bool) -> None:
    backend.script(*thoughtful_scripts(stream))
    model = model_of(app, use_previous_response_id=previous).bind_tools([get_weather])
    messages: list[BaseMessage] = [SystemMessage("Be helpful."), HumanMessage(QUESTION)]
    await run(model, messages, stream=stream)
    messages.append(HumanMessage(NEXT_QUESTION))
    await run(model, messages, stream=stream)
    answers = [message for message in messages if isinstance(message, AIMessage)]
    assert [answer.text for answer in answers] == ["", ANSWER, "", NEXT_ANSWER]
    assert [answer.usage_metadata["total_tokens"] for answer in answers if answer.usage_metadata] == [18] * 4
    assert_whole_history_once(backend, reasoning_content=THOUGHT)


async def test_an_answer_is_parsed_by_its_schema(app: App, backend: Backend) -> None:
    backend.script(plain(PARIS))
    model = model_of(app).with_structured_output(Place)
    assert await model.ainvoke("Where?") == Place(city="Paris")
    assert backend.requests[0].body["response_format"]["type"] == "json_schema"
