"""Background turns through the running proxy: what is queued is carried out, whoever stays connected, and ends once."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from conftest import App, StartApp, both_stores
from controlled import Work, controlled, replaced
from event_grammar import check, parse
from scripted import (
    DEADLINE_S,
    END,
    Backend,
    Received,
    Script,
    call_delta,
    chunk,
    plain,
    refused,
    streamed,
    streamed_calls,
)
from store_places import MemoryPlace, Place
from test_proxy import Blocks, error_of, events_in

import background
import dispatch
import event_log
import turns
from background import Background, BackgroundSettings
from compaction import CompactionSettings
from counting import Counter
from errors import StoreError
from leases import Leases
from metrics import Metrics
from observing import Observer
from routing import Upstreams
from run_verbs import Held, NewRun, QueueLimits, RunStore
from sealing import Seals
from sources import Sources
from stream_plan import ReasoningSettings
from streaming import ResponseStream
from turns import Means, Turns, TurnSettings
from upstream import UpstreamSettings
from verbs import NewTurn
from watching import Watcher

pytestmark = both_stores
Json = dict[str, Any]
HI: Json = {"model": "m", "input": "Hi"}
RUN: Json = {**HI, "background": True}
STREAMED_RUN: Json = {**RUN, "stream": True}
KEY = {"Idempotency-Key": "k-1"}
REPLAYED = "idempotent-replayed"
UNFINISHED = {"queued", "in_progress"}
# Renews and sweeps ten times a second.
QUICK = {"lease_s": 0.3}
WEATHER: Json = {
    "type": "function",
    "name": "weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"maximum": 1e300}}},
    "strict": False,
}
both = pytest.mark.parametrize("body", [RUN, STREAMED_RUN], ids=["plain", "stream"])


# -- what is asked of the proxy ----------------------------------------------------------------------------------------


async def created(app: App, body: Json = RUN, **headers: str) -> Json:
    """A background response as it was admitted; the events of a streamed one are not read."""
    async with app.post(body, headers=headers) as answer:
        if body.get("stream"):
            block = await Blocks(answer).next()
            first: Json = json.loads(block.partition("data: ")[2])["response"]
            return first
        response: Json = await answer.json()
        assert answer.status == 200, response
        return response


async def got(app: App, response_id: str, status: int = 200) -> Json:
    async with app.http.get(f"{app.url}/v1/responses/{response_id}") as answer:
        body: Json = await answer.json()
        assert answer.status == status, body
        return body


async def until(found: Callable[[], Awaitable[Any]]) -> Any:
    """What is found, as soon as there is something."""
    async with asyncio.timeout(DEADLINE_S):
        while not (result := await found()):  # noqa: ASYNC110 - what is looked at is behind HTTP
            await asyncio.sleep(0.01)
    return result


async def in_status(app: App, response_id: str, *statuses: str) -> Json:
    """The response as soon as it has one of these statuses."""

    async def found() -> Json | None:
        response = await got(app, response_id)
        return response if response["status"] in statuses else None

    response: Json = await until(found)
    return response


async def ended(app: App, response_id: str) -> Json:
    return await in_status(app, response_id, "completed", "incomplete", "failed", "cancelled")


async def cancelled(app: App, response_id: str, status: int = 200) -> Json:
    async with app.http.post(f"{app.url}/v1/responses/{response_id}/cancel") as answer:
        body: Json = await answer.json()
        assert answer.status == status, body
        return body


async def deleted(app: App, response_id: str) -> Json:
    async with app.http.delete(f"{app.url}/v1/responses/{response_id}") as answer:
        body: Json = await answer.json()
        assert answer.status == 200, body
        return body


async def foreground(app: App, **changes: Any) -> Json:
    async with app.post({**HI, **changes}) as answer:
        response: Json = await answer.json()
        assert answer.status == 200, response
        return response


async def events_of(app: App, body: Json = STREAMED_RUN) -> list[Json]:
    async with app.post(body) as answer:
        return events_in(await Blocks(answer).rest())


async def items_of(app: App, conversation: str) -> list[str]:
    """The texts of a conversation, oldest first."""
    async with app.http.get(f"{app.url}/v1/conversations/{conversation}/items?order=asc&limit=100") as answer:
        items = (await answer.json())["data"]
    return [item["content"][0]["text"] for item in items]


async def new_conversation(app: App) -> str:
    async with app.post({}, "/v1/conversations") as answer:
        return str((await answer.json())["id"])


def joined(seen: list[str], rest: list[str]) -> list[str]:
    """The blocks that were read one by one, and the rest."""
    return [*(block.removesuffix("\n\n") for block in seen), *rest]


def gated(first: str = "Hel", second: str = "lo") -> tuple[Script, asyncio.Event]:
    """An answer that stops in the middle until the event is set."""
    goes_on = asyncio.Event()
    return Script([chunk(content=first), goes_on, chunk(content=second), *END]), goes_on


def said(request: Received) -> list[Any]:
    return [message["content"] for message in request.body["messages"]]


def bare(response: Json) -> Json:
    """A response without what differs from one turn to the next."""
    output = [{key: value for key, value in item.items() if key != "id"} for item in response["output"]]
    fresh = ("id", "created_at", "completed_at", "background", "output")
    return {**{key: value for key, value in response.items() if key not in fresh}, "output": output}


def check_run(events: list[Json]) -> Json:
    """Fails unless this is the whole, valid stream of a background response; gives the response of its end."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    created, queued, *rest = events
    assert [created["type"], queued["type"]] == ["response.created", "response.queued"]
    assert created["response"] == queued["response"]
    assert (queued["response"]["status"], queued["response"]["output"]) == ("queued", [])
    assert rest[0]["response"]["status"] == "in_progress"
    parse(events)
    return check([created, *({**event, "sequence_number": event["sequence_number"] - 1} for event in rest)])


StartOnStore = Callable[..., Awaitable[App]]


@pytest.fixture
def on_store(start_app: StartApp, place: Place) -> StartOnStore:
    """Starts one more process on the store that the test's processes share: `await on_store(workers=0)`."""

    async def start(workers: int = 8, **sections: Json) -> App:
        background = {"workers": workers, **QUICK, **sections.pop("background", {})}
        return await start_app(background=background, **sections)

    return start


# -- create ------------------------------------------------------------------------------------------------------------


@both
async def test_it_is_answered_at_once_as_queued(app: App, backend: Backend, body: Json) -> None:
    script, goes_on = gated()
    script.before = goes_on
    backend.script(script)
    response = await created(app, body)
    found = [response[key] for key in ("status", "output", "usage", "background", "completed_at", "error")]
    assert found == ["queued", [], None, True, None, None]
    goes_on.set()
    assert (await ended(app, response["id"]))["status"] == "completed"


@both
@pytest.mark.stores("memory", "file", "postgres")
async def test_it_becomes_what_a_foreground_turn_would_be(app: App, backend: Backend, body: Json) -> None:
    backend.script(streamed("Hel", "lo"))
    async with app.post({**HI, "stream": True}) as answer:
        expected = events_in(await Blocks(answer).rest())[-1]["response"]
    response = await ended(app, (await created(app, body))["id"])
    assert bare(response) == bare(expected)
    assert response["completed_at"] >= response["created_at"]


async def test_it_is_in_progress_while_the_backend_answers(app: App, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app))["id"]
    response = await in_status(app, response_id, "in_progress")
    assert [response[key] for key in ("output", "usage", "completed_at")] == [[], None, None]
    goes_on.set()
    assert (await ended(app, response_id))["status"] == "completed"


