"""`openai-agents` against the running proxy: whole runs over chains, conversations and a session kept by the proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIConversationsSession,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from conftest import App, running_app, settings_of
from openai import AsyncOpenAI
from scripted import Backend, plain
from weather import (
    ANSWER,
    CALLS,
    NEXT_ANSWER,
    NEXT_QUESTION,
    PARIS,
    QUESTION,
    ROME,
    assert_whole_history_once,
    chat,
    each_way,
    scripts,
)

Json = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def nothing_leaves_loopback() -> None:
    """Traces would be sent to OpenAI."""
    set_tracing_disabled(True)


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def agent_of(client: AsyncOpenAI, **settings: Any) -> Agent[None]:
    model = OpenAIResponsesModel(model="m", openai_client=client)
    model_settings = ModelSettings(**settings)
    return Agent("Weather", instructions="Be helpful.", model=model, tools=[get_weather], model_settings=model_settings)


@pytest.fixture
def agent(client: AsyncOpenAI) -> Agent[None]:
    return agent_of(client)


async def run(agent: Agent[None], said: str, *, stream: bool, **options: Any) -> Any:
    """The result of a run that has ended."""
    if not stream:
        return await Runner.run(agent, said, **options)
    result = Runner.run_streamed(agent, said, **options)
    deltas = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == result.final_output
    return result


# What a session or conversation holds after the first run: type, and what is said in it.
FIRST_RUN = [
    ("message", QUESTION),
    ("function_call", PARIS),
    ("function_call_output", "sunny in Paris"),
    ("message", ANSWER),
]
SECOND_RUN = [
    ("message", NEXT_QUESTION),
    ("function_call", ROME),
    ("function_call_output", "sunny in Rome"),
    ("message", NEXT_ANSWER),
]


def told(item: Any) -> tuple[str, str]:
    """The type of an item and what is said in it."""
    kind: str = item["type"]
    said = {"message": "content", "function_call": "arguments", "function_call_output": "output"}[kind]
    return kind, item[said][0]["text"] if kind == "message" else item[said]


async def held(client: AsyncOpenAI, conversation_id: str) -> list[tuple[str, str]]:
    """What a conversation holds, oldest first."""
    listing = client.conversations.items.list(conversation_id, order="asc", limit=3)
    return [told(item.to_dict()) async for item in listing]


# -- chains ------------------------------------------------------------------------------------------------------------


@each_way
async def test_runs_over_a_chain_send_the_whole_history_once(
    agent: Agent[None], backend: Backend, stream: bool
) -> None:
    backend.script(*scripts(stream))
    first = await run(agent, QUESTION, stream=stream, auto_previous_response_id=True)
    previous = {"previous_response_id": first.last_response_id}
    second = await run(agent, NEXT_QUESTION, stream=stream, auto_previous_response_id=True, **previous)
    assert [first.final_output, second.final_output] == [ANSWER, NEXT_ANSWER]
    assert_whole_history_once(backend)


async def test_every_response_of_a_run_names_the_one_before(agent: Agent[None], client: AsyncOpenAI) -> None:
    first = await run(agent, QUESTION, stream=False, auto_previous_response_id=True)
    previous = {"previous_response_id": first.last_response_id}
    second = await run(agent, NEXT_QUESTION, stream=False, auto_previous_response_id=True, **previous)
    kept = await client.responses.retrieve(second.last_response_id)
    assert (kept.previous_response_id, kept.output_text) == (first.last_response_id, second.final_output)


async def test_two_runs_may_continue_the_same_run(agent: Agent[None], backend: Backend) -> None:
    backend.script(plain("One."), plain("Left."), plain("Right."))
    first = await run(agent, "First", stream=False, auto_previous_response_id=True)
    previous = {"previous_response_id": first.last_response_id}
    sides = [await run(agent, side, stream=False, **previous) for side in ("left", "right")]
    assert [side.final_output for side in sides] == ["Left.", "Right."]
    shared = [chat("system", "Be helpful."), chat("user", "First"), chat("assistant", "One.")]
    expected = [shared[:2], [*shared, chat("user", "left")], [*shared, chat("user", "right")]]
    assert [request.body["messages"] for request in backend.requests] == expected


async def test_the_usage_of_a_run_is_the_sum_of_its_turns(agent: Agent[None], backend: Backend) -> None:
    backend.script(*CALLS)
    usage = (await run(agent, QUESTION, stream=False, auto_previous_response_id=True)).context_wrapper.usage
    assert (usage.requests, usage.input_tokens, usage.output_tokens, usage.total_tokens) == (2, 22, 14, 36)


# -- conversations -----------------------------------------------------------------------------------------------------


@each_way
async def test_runs_in_a_conversation_send_the_whole_history_once(
    agent: Agent[None], client: AsyncOpenAI, backend: Backend, stream: bool
) -> None:
    backend.script(*scripts(stream))
    conversation = await client.conversations.create()
    first = await run(agent, QUESTION, stream=stream, conversation_id=conversation.id)
    assert await held(client, conversation.id) == FIRST_RUN
    second = await run(agent, NEXT_QUESTION, stream=stream, conversation_id=conversation.id)
    assert [first.final_output, second.final_output] == [ANSWER, NEXT_ANSWER]
    assert_whole_history_once(backend)
    assert await held(client, conversation.id) == FIRST_RUN + SECOND_RUN


# -- sessions ----------------------------------------------------------------------------------------------------------


@each_way
async def test_runs_with_a_session_send_the_whole_history_once(
    agent: Agent[None], client: AsyncOpenAI, backend: Backend, stream: bool
) -> None:
    backend.script(*scripts(stream))
    session = OpenAIConversationsSession(openai_client=client)
    first = await run(agent, QUESTION, stream=stream, session=session)
    assert [told(item) for item in await session.get_items()] == FIRST_RUN
    second = await run(agent, NEXT_QUESTION, stream=stream, session=session)
    assert [first.final_output, second.final_output] == [ANSWER, NEXT_ANSWER]
    assert_whole_history_once(backend)
    assert [told(item) for item in await session.get_items()] == FIRST_RUN + SECOND_RUN


async def test_a_session_that_is_opened_again_knows_what_was_said(
    agent: Agent[None], client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(*CALLS)
    session = OpenAIConversationsSession(openai_client=client)
    await run(agent, QUESTION, stream=False, session=session)
    again = OpenAIConversationsSession(conversation_id=session.session_id, openai_client=client)
    await run(agent, NEXT_QUESTION, stream=False, session=again)
    assert_whole_history_once(backend)


async def test_a_session_keeps_reasoning(agent: Agent[None], client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("Yes.", reasoning_content="Hmm."), plain("Yes, again."))
    session = OpenAIConversationsSession(openai_client=client)
    await run(agent, "Sure?", stream=False, session=session)
    assert [item.get("type") for item in await session.get_items()] == ["message", "reasoning", "message"]
    second = await run(agent, "Really?", stream=False, session=session)
    assert second.final_output == "Yes, again."
    texts = [message["content"] for message in backend.requests[-1].body["messages"]]
    assert texts == ["Be helpful.", "Sure?", "Yes.", "Really?"]


async def test_a_session_gives_its_newest_items_when_it_is_limited(
    agent: Agent[None], client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(*CALLS)
    session = OpenAIConversationsSession(openai_client=client)
    await run(agent, QUESTION, stream=False, session=session)
    assert [told(item) for item in await session.get_items(limit=2)] == FIRST_RUN[2:]


async def test_an_item_that_a_session_gave_up_is_not_sent_again(
    agent: Agent[None], client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(plain("One."), plain("Two."))
    session = OpenAIConversationsSession(openai_client=client)
    await run(agent, "First", stream=False, session=session)
    popped = [await session.pop_item() for _ in range(2)]
    assert [told(item) for item in popped] == [("message", "One."), ("message", "First")]
    assert (await session.get_items(), await session.pop_item()) == ([], None)
    await run(agent, "Second", stream=False, session=session)
    assert backend.requests[-1].body["messages"] == [chat("system", "Be helpful."), chat("user", "Second")]


async def test_a_session_that_is_cleared_begins_anew(agent: Agent[None], client: AsyncOpenAI, backend: Backend) -> None:
    session = OpenAIConversationsSession(openai_client=client)
    await run(agent, "First", stream=False, session=session)
    cleared = session.session_id
    await session.clear_session()
    with pytest.raises(openai.NotFoundError):
        await client.conversations.retrieve(cleared)
    assert await session.get_items() == []
    await run(agent, "Second", stream=False, session=session)
    assert session.session_id != cleared
    assert backend.requests[-1].body["messages"] == [chat("system", "Be helpful."), chat("user", "Second")]


async def test_a_session_takes_more_items_than_one_request_may_hold(client: AsyncOpenAI) -> None:
    session = OpenAIConversationsSession(openai_client=client)
    await session.add_items([{"role": "user", "content": f"{number}"} for number in range(45)])
    assert [told(item) for item in await session.get_items()] == [("message", f"{number}") for number in range(45)]


# -- a real backend ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def real_app(llamacpp: str) -> AsyncIterator[App]:
    async with running_app(settings_of(llamacpp, upstream={"dialect": "auto", "retries": 2})) as app:
        yield app


@pytest.fixture
def real_agent(real_app: App) -> Agent[None]:
    return agent_of(real_app.openai, temperature=0, max_tokens=200)


def called(result: Any) -> list[str]:
    """The tools that a run called."""
    return [item.raw_item.name for item in result.new_items if item.type == "tool_call_item"]


@each_way
async def test_a_real_model_calls_a_tool_over_a_chain(real_agent: Agent[None], stream: bool) -> None:
    first = await run(real_agent, QUESTION, stream=stream, auto_previous_response_id=True)
    previous = {"previous_response_id": first.last_response_id}
    second = await run(real_agent, "Hello", stream=stream, auto_previous_response_id=True, **previous)
    assert called(first) == ["get_weather"]
    assert first.final_output
    assert second.final_output


async def test_a_real_model_calls_a_tool_in_a_conversation(real_agent: Agent[None], real_app: App) -> None:
    conversation = await real_app.openai.conversations.create()
    result = await run(real_agent, QUESTION, stream=False, conversation_id=conversation.id)
    assert (called(result), bool(result.final_output)) == (["get_weather"], True)
    kinds = [item.type async for item in real_app.openai.conversations.items.list(conversation.id, order="asc")]
    assert [kind for kind in kinds if kind != "reasoning"] == [kind for kind, _ in FIRST_RUN]


async def test_a_real_model_remembers_a_session(real_agent: Agent[None], real_app: App) -> None:
    session = OpenAIConversationsSession(openai_client=real_app.openai)
    for said in (QUESTION, "Hello"):
        assert (await run(real_agent, said, stream=False, session=session)).final_output
    asked = [item for item in await session.get_items() if item.get("role") == "user"]
    assert [told(item)[1] for item in asked] == [QUESTION, "Hello"]
