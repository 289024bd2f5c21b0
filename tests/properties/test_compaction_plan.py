"""What holds for every compaction and truncation: it fits, keeps pairs, and loses nothing without telling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any, NamedTuple

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from compaction import (
    SMALLEST_CUT_TOKENS,
    CompactionSettings,
    Plan,
    Room,
    cut,
    grouped,
    in_turns,
    planned,
    room_for,
    truncated,
)
from counting import Counter, size_of, thought_size, total
from folding import COMPACTION, FOLD, Contents, Fold, folded, is_standing, laid_out
from history import call_id
from items import is_from_user, item_type
from records import OUTPUT_ID_PREFIX
from summaries import transcript
from tools import CALL_ID_PREFIX

Json = dict[str, Any]


def examples(count: int) -> settings:
    """A busy machine is no reason to fail."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow)


# -- tokens ------------------------------------------------------------------------------------------------------------

LABELS = {"type", "role", "id", "call_id", "status"}


def by_hand(item: Json) -> float:
    """A quarter of a token for each byte, 4 for each item, 800 for each image."""
    return 4 + _weighed(item)


def _weighed(value: Any) -> float:
    if isinstance(value, str):
        return len(value.encode()) / 4
    if isinstance(value, list):
        return sum(map(_weighed, value))
    if not isinstance(value, dict):
        return 0
    return sum(800 if key == "image_url" else _weighed(each) for key, each in value.items() if key not in LABELS)


COUNTER = Counter()


def by_counter(item: Json) -> float:
    """As the proxy itself estimates, before it has learned anything."""
    return COUNTER.tokens("m", total([size_of(item, COUNTER.units), thought_size(item, COUNTER.units)]))


TokensOf = Callable[[Json], float]


def by_scale(item: Json) -> float:
    """As for a model whose tokens are a third as long."""
    return 3 * by_hand(item)


TOKENS_OF = st.sampled_from([by_hand, by_counter, by_scale])
BYTES_PER_TOKEN = {by_hand: 4, by_counter: 5, by_scale: 4 / 3}


def tokens_in(items: list[Json], tokens_of: TokensOf) -> float:
    return sum(map(tokens_of, items))


# More than the words around a record take.
WORDS_TOKENS = 300

# -- windows -----------------------------------------------------------------------------------------------------------

SHORT = ["", "a", "Why?", "é😀\n", " "]
LONG = [word * count for word in ("word ", "語", "line\n", "é1{", "😀") for count in (40, 300, 2000, 12_000)]
TEXTS = [*SHORT, *SHORT, *LONG]
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
FILE = {"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64," + "aGkh" * 200}


def text_part(text: str) -> Json:
    return {"type": "input_text", "text": text}


PARTS: list[list[Json]] = [
    [],
    [IMAGE],
    [IMAGE] * 3,
    [FILE, text_part("Why?")],
    *([text_part("Why?"), text_part(text)] for text in LONG),
    *([text_part(first), IMAGE, text_part(second), text_part("")] for first, second in pairwise(LONG)),
]
CONTENTS = [*TEXTS, *PARTS]
USERS: list[Json] = [{"role": "user", "content": content} for content in CONTENTS]
ANSWERS: list[Json] = [
    *({"type": "message", "role": "assistant", "content": text} for text in TEXTS),
    *({"role": "assistant", "content": [{"type": "refusal", "refusal": text}]} for text in TEXTS),
]
THOUGHTS: list[Json] = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]} for text in TEXTS]
SYSTEMS: list[Json] = [{"role": role, "content": text} for role in ("system", "developer") for text in TEXTS]
TOOLS: list[Json] = [
    {"type": "additional_tools", **role, "tools": [{"type": "function", "description": text}]}
    for role in ({}, {"role": "developer"})
    for text in TEXTS
]
OTHERS: list[Json] = [
    *({"type": "configuration_update", "reasoning": {"effort": effort}} for effort in ("low", "high")),
    {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}},
]

