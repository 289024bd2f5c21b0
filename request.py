"""The validated request value: its fields, what becomes of each, its limits, and its echo in the response.

May not do I/O, nor know chat messages. One `TurnRequest` travels from the edge to the translator; nobody unpacks it.
Source: ResponseCreateParams of the openai SDK 3.52 and the Open Responses schema, read 2026-11-20.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import orjson

from errors import InvalidRequest, MissingParameter, ProxyError, UnsupportedParameter
from fields import REQUEST_FIELDS

Json = dict[str, Any]

# The type of the item that asks for a compaction.
TRIGGER = "compaction_trigger"

# Values of `include`. Source: ResponseIncludable; the last two are the ones that mean something here.
INCLUDABLE = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class Reasoning(msgspec.Struct, frozen=True):
    """`reasoning`. Source: shared_params.Reasoning."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "all_turns", "current_turn"] | None = None
    mode: str | None = None


class TextFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """`text.format`, flat. Source: ResponseFormatTextConfig."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")] | None = None
    schema: Json | None = None
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct, frozen=True):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ContextManagement(msgspec.Struct, frozen=True):
    """An entry of `context_management`; without a threshold, it is ours to choose."""

    type: Literal["compaction"]
    compact_threshold: Annotated[int, msgspec.Meta(ge=1000)] | None = None


class TurnRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """POST /v1/responses, validated; null equals absence. Items and tools stay raw."""

    model: str
    input: str | list[Json] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | Json | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: Json | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=16)] | None = None
    max_tool_calls: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Unit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: list[INCLUDABLE] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    safety_identifier: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    prompt_cache_key: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: Json | None = None
    user: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    context_management: list[ContextManagement] | None = None
    prompt: Json | None = None
    # Names of what the client sent and nobody here uses: fields without a row, and rows that are left out.
    unused: tuple[str, ...] = ()

    @property
    def items(self) -> list[Json]:
        """The new input items, oldest first; a string is one user message."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input or []

    @property
    def is_trigger(self) -> bool:
        """Whether it asks for a compaction and nothing else."""
        return isinstance(self.input, list) and bool(self.input) and self.input[-1].get("type") == TRIGGER

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def conversation_id(self) -> str | None:
        return self.conversation["id"] if isinstance(self.conversation, dict) else self.conversation

    def includes(self, name: str) -> bool:
        return name in (self.include or ())


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold."""

    json_depth: int = 128
    items: int = 20_000
    tools: int = 2_000


def parse_body(body: bytes, limits: RequestLimits) -> Json:
    """The JSON object in a request body. Raises: InvalidRequest."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    # A body with fewer brackets than the limit cannot be deeper than it; most bodies are spared the walk.
    if body.count(b"{") + body.count(b"[") > limits.json_depth and _depth(value) > limits.json_depth:
        raise InvalidRequest(f"The request body is nested deeper than {limits.json_depth} levels.")
    return value


USED = frozenset(name for name, field in REQUEST_FIELDS.items() if field.fate != "left out")
KNOWN_IN = {"reasoning": frozenset(Reasoning.__struct_fields__), "text": frozenset(Text.__struct_fields__)}


def parse_request(body: Json, limits: RequestLimits, *, may_be_empty: bool = False) -> TurnRequest:
    """The validated request; `may_be_empty`: without anything for the model.

    Raises: InvalidRequest with the path of the first thing that is wrong.
    """
    if not body.get("model"):
        raise MissingParameter("Missing required parameter: 'model'.", param="model")
    try:
        request = msgspec.convert({**body, "unused": tuple(_unused(body))}, TurnRequest)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    for check in CHECKS if may_be_empty else (_check_given, *CHECKS):
        check(request, limits)
    return request


def _unused(body: Json) -> list[str]:
    names = [name for name, value in body.items() if name not in USED and value is not None]
    for section, known in KNOWN_IN.items():
        if section in body and isinstance(inner := body[section], dict):
            names += [f"{section}.{key}" for key in inner if key not in known]
    if "context_management" in body:
        names += _unused_in_entries(body["context_management"])
    return sorted(names)


def _unused_in_entries(entries: Any) -> list[str]:
    known = ContextManagement.__struct_fields__
    named = [(n, entry) for n, entry in enumerate(entries)] if isinstance(entries, list) else []
    return [
        f"context_management[{n}].{k}" for n, entry in named if isinstance(entry, dict) for k in entry if k not in known
    ]


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level:
        depth += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return depth


MSGSPEC_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
# How msgspec's words begin -> the live API's code; anything else is `invalid_type`.
CODE_OF = {
    "Expected `int` >=": "integer_below_min_value",
    "Expected `int` <=": "integer_above_max_value",
    "Expected `float` >=": "decimal_below_min_value",
    "Expected `float` <=": "decimal_above_max_value",
    "Expected `str` of length <=": "string_above_max_length",
    "Expected `str` matching": "invalid_value",
    "Invalid enum value": "invalid_value",
    "Object missing required field": "missing_required_parameter",
}