async def test_it_is_listed_and_shows_its_input_before_it_has_ended(start_app: StartApp) -> None:
    app = await start_app(background={"workers": 0})
    response = await created(app)
    async with app.http.get(f"{app.url}/v1/responses") as answer:
        assert (await answer.json())["data"] == [response]
    async with app.http.get(f"{app.url}/v1/responses/{response['id']}/input_items") as answer:
        (item,) = (await answer.json())["data"]
    assert item["content"] == [{"type": "input_text", "text": "Hi"}]


async def test_a_cut_answer_is_incomplete(app: App, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel"), chunk("length"), *END[1:]]))
    response = await ended(app, (await created(app))["id"])
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"


MANY: Json = {
    "model": "m",
    "instructions": "Be brief. ü\u2028",
    "input": [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "input_text", "text": "Look:"}]},
        {"type": "function_call", "call_id": "call_a", "name": "weather", "arguments": '{"b":1}'},
        {"type": "function_call_output", "call_id": "call_a", "output": "rain"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It rains."}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "https://example.org/a.png"}]},
    ],
    "tools": [
        WEATHER,
        {"type": "custom", "name": "note", "description": "Takes a note"},
        {"type": "namespace", "name": "files", "description": "Files", "tools": [{**WEATHER, "name": "read"}]},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
    "parallel_tool_calls": False,
    "max_output_tokens": 1000,
    "max_tool_calls": 3,
    "temperature": 0.1,
    "top_p": 1,
    "presence_penalty": -0.5,
    "frequency_penalty": 1e-7,
    "top_logprobs": 3,
    "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    "text": {
        "format": {"type": "json_schema", "name": "s", "schema": {"z": {}, "a": [1.0, 2**53]}},
        "verbosity": "low",
    },
    "reasoning": {"effort": "low", "summary": "auto"},
    "metadata": {"b": "1", "a": "2"},
    "service_tier": "flex",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "user": "u",
    "truncation": "auto",
    "context_management": [{"type": "compaction", "compact_threshold": 100_000}],
    "seed": 7,
}


@pytest.mark.parametrize("dialect", ["generic", "openai", "vllm", "llamacpp", "deepseek"])
@both
async def test_every_parameter_reaches_the_backend_as_in_the_foreground(
    start_app: StartApp, backend: Backend, dialect: str, body: Json
) -> None:
    app = await start_app(upstream={"dialect": dialect})
    backend.script(streamed("{}"))
    async with app.post({**MANY, "stream": True}) as answer:
        told = events_in(await Blocks(answer).rest())[-1]["response"]
    response = await ended(app, (await created(app, {**MANY, **body, "input": MANY["input"]}))["id"])
    in_foreground, in_background = backend.requests
    assert in_background.raw == in_foreground.raw
    assert bare(response) == bare(told)


async def test_a_file_reaches_the_backend_as_in_the_foreground(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(upstream={"dialect": "openai"})
    backend.script(streamed("Hi"))
    part = {"type": "input_file", "filename": "a.txt", "file_data": "dGV4dA=="}
    body = {**HI, "input": [{"role": "user", "content": [part]}]}
    await events_of(app, {**body, "stream": True})
    await ended(app, (await created(app, {**body, "background": True}))["id"])
    in_foreground, in_background = backend.requests
    assert in_background.raw == in_foreground.raw


async def test_reasoning_without_an_id_reaches_the_backend_as_in_the_foreground(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(upstream={"dialect": "deepseek"}, reasoning={"expose": "none"})
    backend.script(plain("Rain.", reasoning_content="Let me think."), streamed("Hi"))
    reasoning, message = (await foreground(app, store=False))["output"]
    del reasoning["id"]
    items = [{"role": "user", "content": "Hi"}, reasoning, message, {"role": "user", "content": "And?"}]
    body = {**HI, "input": items, "stream": True}
    async with app.post(body) as answer:
        await answer.read()
    async with app.post({**body, "background": True}) as answer:
        ignored = answer.headers.get("x-responses-proxy-ignored")
        await answer.read()
    _, in_foreground, in_background = backend.requests
    assert (in_background.raw, ignored) == (in_foreground.raw, None)


async def test_a_reference_is_replaced_as_in_the_foreground(app: App, backend: Backend) -> None:
    backend.script(plain("Rain."), streamed("Hi"))
    (item,) = (await foreground(app))["output"]
    body = {**HI, "input": [{"type": "item_reference", "id": item["id"]}, {"role": "user", "content": "And?"}]}
    await events_of(app, {**body, "stream": True})
    await ended(app, (await created(app, {**body, "background": True}))["id"])
    _, in_foreground, in_background = backend.requests
    assert in_background.raw == in_foreground.raw


async def test_the_rest_of_a_chain_reaches_the_backend_as_in_the_foreground(app: App, backend: Backend) -> None:
    backend.script(plain("One."), streamed("Two."))
    first = (await foreground(app))["id"]
    await events_of(app, {**HI, "stream": True, "previous_response_id": first})
    response = await ended(app, (await created(app, {**RUN, "previous_response_id": first}))["id"])
    _, in_foreground, in_background = backend.requests
    assert in_background.raw == in_foreground.raw
    assert response["previous_response_id"] == first


async def test_a_completed_one_can_be_continued(app: App, backend: Backend) -> None:
    backend.script(streamed("One."), plain("Two."))
    first = (await ended(app, (await created(app))["id"]))["id"]
    await foreground(app, input="And?", previous_response_id=first)
    assert said(backend.requests[-1]) == ["Hi", "One.", "And?"]


# -- stream ------------------------------------------------------------------------------------------------------------

STREAMS = {
    "text": streamed("Hel", "lo"),
    "nothing": Script([chunk(role="assistant", content=""), *END]),
    "reasoning": Script([chunk(reasoning_content="Let me think."), chunk(content="Hi"), *END]),
    "calls": streamed_calls(
        call_delta(0, "", "weather", "call_a"), call_delta(0, "{}"), call_delta(1, '{"a": 1}', "weather", "call_b")
    ),
    "refusal": Script([chunk(refusal="No."), *END]),
    "cut": Script([chunk(content="Hel"), chunk("length"), *END[1:]]),
    "broken": Script([chunk(content="Hel")], end="cut"),
    "refused": refused(400, "no"),
}


@pytest.mark.parametrize("script", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("expose", ["summary", "text", "none"])
async def test_the_events_are_valid_and_end_with_the_response_that_is_kept(
    start_app: StartApp, backend: Backend, script: Script, expose: str
) -> None:
    app = await start_app(reasoning={"expose": expose})
    backend.script(script)
    body = {**STREAMED_RUN, "tools": [WEATHER]}
    response = check_run(await events_of(app, body))
    assert {**response, "output": []} == {**await got(app, response["id"]), "output": []}


async def test_a_text_has_the_events_in_order(app: App, backend: Backend) -> None:
    backend.script(streamed("Hel", "lo"))
    events = await events_of(app)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "queued", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]


async def test_a_delta_is_told_before_the_backend_goes_on(app: App, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        assert '"delta":"Hel"' in await blocks.until("event: response.output_text.delta")
        goes_on.set()
        assert events_in(await blocks.rest())[-1]["type"] == "response.completed"


@both
async def test_it_goes_on_when_its_client_leaves(app: App, backend: Backend, body: Json) -> None:
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app, body))["id"]
    request = await backend.received()
    await in_status(app, response_id, "in_progress")
    assert not request.gone.is_set()
    goes_on.set()
    response = await ended(app, response_id)
    assert (response["status"], response["output"][0]["content"][0]["text"]) == ("completed", "Hello")
    assert not request.gone.is_set()


async def test_a_silent_one_is_kept_alive_by_comments(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(server={"keepalive_s": 0.05})
    script, goes_on = gated()
    backend.script(script)
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        await blocks.until("event: response.output_text.delta")
        assert await blocks.until(":") == ": keepalive\n\n"
        goes_on.set()
        assert events_in(await blocks.rest())[-1]["type"] == "response.completed"


# -- what is refused at create -----------------------------------------------------------------------------------------


@both
async def test_what_is_left_out_is_named_at_create(app: App, body: Json) -> None:
    async with app.post({**body, "seed": 1, "tools": [{"type": "web_search"}]}) as answer:
        assert answer.headers["x-responses-proxy-ignored"] == "seed, tools[0].type=web_search"


@pytest.mark.parametrize("changes", [{"seed": 1}, {"tools": [{"type": "web_search"}]}], ids=["field", "tool"])
@pytest.mark.parametrize("parent", ["no parent", "a parent that runs"])
@both
async def test_strict_refuses_at_create(
    start_app: StartApp, backend: Backend, body: Json, parent: str, changes: Json
) -> None:
    app = await start_app(turns={"strict": True}, background={"workers": 0})
    previous = (await created(app))["id"] if parent == "a parent that runs" else None
    async with app.post({**body, **changes, "previous_response_id": previous}) as answer:
        assert answer.status == 400  # a stream of what waits for ever is not read
        error = await error_of(answer, 400)
    assert (error["code"], backend.requests) == ("unsupported_parameter", [])


@both
async def test_an_output_without_its_call_is_refused_at_create(app: App, backend: Backend, body: Json) -> None:
    output = {"type": "function_call_output", "call_id": "call_x", "output": "rain"}
    async with app.post({**body, "input": [output]}) as answer:
        error = await error_of(answer, 400)
    assert ("call_x" in error["message"], error["param"], backend.requests) == (True, "input", [])


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"previous_response_id": "resp_unknown"}, 400),
        ({"conversation": "conv_unknown"}, 404),
        ({"input": [{"type": "item_reference", "id": "msg_unknown"}]}, 404),
        ({"input": [{"type": "nonsense"}]}, 400),
        ({"input": ""}, 400),
        ({"temperature": 9}, 400),
    ],
    ids=["parent", "conversation", "reference", "item", "nothing", "parameter"],
)
@both
async def test_a_mistake_is_told_at_create_and_leaves_no_row(
    app: App, backend: Backend, body: Json, changes: Json, status: int
) -> None:
    async with app.post({**body, **changes}) as answer:
        await error_of(answer, status)
    async with app.http.get(f"{app.url}/v1/responses") as answer:
        assert ((await answer.json())["data"], backend.requests) == ([], [])


