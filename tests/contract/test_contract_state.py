"""The official SDK against what the proxy keeps: stored responses, chains, conversations, owners and idempotency."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable
from typing import Any, get_args

import openai
import pytest
from conftest import App, StartApp, both_stores
from openai import AsyncOpenAI
from openai.types.conversations import Conversation, ConversationDeletedResource, ConversationItem
from openai.types.responses import Response, ResponseItem
from pydantic import TypeAdapter
from scripted import (
    Backend,
    Received,
    Script,
    call_delta,
    chunk,
    plain,
    plain_call,
    refused,
    streamed,
    streamed_calls,
)
from sdk import assert_response, events_of, forbidden_nulls

from auth import new_key
from dialects import DIALECTS

pytestmark = both_stores
Json = dict[str, Any]

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
NOTE: Any = {"type": "custom", "name": "note", "description": "Takes a note"}
PARIS = '{"city":"Paris"}'
CUT = plain("Hel", "length")
BROKEN = Script([chunk(content="Hel")], end="cut")


def classes_of(union: Any) -> dict[str, Any]:
    """The SDK's classes in a union of items, by their `type`."""
    classes: dict[str, Any] = {}
    for cls in get_args(get_args(union)[0]):
        (kind,) = get_args(cls.model_fields["type"].annotation)
        classes[kind] = classes[kind] | cls if kind in classes else cls
    return classes


RESPONSE_ITEMS = classes_of(ResponseItem)
CONVERSATION_ITEMS = classes_of(ConversationItem)


# -- what the SDK is asked, and what it says ---------------------------------------------------------------------------


async def turn(client: AsyncOpenAI, said: Any = "Hi", **parameters: Any) -> Response:
    """A response of a plain turn, checked."""
    response: Response = await client.responses.create(model="m", input=said, **parameters)
    assert_response(response.to_dict())
    return response


async def retrieved(client: AsyncOpenAI, response_id: str, **query: Any) -> Json:
    """A stored response, checked."""
    response: Json = (await client.responses.retrieve(response_id, **query)).to_dict()
    assert_response(response)
    return response


async def failed_turn(client: AsyncOpenAI, backend: Backend, **parameters: Any) -> Response:
    """A streamed turn that the backend breaks off; the next one is answered."""
    backend.script(BROKEN, plain())
    failed: Response = (await events_of(client, input="Hi", **parameters))[-1].response
    assert failed.status == "failed"
    return failed


async def input_items(client: AsyncOpenAI, response_id: str, **query: Any) -> Json:
    """A page of input items as it was on the wire, strictly checked."""
    raw = await client.responses.input_items.with_raw_response.list(response_id, **query)
    return checked(raw.http_response.json(), RESPONSE_ITEMS)


async def conversation_items(client: AsyncOpenAI, conversation_id: str, **query: Any) -> Json:
    """A page of a conversation's items as it was on the wire, strictly checked; oldest first unless asked otherwise."""
    raw = await client.conversations.items.with_raw_response.list(conversation_id, **{"order": "asc", **query})
    return checked(raw.http_response.json(), CONVERSATION_ITEMS)


def checked(page: Json, classes: dict[str, Any]) -> Json:
    """A list, each item of which is strictly valid for the SDK's class of its type."""
    for item in page["data"]:
        assert_item(item, classes)
    ids = [item["id"] for item in page["data"]] or [""]
    assert list(page) == ["object", "data", "first_id", "last_id", "has_more"]
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[0], ids[-1])
    return page


def assert_item(item: Json, classes: dict[str, Any]) -> None:
    """Strictly valid for the SDK's class of its type; of those of a message, for one of them."""
    TypeAdapter(classes[item["type"]]).validate_python(item)
    assert forbidden_nulls(item) == []


def bare(items: list[Json]) -> list[Json]:
    """Items without their ids, which are all different."""
    ids = [item["id"] for item in items]
    assert len(set(ids)) == len(ids)
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


def user(text: str) -> Json:
    """A user's message as lists show it."""
    part = {"type": "input_text", "text": text}
    return {"type": "message", "role": "user", "status": "completed", "content": [part]}


def assistant(text: str, status: str = "completed") -> Json:
    """A message of the model as lists show it."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "role": "assistant", "status": status, "content": [part]}


def chat(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def chat_call(name: str, arguments: str, call_id: str = "call_1") -> Json:
    """An assistant's chat message that holds one call."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def chat_output(content: str, call_id: str = "call_1") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def output_of(call: Any, output: Any = "sunny", kind: str = "function_call_output", **more: Any) -> Json:
    return {"type": kind, "call_id": call.call_id, "output": output, **more}


async def messages(backend: Backend) -> list[Json]:
    """The chat messages of the next request that the backend got."""
    found: list[Json] = (await backend.received()).body["messages"]
    return found


async def last_messages(backend: Backend, requests: int) -> list[Json]:
    """The chat messages of the last of so many requests, which are all that the backend got."""
    assert len(backend.requests) == requests
    found: list[Json] = backend.requests[-1].body["messages"]
    return found


async def error_of(asking: Awaitable[Any], status: int) -> Json:
    """The `error` of a refused request."""
    with pytest.raises(openai.APIStatusError) as caught:
        await asking
    assert caught.value.status_code == status
    body = caught.value.body
    assert isinstance(body, dict)
    return body


def bad(message: str, param: str | None = None, code: str | None = None) -> Json:
    """The whole `error` of a request that is the client's mistake."""
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def no_response(response_id: str) -> Json:
    return bad(f"Response with id '{response_id}' not found.")


def no_conversation(conversation_id: str) -> Json:
    return bad(f"Conversation with id '{conversation_id}' not found.")


def no_previous(response_id: str, reason: str = "not found") -> Json:
    message = f"Previous response with id '{response_id}' {reason}."
    return bad(message, "previous_response_id", "previous_response_not_found")


# -- stored responses --------------------------------------------------------------------------------------------------


async def test_a_plain_response_is_retrieved_as_it_was_given(client: AsyncOpenAI) -> None:
    given = await turn(
        client,
        instructions="Be brief.",
        max_output_tokens=100,
        metadata={"k": "v"},
        parallel_tool_calls=False,
        prompt_cache_key="key",
        reasoning={"effort": "low"},
        safety_identifier="who",
        temperature=0.5,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}, "verbosity": "low"},
        tool_choice={"type": "function", "name": "get_weather"},
        tools=[WEATHER],
        truncation="auto",
        user="me",
    )
    assert await retrieved(client, given.id) == given.to_dict()


