"""Responses and items as the store is given them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from records import new_items, new_turn
from request import RequestLimits, echo, parse_request
from verbs import NewItem

SHORT = {"type": "compaction", "id": "cmp_1", "encrypted_content": "x"}


def marks(item: NewItem) -> tuple[bool, bool]:
    return item.is_listed, item.is_compaction


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("message", (True, False)),
        ("function_call_output", (True, False)),
        ("reasoning", (False, False)),
        ("compaction", (False, True)),
        ("compaction_trigger", (False, False)),
    ],
)
def test_an_item_is_listed_or_begins_a_window_by_its_type(kind: str, expected: tuple[bool, bool]) -> None:
    item = {"type": kind, "id": "i"}
    (kept,) = new_items([item], begins_window=True)
    assert (kept.id, orjson.loads(kept.body), marks(kept)) == ("i", item, expected)


def test_a_compaction_item_of_a_client_is_not_listed_and_begins_no_window() -> None:
    assert [marks(item) for item in new_items([SHORT])] == [(False, False)]


def test_only_the_output_of_a_response_begins_a_window() -> None:
    request = parse_request({"model": "m", "input": "Hi"}, RequestLimits())
    times = {"created_at": 1, "completed_at": 2}
    said = {"error": None, "incomplete_details": None, "usage": None, "output": [SHORT]}
    response: dict[str, Any] = {"id": "resp_1", "object": "response", "status": "completed", **times, **said}
    turn = new_turn("owner", {**response, **echo(request)}, [SHORT], request)
    assert [marks(item) for item in (*turn.inputs, *turn.outputs)] == [(False, False), (False, True)]
