"""The passes over earlier turns: what is left out of a history, what is refused, and what is named."""

from __future__ import annotations

from typing import Any

import pytest

from errors import InvalidRequest, NotFound
from history import check_ids, mended, references, refuse_repeated, resolved, sealable, unsealed

Json = dict[str, Any]


def user(text: str = "Hi", **fields: Any) -> Json:
    return {"type": "message", "role": "user", "content": text, **fields}


def call(call_id: str | None, kind: str = "function_call", **fields: Any) -> Json:
    return {"type": kind, "call_id": call_id, **fields}


def output(call_id: str | None, kind: str = "function_call_output", **fields: Any) -> Json:
    return {"type": kind, "call_id": call_id, "output": "done", **fields}


# -- calls and outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_history_in_which_every_call_is_answered_stays_as_it_is(is_finished: bool) -> None:
    history = [user(), call("a"), output("a"), call("b")]
    assert mended(history, 3, is_finished, [output("b")]) == (history, [])


def test_an_unanswered_call_of_a_finished_newest_turn_stays_because_the_client_has_to_answer_it() -> None:
    history = [user(), call("a")]
    assert mended(history, 0, True, [user()]) == (history, [])


def test_an_unanswered_call_of_an_unfinished_turn_is_left_out_and_named() -> None:
    history = [user(), call("a")]
    assert mended(history, 0, False, [user()]) == ([user()], ["history.function_call=a"])


def test_an_unanswered_call_of_an_earlier_turn_is_left_out_and_named() -> None:
    history = [user(), call("a", "custom_tool_call"), user("Go on")]
    assert mended(history, 2, True, []) == ([user(), user("Go on")], ["history.custom_tool_call=a"])


def test_an_output_whose_call_was_removed_is_left_out_and_named() -> None:
    history = [user(), output("a", "shell_call_output")]
    assert mended(history, 0, True, []) == ([user()], ["history.shell_call_output=a"])


@pytest.mark.parametrize(
    ("made", "answer"),
    [
        (call("a", "tool_search_call"), output("a", "tool_search_output")),
        (call("a", "apply_patch_call"), output("a", "apply_patch_call_output")),
        (call(None, "local_shell_call", id="lsh_1"), output(None, "local_shell_call_output", id="lsh_1")),
    ],
)
def test_typed_calls_are_tied_to_their_outputs(made: Json, answer: Json) -> None:
    assert mended([made, answer], 2, True, []) == ([made, answer], [])


def test_the_servers_own_tool_search_is_tied_to_nothing() -> None:
    history = [call(None, "tool_search_call"), output(None, "tool_search_output"), user()]
    assert mended(history, 2, False, []) == (history, [])


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_an_item_that_the_history_has_already_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        refuse_repeated([user(id="msg_1")], [user(), user(id="msg_1")])
    assert caught.value.message == (
        "Duplicate item found with id msg_1. Remove duplicate items from your input and try again."
    )
    assert caught.value.param == "input"


def test_items_without_ids_are_never_repeated() -> None:
    refuse_repeated([user(), user(id=None)], [user(), user(id=None)])


@pytest.mark.parametrize("given", [5, [], {"a": 1}, True])
def test_an_id_that_is_no_string_is_refused_with_its_path(given: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_ids([user(), user(id=given)], "input")
    assert (caught.value.param, caught.value.error_code) == ("input[1].id", "invalid_type")


# -- references --------------------------------------------------------------------------------------------------------


def test_references_are_known_with_and_without_their_type() -> None:
    items = [user(), {"type": "item_reference", "id": "msg_1"}, {"id": "rs_1"}]
    assert references(items) == ["msg_1", "rs_1"]


def test_a_reference_is_replaced_by_what_it_names() -> None:
    assert resolved([user(), {"id": "msg_1"}], {"msg_1": user("Earlier")}) == [user(), user("Earlier")]


def test_a_reference_to_nothing_is_a_404_that_names_it() -> None:
    with pytest.raises(NotFound) as caught:
        resolved([{"type": "item_reference", "id": "msg_9"}], {})
    assert caught.value.message.startswith("Item with id 'msg_9' not found.")


# -- sealed reasoning --------------------------------------------------------------------------------------------------

DETAILS = [{"type": "reasoning.text", "signature": "s"}]


def test_a_sealed_thought_gets_its_text_and_details_back() -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "blob"}
    (opened,), foreign = unsealed([item], lambda item_id, blob: sealable(f"{item_id} {blob}", DETAILS), "input")
    text = {"type": "reasoning_text", "text": "rs_1 blob"}
    assert (opened, foreign) == ({**item, "content": [text], "reasoning_details": DETAILS}, [])


def test_a_blob_of_another_server_is_named_and_the_rest_of_the_item_stays() -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": "blob"}
    assert unsealed([user(), item], lambda *_: None, "input") == ([user(), item], ["input[1].encrypted_content"])


@pytest.mark.parametrize("blob", [None, "", 5])
def test_a_thought_without_a_blob_is_not_opened(blob: Any) -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": blob}
    assert unsealed([item], lambda *_: None, "input") == ([item], [])
