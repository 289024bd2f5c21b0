"""When a window is too full, what of it stays as it is, and what a summary has to hold.

May not do I/O: what counts tokens is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from folding import ACKNOWLEDGED, Contents, Fold, is_standing, record_of, said_by
from history import call_id
from items import is_from_user, item_type
from records import OUTPUT_ID_PREFIX
from request import TurnRequest
from tools import CALL_ID_PREFIX

Json = dict[str, Any]
TokensOf = Callable[[Json], float]
Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class CompactionSettings:
    """The section `[compaction]`."""

    threshold_tokens: int = 0
    threshold_fraction: Fraction = 0.0
    target: Annotated[float, msgspec.Meta(ge=0.1, le=0.9)] = 0.5
    on_overflow: bool = True
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 900.0
    ahead: bool = False
    model: str = ""
    prompt: str = ""
    summary_tokens: Annotated[int, msgspec.Meta(ge=64)] = 2000
    user_tokens: int = 20_000
    vocabulary: Literal["o200k_base", "cl100k_base", "off"] = "o200k_base"


# -- when --------------------------------------------------------------------------------------------------------------

# Of the window, where a client leaves the threshold to us and the settings name none.
DEFAULT_FRACTION = 0.8


def threshold_of(request: TurnRequest, settings: CompactionSettings, window_tokens: int | None) -> int | None:
    """The tokens from which on a window is compacted; None: not before the backend refuses it."""
    asked = request.context_management or ()
    given = [entry.compact_threshold for entry in asked if entry.compact_threshold]
    if given:
        return min(given)
    fraction = settings.threshold_fraction or (DEFAULT_FRACTION if asked and not settings.threshold_tokens else 0)
    by_fraction = [int(fraction * window_tokens)] if fraction and window_tokens else []
    return min([*by_fraction, *([settings.threshold_tokens] if settings.threshold_tokens else [])], default=None)


# -- what stays --------------------------------------------------------------------------------------------------------

# Parts of the room: of the summary, of system messages, of the newest turns.
SUMMARY_PART, STANDING_PART, LATE_PART = 0.25, 0.3, 0.4
# Part of a summary's length that user messages leave free beside it: models count badly.
SLACK_PART = 0.4
# What the pictures and files in a fold may take; a fold is sealed, kept, and sent to clients and back.
DATA_BYTES = 4 * 1024 * 1024
DATA_KEYS = ("image_url", "file_data")
# Less than this is not worth keeping of a text.
SMALLEST_CUT_TOKENS = 32


class Room(NamedTuple):
    """Tokens for the items of a window once it is compacted: for all, and for kinds of them."""

    all: float
    summary: float
    standing: float
    late: float
    users: float


def room_for(tokens: float, settings: CompactionSettings, *, is_asked: bool) -> Room:
    """`is_asked`: a client wants it now: then only calls that wait for their output stay beside user messages."""
    summary = min(float(settings.summary_tokens), tokens * SUMMARY_PART)
    late = 0.0 if is_asked else tokens * LATE_PART
    return Room(tokens, summary, tokens * STANDING_PART, late, float(settings.user_tokens))


class Plan(msgspec.Struct, frozen=True):
    """A window as it is to be: what stays as it is, what a summary has to hold, and how long that may be.

    `lost`: oldest first; `earlier`: the summary so far, which is told again with what is lost; `summary_tokens`: what
    is asked for; `most_tokens`: what there is room for.
    """

    standing: list[Json]
    users: list[Json]
    late: list[Json]
    earlier: str
    lost: list[Json]
    summary_tokens: float
    most_tokens: float

    def fold(self, summary: str) -> Fold:
        kept = _light([*self.users, *map(_unsealed, self.late)])
        return Fold(summary, self.standing, kept[: len(self.users)], kept[len(self.users) :])


def _unsealed(item: Json) -> Json:
    """Reasoning whose text is here needs no blob of its own beside it."""
    return {k: v for k, v in item.items() if k != "encrypted_content"} if item.get("content") else item


def _light(items: list[Json]) -> list[Json]:
    """With words for the oldest pictures and files where all together are too much to be sealed and sent about.

    Those of the newest item stay: that one is being answered.
    """
    light: list[Json] = []
    left = DATA_BYTES
    for item in reversed(items):
        left -= sum(map(_data_chars, _parts_of(item)))
        light.append(item if left >= 0 or not light else bare_of(item))
    return light[::-1]


class _Choice(NamedTuple):
    """What stays, and the originals of what was dropped or cut."""

    kept: list[Json]
    lost: list[Json]


def planned(contents: Contents, room: Room, tokens_of: TokensOf) -> Plan:
    """What it keeps, and a summary of its length, come to no more than the room; calls stay with their outputs."""
    rest = [*contents.history, *contents.new]
    standing = _standing([*contents.standing, *filter(is_standing, rest)], room.standing, tokens_of)
    words = _Words(tokens_of)
    left = room.all - room.summary - words.record_tokens - sum(map(tokens_of, standing.kept))
    groups = grouped([item for item in rest if not is_standing(item)])
    early, late = _parted(groups, min(room.late, max(left, 0.0)), tokens_of)
    said = [*contents.users, *filter(is_from_user, early)]
    left -= sum(map(tokens_of, late.kept))
    users = _users(
        said,
        min(room.users, left - room.summary * SLACK_PART),
        lambda item: tokens_of(item) + words.message_tokens,
    )
    left -= sum(tokens_of(item) + words.message_tokens for item in users.kept)
    gone = {id(item) for item in users.lost}
    dropped = [item for item in contents.users if id(item) in gone]
    is_lost = any(not is_from_user(item) or id(item) in gone for item in early)
    earlier = record_of([], contents.summary)
    is_long = tokens_of(earlier) > room.summary + words.record_tokens
    lost = [*standing.lost, *([earlier] if is_long else ()), *dropped, *(early if is_lost else ()), *late.lost]
    spare = min(max(left, 0.0), room.summary)
    kept = (standing.kept, users.kept, late.kept)
    return Plan(*kept, "" if is_long else contents.summary, lost, room.summary, room.summary + spare)


class _Words:
    """What the words around a record, and around each message in it, take."""

    def __init__(self, tokens_of: TokensOf) -> None:
        message = {"role": "user", "content": ""}
        record_tokens = tokens_of(record_of([message], "-"))
        self.message_tokens = tokens_of(record_of([message, message], "-")) - record_tokens
        self.record_tokens = record_tokens + tokens_of(ACKNOWLEDGED)


def grouped(items: list[Json]) -> list[list[Json]]:
    """The smallest parts that may be parted: calls with their outputs, reasoning with what it led to."""
    answered = {call_id(item) for item in items if item_type(item) in OUTPUT_ID_PREFIX}
    waiting: set[str | None] = set()
    groups: list[list[Json]] = [[]]
    for item in items:
        groups[-1].append(item)
        kind, tie = item_type(item), call_id(item)
        if kind in CALL_ID_PREFIX and tie in answered:
            waiting.add(tie)
        elif kind in OUTPUT_ID_PREFIX:
            waiting.discard(tie)
        if not waiting and kind != "reasoning":
            groups.append([])
    return groups if groups[-1] else groups[:-1]


def _parted(groups: list[list[Json]], tokens: float, tokens_of: TokensOf) -> tuple[list[Json], _Choice]:
    """What is early, and the newest groups that fit; of the very newest one, what fits of it.

    A call that waits for its output is never early: the output will come.
    """
    answered = {call_id(item) for group in groups for item in group if item_type(item) in OUTPUT_ID_PREFIX}
    sizes = accumulate(sum(map(tokens_of, group)) for group in reversed(groups))
    start = len(groups) - sum(1 for size in sizes if size <= tokens)
    newest = _cut_group(groups[-1], tokens, tokens_of) if start == len(groups) > 0 else _Choice([], [])
    waiting = {id(item) for group in groups[:start] for item in _waiting(group, answered)}
    before = chain.from_iterable(groups[: start - bool(newest.kept)])
    early, kept = _split(before, lambda item: id(item) not in waiting)
    return early, _Choice([*kept, *newest.kept, *chain.from_iterable(groups[start:])], newest.lost)


def _split(items: Iterable[Json], is_first: Callable[[Json], bool]) -> tuple[list[Json], list[Json]]:
    parts: tuple[list[Json], list[Json]] = ([], [])
    for item in items:
        parts[not is_first(item)].append(item)
    return parts


def _waiting(group: list[Json], answered: set[str | None]) -> list[Json]:
    """The calls that wait for their output, and the reasoning that led to them."""
    waits = [item_type(item) in CALL_ID_PREFIX and call_id(item) not in answered for item in group]
    last = max((at for at, is_waiting in enumerate(waits) if is_waiting), default=-1)
    return [item for at, item in enumerate(group[: last + 1]) if waits[at] or item_type(item) == "reasoning"]


def _cut_group(group: list[Json], tokens: float, tokens_of: TokensOf) -> _Choice:
    """Its calls stay whole, or nothing of it stays."""
    whole, others = _split(group, lambda item: item_type(item) in (*CALL_ID_PREFIX, "reasoning"))
    share = (tokens - sum(map(tokens_of, whole))) / max(1, len(others))
    cuts = {id(item): cut(item, share, tokens_of) for item in others}
    if share < 0 or not others or None in cuts.values():
        return _Choice([], [])
    return _Choice([cuts.get(id(item)) or item for item in group], group)


def _standing(items: list[Json], tokens: float, tokens_of: TokensOf) -> _Choice:
    """The last of equal ones. Tools stay; of messages that are too long, each gives the same part."""
    last = {said_by(item): index for index, item in enumerate(items)}
    items = [items[index] for index in sorted(last.values())]
    messages = [item for item in items if item_type(item) == "message"]
    size = sum(map(tokens_of, messages))
    if size <= tokens:
        return _Choice(items, [])
    cuts = {id(item): cut(item, tokens_of(item) * tokens / size, tokens_of) for item in messages}
    return _Choice([found for item in items if (found := cuts.get(id(item), item))], messages)


def _users(messages: list[Json], tokens: float, tokens_of: TokensOf) -> _Choice:
    """The newest that fit, in their order; of the newest of all, what fits of it."""
    kept: list[Json] = []
    lost: list[Json] = []
    for item in reversed(messages):
        found = item if tokens_of(item) <= tokens else None if kept else cut(item, tokens, tokens_of)
        if found is not None:
            kept.append(found)
            tokens -= tokens_of(found)
        if found is not item:
            lost.append(item)
    return _Choice(kept[::-1], lost)


def truncated(contents: Contents, tokens: float, tokens_of: TokensOf) -> Contents:
    """The contents without the oldest turns, so that the others fit; the newest turn stays whatever its length."""
    history, new = ([item for item in part if not is_standing(item)] for part in (contents.history, contents.new))
    standing = [*contents.standing, *filter(is_standing, [*contents.history, *contents.new])]
    turns = in_turns(history, new)
    left = tokens - sum(map(tokens_of, standing))
    sizes = accumulate(sum(map(tokens_of, turn)) for turn in reversed(turns))
    fitting = sum(1 for size in sizes if size <= left)
    most = len(turns) if contents.is_folded else len(turns) - 1
    kept = [item for turn in turns[len(turns) - max(1, min(fitting, most)) :] for item in turn]
    start = max(0, len(kept) - len(new))
    return Contents(standing, history=kept[:start], new=kept[start:])


def in_turns(history: list[Json], new: list[Json]) -> list[list[Json]]:
    """The items of a window by turns: each begins with a user message, and no call is parted from its output."""
    turns: list[list[Json]] = []
    for group in grouped([*history, *new]):
        if not turns or any(map(is_from_user, group)):
            turns.append([])
        turns[-1] += group
    return turns


# -- cutting -----------------------------------------------------------------------------------------------------------

PLACEHOLDERS = {
    "input_image": "[image]",
    "computer_screenshot": "[image]",
    "input_file": "[file]",
    "input_audio": "[audio]",
}
CUT_KEYS = ("content", "output")
CUT_TEXTS = ("text", "refusal", "stdout", "stderr")
MARK = "\n[… {} characters left out …]\n"
CUT_TRIES, CUT_STEP = 12, 0.8


def cut(item: Json, tokens: float, tokens_of: TokensOf) -> Json | None:
    """The item without the middle of its longest texts, and without pictures, so that it fits; None when it cannot."""
    size = tokens_of(item)
    if size <= tokens:
        return item
    if tokens < SMALLEST_CUT_TOKENS:
        return None
    bare = bare_of(item)
    if tokens_of({**bare, **{key: shorter(bare[key], 0) for key in CUT_KEYS if key in bare}}) > tokens:
        return None
    lengths = sorted(len(text) for key in CUT_KEYS for text in _cut_texts(bare.get(key)))
    most = _level(lengths, sum(lengths) * tokens / max(tokens_of(bare), 1.0))
    for _ in range(CUT_TRIES):
        found = {**bare, **{key: shorter(bare[key], int(most)) for key in CUT_KEYS if key in bare}}
        if tokens_of(found) <= tokens:
            return found
        most *= CUT_STEP
    return None


def _level(lengths: list[int], allowed: float) -> float:
    """The length to which the longest have to be cut, so that all come to what is allowed. lengths: rising."""
    for index, length in enumerate(lengths):
        level = allowed / (len(lengths) - index)
        if level < length:
            return level
        allowed -= length
    return lengths[-1] if lengths else 0.0


def bare_of(item: Json) -> Json:
    """With words for its pictures and files."""
    return {**item, **{key: _without_pictures(item[key]) for key in CUT_KEYS if isinstance(item.get(key), list)}}


def _parts_of(item: Json) -> list[Json]:
    lists = (item[key] for key in CUT_KEYS if isinstance(item.get(key), list))
    return [part for parts in lists for part in parts if isinstance(part, dict)]


def _data_chars(part: Json) -> int:
    audio = part.get("input_audio")
    data = [*(part.get(key) for key in DATA_KEYS), audio.get("data") if isinstance(audio, dict) else None]
    return sum(len(each) for each in data if isinstance(each, str))


def _without_pictures(parts: list[Any]) -> list[Any]:
    return [
        _placeholder(part) if isinstance(part, dict) and part.get("type") in PLACEHOLDERS else part for part in parts
    ]


def _placeholder(part: Json) -> Json:
    return {"type": "input_text", "text": PLACEHOLDERS[part["type"]]}


def _cut_texts(value: Any) -> list[str]:
    """The texts in a value that may be cut."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [value[key] for key in CUT_TEXTS if isinstance(value.get(key), str)]
    return [text for each in value if isinstance(each, dict) for text in _cut_texts(each)] if value else []


def shorter(value: Any, most: int) -> Any:
    """With all its texts that may be cut at most so long; a text is never made longer."""
    if isinstance(value, str):
        half = most // 2
        mark = MARK.format(len(value) - 2 * half)
        return value if len(value) <= 2 * half + len(mark) else f"{value[:half]}{mark}{value[len(value) - half :]}"
    if isinstance(value, list):
        return [shorter(each, most) if isinstance(each, dict) else each for each in value]
    if isinstance(value, dict):
        return {**value, **{key: shorter(value[key], most) for key in CUT_TEXTS if isinstance(value.get(key), str)}}
    return value
