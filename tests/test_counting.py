"""How large items are, and how the weight of a size is learned from what a backend counts."""

from __future__ import annotations

import copy
import math
import random
from operator import sub
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting import (
    Counter,
    added_size,
    by_bytes,
    by_vocabulary,
    size_of,
    standing_size,
    thought_size,
    window_size,
)
from weights import HIGHEST, LOWEST, PRIOR, Size, Weights, restored, total

Json = dict[str, Any]


def user(content: Any, **fields: Any) -> Json:
    return {"type": "message", "role": "user", "content": content, **fields}


def thought(text: str) -> Json:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}], "summary": []}


def output(text: Any) -> Json:
    return {"type": "function_call_output", "call_id": "c", "output": text}


def image(data: str) -> Json:
    return {"type": "input_image", "image_url": data, "detail": "high"}


def sized(item: Json) -> Size:
    return size_of(item, by_bytes)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0)),
        ("plain words\n", (2.4, 0)),
        ("Ab1!", (0.8, 3)),
        ("é", (0.4, 2)),
        ("😀", (0.8, 4)),
        ("\ud83d", (0.6, 3)),
    ],
)
def test_a_text_is_as_large_as_its_bytes_and_odd_where_it_is_not_prose(text: str, expected: Any) -> None:
    assert by_bytes(text) == pytest.approx(expected)


def test_with_a_vocabulary_a_text_is_as_large_as_its_tokens() -> None:
    assert by_vocabulary(len)("four") == (4.0, 0.0)


def test_a_long_text_is_counted_by_parts_of_it_and_every_text_once() -> None:
    counted: list[int] = []
    units = by_vocabulary(lambda text: counted.append(len(text)) or len(text) // 4)
    assert [units("word" * 250_000)[0] for _ in range(2)] == pytest.approx([250_000] * 2)
    assert [units("word" * 10)[0] for _ in range(2)] == [10, 10]
    assert (len(counted), sum(counted) < 50_000) == (4, True)


@pytest.mark.parametrize("content", ["five!", [{"type": "input_text", "text": "five!"}]])
def test_a_message_is_an_entry_with_its_text(content: Any) -> None:
    assert sized(user(content)) == Size(text=1, odd=1, entries=1)


LABELLED = {"id": "msg_" + "1" * 50, "status": "completed", "encrypted_content": "e" * 500, "annotations": ["a" * 50]}


@pytest.mark.parametrize("item", [user("five."), output("five."), thought("five.")])
def test_ids_statuses_and_blobs_do_not_count(item: Json) -> None:
    labelled = {**item, **LABELLED, "call_id": "call_" + "1" * 50}
    assert (sized(labelled), thought_size(labelled, by_bytes)) == (sized(item), thought_size(item, by_bytes))


@pytest.mark.parametrize("data", ["data:image/png;base64," + "A" * 100_000, "https://a.example/b.png", "data:,"])
@pytest.mark.parametrize("make", [user, output])
def test_an_image_counts_as_one_whatever_its_length(make: Any, data: str) -> None:
    found = sized(make([image(data), {"type": "input_text", "text": "five "}, image(data)]))
    assert (found.images, found.text, found.odd) == (2, 1, 0)


def test_audio_counts_as_an_image_and_a_file_as_its_bytes() -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "A" * 1000, "format": "wav"}}
    file = {"type": "input_file", "filename": "abcde", "file_data": "A" * 400}
    assert sized(user([audio, file])) == Size(text=1 + 300 / 5, entries=1, images=1)


def test_calls_count_with_name_and_arguments_and_outputs_as_such() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "aaaaa", "arguments": "bbbbb"}
    assert (sized(call), sized(output("ccccc"))) == (Size(text=2, entries=1), Size(text=1, entries=1, outputs=1))


@pytest.mark.parametrize("kind", ["image_generation_call", "web_search_call", "code_interpreter_call"])
def test_a_record_that_is_not_sent_has_no_size(kind: str) -> None:
    assert sized({"type": kind, "id": "x", "result": "A" * 1000, "code": "print()"}) == Size()


