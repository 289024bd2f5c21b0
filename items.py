"""Input items and their content parts: tables from the wire's `type` to what an item means for chat messages.

May not do I/O, nor decide the order of messages. A type that is left out on purpose is a row too.
Source: ResponseInputItemParam of the openai SDK 3.52, read 2026-11-20; the live API's error texts.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from dialects import Dialect
from errors import InvalidRequest, MissingParameter, UnsupportedItem
from tools import (
    Toolbox,
    ToolRef,
    arguments_of_action,
    arguments_of_operation,
    dumps,
    named,
    optional,
    required,
    valid_arguments,
)

try:
    import pypdf
except ImportError:  # the extra `pdf` is not installed
    pypdf = None  # type: ignore[assignment]

Json = dict[str, Any]
Content = str | list[Json]


# -- pieces: what an item means, before the order of messages is decided -----------------------------------------------


@dataclass(slots=True)
class Said:
    """A message item."""

    role: str
    content: Content


@dataclass(slots=True)
class Thought:
    """A reasoning item; details are a backend's own records, given back unmodified."""

    text: str
    details: list[Json] | None = None


@dataclass(slots=True)
class Called:
    """A call of the assistant; `name` is the chat name."""

    call_id: str
    name: str
    arguments: str
    extra: Json | None = None
    cut: bool = False


@dataclass(slots=True)
class Returned:
    """The output of a call."""

    call_id: str
    content: Content


Piece = Said | Thought | Called | Returned


# -- content parts -----------------------------------------------------------------------------------------------------


def _text_part(part: Json, path: str, dialect: Dialect) -> Json:
    return {"type": "text", "text": required(part, "text", path, str)}


def _refusal_part(part: Json, path: str, dialect: Dialect) -> Json:
    return {"type": "text", "text": required(part, "refusal", path, str)}


# Chat knows no `original`.
DETAILS = {"low": "low", "high": "high", "auto": "auto", "original": "high"}


def _image_part(part: Json, path: str, dialect: Dialect) -> Json:
    if optional(part, "file_id", path, str):
        raise _no_files(f"{path}.file_id")
    url = required(part, "image_url", path, str)
    if not url.startswith(("http://", "https://", "data:")):
        raise InvalidRequest(
            f"Invalid '{path}.image_url': expected an http(s) or data URL.",
            param=f"{path}.image_url",
            code="invalid_image_url",
        )
    if not dialect.image_urls and not url.startswith("data:"):
        raise InvalidRequest(
            f"Invalid '{path}.image_url': this backend ({dialect.name}) takes data URLs only, and images are not "
            "fetched here.",
            param=f"{path}.image_url",
            code="invalid_image_url",
        )
    image = {"url": url}
    if detail := optional(part, "detail", path, str):
        if detail not in DETAILS:
            raise InvalidRequest(
                f"Invalid '{path}.detail': expected {', '.join(map(repr, DETAILS))}.",
                param=f"{path}.detail",
                code="invalid_value",
            )
        image["detail"] = DETAILS[detail]
    return {"type": "image_url", "image_url": image}


def _no_files(path: str) -> InvalidRequest:
    return UnsupportedItem(
        f"Unsupported '{path}': there is no file store here; send the data itself (`file_data` or a data URL).",
        param=path,
    )


def _file_part(part: Json, path: str, dialect: Dialect) -> Json:
    """The file itself where the backend has a file part, else its text."""
    if optional(part, "file_id", path, str):
        raise _no_files(f"{path}.file_id")
    if optional(part, "file_url", path, str):
        raise UnsupportedItem(
            f"Unsupported '{path}.file_url': files are not fetched here; send 'file_data'.", param=f"{path}.file_url"
        )
    data = required(part, "file_data", path, str)
    name = optional(part, "filename", path, str) or "file"
    if dialect.file_parts:
        return {"type": "file", "file": {"filename": name, "file_data": data}}
    return {"type": "text", "text": f'<file name="{name}">\n{file_text(data, f"{path}.file_data")}\n</file>'}


