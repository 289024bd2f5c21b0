"""What each item and content part means for chat, one at a time, and the path of what is wrong in it."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from rendering import assistant, call, chat_call, messages, output, refused, rendered, user
from samples import PNG

import items
from items import file_text, item_type

Json = dict[str, Any]


def encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def pdf(text: str) -> bytes:
    """The smallest PDF with one page that shows a text."""
    shown = f"BT /F1 12 Tf 10 50 Td ({text}) Tj ET" if text else ""
    objects = (
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(shown)}>>stream\n{shown}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    )
    written, offsets = "%PDF-1.4\n", []
    for number, value in enumerate(objects, 1):
        offsets.append(len(written))
        written += f"{number} 0 obj{value}endobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    end = f"trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(written)}\n%%EOF"
    return f"{written}xref\n0 6\n0000000000 65535 f \n{table}{end}".encode()


def content(part: Json, dialect: str = "generic") -> Any:
    return messages(user([part]), dialect=dialect)[0]["content"]


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["input_text", "output_text", "text", "summary_text", "reasoning_text"])
def test_text_parts_become_a_plain_string(kind: str) -> None:
    assert content({"type": kind, "text": "Hi"}) == "Hi"


def test_the_text_parts_of_a_user_are_lines_and_those_of_an_assistant_run_on() -> None:
    parts = [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    found = messages(user(parts), {"role": "assistant", "content": parts})
    assert [message["content"] for message in found] == ["a\nb", "ab"]


@pytest.mark.parametrize(
    ("detail", "sent"),
    [
        (None, {}),
        ("low", {"detail": "low"}),
        ("auto", {"detail": "auto"}),
        ("high", {"detail": "high"}),
        ("original", {"detail": "high"}),
    ],
)
def test_an_image_is_an_image_url(detail: str | None, sent: Json) -> None:
    part = {"type": "input_image", "image_url": PNG, "detail": detail, "file_id": None}
    assert [{"type": "image_url", "image_url": {"url": PNG, **sent}}] == content(part)


def test_an_image_beside_text_keeps_the_order_of_parts() -> None:
    found = messages(user([{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": PNG}]))
    assert [part["type"] for part in found[0]["content"]] == ["text", "image_url"]


def test_audio_passes_as_it_is() -> None:
    part = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    assert [part] == content(part)


@pytest.mark.parametrize("data", [encoded("Grüße".encode()), f"data:text/plain;base64,{encoded('Grüße'.encode())}"])
def test_a_text_file_becomes_text_under_its_name(data: str) -> None:
    part = {"type": "input_file", "filename": "a.txt", "file_data": data}
    assert content(part) == '<file name="a.txt">\nGrüße\n</file>'


def test_a_pdf_becomes_its_text() -> None:
    part = {"type": "input_file", "file_data": f"data:application/pdf;base64,{encoded(pdf('Tiny file'))}"}
    assert content(part) == '<file name="file">\nTiny file\n</file>'


def test_a_file_goes_as_it_is_where_the_backend_takes_files() -> None:
    part = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}
    file = {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}
    assert [{"type": "file", "file": file}] == content(part, "openai")


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        ("%%%", "invalid_base64", "not valid base64"),
        ("data:text/plain;base64,%%%", "invalid_base64", "not valid base64"),
        ("data:text/plain,hello", "invalid_base64", "not valid base64"),
        ("data:text/plain;base64", "invalid_base64", "not valid base64"),
        (encoded(b"\x89PNG\xff"), "invalid_value", "neither a PDF nor UTF-8 text"),
        (encoded(b"%PDF-1.4 broken"), None, "the PDF cannot be read"),
        (encoded(pdf("")), "invalid_value", "the PDF holds no text"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(data: str, code: str | None, words: str) -> None:
    part = {"type": "input_file", "file_data": data}
    status, found, param, message = refused(input=[user([part])])
    assert (400, code, "input[0].content[0].file_data") == (status, found, param)
    assert words in message


def test_a_pdf_without_the_extra_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "pypdf", None)
    with pytest.raises(items.UnsupportedItem, match="needs the extra 'pdf'"):
        file_text(encoded(pdf("x")), "path")


@pytest.mark.parametrize(
    ("dialect", "part", "code", "key"),
    [
        ("generic", {"type": "input_text"}, "missing_required_parameter", ".text"),
        ("generic", {"type": "input_text", "text": 5}, "invalid_type", ".text"),
        ("generic", {"type": "input_image"}, "missing_required_parameter", ".image_url"),
        ("generic", {"type": "input_image", "image_url": {"url": PNG}}, "invalid_type", ".image_url"),
        ("generic", {"type": "input_image", "image_url": "/etc/passwd"}, "invalid_image_url", ".image_url"),
        ("generic", {"type": "input_image", "image_url": PNG, "detail": "most"}, "invalid_value", ".detail"),
        ("generic", {"type": "input_image", "file_id": "file-1"}, "invalid_value", ".file_id"),
        ("ollama", {"type": "input_image", "image_url": "https://a.example/b.png"}, "invalid_image_url", ".image_url"),
        ("generic", {"type": "input_image", "image_url": PNG, "file_id": 0}, "invalid_type", ".file_id"),
        ("generic", {"type": "input_file", "file_id": "file-1"}, "invalid_value", ".file_id"),
        ("generic", {"type": "input_file", "file_data": "", "file_url": False}, "invalid_type", ".file_url"),
        ("generic", {"type": "input_file", "file_url": "https://a.example/b"}, "invalid_value", ".file_url"),
        ("generic", {"type": "input_file"}, "missing_required_parameter", ".file_data"),
        ("generic", {"type": "input_file", "file_data": "", "filename": 5}, "invalid_type", ".filename"),
        ("generic", {"type": "input_audio"}, "missing_required_parameter", ".input_audio"),
        ("generic", {"type": "video"}, "invalid_value", ".type"),
        ("generic", "text", "invalid_value", ".type"),
    ],
)
def test_a_wrong_part_is_a_400_with_its_path(dialect: str, part: Any, code: str, key: str) -> None:
    body = {"input": [user(), user([{"type": "input_text", "text": "a"}, part])]}
    assert (400, code, f"input[1].content[1]{key}") == refused(dialect, **body)[:3]


def test_an_image_url_is_left_to_the_backend_where_it_fetches() -> None:
    url = "https://a.example/b.png"
    assert [{"type": "image_url", "image_url": {"url": url}}] == content({"type": "input_image", "image_url": url})


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "sent"),
    [("user", "user"), ("assistant", "assistant"), ("system", "system"), ("developer", "system")],
)
def test_every_role_has_its_chat_role(role: str, sent: str) -> None:
    assert {"role": sent, "content": "Hi"} == messages({"role": role, "content": "Hi"}, user())[0]


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_an_image_in_a_message_that_takes_text_alone_is_refused(role: str) -> None:
    item = {"role": role, "content": [{"type": "input_image", "image_url": PNG}]}
    assert refused(input=[item])[:3] == (400, "invalid_value", "input[0].content")


@pytest.mark.parametrize(
    ("item", "code", "key"),
    [
        ({"role": "wizard", "content": "x"}, "invalid_value", ".role"),
        ({"type": "message", "content": "x"}, "invalid_value", ".role"),
        ({"role": "user"}, "missing_required_parameter", ".content"),
        ({"role": "user", "content": {"text": "x"}}, "invalid_type", ".content"),
        ({"type": "wish"}, "invalid_value", ".type"),
        ({"type": 5, "role": "user", "content": "x"}, "invalid_value", ".type"),
        ({}, "invalid_value", ".type"),
        ({"type": "reasoning", "summary": "text"}, "invalid_type", ".summary"),
        ({"type": "reasoning", "content": [5]}, "invalid_value", ".content[0].type"),
        ({"type": "reasoning", "reasoning_details": {}}, "invalid_type", ".reasoning_details"),
        ({"type": "function_call", "name": "f", "arguments": ""}, "missing_required_parameter", ".call_id"),
        (call(""), "invalid_value", ".call_id"),
        ({"type": "function_call", "call_id": "c", "arguments": ""}, "missing_required_parameter", ".name"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "missing_required_parameter", ".arguments"),
        (call("c", arguments={}), "invalid_type", ".arguments"),  # type: ignore[arg-type]
        (call("c", namespace=["n"]), "invalid_type", ".namespace"),
        ({"type": "function_call_output", "output": "x"}, "missing_required_parameter", ".call_id"),
        (output("c", None), "missing_required_parameter", ".output"),
        (output("c", {"a": 1}), "invalid_type", ".output"),
        ({"type": "custom_tool_call", "call_id": "c", "name": "f"}, "missing_required_parameter", ".input"),
        ({"type": "shell_call_output", "call_id": "c"}, "missing_required_parameter", ".output"),
        ({"type": "apply_patch_call_output", "call_id": "c", "output": []}, "invalid_type", ".output"),
        ({"type": "local_shell_call_output", "output": "x"}, "missing_required_parameter", ".id"),
        ({"type": "additional_tools"}, "missing_required_parameter", ".tools"),
        ({"type": "tool_search_output", "call_id": 5, "tools": []}, "invalid_type", ".call_id"),
        ({"type": "mcp_call", "id": "m"}, "missing_required_parameter", ".name"),
        ({"type": "configuration_update", "reasoning": {"effort": "zzz"}}, "invalid_value", ".reasoning.effort"),
        (
            {"type": "configuration_update", "text": {"format": {"type": "json_schema", "name": "a"}}},
            "missing_required_parameter",
            ".text.format.schema",
        ),
        ({"type": "item_reference", "id": "msg_1"}, "invalid_value", ".type"),
        ({"id": "msg_1"}, "invalid_value", ".type"),
        ({"type": "compaction"}, "missing_required_parameter", ".encrypted_content"),
        ({"type": "compaction", "encrypted_content": 1}, "invalid_type", ".encrypted_content"),
    ],
)
def test_a_wrong_item_is_a_400_with_its_path(item: Json, code: str, key: str) -> None:
    assert (400, code, f"input[1]{key}") == refused(input=[user(), item])[:3]


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ({"role": "user"}, "message"),
        ({"type": None, "role": "user"}, "message"),
        ({"id": "x"}, "item_reference"),
        ({"id": "x", "type": None}, "item_reference"),
        ({"id": "x", "type": "reasoning"}, "reasoning"),
        ({"id": "x", "name": "y"}, ""),
        ({"type": ["message"]}, ""),
    ],
)
def test_the_type_of_an_item_is_known_by_its_keys_where_it_is_left_out(item: Json, kind: str) -> None:
    assert kind == item_type(item)


# -- calls and outputs -------------------------------------------------------------------------------------------------

ACTION = {"type": "exec", "command": ["ls"], "env": {}, "user": "me", "timeout_ms": None}
EXIT = {"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}


@pytest.mark.parametrize(
    ("items_", "name", "arguments", "answer"),
    [
        ([call("c", arguments='{"a": 1}'), output("c")], "look", '{"a": 1}', "done"),
        ([call("c", arguments=""), output("c", "")], "look", "{}", ""),
        ([call("c", arguments='{"a":'), output("c", [])], "look", "{}", ""),
        ([call("c", arguments="[1]"), output("c")], "look", "{}", "done"),
        ([call("c", namespace="n"), output("c")], "n__look", "{}", "done"),
        (
            [
                {"type": "custom_tool_call", "call_id": "c", "name": "exec", "input": 'say "x"'},
                {"type": "custom_tool_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "ok"}]},
            ],
            "exec",
            '{"input":"say \\"x\\""}',
            "ok",
        ),
        (
            [
                {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "a"}},
                {"type": "apply_patch_call_output", "call_id": "c", "status": "failed"},
            ],
            "apply_patch",
            '{"type":"delete_file","path":"a"}',
            "failed",
        ),
        (
            [
                {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"], "timeout_ms": None}},
                {"type": "shell_call_output", "call_id": "c", "output": [EXIT]},
            ],
            "shell",
            '{"commands":["ls"]}',
            '[{"stdout":"a","stderr":"","outcome":{"type":"exit","exit_code":0}}]',
        ),
        (
            [
                {"type": "local_shell_call", "id": "l", "call_id": "c", "action": ACTION},
                {"type": "local_shell_call_output", "id": "c", "output": "{}"},
            ],
            "local_shell",
            '{"command":["ls"]}',
            "{}",
        ),
        (
            [
                {"type": "local_shell_call", "id": "c", "call_id": None, "action": ACTION},
                {"type": "local_shell_call_output", "call_id": None, "id": "c", "output": "{}"},
            ],
            "local_shell",
            '{"command":["ls"]}',
            "{}",
        ),
        (
            [{"type": "mcp_call", "id": "c", "name": "f", "server_label": "s", "arguments": "{}", "error": "gone"}],
            "s__f",
            "{}",
            "gone",
        ),
    ],
)
def test_a_call_item_and_its_output_are_a_chat_pair(items_: list[Json], name: str, arguments: str, answer: str) -> None:
    said, heard = messages(*items_)
    assert [chat_call("c", name, arguments)] == said["tool_calls"]
    assert {"role": "tool", "tool_call_id": "c", "content": answer} == heard


def test_a_search_on_the_server_leaves_no_message() -> None:
    search = {"type": "tool_search_call", "call_id": None, "arguments": {}, "execution": "server"}
    found = {"type": "tool_search_output", "call_id": None, "execution": "server", "tools": []}
    assert messages(user(), search, found) == [{"role": "user", "content": "Hi"}]


def test_the_opaque_extras_of_a_call_go_back_with_it() -> None:
    extra = {"google": {"thought_signature": "s"}}
    said = messages(call("c", extra_content=extra), output("c"))[0]
    assert [{**chat_call("c"), "extra_content": extra}] == said["tool_calls"]


@pytest.mark.parametrize("kind", ["web_search_call", "file_search_call", "computer_call", "mcp_list_tools", "program"])
def test_the_record_of_a_hosted_tool_is_left_out_and_named(kind: str) -> None:
    chat = rendered(input=[user(), {"type": kind, "id": "x"}, assistant("a"), user()])
    assert ((f"input[1].type={kind}",), 3) == (chat.ignored, len(chat.body["messages"]))


def test_keys_that_a_client_adds_to_its_items_do_not_matter() -> None:
    more = {"id": "msg_1", "phase": None, "status": "completed", "internal_chat_message_metadata_passthrough": {}}
    assert messages(user()) == messages({**user(), **more})


def test_sealed_reasoning_of_another_server_says_nothing_here() -> None:
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAA"}
    assert messages(user(), assistant("a"), dialect="vllm") == messages(user(), sealed, assistant("a"), dialect="vllm")
