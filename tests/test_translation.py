"""Windows to chat messages, and the settings of a request to the chat body, dialect by dialect."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rendering import (
    assistant,
    call,
    chat_call,
    chat_output,
    messages,
    output,
    reasoning,
    refused,
    rendered,
    user,
)
from samples import FUNCTION, PNG, SCHEMA

from translation import has_files

Json = dict[str, Any]
HI: Json = {"role": "user", "content": "Hi"}


def said(content: str, *calls: Json, **more: Any) -> Json:
    return {"role": "assistant", "content": content, **more, **({"tool_calls": list(calls)} if calls else {})}


# -- grouping ----------------------------------------------------------------------------------------------------------


def test_the_calls_of_one_turn_share_an_assistant_message_and_their_outputs_follow() -> None:
    found = messages(user(), call("a"), call("b"), output("a", "1"), output("b", "2"))
    assert [HI, said("", chat_call("a"), chat_call("b")), chat_output("a", "1"), chat_output("b", "2")] == found


def test_outputs_stand_in_the_order_of_the_calls_whatever_order_they_came_in() -> None:
    found = messages(call("a"), call("b"), output("b", "2"), output("a", "1"))
    assert [chat_output("a", "1"), chat_output("b", "2")] == found[1:]


def test_a_call_after_an_output_is_a_turn_of_its_own() -> None:
    found = messages(call("a"), output("a"), call("b"), output("b"))
    assert [said("", chat_call("a")), chat_output("a"), said("", chat_call("b")), chat_output("b")] == found


def test_text_before_a_call_is_the_content_of_the_calling_message() -> None:
    assert said("Let me look.", chat_call("a")) == messages(assistant("Let me look."), call("a"), output("a"))[0]


def test_text_after_calls_joins_the_same_message() -> None:
    found = messages(assistant("One."), call("a"), assistant("Two."), output("a"))
    assert [said("One.\nTwo.", chat_call("a")), chat_output("a")] == found


def test_a_user_message_between_parallel_outputs_waits_for_the_last() -> None:
    found = messages(call("a"), call("b"), output("a"), user(), output("b"))
    assert [said("", chat_call("a"), chat_call("b")), chat_output("a"), chat_output("b"), HI] == found


def test_a_user_message_between_a_call_and_its_output_waits_for_it() -> None:
    assert [said("", chat_call("a")), chat_output("a"), HI] == messages(call("a"), user(), output("a"))


def test_two_assistant_messages_stay_two() -> None:
    assert [said("a"), said("b"), HI] == messages(assistant("a"), assistant("b"), user())


def test_an_empty_assistant_message_is_left_out() -> None:
    assert messages(user(), assistant(""), user()) == [HI, HI]


def test_images_in_an_output_follow_all_outputs_in_a_user_message() -> None:
    seen = [{"type": "input_text", "text": "a view"}, {"type": "input_image", "image_url": PNG}]
    found = messages(call("a"), call("b"), output("a", seen), output("b", seen[1:]))
    image = {"type": "image_url", "image_url": {"url": PNG}}
    both = {"role": "user", "content": [image, image]}
    assert [chat_output("a", "a view"), chat_output("b", ""), both] == found[1:]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([output("x")], "No tool call found for function call output with call_id x."),
        ([output("x"), call("x")], "No tool call found for function call output with call_id x."),
        ([call("x")], "No tool output found for function call x."),
        ([call("x"), call("x"), output("x")], "Duplicate item found with id x. Remove duplicate items"),
        ([call("x"), output("x"), output("x")], "Duplicate item found with id x. Remove duplicate items"),
    ],
)
def test_calls_and_outputs_that_do_not_pair_are_named(items: list[Json], message: str) -> None:
    status, code, param, found = refused(input=[user(), *items])
    assert (400, None, "input", message) == (status, code, param, found[: len(message)])


def test_a_call_that_was_cut_short_needs_no_output() -> None:
    assert messages(user(), call("a", arguments='{"ci', status="incomplete"), user()) == [HI, HI]


def test_a_cut_call_keeps_its_id_from_being_given_again() -> None:
    assert {"a", "b"} == rendered(input=[call("a", status="incomplete"), call("b"), output("b")]).call_ids


# -- reasoning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "field"),
    [
        ("generic", {}),
        ("openai", {}),
        ("mistral", {}),
        ("vllm", {"reasoning": "hm"}),
        ("ollama", {"reasoning": "hm"}),
        ("llamacpp", {"reasoning_content": "hm"}),
        ("sglang", {"reasoning_content": "hm"}),
        ("deepseek", {"reasoning_content": "hm"}),
    ],
)
def test_reasoning_goes_back_with_its_message_where_the_dialect_wants_it(dialect: str, field: Json) -> None:
    assert [HI, said("a", **field)] == messages(user(), reasoning("hm"), assistant("a"), dialect=dialect)


def test_reasoning_belongs_to_the_calls_that_follow_it() -> None:
    found = messages(reasoning("r1"), call("a"), output("a"), reasoning("r2"), assistant("x"), dialect="vllm")
    assert [said("", chat_call("a"), reasoning="r1"), chat_output("a"), said("x", reasoning="r2")] == found


def test_reasoning_after_a_call_begins_another_message() -> None:
    found = messages(call("a"), reasoning("r"), call("b"), output("a"), output("b"), dialect="vllm")
    assert [
        said("", chat_call("a")),
        chat_output("a"),
        said("", chat_call("b"), reasoning="r"),
        chat_output("b"),
    ] == found


def test_reasoning_between_outputs_waits_for_the_next_message() -> None:
    found = messages(call("a"), call("b"), output("a"), reasoning("r"), output("b"), assistant("x"), dialect="vllm")
    assert said("x", reasoning="r") == found[-1]


def test_reasoning_without_a_message_is_not_sent() -> None:
    assert messages(user(), reasoning("r"), user(), dialect="vllm") == [HI, HI]


def test_the_raw_text_is_sent_rather_than_the_summary() -> None:
    item = {**reasoning("short"), "content": [{"type": "reasoning_text", "text": "long"}]}
    assert said("a", reasoning="long") == messages(item, assistant("a"), dialect="vllm")[0]


def test_a_backends_own_records_go_back_unmodified_and_in_order() -> None:
    details = [{"type": "reasoning.encrypted", "data": "x", "index": 1}, {"type": "reasoning.text", "text": "y"}]
    item = {**reasoning("y"), "reasoning_details": details}
    assert said("a", reasoning_details=details) == messages(item, assistant("a"), dialect="openrouter")[0]


# -- system messages ---------------------------------------------------------------------------------------------------


def system(text: str, role: str = "developer") -> Json:
    return {"role": role, "content": text}


def test_instructions_and_leading_system_items_are_one_system_message() -> None:
    found = messages(system("b"), system("c", "system"), user(), instructions="a")
    assert found == [{"role": "system", "content": "a\n\nb\n\nc"}, HI]


def test_no_system_message_is_made_of_nothing() -> None:
    assert messages(system(""), user(), instructions="") == [HI]


@pytest.mark.parametrize(
    ("dialect", "late"),
    [
        ("generic", {"role": "user", "content": "<system>\nb\n</system>"}),
        ("llamacpp", {"role": "user", "content": "<system>\nb\n</system>"}),
        ("openai", {"role": "system", "content": "b"}),
        ("openrouter", {"role": "system", "content": "b"}),
    ],
)
def test_a_late_system_item_stays_in_its_place(dialect: str, late: Json) -> None:
    found = messages(system("a"), user(), system("b"), assistant("x"), dialect=dialect)
    assert [{"role": "system", "content": "a"}, HI, late, said("x")] == found


# -- strict templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["mistral", "gemini", "tgi"])
def test_neighbours_of_one_role_are_merged_where_templates_raise(dialect: str) -> None:
    found = messages(user("a"), user("b"), assistant("c"), assistant("d"), user("e"), dialect=dialect)
    assert [(m["role"], m["content"]) for m in found] == [("user", "a\n\nb"), ("assistant", "c\n\nd"), ("user", "e")]


def test_neighbours_with_images_are_merged_part_by_part() -> None:
    found = messages(user("a"), user([{"type": "input_image", "image_url": PNG}]), dialect="gemini")
    image = {"type": "image_url", "image_url": {"url": PNG}}
    assert [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}] == found


def test_text_and_the_calls_after_it_are_merged() -> None:
    found = messages(user(), assistant("a"), reasoning("r"), call("c"), output("c"), dialect="gemini")
    assert [HI, said("a", chat_call("c")), chat_output("c")] == found


def test_mistral_gets_an_assistant_message_between_tool_and_user() -> None:
    found = messages(call("a"), output("a"), user(), dialect="mistral")
    assert [message["role"] for message in found] == ["assistant", "tool", "assistant", "user"]
    assert found[2]["content"] == "OK."


def test_mistral_gets_short_call_ids_that_pair() -> None:
    found = messages(call("call_with_a_long_id"), output("call_with_a_long_id"), dialect="mistral")
    short = found[0]["tool_calls"][0]["id"]
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", short)
    assert short == found[1]["tool_call_id"]


# -- settings ----------------------------------------------------------------------------------------------------------


def sent(dialect: str = "generic", **body: Any) -> Json:
    """The chat body without model and messages."""
    return {k: v for k, v in rendered(dialect, **body).body.items() if k not in ("model", "messages")}


def test_nothing_is_sent_that_the_client_did_not_set() -> None:
    assert sent() == {}


@pytest.mark.parametrize(
    ("dialect", "field"),
    [
        ("generic", "max_tokens"),
        ("ollama", "max_tokens"),
        ("mistral", "max_tokens"),
        ("openai", "max_completion_tokens"),
    ],
)
def test_the_token_limit_has_one_name_for_each_dialect(dialect: str, field: str) -> None:
    assert {field: 100} == sent(dialect, max_output_tokens=100)


def test_sampling_is_sent_as_it_was_set() -> None:
    set_by_client = {"temperature": 0.0, "top_p": 0.5, "presence_penalty": 0.1, "frequency_penalty": -0.1}
    assert set_by_client == sent(**set_by_client)


@pytest.mark.parametrize("dialect", ["gemini", "mistral"])
def test_penalties_that_the_backend_refuses_are_named(dialect: str) -> None:
    chat = rendered(dialect, presence_penalty=0.1, frequency_penalty=0.1)
    assert (("presence_penalty", "frequency_penalty"), {"model", "messages"}) == (chat.ignored, chat.body.keys())


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 0}, {"logprobs": True}),
        ({"top_logprobs": 3}, {}),
    ],
)
def test_logprobs_are_asked_for_when_the_client_includes_them(body: Json, wanted: Json) -> None:
    assert wanted == sent(**body)


def test_logprobs_that_the_backend_cannot_give_are_named() -> None:
    chat = rendered("groq", include=["message.output_text.logprobs"])
    assert (chat.ignored, "logprobs" in chat.body) == (("include=message.output_text.logprobs",), False)


@pytest.mark.parametrize(
    ("dialect", "wanted", "ignored"),
    [
        ("generic", {"reasoning_effort": "low"}, ()),
        ("openai", {"reasoning_effort": "low"}, ()),
        ("llamacpp", {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"}}, ()),
        ("transformers", {}, ("reasoning.effort",)),
        ("mistral", {}, ("reasoning.effort",)),
        ("tgi", {}, ("reasoning.effort",)),
    ],
)
def test_the_effort_is_said_as_the_dialect_can(dialect: str, wanted: Json, ignored: tuple[str, ...]) -> None:
    body = {"reasoning": {"effort": "low"}}
    assert (wanted, ignored) == (sent(dialect, **body), rendered(dialect, **body).ignored)


def test_no_effort_turns_thinking_off_in_a_template() -> None:
    wanted = {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "none"}}
    assert wanted == sent("llamacpp", reasoning={"effort": "none"})


SCHEMA_FORM = {"type": "json_schema", "name": "a", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (None, {}),
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"type": "json_object"}),
        (SCHEMA_FORM, {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}),
        (
            {**SCHEMA_FORM, "strict": False, "description": "d"},
            {
                "type": "json_schema",
                "json_schema": {"name": "a", "description": "d", "schema": SCHEMA, "strict": False},
            },
        ),
        (
            {**SCHEMA_FORM, "strict": None, "description": None},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        ),
    ],
)
def test_a_format_is_nested_for_chat(form: Json | None, wanted: Json) -> None:
    assert wanted == sent(text={"format": form}).get("response_format", {})


@pytest.mark.parametrize(
    ("dialect", "tools", "ignored"),
    [
        ("generic", [FUNCTION], ()),
        ("transformers", [], ("text.format",)),
        ("gemini", [], ()),
        ("gemini", [FUNCTION], ("text.format",)),
        ("tgi", [FUNCTION], ("text.format",)),
        ("groq", [FUNCTION], ("text.format",)),
    ],
)
def test_a_format_that_the_backend_refuses_is_named(dialect: str, tools: list[Json], ignored: tuple[str, ...]) -> None:
    chat = rendered(dialect, tools=tools, text={"format": SCHEMA_FORM})
    assert (ignored, not ignored) == (chat.ignored, "response_format" in chat.body)


@pytest.mark.parametrize(
    ("body", "dialect", "wanted", "ignored"),
    [
        ({"text": {"verbosity": "low"}}, "openai", {"verbosity": "low"}, ()),
        ({"text": {"verbosity": "low"}}, "generic", {}, ("text.verbosity",)),
        ({"service_tier": "flex"}, "openai", {"service_tier": "flex"}, ()),
        ({"service_tier": "flex"}, "generic", {}, ("service_tier",)),
        ({"service_tier": "auto"}, "openai", {}, ()),
        ({"truncation": "auto"}, "generic", {}, ()),
        ({"truncation": "disabled"}, "generic", {}, ()),
        ({"store": True}, "generic", {}, ()),
        ({"store": False}, "generic", {}, ()),
        ({"reasoning": {"mode": "pro"}}, "generic", {}, ("reasoning.mode",)),
        ({"reasoning": {"context": "current_turn"}}, "generic", {}, ("reasoning.context",)),
        ({"reasoning": {"context": "all_turns"}}, "generic", {}, ()),
        ({"include": ["reasoning.encrypted_content"]}, "generic", {}, ()),
        ({"zeta": 1, "moderation": {}}, "generic", {}, ("moderation", "zeta")),
        ({"context_management": [{"type": "compaction"}]}, "generic", {}, ()),
    ],
)
def test_what_is_not_sent_is_named(body: Json, dialect: str, wanted: Json, ignored: tuple[str, ...]) -> None:
    assert (wanted, ignored) == (sent(dialect, **body), rendered(dialect, **body).ignored)


def update(**sections: Any) -> Json:
    return {"type": "configuration_update", **sections}


def test_the_newest_configuration_update_wins_over_the_request() -> None:
    items = [update(reasoning={"effort": "low"}), user(), update(reasoning={"effort": "high"}), user()]
    assert sent(input=items, reasoning={"effort": "minimal"}) == {"reasoning_effort": "high"}


def test_an_update_of_one_setting_leaves_the_others() -> None:
    items = [update(text={"format": {"type": "json_object"}}), user(), update(reasoning={"effort": "low"}), user()]
    found = sent("openai", input=items, text={"verbosity": "high"})
    assert found == {"verbosity": "high", "response_format": {"type": "json_object"}, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (user([{"type": "input_file", "file_data": "aGk="}]), True),
        (output("c", [{"type": "input_file", "file_data": "aGk="}]), True),
        (user([{"type": "input_text", "text": "a"}]), False),
        (user("input_file"), False),
        (user([5]), False),
    ],
)
def test_a_request_with_files_is_known_before_it_is_rendered(item: Json, found: bool) -> None:
    assert found is has_files([item])
