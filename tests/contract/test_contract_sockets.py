"""Clients of the WebSocket against the running proxy: the official SDK in both forms, `openai-agents`, and Codex."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import pytest
from agents import Agent, Runner, function_tool, set_tracing_disabled
from agents.models.openai_responses import OpenAIResponsesWSModel
from conftest import App, StartApp, running_app, settings_of
from event_grammar import check
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import ResponsesServerEvent
from openai.types.websocket_reconnection import ReconnectingEvent
from scripted import Backend, Script, call_delta, chunk, plain, streamed, streamed_calls
from sdk import assert_response
from socket_client import LAST, PATH, Socket, connected

Json = dict[str, Any]
HELLO: Json = {"model": "m", "input": "Hello", "temperature": 0, "max_output_tokens": 200}
EVENT_CLASS_OF: dict[str, type[Any]] = {
    get_args(cls.model_fields["type"].annotation)[0]: cls for cls in get_args(get_args(ResponsesServerEvent)[0])
}


def assert_typed(events: list[Any]) -> None:
    """Each event is of its own class and strictly valid, and together they are one response."""
    for event in events:
        assert type(event) is EVENT_CLASS_OF[event.type]
        type(event).model_validate(event.to_dict())
    check([event.to_dict() for event in events])
    assert_response(events[-1].to_dict()["response"])


async def response_on(connection: Any) -> Any:
    """The response that is told of next, after a look at each of its events."""
    events = [await connection.recv()]
    while events[-1].type not in LAST:
        events.append(await connection.recv())
    assert_typed(events)
    return events[-1].response


# -- the SDK -----------------------------------------------------------------------------------------------------------


async def test_every_event_parses_as_its_type(client: AsyncOpenAI, backend: Backend) -> None:
    reasoned = [chunk(reasoning_content="Hm."), chunk(content="Hel"), chunk(content="lo"), chunk("stop")]
    backend.script(Script(reasoned))
    async with client.responses.connect() as connection:
        await connection.response.create(model="m", input="Hi", store=False, stream_id="a")
        response = await response_on(connection)
    assert response.output_text == "Hello"


async def test_a_chain_that_is_not_stored(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("one"), streamed("two"))
    async with client.responses.connect() as connection:
        warm = {"model": "m", "store": False}
        await connection.response.create(**warm, generate=False, input=[{"role": "developer", "content": "Be brief."}])
        response = await response_on(connection)
        for said in "AB":
            await connection.response.create(**warm, input=said, previous_response_id=response.id)
            response = await response_on(connection)
    told = [message["content"] for message in backend.requests[-1].body["messages"]]
    assert told == ["Be brief.", "A", "one", "B"]


async def test_an_error_and_a_refused_steer_parse_as_their_types(client: AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        await connection.response.create(model="m", input="Hi", previous_response_id="resp_nobody")
        error: Any = await connection.recv()
        assert type(error).__name__ == "ResponseWsError"
        assert (error.status, error.error.code) == (400, "previous_response_not_found")
        await connection.response.steer(previous_response_id="resp_nobody", input="Faster!")
        steer: Any = await connection.recv()
        assert type(steer).__name__ == "ResponseSteerFailedEvent"
        assert (steer.error.code, steer.steer.input) == ("steering_not_supported", "Faster!")


def talk(url: str) -> list[Any]:
    """The same client without asyncio."""
    with OpenAI(base_url=f"{url}/v1", api_key="unused") as client, client.responses.connect() as connection:
        connection.response.create(model="m", input="Hi", store=False)
        events = [connection.recv()]
        while events[-1].type not in LAST:
            events.append(connection.recv())
    return events


async def test_the_client_without_asyncio(app: App, backend: Backend) -> None:
    backend.script(streamed("Hel", "lo"))
    events = await asyncio.to_thread(talk, app.url)
    assert_typed(events)
    assert events[-1].response.output_text == "Hello"


async def test_the_sdk_connects_again_after_the_life_of_a_connection(start_app: StartApp) -> None:
    app, codes = await start_app(websocket={"life_s": 0.1}), []

    def reconnecting(event: ReconnectingEvent) -> None:
        codes.append(event.close_code)

    async with app.openai.responses.connect(on_reconnecting=reconnecting, initial_delay=0.01) as connection:
        async for event in connection:
            assert event.type == "error"
            if codes:
                break
    assert codes == [1001]


@pytest.fixture
async def on_llamacpp(llamacpp: str) -> AsyncIterator[App]:
    async with running_app(settings_of(llamacpp, upstream={"dialect": "auto", "retries": 2})) as app:
        yield app


async def test_a_real_backend_answers_two_lanes_at_once(on_llamacpp: App) -> None:
    said = {"a": "Hello", "b": "Tell me a story"}
    texts: dict[str, str] = dict.fromkeys(said, "")
    last: dict[str, Any] = {}
    async with on_llamacpp.openai.responses.connect() as connection:
        for lane, each in said.items():
            await connection.response.create(**{**HELLO, "input": each}, store=False, stream_id=lane)
        while len(last) < len(said):
            event: Any = await connection.recv()
            if event.type == "response.output_text.delta":
                texts[event.stream_id] += event.delta
            elif event.type in LAST:
                last[event.stream_id] = event.response
        previous = last["a"].id
        await connection.response.create(**HELLO, store=False, stream_id="a", previous_response_id=previous)
        assert (await response_on(connection)).usage.input_tokens > last["a"].usage.input_tokens
    assert texts == {lane: response.output_text for lane, response in last.items()}
    assert (texts["a"], texts["b"][:4]) == ("Hello! How can I help you today?", "Once")


# -- openai-agents -----------------------------------------------------------------------------------------------------


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


async def test_an_agent_runs_over_one_connection(app: App, backend: Backend) -> None:
    set_tracing_disabled(True)
    backend.script(streamed_calls(call_delta(0, '{"city":"Paris"}', "get_weather", "call_1")), streamed("Sunny."))
    model = OpenAIResponsesWSModel(model="m", openai_client=app.openai)
    agent = Agent("Weather", instructions="Be helpful.", model=model, tools=[get_weather])
    try:
        result = await Runner.run(agent, "And in Paris?", auto_previous_response_id=True)
    finally:
        await model.close()
    assert result.final_output == "Sunny."
    roles = [message["role"] for message in backend.requests[-1].body["messages"]]
    assert roles == ["system", "user", "assistant", "tool"]


# -- Codex -------------------------------------------------------------------------------------------------------------


def captured() -> list[Json]:
    """What Codex sent over WebSockets, in order."""
    lines = (Path(__file__).parent.parent / "clients" / "codex.jsonl").read_text().splitlines()
    sent = [json.loads(line) for line in lines]
    return [each["body"] for each in sent if each["method"] == "GET" and each.get("body")]


async def sent_on(client: Socket, body: Json, parent: Json | None) -> Json:
    """The response to a captured message, which goes on from a response of ours."""
    renamed = {"previous_response_id": parent["id"]} if parent else {}
    await client.ws.send_json({**body, **renamed})
    return await client.ended()


async def test_codex_warms_up_and_sends_only_what_is_new(app: App, backend: Backend) -> None:
    warm_up, first, second = captured()[:3]
    call_id = second["input"][0]["call_id"]
    backend.script(streamed_calls(call_delta(0, '{"cmd":"ls"}', "exec_command", call_id)), streamed("Done."))
    async with connected(app, PATH, headers={"openai-beta": "responses_websockets=2026-02-06"}) as client:
        warm = await sent_on(client, warm_up, None)
        assert (warm["output"], backend.requests) == ([], [])
        called = await sent_on(client, first, warm)
        done = await sent_on(client, second, called)
    assert done["output"][-1]["content"][0]["text"] == "Done."
    roles = [message["role"] for message in backend.requests[-1].body["messages"]]
    assert roles[0] == "system"
    assert roles[-3:] == ["user", "assistant", "tool"]


async def test_codex_compacts_over_a_connection(app: App, backend: Backend) -> None:
    trigger = next(body for body in captured() if body["input"][-1]["type"] == "compaction_trigger")
    backend.script(streamed("Hello."), plain("A record."))
    async with connected(app) as client:
        parent = await client.turn("Hi")
        response = await sent_on(client, trigger, parent)
    assert [item["type"] for item in response["output"]] == ["compaction"]
