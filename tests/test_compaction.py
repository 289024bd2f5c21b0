"""When a window is compacted, what of it stays, how texts are cut, and how a model is asked for the summary."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ITEMS

from compaction import CompactionSettings, Plan, Room, cut, in_turns, planned, room_for, threshold_of, truncated
from folding import Contents, record_of
from request import ContextManagement, TurnRequest
from summaries import PROMPT, Answer, Question, Summariser, in_pieces, transcript
from upstream_errors import UpstreamGarbled, UpstreamTimeout, WindowExceeded

Json = dict[str, Any]
THIRD = 1 / 3


def user(content: str | list[Json]) -> Json:
    return {"role": "user", "content": content}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def text_part(text: str) -> Json:
    return {"type": "input_text", "text": text}


def thought(text: str, **fields: Any) -> Json:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}], **fields}


def call(call_id: str, arguments: str = "{}") -> Json:
    return {"type": "function_call", "call_id": call_id, "name": "look", "arguments": arguments}


def output(call_id: str, text: str = "done") -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def update(effort: str) -> Json:
    return {"type": "configuration_update", "reasoning": {"effort": effort}}


def tokens_of(item: Json) -> float:
    """A token for each character of any text, and 800 for each image."""
    return _characters({key: value for key, value in item.items() if key not in ("role", "call_id")})


def _characters(value: Any) -> float:
    if isinstance(value, dict):
        return sum(
            800 if key == "image_url" else _characters(each) for key, each in value.items() if key not in ("type", "id")
        )
    return sum(map(_characters, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0


def window(history: list[Json], new: list[Json], summary: str = "") -> Contents:
    return Contents([], [], summary, history, new)


ROOM = Room(2000, 500, 300, 600, 1000)


def plan_of(history: list[Json], new: list[Json], room: Room = ROOM, summary: str = "") -> Plan:
    return planned(window(history, new, summary), room, tokens_of)


# -- when --------------------------------------------------------------------------------------------------------------

OURS: list[int | None] = [None]


@pytest.mark.parametrize(
    ("asked", "settings", "window_tokens", "expected"),
    [
        ([], {}, 10_000, None),
        ([], {"threshold_tokens": 5000}, None, 5000),
        ([], {"threshold_tokens": 5000}, 8000, 5000),
        ([], {"threshold_fraction": 0.5}, 8000, 4000),
        ([], {"threshold_fraction": 0.5}, None, None),
        ([], {"threshold_fraction": THIRD}, 1000, 333),
        ([], {"threshold_tokens": 5000, "threshold_fraction": 0.5}, 8000, 4000),
        ([], {"threshold_tokens": 5000, "threshold_fraction": 0.5}, 20_000, 5000),
        ([], {"threshold_tokens": 5000, "threshold_fraction": 0.5}, None, 5000),
        ([1500], {}, None, 1500),
        ([1500], {"threshold_tokens": 1000, "threshold_fraction": 0.1}, 10_000, 1500),
        ([3000, 1500, None], {}, 10_000, 1500),
        (OURS, {}, 10_000, 8000),
        (OURS, {}, None, None),
        (OURS, {"threshold_tokens": 9000}, 10_000, 9000),
        (OURS, {"threshold_fraction": 0.5}, 10_000, 5000),
    ],
)
def test_the_threshold_is_the_clients_or_the_lowest_of_the_settings(
    asked: list[int | None], settings: Json, window_tokens: int | None, expected: int | None
) -> None:
    entries = [ContextManagement("compaction", threshold) for threshold in asked]
    request = TurnRequest(model="m", context_management=entries)
    assert threshold_of(request, CompactionSettings(**settings), window_tokens) == expected


def test_without_context_management_and_settings_there_is_no_threshold() -> None:
    assert threshold_of(TurnRequest(model="m"), CompactionSettings(), 10_000) is None


@pytest.mark.parametrize(
    ("tokens", "is_asked", "expected"),
    [
        (10_000, False, Room(10_000, 2000, 3000, 4000, 500)),
        (10_000, True, Room(10_000, 2000, 3000, 0, 500)),
        (4000, False, Room(4000, 1000, 1200, 1600, 500)),
    ],
)
def test_a_room_is_parted_between_summary_system_messages_newest_turns_and_users(
    tokens: float, is_asked: bool, expected: Room
) -> None:
    assert room_for(tokens, CompactionSettings(user_tokens=500), is_asked=is_asked) == pytest.approx(expected)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_users_and_the_newest_groups_stay_and_all_that_was_said_before_is_told() -> None:
    early = [user("Why?"), call("a"), output("a", "x" * 700), assistant("So.")]
    newest = [user("And now?"), thought("hm"), call("b"), output("b")]
    plan = plan_of(early[:3], [*early[3:], *newest])
    assert (plan.standing, plan.users, plan.late) == ([], [user("Why?")], [early[3], *newest])
    assert (plan.earlier, plan.lost) == ("", early[:3])


def test_nothing_is_lost_of_a_window_that_fits() -> None:
    items = [user("Why?"), call("a"), output("a"), user("And now?")]
    plan = plan_of(items[:3], items[3:], summary="So far.")
    assert (plan.users, plan.late, plan.earlier, plan.lost) == ([], items, "So far.", [])


def test_a_summary_may_take_twice_what_is_asked_for_where_nothing_else_needs_it() -> None:
    plan = plan_of([], [user("x" * 100)])
    assert (plan.summary_tokens, plan.most_tokens) == (500, 1000)


def test_the_words_around_each_user_message_count() -> None:
    plan = plan_of([user("u")] * 300, [], ROOM._replace(late=0.0, users=math.inf))
    assert 1500 < tokens_of(record_of(plan.users, "s" * 500)) <= 2000


def test_a_user_message_whose_group_cannot_be_kept_stays_for_itself() -> None:
    newest = [thought("x" * 5000), user("Go on, please.")]
    plan = plan_of([user("Hello"), assistant("Hi")], newest)
    assert (plan.users, plan.late) == ([user("Hello"), user("Go on, please.")], [])
    assert plan.lost == [user("Hello"), assistant("Hi"), *newest]


def test_reasoning_alone_at_the_end_does_not_stay_when_it_is_too_long() -> None:
    plan = plan_of([user("Hello")], [thought("x" * 5000)])
    assert (plan.users, plan.late) == ([user("Hello")], [])


def test_of_the_newest_group_outputs_are_cut_and_the_calls_stay_whole() -> None:
    group = [thought("hm"), call("a", '{"path": "a"}'), output("a", "x" * 5000)]
    plan = plan_of([], [user("Look."), *group])
    assert (plan.late[:2], plan.late[2]["call_id"], plan.lost[-3:]) == (group[:2], "a", group)
    assert 300 < len(plan.late[2]["output"]) <= 600


@pytest.mark.parametrize("is_asked", [True, False])
def test_of_the_group_of_a_call_that_waits_only_such_calls_and_their_reasoning_have_to_stay(is_asked: bool) -> None:
    group = [thought("hm"), call("a", "x" * 5000), call("b"), output("a", "y" * 5000)]
    plan = plan_of([user("Go")], group, ROOM._replace(late=0.0) if is_asked else ROOM)
    assert (plan.users, plan.late) == ([user("Go")], [group[0], call("b")])
    assert [item for item in (group[1], group[3]) if item not in plan.lost] == []


def test_tools_stay_whatever_they_take_and_whatever_role_they_have() -> None:
    tools = [
        {"type": "additional_tools", **role, "tools": [{"name": "x" * 900}]} for role in ({}, {"role": "developer"})
    ]
    plan = plan_of([*tools, system("s" * 900)], [user("Hi")])
    assert (plan.standing[:2], plan.lost[0]) == (tools, system("s" * 900))
    assert 200 < len(plan.standing[2]["content"]) <= 300


def test_system_messages_that_are_too_long_each_give_the_same_part() -> None:
    kept = plan_of([system("a" * 800), system("b" * 1600)], [user("Hi")]).standing
    assert [item["content"][0] + item["content"][-1] for item in kept] == ["aa", "bb"]
    assert [60 < len(kept[0]["content"]) <= 100, 150 < len(kept[1]["content"]) <= 200] == [True, True]


def test_of_equal_standing_items_the_newest_stays_in_its_place() -> None:
    repeated = [system("Be brief."), update("low"), user("a"), update("high"), system("Be brief."), update("low")]
    assert plan_of(repeated, [user("b")]).standing == [update("high"), system("Be brief."), update("low")]


def test_a_summary_that_is_longer_than_the_new_room_is_told_again() -> None:
    plan = plan_of([], [user("Hi")], summary="s" * 900)
    assert (plan.earlier, len(plan.lost), "s" * 900 in transcript([plan.lost[0]])) == ("", 1, True)


def picture(mebibytes: int) -> Json:
    return user([{"type": "input_image", "image_url": f"data:image/png;base64,{'A' * 2**20 * mebibytes}"}])


def test_the_picture_that_is_asked_about_stays_whatever_it_takes() -> None:
    assert Plan([], [], [picture(5)], "", [], 0, 0).fold("s").late == [picture(5)]


def test_a_fold_holds_no_blob_beside_the_text_of_reasoning() -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "e"}
    late = [thought("hm", encrypted_content="e"), sealed, call("a")]
    assert Plan([], [], late, "", [], 0, 0).fold("s").late == [thought("hm"), sealed, call("a")]


def test_the_work_of_a_plan_grows_with_the_items_and_not_with_their_square() -> None:
    asked: list[Json] = []
    count = 400
    planned(
        window([user("m") for _ in range(count)], [assistant("x" * 5000)]),
        ROOM._replace(users=math.inf, all=math.inf),
        lambda item: asked.append(item) or 1000.0,
    )
    assert len(asked) <= 10 * count


# -- truncation --------------------------------------------------------------------------------------------------------

TURNS = [[user("1"), assistant("one")], [user("2"), call("a"), output("a")], [user("3"), assistant("three")]]
HISTORY = [item for turn in TURNS for item in turn]


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [(10_000, HISTORY[2:]), (26, HISTORY[2:]), (20, HISTORY[5:]), (10, HISTORY[5:]), (6, []), (0, [])],
)
def test_whole_oldest_turns_go_and_the_newest_stays(tokens: int, kept: list[Json]) -> None:
    assert truncated(window(HISTORY, [user("four")]), tokens, tokens_of) == window(kept, [user("four")])


def test_a_turn_begins_with_the_group_of_a_user_message() -> None:
    asked, called = [thought("hm"), user("b")], [call("c"), user("c"), output("c")]
    assert in_turns([user("a"), *asked], called) == [[user("a")], asked, called]


def test_system_messages_and_tools_of_a_request_without_a_past_stay() -> None:
    tools = {"type": "additional_tools", "tools": []}
    found = truncated(window([], [system("Be brief."), tools, *HISTORY, user("four")]), 0, tokens_of)
    assert [*found.standing, *found.history, *found.new] == [system("Be brief."), tools, user("four")]


def test_a_system_message_of_the_newest_input_does_not_go_with_the_turn_before_it() -> None:
    found = truncated(window(HISTORY, [system("In French."), user("four")]), 0, tokens_of)
    assert [*found.standing, *found.history, *found.new] == [system("In French."), user("four")]


def test_an_output_that_is_new_keeps_the_turn_of_its_call() -> None:
    contents = window([*HISTORY[:2], user("2"), call("a")], [output("a")])
    assert truncated(contents, 0, tokens_of) == window([user("2"), call("a")], [output("a")])


# -- cutting -----------------------------------------------------------------------------------------------------------

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}


def test_an_item_that_fits_is_given_back_itself() -> None:
    item = user("Hi")
    assert cut(item, 2, tokens_of) is item


def test_short_texts_beside_a_long_one_stay_as_they_are() -> None:
    question, nothing = text_part("Which of these files is wrong?"), text_part("")
    found = cut(user([question, nothing, text_part("z" * 5000)]), 200, tokens_of)
    assert found is not None
    assert found["content"][:2] == [question, nothing]
    assert 100 < len(found["content"][2]["text"]) <= 170


def test_no_text_grows_by_being_cut() -> None:
    short = [text_part("x" * 20), text_part("y" * 20)]
    found = cut(user([*short, text_part("z" * 5000)]), 90, tokens_of)
    assert found is not None
    assert found["content"][:2] == short


@pytest.mark.parametrize("kind", ["input_image", "input_file", "input_audio", "computer_screenshot"])
def test_pictures_and_files_become_words_before_any_text_is_cut(kind: str) -> None:
    part = {"type": kind, "image_url": "data:,"}
    found = cut(user([text_part("t" * 50), part]), 100, tokens_of)
    assert found is not None
    assert found["content"][0] == text_part("t" * 50)
    assert found["content"][1]["text"] in ("[image]", "[file]", "[audio]")


def test_less_than_the_smallest_cut_is_not_worth_it() -> None:
    assert cut(user("x" * 500), 31, tokens_of) is None


# -- what a summariser reads -------------------------------------------------------------------------------------------

SAID = {
    "message": "USER: a\n[image]\n[audio]",
    "function_call": "ASSISTANT CALLS mcp__demo__add: {}",
    "function_call_output": "RESULT: a\n[image]\n[audio]",
    "custom_tool_call": 'ASSISTANT CALLS exec: {"input":"x"}',
    "custom_tool_call_output": "RESULT: ok",
    "tool_search_call": 'ASSISTANT CALLS tool_search: {"query":"q"}',
    "tool_search_output": "RESULT: Loaded tools: mcp__demo",
    "apply_patch_call": "ASSISTANT CALLS apply_patch: update_file a +b",
    "apply_patch_call_output": "RESULT: no such file",
    "shell_call": "ASSISTANT CALLS shell: ls",
    "shell_call_output": "RESULT: a",
    "local_shell_call": "ASSISTANT CALLS local_shell: ls",
    "local_shell_call_output": "RESULT: {}",
    "mcp_call": "ASSISTANT CALLS x__look: {}\n\nRESULT: o",
}
SAMPLES = {item.get("type", "message"): item for group in reversed(ITEMS) for item in group}


@pytest.mark.parametrize("kind", sorted(SAMPLES))
def test_each_item_is_told_as_the_model_was_told_of_it(kind: str) -> None:
    words = set(re.findall(r"[\w+\[\]]+", transcript([SAMPLES[kind]])))
    assert set(re.findall(r"[\w+\[\]]+", SAID.get(kind, ""))) <= words
    assert (kind in SAID) == bool(words)


def test_what_is_told_stands_in_its_order_and_nothing_of_what_says_nothing() -> None:
    assert transcript([user("a"), thought("hm"), assistant("b")]) == "USER: a\n\nASSISTANT: b"


@pytest.mark.parametrize("data", ["JVBERi0xLjQK", "/w==", "no base64"])
def test_a_file_that_cannot_be_read_here_does_no_harm(data: str) -> None:
    assert transcript([user([{"type": "input_file", "filename": "a.pdf", "file_data": data}])])


# -- pieces ------------------------------------------------------------------------------------------------------------


def quarter(text: str) -> float:
    return len(text.encode()) / 4


WORDS = st.lists(st.sampled_from(["word ", "a\n", "語語", "😀", "x" * 300, "\n"]), max_size=300).map("".join)


@settings(max_examples=150, deadline=None)
@given(WORDS | st.text(), st.integers(2, 500))
def test_pieces_are_the_whole_text_and_each_is_small_enough(text: str, tokens: int) -> None:
    pieces = in_pieces(text, tokens, quarter)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if not piece or quarter(piece) > tokens] == []
    assert len(pieces) <= 5 * quarter(text) / tokens + 5


def test_pieces_end_with_a_line_where_that_can_be() -> None:
    pieces = in_pieces("a line of text\n" * 100, 100, quarter)
    assert [piece for piece in pieces if not piece.endswith("\n")] == []


# -- the summary -------------------------------------------------------------------------------------------------------


class Model:
    """Gives one answer after the other, the last again and again; an error is raised."""

    def __init__(self, *answers: str | Answer | Exception, refused: Callable[[str], bool] = lambda text: False) -> None:
        self.questions: list[Question] = []
        self._answers = list(answers)
        self._refused = refused

    async def ask(self, question: Question) -> Answer:
        self.questions.append(question)
        assert len(self.questions) < 100
        if self._refused(self.pieces[-1]):
            raise WindowExceeded("too long")
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Answer(answer, False) if isinstance(answer, str) else answer

    @property
    def pieces(self) -> list[str]:
        return [each.text.split("<conversation>\n")[1].split("\n</conversation>")[0] for each in self.questions]

    async def summary(self, plan: Plan, prompt: str = PROMPT, window_tokens: float = math.inf) -> str:
        return await Summariser(self.ask, quarter, prompt, window_tokens).summary(plan)


def losing(*items: Json, earlier: str = "") -> Plan:
    """A summary of 100 tokens is asked for, and there is room for 150."""
    return Plan([], [], [], earlier, list(items), 100, 150)


LONG = [user("".join(f"line {n} of what was said\n" for n in range(2000)))]


async def test_a_model_is_asked_once_for_what_it_can_read_at_once() -> None:
    model = Model("  The summary.\n")
    assert await model.summary(losing(user("Hi"), thought("hm"), assistant("Hello"))) == "The summary."
    (question,) = model.questions
    assert (question.instructions, model.pieces) == (PROMPT, ["USER: Hi\n\nASSISTANT: Hello"])
    assert re.search(r"in at most \d{2} words\.$", question.text)
    assert "<record>" not in question.text
    assert question.answer_tokens > 200


async def test_a_prompt_of_the_settings_takes_the_place_of_the_built_in_one() -> None:
    model = Model("The summary.")
    await model.summary(losing(user("Hi")), prompt="Note the names.")
    assert model.questions[0].instructions == "Note the names."


async def test_what_says_nothing_needs_no_question() -> None:
    model = Model("never")
    assert (await model.summary(losing(thought("hm"), earlier="So far.")), model.questions) == ("So far.", [])


async def test_the_summary_so_far_is_in_every_question() -> None:
    model = Model("first", "second", "third", "fourth")
    last = await model.summary(losing(*LONG, earlier="zeroth"), window_tokens=5000)
    earlier = [each.text.split("\n</record>")[0].removeprefix("<record>\n") for each in model.questions]
    assert (earlier[:4], last) == (["zeroth", "first", "second", "third"], "fourth")


@pytest.mark.parametrize("window_tokens", [1200, 3000, 6000, 20_000])
async def test_a_long_conversation_is_asked_in_pieces_that_fit_and_are_in_order(window_tokens: int) -> None:
    model = Model("r" * 400)
    await model.summary(losing(*LONG, earlier="e" * 400), window_tokens=window_tokens)
    taken = [quarter(each.instructions) + quarter(each.text) + each.answer_tokens for each in model.questions]
    assert [tokens for tokens in taken if tokens > window_tokens] == []
    assert "".join(model.pieces) == transcript([LONG[0]])


async def test_what_would_take_too_many_questions_is_told_without_its_middle() -> None:
    model = Model("r")
    await model.summary(losing(user("the beginning"), *LONG * 20, user("the end")), window_tokens=1200)
    said = "".join(model.pieces)
    assert 30 <= len(model.questions) <= 40
    assert (said[:19], said[-13:]) == ("USER: the beginning", "USER: the end")
    assert "characters left out" in said


@pytest.mark.parametrize(
    ("answer", "fault"), [("", "empty"), (" \n", "empty"), ("x" * 601, "too long"), (Answer("half", True), "too long")]
)
async def test_an_unusable_summary_is_refused_and_asked_for_once_more(answer: str | Answer, fault: str) -> None:
    model = Model(answer, "The summary.")
    assert await model.summary(losing(user("Hi"))) == "The summary."
    first, second = (question.text for question in model.questions)
    assert second.removeprefix(first) == f" The last attempt was {fault}."


@pytest.mark.parametrize("answer", ["", "x" * 601, Answer("half", True)])
async def test_a_second_unusable_summary_fails_the_compaction(answer: str | Answer) -> None:
    model = Model(answer)
    with pytest.raises(UpstreamGarbled, match="could not be compacted: the model gave no usable summary") as failed:
        await model.summary(losing(user("Hi")))
    assert (failed.value.error_code, failed.value.http_status, len(model.questions)) == ("compaction_failed", 502, 2)


async def test_a_summary_of_just_the_length_allowed_is_taken() -> None:
    assert await Model("x" * 600).summary(losing(user("Hi"))) == "x" * 600


async def test_a_piece_that_the_backend_refuses_is_halved_and_nothing_of_it_is_left_out() -> None:
    model = Model("The summary.", refused=lambda piece: quarter(piece) > 4000)
    await model.summary(losing(*LONG, user("Bye")))
    taken = [piece for piece in model.pieces if quarter(piece) <= 4000]
    assert "".join(taken) == f"{transcript([LONG[0]])}\n\nUSER: Bye"
    assert len(taken) >= 4


async def test_a_backend_that_refuses_every_piece_fails_the_compaction_with_its_own_words() -> None:
    model = Model("never", refused=lambda piece: True)
    with pytest.raises(UpstreamGarbled, match="could not be compacted: too long") as failed:
        await model.summary(losing(*LONG))
    assert (failed.value.error_code, len(model.questions) < 20) == ("compaction_failed", True)


async def test_a_piece_of_one_character_is_not_halved_for_ever() -> None:
    model = Model("never", refused=lambda piece: True)
    with pytest.raises(UpstreamGarbled):
        await Summariser(model.ask, lambda text: 100.0 * len(text), PROMPT, math.inf).summary(losing(user("Hi")))


async def test_any_other_error_of_the_backend_goes_through() -> None:
    with pytest.raises(UpstreamTimeout, match="slow"):
        await Model(UpstreamTimeout("slow")).summary(losing(user("Hi")))


def test_the_oldest_pictures_become_words_when_all_are_too_much_to_be_sent_about() -> None:
    pictures = [
        user([{"type": "input_image", "image_url": f"data:image/png;base64,{n}{'A' * 1_500_000}"}]) for n in "123"
    ]
    fold = Plan([], pictures[:2], pictures[2:], "", [], 100, 150).fold("So far.")
    assert [item["content"][0]["type"] for item in (*fold.users, *fold.late)] == [
        "input_text",
        "input_image",
        "input_image",
    ]
