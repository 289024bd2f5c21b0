"""The grammar of a Responses event stream, and a machine to be held to it; for unit, wire and property tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, get_args

from openai.types.responses import ResponseStreamEvent

from stream_plan import StreamPlan
from streaming import Event, ResponseStream

Json = dict[str, Any]
UNION, *_ = get_args(ResponseStreamEvent)
SDK_EVENTS = {get_args(each.model_fields["type"].annotation)[0]: each for each in get_args(UNION)}
TERMINAL = {"response.completed": "completed", "response.incomplete": "incomplete", "response.failed": "failed"}

# Delta event -> (where in the event the text part stands, the done event, its text).
DELTAS = {
    "response.output_text.delta": ("content_index", "response.output_text.done", "text"),
    "response.refusal.delta": ("content_index", "response.refusal.done", "refusal"),
    "response.reasoning_text.delta": ("content_index", "response.reasoning_text.done", "text"),
    "response.reasoning_summary_text.delta": ("summary_index", "response.reasoning_summary_text.done", "text"),
    "response.function_call_arguments.delta": (None, "response.function_call_arguments.done", "arguments"),
    "response.custom_tool_call_input.delta": (None, "response.custom_tool_call_input.done", "input"),
}
DONES = {done: (delta, index, text) for delta, (index, done, text) in DELTAS.items()}
PARTS = {
    "response.content_part": ("content_index", "content"),
    "response.reasoning_summary_part": ("summary_index", "summary"),
}


class Grammar:
    """Follows a stream event by event and fails at the first that is out of place."""

    def __init__(self) -> None:
        self.items: list[Json] = []
        self.open: Json | None = None
        self.parts: list[Json] = []
        self.part_is_open = False
        self.text: str | None = None
        self.finished = ""

    def follow(self, event: Event) -> None:
        kind = event["type"]
        if kind.startswith("response.output_item."):
            self.on_item(event)
            return
        assert self.open is not None, f"{kind} outside of an item"
        assert (event["item_id"], event["output_index"]) == (self.open["id"], len(self.items))
        if kind in DELTAS:
            self.on_delta(event, DELTAS[kind][0])
        elif kind in DONES:
            self.on_text_done(event, *DONES[kind])
        elif kind == "response.output_text.annotation.added":
            assert self.part_is_open
        else:
            self.on_part(event)

    def on_item(self, event: Event) -> None:
        item = event["item"]
        assert event["output_index"] == len(self.items)
        if event["type"].endswith(".added"):
            assert self.open is None, "an item begins inside another"
            assert item.get("status") in ("in_progress", None)
            self.open, self.parts, self.finished = item, [], ""
            return
        assert self.open is not None
        assert not self.part_is_open
        same = ("id", "type", "call_id", "name")
        assert [item.get(key) for key in same] == [self.open.get(key) for key in same]
        assert item.get("status") in ("completed", "incomplete", None)
        assert item.get("arguments") != "" or item["status"] == "incomplete", "a whole call without arguments"
        written = self.written(item)
        assert written == (self.parts if isinstance(written, list) else self.finished)
        self.items.append(item)
        self.open = None

    def written(self, item: Json) -> Any:
        """What the item says at its end, in the form in which the events said it."""
        if item["type"] in ("message", "reasoning"):
            return [*item.get("content", ()), *item["summary"]] if item["type"] == "reasoning" else item["content"]
        key = {"function_call": "arguments", "custom_tool_call": "input"}.get(item["type"])
        return item[key] if key else ""

    def on_part(self, event: Event) -> None:
        name, _, what = event["type"].rpartition(".")
        index, _ = PARTS[name]
        if what == "added":
            assert (event[index], self.part_is_open) == (len(self.parts), False)
            assert event["part"].get("text", event["part"].get("refusal")) == ""
            self.part_is_open, self.text = True, None
            self.parts.append(event["part"])
            return
        assert (what, self.part_is_open, event[index]) == ("done", True, len(self.parts) - 1)
        said = event["part"].get("text", event["part"].get("refusal"))
        assert (event["part"]["type"], said) == (self.parts[-1]["type"], self.finished)
        self.parts[-1], self.part_is_open = event["part"], False

    def on_delta(self, event: Event, index: str | None) -> None:
        if index:
            assert self.part_is_open
            assert event[index] == len(self.parts) - 1
        self.text = (self.text or "") + event["delta"]

    def on_text_done(self, event: Event, delta: str, index: str | None, text: str) -> None:
        assert event.get(index or "type") == (len(self.parts) - 1 if index else event["type"])
        assert event[text] == (self.text or "")
        self.text, self.finished = None, event[text]


def check(events: list[Event]) -> Json:
    """Fails unless this is one whole, valid stream; gives the response of its terminal event."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    first, second, *middle, last = events
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert (first["response"]["output"], second["response"]["output"]) == ([], [])
    grammar = Grammar()
    for event in middle:
        grammar.follow(event)
    response: Json = last["response"]
    assert response["status"] == TERMINAL[last["type"]]
    assert response["output"][: len(grammar.items)] == grammar.items
    if last["type"] == "response.failed" and grammar.open is not None:
        (rest,) = response["output"][len(grammar.items) :]
        assert rest["id"] == grammar.open["id"]
    else:
        assert (len(response["output"]), grammar.open) == (len(grammar.items), None)
    assert len({item["id"] for item in response["output"]}) == len(response["output"])
    return response


def parse(events: Iterable[Event]) -> None:
    """Fails unless the official SDK's types take every event, with validation."""
    for event in events:
        SDK_EVENTS[event["type"]].model_validate(event)


# -- a machine ---------------------------------------------------------------------------------------------------------

RESPONSE: Json = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "completed_at": None,
    "status": "in_progress",
    "error": None,
    "incomplete_details": None,
    "usage": None,
    "model": "m",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def machine(**plan: Any) -> ResponseStream:
    numbers = itertools.count(1)
    return ResponseStream(dict(RESPONSE), StreamPlan(**plan), lambda prefix: f"{prefix}_{next(numbers)}", lambda: 2.5)


def relay(chunks: Iterable[Json], **plan: Any) -> list[Event]:
    """All events of an answer, checked against the grammar."""
    stream = machine(**plan)
    events = stream.start()
    for chunk in chunks:
        events = events + stream.feed(chunk)
    events = events + stream.close()
    events = events + stream.finish()
    check(events)
    return events


def output(*chunks: Json, **plan: Any) -> list[Json]:
    """The output items of an answer."""
    items: list[Json] = relay(chunks, **plan)[-1]["response"]["output"]
    return items


def delta(finish_reason: str | None = None, **fields: Any) -> Json:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def message(finish_reason: str | None = "stop", **fields: Any) -> Json:
    return {"choices": [{"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": finish_reason}]}


def without_ids(items: list[Json]) -> list[Json]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]
