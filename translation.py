"""Input items to chat messages, and the chat request body: tables, pure functions and few named passes.

May not do I/O, read the clock, make ids or know settings. Rendering is byte-stable: the messages of one turn are an
exact prefix of the next turn's. Source: ResponseInputItemParam of the openai SDK 3.52; the live API's error texts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dialects import Dialect
from errors import InvalidRequest, MissingParameter, UnsupportedItem
from request import TurnRequest
from tools import (
    Toolbox,
    ToolRef,
    arguments_of_action,
    arguments_of_operation,
    choose_tools,
    declare_tools,
    dumps,
    searches_on_client,
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
    except Exception as error:  # noqa: BLE001 - a parser fed by strangers: whatever it raises, the file is at fault
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


# -- passes ------------------------------------------------------------------------------------------------------------


def pair_outputs(pieces: list[Piece]) -> dict[str, Returned]:
    """The output of each call by its id. Raises: InvalidRequest for an orphan or a duplicate, naming the id."""
    calls: set[str] = set()
    outputs: dict[str, Returned] = {}
    for piece in pieces:
        if isinstance(piece, Called):
            if piece.call_id in calls:
                raise _duplicate(piece.call_id)
            calls.add(piece.call_id)
        elif isinstance(piece, Returned):
            if piece.call_id in outputs:
                raise _duplicate(piece.call_id)
            if piece.call_id not in calls:
                raise InvalidRequest(
                    f"No tool call found for function call output with call_id {piece.call_id}.", param="input"
                )
            outputs[piece.call_id] = piece
    return outputs


def _duplicate(call_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"Duplicate item found with id {call_id}. Remove duplicate items from your input and try again.", param="input"
    )


@dataclass(slots=True)
class _Assistant:
    """The assistant message being gathered."""

    text: str = ""
    thoughts: list[Thought] = field(default_factory=list)
    calls: list[Called] = field(default_factory=list)


class _Grouping:
    """Pieces to messages: the calls of one turn share an assistant message, and their outputs follow it at once."""

    def __init__(self, outputs: dict[str, Returned], dialect: Dialect) -> None:
        self.messages: list[Json] = []
        self._outputs = outputs
        self._dialect = dialect
        self._open = _Assistant()

    def take(self, piece: Piece) -> None:
        if isinstance(piece, Thought):
            if self._open.calls or self._open.text:
                self.flush()
            self._open.thoughts.append(piece)
        elif isinstance(piece, Called):
            self._take_call(piece)
        elif isinstance(piece, Returned):
            self.flush()
        elif piece.role == "assistant" and isinstance(piece.content, str):
            self._take_text(piece.content)
        else:
            self.flush()
            self.messages.append({"role": piece.role, "content": piece.content})

    def _take_call(self, call: Called) -> None:
        """A call that was cut by the token limit was never run: without an output it is left out."""
        if call.call_id in self._outputs:
            self._open.calls.append(call)
        elif not call.cut:
            raise InvalidRequest(f"No tool output found for function call {call.call_id}.", param="input")

    def _take_text(self, text: str) -> None:
        if self._open.text and not self._open.calls:
            self.flush()
        self._open.text = f"{self._open.text}\n{text}" if self._open.text else text

    def flush(self) -> None:
        gathered, self._open = self._open, _Assistant()
        if not gathered.text and not gathered.calls:
            return
        message: Json = {"role": "assistant", "content": gathered.text}
        self._add_reasoning(message, gathered.thoughts)
        if gathered.calls:
            message["tool_calls"] = [self._tool_call(call) for call in gathered.calls]
        self.messages.append(message)
        self._add_outputs(gathered.calls)

    def _add_reasoning(self, message: Json, thoughts: list[Thought]) -> None:
        name = self._dialect.reasoning_field
        if name == "reasoning_details":
            if details := [detail for thought in thoughts for detail in thought.details or ()]:
                message[name] = details
        elif name and (text := "\n\n".join(thought.text for thought in thoughts if thought.text)):
            message[name] = text

    def _tool_call(self, call: Called) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        wire: Json = {"id": self._id(call.call_id), "type": "function", "function": function}
        if call.extra:
            wire["extra_content"] = call.extra
        return wire

    def _add_outputs(self, calls: list[Called]) -> None:
        others: list[Json] = []
        for call in calls:
            content = self._outputs[call.call_id].content
            if not isinstance(content, str):
                others += [part for part in content if part["type"] != "text"]
                content = "\n".join(part["text"] for part in content if part["type"] == "text")
            self.messages.append({"role": "tool", "tool_call_id": self._id(call.call_id), "content": content})
        if others:
            self.messages.append({"role": "user", "content": others})

    def _id(self, call_id: str) -> str:
        if not self._dialect.short_call_ids:
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def group_messages(pieces: list[Piece], outputs: dict[str, Returned], dialect: Dialect) -> list[Json]:
    """Chat messages, oldest first. Raises: InvalidRequest for a call without its output."""
    grouping = _Grouping(outputs, dialect)
    for piece in pieces:
        grouping.take(piece)
    grouping.flush()
    return grouping.messages


def lead_with_system(messages: list[Json], instructions: str | None, dialect: Dialect) -> list[Json]:
    """One leading system message; a later one stays where it is, so that the bytes before it never change."""
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    texts = [_plain(message["content"]) for message in messages[:leading]]
    system = "\n\n".join(text for text in [instructions or "", *texts] if text)
    rest = [m if m["role"] != "system" else _late_system(m, dialect) for m in messages[leading:]]
    return [{"role": "system", "content": system}, *rest] if system else rest


def _plain(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def _late_system(message: Json, dialect: Dialect) -> Json:
    if dialect.late_system:
        return message
    return {"role": "user", "content": f"<system>\n{_plain(message['content'])}\n</system>"}


def merge_neighbours(messages: list[Json]) -> list[Json]:
    """Two neighbours of one role become one message, where both are plain text without calls."""
    merged: list[Json] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last and _mergeable(last, message):
            merged[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def _mergeable(first: Json, second: Json) -> bool:
    if first["role"] != second["role"] or first["role"] == "tool":
        return False
    return all(isinstance(m["content"], str) and "tool_calls" not in m for m in (first, second))


def part_user_from_tool(messages: list[Json]) -> list[Json]:
    """A short assistant message between a tool message and a user message."""
    parted: list[Json] = []
    for message in messages:
        if parted and parted[-1]["role"] == "tool" and message["role"] == "user":
            parted.append({"role": "assistant", "content": "OK."})
        parted.append(message)
    return parted


# -- the whole body ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat request, and what its answer needs to become items again."""

    body: Json
    refs: dict[str, ToolRef]
    call_ids: frozenset[str]
    ignored: tuple[str, ...]


