"""The state machine, one behaviour at a time; every answer is held to the grammar of event streams as well."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import orjson
import pytest
from event_grammar import USAGE, check, delta, machine, message, output, parse, relay, without_ids

from tools import ToolRef
from upstream_errors import UpstreamBroken, UpstreamRefused

Json = dict[str, Any]
STOP = delta("stop")


def texts(items: list[Json]) -> list[tuple[str, str]]:
    """(kind of part or call, text) of each thing that was said."""
    said = []
    for item in items:
        for part in [*item.get("summary", ()), *item.get("content", ())]:
            said.append((part["type"], part.get("text", part.get("refusal"))))
        if item["type"] == "function_call":
            said.append((item["name"], item["arguments"]))
    return said


def call(index: int | None = 0, name: str | None = None, arguments: Any = None, call_id: str | None = None) -> Json:
    """A delta of a tool call, with only the keys that are given."""
    function = {"name": name, "arguments": arguments}
    found = {"index": index, "id": call_id, "function": {k: v for k, v in function.items() if v is not None}}
    return {key: value for key, value in found.items() if value is not None}


def calls(*deltas: Json, finish_reason: str | None = None) -> Json:
    return delta(finish_reason, tool_calls=list(deltas))


def kinds(events: list[Json], of: str = "") -> list[str]:
    return [event["type"] for event in events if of in event["type"]]


def response_of(*chunks: Json, **plan: Any) -> Json:
    response: Json = relay(chunks, **plan)[-1]["response"]
    return response


TEXT, SUMMARY = "output_text", "summary_text"


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_is_a_message_with_its_events_in_order() -> None:
    events = relay([delta(role="assistant", content=""), delta(content="Hel"), delta(content="lo"), STOP])
    parse(events)
    assert kinds(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_the_message_item_is_complete() -> None:
    assert output(delta(content="Hello"), STOP) == [
        {
            "id": "msg_1",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": TEXT, "text": "Hello", "annotations": [], "logprobs": []}],
        }
    ]


@pytest.mark.parametrize("content", [None, "", []])
def test_an_empty_answer_is_one_empty_message(content: Any) -> None:
    assert texts(output(message(content=content))) == [(TEXT, "")]


def test_an_answer_of_white_space_is_kept() -> None:
    assert texts(output(delta(content=" "), delta(content="\n"), STOP)) == [(TEXT, " \n")]


def test_leading_white_space_of_an_answer_is_kept() -> None:
    assert texts(output(delta(content="\n"), delta(content="  def f():"), STOP)) == [(TEXT, "\n  def f():")]


def test_choices_after_the_first_are_not_read() -> None:
    chunk = message(content="one")
    chunk["choices"].append({"index": 1, "message": {"content": "two"}})
    assert texts(output(chunk)) == [(TEXT, "one")]


def test_azures_first_chunk_says_nothing() -> None:
    first = {"choices": [], "id": "", "model": "", "prompt_filter_results": [{"prompt_index": 0}]}
    assert texts(output(first, delta(content="Hi"), STOP)) == [(TEXT, "Hi")]


@pytest.mark.parametrize("chunk", [{}, {"choices": None}, {"choices": [{}]}, {"choices": [{"delta": None}]}])
def test_a_chunk_without_a_choice_or_delta_says_nothing(chunk: Json) -> None:
    assert texts(output(chunk, delta(content="Hi"), STOP)) == [(TEXT, "Hi")]


def test_unknown_fields_of_a_delta_are_left_alone() -> None:
    assert texts(output(delta(content="Hi", audio={"id": "a"}, token_ids=[1]), STOP)) == [(TEXT, "Hi")]


def test_text_on_the_finish_chunk_counts() -> None:
    assert texts(output(delta(content="Hel"), delta("length", content="lo"))) == [(TEXT, "Hello")]


# -- refusals, annotations, logprobs -----------------------------------------------------------------------------------


def test_a_refusal_is_a_part_of_its_own_and_completed() -> None:
    events = relay([delta(refusal="I "), delta(refusal="won't."), STOP])
    parse(events)
    assert texts(events[-1]["response"]["output"]) == [("refusal", "I won't.")]
    assert kinds(events, "refusal") == ["response.refusal.delta"] * 2 + ["response.refusal.done"]


def test_text_then_a_refusal_are_two_parts_of_one_message() -> None:
    items = output(delta(content="Well. "), delta(refusal="No."), STOP)
    assert (len(items), texts(items)) == (1, [(TEXT, "Well. "), ("refusal", "No.")])


def test_a_refusal_while_a_call_is_half_written_waits_for_it() -> None:
    chunks = [calls(call(0, "f", '{"a":', "c1")), delta(refusal="No."), calls(call(0, None, "1}")), STOP]
    assert texts(output(*chunks)) == [("f", '{"a":1}'), ("refusal", "No.")]


CITATION = {"url": "http://a", "title": "A", "start_index": 0, "end_index": 2}


@pytest.mark.parametrize(
    "annotation",
    [{"type": "url_citation", "url_citation": CITATION}, {"type": "url_citation", **CITATION}],
    ids=["nested", "flat"],
)
def test_an_annotation_comes_flat_in_an_event_and_in_the_part(annotation: Json) -> None:
    events = relay([delta(content="Hi"), delta(annotations=[annotation, "nonsense"]), STOP])
    parse(events)
    (event,) = [event for event in events if "annotation" in event["type"]]
    assert (event["annotation_index"], event["annotation"]) == (0, {"type": "url_citation", **CITATION})
    assert events[-1]["response"]["output"][0]["content"][0]["annotations"] == [event["annotation"]]


TOKEN = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": [{"token": "Ho", "logprob": -2.0}]}
SAID_TOKEN = {**TOKEN, "top_logprobs": [{"token": "Ho", "logprob": -2.0, "bytes": []}]}


def with_logprobs(chunk: Json) -> Json:
    chunk["choices"][0]["logprobs"] = {"content": [TOKEN]}
    return chunk


def test_logprobs_come_with_the_delta_and_with_the_part() -> None:
    events = relay([with_logprobs(delta(content="Hi")), STOP], logprobs=True)
    parse(events)
    (event,) = [event for event in events if event["type"] == "response.output_text.delta"]
    part = events[-1]["response"]["output"][0]["content"][0]
    assert [event["logprobs"], part["logprobs"]] == [[SAID_TOKEN], [SAID_TOKEN]]


def test_logprobs_nobody_asked_for_are_left_out() -> None:
    (item,) = output(with_logprobs(delta(content="Hi")), STOP)
    assert item["content"][0]["logprobs"] == []


def test_logprobs_of_text_without_a_character_yet_go_with_the_next() -> None:
    chunks = [with_logprobs(delta(content="")), with_logprobs(delta(content="é")), STOP]
    (item,) = output(*chunks, logprobs=True)
    assert item["content"][0]["logprobs"] == [SAID_TOKEN, SAID_TOKEN]


@pytest.mark.parametrize("other", [delta(reasoning="Hm"), delta(tool_calls=[call(0, "f", '{"a":1}', "c1")])])
def test_logprobs_of_what_is_no_text_are_left_out(other: Json) -> None:
    chunks = [with_logprobs(copy.deepcopy(other)), delta(content="Hi"), STOP]
    assert output(*chunks, logprobs=True)[1]["content"][0]["logprobs"] == []


# -- reasoning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_under_each_name(key: str) -> None:
    chunks = [delta(**{key: "Two "}), delta(**{key: "plus two."}), delta(content="4"), STOP]
    assert texts(output(*chunks)) == [(SUMMARY, "Two plus two."), (TEXT, "4")]


def test_reasoning_under_two_names_is_taken_once() -> None:
    chunks = [delta(reasoning="Hm.", reasoning_content="Hm."), delta(content="4"), STOP]
    assert texts(output(*chunks)) == [(SUMMARY, "Hm."), (TEXT, "4")]


def test_an_empty_name_for_reasoning_does_not_hide_the_other() -> None:
    assert texts(output(message(reasoning_content="", reasoning="Hm.", content="4")))[0] == (SUMMARY, "Hm.")


def test_reasoning_details_give_their_text_and_are_kept() -> None:
    details = [{"type": "reasoning.text", "text": "Hm."}, {"type": "reasoning.summary", "summary": " So."}]
    items = output(delta(reasoning_details=details), delta(content="4"), STOP)
    assert texts(items) == [(SUMMARY, "Hm. So."), (TEXT, "4")]
    assert items[0]["reasoning_details"] == details


def test_sealed_reasoning_without_text_is_an_item_with_its_details() -> None:
    details = [{"type": "reasoning.encrypted", "data": "x"}]
    items = output(delta(reasoning_details=details), calls(call(0, "f", "{}", "c1")), STOP)
    assert without_ids(items)[0] == {"type": "reasoning", "summary": [], "reasoning_details": details}


def test_mistrals_list_of_parts_is_reasoning_and_text() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    chunks = [
        delta(content=[thinking]),
        delta(content=[{"type": "text", "text": "4"}, "odd"]),
        delta(content="2"),
        STOP,
    ]
    assert texts(output(*chunks)) == [(SUMMARY, "Hm."), (TEXT, "42")]


def test_white_space_around_reasoning_is_dropped_and_inside_is_kept() -> None:
    chunks = [delta(reasoning=each) for each in ("\n", "\nOne ", "\n", "two", "\n")]
    assert texts(output(*chunks, delta(content="\n\n"), delta(content=" 4"), STOP)) == [
        (SUMMARY, "One \ntwo"),
        (TEXT, "4"),
    ]


def test_blank_reasoning_is_no_item_and_trims_the_answer() -> None:
    assert texts(output(delta(reasoning="\n\n"), delta(content="\n\nHi"), STOP)) == [(TEXT, "Hi")]


def test_reasoning_after_text_is_an_item_after_it() -> None:
    chunks = [delta(content="A"), delta(reasoning="B"), delta(content="C"), STOP]
    assert texts(output(*chunks)) == [(TEXT, "A"), (SUMMARY, "B"), (TEXT, "C")]


def test_summary_events_have_parts() -> None:
    events = relay([delta(reasoning="Hm"), delta(reasoning="."), STOP])
    parse(events)
    assert kinds(events, "reasoning") == [
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ]


def test_reasoning_can_be_exposed_as_text() -> None:
    events = relay([delta(reasoning="Hm."), STOP], expose="text")
    parse(events)
    (item,) = events[-1]["response"]["output"]
    assert (item["summary"], item["content"]) == ([], [{"type": "reasoning_text", "text": "Hm."}])
    assert kinds(events, "reasoning") == ["response.reasoning_text.delta", "response.reasoning_text.done"]
    assert len(kinds(events, "content_part")) == 2


def test_reasoning_can_be_hidden() -> None:
    events = relay([delta(reasoning="Hm."), delta(content="4"), STOP], expose="none")
    assert without_ids(events[-1]["response"]["output"])[0] == {"type": "reasoning", "summary": []}
    assert "Hm" not in orjson.dumps(events).decode()


def test_an_answer_cut_in_its_reasoning_has_only_that() -> None:
    response = response_of(delta(reasoning="Hm"), delta("length"))
    assert (response["status"], texts(response["output"])) == ("incomplete", [(SUMMARY, "Hm")])


# -- think tags --------------------------------------------------------------------------------------------------------

TAGGED = "<think>\nTwo < three.\n</think>\n\n4 </think> <think>"
PARTED = [(SUMMARY, "Two < three."), (TEXT, "4 </think> <think>")]


@pytest.mark.parametrize("place", range(len(TAGGED) + 1))
def test_think_tags_are_found_wherever_the_chunks_are_cut(place: int) -> None:
    chunks = [delta(content=TAGGED[:place]), delta(content=TAGGED[place:]), STOP]
    assert texts(output(*chunks)) == PARTED


def test_think_tags_are_found_letter_by_letter() -> None:
    assert texts(output(*(delta(content=letter) for letter in TAGGED), STOP)) == PARTED


def test_think_tags_are_found_in_a_plain_answer() -> None:
    assert texts(output(message(content=TAGGED))) == PARTED


def test_an_empty_block_is_no_item_and_trims_the_answer() -> None:
    assert texts(output(message(content="<think>\n\n</think>\n\nHi"))) == [(TEXT, "Hi")]
    assert texts(output(message(content="<think></think>\n\nHi"))) == [(TEXT, "Hi")]


def test_a_tag_after_text_is_text() -> None:
    said = "Use <think>a</think>."
    assert texts(output(message(content=said))) == [(TEXT, said)]


def test_a_block_that_is_not_closed_is_reasoning() -> None:
    assert texts(output(delta(content="<think>Hm</th"), delta("length"))) == [(SUMMARY, "Hm</th")]


@pytest.mark.parametrize("said", ["<", "<thin", "</thi", "<thunk>", "</thunk> <think>"])
def test_what_only_begins_like_a_tag_is_text(said: str) -> None:
    assert texts(output(*(delta(content=letter) for letter in said), STOP)) == [(TEXT, said)]


def test_a_plain_answer_may_lack_the_opening_tag() -> None:
    assert texts(output(message(content="Two.\n</think>\n\n4"))) == [(SUMMARY, "Two."), (TEXT, "4")]


def test_a_closing_tag_alone_at_the_start_is_an_empty_block() -> None:
    assert texts(output(delta(content="</thi"), delta(content="nk>\n\n4"), STOP)) == [(TEXT, "4")]


def test_a_streamed_answer_that_lacks_the_opening_tag_stays_as_it_was_sent() -> None:
    chunks = [delta(content=each) for each in ("Two.", "\n</think>", "\n\n4")]
    assert texts(output(*chunks, STOP)) == [(TEXT, "Two.\n</think>\n\n4")]


@pytest.mark.parametrize("opening", ["", "<think>", "\n<think>\n"])
def test_open_mode_begins_inside_a_block(opening: str) -> None:
    chunks = [delta(content=letter) for letter in f"{opening}Two.\n</think>\n\n4"]
    assert texts(output(*chunks, STOP, think="open")) == [(SUMMARY, "Two."), (TEXT, "4")]


def test_what_open_mode_held_back_is_reasoning() -> None:
    assert texts(output(delta(content="<thi"), delta("length"), think="open")) == [(SUMMARY, "<thi")]


def test_open_mode_gives_way_to_a_backend_that_parts_reasoning_itself() -> None:
    chunks = [delta(reasoning="Two."), delta(content="4"), STOP]
    assert texts(output(*chunks, think="open")) == [(SUMMARY, "Two."), (TEXT, "4")]


def test_off_mode_takes_tags_as_text() -> None:
    assert texts(output(delta(content="\n"), delta(content=TAGGED), STOP, think="off")) == [(TEXT, "\n" + TAGGED)]


def test_tags_are_text_once_the_backend_parts_reasoning_itself() -> None:
    chunks = [delta(reasoning="Hm."), delta(content="<think>a</think>"), STOP]
    assert texts(output(*chunks)) == [(SUMMARY, "Hm."), (TEXT, "<think>a</think>")]


# -- tool calls --------------------------------------------------------------------------------------------------------


def test_a_call_is_an_item_with_its_events_in_order() -> None:
    events = relay([calls(call(0, "f", "", "c1")), calls(call(0, None, '{"a"')), calls(call(0, None, ":1}")), STOP])
    parse(events)
    assert kinds(events)[2:-1] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    added, *_, done, _, completed = events[2:]
    assert (added["item"]["arguments"], done["name"], done["arguments"]) == ("", "f", '{"a":1}')
    assert completed["response"]["output"] == [
        {"id": "fc_1", "type": "function_call", "name": "f", "arguments": '{"a":1}', "call_id": "c1"}
        | {"status": "completed"}
    ]


def test_calls_without_text_have_no_message() -> None:
    assert texts(output(delta(content="\n\n"), calls(call(0, "f", "{}", "c1")), STOP)) == [("f", "{}")]


@pytest.mark.parametrize("think", ["auto", "open", "off"])
def test_white_space_between_and_after_calls_is_no_message(think: str) -> None:
    chunks = [calls(call(0, "f", '{"a":1}', "c1")), delta(content="\n"), calls(call(1, "g", "{}", "c2"))]
    assert texts(output(*chunks, delta(content="\n"), STOP, think=think)) == [("f", '{"a":1}'), ("g", "{}")]


F, G = '{"a":1}', '{"b":2}'
TWO = [("f", F), ("g", G)]


def test_interleaved_calls_come_one_after_another() -> None:
    chunks = [
        calls(call(0, "f", "", "c1"), call(1, "g", "", "c2")),
        calls(call(1, None, '{"b"')),
        calls(call(0, None, '{"a"')),
        calls(call(1, None, ":2}"), call(0, None, ":1}")),
    ]
    assert texts(output(*chunks, STOP)) == TWO


def test_a_later_call_closes_the_one_before_as_soon_as_that_is_whole() -> None:
    stream = machine()
    stream.start()
    stream.feed(calls(call(0, "f", F, "c1")))
    events = stream.feed(calls(call(1, "g", "", "c2")))
    assert kinds(events, "output_item") == ["response.output_item.done", "response.output_item.added"]


@pytest.mark.parametrize(
    "deltas",
    [
        [call(None, "f", F, "c1"), call(None, "g", G, "c2")],
        [call(None, "f", F), call(None, "g", G)],
        [call(0, "f", F, "c1"), call(0, "g", G, "c2")],
        [call(0, "f", F), call(0, "g", G)],
        [call(None, "f", F, "same"), call(None, "g", G, "same")],
        [call(0, "f", F, "same"), call(1, "g", G, "same")],
        [call(0, "f", F, ""), call(1, "g", G, "")],
        [call(3, "f", F, "c1"), call(5, "g", G, "c2")],
    ],
    ids=["no index", "no index and id", "index 0", "index 0 and no id", "same id", "ids repeated", "empty ids", "gaps"],
)
def test_whole_calls_are_told_apart(deltas: list[Json]) -> None:
    assert texts(output(*(calls(each) for each in deltas), STOP)) == TWO
    assert texts(output(calls(*deltas), STOP)) == TWO
    assert texts(output(message(tool_calls=deltas))) == TWO


@pytest.mark.parametrize(
    "rest",
    [
        call(0, None, ":1}"),
        call(None, None, ":1}"),
        call(0, None, ":1}", ""),
        call(0, "", ":1}"),
        call(0, None, ":1}", "c1"),
        call(0, "f", ":1}", "c1"),
    ],
    ids=["llama.cpp", "no index", "DashScope", "LM Studio", "TGI", "name repeated"],
)
def test_a_continuation_is_told_from_a_new_call(rest: Json) -> None:
    assert texts(output(calls(call(0, "f", '{"a"', "c1")), calls(rest), STOP)) == [("f", F)]


def test_a_name_may_come_after_its_arguments() -> None:
    assert texts(output(calls(call(0, None, F, "c1")), calls(call(0, "f")), STOP)) == [("f", F)]


def test_a_call_that_never_gets_a_name_has_an_empty_one() -> None:
    assert texts(output(calls(call(0, None, F, "c1")), STOP)) == [("", F)]


def test_arguments_as_an_object_are_written_as_json() -> None:
    assert texts(output(message(tool_calls=[call(0, "f", {"a": 1}, "c1")]))) == [("f", F)]


@pytest.mark.parametrize("arguments", [None, "", {}, " "])
def test_empty_arguments_are_an_empty_object_with_a_delta(arguments: Any) -> None:
    events = relay([calls(call(0, "f", arguments, "c1")), STOP])
    assert "response.function_call_arguments.delta" in kinds(events)
    assert orjson.loads(events[-1]["response"]["output"][0]["arguments"]) == {}


def test_arguments_that_are_no_json_are_given_as_they_are() -> None:
    assert texts(output(calls(call(0, "f", "{oops", "c1")), STOP)) == [("f", "{oops")]


def test_calls_of_a_plain_answer_are_told_apart_by_their_place() -> None:
    assert texts(output(message(tool_calls=[call(0, "f", "", "same"), call(0, "g", "", "same")]))) == [
        ("f", "{}"),
        ("g", "{}"),
    ]


def test_call_ids_are_kept_where_they_are_new() -> None:
    items = output(calls(call(0, "f", F, "c1"), call(1, "g", G, "c2")), STOP, taken_call_ids=frozenset({"c2"}))
    assert [item["call_id"] for item in items] == ["c1", "call_1"]


def test_a_call_id_used_twice_in_one_answer_is_replaced() -> None:
    items = output(message(tool_calls=[call(None, "f", F, "c1"), call(None, "g", G, "c1")]))
    assert [item["call_id"] for item in items] == ["c1", "call_1"]


def test_only_the_first_call_is_kept_when_parallel_ones_are_not_wanted() -> None:
    chunks = [calls(call(0, "f", '{"a"', "c1")), calls(call(1, "g", G, "c2")), calls(call(0, None, ":1}"))]
    assert texts(output(*chunks, STOP, parallel=False)) == [("f", F)]


def test_text_after_a_whole_call_is_a_message_after_it() -> None:
    chunks = [calls(call(0, "f", F, "c1")), delta(content="\nDo"), delta(content="ne"), STOP]
    assert texts(output(*chunks)) == [("f", F), (TEXT, "Done")]


def test_text_in_the_middle_of_a_call_waits_for_it() -> None:
    chunks = [calls(call(0, "f", '{"a"', "c1")), delta(content="Do"), calls(call(0, None, ":1}")), delta(content="ne")]
    assert texts(output(*chunks, delta(reasoning="Hm"), STOP)) == [("f", F), (TEXT, "Done"), (SUMMARY, "Hm")]


def test_extra_content_of_a_call_is_kept_even_when_it_comes_late() -> None:
    extra = {"google": {"thought_signature": "x"}}
    chunks = [calls(call(0, "f", F, "c1")), calls({"index": 0, "extra_content": extra}), STOP]
    assert output(*chunks)[0]["extra_content"] == extra


@pytest.mark.parametrize("finish_reason", ["stop", "tool_calls", "function_call"])
def test_a_response_with_calls_is_completed_whatever_the_backend_calls_it(finish_reason: str) -> None:
    assert response_of(calls(call(0, "f", F, "c1"), finish_reason=finish_reason))["status"] == "completed"


def test_a_call_that_was_cut_is_incomplete_and_last() -> None:
    events = relay([calls(call(0, "f", F, "c1"), call(1, "g", '{"b', "c2")), delta("length")])
    parse(events)
    response = events[-1]["response"]
    assert (response["status"], texts(response["output"])) == ("incomplete", [("f", F), ("g", '{"b')])
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


# -- calls in their own item types -------------------------------------------------------------------------------------

TYPED = {
    "custom": ('{"input":"ls"}', {"type": "custom_tool_call", "name": "custom", "input": "ls"}),
    "tool_search": ('{"q":"x"}', {"type": "tool_search_call", "arguments": {"q": "x"}, "execution": "client"}),
    "apply_patch": (
        '{"type":"delete_file","path":"a"}',
        {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}},
    ),
    "shell": (
        '{"commands":["ls"]}',
        {"type": "shell_call", "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None}},
    ),
    "local_shell": (
        '{"command":["ls"]}',
        {"type": "local_shell_call", "action": {"type": "exec", "command": ["ls"], "env": {}}},
    ),
}


def typed(kind: str) -> dict[str, ToolRef]:
    return {kind: ToolRef(kind, kind)}


@pytest.mark.parametrize("kind", TYPED)
def test_a_typed_call_comes_back_as_its_own_item(kind: str) -> None:
    arguments, fields = TYPED[kind]
    chunks = [calls(call(0, kind, arguments[:5], "c1")), calls(call(0, None, arguments[5:])), STOP]
    events = relay(chunks, refs=typed(kind))
    parse(events)
    (item,) = events[-1]["response"]["output"]
    assert {key: item[key] for key in fields} == fields
    assert (item["call_id"], item.get("status", "completed")) == ("c1", "completed")


def test_a_custom_call_has_input_events() -> None:
    events = relay([calls(call(0, "custom", '{"input":"ls"}', "c1")), STOP], refs=typed("custom"))
    assert kinds(events)[2:-1] == [
        "response.output_item.added",
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
        "response.output_item.done",
    ]


def test_a_custom_call_without_arguments_has_empty_input() -> None:
    (item,) = output(calls(call(0, "custom", None, "c1")), STOP, refs=typed("custom"))
    assert item["input"] == ""


@pytest.mark.parametrize("kind", TYPED)
def test_a_typed_call_that_was_cut_is_left_out(kind: str) -> None:
    arguments, _ = TYPED[kind]
    chunks = [delta(content="Hi"), calls(call(0, kind, arguments[:-2], "c1")), delta("length")]
    response = response_of(*chunks, refs=typed(kind))
    assert (response["status"], texts(response["output"])) == ("incomplete", [(TEXT, "Hi")])


@pytest.mark.parametrize("kind", ["apply_patch", "shell", "local_shell"])
def test_a_typed_call_that_does_not_fit_is_a_function_call(kind: str) -> None:
    events = relay([calls(call(0, kind, F, "c1")), STOP], refs=typed(kind))
    assert texts(events[-1]["response"]["output"]) == [(kind, F)]
    assert kinds(events, "function_call_arguments") == [
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    ]


def test_a_namespaced_call_names_its_namespace() -> None:
    refs = {"mail__send": ToolRef("function", "send", "mail")}
    (item,) = output(calls(call(0, "mail__send", F, "c1")), STOP, refs=refs)
    assert (item["name"], item["namespace"]) == ("send", "mail")


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finish_reason", "status", "reason"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("function_call", "completed", None),
        ("eos_token", "completed", None),
        ("never heard of", "completed", None),
        (None, "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("max_tokens", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_a_finish_reason_decides_the_status(finish_reason: str | None, status: str, reason: str | None) -> None:
    events = relay([delta(content="Hi"), delta(finish_reason)])
    parse(events)
    response = events[-1]["response"]
    assert (response["status"], response["output"][0]["status"]) == (status, status)
    assert response["incomplete_details"] == ({"reason": reason} if reason else None)
    assert response["completed_at"] == (2 if status == "completed" else None)


@pytest.mark.parametrize("finish_reason", ["error", "abort"])
def test_a_finish_reason_that_says_the_backend_gave_up_is_raised(finish_reason: str) -> None:
    stream = machine()
    stream.feed(delta(finish_reason, content="Hi"))
    with pytest.raises(UpstreamBroken, match=finish_reason):
        stream.close()


def test_a_filtered_answer_without_text_is_one_empty_incomplete_message() -> None:
    response = response_of(delta(content=""), delta("content_filter"))
    assert (response["status"], texts(response["output"])) == ("incomplete", [(TEXT, "")])


def test_ended_tells_whether_a_finish_reason_came() -> None:
    stream = machine()
    stream.feed(delta(content="Hi"))
    assert not stream.ended
    stream.feed(STOP)
    assert stream.ended


@pytest.mark.parametrize(("said", "told"), [(None, "default"), ("auto", "default"), ("priority", "priority")])
def test_the_service_tier_is_the_backends(said: str | None, told: str) -> None:
    assert response_of({**message(content="Hi"), "service_tier": said})["service_tier"] == told


# -- usage -------------------------------------------------------------------------------------------------------------


def told(usage: Json) -> tuple[int, ...]:
    """Input, cached, output, reasoning, total."""
    details = (usage["input_tokens_details"]["cached_tokens"], usage["output_tokens_details"]["reasoning_tokens"])
    return usage["input_tokens"], details[0], usage["output_tokens"], details[1], usage["total_tokens"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (3, 0, 4, 0, 7)),
        ({"prompt_tokens_details": None, "completion_tokens_details": None}, (3, 0, 4, 0, 7)),
        ({"prompt_tokens_details": {"cached_tokens": 2}}, (3, 2, 4, 0, 7)),
        ({"prompt_cache_hit_tokens": 2}, (3, 2, 4, 0, 7)),
        ({"completion_tokens_details": {"reasoning_tokens": 1}}, (3, 0, 4, 1, 7)),
        ({"reasoning_tokens": 1}, (3, 0, 4, 1, 7)),
    ],
)
def test_usage_is_read_in_every_spelling(fields: Json, expected: tuple[int, ...]) -> None:
    assert told(response_of({**message(content="Hi"), "usage": {**USAGE, **fields}})["usage"]) == expected


@pytest.mark.parametrize(
    "chunks",
    [
        [STOP, {"choices": [], "usage": USAGE}],
        [{**delta("stop"), "usage": USAGE}],
        [STOP, {"choices": [{"index": 0, "delta": {}}], "usage": USAGE}],
        [{**delta(content="a"), "usage": {"prompt_tokens": 3, "completion_tokens": 1}}, {**STOP, "usage": USAGE}],
        [{"choices": [], "usage": USAGE}, {**delta("stop"), "usage": None}],
    ],
    ids=["own chunk", "finish chunk", "LiteLLM", "every chunk", "null after it"],
)
def test_usage_is_found_on_whatever_chunk_it_comes(chunks: list[Json]) -> None:
    assert told(response_of(*chunks)["usage"]) == (3, 0, 4, 0, 7)


def test_usage_is_estimated_when_the_backend_gives_none() -> None:
    chunks = [delta(reasoning="12345678", content="12345678"), calls(call(0, "f", '{"a":12}', "c1")), STOP]
    assert told(response_of(*chunks, estimate_input_tokens=lambda: 5)["usage"]) == (5, 0, 6, 0, 11)


def test_typed_calls_count_in_the_estimate() -> None:
    refs = typed("shell") | typed("custom")
    chunks = [calls(call(0, "shell", '{"commands":["ls"]}', "a"), call(1, "custom", '{"input":"12345678"}', "b")), STOP]
    assert response_of(*chunks, refs=refs)["usage"]["output_tokens"] > 4


# -- failing -----------------------------------------------------------------------------------------------------------


def failed(*chunks: Json, **plan: Any) -> Json:
    """The response of a stream that fails after these chunks."""
    stream = machine(**plan)
    events = stream.start()
    for chunk in chunks:
        events = events + stream.feed(chunk)
    events = events + stream.fail(UpstreamBroken("It broke."))
    parse(events)
    return check(events)


def test_a_failure_tells_its_error_and_no_usage() -> None:
    response = failed()
    assert response["error"] == {"code": "server_error", "message": "It broke."}
    assert (response["status"], response["usage"], response["output"]) == ("failed", None, [])


def test_a_failure_tells_the_usage_that_came() -> None:
    assert failed({"choices": [], "usage": USAGE})["usage"]["total_tokens"] == 7


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        (delta(content="Hi"), (TEXT, "Hi")),
        (delta(refusal="No"), ("refusal", "No")),
        (delta(reasoning="Hm"), (SUMMARY, "Hm")),
        (calls(call(0, "f", '{"a', "c1")), ("f", '{"a')),
    ],
    ids=["text", "refusal", "reasoning", "call"],
)
def test_a_failure_keeps_what_was_said(chunk: Json, said: tuple[str, str]) -> None:
    response = failed(delta(content="First. "), calls(call(0, "g", G, "c0")), chunk)
    assert texts(response["output"]) == [(TEXT, "First. "), ("g", G), said]
    assert response["output"][-1].get("status", "incomplete") == "incomplete"


def test_a_failure_names_a_code_that_clients_know() -> None:
    (event,) = machine().fail(UpstreamRefused("Wait.", status=429))
    assert event["response"]["error"]["code"] == "rate_limit_exceeded"


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_events_are_not_changed_after_they_were_given() -> None:
    annotation = {"type": "url_citation", "url_citation": CITATION}
    chunks = [
        delta(reasoning="Hm", reasoning_details=[{"type": "reasoning.text", "text": "Hm"}]),
        with_logprobs(delta(content="Hi")),
        delta(annotations=[annotation]),
        with_logprobs(delta(content="Ho", annotations=[annotation])),
        calls(call(0, "f", F, "c1"), call(1, "g", G, "c2")),
        {**STOP, "usage": USAGE},
    ]
    stream = machine(logprobs=True)
    given, kept = [], []
    for events in [stream.start(), *(stream.feed(chunk) for chunk in chunks), stream.close(), stream.finish()]:
        given += events
        kept += copy.deepcopy(events)
    assert given == kept


def test_events_are_not_changed_by_a_later_step() -> None:
    stream = machine(logprobs=True)
    steps = [
        delta(content="Hi"),
        with_logprobs(delta(content="Ho")),
        calls(call(0, "f", '{"a', "c1")),
        delta(content="!"),
    ]
    given, kept = stream.start(), copy.deepcopy(stream.snapshot())
    texts_given = [copy.deepcopy(given)]
    for chunk in steps:
        events = stream.feed(chunk)
        given = [*given, *events]
        texts_given.append(copy.deepcopy(events))
    stream.fail(UpstreamBroken("It broke."))
    assert given == [event for events in texts_given for event in events]
    assert given[0]["response"] == kept


def test_chunks_are_not_changed() -> None:
    chunks = [delta(reasoning_details=[{"text": "a"}]), delta(reasoning_details=[{"text": "b"}], content="Hi"), STOP]
    before = copy.deepcopy(chunks)
    relay(chunks)
    assert chunks == before


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_machine_that_has_ended_leaves_nothing_to_the_garbage_collector() -> None:
    stream = machine()
    for chunk in (delta(content="Hi"), delta(content="!"), USAGE):
        stream.feed(chunk)
    stream.close()
    held = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert held() is None
    finally:
        gc.enable()
