"""Input items and their content parts: tables from the wire's `type` to what an item means for chat messages.

May not do I/O, nor decide the order of messages. A type that is left out on purpose is a row too.
Source: ResponseInputItemParam of the openai SDK 3.52, read 2026-11-20; the live API's error texts.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dialects import Dialect
from errors import InvalidRequest, MissingParameter, UnsupportedItem
from tools import Toolbox, ToolRef, arguments_of_action, arguments_of_operation, dumps, valid_arguments

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


def _text_at(item: Json, key: str, path: str) -> str:
    value = item.get(key)
    if value is None:
        raise MissingParameter(f"Missing required parameter: '{path}.{key}'.", param=f"{path}.{key}")
    if not isinstance(value, str):
        raise InvalidRequest(f"Invalid '{path}.{key}': expected a string.", param=f"{path}.{key}", code="invalid_type")
    return value


# -- content parts -----------------------------------------------------------------------------------------------------


def _text_part(part: Json, path: str, dialect: Dialect) -> Json:
    return {"type": "text", "text": _text_at(part, "text", path)}


def _refusal_part(part: Json, path: str, dialect: Dialect) -> Json:
    return {"type": "text", "text": _text_at(part, "refusal", path)}


def _image_part(part: Json, path: str, dialect: Dialect) -> Json:
    if part.get("file_id"):
        raise _no_files(f"{path}.file_id")
    url = _text_at(part, "image_url", path)
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
    if part.get("detail"):
        image["detail"] = "high" if part["detail"] == "original" else str(part["detail"])
    return {"type": "image_url", "image_url": image}


def _no_files(path: str) -> InvalidRequest:
    return UnsupportedItem(
        f"Unsupported '{path}': there is no file store here; send the data itself (`file_data` or a data URL).",
        param=path,
    )


def _file_part(part: Json, path: str, dialect: Dialect) -> Json:
    """The file itself where the backend has a file part, else its text."""
    if part.get("file_id"):
        raise _no_files(f"{path}.file_id")
    if part.get("file_url"):
        raise UnsupportedItem(
            f"Unsupported '{path}.file_url': files are not fetched here; send 'file_data'.", param=f"{path}.file_url"
        )
    data = _text_at(part, "file_data", path)
    name = part.get("filename") or "file"
    if dialect.file_parts:
        return {"type": "file", "file": {"filename": name, "file_data": data}}
    return {"type": "text", "text": f'<file name="{name}">\n{file_text(data, f"{path}.file_data")}\n</file>'}


def file_text(data: str, path: str) -> str:
    """The text of a base64 or data-URL file: PDF through pypdf, anything else must be UTF-8 text.

    Raises: InvalidRequest.
    """
    encoded = data.partition(",")[2] if data.startswith("data:") else data
    try:
        raw = base64.b64decode(encoded, validate=True)
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
        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(raw)).pages)
    except Exception as error:  # a parser fed by strangers: the file is at fault
        raise InvalidRequest(f"Invalid '{path}': the PDF cannot be read.", param=path) from error


def _audio_part(part: Json, path: str, dialect: Dialect) -> Json:
    audio = part.get("input_audio")
    if not isinstance(audio, dict):
        raise MissingParameter(f"Missing required parameter: '{path}.input_audio'.", param=f"{path}.input_audio")
    return {"type": "input_audio", "input_audio": audio}


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


@dataclass(frozen=True, slots=True)
class At:
    """Where an item stands and for whom it is rendered."""

    path: str
    dialect: Dialect
    toolbox: Toolbox


ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def _message(item: Json, at: At) -> list[Piece]:
    role = ROLES.get(str(item.get("role")))
    if role is None:
        raise InvalidRequest(
            f"Invalid value at '{at.path}.role': {item.get('role')!r}. Supported values are: '{', '.join(ROLES)}'.",
            param=f"{at.path}.role",
            code="invalid_value",
        )
    return [Said(role, _content(item, "content", at.path, at.dialect))]


def _reasoning(item: Json, at: At) -> list[Piece]:
    """The text in `content` or `summary`; a sealed text of another server says nothing here and is skipped."""
    parts = item.get("content") or item.get("summary") or ()
    text = "\n\n".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return [Thought(text, item.get("reasoning_details"))] if text or item.get("reasoning_details") else []


def _called(item: Json, at: At, ref: ToolRef, arguments: str) -> list[Piece]:
    call_id = _text_at(item, "id" if "call_id" not in item and ref.kind == "local_shell" else "call_id", at.path)
    cut = item.get("status") == "incomplete"
    extra = item.get("extra_content")
    return [Called(call_id, at.toolbox.name_of(ref), arguments, extra if isinstance(extra, dict) else None, cut)]


def _function_call(item: Json, at: At) -> list[Piece]:
    ref = ToolRef("function", _text_at(item, "name", at.path), item.get("namespace") or None)
    return _called(item, at, ref, valid_arguments(_text_at(item, "arguments", at.path)))


def _custom_tool_call(item: Json, at: At) -> list[Piece]:
    ref = ToolRef("custom", _text_at(item, "name", at.path), item.get("namespace") or None)
    return _called(item, at, ref, dumps({"input": _text_at(item, "input", at.path)}))


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
    return [Returned(_text_at(item, "call_id", at.path), content)]


def _tool_search_output(item: Json, at: At) -> list[Piece]:
    """The tools found are declared to the backend; the model is told their names."""
    if item.get("call_id") is None:
        return []
    found = [str(t.get("name")) for t in item.get("tools") or () if isinstance(t, dict)]
    return [Returned(str(item["call_id"]), f"Loaded tools: {', '.join(found) or 'none'}")]


def _shell_call_output(item: Json, at: At) -> list[Piece]:
    output = item.get("output")
    return [Returned(_text_at(item, "call_id", at.path), output if isinstance(output, str) else dumps(output))]


def _apply_patch_call_output(item: Json, at: At) -> list[Piece]:
    text = item.get("output") or str(item.get("status") or "completed")
    return [Returned(_text_at(item, "call_id", at.path), str(text))]


def _local_shell_call_output(item: Json, at: At) -> list[Piece]:
    """Its `id` holds the id of the call. Source: LocalShellCallOutput."""
    call_id = item.get("call_id") or _text_at(item, "id", at.path)
    return [Returned(str(call_id), _text_at(item, "output", at.path))]


def _mcp_call(item: Json, at: At) -> list[Piece]:
    """A call that OpenAI's server made; to this backend it is a call and its output."""
    call_id = _text_at(item, "id", at.path)
    name = at.toolbox.name_of(ToolRef("function", str(item.get("name") or "mcp"), item.get("server_label") or None))
    output = item.get("output") or item.get("error") or ""
    arguments = valid_arguments(str(item.get("arguments") or ""))
    return [Called(call_id, name, arguments), Returned(call_id, output if isinstance(output, str) else dumps(output))]


def _nothing(item: Json, at: At) -> list[Piece]:
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
    "item_reference": ItemType(_needs("references need stored responses, which this version does not have yet"), "400"),
    "compaction": ItemType(_needs("compaction is not in this version yet"), "400"),
    "compaction_trigger": ItemType(_needs("compaction is not in this version yet"), "400"),
}


def item_type(item: Json) -> str:
    """The type, also where the wire lets it be left out: messages have a role, references only an id."""
    kind = item.get("type")
    if isinstance(kind, str):
        return kind
    return "message" if "role" in item else "item_reference" if set(item) <= {"id", "type"} and item.get("id") else ""