async def test_an_output_whose_call_a_running_parent_will_make_is_accepted(app: App, backend: Backend) -> None:
    goes_on = asyncio.Event()
    call = streamed_calls(call_delta(0, "{}", "weather", "call_x"))
    call.before = goes_on
    backend.script(call, streamed("Rain."))
    parent = (await created(app, {**RUN, "tools": [WEATHER]}))["id"]
    output = {"type": "function_call_output", "call_id": "call_x", "output": "rain"}
    child = (await created(app, {**RUN, "input": [output], "previous_response_id": parent}))["id"]
    goes_on.set()
    assert (await ended(app, child))["status"] == "completed"


async def test_an_output_whose_call_a_running_parent_never_makes_fails_and_says_so(app: App, backend: Backend) -> None:
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="No call."), *END], before=goes_on))
    parent = (await created(app))["id"]
    output = {"type": "function_call_output", "call_id": "call_x", "output": "rain"}
    child = (await created(app, {**RUN, "input": [output], "previous_response_id": parent}))["id"]
    goes_on.set()
    response = await ended(app, child)
    assert (response["status"], response["error"]["code"]) == ("failed", "invalid_prompt")
    assert "call_x" in response["error"]["message"]


# -- cancel ------------------------------------------------------------------------------------------------------------


async def test_a_queued_one_is_cancelled_and_never_asked_for(on_store: StartOnStore, backend: Backend) -> None:
    app = await on_store(workers=0)
    response_id = (await created(app))["id"]
    assert (await cancelled(app, response_id))["status"] == "cancelled"
    await on_store()
    other = await created(app)
    assert (await ended(app, other["id"]))["status"] == "completed"
    assert (len(backend.requests), (await got(app, response_id))["status"]) == (1, "cancelled")


@both
async def test_a_running_one_is_cancelled_and_its_backend_let_go(app: App, backend: Backend, body: Json) -> None:
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app, body))["id"]
    request = await backend.received()
    response = await cancelled(app, response_id)
    found = [response[key] for key in ("status", "output", "usage", "completed_at", "error", "background")]
    assert found == ["cancelled", [], None, None, None, True]
    assert await request.is_let_go()
    goes_on.set()
    assert await got(app, response_id) == response


async def test_the_end_of_a_cancelled_ones_stream_is_incomplete_and_says_cancelled(app: App, backend: Backend) -> None:
    script, _ = gated()
    backend.script(script)
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        first = json.loads((await blocks.next()).partition("data: ")[2])
        await blocks.until("event: response.output_text.delta")
        response = await cancelled(app, first["response"]["id"])
        *_, last = events_in(await blocks.rest())
    assert (last["type"], last["response"]) == ("response.incomplete", response)


async def test_a_cancelled_one_stays_cancelled_when_it_is_cancelled_again(app: App, backend: Backend) -> None:
    backend.script(gated()[0])
    response_id = (await created(app))["id"]
    await backend.received()
    assert await cancelled(app, response_id) == await cancelled(app, response_id)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (streamed("Hi"), "completed"),
        (Script([chunk(content="Hel"), chunk("length"), *END[1:]]), "incomplete"),
        (refused(500, "no"), "failed"),
    ],
    ids=["completed", "incomplete", "failed"],
)
async def test_one_that_has_ended_is_not_changed_by_a_cancel(
    app: App, backend: Backend, script: Script, status: str
) -> None:
    backend.script(script)
    response = await ended(app, (await created(app))["id"])
    assert response["status"] == status
    assert await cancelled(app, response["id"]) == response
    assert await got(app, response["id"]) == response


async def test_a_foreground_response_cannot_be_cancelled(app: App) -> None:
    response_id = (await foreground(app))["id"]
    error = (await cancelled(app, response_id, 400))["error"]
    assert (error["message"], error["param"]) == ("Cannot cancel a synchronous response.", None)


async def test_an_unknown_one_cannot_be_cancelled(app: App) -> None:
    error = (await cancelled(app, "resp_unknown", 404))["error"]
    assert error["message"] == "Response with id 'resp_unknown' not found."


async def test_a_cancelled_one_cannot_be_continued(app: App, backend: Backend) -> None:
    backend.script(gated()[0])
    response_id = (await created(app))["id"]
    await backend.received()
    await cancelled(app, response_id)
    for options in ({}, {"background": True}):
        async with app.post({**HI, **options, "previous_response_id": response_id}) as answer:
            error = await error_of(answer, 400)
        assert error["message"] == f"Previous response with id '{response_id}' is cancelled and cannot be continued."


@both
async def test_a_running_one_is_deleted_and_its_backend_let_go(app: App, backend: Backend, body: Json) -> None:
    backend.script(gated()[0])
    response_id = (await created(app, body))["id"]
    request = await backend.received()
    assert await deleted(app, response_id) == {"id": response_id, "object": "response", "deleted": True}
    assert await request.is_let_go()
    await got(app, response_id, 404)
    await cancelled(app, response_id, 404)


