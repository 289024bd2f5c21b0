"""Tool declarations and tool calls, in both directions: Responses tools as chat functions, chat calls as typed items.

May not do I/O. Backends know functions only, so every client-executed tool goes out as a function and its call comes
back in the item type the client expects; a chat name that had to be made up is mapped back.
Source: ToolParam, ToolChoice and the call items of the openai SDK 3.52, read 2026-11-20.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import orjson

from errors import InvalidRequest, MissingParameter, UnsupportedItem

Json = dict[str, Any]
T = TypeVar("T")

NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_-]")
EMPTY_SCHEMA: Json = {"type": "object", "properties": {}}
KIND_NAMES: dict[type, str] = {str: "a string", dict: "an object", list: "an array", bool: "a boolean"}


@dataclass(frozen=True, slots=True)
class ToolRef:
    """Which tool of the client a chat function stands for; kind is a key of CALL_ITEMS."""

    kind: str
    name: str
    namespace: str | None = None


@dataclass(slots=True)
class Toolbox:
    """The tools of one turn: the chat functions in the order given, and the way back from their names."""

    functions: dict[str, Json] = field(default_factory=dict)
    refs: dict[str, ToolRef] = field(default_factory=dict)
    names: dict[ToolRef, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, ref: ToolRef, function: Json) -> None:
        """A tool listed again keeps its first place and form, so that earlier bytes of the prompt do not change."""
        if ref in self.names:
            return
        name = chat_name(ref.name, ref.namespace)
        if name in self.refs:
            name = _with_digest(name, f"{ref.kind} {ref.namespace} {ref.name}")
        self.names[ref] = name
        self.refs[name] = ref
        self.functions[name] = {"name": name, **function}

    def name_of(self, ref: ToolRef) -> str:
        """The chat name of a tool, also of one that is no longer declared."""
        return self.names.get(ref) or chat_name(ref.name, ref.namespace)


def chat_name(name: str, namespace: str | None = None) -> str:
    """A legal chat function name, the same for the same tool in every turn.

    Source: ^[a-zA-Z0-9_-]{1,64}$ of OpenAI's function names.
    """
    flat = f"{namespace}__{name}" if namespace else name
    legal = NOT_IN_A_NAME.sub("_", flat)
    return flat if legal == flat and 0 < len(flat) <= 64 else _with_digest(legal, flat)


def _with_digest(name: str, identity: str) -> str:
    return f"{name[:55]}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def resolve(refs: dict[str, ToolRef], name: str) -> ToolRef:
    """The client's tool behind the name a model called; a namespaced tool is also known by its bare name alone.

    A name that nobody declared stays a function call, which the client can answer.
    """
    if ref := refs.get(name):
        return ref
    bare = [ref for ref in refs.values() if ref.name == name]
    return bare[0] if len(bare) == 1 else ToolRef("function", name)


# -- declarations ------------------------------------------------------------------------------------------------------

Declared = Iterator[tuple[ToolRef, Json]]


def optional(value: Json, key: str, path: str, kind: type[T]) -> T | None:
    """A value of one JSON type, or None where it is null or absent. Raises: InvalidRequest."""
    found = value.get(key)
    if found is not None and not isinstance(found, kind):
        at = f"{path}.{key}"
        raise InvalidRequest(f"Invalid '{at}': expected {KIND_NAMES[kind]}.", param=at, code="invalid_type")
    return found


def required(value: Json, key: str, path: str, kind: type[T]) -> T:
    """A value of one JSON type. Raises: MissingParameter, InvalidRequest."""
    found = optional(value, key, path, kind)
    if found is None:
        raise MissingParameter(f"Missing required parameter: '{path}.{key}'.", param=f"{path}.{key}")
    return found


def named(value: Json, path: str, key: str = "name") -> str:
    """A string that is not empty. Raises: MissingParameter, InvalidRequest."""
    if not (name := required(value, key, path, str)):
        raise InvalidRequest(f"Invalid '{path}.{key}': empty string.", param=f"{path}.{key}", code="invalid_value")
    return name


def _described(tool: Json, path: str, default: str = "") -> Json:
    description = optional(tool, "description", path, str) or default
    return {"description": description} if description else {}


def _schema(tool: Json, path: str) -> Json:
    return optional(tool, "parameters", path, dict) or EMPTY_SCHEMA


def _function(tool: Json, path: str, namespace: str | None) -> Declared:
    name = named(tool, path)
    function = {**_described(tool, path), "parameters": _schema(tool, path)}
    strict = optional(tool, "strict", path, bool)
    if strict is not None:
        function["strict"] = strict
    yield ToolRef("function", name, namespace), function


def _custom(tool: Json, path: str, namespace: str | None) -> Declared:
    """One string of free text; a grammar cannot be enforced, so the model is told it."""
    text = optional(tool, "description", path, str) or ""
    form = optional(tool, "format", path, dict) or {"type": "text"}
    at = f"{path}.format"
    if form.get("type") == "grammar":
        syntax, definition = named(form, at, "syntax"), named(form, at, "definition")
        text = f"{text}\n\nThe input must match this {syntax} grammar:\n{definition}".strip()
    elif form.get("type") != "text":
        raise UnsupportedItem(f"Invalid value at '{at}.type': expected 'text' or 'grammar'.", param=f"{at}.type")
    schema = {
        "type": "object",
        "properties": {"input": {"type": "string", "description": "The whole input of the tool, as plain text."}},
        "required": ["input"],
    }
    described = {"description": text} if text else {}
    yield ToolRef("custom", named(tool, path), namespace), {**described, "parameters": schema}


def _namespace(tool: Json, path: str, namespace: str | None) -> Declared:
    name = named(tool, path)
    for index, inner in enumerate(required(tool, "tools", path, list)):
        if inner is DEFERRED:
            continue
        inner_path = f"{path}.tools[{index}]"
        if not isinstance(inner, dict) or inner.get("type") not in ("function", "custom"):
            raise UnsupportedItem(
                f"Invalid value at '{inner_path}.type': a namespace holds function and custom tools.",
                param=f"{inner_path}.type",
            )
        yield from TOOLS[inner["type"]].declare(inner, inner_path, name)


def _tool_search(tool: Json, path: str, namespace: str | None) -> Declared:
    """Client execution is a function; on the server's side every tool is loaded from the start, so none is needed."""
    if tool.get("execution") == "client":
        described = _described(tool, path, "Search for tools that are not loaded yet, and load them.")
        yield ToolRef("tool_search", "tool_search"), {**described, "parameters": _schema(tool, path)}


