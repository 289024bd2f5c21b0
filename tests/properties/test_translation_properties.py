"""What holds for every request and every window: no mutation, stable prefixes, and no error but a clear 400."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import TOOLS, bodies

from dialects import DIALECTS
from errors import ProxyError
from request import RequestLimits, echo, parse_body, parse_request
from translation import render

Json = dict[str, Any]
LIMITS = RequestLimits()


def examples(count: int) -> settings:
    """A busy machine is no reason to fail."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


DIALECT = st.sampled_from(sorted(DIALECTS))

# -- any JSON where a client may write JSON ----------------------------------------------------------------------------

SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
)
STRAY = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
Path = tuple[str | int, ...]


def paths(value: Any, here: Path = ()) -> list[Path]:
    """Where something stands in a JSON value, from the outside in."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [here, *(path for key in keys for path in paths(value[key], (*here, key)))]


def with_at(value: Any, path: Path, stray: Any) -> Any:
    """A copy of a JSON value with something else at one place."""
    if not path:
        return stray
    changed = copy.copy(value)
    changed[path[0]] = with_at(value[path[0]], path[1:], stray)
    return changed


def outcome(body: Any, dialect: str) -> tuple[int, bool]:
    """The status, and whether it was said clearly; anything but a ProxyError goes through."""
    try:
        request = parse_request(parse_body(orjson.dumps(body), LIMITS), LIMITS)
        chat = render(request, request.items, DIALECTS[dialect], "m")
    except ProxyError as error:
        return error.http_status, bool(error.message)
    return 200, bool(orjson.dumps([chat.body, echo(request)])) and all(isinstance(name, str) for name in chat.ignored)


FINE = {(200, True), (400, True)}
STRAYS: list[Any] = [None, True, 5, -1.5, "", "x", [], [5], ["x"], [[]], [{}], {}, {"x": 5}, {"type": "x"}]
PLACES = [(body, path) for body in bodies() for path in paths(body)]


@pytest.mark.parametrize("dialect", ["generic", "openai", "openrouter", "mistral"])
def test_one_stray_value_anywhere_is_rendered_or_is_a_clear_400(dialect: str) -> None:
    for body, path in PLACES:
        for stray in STRAYS:
            assert outcome(with_at(body, path, stray), dialect) in FINE, (path, stray)


@examples(500)
@given(place=st.sampled_from(PLACES), more=st.data(), stray=STRAY, dialect=DIALECT)
def test_any_json_at_two_places_is_rendered_or_is_a_clear_400(
    place: tuple[Json, Path], more: st.DataObject, stray: Any, dialect: str
) -> None:
    body = with_at(*place, stray)
    assert outcome(with_at(body, more.draw(st.sampled_from(paths(body))), more.draw(STRAY)), dialect) in FINE


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_sample_as_it_stands_is_rendered(dialect: str) -> None:
    for body in bodies():
        request = parse_request(parse_body(orjson.dumps(body), LIMITS), LIMITS)
        assert render(request, request.items, DIALECTS[dialect], "m").body["messages"][-1]["role"] == "user"


# -- windows that a client and a model could have written --------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
SPOKEN = st.builds(
    lambda role, text: {"role": role, "content": [{"type": "input_text", "text": text}]},
    st.sampled_from(["user", "system", "developer"]),
    TEXT,
)
ASKED = st.builds(lambda text: {"type": "message", "role": "user", "content": text}, TEXT)
THOUGHT = st.builds(lambda text: {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}, TEXT)
ANSWER = st.builds(lambda text: {"role": "assistant", "content": text}, TEXT)
RESULT = TEXT | st.builds(lambda text: [{"type": "input_text", "text": text}, IMAGE], TEXT)


@st.composite
def turn(draw: Any, prefix: str) -> list[Json]:
    """What a model said and what the client answered: every call gets its output, in any order."""
    said = [*draw(st.lists(THOUGHT, max_size=2)), *draw(st.lists(ANSWER, max_size=2))]
    ids = [f"call_{prefix}_{index}" for index in range(draw(st.integers(0 if len(said) else 1, 3)))]
    if not ids:
        said.append(draw(ANSWER))
    calls = [{"type": "function_call", "call_id": i, "name": "look", "arguments": draw(TEXT)} for i in ids]
    outputs = [
        {"type": "function_call_output", "call_id": i, "output": draw(RESULT)} for i in draw(st.permutations(ids))
    ]
    spoken = draw(st.lists(SPOKEN | ASKED, min_size=0 if ids else 1, max_size=2))
    between = draw(st.integers(0, len(outputs)))
    return [*said, *calls, *outputs[:between], *spoken, *outputs[between:]]


@st.composite
def turns(draw: Any) -> list[list[Json]]:
    """The first input, then one list of items for each further turn."""
    first = [*draw(st.lists(SPOKEN, max_size=2)), draw(ASKED)]
    return [first, *(draw(turn(str(number))) for number in range(draw(st.integers(1, 4))))]


def window_messages(window: list[Json], dialect: str) -> list[Json]:
    request = parse_request({"model": "m", "input": window, "instructions": "Be brief."}, LIMITS)
    found: list[Json] = render(request, request.items, DIALECTS[dialect], "m").body["messages"]
    return found


@examples(300)
@given(parts=turns(), dialect=DIALECT)
def test_the_messages_of_a_window_begin_those_of_the_window_one_turn_later(
    parts: list[list[Json]], dialect: str
) -> None:
    earlier: list[Json] = []
    window: list[Json] = []
    for part in parts:
        window = [*window, *part]
        later = window_messages(window, dialect)
        assert earlier == later[: len(earlier)]
        earlier = later


@examples(200)
@given(parts=turns(), dialect=DIALECT)
def test_every_tool_call_is_followed_by_its_tool_message(parts: list[list[Json]], dialect: str) -> None:
    found = window_messages([item for part in parts for item in part], dialect)
    for index, message in enumerate(found):
        ids = [call["id"] for call in message.get("tool_calls", ())]
        following = found[index + 1 : index + 1 + len(ids)]
        assert ids == [answer.get("tool_call_id") for answer in following]


@examples(200)
@given(parts=turns())
def test_strict_dialects_never_see_two_neighbours_of_one_role(parts: list[list[Json]]) -> None:
    found = window_messages([item for part in parts for item in part], "mistral")
    roles = [message["role"] for message in found if message["role"] != "tool"]
    pairs = [(first, second) for first, second in itertools.pairwise(roles) if first == second == "user"]
    assert pairs == []


@examples(200)
@given(parts=turns(), tools=st.lists(st.sampled_from(TOOLS), max_size=2), dialect=DIALECT)
def test_the_input_is_never_mutated(parts: list[list[Json]], tools: list[Json], dialect: str) -> None:
    body = {"model": "m", "input": [item for part in parts for item in part], "tools": tools}
    before = copy.deepcopy(body)
    try:
        request = parse_request(body, LIMITS)
        render(request, request.items, DIALECTS[dialect], "m").body["messages"].append({})
        echo(request)
    except ProxyError:
        pass
    assert before == body
