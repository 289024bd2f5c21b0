"""Whatever a backend sends, the events obey the grammar; and a streamed answer says what the plain one says."""

from __future__ import annotations

from typing import Any

import orjson
from event_grammar import USAGE, check, delta, machine, message, output, parse, relay, without_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import ToolRef
from upstream_errors import UpstreamBroken

Json = dict[str, Any]

# -- any chunk ---------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["<think>", "</think>", "<", "</th", "ink>", "<thi", "nk>", " ", "\n", "\n\n", "a", "Hello ", "é"]
)
TEXT = st.lists(WORDS, max_size=4).map("".join)
ARGUMENTS = st.sampled_from(["", "{", "}", "{}", '{"a":1}', '{"input":', '"x"}', '{"commands":["ls"]}', " "])
NAMES = st.sampled_from(["f", "g", "custom", "shell", ""])
CALL_DELTA = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({}, optional={"name": NAMES, "arguments": ARGUMENTS | st.just({"a": 1})})},
    optional={
        "index": st.integers(0, 2) | st.none(),
        "id": st.sampled_from(["", "c1", "c2", "taken"]),
        "extra_content": st.just({"x": 1}),
    },
)
PARTS = st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT)
    | st.builds(lambda text: {"type": "thinking", "thinking": [{"type": "text", "text": text}]}, TEXT),
    max_size=2,
)
CITATION = {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "content": TEXT | PARTS | st.none(),
        "reasoning": TEXT,
        "reasoning_content": TEXT,
        "reasoning_details": st.lists(
            st.fixed_dictionaries({"type": st.just("x")}, optional={"text": TEXT}), max_size=2
        ),
        "refusal": TEXT,
        "annotations": st.just([CITATION]),
        "tool_calls": st.lists(CALL_DELTA, max_size=2),
    },
)
FINISH = st.sampled_from(["stop", "length", "tool_calls", "content_filter", "odd", None])
CHUNK = st.builds(lambda fields: delta(**fields), FIELDS) | st.sampled_from(
    [{"choices": []}, {"choices": [], "usage": USAGE}]
)
PLAN = st.fixed_dictionaries(
    {
        "think": st.sampled_from(["auto", "open", "off"]),
        "expose": st.sampled_from(["summary", "text", "none"]),
        "parallel": st.booleans(),
        "refs": st.just({"custom": ToolRef("custom", "custom"), "shell": ToolRef("shell", "shell")}),
        "taken_call_ids": st.just(frozenset({"taken"})),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.lists(CHUNK, max_size=12), FINISH, PLAN)
def test_any_sequence_of_chunks_gives_a_valid_event_stream(chunks: list[Json], finish: str | None, plan: Json) -> None:
    events = relay([*chunks, delta(finish)], **plan)
    parse(events)
    assert events[-1]["response"]["output"]


@settings(deadline=None)
@given(st.lists(CHUNK, max_size=12), PLAN)
def test_a_failure_after_any_chunk_ends_a_valid_event_stream(chunks: list[Json], plan: Json) -> None:
    stream = machine(**plan)
    events = stream.start()
    for chunk in chunks:
        events = events + stream.feed(chunk)
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    response = check(events + stream.fail(UpstreamBroken("It broke.")))
    parts = [part for item in response["output"] for part in item.get("content", ())]
    assert "".join(part["text"] for part in parts if part["type"] == "output_text") == said


@settings(deadline=None)
@given(st.lists(TEXT, max_size=8), FINISH)
def test_text_goes_through_letter_for_letter(texts: list[str], finish: str | None) -> None:
    items = output(*(delta(content=text) for text in texts), delta(finish), think="off")
    assert [part["text"] for item in items for part in item["content"]] == ["".join(texts)]


# -- streamed against plain --------------------------------------------------------------------------------------------

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["f", "custom", "shell"]),
        st.dictionaries(st.sampled_from(["a", "input", "commands"]), st.just("x"), max_size=2),
    ),
    max_size=3,
)


@st.composite
def cuts(draw: st.DrawFn, text: str) -> list[str]:
    """The text in pieces; never an empty list, so that even nothing is said once."""
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=4)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@st.composite
def call_chunks(draw: st.DrawFn, calls: list[Json]) -> list[Json]:
    """The calls cut into deltas and interleaved, each begun in its turn."""
    queues = []
    for index, call in enumerate(calls):
        pieces = draw(cuts(call["function"]["arguments"]))
        first = {**call, "index": index, "function": {**call["function"], "arguments": pieces[0]}}
        queues.append([first, *({"index": index, "function": {"arguments": piece}} for piece in pieces[1:])])
    chunks, begun = [], 0
    while any(queues):
        ready = [n for n, queue in enumerate(queues) if queue and n <= begun]
        chosen = draw(st.sampled_from(ready))
        begun = max(begun, chosen + 1)
        chunks.append(delta(tool_calls=[queues[chosen].pop(0)]))
    return chunks


def whole_calls(calls: list[tuple[str, Json]]) -> list[Json]:
    functions = [{"name": name, "arguments": orjson.dumps(arguments).decode()} for name, arguments in calls]
    return [{"id": f"c{n}", "function": function} for n, function in enumerate(functions)]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["reasoning", "tags", "none"]), TEXT, TEXT, CALLS, FINISH, PLAN)
def test_a_streamed_answer_says_what_the_plain_one_says(
    data: st.DataObject,
    mode: str,
    reasoning: str,
    said: str,
    calls: list[tuple[str, Json]],
    finish: str | None,
    plan: Json,
) -> None:
    fields = {"reasoning": reasoning} if mode == "reasoning" and reasoning else {}
    content = f"<think>{reasoning}</think>{said}" if mode == "tags" else said
    if mode != "tags" and not fields and "</think>" in content:
        content = content.replace("</think>", "")  # a missing opening tag cannot be told in a stream
        content = content.replace("</th", "")
    tool_calls = whole_calls(calls)
    chunks = [delta(reasoning=piece) for piece in data.draw(cuts(reasoning))] if fields else []
    chunks += [delta(content=piece) for piece in data.draw(cuts(content))]
    chunks += data.draw(call_chunks(tool_calls))
    streamed = output(*chunks, delta(finish), **plan)
    whole = message(finish, **fields, content=content, tool_calls=tool_calls)
    plain = output(whole, **plan)
    assert without_ids(streamed) == without_ids(plain)
    assert plain == unheard(whole, **plan)


def unheard(whole: Json, **plan: Any) -> list[Json]:
    """The output items of a plain answer when nobody listens to events."""
    stream = machine(**plan, silent=True)
    assert stream.start() + stream.feed(whole) + stream.close() + stream.finish() == []
    items: list[Json] = stream.snapshot()["output"]
    return items
