"""The tables against the unions of the installed `openai` SDK: a type that it knows and nobody here decided fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from openai.types import responses
from openai.types.responses import response_create_params as create

from fields import REQUEST_FIELDS
from items import ITEMS, PARTS
from request import INCLUDABLE, Reasoning, Text, TextFormat, TurnRequest
from tools import CALL_ID_PREFIX, CALL_ITEMS, TOOL_CHOICES, TOOLS, ToolRef, call_item


def members(union: Any) -> Iterator[Any]:
    """The types in a union, whatever it is wrapped in."""
    if get_origin(union) is Annotated:
        yield from members(get_args(union)[0])
    elif get_origin(union) in (Union, type(int | str)):
        for member in get_args(union):
            yield from members(member)
    else:
        yield union


def wire_types(union: Any) -> set[str]:
    """The `type` literals of a union's members; strings and plain literals have none."""
    hints = [get_type_hints(member).get("type") for member in members(union) if hasattr(member, "__annotations__")]
    return {value for hint in hints for literal in members(hint) for value in get_args(literal)}


SENT = get_type_hints(create.ResponseCreateParamsBase).keys() | {"stream"}
# Not OpenAI's: the two penalties are of the Open Responses schema.
OURS = {"presence_penalty", "frequency_penalty"}


@pytest.mark.parametrize(
    ("of_the_sdk", "of_ours"),
    [
        pytest.param(SENT, REQUEST_FIELDS.keys(), id="parameters"),
        pytest.param(wire_types(responses.ResponseInputItemParam), ITEMS.keys(), id="items"),
        pytest.param(wire_types(responses.ResponseInputContentParam), PARTS.keys(), id="parts"),
        pytest.param(
            wire_types(responses.response_output_message_param.Content), PARTS.keys(), id="parts of output messages"
        ),
        pytest.param(wire_types(responses.ToolParam), TOOLS.keys(), id="tools"),
        pytest.param(wire_types(create.ToolChoice), TOOL_CHOICES.keys(), id="tool choices"),
        pytest.param(set(get_args(responses.ResponseIncludable)), set(get_args(INCLUDABLE)), id="values of include"),
        pytest.param(
            get_type_hints(responses.ResponseTextConfigParam).keys(), set(Text.__struct_fields__), id="keys of text"
        ),
        pytest.param(
            wire_types(responses.ResponseFormatTextConfigParam),
            set(get_args(get_type_hints(TextFormat)["type"])),
            id="formats of text",
        ),
        pytest.param(get_type_hints(create.Reasoning).keys(), set(Reasoning.__struct_fields__), id="keys of reasoning"),
    ],
)
def test_every_row_of_the_sdk_is_decided(of_the_sdk: set[str], of_ours: set[str]) -> None:
    undecided = sorted(of_the_sdk - of_ours)
    print("nobody decided:", undecided)
    assert undecided == []


def test_the_walk_of_the_unions_finds_something() -> None:
    assert {"message", "item_reference", "program_output"} <= wire_types(responses.ResponseInputItemParam)
    assert {"function", "web_search_2025_08_26"} <= wire_types(responses.ToolParam)


def test_every_parameter_that_is_neither_the_sdks_nor_left_out_is_ours() -> None:
    assert REQUEST_FIELDS.keys() - SENT == OURS


def test_every_parameter_that_is_used_is_a_field_of_the_request() -> None:
    used = {name for name, field in REQUEST_FIELDS.items() if field.fate != "left out"}
    assert set() == used - set(TurnRequest.__struct_fields__)


OUTPUT_ITEMS = {get_args(c.model_fields["type"].annotation)[0]: c for c in members(responses.ResponseOutputItem)}


@pytest.mark.parametrize(
    ("kind", "arguments", "class_name"),
    [
        ("function", "{}", "ResponseFunctionToolCall"),
        ("custom", '{"input":"x"}', "ResponseCustomToolCall"),
        ("tool_search", '{"query":"q"}', "ResponseToolSearchCall"),
        ("apply_patch", '{"type":"create_file","path":"a","diff":"+b"}', "ResponseApplyPatchToolCall"),
        ("shell", '{"commands":["ls"]}', "ResponseFunctionShellToolCall"),
        ("local_shell", '{"command":["ls"]}', "LocalShellCall"),
    ],
)
def test_every_call_item_is_of_the_sdks_type(kind: str, arguments: str, class_name: str) -> None:
    item = call_item(ToolRef(kind, "look"), arguments)
    found = OUTPUT_ITEMS[item["type"]]
    found.model_validate({"id": "x", "call_id": "c", "status": "completed", "environment": None, **item}, strict=True)
    assert class_name == found.__name__


def test_every_kind_of_call_has_an_id_prefix() -> None:
    made = {call_item(ToolRef(kind, "look"), arguments)["type"] for kind, arguments in (
        ("function", "{}"),
        ("custom", "{}"),
        ("tool_search", "{}"),
        ("apply_patch", '{"type":"delete_file","path":"a"}'),
        ("shell", '{"commands":["ls"]}'),
        ("local_shell", '{"command":["ls"]}'),
    )}  # fmt: skip
    assert (set(CALL_ID_PREFIX), 6) == (made, len(CALL_ITEMS))
