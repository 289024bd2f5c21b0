"""The request value: what is refused and how that is said, what is echoed, what is named as unused."""

from __future__ import annotations

from typing import Any

import pytest
from rendering import LIMITS, parsed, refused

from errors import InvalidRequest
from fields import REQUEST_FIELDS
from request import RequestLimits, echo, parse_body, parse_request, refuse_unused

Json = dict[str, Any]

# -- the body ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"temperature":NaN}', "not valid JSON"),
        (b'"text"', "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'{"a":' + b"[" * 128 + b"]" * 128 + b"}", "nested deeper than 128 levels"),
        (b"[" * 5000 + b"]" * 5000, "not valid JSON"),
    ],
)
def test_a_body_that_is_no_flat_enough_json_object_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_body(body, LIMITS)


def test_a_body_of_exactly_the_deepest_nesting_is_taken() -> None:
    body = b'{"a":' + b"[" * 127 + b"]" * 127 + b',"b":[]}'
    assert list(parse_body(body, LIMITS)) == ["a", "b"]


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert len(parse_body(b'{"a":[' + b",".join([b"[]"] * 500) + b"]}", LIMITS)["a"]) == 500


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"model": None}, "missing_required_parameter", "model"),
        ({"model": ""}, "missing_required_parameter", "model"),
        ({"model": 5}, "invalid_type", "model"),
        ({"input": 5}, "invalid_type", "input"),
        ({"input": ["x"]}, "invalid_type", "input[0]"),
        ({"instructions": ["x"]}, "invalid_type", "instructions"),
        ({"max_output_tokens": 15}, "integer_below_min_value", "max_output_tokens"),
        ({"max_output_tokens": "100"}, "invalid_type", "max_output_tokens"),
        ({"max_output_tokens": 1e30}, "invalid_type", "max_output_tokens"),
        ({"max_tool_calls": 0}, "integer_below_min_value", "max_tool_calls"),
        ({"top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"temperature": 3.0}, "decimal_above_max_value", "temperature"),
        ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
        ({"top_p": 1.5}, "decimal_above_max_value", "top_p"),
        ({"presence_penalty": -3}, "decimal_below_min_value", "presence_penalty"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [5]}, "invalid_type", "tools[0]"),
        ({"tool_choice": 5}, "invalid_type", "tool_choice"),
        ({"tool_choice": "invalid_choice"}, "invalid_value", "tool_choice"),
        ({"include": ["everything"]}, "invalid_value", "include[0]"),
        ({"truncation": "middle"}, "invalid_value", "truncation"),
        ({"service_tier": "gold"}, "invalid_value", "service_tier"),
        ({"reasoning": {"effort": "zzz"}}, "invalid_value", "reasoning.effort"),
        ({"reasoning": "high"}, "invalid_type", "reasoning"),
        ({"text": {"verbosity": "loud"}}, "invalid_value", "text.verbosity"),
        ({"text": {"format": {}}}, "missing_required_parameter", "text.format"),
        ({"text": {"format": {"type": "grammar"}}}, "invalid_value", "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "missing_required_parameter",
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "missing_required_parameter", "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a b"}}}, "invalid_value", "text.format.name"),
        ({"prompt_cache_key": "k" * 65}, "string_above_max_length", "prompt_cache_key"),
        ({"safety_identifier": "s" * 129}, "string_above_max_length", "safety_identifier"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata[...]"),
        ({"metadata": {str(n): "" for n in range(17)}}, None, "metadata"),
        ({"metadata": {"k" * 65: ""}}, None, f"metadata.{'k' * 64}"),
        ({"metadata": {"k": "v" * 513}}, None, "metadata.k"),
        ({"stream_options": {"include_obfuscation": False}}, None, "stream_options"),
        ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
        ({"previous_response_id": "chatcmpl-1"}, "invalid_id_prefix", "previous_response_id"),
        ({"previous_response_id": ""}, "invalid_id_prefix", "previous_response_id"),
        ({"conversation": "c1"}, "invalid_id_prefix", "conversation"),
        ({"conversation": {"id": 5}}, "invalid_id_prefix", "conversation"),
        ({"conversation": {}}, "invalid_id_prefix", "conversation"),
    ],
)
def test_a_wrong_parameter_is_a_400_that_names_it(body: Json, code: str | None, param: str) -> None:
    assert (400, code, param) == refused(**body)[:3]


@pytest.mark.parametrize("nothing", ["", [], None])
def test_nothing_to_run_on_is_a_missing_parameter(nothing: Any) -> None:
    status, code, _, message = refused(input=nothing)
    assert (status, code) == (400, "missing_required_parameter")
    assert message == "One of \"input\" or \"previous_response_id\" or 'prompt' or 'conversation_id' must be provided."


def test_both_ways_to_continue_are_named_when_both_are_given() -> None:
    _, code, _, message = refused(previous_response_id="resp_1", conversation="conv_1")
    assert (
        code,
        "previous_response_id" in message,
        "conversation" in message,
    ) == ("mutually_exclusive_parameters", True, True)


def test_a_conversation_of_another_kind_is_told_the_prefix_of_its_ids() -> None:
    assert refused(conversation="abc")[3] == "Invalid 'conversation': 'abc'. Expected an ID that begins with 'conv_'."