def test_reasoning_counts_apart_with_its_content_or_else_its_summary() -> None:
    summary = {"summary": [{"type": "summary_text", "text": "bbbbbbbbbb"}]}
    texts = [
        thought_size({**thought("aaaaa"), **summary}, by_bytes).text,
        thought_size({"type": "reasoning", **summary}, by_bytes).text,
    ]
    assert (texts, sized(thought("aaaaa")), thought_size(user("aaaaa"), by_bytes)) == ([1, 2], Size(), Size())


@pytest.mark.parametrize("value", [None, 5, [], {}, [None], {"content": {"text": None}}, "\ud83d"])
def test_no_value_at_all_makes_counting_fail(value: Any) -> None:
    item = {
        "type": "message",
        "role": "user",
        "content": value,
        "output": value,
        "image_url": value,
        "file_data": value,
    }
    assert all(map(math.isfinite, window_size([item, thought("\ud83d"), {}], by_bytes, is_thought_sent=True)))


def test_instructions_tools_and_format_stand_before_the_items() -> None:
    said = {
        "instructions": "five.",
        "tools": [{"name": "a"}],
        "text": {"format": {"type": "json_schema", "schema": {}}},
    }
    found = standing_size(said, by_bytes)
    assert (found.whole, found.instructed, found.tools, found.entries) == (1, 1, 1, 0)
    assert found.text == pytest.approx((5 + len('{"name":"a"}')) / 5)
    assert standing_size({"instructions": None, "tools": [], "text": {"format": {"type": "text"}}}, by_bytes) == Size(
        whole=1
    )


# -- windows -----------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
ITEM = st.one_of(
    st.builds(user, TEXT | st.lists(st.builds(lambda text: {"type": "input_text", "text": text}, TEXT), max_size=2)),
    st.builds(lambda text: {"role": "assistant", "content": text}, TEXT),
    st.builds(output, TEXT),
    st.just(user([image("data:image/png;base64,AA==")])),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ITEM, max_size=8), st.lists(ITEM, max_size=8), st.booleans())
def test_what_is_added_is_what_a_window_grows_by_and_the_entry_of_the_answer(
    items: list[Json], more: list[Json], is_sent: bool
) -> None:
    before = copy.deepcopy([*items, *more])
    whole = [window_size(window, by_bytes, is_sent) for window in (items, [*items, *more])]
    added = added_size([*items, *more], len(items), by_bytes, is_sent)
    assert added == pytest.approx(total([Size(*map(sub, whole[1], whole[0])), Size(entries=1)]))
    assert [*items, *more] == before


def test_reasoning_counts_in_windows_of_backends_that_get_it_back_and_apart_when_it_is_over() -> None:
    items = [user(""), thought("aaaaa"), output(""), user(""), thought("bbbbbbbbbb"), output("")]
    sent, unsent = (window_size(items, by_bytes, is_sent) for is_sent in (True, False))
    assert (sent.text, sent.thought, unsent.text, unsent.thought) == (3, 1, 0, 0)


def test_what_was_thought_for_the_last_answer_was_counted_and_goes_again() -> None:
    items = [user(""), thought("aaaaa"), {"role": "assistant", "content": ""}, user("bbbbb")]
    unsent, sent = (added_size(items, 3, by_bytes, is_sent) for is_sent in (False, True))
    assert (unsent.text, unsent.thought, sent.text, sent.thought) == (0, 0, 1, 1)


def test_what_was_thought_stays_while_the_turn_goes_on() -> None:
    items = [user(""), thought("aaaaa"), {"type": "function_call", "call_id": "c"}, output("bbbbb")]
    assert added_size(items, 3, by_bytes, is_thought_sent=True) == Size(text=1, entries=2, outputs=1)


# -- weights -----------------------------------------------------------------------------------------------------------


