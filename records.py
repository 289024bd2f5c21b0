"""A response as it is kept, and as clients see it again.

May not do I/O. What the responses of a chain share is kept apart from what is one response's own.
Source: Response, ResponseItem and ResponseIncludable of the openai SDK 3.52, read 2026-11-20.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from request import TRIGGER, TurnRequest
from tools import CALL_ID_PREFIX
from verbs import KeptResponse, NewItem, NewTurn

Json = dict[str, Any]

# Keys that are one response's own; the others are its settings.
OWN_KEYS = frozenset(
    {"id", "object", "status", "created_at", "completed_at", "output", "previous_response_id"}
    | {"error", "incomplete_details", "usage", "metadata", "conversation"}
)
# Own keys that are kept when they say something.
BODY_KEYS = ("error", "incomplete_details", "metadata", "conversation")


class Notes(msgspec.Struct, frozen=True):
    """What is kept beside a response.

    `ignored` names what was left out of its request; `window_tokens`: of the window with the answer, where the usage
    does not tell; 0: nobody knows. `window_items`: how many that are, where some may be taken out later.
    """

    ignored: tuple[str, ...] = ()
    window_tokens: int | None = None
    window_items: int | None = None


NO_NOTES = Notes()


def settings_and_body(response: Json, notes: Notes = NO_NOTES) -> tuple[bytes, bytes]:
    """The two parts of a response that are kept beside its items."""
    settings = {key: value for key, value in response.items() if key not in OWN_KEYS}
    body = {key: response[key] for key in BODY_KEYS if response.get(key)}
    if response["usage"]:
        body["usage"] = _packed(response["usage"])
    if notes.ignored:
        body["ignored"] = notes.ignored
    for name in ("window_tokens", "window_items"):
        if (number := getattr(notes, name)) is not None:
            body[name] = number
    return orjson.dumps(settings), orjson.dumps(body)


def restored(kept: KeptResponse) -> Json:
    """The response again, every key of it."""
    body = orjson.loads(kept.body)
    usage = body.pop("usage", None)
    for note in Notes.__struct_fields__:
        body.pop(note, None)
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


def counted_tokens(body: bytes, items: int | None = None) -> int | None:
    """Of the window that ends with a response, as the backend counted them; None where it did not.

    body: as it was kept; items: how many are in the window, where some may have been taken out since.
    """
    kept = orjson.loads(body) if body else {}
    if items is not None and kept.get("window_items", items) != items:
        return None
    tokens: int | None = kept.get("window_tokens")
    if tokens is None and "usage" in kept:
        tokens = kept["usage"][-1]
    return tokens or None


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


def new_turn(owner: str, response: Json, inputs: list[Json], request: TurnRequest, notes: Notes = NO_NOTES) -> NewTurn:
    """What the store is given of a response that is queued or has ended; inputs: its own items, identified."""
    return msgspec.structs.replace(
        bare_turn(owner, response, notes),
        inputs=new_items(inputs),
        previous_id=request.previous_response_id,
        conversation_id=request.conversation_id,
        is_detached=not request.is_stored or response["status"] in DETACHED[bool(request.conversation)],
    )


def bare_turn(owner: str, response: Json, notes: Notes = NO_NOTES) -> NewTurn:
    """What the store is given of a response alone, without what it continues."""
    settings, body = settings_and_body(response, notes)
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
UNLISTED = frozenset({"reasoning", "compaction", TRIGGER})
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
    is_compaction = begins_window and kind == "compaction"
    return NewItem(item["id"], orjson.dumps(item), kind not in UNLISTED, is_compaction, kind == TRIGGER)