INTEGER: Json = {"type": "integer"}
STRINGS: Json = {"type": "array", "items": {"type": "string"}}
FIXED_FUNCTIONS: dict[str, Json] = {
    "apply_patch": {
        "description": "Create, update or delete one file. `diff` is a V4A diff; leave it out to delete.",
        "parameters": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
                "path": {"type": "string"},
                "diff": {"type": "string"},
            },
            "required": ["type", "path"],
        },
    },
    "shell": {
        "description": "Run shell commands, one after another, and return their output.",
        "parameters": {
            "type": "object",
            "properties": {"commands": STRINGS, "timeout_ms": INTEGER, "max_output_length": INTEGER},
            "required": ["commands"],
        },
    },
    "local_shell": {
        "description": "Run one command, given as a list of arguments, and return its output.",
        "parameters": {
            "type": "object",
            "properties": {"command": STRINGS, "working_directory": {"type": "string"}, "timeout_ms": INTEGER},
            "required": ["command"],
        },
    },
}


def _fixed(tool: Json, path: str, namespace: str | None) -> Declared:
    kind = tool["type"]
    yield ToolRef(kind, kind), FIXED_FUNCTIONS[kind]


# Stands in a namespace for a tool that waits for a search, so that the paths of its neighbours stay true.
DEFERRED: Json = {}


def _nothing(tool: Json, path: str, namespace: str | None) -> Declared:
    yield from ()


@dataclass(frozen=True, slots=True)
class ToolType:
    """What becomes of a tool type; `left_out` ones are named to the client."""

    declare: Callable[[Json, str, str | None], Declared]
    note: str
    left_out: bool = False


HOSTED_TOOLS = (
    "file_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
    "computer",
    "computer_use_preview",
    "code_interpreter",
    "image_generation",
    "mcp",
    "programmatic_tool_calling",
)
HOSTED = ToolType(_nothing, "hosted at OpenAI: left out and named", left_out=True)

TOOLS: dict[str, ToolType] = {
    "function": ToolType(_function, "a function"),
    "custom": ToolType(_custom, "a function with one string; comes back as `custom_tool_call`"),
    "namespace": ToolType(
        _namespace, "its tools as `namespace__name`, without its description; calls come back with `namespace`"
    ),
    "tool_search": ToolType(_tool_search, "client execution: a function; server execution: all tools are loaded"),
    "apply_patch": ToolType(_fixed, "a function; comes back as `apply_patch_call`"),
    "shell": ToolType(_fixed, "a function; comes back as `shell_call`"),
    "local_shell": ToolType(_fixed, "a function; comes back as `local_shell_call`"),
    **dict.fromkeys(HOSTED_TOOLS, HOSTED),
}