async def test_the_stream_of_a_deleted_one_has_an_end(app: App, backend: Backend) -> None:
    backend.script(gated()[0])
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        first = json.loads((await blocks.next()).partition("data: ")[2])
        await blocks.until("event: response.output_text.delta")
        await deleted(app, first["response"]["id"])
        *_, last = events_in(await blocks.rest())
    assert (last["type"], last["response"]["status"], last["response"]["output"]) == (
        "response.incomplete",
        "cancelled",
        [],
    )


async def test_a_queued_one_is_deleted(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background={"workers": 0})
    response_id = (await created(app))["id"]
    await deleted(app, response_id)
    await got(app, response_id, 404)


async def test_a_cancel_makes_room_for_the_next_one(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background={"workers": 1})
    backend.script(gated()[0], streamed("Hi"))
    first = (await created(app))["id"]
    await backend.received()
    second = (await created(app))["id"]
    await cancelled(app, first)
    assert (await ended(app, second))["status"] == "completed"


async def test_a_late_end_loses_against_a_cancel(app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = controlled("settle", monkeypatch)
    settle.may_begin.clear()
    backend.script(streamed("Hi"))
    response_id = (await created(app))["id"]
    await settle.once_more("asked")
    cancelling = asyncio.create_task(cancelled(app, response_id))
    await in_status(app, response_id, "cancelled")
    settle.may_begin.set()
    response = await cancelling
    assert (response["status"], response["output"]) == ("cancelled", [])
    assert await got(app, response_id) == response


# -- children ----------------------------------------------------------------------------------------------------------


@both
async def test_a_child_waits_for_its_parent_and_knows_its_answer(app: App, backend: Backend, body: Json) -> None:
    script, goes_on = gated("One", ".")
    backend.script(script, streamed("Two."))
    parent = (await created(app))["id"]
    await backend.received()
    child = (await created(app, {**body, "input": "And?", "previous_response_id": parent}))["id"]
    assert ((await got(app, child))["status"], len(backend.requests)) == ("queued", 1)
    goes_on.set()
    assert (await ended(app, child))["status"] == "completed"
    assert said(backend.requests[1]) == ["Hi", "One.", "And?"]


async def test_five_of_a_chain_are_queued_and_end_in_order(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background={"workers": 8})
    script, goes_on = gated("0", "")
    backend.script(script, *(streamed(str(number)) for number in range(1, 5)))
    previous: str | None = None
    for number in range(5):
        previous = (await created(app, {**RUN, "input": f"{number}?", "previous_response_id": previous}))["id"]
    await backend.received()
    goes_on.set()
    assert (await ended(app, str(previous)))["status"] == "completed"
    whole = [text for number in range(5) for text in (f"{number}?", str(number))][:-1]
    assert [said(request) for request in backend.requests] == [whole[: 2 * number + 1] for number in range(5)]


async def test_a_child_that_waits_takes_no_worker(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background={"workers": 2})
    script, goes_on = gated()
    backend.script(script, streamed("Hi"))
    parent = (await created(app))["id"]
    await backend.received()
    child = (await created(app, {**RUN, "previous_response_id": parent}))["id"]
    assert (await ended(app, (await created(app))["id"]))["status"] == "completed"
    assert (await got(app, child))["status"] == "queued"
    goes_on.set()
    assert (await ended(app, child))["status"] == "completed"


@pytest.mark.parametrize("how", ["failed", "cancelled"])
@both
async def test_a_child_of_one_that_has_not_completed_fails_and_names_it(
    app: App, backend: Backend, body: Json, how: str
) -> None:
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), goes_on], end="cut"), streamed("Hi"))
    parent = (await created(app))["id"]
    await backend.received()
    child = (await created(app, {**body, "previous_response_id": parent}))["id"]
    grandchild = (await created(app, {**RUN, "previous_response_id": child}))["id"]
    if how == "cancelled":
        await cancelled(app, parent)
    goes_on.set()
    response, last = await ended(app, child), await ended(app, grandchild)
    message = f"Previous response with id '{parent}' is {how} and cannot be continued."
    assert (response["status"], response["error"]) == ("failed", {"code": "invalid_prompt", "message": message})
    assert (last["status"], child in last["error"]["message"], len(backend.requests)) == ("failed", True, 1)


async def test_a_child_whose_parent_is_deleted_fails(app: App, backend: Backend) -> None:
    backend.script(gated()[0], streamed("Hi"))
    parent = (await created(app))["id"]
    await backend.received()
    child = (await created(app, {**RUN, "previous_response_id": parent}))["id"]
    await deleted(app, parent)
    response = await ended(app, child)
    assert (response["status"], len(backend.requests)) == ("failed", 1)
    assert f"Previous response with id '{parent}' " in response["error"]["message"]


async def test_a_child_goes_on_from_a_parent_that_is_deleted_after_its_end(
    on_store: StartOnStore, backend: Backend
) -> None:
    carrying_out, submitting = await on_store(), await on_store(workers=0)
    backend.script(streamed("One."))
    parent = (await ended(carrying_out, (await created(carrying_out))["id"]))["id"]
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Two."), *END], before=goes_on), streamed("Three."))
    middle = (await created(submitting, {**RUN, "input": "2?", "previous_response_id": parent}))["id"]
    child = (await created(submitting, {**RUN, "input": "3?", "previous_response_id": middle}))["id"]
    await deleted(submitting, parent)
    goes_on.set()
    assert [(await ended(submitting, each))["status"] for each in (middle, child)] == ["completed"] * 2
    assert said(backend.requests[-1]) == ["Hi", "One.", "2?", "Two.", "3?"]


async def test_the_stream_of_a_child_that_fails_before_it_begins_has_an_end(app: App, backend: Backend) -> None:
    backend.script(gated()[0])
    parent = (await created(app))["id"]
    await backend.received()
    async with app.post({**STREAMED_RUN, "previous_response_id": parent}) as answer:
        blocks = Blocks(answer)
        await blocks.until("event: response.queued")
        await cancelled(app, parent)
        (last,) = events_in(await blocks.rest())
    assert (last["type"], last["sequence_number"], last["response"]["status"]) == ("response.failed", 2, "failed")
    parse([last])


# -- conversations -----------------------------------------------------------------------------------------------------


async def test_those_of_a_conversation_run_one_after_the_other(app: App, backend: Backend) -> None:
    script, goes_on = gated("One", ".")
    backend.script(script, streamed("Two."), streamed("Three."))
    conversation = await new_conversation(app)
    found = [await created(app, {**RUN, "input": f"{n}?", "conversation": conversation}) for n in (1, 2, 3)]
    await backend.received()
    goes_on.set()
    for each in found:
        assert (await ended(app, each["id"]))["status"] == "completed"
    whole = ["1?", "One.", "2?", "Two.", "3?", "Three."]
    assert [said(request) for request in backend.requests] == [whole[:1], whole[:3], whole[:5]]
    assert await items_of(app, conversation) == whole


