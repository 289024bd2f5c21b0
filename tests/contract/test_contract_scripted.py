"""The official SDK against the running proxy, in front of a scripted backend: every shape it parses, strictly."""

from __future__ import annotations

import base64
from typing import Any

import openai
import pytest
from conftest import StartApp
from openai import AsyncOpenAI
from openai.types import responses as types
from pydantic import BaseModel
from scripted import (
    USAGE_CHUNK,
    Backend,
    Script,
    call_delta,
    chunk,
    plain,
    plain_call,
    refused,
    sse,
    streamed,
    streamed_calls,
)
from sdk import REQUIRED_KEYS, assert_response, events_of, types_of

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
NOTE = {"type": "custom", "name": "note", "description": "Takes a note"}
FILES = {"type": "namespace", "name": "mcp__files", "description": "Files", "tools": [{**WEATHER, "name": "read"}]}
PARIS = '{"city":"Paris"}'


class Answer(BaseModel):
    city: str
    degrees: int


# -- plain and streamed ------------------------------------------------------------------------------------------------


async def test_a_plain_response_parses_and_has_every_key(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="m", input="Hi")
    assert response.output_text == "Hello there."
    assert (response.status, response.usage and response.usage.total_tokens) == ("completed", 18)
    assert_response(response.to_dict())


async def test_an_input_of_several_megabytes_reaches_the_backend(client: AsyncOpenAI, backend: Backend) -> None:
    text = "word " * 600_000
    response = await client.responses.create(model="m", input=text)
    assert response.output_text == "Hello there."
    assert backend.requests[-1].body["messages"] == [{"role": "user", "content": text}]


async def test_a_message_item_has_what_clients_need(client: AsyncOpenAI) -> None:
    (item,) = (await client.responses.create(model="m", input="Hi")).to_dict()["output"]
    assert item.pop("id").startswith("msg_")
    text = {"type": "output_text", "text": "Hello there.", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [text]}