@pytest.mark.parametrize("conversation", ["conv_1", {"id": "conv_1"}])
def test_a_conversation_may_be_a_string_or_an_object(conversation: Any) -> None:
    request = parsed(conversation=conversation)
    assert (request.conversation_id, echo(request)["conversation"]) == ("conv_1", {"id": "conv_1"})


@pytest.mark.parametrize(("given", "stored"), [(None, True), (True, True), (False, False)])
def test_a_response_is_stored_unless_the_request_says_no(given: bool | None, stored: bool) -> None:
    request = parsed(store=given)
    assert (request.is_stored, echo(request)["store"]) == (stored, stored)


def test_a_value_that_is_too_small_is_told_the_smallest() -> None:
    assert refused(max_output_tokens=5)[3] == "Invalid 'max_output_tokens': Expected `int` >= 16."


@pytest.mark.parametrize(
    ("limits", "body", "param"),
    [
        (RequestLimits(items=1), {"input": [{"role": "user", "content": "a"}] * 2}, "input"),
        (RequestLimits(tools=1), {"input": "Hi", "tools": [{"type": "shell"}] * 2}, "tools"),
    ],
)
def test_more_than_the_settings_allow_is_refused(limits: RequestLimits, body: Json, param: str) -> None:
    with pytest.raises(InvalidRequest, match="more than 1 elements") as caught:
        parse_request({"model": "m", **body}, limits)
    assert param == caught.value.param


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_null_equals_absence_in_every_parameter() -> None:
    nothing = {name: None for name in REQUEST_FIELDS if name not in ("model", "input")}
    assert parsed() == parsed(**nothing)


def test_a_string_is_one_user_message() -> None:
    assert parsed(input="Hello").items == [{"type": "message", "role": "user", "content": "Hello"}]


@pytest.mark.parametrize(("tokens", "calls"), [(16, 1), (2**53, 2**40)])
def test_the_smallest_and_the_largest_limits_are_taken(tokens: int, calls: int) -> None:
    request = parsed(max_output_tokens=tokens, max_tool_calls=calls)
    assert (tokens, calls) == (request.max_output_tokens, request.max_tool_calls)


def test_metadata_at_its_limits_is_taken() -> None:
    metadata = {f"{number:064}": "v" * 512 for number in range(16)}
    assert metadata == parsed(metadata=metadata).metadata


def test_what_nobody_uses_is_named_sorted_and_with_its_section() -> None:
    unused = parsed(
        zeta=1, client_metadata={}, moderation={}, text={"tone": "dry"}, reasoning={"depth": 3}, stop=None
    ).unused
    assert unused == ("client_metadata", "moderation", "reasoning.depth", "text.tone", "zeta")


def test_a_client_cannot_write_the_list_of_unused_names() -> None:
    assert parsed(unused=["x"]).unused == ("unused",)


def test_strict_settings_refuse_by_the_first_name() -> None:
    error = refuse_unused(("a", "b"))
    assert (error.http_status, error.param, "Unsupported: a, b." in error.message) == (400, "a", True)


# -- the echo ----------------------------------------------------------------------------------------------------------


def test_an_echo_of_the_least_request_has_the_defaults_of_the_schema() -> None:
    assert echo(parsed()) == {
        "background": False,
        "conversation": None,
        "frequency_penalty": 0.0,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": "m",
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "prompt_cache_retention": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "auto",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.5),
        ("instructions", "Be brief."),
        ("max_output_tokens", 100),
        ("max_tool_calls", 3),
        ("metadata", {"a": "b"}),
        ("parallel_tool_calls", False),
        ("presence_penalty", -0.5),
        ("prompt_cache_key", "k"),
        ("prompt_cache_retention", "24h"),
        ("reasoning", {"effort": "low", "summary": "auto"}),
        ("safety_identifier", "s"),
        ("service_tier", "flex"),
        ("temperature", 0.0),
        ("text", {"format": {"type": "json_object"}, "verbosity": "low"}),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": []}),
        ("tools", [{"type": "web_search", "external_web_access": True}]),
        ("top_logprobs", 3),
        ("top_p", 0.0),
        ("truncation", "auto"),
        ("user", "u"),
    ],
)
def test_what_was_asked_is_echoed(name: str, value: Any) -> None:
    assert value == echo(parsed(**{name: value}))[name]


def test_a_function_is_echoed_with_all_three_optional_keys() -> None:
    tool = {"type": "function", "name": "look"}
    assert [{**tool, "description": None, "parameters": None, "strict": None}] == echo(parsed(tools=[tool]))["tools"]


def test_a_schema_is_echoed_whole_and_says_whether_it_is_strict() -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    assert {"format": {**form, "strict": False}} == echo(parsed(text={"format": form}))["text"]


def test_the_old_name_of_the_summary_is_echoed_under_the_new_one() -> None:
    assert echo(parsed(reasoning={"generate_summary": "auto"}))["reasoning"] == {"effort": None, "summary": "auto"}


def test_the_old_spelling_of_a_retention_is_echoed_in_the_sdks() -> None:
    assert echo(parsed(prompt_cache_retention="in-memory"))["prompt_cache_retention"] == "in_memory"