async def test_items_join_a_conversation_at_the_end(app: App, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    conversation = await new_conversation(app)
    response = await created(app, {**RUN, "conversation": conversation})
    await backend.received()
    assert await items_of(app, conversation) == []
    goes_on.set()
    whole = await ended(app, response["id"])
    assert whole["conversation"] == {"id": conversation}
    assert await items_of(app, conversation) == ["Hi", "Hello"]
    assert response["conversation"] == {"id": conversation}


async def test_a_foreground_turn_fits_in_between(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(turns={"conversation_wait_s": DEADLINE_S})
    script, goes_on = gated("a", "")
    backend.script(script, Script([chunk(content="b"), *END]))
    conversation = await new_conversation(app)
    first = (await created(app, {**RUN, "input": "1?", "conversation": conversation}))["id"]
    await backend.received()
    body = {**HI, "input": "2?", "conversation": conversation, "stream": True}
    between = asyncio.create_task(events_of(app, body))
    second = (await created(app, {**RUN, "input": "3?", "conversation": conversation}))["id"]
    goes_on.set()
    assert [(await ended(app, each))["status"] for each in (first, second)] == ["completed"] * 2
    assert (await between)[-1]["type"] == "response.completed"
    whole = await items_of(app, conversation)
    assert sorted(whole) == ["1?", "2?", "3?", "a", "b", "b"]
    assert [said(request) for request in backend.requests] == [whole[:1], whole[:3], whole[:5]]


async def test_a_foreground_turn_is_told_that_a_run_holds_the_conversation(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(turns={"conversation_wait_s": 0.05})
    script, goes_on = gated()
    backend.script(script)
    conversation = await new_conversation(app)
    response_id = (await created(app, {**RUN, "conversation": conversation}))["id"]
    await backend.received()
    async with app.post({**HI, "conversation": conversation}) as answer:
        error = await error_of(answer, 400)
    assert error["code"] == "conversation_locked"
    goes_on.set()
    assert (await ended(app, response_id))["status"] == "completed"


@pytest.mark.parametrize("how", ["failed", "cancelled", "deleted"])
async def test_one_that_did_not_complete_does_not_join_and_the_next_one_runs(
    app: App, backend: Backend, how: str
) -> None:
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), goes_on], end="cut"), streamed("Two."))
    conversation = await new_conversation(app)
    first = (await created(app, {**RUN, "input": "1?", "conversation": conversation}))["id"]
    await backend.received()
    second = (await created(app, {**RUN, "input": "2?", "conversation": conversation}))["id"]
    if how == "failed":
        goes_on.set()
    else:
        await {"cancelled": cancelled, "deleted": deleted}[how](app, first)
    assert (await ended(app, second))["status"] == "completed"
    assert await items_of(app, conversation) == ["2?", "Two."]
    await got(app, first, 404 if how == "deleted" else 200)


async def test_an_incomplete_one_joins(app: App, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel"), chunk("length"), *END[1:]]))
    conversation = await new_conversation(app)
    await ended(app, (await created(app, {**RUN, "conversation": conversation}))["id"])
    assert await items_of(app, conversation) == ["Hi", "Hel"]


async def test_without_a_store_nothing_joins_a_conversation(app: App, backend: Backend) -> None:
    backend.script(streamed("One."))
    conversation = await new_conversation(app)
    response = await ended(app, (await created(app, {**RUN, "conversation": conversation, "store": False}))["id"])
    assert (response["status"], await items_of(app, conversation)) == ("completed", [])


async def test_the_last_of_a_conversation_can_be_continued_by_its_id(app: App, backend: Backend) -> None:
    backend.script(streamed("One."), plain("Two."))
    conversation = await new_conversation(app)
    first = await ended(app, (await created(app, {**RUN, "conversation": conversation}))["id"])
    await foreground(app, input="And?", previous_response_id=first["id"])
    assert said(backend.requests[-1]) == ["Hi", "One.", "And?"]


@pytest.mark.parametrize("options", [{}, {"background": True}], ids=["foreground", "background"])
async def test_a_parent_that_will_join_a_conversation_is_a_409_until_then(
    start_app: StartApp, backend: Backend, options: Json
) -> None:
    app = await start_app(turns={"parent_wait_s": 0.05})
    script, goes_on = gated()
    backend.script(script)
    conversation = await new_conversation(app)
    parent = (await created(app, {**RUN, "conversation": conversation}))["id"]
    await backend.received()
    async with app.post({**HI, **options, "previous_response_id": parent}) as answer:
        error = await error_of(answer, 409)
        assert (error["param"], answer.headers["retry-after"]) == ("previous_response_id", "1")
    goes_on.set()
    assert (await ended(app, parent))["status"] == "completed"


@pytest.mark.parametrize("when", ["queued", "running"])
async def test_one_whose_conversation_is_deleted_fails(on_store: StartOnStore, backend: Backend, when: str) -> None:
    app = await on_store(workers=0 if when == "queued" else 1)
    script, goes_on = gated()
    backend.script(script)
    conversation = await new_conversation(app)
    response_id = (await created(app, {**STREAMED_RUN, "conversation": conversation}))["id"]
    if when == "running":
        await backend.received()
    async with app.http.delete(f"{app.url}/v1/conversations/{conversation}") as answer:
        assert answer.status == 200
    goes_on.set()
    await on_store()
    assert (await ended(app, response_id))["status"] == "failed"


# -- store: false ------------------------------------------------------------------------------------------------------

UNSTORED = {**RUN, "store": False}


@pytest.mark.parametrize("options", [{}, {"stream": True}], ids=["plain", "stream"])
async def test_without_a_store_it_can_be_retrieved_and_is_in_no_list(app: App, backend: Backend, options: Json) -> None:
    backend.script(streamed("Hi"))
    response = await ended(app, (await created(app, {**UNSTORED, **options}))["id"])
    assert (response["status"], response["store"]) == ("completed", False)
    async with app.http.get(f"{app.url}/v1/responses") as answer:
        assert (await answer.json())["data"] == []


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"background": True}], ids=["plain", "stream", "background"])
@pytest.mark.parametrize("when", ["running", "ended"])
async def test_without_a_store_it_cannot_be_continued(app: App, backend: Backend, options: Json, when: str) -> None:
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app, UNSTORED))["id"]
    await backend.received()
    if when == "ended":
        goes_on.set()
        await ended(app, response_id)
    async with app.post({**HI, **options, "previous_response_id": response_id}) as answer:
        error = await error_of(answer, 400)
    assert (error["code"], len(backend.requests)) == ("previous_response_not_found", 1)


async def test_without_a_store_it_can_be_cancelled(app: App, backend: Backend) -> None:
    backend.script(gated()[0])
    response_id = (await created(app, UNSTORED))["id"]
    request = await backend.received()
    assert (await cancelled(app, response_id))["status"] == "cancelled"
    assert await request.is_let_go()
    assert (await got(app, response_id))["status"] == "cancelled"


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
async def test_without_a_store_nothing_of_it_is_left_some_time_after_its_end(
    on_store: StartOnStore, backend: Backend, place: Place, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(event_log, "BRIEF_S", 0.2)
    app = await on_store(background={"stream_retention_s": 0.2})
    script, goes_on = gated()
    backend.script(refused(500, "no") if how == "failed" else script)
    response_id = (await created(app, {**UNSTORED, "stream": True}))["id"]
    await backend.received()
    if how == "cancelled":
        await cancelled(app, response_id)
    goes_on.set()

    async def is_gone() -> bool:
        async with app.http.get(f"{app.url}/v1/responses/{response_id}") as answer:
            return answer.status == 404

    await until(is_gone)

    async def is_erased() -> bool:
        tables = ("turn", "item", "run", "log", "event")
        return all(place.asked(f"SELECT count(*) FROM {table}") == [(0,)] for table in tables)

    await until(is_erased)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["queue_per_owner", "queue_total"])
