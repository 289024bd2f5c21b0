"""What a compaction item holds, and the window that it lays out: what it stands for comes again, in fewer tokens.

May not do I/O. A fold that is whole stands for all before it; one that `/responses/compact` gave stands for all but the
user messages, which that route gives beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from errors import InvalidRequest
from items import is_from_user, item_type
from request import TRIGGER
from tools import CALL_ID_PREFIX

Json = dict[str, Any]

# What compaction items are sealed as.
COMPACTION = "compaction"
# The key of an opened item under which its Fold is; nothing that a client sends holds one.
FOLD = "fold"
FOLDING_TYPES = (COMPACTION, TRIGGER)


class Fold(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a compaction item holds. All but `summary` are items as they came, oldest first.

    standing: system and developer messages, tools; users: user messages; late: the newest turns, word for word.
    """

    summary: str = ""
    standing: list[Json] = []
    users: list[Json] = []
    late: list[Json] = []
    is_whole: bool = True


# -- opening -----------------------------------------------------------------------------------------------------------

OpenSeal = Callable[[str | None, str], bytes | None]


def opened(items: list[Json], open_seal: OpenSeal, root: str) -> list[Json]:
    """The items, those of compaction with the fold in them. Raises: InvalidRequest for a blob that is not ours."""
    return [_opened(item, open_seal, f"{root}[{n}]") if _is_compaction(item) else item for n, item in enumerate(items)]


def _is_compaction(item: Json) -> bool:
    return item.get("type") == COMPACTION


def _opened(item: Json, open_seal: OpenSeal, path: str) -> Json:
    given, blob = item.get("id"), item.get("encrypted_content")
    payload = open_seal(given if isinstance(given, str) else None, blob) if isinstance(blob, str) else None
    if payload is None:
        raise InvalidRequest(
            f"Invalid '{path}.encrypted_content': it was changed, belongs to somebody else, or was sealed with a key "
            "that this server does not have.",
            param=f"{path}.encrypted_content",
            code="invalid_compaction_item",
        )
    return {"type": COMPACTION, FOLD: msgspec.json.decode(payload, type=Fold)}


# -- folding -----------------------------------------------------------------------------------------------------------


class Contents(msgspec.Struct, frozen=True):
    """What is in a window: what its newest fold holds, and what came after it.

    `history`: of earlier turns, the newest ones of the fold included; `new`: of the request.
    """

    standing: list[Json] = []
    users: list[Json] = []
    summary: str = ""
    history: list[Json] = []
    new: list[Json] = []

    @property
    def is_folded(self) -> bool:
        return bool(self.users or self.summary)


def folded(history: list[Json], new: list[Json]) -> Contents:
    """The newest fold takes the place of all before it, but for system messages and the user messages it leaves out."""
    if not folds_in(history) and not folds_in(new):
        return Contents(history=history, new=new)
    history, new = _without_triggers(history), _without_triggers(new)
    if found := _newest_fold(new):
        at, fold = found
        return _contents([*history, *new[:at]], fold, [], [*fold.late, *new[at + 1 :]])
    if found := _newest_fold(history):
        at, fold = found
        return _contents(history[:at], fold, [*fold.late, *history[at + 1 :]], new)
    return Contents(history=history, new=new)


def contents_of(fold: Fold) -> Contents:
    """A window with nothing else in it."""
    return Contents(fold.standing, fold.users, fold.summary, fold.late)


def folds_in(items: list[Json]) -> bool:
    """Whether any of them is for compaction."""
    return any(item.get("type") in FOLDING_TYPES for item in items)


def _without_triggers(items: list[Json]) -> list[Json]:
    return [item for item in items if item.get("type") != TRIGGER]


def _newest_fold(items: list[Json]) -> tuple[int, Fold] | None:
    found = ((n, items[n].get(FOLD)) for n in reversed(range(len(items))))
    return next(((n, fold) for n, fold in found if isinstance(fold, Fold)), None)


def _contents(before: list[Json], fold: Fold, history: list[Json], new: list[Json]) -> Contents:
    standing = [item for item in before if is_standing(item)]
    known = {said_by(item) for item in standing}
    standing = [*(item for item in fold.standing if said_by(item) not in known), *standing]
    users = fold.users if fold.is_whole else [*(item for item in before if is_from_user(item)), *fold.users]
    return Contents(standing, users, fold.summary, history, new)


SYSTEM_ROLES = ("system", "developer")
STANDING_TYPES = frozenset({"additional_tools", "configuration_update"})


def is_standing(item: Json) -> bool:
    """Whether it says how to go on, and not what went on."""
    return item.get("role") in SYSTEM_ROLES or item_type(item) in STANDING_TYPES


LABELS = ("id", "status")


def said_by(item: Json) -> bytes:
    """What an item says, however a client labelled it."""
    said = {k: v for k, v in item.items() if k not in LABELS}
    if item_type(item) == "message":
        said = {"role": item.get("role"), "content": [_text_of(part) for part in _parts(item)]}
    return orjson.dumps(said, option=orjson.OPT_SORT_KEYS)


def _text_of(part: Any) -> Any:
    return part.get("text", part) if isinstance(part, dict) else part


# -- laying out --------------------------------------------------------------------------------------------------------

USERS_HEAD = "My earlier messages in this conversation, word for word, oldest first:"
SUMMARY_HEAD = "Everything else that was said and done before, as you recorded it:"
# Chat templates want the two sides to alternate.
ACKNOWLEDGED = {"type": "message", "role": "assistant", "content": "I have read the record and go on from there."}


def laid_out(contents: Contents) -> list[Json]:
    """The items of a window for the model, oldest first."""
    rest = [*contents.history, *contents.new]
    if not contents.is_folded:
        return [*contents.standing, *rest]
    record = record_of(contents.users, contents.summary)
    return [*contents.standing, record, *([ACKNOWLEDGED] if _goes_on_with_user(rest) else ()), *rest]


def _goes_on_with_user(items: list[Json]) -> bool:
    """Whether the first of them that becomes a chat message is not the assistant's."""
    spoken = (item for item in items if item_type(item) in ("message", "mcp_call", *CALL_ID_PREFIX))
    first = next(spoken, None)
    return first is not None and item_type(first) == "message" and first.get("role") != "assistant"


def record_of(users: list[Json], summary: str) -> Json:
    """One user message: what users said, and the summary of the rest."""
    parts: list[Json] = []
    if users:
        parts.append(_text(USERS_HEAD))
    for item in users:
        parts += [_text("<message>"), *_parts(item), _text("</message>")]
    if summary:
        parts.append(_text(f"{SUMMARY_HEAD}\n<record>\n{summary}\n</record>"))
    return {"type": "message", "role": "user", "content": parts}


def _text(text: str) -> Json:
    return {"type": "input_text", "text": text}


def _parts(item: Json) -> list[Json]:
    content = item.get("content")
    if isinstance(content, str):
        return [_text(content)]
    return [part for part in content or () if isinstance(part, dict)]
