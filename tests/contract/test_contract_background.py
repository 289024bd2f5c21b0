"""The official SDK against background mode: polls, streams that are taken up again, cancels, children and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from conftest import App, StartApp, both_stores
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseCompletedEvent, ResponseIncompleteEvent, ResponseQueuedEvent
from scripted import DEADLINE_S, END, Backend, Script, call_delta, chunk, plain, refused, streamed, streamed_calls
from sdk import EVENT_CLASS_OF, assert_response, forbidden_nulls, types_of

pytestmark = both_stores
Json = dict[str, Any]
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
WORDS = [f"w{number} " for number in range(20)]


async def created(client: AsyncOpenAI, said: Any = "Hi", **parameters: Any) -> Response:
    """A background response as it was queued, checked."""
    response: Response = await client.responses.create(model="m", input=said, background=True, **parameters)
    assert_response(response.to_dict())
    return response


async def ended(client: AsyncOpenAI, response_id: str) -> Response:
    """Polls as the guide says; each answer is checked."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            response: Response = await client.responses.retrieve(response_id)
            assert_response(response.to_dict())
            if response.status not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.01)


async def stream_of(client: AsyncOpenAI, **parameters: Any) -> Any:
    return await client.responses.create(model="m", input="Hi", background=True, stream=True, **parameters)


async def all_of(stream: Any) -> list[Any]:
    async with stream as events:
        return [event async for event in events]


def assert_events(events: list[Any], first: int = 0) -> None:
    """Each event is of its own class and strictly valid; numbers have no gap; the last one alone is terminal."""
    for event in events:
        assert type(event) is EVENT_CLASS_OF[event.type]
        type(event).model_validate(event.to_dict())
        assert forbidden_nulls(event.to_dict()) == []
        if "response" in event.to_dict():
            assert_response(event.to_dict()["response"])
    assert [event.sequence_number for event in events] == list(range(first, first + len(events)))
    terminal = {"response.completed", "response.incomplete", "response.failed"}
    assert [event.type for event in events if event.type in terminal] == [events[-1].type]


def gated(first: str = "Hel", second: str = "lo") -> tuple[Script, asyncio.Event]:
    goes_on = asyncio.Event()
    return Script([chunk(content=first), goes_on, chunk(content=second), *END]), goes_on


@pytest.fixture
async def patient(app: App) -> AsyncIterator[AsyncOpenAI]:
    """A client that tries again by itself, as it does by default."""
    async with AsyncOpenAI(base_url=f"{app.url}/v1", api_key="client-key", max_retries=5) as client:
        yield client


# -- polls -------------------------------------------------------------------------------------------------------------