@both
async def test_one_too_many_is_a_429_and_leaves_no_row(
    start_app: StartApp, backend: Backend, body: Json, limit: str
) -> None:
    app = await start_app(background={"workers": 0, limit: 2})
    kept = [(await created(app, body))["id"] for _ in range(2)]
    async with app.post(body, headers=KEY) as answer:
        error = await error_of(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    async with app.http.get(f"{app.url}/v1/responses?order=asc") as answer:
        assert [each["id"] for each in (await answer.json())["data"]] == kept
    await cancelled(app, kept[0])
    async with app.post(body, headers=KEY) as answer:
        assert (answer.status, answer.headers.get(REPLAYED)) == (200, None)


async def test_what_runs_does_not_count_as_queued(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background={"workers": 1, "queue_total": 1})
    script, goes_on = gated()
    backend.script(script)
    first = (await created(app))["id"]
    await backend.received()
    second = (await created(app))["id"]
    async with app.post(RUN) as answer:
        await error_of(answer, 429)
    goes_on.set()
    for each in (first, second):
        assert (await ended(app, each))["status"] == "completed"


async def test_no_more_are_carried_out_at_once_than_there_are_workers(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(background={"workers": 2})
    scripts = [gated() for _ in range(3)]
    backend.script(*(script for script, _ in scripts))
    found = [(await created(app))["id"] for _ in range(3)]
    for _ in range(2):
        await backend.received()
    assert [(await got(app, each))["status"] for each in found] == ["in_progress", "in_progress", "queued"]
    assert len(backend.requests) == 2
    for _, goes_on in scripts:
        goes_on.set()
    for each in found:
        assert (await ended(app, each))["status"] == "completed"


async def test_a_process_without_workers_leaves_runs_to_another(on_store: StartOnStore, backend: Backend) -> None:
    submitting = await on_store(workers=0)
    backend.script(streamed("Hel", "lo"))
    response_id = (await created(submitting))["id"]
    await on_store()
    response = await ended(submitting, response_id)
    assert (response["status"], response["output"][0]["content"][0]["text"]) == ("completed", "Hello")


async def test_a_run_of_another_process_is_tailed_live(
    on_store: StartOnStore, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "LOOK_AGAIN_S", 3600.0)
    submitting, _ = await on_store(workers=0), await on_store()
    script, goes_on = gated()
    backend.script(script)
    async with submitting.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        seen = [await blocks.next() for _ in range(5)]
        assert '"delta":"Hel"' in await blocks.next()
        goes_on.set()
        rest = await blocks.rest()
    assert (len(seen), events_in(rest)[-1]["response"]["status"]) == (5, "completed")


async def test_a_run_of_another_process_is_cancelled(on_store: StartOnStore, backend: Backend, place: Place) -> None:
    submitting, carrying_out = await on_store(workers=0), await on_store()
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(submitting))["id"]
    request = await backend.received()
    response = await cancelled(submitting, response_id)
    assert (response["status"], place.asked("SELECT count(*) FROM run")) == ("cancelled", [(0,)])
    assert await request.is_let_go()
    goes_on.set()
    assert [await got(app, response_id) for app in (submitting, carrying_out)] == [response] * 2


async def test_a_child_at_one_process_waits_for_a_parent_at_another(
    on_store: StartOnStore, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("past.LOOK_AGAIN_S", 3600.0)
    submitting, _ = await on_store(workers=0), await on_store()
    script, goes_on = gated("One", ".")
    backend.script(script, plain("Two."))
    parent = (await created(submitting))["id"]
    await backend.received()
    child = asyncio.create_task(foreground(submitting, input="And?", previous_response_id=parent))
    await submitting.openai.responses.retrieve(parent)
    goes_on.set()
    assert (await child)["status"] == "completed"
    assert said(backend.requests[1]) == ["Hi", "One.", "And?"]


async def test_what_waits_when_a_process_stops_is_carried_out_by_the_next_one(
    start_app: StartApp, on_store: StartOnStore, backend: Backend, place: Place
) -> None:
    app = await on_store(workers=0)
    found = [(await created(app))["id"] for _ in range(3)]
    again = await on_store()
    assert [(await ended(again, each))["status"] for each in found] == ["completed"] * 3


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (refused(400, "bad"), "invalid_prompt"),
        (refused(429, "slow down"), "rate_limit_exceeded"),
        (refused(500, "broken"), "server_error"),
        (Script([chunk(content="Hel")], end="cut"), "server_error"),
        (Script([chunk(content="Hel"), b"data: {nonsense\n\n"]), "server_error"),
        (Script([b"<html>"]), "server_error"),
        (Script([]), "server_error"),
    ],
    ids=["400", "429", "500", "cut", "garbled", "html", "nothing"],
)
@both
async def test_a_failure_of_the_backend_is_one_of_the_response(
    app: App, backend: Backend, body: Json, script: Script, code: str
) -> None:
    backend.script(script)
    response = await ended(app, (await created(app, body))["id"])
    assert (response["status"], response["error"]["code"], len(backend.requests)) == ("failed", code, 1)
    assert (response["completed_at"], bool(response["error"]["message"])) == (None, True)


async def test_one_whose_backend_is_not_there_fails(start_app: StartApp) -> None:
    app = await start_app(upstream={"base_url": "http://127.0.0.1:1/v1"})
    response = await ended(app, (await created(app))["id"])
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")


@both
async def test_one_that_takes_too_long_fails_and_lets_go_of_the_backend(
    start_app: StartApp, backend: Backend, body: Json
) -> None:
    app = await start_app(background={"run_timeout_s": 0.2})
    backend.script(Script([chunk(content="Hel")], end="silent"))
    response = await ended(app, (await created(app, body))["id"])
    message = "The response took longer than 0.2 seconds."
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": message})
    assert await (await backend.received()).is_let_go()