DATA_URL = re.compile(r"^data:[^,]*;base64,")


def file_text(data: str, path: str) -> str:
    """The text of a base64 or data-URL file: PDF through pypdf, anything else must be UTF-8 text.

    Raises: InvalidRequest.
    """
    try:
        raw = base64.b64decode(DATA_URL.sub("", data), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"Invalid '{path}': not valid base64.", param=path, code="invalid_base64") from error
    if raw.startswith(b"%PDF-"):
        return _pdf_text(raw, path)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UnsupportedItem(f"Unsupported '{path}': neither a PDF nor UTF-8 text.", param=path) from error


def _pdf_text(raw: bytes, path: str) -> str:
    if pypdf is None:
        raise UnsupportedItem(f"Unsupported '{path}': PDF needs the extra 'pdf' on this proxy.", param=path)
    try:
        text = "\n\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(raw)).pages)
    except Exception as error:  # a parser fed by strangers: the file is at fault
        raise InvalidRequest(f"Invalid '{path}': the PDF cannot be read.", param=path) from error
    if not text.strip():
        raise UnsupportedItem(f"Unsupported '{path}': the PDF holds no text (a scan?).", param=path)
    return text.encode("utf-8", "replace").decode()


def _audio_part(part: Json, path: str, dialect: Dialect) -> Json:
    return {"type": "input_audio", "input_audio": required(part, "input_audio", path, dict)}


PARTS: dict[str, tuple[Callable[[Json, str, Dialect], Json], str]] = {
    "input_text": (_text_part, "text"),
    "output_text": (_text_part, "text"),
    "text": (_text_part, "text"),
    "summary_text": (_text_part, "text"),
    "reasoning_text": (_text_part, "text"),
    "refusal": (_refusal_part, "text"),
    "input_image": (_image_part, "`image_url`; http(s) URLs where the backend takes them; no file ids"),
    "computer_screenshot": (_image_part, "`image_url`"),
    "input_file": (_file_part, "`file` where the backend has it, else its text (PDF with the extra `pdf`)"),
    "input_audio": (_audio_part, "`input_audio`"),
}


def _content(item: Json, key: str, path: str, dialect: Dialect) -> Content:
    """A plain string when all parts are text: the form that every template takes."""
    value = item.get(key)
    if isinstance(value, str):
        return value
    at = f"{path}.{key}"
    if value is None:
        raise MissingParameter(f"Missing required parameter: '{at}'.", param=at)
    if not isinstance(value, list):
        raise InvalidRequest(f"Invalid '{at}': expected a string or an array.", param=at, code="invalid_type")
    parts = [_part(part, f"{at}[{index}]", dialect) for index, part in enumerate(value)]
    if all(part["type"] == "text" for part in parts):
        glue = "" if item.get("role") == "assistant" else "\n"
        return glue.join(part["text"] for part in parts)
    return parts


def _part(part: Any, path: str, dialect: Dialect) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    row = PARTS.get(kind) if isinstance(kind, str) else None
    if row is None:
        known = "', '".join(PARTS)
        raise UnsupportedItem(
            f"Invalid value: {kind!r} at '{path}.type'. Supported values are: '{known}'.", param=f"{path}.type"
        )
    return row[0](part, path, dialect)


# -- items -------------------------------------------------------------------------------------------------------------


class At(msgspec.Struct, frozen=True):
    """Where an item stands and for whom it is rendered."""

    path: str
    dialect: Dialect
    toolbox: Toolbox


ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def _message(item: Json, at: At) -> list[Piece]:
    role = ROLES.get(str(item.get("role")))
    if role is None:
        raise InvalidRequest(
            f"Invalid value at '{at.path}.role': {item.get('role')!r}. "
            f"Supported values are: {', '.join(map(repr, ROLES))}.",
            param=f"{at.path}.role",
            code="invalid_value",
        )
    content = _content(item, "content", at.path, at.dialect)
    if role != "user" and not isinstance(content, str):
        raise InvalidRequest(
            f"Invalid '{at.path}.content': chat backends take nothing but text in {item['role']} messages.",
            param=f"{at.path}.content",
            code="invalid_value",
        )
    return [Said(role, content)]