def invalid(error: msgspec.ValidationError, parent: str = "") -> InvalidRequest:
    """What msgspec found wrong, with its path below `parent`."""
    found = MSGSPEC_PATH.match(str(error))
    what, inner = (found["what"], found["path"] or "") if found else (str(error), "")
    path = ".".join(name for name in (parent, inner) if name)
    code = next((code for words, code in CODE_OF.items() if what.startswith(words)), "invalid_type")
    return InvalidRequest(f"Invalid '{path}': {what}." if path else f"{what}.", param=path or None, code=code)


def _check_given(request: TurnRequest, limits: RequestLimits) -> None:
    if not request.input and not request.previous_response_id and not request.conversation and not request.prompt:
        raise MissingParameter(
            "One of \"input\" or \"previous_response_id\" or 'prompt' or 'conversation_id' must be provided.",
            param="input",
        )


def _check_counts(request: TurnRequest, limits: RequestLimits) -> None:
    for name, held, limit in (("input", request.items, limits.items), ("tools", request.tools or (), limits.tools)):
        if len(held) > limit:
            raise InvalidRequest(f"Invalid '{name}': more than {limit} elements.", param=name)


def check_metadata(metadata: dict[str, str]) -> None:
    """Raises: InvalidRequest."""
    if len(metadata) > 16:
        raise InvalidRequest("Invalid 'metadata': at most 16 keys.", param="metadata")
    for key, value in metadata.items():
        if len(key) > 64 or len(value) > 512:
            raise InvalidRequest(
                f"Invalid 'metadata.{key[:64]}': keys have at most 64 characters, values at most 512.",
                param=f"metadata.{key[:64]}",
            )


def check_format(text: Text | None, path: str) -> None:
    """Raises: MissingParameter for a JSON schema without its name or the schema itself."""
    text_format = text and text.format
    if text_format and text_format.type == "json_schema":
        for key in ("name", "schema"):
            if getattr(text_format, key) is None:
                at = f"{path}.format.{key}"
                raise MissingParameter(f"Missing required parameter: '{at}'.", param=at)


def _check_stream_options(request: TurnRequest, limits: RequestLimits) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )


def _check_prompt(request: TurnRequest, limits: RequestLimits) -> None:
    if request.prompt is not None:
        raise UnsupportedParameter(
            "'prompt' names a template stored at OpenAI, which is not reachable from here; send 'instructions' and "
            "'input' instead.",
            param="prompt",
        )


def _check_exclusive(request: TurnRequest, limits: RequestLimits) -> None:
    if request.previous_response_id and request.conversation:
        raise InvalidRequest(
            "Mutually exclusive parameters: 'previous_response_id' and 'conversation' cannot be used together.",
            code="mutually_exclusive_parameters",
        )


def _check_trigger(request: TurnRequest, limits: RequestLimits) -> None:
    """Raises: InvalidRequest for a trigger with something behind it."""
    given = request.input if isinstance(request.input, list) else []
    for index, item in enumerate(given[:-1]):
        if item.get("type") == TRIGGER:
            raise InvalidRequest(
                f"Invalid 'input[{index}]': a {TRIGGER} has to be the last item.", param=f"input[{index}]"
            )


ID_PREFIXES = {"previous_response_id": "resp", "conversation": "conv_"}


def _check_ids(request: TurnRequest, limits: RequestLimits) -> None:
    for name, prefix in ID_PREFIXES.items():
        value = getattr(request, name)
        given = value.get("id") if isinstance(value, dict) else value
        if value is not None and not (isinstance(given, str) and given.startswith(prefix)):
            raise InvalidRequest(
                f"Invalid '{name}': {str(given)[:64]!r}. Expected an ID that begins with '{prefix}'.",
                param=name,
                code="invalid_id_prefix",
            )


CHECKS = (
    _check_counts,
    lambda request, limits: check_metadata(request.metadata or {}),
    lambda request, limits: check_format(request.text, "text"),
    _check_stream_options,
    _check_prompt,
    _check_exclusive,
    _check_ids,
    _check_trigger,
)


def echo(request: TurnRequest) -> Json:
    """The fields of a response that repeat the request, with the defaults of the Open Responses schema."""
    reasoning = request.reasoning or Reasoning()
    return {
        "background": bool(request.background),
        "conversation": {"id": request.conversation_id} if request.conversation else None,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "presence_penalty": request.presence_penalty or 0.0,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "prompt_cache_retention": request.prompt_cache_retention and request.prompt_cache_retention.replace("-", "_"),
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
        "safety_identifier": request.safety_identifier,
        "service_tier": request.service_tier or "auto",
        "store": request.is_stored,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": _echo_text(request.text),
        "tool_choice": request.tool_choice or "auto",
        "tools": [_echo_tool(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


def _echo_text(text: Text | None) -> Json:
    text_format = text and text.format
    echoed: Json = {"format": msgspec.to_builtins(text_format) if text_format else {"type": "text"}}
    if text_format and text_format.type == "json_schema":
        echoed["format"].setdefault("strict", False)
    if text and text.verbosity:
        echoed["verbosity"] = text.verbosity
    return echoed


def _echo_tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


def refuse_unused(names: tuple[str, ...]) -> ProxyError:
    """What `strict = true` answers when something would be left out; `param` is the first name."""
    return UnsupportedParameter(
        f"Unsupported: {', '.join(names)}. This proxy is set to refuse what it cannot honour (strict = true).",
        param=names[0],
    )
