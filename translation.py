"""Items to chat messages, and the chat request body: named passes over the pieces, and one small function a setting.

May not do I/O, read the clock, make ids or know settings. Rendering is byte-stable: the messages of one turn are an
exact prefix of the next turn's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dialects import GENERIC, Dialect
from errors import InvalidRequest, UnsupportedItem
from items import ITEMS, At, Called, Content, Piece, Returned, Thought, item_type
from request import Reasoning, Text, TurnRequest, check_format, invalid
from tools import Toolbox, ToolRef, choose_tools, declare_tools, required, searches_on_client

Json = dict[str, Any]


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
            if self._open.text or self._open.calls:
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
    """Two neighbours of one role become one message; each tool message stays for itself."""
    merged: list[Json] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last and last["role"] == message["role"] != "tool":
            merged[-1] = {**last, **message, "content": _joined(last["content"], message["content"])}
        else:
            merged.append(message)
    return merged


def _joined(first: Content, second: Content) -> Content:
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(text for text in (first, second) if text)
    return [*_parts(first), *_parts(second)]


def _parts(content: Content) -> list[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def part_user_from_tool(messages: list[Json]) -> list[Json]:
    """A short assistant message between a tool message and a user message."""
    parted: list[Json] = []
    for message in messages:
        if parted and parted[-1]["role"] == "tool" and message["role"] == "user":
            parted.append({"role": "assistant", "content": "OK."})
        parted.append(message)
    return parted


# -- the whole body ----------------------------------------------------------------------------------------------------


class Rendered(msgspec.Struct, frozen=True):
    """A chat request, and what its answer needs to become items again."""

    body: Json
    refs: dict[str, ToolRef]
    call_ids: frozenset[str]
    ignored: tuple[str, ...]


def render(request: TurnRequest, items: list[Json], dialect: Dialect, model: str) -> Rendered:
    """The chat request body, `stream` aside.

    items: the window, oldest first, which ends with the request's own. Raises: InvalidRequest with the path of what is
    wrong.
    """
    ignored = list(request.unused)
    paths = _paths(request, items)
    toolbox = _toolbox(request, items, paths)
    pieces, left_out = _pieces(items, paths, dialect, toolbox)
    outputs = pair_outputs(pieces)
    messages = lead_with_system(group_messages(pieces, outputs, dialect), request.instructions, dialect)
    if dialect.merge_neighbours:
        messages = merge_neighbours(messages)
    if dialect.assistant_after_tool:
        messages = part_user_from_tool(messages)
    body: Json = {"model": model, "messages": messages}
    ignored += left_out + toolbox.left_out
    ignored += _add_tools(body, request, toolbox, dialect)
    effective = configured(request, items, paths)
    for add in (_add_sampling, _add_logprobs, _add_modes, _add_format, _add_effort):
        ignored += add(body, effective, dialect)
    call_ids = frozenset(piece.call_id for piece in pieces if isinstance(piece, Called))
    return Rendered(body, toolbox.refs, call_ids, tuple(ignored))


def check_items(items: list[Json], root: str) -> None:
    """Raises: InvalidRequest for an item that no request could render, with its path below `root`."""
    request = TurnRequest(model="")
    paths = [f"{root}[{index}]" for index in range(len(items))]
    _pieces(items, paths, GENERIC, _toolbox(request, items, paths))
    configured(request, items, paths)


def _paths(request: TurnRequest, items: list[Json]) -> list[str]:
    """Where each item stands for the client: in its input, or in the history before it."""
    own = 1 if isinstance(request.input, str) else len(request.input or ())
    earlier = len(items) - own
    return [f"input[{i - earlier}]" if i >= earlier else f"history[{i}]" for i in range(len(items))]


class ConfigurationUpdate(msgspec.Struct, frozen=True):
    """What a `configuration_update` item may change. Source: ResponseConfigurationUpdateItemParam."""

    reasoning: Reasoning | None = None
    text: Text | None = None


def configured(request: TurnRequest, items: list[Json], paths: list[str]) -> TurnRequest:
    """The request with the newest word of the `configuration_update` items. Raises: InvalidRequest."""
    if not any(item.get("type") == "configuration_update" for item in items):
        return request
    text, reasoning = request.text or Text(), request.reasoning or Reasoning()
    for path, item in zip(paths, items, strict=True):
        if item.get("type") != "configuration_update":
            continue
        try:
            update = msgspec.convert(item, ConfigurationUpdate)
        except msgspec.ValidationError as error:
            raise invalid(error, path) from error
        check_format(update.text, f"{path}.text")
        if update.text and update.text.format:
            text = msgspec.structs.replace(text, format=update.text.format)
        if update.reasoning and update.reasoning.effort:
            reasoning = msgspec.structs.replace(reasoning, effort=update.reasoning.effort)
    return msgspec.structs.replace(request, text=text, reasoning=reasoning)


def has_files(items: list[Json]) -> bool:
    """Whether rendering has a file to read, which can take long."""
    return any(
        part.get("type") == "input_file"
        for item in items
        for key in ("content", "output")
        if isinstance(item.get(key), list)
        for part in item[key]
        if isinstance(part, dict)
    )


def _toolbox(request: TurnRequest, items: list[Json], paths: list[str]) -> Toolbox:
    toolbox = Toolbox()
    tools = request.tools or []
    searching = searches_on_client(tools)
    declare_tools(toolbox, tools, "tools", skip_deferred=searching)
    for path, item in zip(paths, items, strict=True):
        if item.get("type") in ("additional_tools", "tool_search_output"):
            found = required(item, "tools", path, list)
            searching = searching or searches_on_client(found)
            waiting = searching and item["type"] == "additional_tools"
            declare_tools(toolbox, found, f"{path}.tools", skip_deferred=waiting)
    return toolbox


def _pieces(items: list[Json], paths: list[str], dialect: Dialect, toolbox: Toolbox) -> tuple[list[Piece], list[str]]:
    pieces: list[Piece] = []
    left_out: list[str] = []
    for path, item in zip(paths, items, strict=True):
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
    ignored = [*choice.left_out]
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


def _add_sampling(body: Json, request: TurnRequest, dialect: Dialect) -> list[str]:
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
    return ignored


def _add_logprobs(body: Json, request: TurnRequest, dialect: Dialect) -> list[str]:
    """`top_logprobs` without `logprobs` is an error on vLLM and llama.cpp, so neither goes out unless asked for."""
    if not request.includes("message.output_text.logprobs"):
        return []
    if not dialect.logprobs:
        return ["include=message.output_text.logprobs"]
    body["logprobs"] = True
    if request.top_logprobs:
        body["top_logprobs"] = request.top_logprobs
    return []


# Settings that would change something, and that nothing here can honour yet: named when they are asked for.
UNHONOURED: tuple[tuple[str, Callable[[TurnRequest], Any]], ...] = (
    ("reasoning.mode", lambda request: request.reasoning and request.reasoning.mode),
    ("reasoning.context", lambda request: request.reasoning and request.reasoning.context == "current_turn"),
)


def _add_modes(body: Json, request: TurnRequest, dialect: Dialect) -> list[str]:
    ignored = []
    if request.service_tier not in (None, "auto", "default"):
        ignored += _put(body, "service_tier", request.service_tier, dialect.service_tier)
    ignored += [name for name, is_asked in UNHONOURED if is_asked(request)]
    return ignored


def _put(body: Json, name: str, value: Any, known: bool) -> list[str]:
    if known:
        body[name] = value
        return []
    return [name]


def _add_format(body: Json, request: TurnRequest, dialect: Dialect) -> list[str]:
    """`text.format` is flat here and nested in chat."""
    ignored = []
    text = request.text
    if text and text.verbosity:
        ignored += ["text.verbosity" for _ in _put(body, "verbosity", text.verbosity, dialect.verbosity)]
    form = text and text.format
    if not form or form.type == "text":
        return ignored
    if not dialect.response_format or ("tools" in body and not dialect.response_format_with_tools):
        return [*ignored, "text.format"]
    body["response_format"] = {"type": form.type}
    if form.type == "json_schema":
        given = {name: getattr(form, name) for name in ("name", "description", "schema", "strict")}
        body["response_format"]["json_schema"] = {name: value for name, value in given.items() if value is not None}
    return ignored


def _add_effort(body: Json, request: TurnRequest, dialect: Dialect) -> list[str]:
    effort = request.reasoning and request.reasoning.effort
    if not effort:
        return []
    if dialect.effort == "template":
        body["chat_template_kwargs"] = {"enable_thinking": effort != "none", "reasoning_effort": effort}
    elif dialect.effort:
        body["reasoning_effort"] = effort
    else:
        return ["reasoning.effort"]
    return []