def render(request: TurnRequest, items: list[Json], dialect: Dialect, model: str) -> Rendered:
    """The chat request body, `stream` aside.

    items: the window, oldest first. Raises: InvalidRequest with the path of what is wrong.
    """
    ignored = list(request.unused)
    toolbox = _toolbox(request, items)
    pieces, left_out = _pieces(items, dialect, toolbox)
    outputs = pair_outputs(pieces)
    messages = lead_with_system(group_messages(pieces, outputs, dialect), request.instructions, dialect)
    if dialect.merge_neighbours:
        messages = merge_neighbours(messages)
    if dialect.assistant_after_tool:
        messages = part_user_from_tool(messages)
    body: Json = {"model": model, "messages": messages}
    ignored += left_out + toolbox.left_out
    ignored += _add_tools(body, request, toolbox, dialect)
    for add in (_add_sampling, _add_format, _add_effort):
        ignored += add(body, request, items, dialect)
    call_ids = frozenset(piece.call_id for piece in pieces if isinstance(piece, Called))
    return Rendered(body, toolbox.refs, call_ids, tuple(ignored))


def has_files(request: TurnRequest) -> bool:
    """Whether rendering has a file to read, which can take long."""
    return any(
        part.get("type") == "input_file"
        for item in request.items
        for key in ("content", "output")
        if isinstance(item.get(key), list)
        for part in item[key]
        if isinstance(part, dict)
    )


def _toolbox(request: TurnRequest, items: list[Json]) -> Toolbox:
    toolbox = Toolbox()
    tools = request.tools or []
    declare_tools(toolbox, tools, "tools", skip_deferred=searches_on_client(tools))
    for index, item in enumerate(items):
        if item.get("type") in ("additional_tools", "tool_search_output"):
            found = item.get("tools")
            if not isinstance(found, list):
                raise MissingParameter(f"Missing required parameter: 'input[{index}].tools'.", param=f"input[{index}]")
            deferred = item["type"] == "additional_tools" and searches_on_client(found)
            declare_tools(toolbox, found, f"input[{index}].tools", skip_deferred=deferred)
    return toolbox


def _pieces(items: list[Json], dialect: Dialect, toolbox: Toolbox) -> tuple[list[Piece], list[str]]:
    pieces: list[Piece] = []
    left_out: list[str] = []
    for index, item in enumerate(items):
        path = f"input[{index}]"
        kind = item_type(item)
        row = ITEMS.get(kind)
        if row is None:
            raise UnsupportedItem(
                f"Invalid value at '{path}.type': {item.get('type')!r} is not an input item type.", param=f"{path}.type"
            )
        if row.left_out:
            left_out.append(f"{path}.type={kind}")
        pieces += row.pieces(item, At(path, dialect, toolbox))
    return pieces, left_out