async def test_a_streamed_response_is_retrieved_as_its_last_event_told_it(
    client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(streamed("Hel", "lo"))
    told = (await events_of(client, input="Hi"))[-1].response
    assert await retrieved(client, told.id) == told.to_dict()


async def test_a_response_is_retrievable_when_its_stream_has_said_completed(
    client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(streamed("Hello"))
    async with await client.responses.create(model="m", input="Hi", stream=True) as stream:
        async for event in stream:
            if event.type == "response.completed":
                kept = await client.responses.retrieve(event.response.id)
                assert kept.to_dict() == event.response.to_dict()


@pytest.mark.parametrize(
    ("script", "tools"),
    [
        (CUT, []),
        (plain_call("get_weather", PARIS), [WEATHER]),
        (plain_call("note", '{"input":"buy milk"}'), [NOTE]),
        (plain_call("apply_patch", '{"type":"delete_file","path":"a"}'), [{"type": "apply_patch"}]),
        (plain_call("shell", '{"commands":["ls"]}'), [{"type": "shell"}]),
        (plain_call("local_shell", '{"command":["ls"]}'), [{"type": "local_shell"}]),
        (plain("Yes", reasoning_content="Hmm."), []),
        (plain(None, refusal="I cannot."), []),
    ],
    ids=["incomplete", "function", "custom", "apply_patch", "shell", "local_shell", "reasoning", "refusal"],
)
async def test_every_kind_of_output_is_retrieved_as_it_was_given(
    client: AsyncOpenAI, backend: Backend, script: Script, tools: list[Any]
) -> None:
    backend.script(script)
    given = await turn(client, tools=tools)
    assert await retrieved(client, given.id) == given.to_dict()


async def test_a_failed_response_can_be_retrieved(client: AsyncOpenAI, backend: Backend) -> None:
    failed = await failed_turn(client, backend)
    assert await retrieved(client, failed.id) == failed.to_dict()


async def test_the_usage_is_the_backends_and_is_kept(client: AsyncOpenAI) -> None:
    response = await turn(client)
    expected = {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 18,
    }
    kept = await client.responses.retrieve(response.id)
    assert (response.to_dict()["usage"], kept.to_dict()["usage"]) == (expected, expected)


async def test_encrypted_reasoning_is_retrieved_when_it_is_asked_for(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("Yes", reasoning_content="Hmm."))
    include: Any = ["reasoning.encrypted_content"]
    given: Json = (await turn(client, include=include)).to_dict()
    assert await retrieved(client, given["id"], include=include) == given
    assert given["output"][0].pop("encrypted_content")
    assert await retrieved(client, given["id"]) == given


async def test_logprobs_are_retrieved_when_they_are_asked_for(client: AsyncOpenAI, backend: Backend) -> None:
    logprob = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
    message = {"role": "assistant", "content": "Hi"}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": [logprob]}}
    backend.script(Script([json.dumps({"id": "c", "choices": [choice]}).encode()]))
    include: Any = ["message.output_text.logprobs"]
    given: Json = (await turn(client, include=include)).to_dict()
    part = given["output"][0]["content"][0]
    assert [each["token"] for each in part["logprobs"]] == ["Hi"]
    assert await retrieved(client, given["id"], include=include) == given
    part["logprobs"] = []
    assert await retrieved(client, given["id"]) == given


async def test_a_foreground_response_cannot_be_streamed_again(client: AsyncOpenAI) -> None:
    response = await turn(client)
    message = "This response cannot be streamed because it was not created with background=true."
    error = await error_of(client.responses.retrieve(response.id, stream=True), 400)
    assert error == bad(message, "stream")


async def test_a_deleted_response_is_gone(client: AsyncOpenAI) -> None:
    response = await turn(client)
    raw = await client.responses.with_raw_response.delete(response.id)
    assert raw.http_response.json() == {"id": response.id, "object": "response", "deleted": True}
    assert await error_of(client.responses.retrieve(response.id), 404) == no_response(response.id)


async def test_a_foreground_response_cannot_be_cancelled(client: AsyncOpenAI) -> None:
    response = await turn(client)
    error = await error_of(client.responses.cancel(response.id), 400)
    assert error == bad("Cannot cancel a synchronous response.")
    assert (await client.responses.retrieve(response.id)).status == "completed"


@pytest.mark.parametrize("verb", ["retrieve", "delete", "cancel", "input_items"])
async def test_an_unknown_response_is_a_404(client: AsyncOpenAI, verb: str) -> None:
    verbs: dict[str, Any] = {"input_items": client.responses.input_items.list}
    ask = verbs.get(verb) or getattr(client.responses, verb)
    assert await error_of(ask("resp_unknown"), 404) == no_response("resp_unknown")


async def test_store_false_leaves_nothing_behind(client: AsyncOpenAI) -> None:
    response = await turn(client, store=False)
    assert response.to_dict()["store"] is False
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        asked: Any = ask(response.id)
        assert await error_of(asked, 404) == no_response(response.id)
    assert (await responses(client))["data"] == []


async def responses(client: AsyncOpenAI, **query: Any) -> Json:
    """A page of the responses; the SDK has no method for it."""
    found: Json = await client.get("/responses", cast_to=dict[str, Any], options={"params": query})
    for response in found["data"]:
        assert_response(response)
    return found


async def test_responses_are_listed_newest_first(client: AsyncOpenAI) -> None:
    given = [(await turn(client, f"Hi {number}")).to_dict() for number in range(3)]
    assert await responses(client) == {
        "object": "list",
        "data": given[::-1],
        "first_id": given[2]["id"],
        "last_id": given[0]["id"],
        "has_more": False,
    }


async def test_responses_are_listed_page_by_page(client: AsyncOpenAI) -> None:
    ids = [(await turn(client)).id for _ in range(5)]
    first = await responses(client, limit=2, order="asc")
    second = await responses(client, limit=2, order="asc", after=first["last_id"])
    last = await responses(client, limit=2, order="asc", after=second["last_id"])
    back = await responses(client, limit=2, order="asc", before=last["first_id"])
    pages = [([response["id"] for response in page["data"]], page["has_more"]) for page in (first, second, last, back)]
    assert pages == [(ids[:2], True), (ids[2:4], True), (ids[4:], False), (ids[2:4], True)]


async def test_responses_are_listed_by_model(client: AsyncOpenAI) -> None:
    await turn(client)
    other = await client.responses.create(model="other", input="Hi")
    assert [response["id"] for response in (await responses(client, model="other"))["data"]] == [other.id]


async def test_no_response_is_an_empty_list(client: AsyncOpenAI) -> None:
    assert await responses(client) == {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}


@pytest.mark.parametrize(
    ("query", "param"),
    [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"order": "up"}, "order"), ({"colour": "red"}, "colour")],
)
async def test_a_wrong_query_is_a_400_that_names_it(client: AsyncOpenAI, query: Json, param: str) -> None:
    error = await error_of(client.get("/responses", cast_to=dict[str, Any], options={"params": query}), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize("cursor", ["after", "before"])
async def test_a_cursor_that_is_not_in_the_list_is_a_400(client: AsyncOpenAI, cursor: str) -> None:
    response = await turn(client)
    listing = client.responses.input_items.list(response.id, extra_query={cursor: "msg_unknown"})
    assert (await error_of(listing, 400))["param"] == cursor


# -- input items -------------------------------------------------------------------------------------------------------


async def test_input_items_are_the_whole_input_newest_first(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("One."), plain("Two."))
    first = await turn(client, "First", instructions="Be brief.")
    second = await turn(client, "Second", previous_response_id=first.id, instructions="Be brief.")
    page = await input_items(client, second.id)
    assert (bare(page["data"]), page["has_more"]) == ([user("Second"), assistant("One."), user("First")], False)
    assert page["data"][1]["id"] == first.output[0].id


async def test_input_items_come_in_the_order_that_was_asked_for(client: AsyncOpenAI) -> None:
    second = await turn(client, "Second", previous_response_id=(await turn(client, "First")).id)
    rising = await input_items(client, second.id, order="asc")
    falling = await input_items(client, second.id, order="desc")
    assert bare(rising["data"]) == [user("First"), assistant("Hello there."), user("Second")]
    assert falling["data"] == rising["data"][::-1]


async def test_input_items_come_page_by_page(client: AsyncOpenAI) -> None:
    response = await turn(client, [{"role": "user", "content": f"{number}"} for number in range(5)])
    ids = [item["id"] for item in (await input_items(client, response.id, order="asc"))["data"]]
    first = await input_items(client, response.id, order="asc", limit=2)
    second = await input_items(client, response.id, order="asc", limit=2, after=first["last_id"])
    last = await input_items(client, response.id, order="asc", limit=2, after=second["last_id"])
    back = await input_items(client, response.id, order="asc", limit=2, extra_query={"before": last["first_id"]})
    pages = [([item["id"] for item in page["data"]], page["has_more"]) for page in (first, second, last, back)]
    assert pages == [(ids[:2], True), (ids[2:4], True), (ids[4:], False), (ids[2:4], True)]


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_input_items_of_a_chain_are_paged_by_the_sdk(client: AsyncOpenAI, order: Any) -> None:
    response = await turn(client, [{"role": "user", "content": f"0.{number}"} for number in range(4)])
    for number in range(1, 4):
        response = await turn(client, f"{number}", previous_response_id=response.id)
    found = [item.id async for item in client.responses.input_items.list(response.id, order=order, limit=3)]
    whole = [item["id"] for item in (await input_items(client, response.id, order=order, limit=100))["data"]]
    assert (found, len(found)) == (whole, 10)


async def test_input_items_of_a_fork_are_its_own_ancestors(client: AsyncOpenAI) -> None:
    root = await turn(client, "Root")
    left, right = [await turn(client, side, previous_response_id=root.id) for side in ("Left", "Right")]
    shown = [bare((await input_items(client, response.id, order="asc"))["data"]) for response in (left, right)]
    shared = [user("Root"), assistant("Hello there.")]
    assert shown == [[*shared, user("Left")], [*shared, user("Right")]]


async def test_input_items_never_show_reasoning(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("Yes", reasoning_content="Hmm."))
    first = await turn(client, "First")
    second = await turn(client, "Second", previous_response_id=first.id)
    assert [item.type for item in first.output] == ["reasoning", "message"]
    shown = bare((await input_items(client, second.id, order="asc"))["data"])
    assert shown == [user("First"), assistant("Yes"), user("Second")]


async def test_input_items_of_a_failed_response_are_the_whole_input(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client, "First")
    conversation = await client.conversations.create(items=[{"role": "user", "content": "Zero"}])
    in_chain = await failed_turn(client, backend, previous_response_id=first.id)
    in_conversation = await failed_turn(client, backend, conversation=conversation.id)
    shown = [bare((await input_items(client, f.id, order="asc"))["data"]) for f in (in_chain, in_conversation)]
    assert shown == [[user("First"), assistant("Hello there."), user("Hi")], [user("Zero"), user("Hi")]]


async def test_input_items_in_a_conversation_end_with_the_responses_own(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create(items=[{"role": "user", "content": "Zero"}])
    first, second = [await turn(client, said, conversation=conversation.id) for said in ("First", "Second")]
    shown = [bare((await input_items(client, r.id, order="asc"))["data"]) for r in (first, second)]
    earlier = [user("Zero"), user("First")]
    assert shown == [earlier, [*earlier, assistant("Hello there."), user("Second")]]


async def test_an_images_url_is_listed_when_it_is_asked_for(client: AsyncOpenAI) -> None:
    image = {"type": "input_image", "image_url": "https://example.com/cat.png", "detail": "low"}
    response = await turn(client, [{"role": "user", "content": [image]}])
    include: Any = ["message.input_image.image_url"]
    (with_it,) = (await input_items(client, response.id, include=include))["data"]
    (without,) = (await input_items(client, response.id))["data"]
    assert (with_it["content"], without["content"]) == ([image], [{"type": "input_image", "detail": "low"}])


async def test_an_image_without_detail_is_listed_as_auto(client: AsyncOpenAI) -> None:
    image = {"type": "input_image", "image_url": "https://example.com/cat.png"}
    response = await turn(client, [{"role": "user", "content": [image]}])
    (item,) = (await input_items(client, response.id))["data"]
    assert item["content"] == [{"type": "input_image", "detail": "auto"}]


# A call as clients replay it, without id and status, and what answers it.
REPLAYED: dict[str, tuple[Json, Json]] = {
    "function": (
        {"type": "function_call", "name": "get_weather", "arguments": PARIS},
        {"type": "function_call_output", "output": "sunny"},
    ),
    "function_parts": (
        {"type": "function_call", "name": "get_weather", "arguments": PARIS},
        {"type": "function_call_output", "output": [{"type": "input_text", "text": "sunny"}]},
    ),
    "custom": (
        {"type": "custom_tool_call", "name": "note", "input": "buy milk"},
        {"type": "custom_tool_call_output", "output": "noted"},
    ),
    "apply_patch": (
        {"type": "apply_patch_call", "status": "completed", "operation": {"type": "delete_file", "path": "a"}},
        {"type": "apply_patch_call_output", "status": "completed", "output": "done"},
    ),
    "tool_search": (
        {"type": "tool_search_call", "arguments": {"query": "weather"}, "execution": "client"},
        {"type": "tool_search_output", "execution": "client", "tools": [WEATHER]},
    ),
    "shell": (
        {"type": "shell_call", "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None}},
        {
            "type": "shell_call_output",
            "output": [{"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}],
        },
    ),
}


@pytest.mark.parametrize("kind", REPLAYED)
async def test_calls_and_outputs_of_every_kind_are_listed_as_the_sdk_has_them(client: AsyncOpenAI, kind: str) -> None:
    call, output = ({**item, "call_id": "call_1"} for item in REPLAYED[kind])
    response = await turn(client, [{"role": "user", "content": "Hi"}, call, output])
    page = await input_items(client, response.id, order="asc")
    assert bare(page["data"]) == [
        user("Hi"),
        {"status": "completed", **call},
        {"status": "completed", **output},
    ]


@pytest.mark.parametrize("kind", REPLAYED)
async def test_calls_and_outputs_of_every_kind_can_be_put_into_a_conversation(client: AsyncOpenAI, kind: str) -> None:
    call, output = ({**item, "call_id": "call_1"} for item in REPLAYED[kind])
    conversation = await client.conversations.create()
    created = await add_items(client, conversation.id, [call, output])
    given = ((call, created["data"][0]), (output, created["data"][1]))
    assert [{key: kept[key] for key in item} for item, kept in given] == [call, output]
    assert created == await conversation_items(client, conversation.id)


async def add_items(client: AsyncOpenAI, conversation_id: str, items: list[Any]) -> Json:
    """The answer to new items as it was on the wire, strictly checked."""
    raw = await client.conversations.items.with_raw_response.create(conversation_id, items=items)
    return checked(raw.http_response.json(), CONVERSATION_ITEMS)


# -- chains ------------------------------------------------------------------------------------------------------------


async def test_a_chain_gives_the_backend_the_whole_history_once(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("One."), plain("Two."), plain("Three."))
    first = await turn(client, "First")
    second = await turn(client, "Second", previous_response_id=first.id)
    third = await turn(client, "Third", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    assert await last_messages(backend, 3) == [
        chat("user", "First"),
        chat("assistant", "One."),
        chat("user", "Second"),
        chat("assistant", "Two."),
        chat("user", "Third"),
    ]


async def test_a_streamed_chain_gives_the_backend_the_whole_history_once(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("O", "ne."), streamed("Two."))
    first = (await events_of(client, input="First"))[-1].response
    second = (await events_of(client, input="Second", previous_response_id=first.id))[-1].response
    assert second.previous_response_id == first.id
    expected = [chat("user", "First"), chat("assistant", "One."), chat("user", "Second")]
    assert await last_messages(backend, 2) == expected


async def test_plain_and_streamed_turns_may_alternate_in_a_chain(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("One."), streamed("Two."), plain("Three."))
    first = await turn(client, "First")
    second = (await events_of(client, input="Second", previous_response_id=first.id))[-1].response
    await turn(client, "Third", previous_response_id=second.id)
    texts = [message["content"] for message in await last_messages(backend, 3)]
    assert texts == ["First", "One.", "Second", "Two.", "Third"]


async def test_each_child_of_a_fork_sees_its_own_ancestors_only(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("Root."), plain("Left."), plain("Right."), plain("End."))
    root = await turn(client, "root")
    left, right = [await turn(client, side, previous_response_id=root.id) for side in ("left", "right")]
    for child, side in ((left, "left"), (right, "right")):
        await turn(client, "end", previous_response_id=child.id)
        texts = [message["content"] for message in backend.requests[-1].body["messages"]]
        assert texts == ["root", "Root.", side, f"{side.title()}.", "end"]


async def test_several_children_at_once_are_all_answered(client: AsyncOpenAI, backend: Backend) -> None:
    root = await turn(client, "root")
    children = await asyncio.gather(*(turn(client, f"{n}", previous_response_id=root.id) for n in range(8)))
    asked = [request.body["messages"] for request in backend.requests[1:]]
    shared = [chat("user", "root"), chat("assistant", "Hello there.")]
    assert sorted(asked, key=str) == [[*shared, chat("user", f"{n}")] for n in range(8)]
    assert len({child.id for child in children}) == 8


async def test_a_chain_may_be_continued_without_input(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client, "First")
    await client.responses.create(model="m", previous_response_id=first.id)
    assert await last_messages(backend, 2) == [chat("user", "First"), chat("assistant", "Hello there.")]


async def test_a_chain_may_change_its_model(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client)
    second = await client.responses.create(model="other", input="Hi", previous_response_id=first.id)
    assert (second.model, backend.requests[-1].body["model"]) == ("other", "other")


async def test_instructions_and_settings_are_not_inherited(client: AsyncOpenAI, backend: Backend) -> None:
    settings: Any = {"instructions": "Be brief.", "tools": [WEATHER], "temperature": 0.5, "metadata": {"k": "v"}}
    first = await turn(client, "First", **settings)
    second = (await turn(client, "Second", previous_response_id=first.id)).to_dict()
    sent = backend.requests[-1].body
    assert sent == {
        "model": "m",
        "messages": [chat("user", "First"), chat("assistant", "Hello there."), chat("user", "Second")],
    }
    expected: Json = {"instructions": None, "tools": [], "temperature": 1.0, "metadata": {}}
    assert {key: second[key] for key in settings} == expected


async def test_new_instructions_replace_those_of_the_turn_before(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client, "First", instructions="Be brief.")
    await turn(client, "Second", previous_response_id=first.id, instructions="Be kind.")
    roles = [(message["role"], message["content"]) for message in await last_messages(backend, 2)]
    assert roles == [("system", "Be kind."), ("user", "First"), ("assistant", "Hello there."), ("user", "Second")]


async def test_tools_added_by_an_item_stay_for_later_turns(client: AsyncOpenAI, backend: Backend) -> None:
    added = {"type": "additional_tools", "role": "developer", "tools": [WEATHER]}
    first = await turn(client, [added, {"role": "user", "content": "First"}])
    await turn(client, "Second", previous_response_id=first.id)
    names = [[tool["function"]["name"] for tool in request.body["tools"]] for request in backend.requests]
    assert names == [["get_weather"], ["get_weather"]]


async def test_a_configuration_updated_by_an_item_stays_for_later_turns(client: AsyncOpenAI, backend: Backend) -> None:
    update = {"type": "configuration_update", "reasoning": {"effort": "high"}}
    first = await turn(client, [update, {"role": "user", "content": "First"}])
    await turn(client, "Second", previous_response_id=first.id)
    assert [request.body["reasoning_effort"] for request in backend.requests] == ["high", "high"]


async def test_hidden_reasoning_comes_back_to_the_backend_over_a_chain(start_app: StartApp, backend: Backend) -> None:
    client = (await start_app(upstream={"dialect": "sglang"}, reasoning={"expose": "none"})).openai
    backend.script(plain("Yes", reasoning_content="Hmm."), plain())
    first = await turn(client, "First")
    assert "Hmm." not in json.dumps(await retrieved(client, first.id))
    await turn(client, "Second", previous_response_id=first.id)
    assert (await last_messages(backend, 2))[1] == {**chat("assistant", "Yes"), "reasoning_content": "Hmm."}


async def test_sealed_reasoning_comes_back_to_the_backend_in_a_replay(start_app: StartApp, backend: Backend) -> None:
    client = (await start_app(upstream={"dialect": "sglang"}, reasoning={"expose": "none"})).openai
    backend.script(plain("Yes", reasoning_content="Hmm."), plain())
    include: Any = ["reasoning.encrypted_content"]
    first = await turn(client, "First", store=False, include=include)
    outputs = [item.to_dict() for item in first.output]
    replay = [{"role": "user", "content": "First"}, *outputs, {"role": "user", "content": "Second"}]
    await turn(client, replay, store=False, include=include)
    assert (await last_messages(backend, 2))[1] == {**chat("assistant", "Yes"), "reasoning_content": "Hmm."}


async def test_an_incomplete_response_can_be_continued(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(CUT, plain())
    first = await turn(client, "First")
    await turn(client, "Go on", previous_response_id=first.id)
    expected = [chat("user", "First"), chat("assistant", "Hel"), chat("user", "Go on")]
    assert (first.status, await last_messages(backend, 2)) == ("incomplete", expected)


async def test_a_child_lives_on_without_its_parent(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client, "First")
    second = await turn(client, "Second", previous_response_id=first.id)
    await client.responses.delete(first.id)
    await turn(client, "Third", previous_response_id=second.id)
    texts = [message["content"] for message in await last_messages(backend, 3)]
    assert texts == ["First", "Hello there.", "Second", "Hello there.", "Third"]
    assert await retrieved(client, second.id) == second.to_dict()


async def test_an_unknown_previous_response_is_a_400(client: AsyncOpenAI, backend: Backend) -> None:
    error = await error_of(turn(client, previous_response_id="resp_unknown"), 400)
    assert (error, backend.requests) == (no_previous("resp_unknown"), [])


async def test_an_unknown_previous_response_is_a_400_before_a_stream(client: AsyncOpenAI) -> None:
    asking = client.responses.create(model="m", input="Hi", stream=True, previous_response_id="resp_unknown")
    assert await error_of(asking, 400) == no_previous("resp_unknown")


async def test_a_deleted_response_cannot_be_continued(client: AsyncOpenAI) -> None:
    first = await turn(client)
    await client.responses.delete(first.id)
    assert await error_of(turn(client, previous_response_id=first.id), 400) == no_previous(first.id)


async def test_a_response_that_was_not_stored_cannot_be_continued(client: AsyncOpenAI) -> None:
    first = await turn(client, store=False)
    assert await error_of(turn(client, previous_response_id=first.id), 400) == no_previous(first.id)


async def test_a_failed_response_cannot_be_continued(client: AsyncOpenAI, backend: Backend) -> None:
    failed = await failed_turn(client, backend)
    error = await error_of(turn(client, previous_response_id=failed.id), 400)
    assert error == no_previous(failed.id, "is failed and cannot be continued")


async def test_a_failed_child_leaves_its_parent_as_it_was(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client, "First")
    await failed_turn(client, backend, previous_response_id=first.id)
    await turn(client, "Second", previous_response_id=first.id)
    texts = [message["content"] for message in await last_messages(backend, 3)]
    assert texts == ["First", "Hello there.", "Second"]


async def test_a_turn_that_is_not_stored_may_continue_one_that_is(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client, "First")
    await turn(client, "Second", previous_response_id=first.id, store=False)
    assert [message["content"] for message in await last_messages(backend, 2)] == ["First", "Hello there.", "Second"]


@pytest.mark.parametrize(
    ("parameter", "prefix"), [("previous_response_id", "resp"), ("conversation", "conv_")], ids=["response", "conv"]
)
async def test_an_id_with_a_wrong_prefix_is_a_400(client: AsyncOpenAI, parameter: str, prefix: str) -> None:
    message = f"Invalid '{parameter}': 'abc'. Expected an ID that begins with '{prefix}'."
    error = await error_of(turn(client, **{parameter: "abc"}), 400)
    assert error == bad(message, parameter, "invalid_id_prefix")


async def test_a_previous_response_and_a_conversation_exclude_each_other(client: AsyncOpenAI) -> None:
    first = await turn(client)
    conversation = await client.conversations.create()
    error = await error_of(turn(client, previous_response_id=first.id, conversation=conversation.id), 400)
    assert error["message"].startswith("Mutually exclusive parameters")
    assert error == bad(error["message"], None, "mutually_exclusive_parameters")


@pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": []}])
async def test_nothing_to_run_on_is_a_400(client: AsyncOpenAI, nothing: Any) -> None:
    error = await error_of(client.responses.create(model="m", **nothing), 400)
    message = "One of \"input\" or \"previous_response_id\" or 'prompt' or 'conversation_id' must be provided."
    assert (error["message"], error["code"]) == (message, "missing_required_parameter")


@pytest.mark.parametrize(
    "metadata",
    [{f"k{number}": "v" for number in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}],
    ids=["many", "key", "value"],
)
async def test_metadata_over_its_limits_is_a_400(client: AsyncOpenAI, metadata: dict[str, str]) -> None:
    conversation = await client.conversations.create()
    for asking in (
        turn(client, metadata=metadata),
        client.conversations.create(metadata=metadata),
        client.conversations.update(conversation.id, metadata=metadata),
    ):
        error = await error_of(asking, 400)
        assert (error["type"], error["param"].partition(".")[0]) == ("invalid_request_error", "metadata")


async def test_metadata_within_its_limits_is_kept(client: AsyncOpenAI) -> None:
    metadata = {f"{number:064}": "v" * 512 for number in range(16)}
    response = await turn(client, metadata=metadata)
    conversation = await client.conversations.create(metadata=metadata)
    kept = await client.responses.retrieve(response.id), await client.conversations.retrieve(conversation.id)
    assert [each.metadata for each in kept] == [metadata, metadata]


# -- tool calls over a chain -------------------------------------------------------------------------------------------


async def test_a_function_call_is_answered_over_the_chain_by_its_output_alone(
    client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(plain_call("get_weather", PARIS), plain("It is sunny."))
    first = await turn(client, "Weather?", tools=[WEATHER])
    second = await turn(client, [output_of(first.output[0])], previous_response_id=first.id, tools=[WEATHER])
    assert second.output_text == "It is sunny."
    expected = [chat("user", "Weather?"), chat_call("get_weather", PARIS), chat_output("sunny")]
    assert await last_messages(backend, 2) == expected


async def test_a_streamed_function_call_is_answered_over_the_chain(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed_calls(call_delta(0, PARIS, "get_weather", "call_1")), streamed("Sunny."))
    first = (await events_of(client, input="Weather?", tools=[WEATHER]))[-1].response
    output = output_of(first.output[0])
    last = (await events_of(client, input=[output], previous_response_id=first.id, tools=[WEATHER]))[-1]
    assert last.response.output_text == "Sunny."
    expected = [chat("user", "Weather?"), chat_call("get_weather", PARIS), chat_output("sunny")]
    assert await last_messages(backend, 2) == expected


async def test_parallel_calls_are_answered_over_the_chain_in_any_order(client: AsyncOpenAI, backend: Backend) -> None:
    deltas = [call_delta(index, PARIS, "get_weather", f"call_{index}") for index in (0, 1)]
    backend.script(streamed_calls(*deltas), plain("Sunny."))
    first = (await events_of(client, input="Weather?", tools=[WEATHER]))[-1].response
    outputs = [output_of(call, call.call_id) for call in reversed(first.output)]
    await turn(client, outputs, previous_response_id=first.id, tools=[WEATHER])
    _, assistant_message, *outputs_sent = await last_messages(backend, 2)
    assert [call["id"] for call in assistant_message["tool_calls"]] == ["call_0", "call_1"]
    assert outputs_sent == [chat_output("call_0", "call_0"), chat_output("call_1", "call_1")]


# Tool, what the backend calls it with, the call item that clients get, and what the answer becomes.
CLIENT_TOOLS: dict[str, tuple[Any, str, Json, Json, str]] = {
    "custom": (
        NOTE,
        '{"input":"buy milk"}',
        {"type": "custom_tool_call", "name": "note", "input": "buy milk"},
        {"type": "custom_tool_call_output", "output": "noted"},
        "noted",
    ),
    "apply_patch": (
        {"type": "apply_patch"},
        '{"type":"update_file","path":"a","diff":"+b"}',
        {
            "type": "apply_patch_call",
            "status": "completed",
            "operation": {"type": "update_file", "path": "a", "diff": "+b"},
        },
        {"type": "apply_patch_call_output", "status": "completed", "output": "patched"},
        "patched",
    ),
    "shell": (
        {"type": "shell"},
        '{"commands":["ls"]}',
        {
            "type": "shell_call",
            "status": "completed",
            "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None},
        },
        {
            "type": "shell_call_output",
            "output": [{"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}],
        },
        '[{"stdout":"a","stderr":"","outcome":{"type":"exit","exit_code":0}}]',
    ),
}


@pytest.mark.parametrize("kind", CLIENT_TOOLS)
async def test_a_typed_call_is_answered_over_the_chain_by_its_output_alone(
    client: AsyncOpenAI, backend: Backend, kind: str
) -> None:
    tool, arguments, call, output, told = CLIENT_TOOLS[kind]
    name = tool.get("name", tool["type"])
    backend.script(plain_call(name, arguments), plain("Done."))
    first = await turn(client, "Do it.", tools=[tool])
    given: Any = [item.to_dict() for item in first.output]
    assert bare(given) == [{**call, "call_id": "call_1"}]
    await turn(client, [{**output, "call_id": "call_1"}], previous_response_id=first.id, tools=[tool])
    assert await last_messages(backend, 2) == [chat("user", "Do it."), chat_call(name, arguments), chat_output(told)]


async def test_a_local_shell_call_is_answered_by_an_output_with_its_id(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain_call("local_shell", '{"command":["ls"]}'), plain("Done."))
    first = await turn(client, "Do it.", tools=[{"type": "local_shell"}])
    output = {"type": "local_shell_call_output", "id": "call_1", "output": "a"}
    await turn(client, [output], previous_response_id=first.id, tools=[{"type": "local_shell"}])
    expected = [chat("user", "Do it."), chat_call("local_shell", '{"command":["ls"]}'), chat_output("a")]
    assert await last_messages(backend, 2) == expected


async def test_a_call_without_its_output_is_a_400(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain_call("get_weather", PARIS))
    first = await turn(client, tools=[WEATHER])
    error = await error_of(turn(client, "And now?", previous_response_id=first.id), 400)
    assert error == bad("No tool output found for function call call_1.", "input")


async def test_an_output_without_its_call_is_a_400(client: AsyncOpenAI) -> None:
    first = await turn(client)
    output = {"type": "function_call_output", "call_id": "call_9", "output": "sunny"}
    error = await error_of(turn(client, [output], previous_response_id=first.id), 400)
    assert error == bad("No tool call found for function call output with call_id call_9.", "input")


async def test_an_item_that_the_chain_has_already_is_a_400(client: AsyncOpenAI) -> None:
    first = await turn(client)
    (item,) = first.output
    error = await error_of(turn(client, [item.to_dict()], previous_response_id=first.id), 400)
    message = f"Duplicate item found with id {item.id}. Remove duplicate items from your input and try again."
    assert error == bad(message, "input")


async def test_an_output_that_the_chain_has_already_is_a_400(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain_call("get_weather", PARIS), plain())
    first = await turn(client, tools=[WEATHER])
    second = await turn(client, [output_of(first.output[0])], previous_response_id=first.id)
    error = await error_of(turn(client, [output_of(first.output[0])], previous_response_id=second.id), 400)
    assert (error["message"].partition(".")[0], error["param"]) == ("Duplicate item found with id call_1", "input")


async def test_a_call_cut_by_the_token_limit_is_left_out_of_later_turns(client: AsyncOpenAI, backend: Backend) -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"ci'}}]
    backend.script(plain(None, "length", tool_calls=calls), plain())
    first = await turn(client, "First", tools=[WEATHER])
    raw = await client.responses.with_raw_response.create(model="m", input="Second", previous_response_id=first.id)
    assert (first.status, first.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert raw.headers["x-responses-proxy-ignored"] == "history.function_call=call_1"
    assert await last_messages(backend, 2) == [chat("user", "First"), chat("user", "Second")]


# -- item references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [{"type": "item_reference"}, {}], ids=["typed", "untyped"])
async def test_a_reference_is_the_item_that_it_names(client: AsyncOpenAI, backend: Backend, typed: Json) -> None:
    backend.script(plain_call("get_weather", PARIS), plain("It is sunny."), plain("Bye."))
    question = {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}
    await turn(client, [question], tools=[WEATHER])
    # As the AI SDK replays a conversation: the call without its id, the model's text as a reference.
    call = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": PARIS}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    second = await turn(client, [question, call, output], tools=[WEATHER])
    reference = {**typed, "id": second.output[0].id}
    third = await turn(client, [question, call, output, reference, {"role": "user", "content": "Bye"}])
    assert await last_messages(backend, 3) == [
        chat("user", "Weather?"),
        chat_call("get_weather", PARIS),
        chat_output("sunny"),
        chat("assistant", "It is sunny."),
        chat("user", "Bye"),
    ]
    shown = (await client.responses.input_items.list(third.id, order="asc")).data
    assert shown[3].to_dict() == second.output[0].to_dict()


async def test_references_to_reasoning_and_calls_are_resolved(start_app: StartApp, backend: Backend) -> None:
    client = (await start_app(upstream={"dialect": "sglang"})).openai
    calls = [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}]
    backend.script(plain(None, "tool_calls", tool_calls=calls, reasoning_content="Hmm."), plain())
    first = await turn(client, "Weather?", tools=[WEATHER])
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    await turn(client, [{"role": "user", "content": "Weather?"}, *references, output_of(first.output[1])])
    _, assistant_message, _ = await last_messages(backend, 2)
    assert assistant_message == {**chat_call("get_weather", PARIS), "reasoning_content": "Hmm."}


@pytest.mark.parametrize("newest", ["response", "conversation"])
async def test_a_reference_is_to_the_newest_of_the_items_with_its_id(
    client: AsyncOpenAI, backend: Backend, newest: str
) -> None:
    """Clients choose the ids of what they send, and may use one in two chains, or in a chain and a conversation."""
    first, second = "first", "second"

    async def put(where: str, text: str) -> None:
        item: Any = {"id": "msg_mine", "type": "message", "role": "user", "content": text}
        await (turn(client, [item]) if where == "response" else client.conversations.create(items=[item]))

    await put("conversation" if newest == "response" else "response", first)
    await put(newest, second)
    asked_so_far = len(backend.requests)
    await turn(client, [{"type": "item_reference", "id": "msg_mine"}])
    assert await last_messages(backend, asked_so_far + 1) == [chat("user", second)]


async def test_a_reference_to_nothing_is_a_404(client: AsyncOpenAI) -> None:
    reference = {"type": "item_reference", "id": "msg_unknown"}
    error = await error_of(turn(client, [reference, {"role": "user", "content": "Hi"}]), 404)
    message = (
        "Item with id 'msg_unknown' not found. Items are not persisted when `store` is set to false. Try again with "
        "`store` set to true, or remove this item from your input."
    )
    assert error == bad(message, "input")


@pytest.mark.parametrize("ends", ["not stored", "deleted"])
async def test_a_reference_to_an_item_that_is_not_kept_is_a_404(client: AsyncOpenAI, ends: str) -> None:
    first = await turn(client, store=ends == "deleted")
    if ends == "deleted":
        await client.responses.delete(first.id)
    reference = {"type": "item_reference", "id": first.output[0].id}
    error = await error_of(turn(client, [{"role": "user", "content": "Hi"}, reference]), 404)
    assert error["message"].startswith(f"Item with id '{first.output[0].id}' not found.")


async def test_a_reference_can_be_put_into_a_conversation(client: AsyncOpenAI) -> None:
    response = await turn(client)
    conversation = await client.conversations.create()
    reference: Any = {"type": "item_reference", "id": response.output[0].id}
    created = await client.conversations.items.create(conversation.id, items=[reference])
    assert [item.to_dict() for item in created.data] == [response.output[0].to_dict()]


# -- conversations -----------------------------------------------------------------------------------------------------


async def test_a_conversation_is_created_empty(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    Conversation.model_validate(conversation.to_dict())
    assert conversation.id.startswith("conv_")
    assert type(conversation.to_dict()["created_at"]) is int
    rest = {"object": "conversation", "created_at": conversation.created_at, "metadata": {}}
    assert conversation.to_dict() == {"id": conversation.id, **rest}
    empty = {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}
    assert await conversation_items(client, conversation.id) == empty


async def test_a_conversation_without_a_body_is_created_too(app: App) -> None:
    async with app.http.post(f"{app.url}/v1/conversations") as answer:
        assert (answer.status, (await answer.json())["object"]) == (200, "conversation")


async def test_a_conversation_begins_with_its_items_and_metadata(client: AsyncOpenAI) -> None:
    items: Any = [
        {"type": "message", "role": "user", "content": "Remember: zebra"},
        {"role": "assistant", "content": "Noted."},
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
    ]
    conversation = await client.conversations.create(items=items, metadata={"a": "b"})
    page = await conversation_items(client, conversation.id)
    assert conversation.metadata == {"a": "b"}
    assert bare(page["data"]) == [
        user("Remember: zebra"),
        assistant("Noted."),
        {**user("Be kind."), "role": "developer"},
    ]


async def test_a_conversation_is_retrieved_as_it_was_given(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create(metadata={"a": "b"})
    assert (await client.conversations.retrieve(conversation.id)).to_dict() == conversation.to_dict()


async def test_an_update_replaces_the_metadata(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create(metadata={"a": "b", "c": "d"})
    updated = await client.conversations.update(conversation.id, metadata={"a": "c"})
    Conversation.model_validate(updated.to_dict())
    assert updated.to_dict() == {**conversation.to_dict(), "metadata": {"a": "c"}}
    assert (await client.conversations.retrieve(conversation.id)).to_dict() == updated.to_dict()


async def test_an_update_without_metadata_is_a_400(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    asking = client.post(f"/conversations/{conversation.id}", cast_to=dict[str, Any], body={})
    error = await error_of(asking, 400)
    assert (error["param"], error["code"]) == ("metadata", "missing_required_parameter")


async def test_a_deleted_conversation_is_gone(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create(items=[{"role": "user", "content": "Hi"}])
    deleted = await client.conversations.delete(conversation.id)
    ConversationDeletedResource.model_validate(deleted.to_dict())
    assert deleted.to_dict() == {"id": conversation.id, "object": "conversation.deleted", "deleted": True}
    assert await error_of(client.conversations.retrieve(conversation.id), 404) == no_conversation(conversation.id)


async def test_the_responses_of_a_deleted_conversation_stay(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    response = await turn(client, conversation=conversation.id)
    await client.conversations.delete(conversation.id)
    assert await retrieved(client, response.id) == response.to_dict()
    assert bare((await input_items(client, response.id))["data"]) == [user("Hi")]


@pytest.mark.parametrize("verb", ["retrieve", "update", "delete", "list", "create", "item", "delete_item"])
async def test_an_unknown_conversation_is_a_404(client: AsyncOpenAI, verb: str) -> None:
    items, unknown = client.conversations.items, "conv_unknown"
    asking: dict[str, Any] = {
        "retrieve": lambda: client.conversations.retrieve(unknown),
        "update": lambda: client.conversations.update(unknown, metadata={}),
        "delete": lambda: client.conversations.delete(unknown),
        "list": lambda: items.list(unknown),
        "create": lambda: items.create(unknown, items=[{"role": "user", "content": "Hi"}]),
        "item": lambda: items.retrieve("msg_1", conversation_id=unknown),
        "delete_item": lambda: items.delete("msg_1", conversation_id=unknown),
    }
    assert await error_of(asking[verb](), 404) == no_conversation(unknown)


async def test_created_items_are_given_as_a_list(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    items: Any = [
        {"role": "user", "content": "One"},
        {"id": "msg_mine", "role": "assistant", "type": "message", "status": "completed", "content": [TEXT_PART]},
    ]
    created = await add_items(client, conversation.id, items)
    assert (bare(created["data"]), created["has_more"]) == ([user("One"), assistant("Two")], False)
    assert created["last_id"] == "msg_mine"
    assert created == await conversation_items(client, conversation.id)


TEXT_PART = {"type": "output_text", "text": "Two", "annotations": [], "logprobs": []}


@pytest.mark.parametrize("count", [0, 21])
async def test_items_come_in_ones_to_twenties(client: AsyncOpenAI, count: int) -> None:
    conversation = await client.conversations.create()
    items: Any = [{"role": "user", "content": "Hi"}] * count
    error = await error_of(client.conversations.items.create(conversation.id, items=items), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", "items")
    assert (await conversation_items(client, conversation.id))["data"] == []


async def test_a_conversation_begins_with_twenty_items_at_most(client: AsyncOpenAI) -> None:
    items: Any = [{"role": "user", "content": "Hi"}] * 21
    error = await error_of(client.conversations.create(items=items), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", "items")
    assert (await client.conversations.create(items=items[:20])).id


async def test_a_wrong_item_is_a_400_with_its_path(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    items: Any = [{"role": "user", "content": "Hi"}, {"role": "user", "content": [{"type": "hologram"}]}]
    error = await error_of(client.conversations.items.create(conversation.id, items=items), 400)
    assert error["param"] == "items[1].content[0].type"
    assert (await conversation_items(client, conversation.id))["data"] == []


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_items_of_a_conversation_are_paged_by_the_sdk(client: AsyncOpenAI, order: Any) -> None:
    items: Any = [{"role": "user", "content": f"{number}"} for number in range(20)]
    conversation = await client.conversations.create(items=items)
    await client.conversations.items.create(conversation.id, items=items)
    await turn(client, "Last", conversation=conversation.id)
    listing = client.conversations.items.list(conversation.id, order=order, limit=7)
    found = [item.id async for item in listing]
    whole = [item["id"] for item in (await conversation_items(client, conversation.id, limit=100, order=order))["data"]]
    assert (found, len(set(found))) == (whole, 42)


async def test_items_of_a_conversation_are_listed_newest_first_by_default(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create(items=[{"role": "user", "content": "One"}])
    await client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "Two"}])
    listed = [item.to_dict() async for item in client.conversations.items.list(conversation.id)]
    assert listed == (await conversation_items(client, conversation.id))["data"][::-1]


async def test_items_of_a_conversation_come_page_by_page(client: AsyncOpenAI) -> None:
    items: Any = [{"role": "user", "content": f"{number}"} for number in range(5)]
    conversation = await client.conversations.create(items=items)
    ids = [item["id"] for item in (await conversation_items(client, conversation.id))["data"]]
    first = await conversation_items(client, conversation.id, limit=2)
    second = await conversation_items(client, conversation.id, limit=2, after=first["last_id"])
    last = await conversation_items(client, conversation.id, limit=2, after=second["last_id"])
    back = await conversation_items(client, conversation.id, limit=2, extra_query={"before": last["first_id"]})
    pages = [([item["id"] for item in page["data"]], page["has_more"]) for page in (first, second, last, back)]
    assert pages == [(ids[:2], True), (ids[2:4], True), (ids[4:], False), (ids[2:4], True)]


async def test_one_item_is_retrieved_as_it_was_listed(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    await turn(client, conversation=conversation.id)
    for listed in (await conversation_items(client, conversation.id))["data"]:
        item = await client.conversations.items.retrieve(listed["id"], conversation_id=conversation.id)
        assert item.to_dict() == listed


async def test_a_deleted_item_is_gone_and_its_conversation_is_given(client: AsyncOpenAI, backend: Backend) -> None:
    items: Any = [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}]
    conversation = await client.conversations.create(items=items)
    ids = [item["id"] for item in (await conversation_items(client, conversation.id))["data"]]
    given = await client.conversations.items.delete(ids[0], conversation_id=conversation.id)
    assert given.to_dict() == conversation.to_dict()
    message = f"Item with id '{ids[0]}' not found in conversation '{conversation.id}'."
    for ask in (client.conversations.items.retrieve, client.conversations.items.delete):
        assert await error_of(ask(ids[0], conversation_id=conversation.id), 404) == bad(message)
    assert [item["id"] for item in (await conversation_items(client, conversation.id))["data"]] == ids[1:]
    await turn(client, "Three", conversation=conversation.id)
    assert await messages(backend) == [chat("user", "Two"), chat("user", "Three")]


async def test_a_deleted_item_of_a_response_stays_in_the_response(client: AsyncOpenAI, backend: Backend) -> None:
    conversation = await client.conversations.create()
    response = await turn(client, "One", conversation=conversation.id)
    await client.conversations.items.delete(str(response.output[0].id), conversation_id=conversation.id)
    assert bare((await conversation_items(client, conversation.id))["data"]) == [user("One")]
    assert await retrieved(client, response.id) == response.to_dict()
    await turn(client, "Two", conversation=conversation.id)
    assert await last_messages(backend, 2) == [chat("user", "One"), chat("user", "Two")]


async def test_an_output_whose_call_was_deleted_is_left_out(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain_call("get_weather", PARIS), plain("Sunny."), plain())
    conversation = await client.conversations.create()
    first = await turn(client, "Weather?", conversation=conversation.id, tools=[WEATHER])
    await turn(client, [output_of(first.output[0])], conversation=conversation.id)
    await client.conversations.items.delete(str(first.output[0].id), conversation_id=conversation.id)
    raw = await client.responses.with_raw_response.create(model="m", input="Bye", conversation=conversation.id)
    assert raw.headers["x-responses-proxy-ignored"] == "history.function_call_output=call_1"
    expected = [chat("user", "Weather?"), chat("assistant", "Sunny."), chat("user", "Bye")]
    assert await last_messages(backend, 3) == expected


async def test_a_call_whose_output_was_deleted_is_left_out(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain_call("get_weather", PARIS), plain("Sunny."), plain())
    conversation = await client.conversations.create()
    first = await turn(client, "Weather?", conversation=conversation.id, tools=[WEATHER])
    output = output_of(first.output[0], id="fco_mine")
    await turn(client, [output], conversation=conversation.id)
    await client.conversations.items.delete("fco_mine", conversation_id=conversation.id)
    raw = await client.responses.with_raw_response.create(model="m", input="Bye", conversation=conversation.id)
    assert raw.headers["x-responses-proxy-ignored"] == "history.function_call=call_1"
    expected = [chat("user", "Weather?"), chat("assistant", "Sunny."), chat("user", "Bye")]
    assert await last_messages(backend, 3) == expected


async def test_a_deleted_response_leaves_its_items_in_the_conversation(client: AsyncOpenAI, backend: Backend) -> None:
    conversation = await client.conversations.create()
    first = await turn(client, "First", conversation=conversation.id)
    await client.responses.delete(first.id)
    held = bare((await conversation_items(client, conversation.id))["data"])
    assert held == [user("First"), assistant("Hello there.")]
    await turn(client, "Second", conversation=conversation.id)
    assert [message["content"] for message in await last_messages(backend, 2)] == ["First", "Hello there.", "Second"]


# -- turns in a conversation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["string", "object"])
async def test_a_conversation_is_given_as_a_string_or_an_object(
    client: AsyncOpenAI, backend: Backend, form: str
) -> None:
    conversation = await client.conversations.create(items=[{"role": "user", "content": "Remember: zebra"}])
    given: Any = conversation.id if form == "string" else {"id": conversation.id}
    response = await turn(client, "What?", conversation=given)
    assert response.to_dict()["conversation"] == {"id": conversation.id}
    assert await retrieved(client, response.id) == response.to_dict()
    assert await messages(backend) == [chat("user", "Remember: zebra"), chat("user", "What?")]


async def test_a_turn_adds_its_input_and_output(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("One."), streamed("Two."), plain("Three."))
    conversation = await client.conversations.create()
    first = await turn(client, "First", conversation=conversation.id)
    await events_of(client, input="Second", conversation=conversation.id)
    page = await conversation_items(client, conversation.id)
    assert bare(page["data"]) == [user("First"), assistant("One."), user("Second"), assistant("Two.")]
    assert page["data"][1]["id"] == first.output[0].id
    await turn(client, "Third", conversation=conversation.id)
    assert await last_messages(backend, 3) == [
        chat("user", "First"),
        chat("assistant", "One."),
        chat("user", "Second"),
        chat("assistant", "Two."),
        chat("user", "Third"),
    ]


async def test_an_incomplete_turn_adds_its_items_too(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(CUT)
    conversation = await client.conversations.create()
    response = await turn(client, conversation=conversation.id)
    added = bare((await conversation_items(client, conversation.id))["data"])
    assert (response.status, added) == ("incomplete", [user("Hi"), assistant("Hel", "incomplete")])


async def test_a_failed_turn_adds_nothing(client: AsyncOpenAI, backend: Backend) -> None:
    conversation = await client.conversations.create()
    failed = await failed_turn(client, backend, conversation=conversation.id)
    backend.script(refused(400, "Not today"), plain())
    await error_of(turn(client, conversation=conversation.id), 400)
    assert (await conversation_items(client, conversation.id))["data"] == []
    assert await retrieved(client, failed.id) == failed.to_dict()
    await turn(client, "Again", conversation=conversation.id)
    assert await last_messages(backend, 3) == [chat("user", "Again")]


async def test_a_turn_that_is_not_stored_reads_the_conversation_only(client: AsyncOpenAI, backend: Backend) -> None:
    conversation = await client.conversations.create(items=[{"role": "user", "content": "One"}])
    await turn(client, "Two", conversation=conversation.id, store=False)
    assert await messages(backend) == [chat("user", "One"), chat("user", "Two")]
    assert bare((await conversation_items(client, conversation.id))["data"]) == [user("One")]


async def test_a_function_call_is_answered_in_the_conversation_by_its_output_alone(
    client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(plain_call("get_weather", PARIS), plain("It is sunny."))
    conversation = await client.conversations.create()
    first = await turn(client, "Weather?", conversation=conversation.id, tools=[WEATHER])
    await turn(client, [output_of(first.output[0])], conversation=conversation.id, tools=[WEATHER])
    expected = [chat("user", "Weather?"), chat_call("get_weather", PARIS), chat_output("sunny")]
    assert await last_messages(backend, 2) == expected
    kinds = [item["type"] for item in (await conversation_items(client, conversation.id))["data"]]
    assert kinds == ["message", "function_call", "function_call_output", "message"]


async def test_reasoning_is_an_item_of_its_conversation(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("Yes", reasoning_content="Hmm."))
    conversation = await client.conversations.create()
    include: Any = ["reasoning.encrypted_content"]
    response = await turn(client, conversation=conversation.id, include=include)
    with_it = (await conversation_items(client, conversation.id, include=include))["data"]
    without = (await conversation_items(client, conversation.id))["data"]
    assert bare(with_it[:1]) == [user("Hi")]
    assert with_it[1:] == response.to_dict()["output"]
    assert with_it[1].pop("encrypted_content")
    assert without == with_it


async def test_a_conversation_may_be_continued_without_input(client: AsyncOpenAI, backend: Backend) -> None:
    conversation = await client.conversations.create(items=[{"role": "user", "content": "One"}])
    await client.responses.create(model="m", conversation=conversation.id)
    assert await messages(backend) == [chat("user", "One")]
    assert bare((await conversation_items(client, conversation.id))["data"]) == [user("One"), assistant("Hello there.")]


async def test_a_response_of_a_conversation_can_be_forked_off(client: AsyncOpenAI, backend: Backend) -> None:
    conversation = await client.conversations.create()
    first = await turn(client, "First", conversation=conversation.id)
    await turn(client, "Second", conversation=conversation.id)
    await turn(client, "Aside", previous_response_id=first.id)
    assert [message["content"] for message in await last_messages(backend, 3)] == ["First", "Hello there.", "Aside"]
    texts = [item["content"][0]["text"] for item in (await conversation_items(client, conversation.id))["data"]]
    assert texts == ["First", "Hello there.", "Second", "Hello there."]


async def test_an_unknown_conversation_cannot_be_continued(client: AsyncOpenAI) -> None:
    error = await error_of(turn(client, conversation="conv_unknown"), 404)
    assert error == bad("Conversation with id 'conv_unknown' not found.", "conversation")


async def test_a_deleted_conversation_cannot_be_continued(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    await client.conversations.delete(conversation.id)
    error = await error_of(turn(client, conversation=conversation.id), 404)
    assert error == {**no_conversation(conversation.id), "param": "conversation"}


async def test_an_item_that_the_conversation_has_already_is_a_400(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    (item,) = (await turn(client, conversation=conversation.id)).output
    error = await error_of(turn(client, [item.to_dict()], conversation=conversation.id), 400)
    message = f"Duplicate item found with id {item.id}. Remove duplicate items from your input and try again."
    assert error == bad(message, "input")


async def test_a_conversation_in_use_is_a_400(start_app: StartApp, backend: Backend) -> None:
    client = (await start_app(turns={"conversation_wait_s": 0.05})).openai
    conversation = await client.conversations.create()
    answers = asyncio.Event()
    script = plain()
    script.before = answers
    backend.script(script, plain())
    running = asyncio.ensure_future(turn(client, "First", conversation=conversation.id))
    await backend.received()
    locked = bad(
        "Another process is currently operating on this conversation. Please retry in a few seconds.",
        "conversation",
        "conversation_locked",
    )
    adding = client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "Hi"}])
    for asking in (turn(client, "Second", conversation=conversation.id), adding):
        assert await error_of(asking, 400) == locked
    answers.set()
    await running
    await turn(client, "Second", conversation=conversation.id)
    assert [message["content"] for message in await last_messages(backend, 2)] == ["First", "Hello there.", "Second"]


async def test_turns_of_one_conversation_wait_for_each_other(client: AsyncOpenAI, backend: Backend) -> None:
    conversation = await client.conversations.create()
    await asyncio.gather(*(turn(client, f"{n}", conversation=conversation.id) for n in range(4)))
    lengths = [len(request.body["messages"]) for request in backend.requests]
    assert lengths == [1, 3, 5, 7]
    assert_prefixes(backend.requests)


# -- the byte prefix ---------------------------------------------------------------------------------------------------


def message_bytes(request: Received) -> bytes:
    """The messages of a chat request as they were on the wire, without the closing bracket."""
    text = request.raw.decode()
    start = text.index('"messages":') + len('"messages":')
    _, end = json.JSONDecoder().raw_decode(text, start)
    assert (text[start], text[end - 1]) == ("[", "]")
    return text[start : end - 1].encode()


def assert_prefixes(requests: list[Received]) -> None:
    """What a backend has read in one turn it can have in its cache for the next one."""
    for earlier, later in itertools.pairwise(map(message_bytes, requests)):
        assert later[: len(earlier)] == earlier
        assert later[len(earlier) : len(earlier) + 1] == b","


ODD = 'Ünïcödé "quotes" \\ and\n\u2028 lines 🦓'
# A plain answer, a call and its output, reasoning, a streamed answer, odd characters: one turn after another.
SCRIPTS = [
    plain("One."),
    plain_call("get_weather", '{ "city" :"Paris", "n": 1.0}'),
    plain("Sunny.", reasoning_content="Hmm."),
    plain("Hel", "length"),
    plain(ODD),
    plain("End."),
]
INPUTS: list[Any] = [
    "First",
    [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}],
    [{"type": "function_call_output", "call_id": "call_1", "output": ODD}],
    ODD,
    [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Go on"}],
    "Last",
]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_along_a_chain_messages_are_a_byte_prefix_of_the_next_ones(
    start_app: StartApp, backend: Backend, dialect: str
) -> None:
    client = (await start_app(upstream={"dialect": dialect})).openai
    backend.script(*SCRIPTS)
    previous: Any = {}
    for said in INPUTS:
        response = await turn(client, said, instructions="Be brief.", tools=[WEATHER], **previous)
        previous = {"previous_response_id": response.id}
    assert len(backend.requests) == len(INPUTS)
    assert_prefixes(backend.requests)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_along_a_conversation_messages_are_a_byte_prefix_of_the_next_ones(
    start_app: StartApp, backend: Backend, dialect: str
) -> None:
    client = (await start_app(upstream={"dialect": dialect})).openai
    backend.script(*SCRIPTS)
    conversation = await client.conversations.create(items=[{"role": "user", "content": ODD}])
    for said in INPUTS:
        await turn(client, said, instructions="Be brief.", tools=[WEATHER], conversation=conversation.id)
    assert len(backend.requests) == len(INPUTS)
    assert_prefixes(backend.requests)


async def test_along_a_streamed_chain_messages_are_a_byte_prefix_of_the_next_ones(
    client: AsyncOpenAI, backend: Backend
) -> None:
    call = streamed_calls(call_delta(0, '{ "city" :', "get_weather", "call_1"), call_delta(0, '"Paris"}'))
    backend.script(streamed("O", "ne."), call, streamed("Sunny."), streamed(ODD[:5], ODD[5:]), streamed("End."))
    previous: Any = {}
    for said in INPUTS[:5]:
        last = (await events_of(client, input=said, instructions="Be brief.", tools=[WEATHER], **previous))[-1]
        previous = {"previous_response_id": last.response.id}
    assert_prefixes(backend.requests)


async def test_a_chain_a_conversation_and_a_replay_give_the_backend_the_same_bytes(
    client: AsyncOpenAI, backend: Backend
) -> None:
    backend.script(*[plain_call("get_weather", PARIS), plain("Sunny.")] * 3)
    question: Any = {"role": "user", "content": "Weather?"}
    conversation = await client.conversations.create()
    for way in ("chain", "conversation", "replay"):
        within: Any = {"conversation": conversation.id} if way == "conversation" else {}
        first = await turn(client, [question], tools=[WEATHER], store=way != "replay", **within)
        output = output_of(first.output[0])
        if way == "chain":
            within = {"previous_response_id": first.id}
        said = [question, first.output[0].to_dict(), output] if way == "replay" else [output]
        await turn(client, said, tools=[WEATHER], store=way != "replay", **within)
    assert len({request.raw for request in backend.requests[1::2]}) == 1


# -- owners ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def strangers(start_app: StartApp) -> tuple[AsyncOpenAI, AsyncOpenAI]:
    """Two clients of one proxy, each with a key of its own."""
    (mine, my_hash), (yours, your_hash) = new_key(), new_key()
    app = await start_app(auth={"mode": "keys", "keys": {"me": my_hash, "you": your_hash}})
    return app.openai.with_options(api_key=mine), app.openai.with_options(api_key=yours)


async def test_an_unknown_key_is_an_authentication_error(strangers: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    nobody = strangers[0].with_options(api_key="rp-nobody")
    askings: list[Any] = [turn(nobody), nobody.responses.retrieve("resp_1"), nobody.conversations.create()]
    for asking in askings:
        with pytest.raises(openai.AuthenticationError) as caught:
            await asking
        assert caught.value.code == "invalid_api_key"


async def test_another_owners_response_is_unknown(strangers: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    me, you = strangers
    response = await turn(me)
    for ask in (you.responses.retrieve, you.responses.delete, you.responses.cancel, you.responses.input_items.list):
        asked: Any = ask(response.id)
        assert await error_of(asked, 404) == no_response(response.id)
    assert await error_of(turn(you, previous_response_id=response.id), 400) == no_previous(response.id)
    reference = {"type": "item_reference", "id": response.output[0].id}
    assert (await error_of(turn(you, [reference]), 404))["param"] == "input"
    assert (await responses(you))["data"] == []
    assert await retrieved(me, response.id) == response.to_dict()


async def test_another_owners_conversation_is_unknown(strangers: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    me, you = strangers
    conversation = await me.conversations.create(items=[{"role": "user", "content": "Hi"}])
    items = you.conversations.items
    askings: list[Any] = [
        you.conversations.retrieve(conversation.id),
        you.conversations.update(conversation.id, metadata={}),
        you.conversations.delete(conversation.id),
        items.list(conversation.id),
        items.create(conversation.id, items=[{"role": "user", "content": "Hi"}]),
    ]
    for asking in askings:
        assert await error_of(asking, 404) == no_conversation(conversation.id)
    assert (await error_of(turn(you, conversation=conversation.id), 404))["param"] == "conversation"
    assert len((await conversation_items(me, conversation.id))["data"]) == 1


async def test_the_clients_own_key_is_passed_on_and_owns_what_it_makes(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(auth={"mode": "passthrough"})
    response = await turn(app.openai)
    assert (await backend.received()).headers["authorization"] == "Bearer client-key"
    other = app.openai.with_options(api_key="other-key")
    assert await error_of(other.responses.retrieve(response.id), 404) == no_response(response.id)


# -- the same request twice --------------------------------------------------------------------------------------------

KEY = {"Idempotency-Key": "key-1"}


async def test_a_request_with_the_same_key_is_answered_once(client: AsyncOpenAI, backend: Backend) -> None:
    first = await turn(client, extra_headers=KEY)
    again = await client.responses.with_raw_response.create(model="m", input="Hi", extra_headers=KEY)
    assert again.headers["idempotent-replayed"] == "true"
    assert (again.parse().to_dict(), len(backend.requests)) == (first.to_dict(), 1)


async def test_a_stream_with_the_same_key_is_told_again(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Hel", "lo"))
    first, again = [await events_of(client, input="Hi", extra_headers=KEY) for _ in range(2)]
    assert (again[-1].to_dict()["response"], len(backend.requests)) == (first[-1].to_dict()["response"], 1)


async def test_a_key_in_a_conversation_adds_items_once(client: AsyncOpenAI) -> None:
    conversation = await client.conversations.create()
    for _ in range(2):
        await turn(client, conversation=conversation.id, extra_headers=KEY)
    assert bare((await conversation_items(client, conversation.id))["data"]) == [user("Hi"), assistant("Hello there.")]


async def test_a_key_for_another_request_is_a_400(client: AsyncOpenAI) -> None:
    await turn(client, "One", extra_headers=KEY)
    error = await error_of(turn(client, "Two", extra_headers=KEY), 400)
    message = "This Idempotency-Key was used for another request body within the last 24 hours."
    assert error == bad(message, None, "idempotency_key_reused")


async def test_a_key_whose_request_is_running_is_a_conflict(client: AsyncOpenAI, backend: Backend) -> None:
    answers = asyncio.Event()
    script = plain()
    script.before = answers
    backend.script(script)
    running = asyncio.ensure_future(turn(client, extra_headers=KEY))
    await backend.received()
    with pytest.raises(openai.ConflictError) as caught:
        await turn(client, extra_headers=KEY)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("idempotency_key_in_use", "1")
    answers.set()
    await running
    assert len(backend.requests) == 1


async def test_a_request_that_failed_may_be_sent_again_with_its_key(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(refused(500, "Not today"), plain())
    await error_of(turn(client, extra_headers=KEY), 502)
    response = await turn(client, extra_headers=KEY)
    assert (response.status, len(backend.requests)) == ("completed", 2)


async def test_the_sdk_repeats_a_failed_request_under_one_key(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(refused(500, "Not today"), plain())
    response = await turn(client.with_options(max_retries=1), extra_headers=KEY)
    again = await turn(client, extra_headers=KEY)
    assert (again.to_dict(), len(backend.requests)) == (response.to_dict(), 2)


async def test_a_key_is_named_as_ignored_where_nothing_is_stored(client: AsyncOpenAI, backend: Backend) -> None:
    for _ in range(2):
        raw = await client.responses.with_raw_response.create(model="m", input="Hi", store=False, extra_headers=KEY)
        assert raw.headers["x-responses-proxy-ignored"] == "Idempotency-Key"
    assert len(backend.requests) == 2