def _reasoning(item: Json, at: At) -> list[Piece]:
    """The text in `content` or `summary`; a sealed text of another server says nothing here and is skipped."""
    texts = [_joined(item, key, at) for key in ("content", "summary")]
    text = texts[0] or texts[1]
    details = optional(item, "reasoning_details", at.path, list)
    return [Thought(text, details)] if text or details else []


def _joined(item: Json, key: str, at: At) -> str:
    parts = optional(item, key, at.path, list) or []
    return "\n\n".join(
        _part(part, f"{at.path}.{key}[{index}]", at.dialect).get("text", "") for index, part in enumerate(parts)
    )


def _called(item: Json, at: At, ref: ToolRef, arguments: str) -> list[Piece]:
    call_id = named(item, at.path, "id" if item.get("call_id") is None and ref.kind == "local_shell" else "call_id")
    cut = item.get("status") == "incomplete"
    extra = optional(item, "extra_content", at.path, dict)
    return [Called(call_id, at.toolbox.name_of(ref), arguments, extra, cut)]


def _function_call(item: Json, at: At) -> list[Piece]:
    ref = ToolRef("function", named(item, at.path), optional(item, "namespace", at.path, str) or None)
    return _called(item, at, ref, valid_arguments(required(item, "arguments", at.path, str)))


def _custom_tool_call(item: Json, at: At) -> list[Piece]:
    ref = ToolRef("custom", named(item, at.path), optional(item, "namespace", at.path, str) or None)
    return _called(item, at, ref, dumps({"input": required(item, "input", at.path, str)}))


def _tool_search_call(item: Json, at: At) -> list[Piece]:
    if item.get("call_id") is None:
        return []
    return _called(item, at, ToolRef("tool_search", "tool_search"), arguments_of_operation(item.get("arguments")))


def _apply_patch_call(item: Json, at: At) -> list[Piece]:
    ref = ToolRef("apply_patch", "apply_patch")
    return _called(item, at, ref, arguments_of_operation(item.get("operation")))


def _shell_call(item: Json, at: At) -> list[Piece]:
    return _called(item, at, ToolRef("shell", "shell"), arguments_of_action(item.get("action")))


def _local_shell_call(item: Json, at: At) -> list[Piece]:
    return _called(item, at, ToolRef("local_shell", "local_shell"), arguments_of_action(item.get("action")))


def _output(item: Json, at: At) -> list[Piece]:
    content = _content(item, "output", at.path, at.dialect)
    return [Returned(named(item, at.path, "call_id"), content)]


def _tool_search_output(item: Json, at: At) -> list[Piece]:
    """The tools found are declared to the backend; the model is told their names."""
    if item.get("call_id") is None:
        return []
    found = [str(t.get("name")) for t in required(item, "tools", at.path, list) if isinstance(t, dict)]
    return [Returned(named(item, at.path, "call_id"), f"Loaded tools: {', '.join(found) or 'none'}")]


def _shell_call_output(item: Json, at: At) -> list[Piece]:
    output = item.get("output")
    if not isinstance(output, str):
        output = dumps(required(item, "output", at.path, list))
    return [Returned(named(item, at.path, "call_id"), output)]


def _apply_patch_call_output(item: Json, at: At) -> list[Piece]:
    text = optional(item, "output", at.path, str) or optional(item, "status", at.path, str) or "completed"
    return [Returned(named(item, at.path, "call_id"), text)]


def _local_shell_call_output(item: Json, at: At) -> list[Piece]:
    """Its `id` holds the id of the call. Source: LocalShellCallOutput."""
    call_id = named(item, at.path, "call_id" if item.get("call_id") is not None else "id")
    return [Returned(call_id, required(item, "output", at.path, str))]