def _add_tools(body: Json, request: TurnRequest, toolbox: Toolbox, dialect: Dialect) -> list[str]:
    """Tools, choice and parallel calls. None of the three is sent when no tool is left: vLLM refuses them."""
    choice = choose_tools(request.tool_choice, toolbox)
    ignored = [choice.left_out] if choice.left_out else []
    names = [n for n in toolbox.functions if choice.only is None or n in choice.only]
    if not names or (choice.mode == "none" and dialect.tool_choice == "ignored"):
        return ignored + (["tool_choice"] if choice.mode == "required" and not choice.left_out else [])
    body["tools"] = [_chat_tool(toolbox.functions[name], dialect) for name in names]
    if choice.mode != "auto":
        if dialect.tool_choice == "ignored":
            ignored.append("tool_choice")
        else:
            body["tool_choice"] = _chat_choice(choice.mode, names if choice.only else [], dialect)
    if request.parallel_tool_calls is False and dialect.parallel_tool_calls:
        body["parallel_tool_calls"] = False
    return ignored


def _chat_tool(function: Json, dialect: Dialect) -> Json:
    kept = function if dialect.strict_tools else {k: v for k, v in function.items() if k != "strict"}
    return {"type": "function", "function": kept}


def _chat_choice(mode: str, only: list[str], dialect: Dialect) -> str | Json:
    if mode == "required" and len(only) == 1 and dialect.tool_choice == "named":
        return {"type": "function", "function": {"name": only[0]}}
    return dialect.required_word if mode == "required" else mode


def _add_sampling(body: Json, request: TurnRequest, items: list[Json], dialect: Dialect) -> list[str]:
    """Only what the client set: a null is an error on some backends."""
    ignored = []
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        value = getattr(request, name)
        if value is None:
            continue
        if name.endswith("penalty") and not dialect.penalties:
            ignored.append(name)
        else:
            body[name] = value
    if request.max_output_tokens is not None:
        body[dialect.max_tokens_field] = request.max_output_tokens
    if request.wants_logprobs and dialect.logprobs:
        body["logprobs"] = True
        if request.top_logprobs:
            body["top_logprobs"] = request.top_logprobs
    elif request.wants_logprobs:
        ignored.append("include=message.output_text.logprobs")
    if request.service_tier not in (None, "auto", "default"):
        ignored += _put(body, "service_tier", request.service_tier, dialect.service_tier)
    if request.truncation == "auto":
        ignored.append("truncation")
    if request.reasoning and request.reasoning.mode:
        ignored.append("reasoning.mode")
    return ignored


def _put(body: Json, name: str, value: Any, known: bool) -> list[str]:
    if known:
        body[name] = value
        return []
    return [name]


def _configured(items: list[Json], section: str, key: str) -> Any:
    """The newest `configuration_update` item's word on a setting, or None."""
    for item in reversed(items):
        if item.get("type") == "configuration_update" and isinstance(item.get(section), dict):
            return item[section].get(key)
    return None


def _add_format(body: Json, request: TurnRequest, items: list[Json], dialect: Dialect) -> list[str]:
    """`text.format` is flat here and nested in chat."""
    ignored = []
    text = request.text
    if text and text.verbosity:
        ignored += _put(body, "verbosity", text.verbosity, dialect.verbosity)
        ignored = ["text.verbosity" for _ in ignored]
    form = _configured(items, "text", "format") or (text and text.format and _format_fields(text.format))
    if not form or form.get("type") == "text":
        return ignored
    if not dialect.response_format or ("tools" in body and not dialect.response_format_with_tools):
        return [*ignored, "text.format"]
    kind = form["type"]
    body["response_format"] = {"type": kind}
    if kind == "json_schema":
        body["response_format"]["json_schema"] = {k: v for k, v in form.items() if k != "type" and v is not None}
    return ignored


def _format_fields(form: Any) -> Json:
    names = ("type", "name", "description", "schema", "strict")
    return {name: value for name in names if (value := getattr(form, name)) is not None}


def _add_effort(body: Json, request: TurnRequest, items: list[Json], dialect: Dialect) -> list[str]:
    effort = _configured(items, "reasoning", "effort") or (request.reasoning and request.reasoning.effort)
    if not effort:
        return []
    if dialect.effort == "template":
        body["chat_template_kwargs"] = {"enable_thinking": effort != "none", "reasoning_effort": effort}
    elif dialect.effort:
        body["reasoning_effort"] = effort
    else:
        return ["reasoning.effort"]
    return []
