"""A response as it is kept, and as clients see it again; items and lists as the routes show them.

May not do I/O. What the responses of a chain share is kept apart from what is one response's own.
Source: Response, ResponseItem and ResponseIncludable of the openai SDK 3.52, read 2026-11-20.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec
import orjson

from request import TurnRequest
from tools import CALL_ID_PREFIX
from verbs import Conversation, KeptResponse, Listed, NewItem, NewTurn

Json = dict[str, Any]

# Keys that are one response's own; the others are its settings.
OWN_KEYS = frozenset(
    {"id", "object", "status", "created_at", "completed_at", "output", "previous_response_id"}
    | {"error", "incomplete_details", "usage", "metadata", "conversation"}
)
# Own keys that are kept when they say something.
BODY_KEYS = ("error", "incomplete_details", "metadata", "conversation")


def settings_and_body(response: Json, ignored: tuple[str, ...] = ()) -> tuple[bytes, bytes]:
    """The two parts of a response that are kept beside its items; `ignored` names what was left out of the request."""
    settings = {key: value for key, value in response.items() if key not in OWN_KEYS}
    body = {key: response[key] for key in BODY_KEYS if response.get(key)}
    if response["usage"]:
        body["usage"] = _packed(response["usage"])
    if ignored:
        body["ignored"] = ignored
    return orjson.dumps(settings), orjson.dumps(body)


def restored(kept: KeptResponse) -> Json:
    """The response again, every key of it."""
    body = orjson.loads(kept.body)
    usage = body.pop("usage", None)
    body.pop("ignored", None)
    return {
        "id": kept.id,
        "object": "response",
        "created_at": kept.created_at,
        "completed_at": kept.completed_at,
        "status": kept.status,
        "error": None,
        "incomplete_details": None,
        "conversation": None,
        "metadata": {},
        "previous_response_id": kept.previous_id,
        **orjson.loads(kept.settings),
        **body,
        "usage": _unpacked(usage) if usage else None,
        "output": decoded(kept.outputs),
    }


def ignored_of(kept: KeptResponse) -> tuple[str, ...]:
    """The names of what was left out of the request."""
    return tuple(orjson.loads(kept.body).get("ignored", ()))


def _packed(usage: Json) -> list[int]:
    given, made = usage["input_tokens_details"], usage["output_tokens_details"]
    numbers = (usage["input_tokens"], given["cached_tokens"], given["cache_write_tokens"])
    return [*numbers, usage["output_tokens"], made["reasoning_tokens"], usage["total_tokens"]]


def _unpacked(numbers: list[int]) -> Json:
    input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens, total_tokens = numbers
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": cache_write_tokens},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": total_tokens,
    }


def decoded(items: list[bytes]) -> list[Json]:
    """Kept items as objects, in one go."""
    found: list[Json] = orjson.loads(b"[" + b",".join(items) + b"]")
    return found


# What nothing goes on from: a turn that failed; in a conversation, one that has not ended, too.
DETACHED = {False: ("failed",), True: ("failed", "queued")}


def new_turn(
    owner: str, response: Json, inputs: list[Json], request: TurnRequest, ignored: tuple[str, ...] = ()
) -> NewTurn:
    """What the store is given of a response that is queued or has ended; inputs: its own items, identified."""
    return msgspec.structs.replace(
        bare_turn(owner, response, ignored),
        inputs=new_items(inputs),
        previous_id=request.previous_response_id,
        conversation_id=request.conversation_id,
        is_detached=not request.is_stored or response["status"] in DETACHED[bool(request.conversation)],
    )


def bare_turn(owner: str, response: Json, ignored: tuple[str, ...] = ()) -> NewTurn:
    """What the store is given of a response alone, without what it continues."""
    settings, body = settings_and_body(response, ignored)
    return NewTurn(
        id=response["id"],
        owner=owner,
        status=response["status"],
        created_at=response["created_at"],
        completed_at=response["completed_at"],
        model=response["model"],
        settings=settings,
        body=body,
        outputs=new_items(response["output"], begins_window=True),
        is_detached=True,
        is_brief=not response["store"],
    )


# -- items -------------------------------------------------------------------------------------------------------------

# Types that `input_items` never shows.
UNLISTED = frozenset({"reasoning", "compaction", "compaction_trigger"})
OUTPUT_ID_PREFIX = {
    "function_call_output": "fco",
    "custom_tool_call_output": "ctco",
    "tool_search_output": "tso",
    "apply_patch_call_output": "apco",
    "shell_call_output": "sho",
    "local_shell_call_output": "lsho",
}
ID_PREFIX = {"message": "msg", "reasoning": "rs", "compaction": "cmp", **CALL_ID_PREFIX, **OUTPUT_ID_PREFIX}


def identified(items: list[Json], new_id: Callable[[str], str]) -> list[Json]:
    """The items, each with a type and an id; a client's own id is kept."""
    return [_identified(item, new_id) for item in items]


def _identified(item: Json, new_id: Callable[[str], str]) -> Json:
    kind = item.get("type") or "message"
    given = item.get("id")
    item_id = given if isinstance(given, str) and given else new_id(ID_PREFIX.get(kind, "item"))
    return {**item, "type": kind, "id": item_id}


def new_items(items: list[Json], *, begins_window: bool = False) -> tuple[NewItem, ...]:
    """What the store is given of identified items. No window begins with a client's: what it put before counts."""
    return tuple([_new_item(item, begins_window) for item in items])


def _new_item(item: Json, begins_window: bool) -> NewItem:
    kind = item["type"]
    return NewItem(item["id"], orjson.dumps(item), kind not in UNLISTED, begins_window and kind == "compaction")


# -- as the routes show it ---------------------------------------------------------------------------------------------


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