def declare_tools(toolbox: Toolbox, tools: list[Json], path: str, *, skip_deferred: bool = False) -> None:
    """Adds a list of tools; with skip_deferred those wait until a tool search has found them.

    Raises: UnsupportedItem for a type that no row decides, InvalidRequest for a malformed tool.
    """
    for index, tool in enumerate(tools):
        at = f"{path}[{index}]"
        kind, row = _row(tool, at)
        if row.left_out:
            toolbox.left_out.append(f"{at}.type={kind}")
        if skip_deferred and tool.get("defer_loading"):
            continue
        for ref, function in row.declare(_loaded(tool, at) if skip_deferred else tool, at, None):
            toolbox.add(ref, function)


def _row(tool: Any, path: str) -> tuple[str, ToolType]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    row = TOOLS.get(kind) if isinstance(kind, str) else None
    if row is None:
        raise UnsupportedItem(f"Invalid value at '{path}.type': {kind!r} is not a tool type.", param=f"{path}.type")
    return str(kind), row


def _loaded(tool: Json, path: str) -> Json:
    if tool.get("type") != "namespace":
        return tool
    inner = required(tool, "tools", path, list)
    return {**tool, "tools": [DEFERRED if isinstance(t, dict) and t.get("defer_loading") else t for t in inner]}


def searches_on_client(tools: list[Json]) -> bool:
    return any(t.get("type") == "tool_search" and t.get("execution") == "client" for t in tools if isinstance(t, dict))


# -- tool choice -------------------------------------------------------------------------------------------------------


class Choice(msgspec.Struct, frozen=True):
    """What of the toolbox is sent, under which mode; `only` holds chat names, None means all."""

    mode: str
    only: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()


def _choose_named(choice: Json, toolbox: Toolbox) -> Choice:
    return Choice("required", (_chosen(choice, toolbox, "tool_choice"),))


def _chosen(choice: Json, toolbox: Toolbox, path: str) -> str:
    kind = choice["type"]
    name = named(choice, path) if kind in ("function", "custom") else kind
    ref = ToolRef(kind, name, optional(choice, "namespace", path, str) or None)
    if ref not in toolbox.names:
        same = [r for r in toolbox.names if r.kind == kind and r.name == ref.name]
        if len(same) != 1:
            raise _not_found(ref.name, path)
        ref = same[0]
    return toolbox.names[ref]


def _choose_allowed(choice: Json, toolbox: Toolbox) -> Choice:
    mode = choice.get("mode")
    if mode not in ("auto", "required"):
        raise InvalidRequest("Invalid 'tool_choice.mode': expected 'auto' or 'required'.", param="tool_choice.mode")
    only: list[str] = []
    left_out: list[str] = []
    for index, tool in enumerate(required(choice, "tools", "tool_choice", list)):
        path = f"tool_choice.tools[{index}]"
        kind, row = _row(tool, path)
        if row.left_out:
            left_out.append(f"{path}.type={kind}")
        else:
            only += _allowed(tool, toolbox, path)
    return Choice(mode, tuple(only), tuple(left_out))


def _allowed(tool: Json, toolbox: Toolbox, path: str) -> list[str]:
    if tool["type"] != "namespace":
        return [_chosen(tool, toolbox, path)]
    namespace = named(tool, path)
    if not (found := [name for ref, name in toolbox.names.items() if ref.namespace == namespace]):
        raise _not_found(namespace, path)
    return found


def _not_found(name: str, path: str) -> InvalidRequest:
    return InvalidRequest(f"Tool choice '{name}' not found in 'tools' parameter.", param=path)


def _choose_hosted(choice: Json, toolbox: Toolbox) -> Choice:
    return Choice("auto", left_out=(f"tool_choice.type={choice['type']}",))


TOOL_CHOICES: dict[str, tuple[Callable[[Json, Toolbox], Choice], str]] = {
    **dict.fromkeys(
        ("function", "custom", "apply_patch", "shell", "local_shell"),
        (_choose_named, "only that tool is sent, and required"),
    ),
    "allowed_tools": (_choose_allowed, "only those tools are sent"),
    **dict.fromkeys((*HOSTED_TOOLS, "computer_use"), (_choose_hosted, "hosted at OpenAI: left out and named")),
}
MODES = ("none", "auto", "required")


def choose_tools(choice: str | Json | None, toolbox: Toolbox) -> Choice:
    """What the request's tool_choice leaves to the model. Raises: InvalidRequest, UnsupportedItem."""
    if choice is None:
        return Choice("auto")
    if isinstance(choice, str):
        if choice not in MODES:
            raise InvalidRequest(
                f"Invalid 'tool_choice': {choice!r}. Supported values are: 'none', 'auto' and 'required'.",
                param="tool_choice",
                code="invalid_value",
            )
        return Choice(choice)
    row = TOOL_CHOICES.get(str(choice.get("type")))
    if row is None:
        raise UnsupportedItem(f"Invalid value at 'tool_choice.type': {choice.get('type')!r}.", param="tool_choice.type")
    return row[0](choice, toolbox)


