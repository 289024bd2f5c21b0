"""The events of a response that has ended, made again from the response itself.

May not know how the response came about: the events are those of `streaming`, with one delta for each text.
Source: ResponseStreamEvent of the openai SDK 3.52.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Event = dict[str, Any]
# The kind of an event without `response.`, and what it says.
Said = tuple[str, Json]
# How an item or part begins, and what is said of it until its end.
Told = tuple[Json, list[Said]]

# Status of the response -> its last event. There is no event of its own for a cancelled one.
TERMINAL = {"completed": "completed", "incomplete": "incomplete", "failed": "failed", "cancelled": "incomplete"}
# What a reasoning item has at its end only.
LATE_IN_REASONING = frozenset({"content", "encrypted_content", "reasoning_details"})


def replayed(response: Json) -> list[Event]:
    """Its whole event stream. Raises: KeyError for a response that has not ended."""
    said = [(name, {"response": _begun(response)}) for name in ("created", "in_progress")]
    for index, item in enumerate(response["output"]):
        said += _item(index, item)
    events = [{"type": f"response.{kind}", "sequence_number": n, **body} for n, (kind, body) in enumerate(said)]
    return [*events, terminal(response, len(events))]


def terminal(response: Json, number: int) -> Event:
    """The last event of a stream. Raises: KeyError for a response that has not ended."""
    return {"type": f"response.{TERMINAL[response['status']]}", "sequence_number": number, "response": response}


def _begun(response: Json) -> Json:
    unknown = dict.fromkeys(("completed_at", "usage", "error", "incomplete_details"))
    return {**response, "status": "in_progress", "output": [], **unknown}


# -- parts -------------------------------------------------------------------------------------------------------------


def _output_text(part: Json) -> Told:
    text, annotations, logprobs = part["text"], part.get("annotations") or [], part.get("logprobs") or []
    said: list[Said] = [("output_text.delta", {"delta": text, "logprobs": logprobs})] if text else []
    for index, annotation in enumerate(annotations):
        said.append(("output_text.annotation.added", {"annotation_index": index, "annotation": annotation}))
    said.append(("output_text.done", {"text": text, "logprobs": logprobs}))
    return {**part, "text": "", "annotations": [], "logprobs": []}, said


def _refusal(part: Json) -> Told:
    return {**part, "refusal": ""}, _text("refusal", "refusal", part["refusal"])


def _reasoning_text(part: Json) -> Told:
    return {**part, "text": ""}, _text("reasoning_text", "text", part["text"])


def _summary_text(part: Json) -> Told:
    return {**part, "text": ""}, _text("reasoning_summary_text", "text", part["text"])


def _text(kind: str, key: str, text: str) -> list[Said]:
    """Nothing written is no delta."""
    deltas: list[Said] = [(f"{kind}.delta", {"delta": text})] if text else []
    return [*deltas, (f"{kind}.done", {key: text})]


def _as_it_is(whole: Json) -> Told:
    return whole, []


# Type of a content or summary part -> its function.
PARTS: dict[str, Callable[[Json], Told]] = {
    "output_text": _output_text,
    "refusal": _refusal,
    "reasoning_text": _reasoning_text,
    "summary_text": _summary_text,
}


def _parts(name: str, index_key: str, parts: list[Json]) -> list[Said]:
    said: list[Said] = []
    for index, part in enumerate(parts):
        begun, within = PARTS.get(part["type"], _as_it_is)(part)
        whole = [(f"{name}.added", {"part": begun}), *within, (f"{name}.done", {"part": part})]
        said += [(kind, {index_key: index, **body}) for kind, body in whole]
    return said


# -- items -------------------------------------------------------------------------------------------------------------


def _message(item: Json) -> Told:
    return {**item, "content": []}, _parts("content_part", "content_index", item["content"])


def _reasoning(item: Json) -> Told:
    begun = {key: value for key, value in item.items() if key not in LATE_IN_REASONING}
    said = _parts("reasoning_summary_part", "summary_index", item["summary"])
    said += _parts("content_part", "content_index", item.get("content") or [])
    return {**begun, "summary": []}, said


def _function_call(item: Json) -> Told:
    said = _text("function_call_arguments", "arguments", item["arguments"])
    said[-1][1]["name"] = item["name"]
    return {**item, "arguments": ""}, said


def _custom_tool_call(item: Json) -> Told:
    """An empty input is a delta too, as in a live stream."""
    said: list[Said] = [("custom_tool_call_input.delta", {"delta": item["input"]})]
    return {**item, "input": ""}, [*said, ("custom_tool_call_input.done", {"input": item["input"]})]


# Item type -> its function; the other types are told whole.
ITEMS: dict[str, Callable[[Json], Told]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
    "custom_tool_call": _custom_tool_call,
}


def _item(index: int, item: Json) -> list[Said]:
    begun, within = ITEMS.get(item["type"], _as_it_is)(item)
    status = {"status": "in_progress"} if item.get("status") else {}
    added = ("output_item.added", {"output_index": index, "item": begun | status})
    about = {"item_id": item["id"], "output_index": index}
    done = ("output_item.done", {"output_index": index, "item": item})
    return [added, *((kind, {**about, **body}) for kind, body in within), done]