async def test_a_streamed_text_has_the_events_in_order(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Hel", "lo"))
    events = await events_of(client, input="Hi")
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[-1].response.output_text == "Hello"


async def test_plain_and_streamed_answers_agree(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain("Hello"), streamed("Hel", "lo"))
    given = (await client.responses.create(model="m", input="Hi")).to_dict()
    completed = (await events_of(client, input="Hi"))[-1].response.to_dict()
    for response in (given, completed):
        for key in ("id", "created_at", "completed_at"):
            response.pop(key)
        response["output"][0].pop("id")
    assert given == completed


async def test_the_stream_helper_gives_the_final_response(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Once", " upon"))
    async with client.responses.stream(model="m", input="Hi") as stream:
        seen = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == "Once upon"
    assert seen.count("response.output_text.delta") == 2


async def test_the_stream_helper_gathers_a_tool_call(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed_calls(call_delta(0, "", "get_weather", "call_1"), call_delta(0, PARIS)))
    async with client.responses.stream(model="m", input="Hi", tools=[WEATHER]) as stream:
        final = await stream.get_final_response()
    assert [(item.type, item.arguments) for item in final.output] == [("function_call", PARIS)]


async def test_parse_gives_the_pydantic_model(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain('{"city":"Paris","degrees":21}'))
    response = await client.responses.parse(model="m", input="Hi", text_format=Answer)
    assert response.output_parsed == Answer(city="Paris", degrees=21)
    sent = (await backend.received()).body["response_format"]
    assert (sent["type"], sent["json_schema"]["name"]) == ("json_schema", "Answer")


async def test_a_streamed_answer_parses_into_the_pydantic_model(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed('{"city":"Paris"', ',"degrees":21}'))
    async with client.responses.stream(model="m", input="Hi", text_format=Answer) as stream:
        final = await stream.get_final_response()
    assert final.output_parsed == Answer(city="Paris", degrees=21)


async def test_a_cut_answer_is_incomplete(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel"), chunk("length"), USAGE_CHUNK, b"data: [DONE]\n\n"]))
    last = (await events_of(client, input="Hi"))[-1]
    assert isinstance(last, types.ResponseIncompleteEvent)
    assert last.response.incomplete_details
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.output[0].status == "incomplete"  # type: ignore[union-attr]


async def test_a_refusal_is_a_refusal_part(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(Script([chunk(refusal="I can"), chunk(refusal="not."), chunk("stop"), b"data: [DONE]\n\n"]))
    events = await events_of(client, input="Hi")
    assert "refusal.delta" in types_of(events)
    assert events[-1].response.to_dict()["output"][0]["content"] == [{"type": "refusal", "refusal": "I cannot."}]


async def test_reasoning_is_an_item_with_a_summary(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(Script([chunk(reasoning_content="Hmm."), chunk(content="Yes"), chunk("stop"), b"data: [DONE]\n\n"]))
    events = await events_of(client, input="Hi", reasoning={"effort": "low"})
    assert "reasoning_summary_text.delta" in types_of(events)
    reasoning, message = events[-1].response.output
    assert isinstance(reasoning, types.ResponseReasoningItem)
    assert (reasoning.summary[0].text, message.content[0].text) == ("Hmm.", "Yes")


async def test_reasoning_can_be_shown_as_text(start_app: StartApp, backend: Backend) -> None:
    client = (await start_app(reasoning={"expose": "text"})).openai
    backend.script(Script([chunk(reasoning_content="Hmm."), chunk(content="Yes"), chunk("stop"), b"data: [DONE]\n\n"]))
    events = await events_of(client, input="Hi")
    assert "reasoning_text.delta" in types_of(events)
    assert events[-1].response.output[0].content[0].text == "Hmm."


async def test_logprobs_come_when_asked_for(client: AsyncOpenAI, backend: Backend) -> None:
    script = streamed("Hi")
    logprob = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
    choice = {"index": 0, "delta": {"content": "Hi"}, "logprobs": {"content": [logprob]}}
    script.steps = [sse({"id": "c", "choices": [choice]}), *script.steps[2:]]
    backend.script(script)
    events = await events_of(client, input="Hi", include=["message.output_text.logprobs"], top_logprobs=2)
    assert events[-1].response.output[0].content[0].logprobs[0].token == "Hi"
    assert (await backend.received()).body["top_logprobs"] == 2


# -- echo --------------------------------------------------------------------------------------------------------------

ECHOED = {
    "instructions": "Be brief.",
    "max_output_tokens": 100,
    "max_tool_calls": 3,
    "metadata": {"k": "v"},
    "parallel_tool_calls": False,
    "prompt_cache_key": "key",
    "safety_identifier": "who",
    "service_tier": "flex",
    "temperature": 0.5,
    "tool_choice": "required",
    "tools": [WEATHER],
    "top_logprobs": 2,
    "top_p": 0.9,
    "truncation": "auto",
    "user": "me",
}


async def test_parameters_are_echoed_in_created_and_completed(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed_calls(call_delta(0, PARIS, "get_weather", "call_1")))
    events = await events_of(
        client, input="Hi", **ECHOED, text={"verbosity": "low"}, reasoning={"effort": "low", "summary": "auto"}
    )
    for response in (events[0].response.to_dict(), events[-1].response.to_dict()):
        assert {key: response[key] for key in ECHOED} == ECHOED
        assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
        assert response["reasoning"] == {"effort": "low", "summary": "auto"}


async def test_what_was_not_given_is_echoed_as_the_default(client: AsyncOpenAI) -> None:
    response = (await client.responses.create(model="m", input="Hi")).to_dict()
    expected = {
        "background": False,
        "error": None,
        "frequency_penalty": 0.0,
        "incomplete_details": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": "m",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
    }
    assert {key: response[key] for key in expected} == expected


async def test_null_equals_absence_for_every_optional_key(client: AsyncOpenAI) -> None:
    optional = REQUIRED_KEYS - {"id", "object", "created_at", "completed_at", "status", "output", "error", "usage"}
    nulls = dict.fromkeys(optional - {"incomplete_details", "model"}, None)
    response = await client.responses.create(model="m", input="Hi", extra_body=nulls)
    assert_response(response.to_dict())


async def test_a_service_tier_of_the_backend_is_echoed(client: AsyncOpenAI, backend: Backend) -> None:
    script = plain("Hi")
    script.steps = [script.steps[0].replace(b'"id": "c1"', b'"service_tier": "priority"')]  # type: ignore[union-attr]
    backend.script(script)
    assert (await client.responses.create(model="m", input="Hi")).service_tier == "priority"


# -- tools -------------------------------------------------------------------------------------------------------------


async def test_a_tool_loop_ends_with_the_answer(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(plain_call("get_weather", PARIS), plain("It is sunny."))
    question: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
    first = await client.responses.create(model="m", input=question, tools=[WEATHER])
    (call,) = first.output
    assert isinstance(call, types.ResponseFunctionToolCall)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    replay = [*question, call.to_dict(), output]
    second = await client.responses.create(model="m", input=replay, tools=[WEATHER])
    assert second.output_text == "It is sunny."
    await backend.received()
    assistant, tool = (await backend.received()).body["messages"][1:]
    assert assistant["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": PARIS}
    assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


async def test_a_streamed_tool_call_has_the_events_in_order(client: AsyncOpenAI, backend: Backend) -> None:
    deltas = [call_delta(0, "", "get_weather", "call_1"), call_delta(0, '{"city":'), call_delta(0, '"Paris"}')]
    backend.script(streamed_calls(*deltas))
    events = await events_of(client, input="Hi", tools=[WEATHER])
    assert types_of(events)[2:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    (call,) = events[-1].response.to_dict()["output"]
    assert call.pop("id").startswith("fc_")
    assert call == {
        "type": "function_call",
        "call_id": "call_1",
        "name": "get_weather",
        "arguments": PARIS,
        "status": "completed",
    }


async def test_parallel_calls_are_items_one_after_another(client: AsyncOpenAI, backend: Backend) -> None:
    first, second = call_delta(0, "", "get_weather", "call_1"), call_delta(1, "", "get_weather", "call_2")
    backend.script(streamed_calls(first, second, call_delta(0, PARIS), call_delta(1, '{"city":"Rome"}')))
    events = await events_of(client, input="Hi", tools=[WEATHER])
    added_and_done = [(event.type, event.output_index) for event in events if "output_item" in event.type]
    assert added_and_done == [
        ("response.output_item.added", 0),
        ("response.output_item.done", 0),
        ("response.output_item.added", 1),
        ("response.output_item.done", 1),
    ]
    calls = [(item.call_id, item.arguments) for item in events[-1].response.output]
    assert calls == [("call_1", PARIS), ("call_2", '{"city":"Rome"}')]


async def test_only_one_call_is_kept_when_parallel_calls_are_off(client: AsyncOpenAI, backend: Backend) -> None:
    calls = [call_delta(index, PARIS, "get_weather", f"call_{index}") for index in (0, 1)]
    backend.script(streamed_calls(*calls))
    events = await events_of(client, input="Hi", tools=[WEATHER], parallel_tool_calls=False)
    assert [item.call_id for item in events[-1].response.output] == ["call_0"]


async def test_a_custom_tool_call_comes_back_as_custom(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed_calls(call_delta(0, '{"input":"buy milk"}', "note", "call_1")))
    events = await events_of(client, input="Hi", tools=[NOTE])
    assert "custom_tool_call_input.done" in types_of(events)
    (call,) = events[-1].response.output
    assert isinstance(call, types.ResponseCustomToolCall)
    assert (call.name, call.input) == ("note", "buy milk")


async def test_a_custom_tool_call_and_its_output_go_back_to_the_backend(client: AsyncOpenAI, backend: Backend) -> None:
    call = {"type": "custom_tool_call", "call_id": "call_1", "name": "note", "input": "buy milk"}
    output = {"type": "custom_tool_call_output", "call_id": "call_1", "output": "noted"}
    await client.responses.create(model="m", input=[{"role": "user", "content": "Hi"}, call, output], tools=[NOTE])
    assistant, tool = (await backend.received()).body["messages"][1:]
    assert assistant["tool_calls"][0]["function"] == {"name": "note", "arguments": '{"input":"buy milk"}'}
    assert (tool["role"], tool["content"]) == ("tool", "noted")


async def test_a_call_of_a_namespace_comes_back_with_it(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed_calls(call_delta(0, PARIS, "mcp__files__read", "call_1")))
    (call,) = (await events_of(client, input="Hi", tools=[FILES]))[-1].response.output
    assert (call.type, call.name, call.namespace) == ("function_call", "read", "mcp__files")
    (tool,) = (await backend.received()).body["tools"]
    assert tool["function"]["name"] == "mcp__files__read"


async def test_a_tool_that_nobody_declared_is_still_a_call(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed_calls(call_delta(0, "{}", "invented", "call_1")))
    (call,) = (await events_of(client, input="Hi", tools=[WEATHER]))[-1].response.output
    assert (call.type, call.name, call.arguments) == ("function_call", "invented", "{}")


# -- images and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["https://example.com/cat.png", "data:image/png;base64,iVBORw0KGgo="])
async def test_an_image_reaches_the_backend_as_image_url(client: AsyncOpenAI, backend: Backend, url: str) -> None:
    parts = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": url, "detail": "low"}]
    await client.responses.create(model="m", input=[{"role": "user", "content": parts}])
    (message,) = (await backend.received()).body["messages"]
    assert message["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
    ]


async def test_a_file_reaches_the_backend_as_its_text(client: AsyncOpenAI, backend: Backend) -> None:
    data = f"data:text/plain;base64,{base64.b64encode(b'the text').decode()}"
    part = {"type": "input_file", "filename": "a.txt", "file_data": data}
    await client.responses.create(model="m", input=[{"role": "user", "content": [part]}])
    (message,) = (await backend.received()).body["messages"]
    assert "the text" in message["content"]


async def test_instructions_lead_as_the_system_message(client: AsyncOpenAI, backend: Backend) -> None:
    items: list[Any] = [{"role": "developer", "content": "And kind."}, {"role": "user", "content": "Hi"}]
    await client.responses.create(model="m", instructions="Be brief.", input=items)
    assert (await backend.received()).body["messages"] == [
        {"role": "system", "content": "Be brief.\n\nAnd kind."},
        {"role": "user", "content": "Hi"},
    ]


# -- errors and headers ------------------------------------------------------------------------------------------------


async def test_a_wrong_parameter_is_a_bad_request_that_names_it(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="m", input="Hi", max_output_tokens=3)
    assert caught.value.param == "max_output_tokens"
    assert caught.value.code == "integer_below_min_value"


async def test_a_wrong_content_part_is_named_by_its_path(client: AsyncOpenAI) -> None:
    bad: list[Any] = [{"role": "user", "content": [{"type": "hologram"}]}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="m", input=bad)
    assert caught.value.param == "input[0].content[0].type"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "error_class"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
    ],
)
async def test_a_refusal_of_the_backend_is_its_exception(
    client: AsyncOpenAI, backend: Backend, status: int, error_class: type[openai.APIStatusError], stream: bool
) -> None:
    backend.script(refused(status, "Not today"))
    with pytest.raises(error_class, match="Not today"):
        await client.responses.create(model="m", input="Hi", stream=stream)


async def test_an_unreachable_backend_is_a_502(start_app: StartApp) -> None:
    client = (await start_app(upstream={"base_url": "http://127.0.0.1:1/v1"})).openai
    with pytest.raises(openai.APIStatusError) as caught:
        await client.responses.create(model="m", input="Hi")
    assert caught.value.status_code == 502
    assert "127.0.0.1:1" in str(caught.value)


async def test_a_full_window_has_the_code_that_clients_know(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(refused(400, "This model's maximum context length is 2048 tokens.", code=400))
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="m", input="Hi")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


async def test_an_unknown_previous_response_is_a_bad_request_that_names_it(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="m", input="Hi", previous_response_id="resp_1")
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


async def test_headers_tell_the_request_id_and_what_was_ignored(client: AsyncOpenAI) -> None:
    raw = await client.responses.with_raw_response.create(
        model="m", input="Hi", tools=[{"type": "web_search"}], extra_body={"seed": 7}
    )
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["x-responses-proxy-ignored"] == "seed, tools[0].type=web_search"
    assert raw.parse()._request_id == raw.headers["x-request-id"]


async def test_a_stream_has_the_same_headers(client: AsyncOpenAI, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    creating = client.responses.with_streaming_response.create(
        model="m", input="Hi", stream=True, extra_body={"seed": 7}
    )
    async with creating as raw:
        assert raw.headers["x-request-id"].startswith("req_")
        assert raw.headers["x-responses-proxy-ignored"] == "seed"
        assert raw.headers["content-type"].startswith("text/event-stream")