# -- calls: from the client's items to chat arguments ------------------------------------------------------------------


def dumps(value: Any) -> str:
    return orjson.dumps(value).decode()


def arguments_of_operation(operation: Any) -> str:
    return dumps(operation if isinstance(operation, dict) else {})


def arguments_of_action(action: Any) -> str:
    """A shell action without the keys the model never wrote."""
    kept = action if isinstance(action, dict) else {}
    return dumps({k: v for k, v in kept.items() if v is not None and k not in ("type", "env", "user")})


def valid_arguments(arguments: str) -> str:
    """Arguments that every backend can read: a JSON object, or `{}` for what is broken or empty.

    Source: llama.cpp and transformers answer 500 on "", Ollama and SGLang 400 (tests/wire/edges.txt).
    """
    return arguments if is_object(arguments) else "{}"


def is_object(arguments: str) -> bool:
    try:
        return isinstance(orjson.loads(arguments), dict)
    except orjson.JSONDecodeError:
        return False


# -- calls: from chat arguments to the client's items ------------------------------------------------------------------


def _parsed(arguments: str) -> Json:
    value: Json = orjson.loads(arguments) if is_object(arguments) else {}
    return value


def _function_call(ref: ToolRef, arguments: str) -> Json:
    return {"type": "function_call", "name": ref.name, "arguments": arguments, **_namespaced(ref)}


def _namespaced(ref: ToolRef) -> Json:
    return {"namespace": ref.namespace} if ref.namespace else {}


def _custom_call(ref: ToolRef, arguments: str) -> Json:
    """The raw text; a model that named the string otherwise, or sent no object, is understood too."""
    values = list(_parsed(arguments).values())
    text = _parsed(arguments).get("input", values[0] if len(values) == 1 else None)
    text = text if isinstance(text, str) else arguments
    return {"type": "custom_tool_call", "name": ref.name, "input": text, **_namespaced(ref)}


def _tool_search_call(ref: ToolRef, arguments: str) -> Json:
    return {"type": "tool_search_call", "arguments": _parsed(arguments), "execution": "client"}


def _apply_patch_call(ref: ToolRef, arguments: str) -> Json:
    given = _parsed(arguments)
    kind, path = given.get("type"), given.get("path")
    if kind not in ("create_file", "update_file", "delete_file") or not isinstance(path, str):
        return _function_call(ref, arguments)
    diff = {} if kind == "delete_file" else {"diff": str(given.get("diff") or "")}
    return {"type": "apply_patch_call", "operation": {"type": kind, "path": path, **diff}}


def _shell_call(ref: ToolRef, arguments: str) -> Json:
    given = _parsed(arguments)
    commands = _strings(given.get("commands"))
    if not commands:
        return _function_call(ref, arguments)
    limits = {key: given.get(key) for key in ("timeout_ms", "max_output_length")}
    return {"type": "shell_call", "action": {"commands": commands, **limits}}


def _local_shell_call(ref: ToolRef, arguments: str) -> Json:
    given = _parsed(arguments)
    command = _strings(given.get("command"))
    if not command:
        return _function_call(ref, arguments)
    extra = {key: given[key] for key in ("timeout_ms", "working_directory") if given.get(key) is not None}
    return {"type": "local_shell_call", "action": {"type": "exec", "command": command, "env": {}, **extra}}


def _strings(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(v) for v in values]


# Kind of tool -> the item of its call, without id, call id and status. What does not fit becomes a function call.
CALL_ITEMS: dict[str, Callable[[ToolRef, str], Json]] = {
    "function": _function_call,
    "custom": _custom_call,
    "tool_search": _tool_search_call,
    "apply_patch": _apply_patch_call,
    "shell": _shell_call,
    "local_shell": _local_shell_call,
}
# The id prefix of each call item. Source: ids seen on the live API.
CALL_ID_PREFIX = {
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "tool_search_call": "tsc",
    "apply_patch_call": "apc",
    "shell_call": "sh",
    "local_shell_call": "lsh",
}
# Call items without a status field in the SDK's types.
CALLS_WITHOUT_STATUS = frozenset({"custom_tool_call"})


def call_item(ref: ToolRef, arguments: str) -> Json:
    """The item that tells the client of a finished call."""
    return CALL_ITEMS[ref.kind](ref, arguments)
