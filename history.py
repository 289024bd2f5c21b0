"""Earlier turns as a request meets them: pure passes over the items of a window and the new input.

May not do I/O. Nothing is invented or reordered here; what is left out is named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from errors import InvalidRequest, NotFound
from items import item_type
from records import OUTPUT_ID_PREFIX
from tools import CALL_ID_PREFIX
from verbs import clipped, repeated

Json = dict[str, Any]

# How a path or a name begins that is about earlier turns.
HISTORY = "history"


def call_id(item: Json) -> str | None:
    """The id that ties a call and its output. Source: LocalShellCallOutput, whose `id` holds it."""
    tied = item.get("call_id")
    if tied is None and item_type(item).startswith("local_shell_call"):
        tied = item.get("id")
    return tied if isinstance(tied, str) else None


def mended(history: list[Json], newest: int, is_finished: bool, new: list[Json]) -> tuple[list[Json], list[str]]:
    """The history without calls that nobody can answer any more, outputs whose call was removed, and repetitions.

    history: oldest first; the newest turn begins at index `newest`. A call of a finished newest turn stays: to leave
    its output out is the client's mistake. The second value names what was left out.
    """
    called = {call_id(item) for item in history if item_type(item) in CALL_ID_PREFIX}
    answered = {call_id(item) for item in [*history, *new] if item_type(item) in OUTPUT_ID_PREFIX}
    seen: set[tuple[bool, str]] = set()
    kept: list[Json] = []
    left_out: list[str] = []
    for index, item in enumerate(history):
        kind, tie = item_type(item), call_id(item)
        is_call, is_output = kind in CALL_ID_PREFIX, kind in OUTPUT_ID_PREFIX
        if tie is None or not (is_call or is_output):
            kept.append(item)
            continue
        is_open = is_call and tie not in answered and not (is_finished and index >= newest)
        if is_open or (is_output and tie not in called) or (is_call, tie) in seen:
            left_out.append(f"{HISTORY}.{kind}={tie}")
        else:
            seen.add((is_call, tie))
            kept.append(item)
    return kept, left_out


def check_ids(items: list[Json], root: str) -> None:
    """Raises: InvalidRequest for an id that is no string, or a reference without one."""
    for index, item in enumerate(items):
        given = item.get("id")
        if not isinstance(given, str | None) or (item_type(item) == "item_reference" and not given):
            path = f"{root}[{index}].id"
            raise InvalidRequest(f"Invalid '{path}': expected a string.", param=path, code="invalid_type")


def refuse_repeated(history: list[Json], new: list[Json]) -> None:
    """Raises: InvalidRequest for an item whose id stands before it already."""
    known = {item.get("id") for item in history}
    for item in new:
        item_id = item.get("id")
        if item_id is None or item_type(item) in OUTPUT_ID_PREFIX:
            continue
        if item_id in known:
            raise repeated(item_id)
        known.add(item_id)


def references(items: list[Json]) -> list[str]:
    """The ids that `item_reference` items name."""
    return [str(item.get("id")) for item in items if item_type(item) == "item_reference"]


def resolved(items: list[Json], found: dict[str, Json]) -> list[Json]:
    """The items with references replaced by what they name. Raises: NotFound."""
    return [_resolved(item, found) if item_type(item) == "item_reference" else item for item in items]


def _resolved(item: Json, found: dict[str, Json]) -> Json:
    item_id = str(item.get("id"))
    if item_id not in found:
        raise NotFound(
            f"Item with id '{clipped(item_id)}' not found. Items are not persisted when `store` is set to false. Try "
            "again with `store` set to true, or remove this item from your input.",
            param="input",
        )
    return found[item_id]


def unsealed(
    items: list[Json], open_seal: Callable[[str | None, str], bytes | None], root: str
) -> tuple[list[Json], list[str]]:
    """Reasoning items with the text that their `encrypted_content` holds, and the names of those of another server."""
    foreign: list[str] = []
    opened: list[Json] = []
    for index, item in enumerate(items):
        blob = item.get("encrypted_content")
        if item.get("type") != "reasoning" or not isinstance(blob, str) or not blob:
            opened.append(item)
            continue
        given = item.get("id")
        payload = open_seal(given if isinstance(given, str) else None, blob)
        if payload is None:
            foreign.append(f"{root}[{index}].encrypted_content")
        opened.append(item if payload is None else {**item, **_thought(payload)})
    return opened, foreign


# Types of items that hold what was sealed here, which is their kind for the seals too.
SEALED_TYPES = ("reasoning", "compaction")


def with_blob_ids(items: list[Json], id_of: Callable[[str, str], str | None]) -> list[Json]:
    """The items; one that came without its id has the one that its `encrypted_content` is bound to.

    id_of: of a kind of items, and a blob.
    """
    return [_with_blob_id(item, id_of) for item in items]


def _with_blob_id(item: Json, id_of: Callable[[str, str], str | None]) -> Json:
    blob, kind = item.get("encrypted_content"), item.get("type")
    if kind not in SEALED_TYPES or item.get("id") or not isinstance(blob, str):
        return item
    found = id_of(kind, blob)
    return {**item, "id": found} if found else item


def sealable(text: str, details: list[Json]) -> bytes:
    """What `encrypted_content` of a reasoning item holds."""
    return orjson.dumps([text, details] if details else [text])


def _thought(payload: bytes) -> Json:
    text, *details = orjson.loads(payload)
    thought: Json = {"content": [{"type": "reasoning_text", "text": text}]}
    return {**thought, "reasoning_details": details[0]} if details else thought