async def test_the_stream_of_one_that_takes_too_long_ends_with_response_failed(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(background={"run_timeout_s": 0.2})
    backend.script(Script([chunk(content="Hel")], end="silent"))
    *_, last = events = await events_of(app)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("garbage", [b"", b"\x00\xff", b"[]", b"{}", b'{"model":1}', b'{"model":"m","nonsense":1}'])
@both
async def test_one_whose_request_cannot_be_read_ends(
    on_store: StartOnStore, backend: Backend, place: Place, body: Json, garbage: bytes
) -> None:
    app = await on_store(workers=0)
    response_id = (await created(app, body))["id"]
    place.asked("UPDATE run SET request = ?", garbage)
    await on_store()
    response = await ended(app, response_id)
    if b"nonsense" not in garbage:
        assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert place.asked("SELECT count(*) FROM run") == [(0,)]


@pytest.mark.parametrize("what", ["run", "rendering", "machine"])
async def test_a_fault_of_this_program_fails_the_response_and_not_the_queue(
    on_store: StartOnStore, backend: Backend, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    app = await on_store(workers=0)
    backend.script(streamed("Hi"))
    response_id = (await created(app, STREAMED_RUN))["id"]

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a secret of the program")

    owner, name = {
        "run": (turns.Turns, "_turn"),
        "rendering": (dispatch, "render"),
        "machine": (ResponseStream, "feed"),
    }[what]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        await on_store()
        response = await ended(app, response_id)
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert "secret" not in response["error"]["message"]
    assert (await ended(app, (await created(app))["id"]))["status"] == "completed"


# -- the client's own key ----------------------------------------------------------------------------------------------

TOKEN = "sk-client-Zq81xW0v"
PASSING = {"auth": {"mode": "passthrough"}}
SEALED_BY, OTHER = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


@pytest.fixture
async def with_token() -> Callable[[App], App]:
    def with_token(app: App) -> App:
        app.http.headers["authorization"] = f"Bearer {TOKEN}"
        return app

    return with_token


@both
async def test_the_clients_key_reaches_the_backend_and_is_nowhere_in_clear(
    on_store: StartOnStore, with_token: Callable[[App], App], backend: Backend, place: Place, body: Json
) -> None:
    app = with_token(await on_store(**PASSING))
    script, goes_on = gated()
    backend.script(script)
    response_id = (await created(app, body))["id"]
    assert (await backend.received()).headers["authorization"] == f"Bearer {TOKEN}"
    ((sealed,),) = place.asked("SELECT bearer FROM run")
    assert (place.holding(TOKEN), place.holding(sealed) != []) == ([], True)
    goes_on.set()
    assert (await ended(app, response_id))["status"] == "completed"
    assert (place.asked("SELECT bearer FROM run"), place.holding(TOKEN)) == ([], [])


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
async def test_the_clients_key_is_erased_at_the_end(
    on_store: StartOnStore, with_token: Callable[[App], App], backend: Backend, place: Place, how: str
) -> None:
    app = with_token(await on_store(**PASSING))
    script, goes_on = gated()
    backend.script(refused(500, "no") if how == "failed" else script)
    response_id = (await created(app))["id"]
    await backend.received()
    if how == "cancelled":
        await cancelled(app, response_id)
    goes_on.set()
    assert (await ended(app, response_id))["status"] == how
    assert place.asked("SELECT count(*) FROM run") == [(0,)]


@pytest.mark.parametrize("keys", [(OTHER,), (OTHER, SEALED_BY)], ids=["changed", "rotated"])
async def test_changed_sealing_keys_fail_what_waits_with_a_clients_key(
    on_store: StartOnStore, with_token: Callable[[App], App], backend: Backend, keys: tuple[str, ...]
) -> None:
    app = with_token(await on_store(workers=0, sealing={"keys": (SEALED_BY,)}, **PASSING))
    response_id = (await created(app))["id"]
    await on_store(sealing={"keys": keys}, **PASSING)
    response = await ended(app, response_id)
    if SEALED_BY in keys:
        assert (response["status"], backend.requests[0].headers["authorization"]) == ("completed", f"Bearer {TOKEN}")
        return
    message = "The client's key cannot be opened any more: the sealing keys have changed."
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": message})
    assert backend.requests == []


# -- the same request twice --------------------------------------------------------------------------------------------


async def test_the_same_request_is_queued_once(app: App, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    first = await created(app, RUN, **KEY)
    await backend.received()
    async with app.post(RUN, headers=KEY) as answer:
        assert ((await answer.json())["id"], answer.headers[REPLAYED]) == (first["id"], "true")
    goes_on.set()
    response = await ended(app, first["id"])
    async with app.post(RUN, headers=KEY) as answer:
        assert (await answer.json(), answer.headers[REPLAYED]) == (response, "true")
    assert len(backend.requests) == 1


async def test_the_same_stream_is_told_twice_during_the_run_and_after_it(app: App, backend: Backend) -> None:
    script, goes_on = gated()
    backend.script(script)
    async with app.post(STREAMED_RUN, headers=KEY) as first:
        blocks = Blocks(first)
        seen = [await blocks.next() for _ in range(6)]
        async with app.post(STREAMED_RUN, headers=KEY) as second:
            assert second.headers[REPLAYED] == "true"
            again = Blocks(second)
            assert [await again.next() for _ in range(6)] == seen
            goes_on.set()
            rest = await blocks.rest()
            assert await again.rest() == rest
    async with app.post(STREAMED_RUN, headers=KEY) as third:
        assert third.headers[REPLAYED] == "true"
        assert await Blocks(third).rest() == joined(seen, rest)
    assert len(backend.requests) == 1


async def test_of_ten_at_once_one_is_queued(app: App, backend: Backend) -> None:
    async def found() -> str | None:
        async with app.post(RUN, headers=KEY) as answer:
            assert answer.status in (200, 409)
            return (await answer.json())["id"] if answer.status == 200 else None

    ids = set(await asyncio.gather(*(found() for _ in range(10)))) - {None}
    (response_id,) = ids
    await ended(app, str(response_id))
    assert len(backend.requests) == 1


@pytest.mark.parametrize("other", [HI, {**RUN, "input": "Ho"}, STREAMED_RUN], ids=["foreground", "input", "stream"])
async def test_a_key_of_a_background_request_is_for_no_other(app: App, other: Json) -> None:
    await created(app, RUN, **KEY)
    async with app.post(other, headers=KEY) as answer:
        error = await error_of(answer, 400)
    assert error["code"] == "idempotency_key_reused"


@both
async def test_a_key_of_a_failed_one_gives_the_failure_again_or_begins_anew(
    app: App, backend: Backend, body: Json
) -> None:
    """It is answered either way, and with a background response."""
    backend.script(refused(500, "no"), streamed("Hi"))
    first = await created(app, body, **KEY)
    await ended(app, first["id"])
    again = await created(app, body, **KEY)
    assert again["background"] is True
    await ended(app, again["id"])


async def test_a_streamed_request_is_answered_again_when_its_events_are_gone(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(background={**QUICK, "stream_retention_s": 0.0})
    backend.script(streamed("Hel", "lo"))
    async with app.post(STREAMED_RUN, headers=KEY) as answer:
        response = events_in(await Blocks(answer).rest())[-1]["response"]

    async def is_forgotten() -> bool:
        async with app.http.get(f"{app.url}/v1/responses/{response['id']}?stream=true") as answer:
            return answer.status == 400

    await until(is_forgotten)
    async with app.post(STREAMED_RUN, headers=KEY) as answer:
        assert answer.status == 200, await answer.text()
        assert events_in(await Blocks(answer).rest())[-1]["response"] == response


# -- a store that fails ------------------------------------------------------------------------------------------------

UNWRITABLE = StoreError("The store of responses is locked by another process.")


async def test_events_that_cannot_be_written_are_written_later(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = controlled("log", monkeypatch)
    script, goes_on = gated()
    backend.script(script)
    writes.failure = UNWRITABLE
    async with app.post(STREAMED_RUN) as answer:
        await writes.once_more("failed", 3)
        writes.failure = None
        await writes.once_more("done")
        goes_on.set()
        events = events_in(await Blocks(answer).rest())
    assert check_run(events)["output"][0]["content"][0]["text"] == "Hello"


async def test_events_that_were_never_written_come_with_the_end(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = controlled("log", monkeypatch)
    backend.script(streamed("Hel", "lo"))
    writes.failure = UNWRITABLE
    assert check_run(await events_of(app))["status"] == "completed"


async def test_events_that_were_written_though_the_store_denied_it_are_told_once(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = 0

    async def write_and_deny(write: Work, *arguments: Any) -> Any:
        nonlocal denied
        written = await write(*arguments)
        denied += 1
        if denied <= 3:
            raise UNWRITABLE.with_traceback(None)
        return written

    replaced("log", write_and_deny, monkeypatch)
    gates = [asyncio.Event() for _ in range(4)]
    steps = [step for number, gate in enumerate(gates) for step in (chunk(content=str(number)), gate)]
    backend.script(Script([*steps, *END]))
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        seen = [await blocks.next() for _ in range(2)]
        for gate in gates:
            seen.append(await blocks.until("event: response.output_text.delta"))
            gate.set()
        rest = await blocks.rest()
    events = events_in(joined(seen[:2], rest))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "0123"
    response_id = events[-1]["response"]["id"]
    async with app.http.get(f"{app.url}/v1/responses/{response_id}?stream=true") as answer:
        assert check_run(events_in(await Blocks(answer).rest())) == events[-1]["response"]
    assert denied >= 3


@both
async def test_an_end_that_cannot_be_kept_is_kept_later(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch, body: Json
) -> None:
    monkeypatch.setattr(event_log, "TRY_AGAIN_S", 0.02)
    settle = controlled("settle", monkeypatch)
    settle.failure = UNWRITABLE
    backend.script(streamed("Hel", "lo"))
    response_id = (await created(app, body))["id"]
    await settle.once_more("failed", 3)
    assert (await got(app, response_id))["status"] == "in_progress"
    settle.failure = None
    response = await ended(app, response_id)
    assert (response["output"][0]["content"][0]["text"], len(backend.requests)) == ("Hello", 1)


async def test_an_end_that_cannot_be_kept_can_be_cancelled(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "TRY_AGAIN_S", 0.02)
    monkeypatch.setattr(turns, "SAVE_S", 0.1)
    settle = controlled("settle", monkeypatch)
    settle.failure = UNWRITABLE
    backend.script(streamed("Hi"))
    response_id = (await created(app))["id"]
    await settle.once_more("failed", 2)
    response = await cancelled(app, response_id)
    settle.failure = None
    assert response["status"] == "cancelled"
    assert await got(app, response_id) == response


async def test_a_store_that_is_locked_for_a_while_loses_no_event(
    on_store: StartOnStore, backend: Backend, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "TRY_AGAIN_S", 0.02)
    app = await on_store(store=place.hasty, background={"lease_s": 60.0})
    writes, settle = controlled("log", monkeypatch), controlled("settle", monkeypatch)
    script, goes_on = gated()
    backend.script(script)
    async with app.post(STREAMED_RUN) as answer:
        blocks = Blocks(answer)
        seen = [await blocks.next() for _ in range(6)]
        with place.locked():
            goes_on.set()
            await settle.once_more("asked", 2)
        rest = await blocks.rest()
    whole = events_in(joined(seen, rest))
    assert (check_run(whole)["status"], writes.asked >= 1) == ("completed", True)


@both
async def test_what_cannot_be_admitted_is_a_503_and_never_runs(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch, body: Json
) -> None:
    admit = controlled("admit", monkeypatch)
    admit.failure = UNWRITABLE
    async with app.post(body) as answer:
        await error_of(answer, 503)
    admit.failure = None
    assert (await ended(app, (await created(app))["id"]))["status"] == "completed"
    assert len(backend.requests) == 1


@pytest.mark.parametrize("verb", ["claim", "held", "renew_runs", "expired", "forget_ended", "version", "states"])
async def test_a_queue_that_cannot_be_looked_after_for_a_while_goes_on(
    on_store: StartOnStore, backend: Backend, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(background, "TRY_AGAIN_S", 0.02)
    looked = controlled(verb, monkeypatch)
    app = await on_store()
    script, goes_on = gated()
    backend.script(script, streamed("Hi"))
    looked.failure = UNWRITABLE
    first = (await created(app, STREAMED_RUN))["id"]
    if verb not in ("states", "held"):  # which are asked for only when another process has written
        await looked.once_more("failed", 2)
    looked.failure = None
    goes_on.set()
    for each in (first, (await created(app))["id"]):
        assert (await ended(app, each))["status"] == "completed"


# -- when the store, the claim or the clock goes wrong in between -----------------------------------------------------


async def test_a_claim_that_is_lost_at_the_end_gives_the_conversation_back(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was saved then, and so nothing has given the lease back yet."""
    asked = asyncio.Event()

    async def lost(settle: Work, *given: Any) -> bool:
        asked.set()
        return False

    replaced("settle", lost, monkeypatch)
    backend.script(streamed("Hi"), plain())
    conversation = await new_conversation(app)
    await created(app, {**RUN, "conversation": conversation})
    async with asyncio.timeout(DEADLINE_S):
        await asked.wait()
    assert (await foreground(app, conversation=conversation))["status"] == "completed"


@pytest.mark.parametrize("verb", ["window_before", "acquire"])
async def test_a_store_that_fails_while_a_run_is_begun_does_not_fail_it(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(event_log, "TRY_AGAIN_S", 0.02)
    backend.script(plain(), streamed("Hi"))
    parent = (await foreground(app))["id"]
    conversation = await new_conversation(app)
    failing = controlled(verb, monkeypatch)
    failing.failure = UNWRITABLE
    continued = {"previous_response_id": parent} if verb == "window_before" else {"conversation": conversation}
    response_id = (await created(app, {**RUN, **continued}))["id"]
    await failing.once_more("failed", 2)
    failing.failure = None
    assert (await ended(app, response_id))["status"] == "completed"


async def test_the_time_that_a_save_takes_is_not_the_runs(
    start_app: StartApp, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "TRY_AGAIN_S", 0.02)
    monkeypatch.setattr(turns, "SAVE_S", 0.01)
    app = await start_app(background={"run_timeout_s": 0.3})
    settle = controlled("settle", monkeypatch)
    settle.failure = UNWRITABLE
    backend.script(streamed("Hi"))
    response_id = (await created(app))["id"]
    await settle.once_more("failed", 30)
    settle.failure = None
    assert (await ended(app, response_id))["status"] == "completed"


class Queue:
    """A queue that carries nothing out, with a clock that the test sets."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.now = 1000.0
        sources = Sources(lambda: self.now, lambda prefix: f"{prefix}_1")
        self.upstreams = Upstreams((UpstreamSettings(base_url="http://127.0.0.1:9/v1"),))
        means = Means(
            self.upstreams,
            Leases(store, sources),
            Seals((bytes(32),)),
            sources,
            Watcher(store),
            Counter(),
            Observer(Metrics()),
        )
        made = Turns(means, TurnSettings(), ReasoningSettings(), CompactionSettings())
        self.background = Background(store, made, means, BackgroundSettings(workers=0))

    async def look(self) -> list[Held]:
        """What the other process holds after one look at the leases."""
        await self.background._renew()
        return await self.store.held("other")


@pytest.fixture
async def queue(kept_in: MemoryPlace | Place) -> AsyncIterator[Queue]:
    store = await kept_in.open()
    queue = Queue(store)
    yield queue
    await queue.upstreams.close()
    await store.close()


def queued(response_id: str) -> NewTurn:
    own = {"id": response_id, "owner": "", "created_at": 1, "completed_at": None, "model": "m"}
    return NewTurn(status="queued", settings=b"{}", body=b"{}", **own)


async def claimed_by_another(queue: Queue) -> list[Held]:
    await queue.store.admit(NewRun(queued("resp_a"), b"{}", queue.now), QueueLimits(9, 9))
    return [run.held for run in await queue.store.claim("other", queue.now + 15, 1)]


async def test_a_jump_of_the_clock_takes_no_run_from_a_process_that_lives(queue: Queue) -> None:
    held = await claimed_by_another(queue)
    queue.now += 3600
    assert await queue.look() == held
    await queue.store.renew_runs("other", queue.now + 15)
    assert [await queue.look(), await queue.look()] == [held, held]


async def test_a_lease_that_has_run_out_at_two_looks_is_ended(queue: Queue) -> None:
    held = await claimed_by_another(queue)
    queue.now += 16
    assert [await queue.look(), await queue.look()] == [held, []]
    assert (await queue.store.queue()).queued == 1
