"""Events as bytes, and bytes cut at a number: for every number, exactly the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frames import after, encode

Event = dict[str, Any]

NASTY = ["", "\n", "\n\n", "\r\n\r\n", "\u2028", "data: x\n\nevent: y", "ü", "😀", "\x00", '"', "\\n\\n"]
texts = st.lists(st.text() | st.sampled_from(NASTY), min_size=1, max_size=8)


def numbered(texts: list[str], first: int) -> list[Event]:
    kinds = ("response.output_text.delta", "response.completed")
    return [
        {"type": kinds[number % 2], "sequence_number": first + number, "delta": text}
        for number, text in enumerate(texts)
    ]


def test_an_event_is_its_name_and_one_line_of_json() -> None:
    event = {"type": "response.queued", "sequence_number": 1, "response": {"id": "a\nb", "output": []}}
    written = b'event: response.queued\ndata: {"type":"response.queued","sequence_number":1,'
    assert encode([event]) == written + b'"response":{"id":"a\\nb","output":[]}}\n\n'


def test_no_events_are_no_bytes() -> None:
    assert encode([]) == b""


@given(texts)
def test_what_is_written_can_be_read_again(texts: list[str]) -> None:
    events = numbered(texts, 0)
    *blocks, end = encode(events).split(b"\n\n")
    assert [json.loads(block.partition(b"\ndata: ")[2]) for block in blocks] == events
    assert ({block.count(b"\n") for block in blocks}, end) == ({1}, b"")


@given(texts, texts)
def test_bytes_of_batches_are_the_bytes_of_all(one: list[str], other: list[str]) -> None:
    events = numbered(one + other, 0)
    assert encode(events[: len(one)]) + encode(events[len(one) :]) == encode(events)


@given(texts, st.integers(0, 1 << 27), st.integers(-3, 12))
def test_behind_a_number_is_exactly_the_rest(texts: list[str], first: int, offset: int) -> None:
    events, number = numbered(texts, first), first + offset
    rest = [event for event in events if event["sequence_number"] > number]
    assert after(number, first, encode(events)) == (encode(rest), first + len(events) - 1)


@pytest.mark.parametrize("number", [-(2**70), -1, 2**63, 2**70])
def test_no_number_is_too_large_or_too_small(number: int) -> None:
    frames = encode(numbered(["a", "b"], 0))
    assert after(number, 0, frames) == (frames if number < 0 else b"", 1)
