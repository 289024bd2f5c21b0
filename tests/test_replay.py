"""Replayed events are the machine's own where each text came in one piece, and obey the grammar everywhere."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from event_grammar import RESPONSE, USAGE, check, delta, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from replay import replayed
from stream_plan import StreamPlan
from streaming import ResponseStream
from tools import ToolRef
from upstream_errors import UpstreamBroken

Json = dict[str, Any]
REFS = {kind: ToolRef(kind, kind) for kind in ("custom", "shell", "local_shell", "apply_patch", "tool_search")}
REFS["ns__f"] = ToolRef("function", "f", "ns")
CITATION = {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}
CITATIONS = [CITATION, {**CITATION, "url": "v"}]
LOGPROBS = {"content": [{"token": "Hi", "bytes": [72], "logprob": -0.5, "top_logprobs": []}]}


def machine(**plan: Any) -> ResponseStream:
    """One whose tier is settled from the start: what it was before cannot be read from a response that has ended."""
    numbers = itertools.count(1)
    response = {**RESPONSE, "service_tier": "default"}
    return ResponseStream(
        response, StreamPlan(refs=REFS, **plan), lambda prefix: f"{prefix}_{next(numbers)}", lambda: 2.5
    )


def relayed(*chunks: Json, finish: str = "stop", **plan: Any) -> list[Json]:
    """What the machine says live."""
    stream = machine(**plan)
    events = stream.start()
    for chunk in [*chunks, delta(finish), {"choices": [], "usage": USAGE}]:
        events = events + stream.feed(chunk)
    return events + stream.close() + stream.finish()


def call(name: str, arguments: str, index: int = 0, **more: Any) -> Json:
    return {"index": index, "id": f"c{index}", "function": {"name": name, "arguments": arguments}, **more}


def calls(*made: Json) -> Json:
    return delta(tool_calls=list(made))


PATCH = '{"type":"create_file","path":"a","diff":"+b"}'
ANSWERS: dict[str, tuple[list[Json], Json]] = {
    "text": ([delta(content="Hello")], {}),
    "white space": ([delta(content=" ")], {}),
    "nothing": ([], {}),
    "text with annotations": ([delta(content="Hello", annotations=CITATIONS)], {}),
    "annotations alone": ([delta(annotations=CITATIONS)], {}),
    "refusal": ([delta(refusal="No.")], {}),
    "text and refusal and text": ([delta(content="Well. "), delta(refusal="No."), delta(content="Or?")], {}),
    "cut text": ([delta(content="Hel")], {"finish": "length"}),
    "filtered text": ([delta(content="Hel")], {"finish": "content_filter"}),
    "nothing before the limit": ([], {"finish": "length"}),
    "reasoning as a summary": ([delta(reasoning="Hm."), delta(content="Hi")], {"expose": "summary"}),
    "reasoning as text": ([delta(reasoning="Hm."), delta(content="Hi")], {"expose": "text"}),
    "reasoning that is not shown": ([delta(reasoning="Hm."), delta(content="Hi")], {"expose": "none"}),
    "reasoning with details": (
        [delta(reasoning="Hm.", reasoning_details=[{"type": "x", "data": "y"}]), delta(content="Hi")],
        {},
    ),
    "sealed reasoning": ([delta(reasoning="Hm."), delta(content="Hi")], {"seal": lambda *_: "rp1_x"}),
    "reasoning alone": ([delta(reasoning="Hm.")], {"finish": "length"}),
    "reasoning twice": ([delta(reasoning="Hm."), delta(content="Hi"), delta(reasoning="Oh."), delta(refusal="No")], {}),
    "function call": ([calls(call("f", '{"a":1}'))], {}),
    "function call without arguments": ([calls(call("f", ""))], {}),
    "function call of a namespace": ([calls(call("ns__f", "{}"))], {}),
    "function call with extra content": ([calls(call("f", "{}", extra_content={"x": 1}))], {}),
    "cut function call": ([calls(call("f", '{"a'))], {"finish": "length"}),
    "function call cut before its arguments": ([calls(call("f", ""))], {"finish": "length"}),
    "custom call": ([calls(call("custom", '{"input":"x"}'))], {}),
    "custom call without input": ([calls(call("custom", '{"input":""}'))], {}),
    "shell call": ([calls(call("shell", '{"commands":["ls"]}'))], {}),
    "local shell call": ([calls(call("local_shell", '{"command":["ls"]}'))], {}),
    "patch call": ([calls(call("apply_patch", PATCH))], {}),
    "tool search call": ([calls(call("tool_search", '{"query":"q"}'))], {}),
    "text and calls": (
        [delta(content="Hi"), calls(call("f", "{}"), call("custom", '{"input":"x"}', 1), call("f", "{}", 2))],
        {},
    ),
}


@pytest.mark.parametrize(("chunks", "plan"), ANSWERS.values(), ids=ANSWERS)
def test_the_replay_is_what_the_machine_said(chunks: list[Json], plan: Json) -> None:
    events = relayed(*chunks, **plan)
    assert replayed(events[-1]["response"]) == events


def test_logprobs_are_told_with_the_text() -> None:
    chunk = delta(content="Hi")
    chunk["choices"][0]["logprobs"] = LOGPROBS
    events = relayed(chunk, logprobs=True)
    assert [event["logprobs"] for event in events if "logprobs" in event] == [LOGPROBS["content"]] * 2
    assert replayed(events[-1]["response"]) == events


# -- any answer that came in whole pieces ------------------------------------------------------------------------------

LETTERS = st.text("ab é", min_size=1, max_size=3).filter(str.strip)
TEXT = st.builds(lambda text: delta(content=text), LETTERS)
NOTED = st.builds(lambda text: delta(content=text, annotations=CITATIONS), LETTERS)
REFUSAL = st.builds(lambda text: delta(refusal=text), LETTERS)
THOUGHT = st.builds(lambda text: delta(reasoning=text), LETTERS)
CALL = st.builds(
    lambda name, arguments: calls(call(name, arguments)),
    st.sampled_from(["f", "ns__f", *REFS]),
    st.sampled_from(["{}", '{"input":"x"}', '{"commands":["ls"]}', '{"command":"ls"}', PATCH]),
)


def begins_anew(chunks: list[Json]) -> bool:
    """Whether no delta goes on with the text of the one before."""
    keys = [next(iter(chunk["choices"][0]["delta"])) for chunk in chunks]
    return all(one != other or one == "tool_calls" for one, other in itertools.pairwise(keys))


def with_call_ids(chunks: list[Json]) -> list[Json]:
    """Each call a call of its own."""
    told = copy.deepcopy(chunks)
    for n, chunk in enumerate(told):
        for made in chunk["choices"][0]["delta"].get("tool_calls", ()):
            made |= {"id": f"c{n}", "index": n}
    return told


ANSWER = st.lists(TEXT | NOTED | REFUSAL | THOUGHT | CALL, max_size=6).filter(begins_anew).map(with_call_ids)
FINISH = st.sampled_from(["stop", "length", "tool_calls", "content_filter"])
EXPOSE = st.sampled_from(["summary", "text", "none"])


@settings(max_examples=200, deadline=None)
@given(ANSWER, FINISH, EXPOSE)
def test_any_replay_is_what_the_machine_said(chunks: list[Json], finish: str, expose: str) -> None:
    events = relayed(*chunks, finish=finish, expose=expose)
    assert replayed(events[-1]["response"]) == events


# -- any response ------------------------------------------------------------------------------------------------------

WORDS = st.text("ab é", max_size=3)
OUTPUT_TEXT = st.fixed_dictionaries(
    {"type": st.just("output_text"), "text": WORDS, "annotations": st.lists(st.just(CITATION), max_size=2)},
    optional={"logprobs": st.just([])},
)
PART = OUTPUT_TEXT | st.fixed_dictionaries({"type": st.just("refusal"), "refusal": WORDS})
STATUS = st.sampled_from(["completed", "incomplete"])


def item(kind: str, **fields: Any) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({"type": st.just(kind), **fields})


def texts(kind: str) -> st.SearchStrategy[list[Json]]:
    return st.lists(st.fixed_dictionaries({"type": st.just(kind), "text": WORDS}), max_size=2)


NOTHING = st.just([])
ITEM = st.one_of(
    item("message", role=st.just("assistant"), status=STATUS, content=st.lists(PART, max_size=3)),
    item("reasoning", summary=texts("summary_text"), encrypted_content=st.none() | WORDS),
    item("reasoning", summary=NOTHING, content=texts("reasoning_text"), status=STATUS),
    item("function_call", call_id=WORDS, name=WORDS, arguments=WORDS.map("{}".__add__), status=STATUS),
    item("custom_tool_call", call_id=WORDS, name=WORDS, input=WORDS),
    item("compaction", encrypted_content=WORDS),
    item(
        "local_shell_call", call_id=WORDS, action=st.just({"type": "exec", "command": ["ls"], "env": {}}), status=STATUS
    ),
)


def response_of(items: list[Json], status: str = "completed", **fields: Any) -> Json:
    output = [{**each, "id": f"item_{n}"} for n, each in enumerate(items)]
    return {**RESPONSE, "status": status, "output": output, **fields}


@settings(max_examples=200, deadline=None)
@given(st.lists(ITEM, max_size=4), st.sampled_from(["completed", "incomplete", "failed"]))
def test_the_replay_of_any_response_obeys_the_grammar(items: list[Json], status: str) -> None:
    response = response_of(items, status)
    events = replayed(copy.deepcopy(response))
    parse(events)
    assert check(events) == response


@given(st.lists(ITEM, max_size=4))
def test_the_response_is_left_as_it_was(items: list[Json]) -> None:
    response = response_of(items)
    before = copy.deepcopy(response)
    replayed(response)
    assert response == before


# -- one behaviour at a time -------------------------------------------------------------------------------------------


def test_the_replay_begins_as_if_nothing_were_known() -> None:
    usage, why = {"total_tokens": 7}, {"reason": "max_output_tokens"}
    response = response_of([], "incomplete", usage=usage, incomplete_details=why, completed_at=2, error={"code": "x"})
    assert replayed(response) == [
        {"type": "response.created", "sequence_number": 0, "response": RESPONSE | {"output": []}},
        {"type": "response.in_progress", "sequence_number": 1, "response": RESPONSE | {"output": []}},
        {"type": "response.incomplete", "sequence_number": 2, "response": response},
    ]


def test_a_reasoning_item_begins_without_what_comes_later() -> None:
    late = {"encrypted_content": "rp1_x", "reasoning_details": [{"type": "x"}], "content": []}
    begun = {"id": "rs_1", "type": "reasoning", "summary": [], "status": "in_progress"}
    whole = {**begun, **late, "status": "completed"}
    added, done = replayed({**response_of([]), "output": [whole]})[2:-1]
    assert added == {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item": begun}
    assert done == {"type": "response.output_item.done", "sequence_number": 3, "output_index": 0, "item": whole}


def test_an_item_of_another_type_is_told_whole() -> None:
    whole = {"id": "cmp_1", "type": "compaction", "encrypted_content": "rp1_x"}
    added, done = replayed({**response_of([]), "output": [whole]})[2:-1]
    assert [added["type"], done["type"]] == ["response.output_item.added", "response.output_item.done"]
    assert [added["item"], done["item"]] == [whole, whole]


def test_a_part_of_another_type_is_told_whole() -> None:
    part = {"type": "output_audio", "data": "x"}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    _, added, done, _ = replayed({**response_of([]), "output": [message]})[2:-1]
    assert [added["type"], done["type"]] == ["response.content_part.added", "response.content_part.done"]
    assert [added["part"], done["part"]] == [part, part]


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [delta(content="Hel")],
        [delta(refusal="N")],
        [delta(reasoning="Hm")],
        [delta(content="Hi"), calls(call("f", '{"a'))],
    ],
)
def test_a_failed_response_ends_with_what_was_said(chunks: list[Json]) -> None:
    stream = machine()
    live = stream.start()
    for chunk in chunks:
        live = live + stream.feed(chunk)
    live = live + stream.fail(UpstreamBroken("It broke."))
    events = replayed(live[-1]["response"])
    parse(events)
    assert check(events) == live[-1]["response"]
    assert events[: len(live) - 1] == live[:-1]


def test_a_cancelled_response_ends_as_an_incomplete_one() -> None:
    response = response_of([], "cancelled")
    assert replayed(response)[-1] == {"type": "response.incomplete", "sequence_number": 2, "response": response}


@pytest.mark.parametrize("status", ["queued", "in_progress"])
def test_a_response_that_has_not_ended_cannot_be_replayed(status: str) -> None:
    with pytest.raises(KeyError):
        replayed(response_of([], status))