class Template:
    """A chat template with a tokenizer: tokens are linear in bytes, odd bytes, entries and prompts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        draw = self._random.uniform
        self.a, self.b, self.c, self.d, self.image = (
            draw(0.12, 0.4),
            draw(0, 0.5),
            draw(1, 12),
            draw(0, 80),
            draw(80, 2500),
        )

    def prompt(self, images: int = 0, least_bytes: int = 500) -> tuple[Size, float]:
        count, entries = self._random.randint(least_bytes, 40_000), self._random.randint(1, 40)
        odd = int(count * self._random.uniform(0.05, 0.5))
        tokens = self.a * count + self.b * odd + self.c * entries + self.d + self.image * images
        return Size(text=count / 5, odd=odd, entries=entries, whole=1, images=images), tokens


def learned(template: Template, count: int, images: int = 0) -> Weights:
    weights = Weights()
    for number in range(count):
        weights.learn(*template.prompt(images * (number % 3)))
    return weights


@pytest.mark.parametrize("seed", range(25))
def test_after_thirty_counts_a_new_prompt_is_known_within_three_percent(seed: int) -> None:
    template = Template(seed)
    weights = learned(template, 30)
    new = [template.prompt(least_bytes=5000) for _ in range(20)]
    assert [size for size, tokens in new if abs(weights.tokens(size) - tokens) > 0.03 * tokens] == []


@pytest.mark.parametrize("seed", range(10))
def test_what_an_image_takes_is_learned(seed: int) -> None:
    template = Template(seed)
    weights = learned(template, 30, images=1)
    new = [template.prompt(images=4, least_bytes=5000) for _ in range(20)]
    assert [size for size, tokens in new if abs(weights.tokens(size) - tokens) > 0.05 * tokens] == []


def test_a_model_that_is_exchanged_for_another_is_learned_anew() -> None:
    old, new = Template(1), Template(2)
    weights = learned(old, 100)
    for _ in range(60):
        size, tokens = new.prompt(least_bytes=5000)
        told = weights.tokens(size)
        weights.learn(size, tokens)
    assert told == pytest.approx(tokens, rel=0.03)


def test_before_anything_is_known_the_weights_are_the_prior() -> None:
    size = Size(text=100, odd=10, entries=3, images=1, whole=1)
    assert Weights().tokens(size) == pytest.approx(sum(part * weight for part, weight in zip(size, PRIOR, strict=True)))


@pytest.mark.parametrize("count", [1, 30, 1000])
def test_one_prompt_that_is_counted_again_and_again_is_known_and_others_stay_sensible(count: int) -> None:
    weights, size = Weights(), Size(text=200, odd=100, entries=5, whole=1)
    for _ in range(count):
        weights.learn(size, 400)
    assert weights.tokens(size) == pytest.approx(400, rel=0.03)
    assert 600 < weights.tokens(Size(text=400, odd=200, entries=10, whole=1)) < 900
    assert 20 < weights.tokens(Size(text=20, odd=10, entries=1, whole=1)) < 120


AMOUNT = st.sampled_from([0.0, 1.0, 1e3, 1e7]) | st.floats(0, 1e6)
SMALL = st.sampled_from([0.0, 1.0]) | st.floats(0, 1e4)
FLAG = st.sampled_from([-1.0, 0.0, 1.0])
SIZES = st.builds(Size, AMOUNT, AMOUNT, SMALL, SMALL, SMALL, AMOUNT, st.sampled_from([0.0, 1.0]), FLAG, FLAG)
COUNTED = st.tuples(SIZES, st.sampled_from([0.0, 1.0, 1e9]) | st.floats(0, 1e7))


@settings(max_examples=150, deadline=None)
@given(st.lists(COUNTED, min_size=1, max_size=8), st.sampled_from([1, 40]))
def test_no_counts_whatever_take_the_weights_out_of_their_bounds(counts: list[tuple[Size, float]], times: int) -> None:
    weights = Weights()
    for size, tokens in counts * times:
        weights.learn(size, tokens)
    for name, low, high in zip(Size._fields, LOWEST, HIGHEST, strict=True):
        assert max(low, 0) <= weights.tokens(Size(**{name: 1.0})) <= high


@settings(max_examples=100, deadline=None)
@given(st.lists(COUNTED, max_size=5), SIZES)
def test_what_was_learned_is_the_same_when_it_is_read_again(counts: list[tuple[Size, float]], size: Size) -> None:
    weights = Weights()
    for counted in counts:
        weights.learn(*counted)
    again = Weights(restored(weights.kept()))
    assert (again.seen, again.tokens(size), again.kept()) == (len(counts), weights.tokens(size), weights.kept())


def taught(*counts: tuple[Size, float]) -> Weights:
    weights = Weights()
    for counted in counts:
        weights.learn(*counted)
    return weights


def numbers(weights: Weights) -> list[float]:
    seen, sums = orjson.loads(weights.kept())
    return [seen, *sums]


@settings(max_examples=50, deadline=None)
@given(st.lists(COUNTED, max_size=4), st.lists(COUNTED, max_size=4))
def test_what_is_put_behind_what_others_learned_is_as_if_it_was_learned_after_it(
    first: list[tuple[Size, float]], second: list[tuple[Size, float]]
) -> None:
    weights = taught(*second)
    weights.goes_on_from(restored(taught(*first).kept()))
    assert numbers(weights) == pytest.approx(numbers(taught(*first, *second)), rel=1e-9)


def test_what_was_told_in_vain_is_news_still() -> None:
    size = Size(text=100, entries=1)
    weights, others = taught((size, 500)), restored(taught((size, 300)).kept())
    told = weights.told()
    weights.learn(size, 700)
    weights.take_back(told)
    weights.goes_on_from(others)
    assert numbers(weights) == pytest.approx(numbers(taught((size, 300), (size, 500), (size, 700))), rel=1e-9)


# -- all models --------------------------------------------------------------------------------------------------------


def facts_of(counter: Counter) -> dict[str, bytes]:
    """What a counter tells, as it is kept."""
    return {name: told.kept for name, told in counter.tell().items()}


def test_what_others_tell_is_put_before_what_was_learned_since() -> None:
    counter, other, size = Counter(), Counter(), Size(text=100, entries=1, whole=1)
    for _ in range(10):
        counter.learn("a", size, 1000)
        other.learn("a", size, 1000)
    told = facts_of(other)
    counter.remember(told)
    counter.remember(told)
    assert orjson.loads(facts_of(counter)["bytes a"])[0] == 20
    assert counter.has_news is False


def test_each_model_has_weights_of_its_own() -> None:
    counter, size = Counter(), Size(text=100, entries=1, whole=1)
    for _ in range(10):
        counter.learn("a", size, 1000)
    assert counter.tokens("a", size) > 900
    assert counter.tokens("b", size) == Weights().tokens(size)


def test_a_model_is_known_after_its_third_count() -> None:
    counter, known = Counter(), []
    for _ in range(4):
        known.append(counter.knows("a"))
        counter.learn("a", Size(text=100), 100)
    assert known == [False, False, False, True]


def test_a_model_that_is_known_is_learned_from_now_and_then() -> None:
    counter, size = Counter(), Size(text=100)
    for _ in range(32):
        assert counter.wants("a")
        counter.learn("a", size, 100)
    assert sum(counter.wants("a") for _ in range(610)) == 10


def test_models_that_take_turns_are_both_learned_from() -> None:
    counter = Counter()
    for _ in range(32):
        counter.learn("a", Size(text=100), 100)
        counter.learn("b", Size(text=100), 100)
    wanted = [(counter.wants("a"), counter.wants("b")) for _ in range(160)]
    assert all(any(found) for found in zip(*wanted, strict=True))


def test_what_changed_is_given_once_and_remembered_elsewhere() -> None:
    counter, other, size = Counter(), Counter(), Size(text=100, entries=1)
    counter.learn("a", size, 500)
    counter.tokens("b", size)
    facts = facts_of(counter)
    other.remember(facts)
    assert (list(facts), facts_of(counter), facts_of(other)) == (["bytes a"], {}, {})
    assert other.tokens("a", size) == counter.tokens("a", size)


def test_weights_of_another_unit_are_not_used() -> None:
    counter, size = Counter(), Size(text=100, entries=1)
    counter.learn("a", size, 5000)
    other = Counter(by_vocabulary(len), "o200k_base")
    other.remember(facts_of(counter))
    assert other.tokens("a", size) == Weights().tokens(size)


def test_models_that_clients_make_up_are_not_remembered_without_end() -> None:
    counter = Counter()
    for number in range(1500):
        counter.wants(f"asked {number}")
        counter.learn(f"made up {number}", Size(text=100), 100)
    assert len(facts_of(counter)) == 1000