CALLS: dict[str, Callable[[str], Json]] = {
    "function_call": lambda text: {"name": "look", "arguments": text},
    "custom_tool_call": lambda text: {"name": "exec", "input": text},
    "shell_call": lambda text: {"action": {"commands": [text]}},
    "local_shell_call": lambda text: {"action": {"type": "exec", "command": [text]}},
}


def output(kind: str, tie: str, content: Any) -> Json:
    if kind == "local_shell_call":
        return {"type": "local_shell_call_output", "id": tie, "output": str(content)}
    streams = [{"stdout": str(content), "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]
    return {"type": f"{kind}_output", "call_id": tie, "output": streams if kind == "shell_call" else content}


def some(items: list[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(items), max_size=most)


PAIRS = st.tuples(st.sampled_from(sorted(CALLS)), st.sampled_from(TEXTS), st.sampled_from(CONTENTS))


@st.composite
def steps(draw: Any, is_last: bool = False) -> list[Json]:
    """Thoughts, parallel calls, and their outputs in any order, with something said in between."""
    pairs = draw(st.lists(PAIRS, min_size=1, max_size=3))
    ties = [f"c{next(NUMBERS)}" for _ in pairs]
    calls = [
        {"type": kind, "call_id": tie, **CALLS[kind](text)} for (kind, text, _), tie in zip(pairs, ties, strict=True)
    ]
    outputs = [output(kind, tie, content) for (kind, _, content), tie in zip(pairs, ties, strict=True)]
    outputs = draw(st.permutations(outputs))[draw(st.integers(0, len(outputs))) if is_last else 0 :]
    between = draw(st.integers(0, len(outputs)))
    said = draw(some([*USERS, *ANSWERS, *SYSTEMS], 1))
    return [*draw(some(THOUGHTS, 2)), *calls, *outputs[:between], *said, *outputs[between:]]


SAID = some([*USERS, *USERS, *ANSWERS, *THOUGHTS, *SYSTEMS, *TOOLS, *OTHERS, *OTHERS], 6)
STEPS = st.tuples(SAID, st.just([]) | steps(), SAID, st.just([]) | steps()).map(lambda found: [*chain(*found)])


@st.composite
def folds(draw: Any) -> Json:
    said = draw(some([*SYSTEMS, *TOOLS, *OTHERS[:2]], 2)), draw(some(USERS, 3)), draw(STEPS)
    return {
        "type": COMPACTION,
        FOLD: Fold(draw(st.sampled_from(TEXTS)), *map(tagged, said), is_whole=draw(st.booleans())),
    }


def tagged(items: list[Json]) -> list[Json]:
    """Each item with an id of its own, by which it is known again when it was cut."""
    return [{"id": f"i{next(NUMBERS)}", **item} for item in items]


NUMBERS = iter(range(10**12))


@st.composite
def windows(draw: Any, can_wait: bool = True) -> Contents:
    """What a turn begins with: nothing or a fold, some turns, and what is new."""
    earlier = draw(st.lists(folds(), max_size=1))
    last = draw(st.just([]) | steps(is_last=True)) if can_wait else []
    items = tagged([*draw(STEPS), *last, *draw(some([*USERS, *ANSWERS], 1))])
    start = draw(st.integers(0, len(items)))
    return folded([*tagged(draw(STEPS)), *earlier, *items[:start]], items[start:])


class Case(NamedTuple):
    """A window, the room for it, and how it is counted."""

    contents: Contents
    room: Room
    tokens_of: TokensOf

    def plan(self) -> Plan:
        return planned(self.contents, self.room, self.tokens_of)


ROOMS = st.builds(
    lambda tokens, summary, users, is_asked: room_for(
        tokens, CompactionSettings(summary_tokens=summary, user_tokens=users), is_asked=is_asked
    ),
    st.integers(300, 3000) | st.integers(3000, 100_000),
    st.sampled_from([64, 2000]),
    st.sampled_from([0, 200, 20_000]),
    st.booleans(),
)
CASES = st.builds(Case, windows(), ROOMS, TOKENS_OF)

# -- what is said of windows -------------------------------------------------------------------------------------------


def rest_of(contents: Contents) -> list[Json]:
    return [item for item in (*contents.history, *contents.new) if not is_standing(item)]


def all_of(contents: Contents) -> list[Json]:
    return [*contents.standing, *contents.users, *contents.history, *contents.new]


def kept_by(plan: Plan) -> list[Json]:
    return [*plan.standing, *plan.users, *plan.late]


def ids(items: list[Json]) -> list[str]:
    return [item["id"] for item in items if "id" in item]


def answered_in(items: list[Json]) -> set[str | None]:
    return {call_id(item) for item in items if item_type(item) in OUTPUT_ID_PREFIX}


def waits(item: Json, items: list[Json]) -> bool:
    return item_type(item) in CALL_ID_PREFIX and call_id(item) not in answered_in(items)


def exempt_in(items: list[Json]) -> set[str]:
    """The ids of what stays whatever it takes: tools, settings, and calls that wait, with the thoughts before them."""
    kept = {item["id"] for item in items if is_standing(item) and item_type(item) != "message"}
    for group in grouped([item for item in items if not is_standing(item)]):
        last = max((at for at, item in enumerate(group) if waits(item, items)), default=-1)
        kept |= {each["id"] for each in group[:last] if item_type(each) == "reasoning"}
        kept |= {each["id"] for each in group if waits(each, items)}
    return kept


def window_after(plan: Plan, summary: str) -> list[Json]:
    return laid_out(folded([{"type": COMPACTION, FOLD: plan.fold(summary)}], []))


def vanished(items: list[Json], plan: Plan) -> list[Json]:
    """What is neither kept nor to be told; of standing items that say the same, one is enough."""
    found = [*kept_by(plan), *plan.lost]
    known, said = set(ids(found)), [{**item, "id": ""} for item in found if is_standing(item)]
    return [item for item in items if item["id"] not in known and {**item, "id": ""} not in said]


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    remaining = iter(whole)
    return all(each in remaining for each in part)


def parted_pairs(kept: list[Json], before: list[Json]) -> list[str | None]:
    """The ids of calls that were answered and are kept without their output, and of outputs without their call."""
    calls, parted = set(), []
    for item in kept:
        if item_type(item) in CALL_ID_PREFIX:
            calls.add(call_id(item))
        elif item_type(item) in OUTPUT_ID_PREFIX and call_id(item) not in calls:
            parted.append(call_id(item))
    answers, answered = answered_in(kept), answered_in(before)
    return [*parted, *(tie for tie in calls if tie in answered and tie not in answers)]


# -- the plan ----------------------------------------------------------------------------------------------------------


@examples(500)
@given(CASES)
def test_a_window_with_the_longest_summary_fits_into_its_room(case: Case) -> None:
    plan = case.plan()
    assert plan.summary_tokens <= plan.most_tokens
    summary = "s" * int(plan.most_tokens * BYTES_PER_TOKEN[case.tokens_of])
    window = window_after(plan, summary)
    exempt = exempt_in(all_of(case.contents))
    counted = [item for item in window if item.get("id") not in exempt]
    assert tokens_in(counted, case.tokens_of) <= case.room.all


@examples(300)
@given(CASES)
def test_a_call_and_its_output_are_never_parted(case: Case) -> None:
    assert parted_pairs(case.plan().late, rest_of(case.contents)) == []


@examples(200)
@given(CASES)
def test_a_call_that_waits_for_its_output_always_stays(case: Case) -> None:
    rest = rest_of(case.contents)
    waiting = [item for item in rest if waits(item, rest)]
    assert [item for item in case.plan().late if waits(item, rest)] == waiting


@examples(300)
@given(CASES)
def test_reasoning_stays_only_with_something_that_it_led_to(case: Case) -> None:
    kept = set(ids(case.plan().late))
    for group in grouped(rest_of(case.contents)):
        for at, item in enumerate(group):
            led_to = [each["id"] for each in group[at:] if item_type(each) != "reasoning"]
            assert item_type(item) != "reasoning" or item["id"] not in kept or not led_to or kept & set(led_to)


@examples(300)
@given(CASES)
def test_what_stays_is_unchanged_in_its_order_and_there_once_or_its_original_is_told(case: Case) -> None:
    plan = case.plan()
    originals = {item["id"]: item for item in all_of(case.contents)}
    lost = ids(plan.lost)
    assert [item["id"] for item in kept_by(plan) if item != originals[item["id"]] and item["id"] not in lost] == []
    assert len(set(ids(kept_by(plan)))) == len(kept_by(plan))
    for kept in (plan.standing, plan.users, plan.late):
        assert is_subsequence(ids(kept), list(originals))
    assert [item for item in plan.users if not is_from_user(item)] == []


@examples(300)
@given(CASES)
def test_nothing_vanishes(case: Case) -> None:
    plan = case.plan()
    assert vanished(all_of(case.contents), plan) == []
    assert case.contents.summary == plan.earlier or case.contents.summary in transcript(plan.lost)


@examples(200)
@given(CASES)
def test_the_newest_group_stays_word_for_word_when_it_fits(case: Case) -> None:
    plan, newest = case.plan(), next(reversed(grouped(rest_of(case.contents))), [])
    left = case.room.all - case.room.summary - WORDS_TOKENS - tokens_in(plan.standing, case.tokens_of)
    if tokens_in(newest, case.tokens_of) <= min(case.room.late, left):
        assert plan.late[len(plan.late) - len(newest) :] == newest


@examples(300)
@given(CASES)
def test_no_user_message_stays_in_place_of_a_newer_one_that_is_no_longer(case: Case) -> None:
    plan = case.plan()
    messages = [*case.contents.users, *filter(is_from_user, rest_of(case.contents))]
    size, kept = {item["id"]: case.tokens_of(item) for item in messages}, ids(kept_by(plan))
    whole = [found for found in ids(plan.users) if found not in ids(plan.lost)]
    gone = [found for found in size if found not in kept]
    order = list(size).index
    assert [(new, old) for new in gone for old in whole if order(old) < order(new) and size[old] >= size[new]] == []


@examples(200)
@given(windows(can_wait=False), st.integers(1000, 50_000), st.booleans(), TOKENS_OF)
def test_of_the_newest_user_message_something_stays(
    contents: Contents, tokens: int, is_asked: bool, tokens_of: TokensOf
) -> None:
    contents = Contents([], contents.users, contents.summary, rest_of(contents), [])
    messages = [*contents.users, *filter(is_from_user, contents.history)]
    assume(messages)
    plan = planned(contents, room_for(tokens, CompactionSettings(), is_asked=is_asked), tokens_of)
    assert messages[-1]["id"] in ids(kept_by(plan))


@examples(200)
@given(CASES, STEPS, st.sampled_from(TEXTS), ROOMS)
def test_a_second_compaction_loses_nothing_that_the_first_kept(
    case: Case, more: list[Json], summary: str, room: Room
) -> None:
    first = case.plan()
    fold = {"type": COMPACTION, FOLD: first.fold(summary)}
    new = tagged([item for item in more if not is_standing(item)])
    again = planned(folded([fold], new), room, case.tokens_of)
    assert vanished([*kept_by(first), *new], again) == []
    assert summary == again.earlier or summary in transcript(again.lost)


@examples(150)
@given(CASES, st.integers(0, 5000))
def test_neither_planning_nor_truncating_nor_laying_out_changes_the_items(case: Case, tokens: int) -> None:
    before = copy.deepcopy(case.contents)
    plan = case.plan()
    kept = copy.deepcopy(plan)
    for item in plan.lost:
        transcript([item])
    laid_out(case.contents)
    window_after(plan, "s")
    truncated(case.contents, tokens, case.tokens_of)
    assert (case.contents, plan) == (before, kept)


# -- groups and turns --------------------------------------------------------------------------------------------------


@examples(200)
@given(windows())
def test_groups_and_turns_are_the_items_in_their_order(contents: Contents) -> None:
    rest = rest_of(contents)
    assert [item for group in grouped(rest) for item in group] == rest
    assert [item for turn in in_turns(rest, []) for item in turn] == rest
    assert [] not in grouped(rest)
    assert [parted_pairs(group, rest) for group in grouped(rest) if parted_pairs(group, rest)] == []


@examples(200)
@given(windows())
def test_groups_are_as_small_as_pairs_and_reasoning_allow(contents: Contents) -> None:
    rest = rest_of(contents)
    for group in grouped(rest):
        for end in range(1, len(group)):
            early, late = group[:end], group[end:]
            assert parted_pairs(early, rest) + parted_pairs(late, rest) or item_type(early[-1]) == "reasoning"


# -- truncation --------------------------------------------------------------------------------------------------------


@examples(300)
@given(windows(), st.integers(0, 6000) | st.integers(6000, 100_000), TOKENS_OF)
def test_truncation_takes_the_oldest_turns_and_no_more_than_it_has_to(
    contents: Contents, tokens: int, tokens_of: TokensOf
) -> None:
    rest, result = rest_of(contents), truncated(contents, tokens, tokens_of)
    kept = rest_of(result)
    turns = in_turns(rest, [])
    count = next(n for n in range(len(turns) + 1) if turns[len(turns) - n :] == in_turns(kept, []))
    left = tokens - tokens_in([item for item in laid_out(result) if is_standing(item)], tokens_of)
    assert rest[len(rest) - len(kept) :] == kept
    assert min(1, len(turns)) <= count
    assert count <= 1 or tokens_in(kept, tokens_of) <= left
    if count < len(turns) - (0 if contents.is_folded else 1):
        assert tokens_in([*turns[len(turns) - count - 1], *kept], tokens_of) > left


@examples(200)
@given(windows(), st.integers(0, 20_000))
def test_truncation_keeps_standing_items_and_pairs_and_drops_the_record(contents: Contents, tokens: int) -> None:
    result = truncated(contents, tokens, by_hand)
    standing = [item["id"] for item in laid_out(contents) if is_standing(item)]
    assert sorted(item["id"] for item in laid_out(result) if is_standing(item)) == sorted(standing)
    assert parted_pairs(rest_of(result), rest_of(contents)) == []
    assert not result.is_folded


# -- cutting -----------------------------------------------------------------------------------------------------------

CUTTABLE = st.sampled_from([*USERS, *ANSWERS, *SYSTEMS]) | steps().map(lambda items: items[-1])
ENDS = st.text(max_size=5)


@examples(300)
@given(CUTTABLE, st.integers(0, 3000), TOKENS_OF)
def test_what_is_cut_fits_or_is_nothing_and_the_item_stays_as_it_was(
    item: Json, tokens: int, tokens_of: TokensOf
) -> None:
    before = copy.deepcopy(item)
    found = cut(item, tokens, tokens_of)
    assert item == before
    assert found is None or tokens_of(found) <= tokens
    assert found is None or {k: v for k, v in found.items() if k not in ("content", "output")} == {
        k: v for k, v in item.items() if k not in ("content", "output")
    }
    assert found is item or tokens_of(item) > tokens


@examples(300)
@given(
    st.sampled_from(LONG),
    ENDS,
    ENDS,
    st.integers(2 * SMALLEST_CUT_TOKENS, 3000),
    st.sampled_from([by_hand, by_counter]),
)
def test_of_a_long_text_the_beginning_and_the_end_survive(
    text: str, head: str, late: str, tokens: int, tokens_of: TokensOf
) -> None:
    text = f"{head}{text}{late}"
    for key in ("content", "output"):
        found = cut({"type": "message", "role": "user", key: text}, tokens, tokens_of)
        first, mark, rest = found[key].partition("\n[… ") if found else ("", "", "")
        left_out, _, last = rest.partition(" characters left out …]\n")
        assert first if mark else first == text
        assert not mark or (last and f"{first}{text[len(first) :][: int(left_out)]}{last}" == text)