def _mcp_call(item: Json, at: At) -> list[Piece]:
    """A call that OpenAI's server made; to this backend it is a call and its output."""
    call_id = named(item, at.path, "id")
    ref = ToolRef("function", named(item, at.path), optional(item, "server_label", at.path, str) or None)
    name = at.toolbox.name_of(ref)
    output = item.get("output") or item.get("error") or ""
    arguments = valid_arguments(optional(item, "arguments", at.path, str) or "")
    return [Called(call_id, name, arguments), Returned(call_id, output if isinstance(output, str) else dumps(output))]


def _nothing(item: Json, at: At) -> list[Piece]:
    return []


def _compaction(item: Json, at: At) -> list[Piece]:
    """What it stands for is laid out before rendering."""
    required(item, "encrypted_content", at.path, str)
    return []


@dataclass(frozen=True, slots=True)
class ItemType:
    """What becomes of an input item type."""

    pieces: Callable[[Json, At], list[Piece]]
    note: str
    left_out: bool = False


def _needs(what: str) -> Callable[[Json, At], list[Piece]]:
    def refuse(item: Json, at: At) -> list[Piece]:
        raise UnsupportedItem(f"Unsupported '{at.path}.type': {what}.", param=f"{at.path}.type")

    return refuse


HOSTED = ItemType(_nothing, "a hosted tool's record: left out and named", left_out=True)

ITEMS: dict[str, ItemType] = {
    "message": ItemType(_message, "a message; the leading system and developer texts become one system message"),
    "reasoning": ItemType(_reasoning, "given back with the next assistant message where the backend wants it"),
    "function_call": ItemType(_function_call, "a tool call"),
    "function_call_output": ItemType(_output, "a tool message; its images follow in a user message"),
    "custom_tool_call": ItemType(_custom_tool_call, "a tool call with one string"),
    "custom_tool_call_output": ItemType(_output, "a tool message"),
    "tool_search_call": ItemType(_tool_search_call, "a tool call; of the server's own search nothing is needed"),
    "tool_search_output": ItemType(_tool_search_output, "a tool message; the tools found join the tools"),
    "additional_tools": ItemType(_nothing, "its tools join the tools"),
    "apply_patch_call": ItemType(_apply_patch_call, "a tool call"),
    "apply_patch_call_output": ItemType(_apply_patch_call_output, "a tool message"),
    "shell_call": ItemType(_shell_call, "a tool call"),
    "shell_call_output": ItemType(_shell_call_output, "a tool message"),
    "local_shell_call": ItemType(_local_shell_call, "a tool call"),
    "local_shell_call_output": ItemType(_local_shell_call_output, "a tool message"),
    "mcp_call": ItemType(_mcp_call, "a tool call and its output"),
    "configuration_update": ItemType(_nothing, "its reasoning effort and text format replace the request's"),
    "mcp_list_tools": HOSTED,
    "mcp_approval_request": HOSTED,
    "mcp_approval_response": HOSTED,
    "file_search_call": HOSTED,
    "web_search_call": HOSTED,
    "code_interpreter_call": HOSTED,
    "image_generation_call": HOSTED,
    "computer_call": HOSTED,
    "computer_call_output": HOSTED,
    "program": HOSTED,
    "program_output": HOSTED,
    "item_reference": ItemType(_needs("a reference cannot stand here"), "replaced by the stored item that it names"),
    "compaction": ItemType(_compaction, "what it stands for: user messages, a summary of the rest, the newest turns"),
    "compaction_trigger": ItemType(_nothing, "last: the window is compacted, and the response is the compaction item"),
}


def item_type(item: Json) -> str:
    """The type, also where the wire lets it be left out: messages have a role, references only an id."""
    kind = item.get("type")
    if kind is not None:
        return kind if isinstance(kind, str) else ""
    return "message" if "role" in item else "item_reference" if set(item) <= {"id", "type"} and item.get("id") else ""


def is_from_user(item: Json) -> bool:
    """Whether it is a message of the user."""
    return item.get("role") == "user" and item_type(item) == "message"