async def test_it_is_queued_and_then_polled_to_its_end(client: AsyncOpenAI, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    response = await created(client, metadata={"a": "b"})
    assert (response.status, response.output, response.usage, response.background) == ("queued", [], None, True)
    await backend.received()
    running = await client.responses.retrieve(response.id)
    assert_response(running.to_dict())
    assert (running.status, running.output, running.usage) == ("in_progress", [], None)
    goes_on.set()
    whole = await ended(client, response.id)
    assert (whole.status, whole.output_text, whole.usage and whole.usage.total_tokens) == ("completed", "Hello", 18)
    assert (whole.metadata, whole.created_at, whole.id) == ({"a": "b"}, response.created_at, response.id)


async def test_a_real_backend_is_asked(start_app: StartApp, llamacpp: str) -> None:
    app = await start_app(upstream={"base_url": llamacpp, "dialect": "auto"})
    events = await all_of(await stream_of(app.openai, max_output_tokens=16))
    assert_events(events)
    response = events[-1].response
    assert (response.status in ("completed", "incomplete"), bool(response.output)) == (True, True)
    assert (await ended(app.openai, response.id)).to_dict() == response.to_dict()


async def test_a_call_is_answered_in_background(client: AsyncOpenAI, backend: Backend) -> None:
    call = streamed_calls(call_delta(0, '{"city":"Paris"}', "get_weather", "call_a"))
    backend.script(call, streamed("It rains."))
    first = await ended(client, (await created(client, tools=[WEATHER])).id)
    (item,) = first.output
    assert item.type == "function_call"
    output: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
    second = await created(client, [output], previous_response_id=first.id, tools=[WEATHER])
    assert (await ended(client, second.id)).output_text == "It rains."


async def test_a_structured_answer_is_parsed_after_its_end(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed('{"city":', '"Ulm"}'))
    schema: Any = {"type": "object", "properties": {"city": {"type": "string"}}}
    text: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    response = await ended(client, (await created(client, text=text)).id)
    assert response.output_text == '{"city":"Ulm"}'
    assert backend.requests[0].body["response_format"]["json_schema"]["schema"] == schema


async def test_a_failure_has_a_code_of_the_sdk(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(refused(500, "broken"))
    response = await ended(client, (await created(client)).id)
    assert (response.status, response.error and response.error.code) == ("failed", "server_error")


async def test_its_input_is_listed(client: AsyncOpenAI, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    response = await created(client)
    (item,) = (await client.responses.input_items.list(response.id)).data
    assert item.type == "message"
    goes_on.set()
    await ended(client, response.id)
    (again,) = (await client.responses.input_items.list(response.id)).data
    assert again == item


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_a_stream_begins_queued_and_ends_completed(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Hel", "lo"))
    events = await all_of(await stream_of(client))
    assert_events(events)
    assert types_of(events) == [
        *("created", "queued", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event.response.status for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert isinstance(events[1], ResponseQueuedEvent)
    assert (await ended(client, events[-1].response.id)).to_dict() == events[-1].response.to_dict()


async def test_a_stream_broken_off_after_event_10_is_taken_up_behind_it(client: AsyncOpenAI, backend: Backend) -> None:
    goes_on = asyncio.Event()
    chunks = [chunk(content=word) for word in WORDS]
    backend.script(Script([*chunks[:10], goes_on, *chunks[10:], *END]))
    seen = []
    async with await stream_of(client) as stream:
        async for event in stream:
            seen.append(event)
            if event.sequence_number == 10:
                break
    response_id = seen[0].response.id
    resuming = await client.responses.retrieve(response_id, stream=True, starting_after=10)
    goes_on.set()
    rest = await all_of(resuming)
    whole = await all_of(await client.responses.retrieve(response_id, stream=True))
    assert [event.to_dict() for event in [*seen, *rest]] == [event.to_dict() for event in whole]
    assert_events(whole)
    assert_events(rest, 11)
    assert rest[-1].response.output_text == "".join(WORDS)


async def test_what_is_read_again_after_the_end_is_byte_for_byte_the_same(app: App, backend: Backend) -> None:
    backend.script(streamed(*WORDS))
    body = {"model": "m", "input": "Hi", "background": True, "stream": True}
    async with app.post(body) as answer:
        whole = await answer.read()
    events = whole.split(b"\n\n")
    response_id = events[0].partition(b'"id":"')[2].partition(b'"')[0].decode()
    async with app.openai.responses.with_streaming_response.retrieve(
        response_id, stream=True, starting_after=10
    ) as rest:
        assert await rest.read() == b"\n\n".join(events[11:])


async def test_the_streaming_helper_takes_a_response_up_by_its_id(client: AsyncOpenAI, backend: Backend) -> None:
    """`responses.stream(response_id=…)` reads the whole log and builds the response from its events."""
    backend.script(streamed("Hel", "lo"))
    response_id = (await all_of(await stream_of(client)))[0].response.id
    async with client.responses.stream(response_id=response_id) as stream:
        final = await stream.get_final_response()
    assert (final.status, final.output_text) == ("completed", "Hello")


async def test_the_streaming_helper_takes_up_a_running_response_behind_a_number(
    client: AsyncOpenAI, backend: Backend
) -> None:
    script, goes_on = gated()
    backend.script(script)
    async with await stream_of(client) as stream:
        async for event in stream:
            if event.type == "response.created":
                response_id = event.response.id
            if event.type == "response.output_text.delta":
                break
    goes_on.set()
    async with client.responses.stream(response_id=response_id, starting_after=event.sequence_number) as stream:
        events = [each async for each in stream]
    assert events[-1].type == "response.completed"
    assert events[0].sequence_number == event.sequence_number + 1


async def test_behind_its_end_a_stream_is_empty(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    *_, last = await all_of(await stream_of(client))
    again = await client.responses.retrieve(last.response.id, stream=True, starting_after=last.sequence_number)
    assert await all_of(again) == []


async def test_a_response_goes_on_when_its_reader_leaves(client: AsyncOpenAI, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    async with await stream_of(client) as stream:
        response_id = (await anext(aiter(stream))).response.id
    request = await backend.received()
    goes_on.set()
    assert (await ended(client, response_id)).output_text == "Hello"
    assert not request.gone.is_set()


@pytest.mark.parametrize("made", ["plain", "foreground"])
async def test_what_was_not_streamed_in_background_is_a_bad_request(
    client: AsyncOpenAI, backend: Backend, made: str
) -> None:
    backend.script(streamed("Hi") if made == "plain" else plain())
    if made == "plain":
        response_id = (await ended(client, (await created(client)).id)).id
    else:
        response_id = (await client.responses.create(model="m", input="Hi")).id
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(response_id, stream=True)
    assert (caught.value.param, caught.value.code) == ("stream", None)


async def test_an_unknown_one_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve("resp_unknown", stream=True, starting_after=3)
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_unknown")


# -- cancel and delete -------------------------------------------------------------------------------------------------


async def test_a_running_one_is_cancelled_and_the_backend_is_let_go(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(gated()[0])
    response = await created(client)
    request = await backend.received()
    cancelled = await client.responses.cancel(response.id)
    assert_response(cancelled.to_dict())
    assert (cancelled.status, cancelled.output, cancelled.usage, cancelled.completed_at) == (
        "cancelled",
        [],
        None,
        None,
    )
    assert await request.is_let_go()
    assert (await client.responses.cancel(response.id)).to_dict() == cancelled.to_dict()
    assert (await ended(client, response.id)).to_dict() == cancelled.to_dict()


async def test_a_reader_of_a_cancelled_one_gets_incomplete_as_its_end(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(gated()[0])
    seen = []
    async with await stream_of(client) as stream:
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                await client.responses.cancel(seen[0].response.id)
    assert_events(seen)
    assert isinstance(seen[-1], ResponseIncompleteEvent)
    assert (seen[-1].response.status, seen[-1].response.output) == ("cancelled", [])


async def test_a_completed_one_is_not_changed_by_a_cancel(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    response = await ended(client, (await created(client)).id)
    assert (await client.responses.cancel(response.id)).to_dict() == response.to_dict()


async def test_a_foreground_one_cannot_be_cancelled(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="m", input="Hi")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        await client.responses.cancel(response.id)


async def test_a_running_one_is_deleted(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(gated()[0])
    response = await created(client)
    request = await backend.received()
    await client.responses.delete(response.id)
    assert await request.is_let_go()
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)


# -- children and limits -----------------------------------------------------------------------------------------------


async def test_a_chain_is_queued_at_once_and_ends_in_order(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(*(streamed(f"{number}.") for number in range(5)))
    found: list[Response] = []
    for number in range(5):
        previous = {"previous_response_id": found[-1].id} if found else {}
        found.append(await created(client, f"{number}?", **previous))
    assert [(await ended(client, each.id)).output_text for each in found] == [f"{number}." for number in range(5)]
    assert len(backend.requests[-1].body["messages"]) == 9


async def test_the_sdk_tries_a_child_again_until_its_parent_has_ended(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(turns={"parent_wait_s": 0.05})
    script, goes_on = gated("One", ".")
    backend.script(script, plain("Two."))
    parent = await created(app.openai)
    await backend.received()
    refusals: list[int] = []

    async def on_response(answer: Any) -> None:
        refusals.append(answer.status_code)
        if answer.status_code == 409:
            goes_on.set()

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [on_response]})
    async with AsyncOpenAI(base_url=f"{app.url}/v1", api_key="k", max_retries=5, http_client=http) as patient:
        child = await patient.responses.create(model="m", input="And?", previous_response_id=parent.id)
    assert (child.output_text, refusals[0], refusals[-1]) == ("Two.", 409, 200)


async def test_a_full_queue_is_a_rate_limit(start_app: StartApp) -> None:
    app = await start_app(background={"workers": 0, "queue_per_owner": 1})
    await created(app.openai)
    with pytest.raises(openai.RateLimitError) as caught:
        await created(app.openai)
    assert (caught.value.code, int(caught.value.response.headers["retry-after"]) >= 1) == ("rate_limit_exceeded", True)
    with pytest.raises(openai.RateLimitError):
        await stream_of(app.openai)


async def test_the_sdks_own_retry_of_a_create_queues_nothing_twice(patient: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    key = {"Idempotency-Key": "k-1"}
    first, second = [await created(patient, extra_headers=key) for _ in range(2)]
    assert first.id == second.id
    await ended(patient, first.id)
    assert len(backend.requests) == 1


async def test_a_conversation_gets_its_items_at_the_end(client: AsyncOpenAI, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    conversation = await client.conversations.create()
    response = await created(client, conversation=conversation.id)
    await backend.received()
    assert (await client.conversations.items.list(conversation.id)).data == []
    goes_on.set()
    whole = await ended(client, response.id)
    items = (await client.conversations.items.list(conversation.id, order="asc")).data
    assert [item.role for item in items if item.type == "message"] == ["user", "assistant"]
    assert whole.conversation is not None
    assert whole.conversation.id == conversation.id


async def test_an_answer_that_was_cut_is_incomplete(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel"), chunk("length"), *END[1:]]))
    *_, last = await all_of(await stream_of(client))
    assert not isinstance(last, ResponseCompletedEvent)
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.status == "incomplete"
