"""Items, lists and conversations as the routes show them.

May not do I/O. Source: ResponseItem, ConversationItem and ResponseIncludable of the openai SDK 3.52, read 2026-11-20.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import orjson

from records import OUTPUT_ID_PREFIX, decoded
from tools import CALL_ID_PREFIX
from verbs import Conversation, Listed

Json = dict[str, Any]


def _without(key: str) -> Callable[[Json], Json]:
    return lambda value: {name: inner for name, inner in value.items() if name != key}


def _without_logprobs(part: Json) -> Json:
    return {**part, "logprobs": []} if part.get("logprobs") else part


# What `include` has to ask for -> the type of the item or part that holds it, and the same without it.
INCLUDED: dict[str, tuple[str, Callable[[Json], Json]]] = {
    "reasoning.encrypted_content": ("reasoning", _without("encrypted_content")),
    "message.output_text.logprobs": ("output_text", _without_logprobs),
    "message.input_image.image_url": ("input_image", _without("image_url")),
    "computer_call_output.output.image_url": ("computer_screenshot", _without("image_url")),
}
PARTS_KEYS = ("content", "output")
TEXT_TYPE = {"assistant": "output_text"}


def shown(item: Json, include: Collection[str]) -> Json:
    """An item with what was asked for: heavy fields are left out unless `include` names them."""
    for name, (kind, without) in INCLUDED.items():
        if name in include:
            continue
        if item.get("type") == kind:
            item = without(item)
        for key in PARTS_KEYS:
            item = _with_parts(item, key, kind, without)
    return item


def _with_parts(item: Json, key: str, kind: str, without: Callable[[Json], Json]) -> Json:
    parts = item.get(key)
    if isinstance(parts, dict) and _is(parts, kind):
        return {**item, key: without(parts)}
    if isinstance(parts, list) and any(_is(part, kind) for part in parts):
        return {**item, key: [without(part) if _is(part, kind) else part for part in parts]}
    return item


def _is(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind


# Types whose items have a status in lists, even where clients sent none. Source: ResponseItem, ConversationItem.
WITH_STATUS = frozenset({"message", *CALL_ID_PREFIX, *OUTPUT_ID_PREFIX})


def listed_item(item: Json, include: Collection[str]) -> Json:
    """An item as lists show it: content in parts, and what its type must have."""
    if item["type"] == "message":
        item = {**item, "content": [_listed_part(part) for part in _parts(item)]}
    if item["type"] in WITH_STATUS:
        item = {**item, "status": item.get("status") or "completed"}
    return shown(item, include)


def _listed_part(part: Json) -> Json:
    return {**part, "detail": part.get("detail") or "auto"} if part.get("type") == "input_image" else part


def _parts(item: Json) -> list[Json]:
    content = item.get("content")
    if not isinstance(content, str):
        return content or []
    kind = TEXT_TYPE.get(str(item.get("role")), "input_text")
    empty: Json = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return [{"type": kind, "text": content, **empty}]


def list_object(data: list[Json], has_more: bool) -> Json:
    """A list as the API has it; the ids of an empty one are empty, because clients expect strings."""
    ids = [entry["id"] for entry in data] or [""]
    return {"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}


def item_list(listed: Listed[bytes], include: Collection[str]) -> Json:
    return list_object([listed_item(item, include) for item in decoded(listed.rows)], listed.has_more)


def conversation_object(conversation: Conversation) -> Json:
    """A conversation as the API has it."""
    told = {"id": conversation.id, "object": "conversation", "created_at": conversation.created_at}
    return {**told, "metadata": orjson.loads(conversation.metadata)}
