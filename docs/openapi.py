"""Writes docs/openapi.json, OpenAPI 3.1, from the tables in the code; with --check, fails when it differs.

Request schemas are those that requests are validated by. What the code checks in prose, and what it answers, stands
here as tables. A route is a row of ROUTES, and a row of routes.md, which describes it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from errors import ProxyError  # noqa: E402
from fields import REQUEST_FIELDS  # noqa: E402
from items import ITEMS, PARTS, ROLES  # noqa: E402
from keeper import begin  # noqa: E402
from once import KEY_CHARACTERS  # noqa: E402
from records import ID_PREFIX  # noqa: E402
from request import ID_PREFIXES, TurnRequest  # noqa: E402
from stored import (  # noqa: E402
    AddedItems,
    ChangedConversation,
    ItemQuery,
    ItemsQuery,
    NewConversation,
    ResponsesQuery,
    RetrieveQuery,
)
from tools import MODES, TOOL_CHOICES, TOOLS  # noqa: E402
from upstream_errors import UpstreamRefused  # noqa: E402
from windows import COMPACT_FIELDS, COUNTED_FIELDS  # noqa: E402

Json = dict[str, Any]
DOCUMENT = ROOT / "docs" / "openapi.json"
SCHEMAS = "#/components/schemas/"
JSON = "application/json"


def ref(name: str) -> Json:
    return {"$ref": f"{SCHEMAS}{name}"}


def nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Json, **limits: int) -> Json:
    return {"type": "array", "items": items, **limits}


def enum(*values: str) -> Json:
    return {"type": "string", "enum": sorted(values)}


def object_of(required: Mapping[str, Json], optional: Mapping[str, Json] | None = None) -> Json:
    """An object; what it may hold besides is nobody's business."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


TEXT: Json = {"type": "string"}
NAME: Json = {"type": "string", "minLength": 1}
OBJECT: Json = {"type": "object"}
TEXTS: Json = {"type": "object", "additionalProperties": TEXT}
LIST: Json = {"type": "array"}
NULL: Json = {"type": "null"}
EMPTY: Json = {"enum": [None, ""]}
BOOLEAN: Json = {"type": "boolean"}
COUNT: Json = {"type": "integer", "minimum": 0}
AT: Json = {"type": "integer", "description": "Unix seconds"}
DURATION: Json = {"type": "string", "pattern": "^([0-9]+ms|([0-9]+h)?([0-9]+m)?[0-9.]+s)$"}


# -- routes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """What a route takes and answers; `errors` beside those of every route that asks who is there."""

    id: str
    answer: str  # the schema of a 200, or its media type where that is text, or all there are
    errors: tuple[int | str, ...] = ()
    body: str | None = None
    query: type[msgspec.Struct] | None = None
    is_streamed: bool = False
    headers: tuple[str, ...] = ()  # of a 200
    request_headers: tuple[str, ...] = ()
    is_body_required: bool = True
    # Status -> the schema of its answer, where that is no error's.
    told: Mapping[int, str] = field(default_factory=dict)


# Errors of the routes that ask a backend. `4XX`: what it refuses with a status of its own.
ASKED = (429, "4XX", 502, 503, 504, 529)
TURN = (404, 409, 413, *ASKED)
IGNORED, REPLAYED, UPSTREAM = "x-responses-proxy-ignored", "idempotent-replayed", "x-responses-proxy-upstream"
# What is left of the limits of the settings, where they limit requests or tokens a minute.
LEFT = tuple(f"x-ratelimit-{key}-{name}" for name in ("requests", "tokens") for key in ("limit", "remaining", "reset"))


def passed(name: str) -> Operation:
    """A route whose body and answers are the backend's own; an error of the proxy has any status, too."""
    return Operation(name, "*/*", ("default",), body="Anything", headers=LEFT)


ROUTES: dict[tuple[str, str], Operation] = {
    ("POST", "/responses"): Operation(
        "createResponse",
        "Response",
        TURN,
        body="CreateResponse",
        is_streamed=True,
        headers=(IGNORED, REPLAYED, UPSTREAM, *LEFT),
        request_headers=("idempotency-key",),
    ),
    ("GET", "/responses"): Operation("listResponses", "ResponseList", (101, 426, 503), query=ResponsesQuery),
    ("GET", "/responses/{id}"): Operation(
        "getResponse", "Response", (404, 503), query=RetrieveQuery, is_streamed=True, headers=(IGNORED,)
    ),
    ("DELETE", "/responses/{id}"): Operation("deleteResponse", "DeletedResponse", (404, 503)),
    ("POST", "/responses/{id}/cancel"): Operation("cancelResponse", "Response", (404, 413, 503)),
    ("GET", "/responses/{id}/input_items"): Operation("listInputItems", "ItemList", (404, 503), query=ItemsQuery),
    ("POST", "/conversations"): Operation(
        "createConversation", "Conversation", (404, 413, 503), body="NewConversation", is_body_required=False
    ),
    ("GET", "/conversations/{id}"): Operation("getConversation", "Conversation", (404, 503)),
    ("POST", "/conversations/{id}"): Operation(
        "updateConversation", "Conversation", (404, 413, 503), body="ChangedConversation"
    ),
    ("DELETE", "/conversations/{id}"): Operation("deleteConversation", "DeletedConversation", (404, 503)),
    ("POST", "/conversations/{id}/items"): Operation(
        "addItems", "ItemList", (404, 413, 503), body="AddedItems", query=ItemQuery
    ),
    ("GET", "/conversations/{id}/items"): Operation("listItems", "ItemList", (404, 503), query=ItemsQuery),
    ("GET", "/conversations/{id}/items/{item}"): Operation("getItem", "Item", (404, 503), query=ItemQuery),
    ("DELETE", "/conversations/{id}/items/{item}"): Operation("deleteItem", "Conversation", (404, 503)),
    ("POST", "/responses/compact"): Operation("compact", "Compaction", TURN, body="Compact", headers=(IGNORED, *LEFT)),
    ("POST", "/responses/input_tokens"): Operation(
        "countInputTokens", "InputTokens", TURN, body="CountInputTokens", headers=(IGNORED, *LEFT)
    ),
    ("GET", "/models"): Operation("listModels", "ModelList", ASKED),
    ("GET", "/models/{id}"): Operation("getModel", "Model", (404, *ASKED)),
    ("POST", "/chat/completions"): passed("createChatCompletion"),
    ("POST", "/completions"): passed("createCompletion"),
    ("POST", "/embeddings"): passed("createEmbedding"),
    ("POST", "/rerank"): passed("rerank"),
}
# Routes without the prefix, which need no key.
BARE_ROUTES: dict[tuple[str, str], Operation] = {
    ("GET", "/metrics"): Operation("metrics", "text/plain", (503,)),
    ("GET", "/readyz"): Operation("ready", "Readiness", told={503: "Readiness"}),
    ("GET", "/healthz"): Operation("health", "Health"),
}
ANY, ASKING = (403,), (400, 401)

STATUSES: dict[int | str, str] = {
    101: "A WebSocket, where the request asks for that upgrade: see [websocket.md](websocket.md).",
    400: "The request cannot be carried out as it stands; `param` is the path of what is wrong.",
    401: "No key, or one that is not known; where the settings ask for one.",
    403: "A web page that is not named in `server.cors_origins`, or a name that is not known as the proxy's.",
    404: "No such object for this key.",
    409: "What it needs is being answered; try again.",
    413: "The body is larger than the settings allow.",
    426: "There is no WebSocket here; use HTTP.",
    429: "More than the settings allow an owner; too many background responses wait; the backend has too much to do.",
    "4XX": "The backend refused it, with this status.",
    502: "The backend failed, cannot be reached, or answered with something else than chat completions.",
    503: "The store cannot be read or written just now, or the backend is overloaded.",
    504: "The backend took too long.",
    529: "The backend is overloaded.",
    "default": "What the backend answers, or an error of the proxy: 400, 401, 403, 404, 413, 429, 502, 503 or 504.",
}
RETRIED = (409, 429, 503, 529, "default")
LIMITED = (429, "default")

LEFT_OF: dict[str, Json] = {
    "limit": {"description": "How much an owner may have in a minute.", "schema": COUNT},
    "remaining": {"description": "How much of that is left.", "schema": COUNT},
    "reset": {"description": "How long until all of it is back: `12ms`, `1.5s`, `6m0s`.", "schema": DURATION},
}
HEADERS: dict[str, Json] = {
    "x-request-id": {
        "description": "The client's own, where it is fit for a header, else a fresh one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    IGNORED: {"description": "The names of what was left out of the request.", "schema": TEXT},
    REPLAYED: {"description": "The answer that an earlier request with the key was given.", "schema": enum("true")},
    UPSTREAM: {"description": "The name of the backend that gave a plain answer.", "schema": TEXT},
    "retry-after": {"description": "Seconds", "schema": {"type": "integer", "minimum": 0}},
    **{name: LEFT_OF[name.split("-")[2]] for name in LEFT},
}
REQUEST_HEADERS: dict[str, Json] = {
    "idempotency-key": {
        "description": f"Of 1 to {KEY_CHARACTERS} characters: a request that is sent twice is carried out once.",
        "schema": TEXT,
    },
}


# -- requests ----------------------------------------------------------------------------------------------------------

PART_FIELDS: dict[str, Json] = {
    **dict.fromkeys(("input_text", "output_text", "text", "summary_text", "reasoning_text"), object_of({"text": TEXT})),
    "refusal": object_of({"refusal": TEXT}),
    **dict.fromkeys(
        ("input_image", "computer_screenshot"),
        object_of(
            {"image_url": {"type": "string", "pattern": "^(https?://|data:)"}},
            {"detail": nullable(enum("", "low", "high", "auto", "original")), "file_id": EMPTY},
        ),
    ),
    "input_file": object_of({"file_data": TEXT}, {"filename": nullable(TEXT), "file_id": EMPTY, "file_url": EMPTY}),
    "input_audio": object_of({"input_audio": OBJECT}),
}
CONTENT: Json = {"anyOf": [TEXT, array(ref("Part"))]}
CALLED: Json = {"call_id": NAME}
# Of either id, which are one for this type.
TIED: Json = {"anyOf": [object_of({key: NAME}) for key in ("call_id", "id")]}
OUTPUT = object_of({**CALLED, "output": CONTENT})
# Item type -> what it has to hold besides; one without a row has to hold nothing.
ITEM_FIELDS: dict[str, Json] = {
    "reasoning": object_of({}, {"summary": nullable(array(ref("Part"))), "content": nullable(array(ref("Part")))}),
    "function_call": object_of({**CALLED, "name": NAME, "arguments": TEXT}, {"namespace": nullable(TEXT)}),
    "function_call_output": OUTPUT,
    "custom_tool_call": object_of({**CALLED, "name": NAME, "input": TEXT}, {"namespace": nullable(TEXT)}),
    "custom_tool_call_output": OUTPUT,
    "apply_patch_call": object_of(CALLED),
    "apply_patch_call_output": object_of(CALLED, {"output": nullable(TEXT), "status": nullable(TEXT)}),
    "shell_call": object_of(CALLED),
    "shell_call_output": object_of({**CALLED, "output": {"anyOf": [TEXT, LIST]}}),
    "local_shell_call": object_of({}) | TIED,
    "local_shell_call_output": object_of({"output": TEXT}) | TIED,
    "compaction": object_of({"encrypted_content": TEXT}),
    "additional_tools": object_of({"tools": array(ref("Tool"))}),
    "tool_search_output": object_of({"tools": array(ref("Tool"))}),
    "mcp_call": object_of({"id": NAME, "name": NAME}),
    "configuration_update": object_of({}, {"reasoning": nullable(ref("Reasoning")), "text": nullable(ref("Text"))}),
}
MESSAGE = object_of({"role": enum(*ROLES), "content": CONTENT}, {"type": {"enum": ["message", None]}})
REFERENCE = object_of({"id": NAME}, {"type": {"enum": ["item_reference", None]}}) | {"additionalProperties": False}
# Tool type -> what it has to hold besides.
TOOL_FIELDS: dict[str, Json] = {
    "function": object_of(
        {"name": NAME},
        {"description": nullable(TEXT), "parameters": nullable(OBJECT), "strict": nullable(BOOLEAN)},
    ),
    "custom": object_of({"name": NAME}, {"description": nullable(TEXT), "format": nullable(ref("CustomFormat"))}),
    "namespace": object_of({"name": NAME, "tools": array(ref("NamespacedTool"))}),
}
CUSTOM_FORMAT: Json = {
    "anyOf": [
        {"type": "object", "maxProperties": 0},
        object_of({"type": {"const": "text"}}),
        object_of({"type": {"const": "grammar"}, "syntax": NAME, "definition": NAME}),
    ]
}
MODE = {"mode": enum("auto", "required"), "tools": array(ref("AllowedTool"))}
CHOICE_FIELDS: dict[str, Json] = {
    **dict.fromkeys(("function", "custom"), object_of({"name": NAME}, {"namespace": nullable(TEXT)})),
    "allowed_tools": object_of(MODE),
}
METADATA: Json = {
    "type": "object",
    "maxProperties": 16,
    "propertyNames": {"maxLength": 64},
    "additionalProperties": {"type": "string", "maxLength": 512},
}
RESPONSE_ID: Json = {"type": "string", "pattern": f"^{ID_PREFIXES['previous_response_id']}"}
CONVERSATION_ID: Json = {"type": "string", "pattern": f"^{ID_PREFIXES['conversation']}"}
# Parameter -> its schema, where its type in the code tells less than is checked.
CHECKED: dict[str, Json] = {
    "model": NAME,
    "input": {"anyOf": [TEXT, array(ref("InputItem")), NULL]},
    "tools": nullable(array(ref("Tool"))),
    "tool_choice": {"anyOf": [enum(*MODES), ref("ToolChoice"), NULL]},
    "previous_response_id": nullable(RESPONSE_ID),
    "conversation": {"anyOf": [CONVERSATION_ID, object_of({"id": CONVERSATION_ID}), NULL]},
    "metadata": nullable(METADATA),
    "prompt": NULL,
}


# One of these has to be given.
GIVEN: dict[str, Json] = {
    "input": {"anyOf": [NAME, array(ref("InputItem"), minItems=1)]},
    "previous_response_id": RESPONSE_ID,
    "conversation": {"anyOf": [CONVERSATION_ID, object_of({"id": CONVERSATION_ID})]},
}


def given(*names: str) -> list[Json]:
    return [object_of({name: GIVEN[name]}) for name in names]


def by_type(types: Mapping[str, Any], fields: Mapping[str, Json]) -> list[Json]:
    """A schema for each type with fields of its own, and one for all the others."""
    others = sorted(kind for kind in types if kind not in fields)
    return [
        *({**schema, **_typed(schema, {"const": kind})} for kind, schema in fields.items()),
        *([object_of({"type": enum(*others)})] if others else []),
    ]


def _typed(schema: Json, kind: Json) -> Json:
    return {"properties": {"type": kind, **schema["properties"]}, "required": ["type", *schema["required"]]}


def input_schemas() -> dict[str, Json]:
    """What stands in lists of a request."""
    bare = {kind: row for kind, row in ITEMS.items() if kind not in ("message", "item_reference")}
    allowed = {kind: row for kind, row in TOOLS.items() if kind not in ("tool_search",)}
    named = dict.fromkeys(("function", "custom", "namespace"), object_of({"name": NAME}))
    return {
        "InputItem": {"anyOf": [MESSAGE, REFERENCE, *by_type(bare, ITEM_FIELDS)]},
        "Part": {"anyOf": by_type(PARTS, PART_FIELDS)},
        "Tool": {"anyOf": by_type(TOOLS, TOOL_FIELDS)},
        "NamespacedTool": {"anyOf": by_type({}, {kind: TOOL_FIELDS[kind] for kind in ("function", "custom")})},
        "CustomFormat": CUSTOM_FORMAT,
        "ToolChoice": {"anyOf": by_type(TOOL_CHOICES, CHOICE_FIELDS)},
        "AllowedTool": {"anyOf": by_type(allowed, named)},
    }


def request_schemas() -> dict[str, Json]:
    """The bodies that requests are validated by, with what is checked besides."""
    structs = (TurnRequest, NewConversation, ChangedConversation, AddedItems)
    _, found = msgspec.json.schema_components(structs, ref_template=SCHEMAS + "{name}")
    schemas = {name: {key: value for key, value in each.items() if key != "title"} for name, each in found.items()}
    turn = schemas.pop("TurnRequest")
    known = {name: schema for name, schema in turn["properties"].items() if name in REQUEST_FIELDS}
    fields = {name: _described(name, CHECKED.get(name, schema)) for name, schema in known.items()}
    schemas["CreateResponse"] = object_of({"model": NAME}, fields) | {"anyOf": given(*GIVEN)}
    compacted = {name: fields[name] for name in sorted(COMPACT_FIELDS)}
    schemas["Compact"] = object_of({"model": NAME}, compacted) | {
        "anyOf": given(*sorted(COMPACT_FIELDS & GIVEN.keys()))
    }
    schemas["CountInputTokens"] = object_of({}, {name: fields[name] for name in sorted(COUNTED_FIELDS)})
    schemas["CountInputTokens"]["properties"]["model"] = nullable(NAME)
    for name in ("NewConversation", "ChangedConversation", "AddedItems"):
        _refine(schemas[name]["properties"])
    schemas["TextFormat"] |= {
        "if": object_of({"type": {"const": "json_schema"}}),
        "then": object_of({"name": TEXT, "schema": OBJECT}),
    }
    return schemas


def _described(name: str, schema: Json) -> Json:
    row = REQUEST_FIELDS[name]
    return {"description": f"{row.fate}: {row.note}", **schema}


def _refine(properties: Json) -> None:
    """Items and metadata of a conversation."""
    if "metadata" in properties:
        properties["metadata"] = nullable(METADATA)
    if "items" in properties:
        form = properties["items"]
        (form["anyOf"][0] if "anyOf" in form else form)["items"] = ref("InputItem")


# -- answers -----------------------------------------------------------------------------------------------------------

# Keys of a response that repeat the request, and may be null.
NULLABLE_ECHO = frozenset(
    {"instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key"}
    | {"prompt_cache_retention", "safety_identifier", "user"}
)
OWN_FIELDS: dict[str, Json] = {
    "id": {"type": "string", "pattern": "^resp_"},
    "object": {"const": "response"},
    "created_at": AT,
    "completed_at": nullable(AT),
    "status": enum("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
    "error": nullable(object_of({"code": TEXT, "message": TEXT})),
    "incomplete_details": nullable(object_of({"reason": enum("max_output_tokens", "content_filter")})),
    "usage": nullable(ref("Usage")),
    "output": array(ref("OutputItem")),
    "conversation": nullable(object_of({"id": CONVERSATION_ID})),
    "reasoning": object_of({"effort": nullable(TEXT), "summary": nullable(TEXT)}),
    "text": object_of({"format": OBJECT}),
    "tool_choice": {"anyOf": [TEXT, OBJECT]},
    "tools": array(OBJECT),
    "service_tier": TEXT,
    "truncation": enum("auto", "disabled"),
    "prompt_cache_retention": nullable(enum("in_memory", "24h")),
}
STATUS: Json = {"status": enum("in_progress", "completed", "incomplete")}
OUTPUT_FIELDS: dict[str, Json] = {
    "message": object_of({**STATUS, "role": {"const": "assistant"}, "content": array(ref("OutputPart"))}),
    "reasoning": object_of({"summary": array(object_of({"type": {"const": "summary_text"}, "text": TEXT}))}),
    "function_call": object_of({**STATUS, **CALLED, "name": TEXT, "arguments": TEXT}),
    "custom_tool_call": object_of({**CALLED, "name": TEXT, "input": TEXT}),
    "tool_search_call": object_of({**STATUS, **CALLED, "arguments": OBJECT}),
    "apply_patch_call": object_of({**STATUS, **CALLED, "operation": OBJECT}),
    "shell_call": object_of({**STATUS, **CALLED, "action": OBJECT}),
    "local_shell_call": object_of({**STATUS, **CALLED, "action": OBJECT}),
    "compaction": object_of({"encrypted_content": TEXT}),
}
ANNOTATED = {"text": TEXT, "annotations": array(OBJECT), "logprobs": array(OBJECT)}


def with_id(schema: Json, prefix: str) -> Json:
    own = {"id": {"type": "string", "pattern": f"^{prefix}_"}}
    return {**schema, "properties": {**own, **schema["properties"]}, "required": ["id", *schema["required"]]}


def response_schema(request: Json) -> Json:
    """Every key that is always there; those that repeat the request have its types, with null replaced by a default."""
    echoed = {
        name: schema if name in NULLABLE_ECHO else _not_null(schema) for name, schema in request["properties"].items()
    }
    keys = begin(TurnRequest(model="m"), "", 0)
    return object_of({key: OWN_FIELDS.get(key) or _bare(echoed[key]) for key in keys})


def _not_null(schema: Json) -> Json:
    forms = [form for form in schema.get("anyOf", ()) if form != NULL]
    return forms[0] if len(forms) == 1 else schema


def _bare(schema: Json) -> Json:
    return {key: value for key, value in schema.items() if key not in ("description", "default")}


def list_of(name: str) -> Json:
    ids = {"first_id": TEXT, "last_id": TEXT, "has_more": BOOLEAN}
    return object_of({"object": {"const": "list"}, "data": array(ref(name)), **ids})


def deleted(kind: str) -> Json:
    return object_of({"id": TEXT, "object": {"const": kind}, "deleted": {"const": True}})


def answer_schemas(request: Json) -> dict[str, Json]:
    outputs = {kind: with_id(schema, ID_PREFIX[kind]) for kind, schema in OUTPUT_FIELDS.items()}
    details = {"cached_tokens": COUNT, "cache_write_tokens": COUNT}
    usage = {"input_tokens": COUNT, "input_tokens_details": object_of(details), "output_tokens": COUNT}
    usage |= {"output_tokens_details": object_of({"reasoning_tokens": COUNT}), "total_tokens": COUNT}
    error = {"message": TEXT, "type": TEXT, "param": nullable(TEXT), "code": nullable(TEXT)}
    conversation = {"id": CONVERSATION_ID, "object": {"const": "conversation"}, "created_at": AT, "metadata": METADATA}
    compaction = {"id": OWN_FIELDS["id"], "object": {"const": "response.compaction"}, "created_at": AT}
    return {
        "Response": response_schema(request),
        "Usage": object_of(usage),
        "OutputItem": {"anyOf": by_type({}, outputs)},
        "OutputPart": {"anyOf": by_type({}, {"output_text": object_of(ANNOTATED), "refusal": PART_FIELDS["refusal"]})},
        "Item": object_of({"id": NAME, "type": enum(*ITEMS)}),
        "ResponseList": list_of("Response"),
        "ItemList": list_of("Item"),
        "Conversation": object_of(conversation),
        "DeletedResponse": deleted("response"),
        "DeletedConversation": deleted("conversation.deleted"),
        "Compaction": object_of({**compaction, "output": array(ref("Item"), minItems=1), "usage": ref("Usage")}),
        "InputTokens": object_of({"object": {"const": "response.input_tokens"}, "input_tokens": COUNT}),
        "Model": object_of({"id": TEXT}),
        "ModelList": object_of({"object": {"const": "list"}, "data": array(ref("Model"))}),
        "Health": object_of({"status": {"const": "ok"}}),
        "Readiness": object_of({"status": enum("ready", "not ready", "stopping"), "store": TEXT, "upstreams": TEXTS}),
        "Anything": OBJECT | {"description": "The backend's own: it goes through as it is."},
        "Error": object_of({"error": object_of(error)}),
    }


# -- the document ------------------------------------------------------------------------------------------------------


def descriptions() -> dict[str, str]:
    """`POST /v1/responses` -> what routes.md says of it."""
    rows = re.findall(r"^\| `([A-Z]+ /\S+)` \| (.*) \|$", (ROOT / "docs" / "routes.md").read_text(), re.MULTILINE)
    return dict(rows)


def parameters(path: str, operation: Operation) -> Iterator[Json]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, "schema": NAME}
    if operation.query:
        form = msgspec.json.schema(operation.query)
        (fields,) = form["$defs"].values()
        for name, schema in fields["properties"].items():
            yield {"name": name, "in": "query", "schema": schema}
    for name in operation.request_headers:
        yield {"name": name, "in": "header", **REQUEST_HEADERS[name]}


def headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("x-request-id", *names)}


def success(operation: Operation) -> Json:
    if operation.answer == "*/*":
        content: Json = {operation.answer: {}}
    elif "/" in operation.answer:
        content = {operation.answer: {"schema": TEXT}}
    else:
        content = {JSON: {"schema": ref(operation.answer)}}
    if operation.is_streamed:
        content["text/event-stream"] = {"schema": ref("Events")}
    return {"description": "Done.", "headers": headers(*operation.headers), "content": content}


def codes() -> dict[int | str, list[str]]:
    """Status -> the codes of the errors that have it."""
    found: dict[int | str, list[str]] = {}
    kinds = [ProxyError]
    while kinds:
        kind = kinds.pop(0)
        kinds += kind.__subclasses__()
        if kind.code and not issubclass(kind, UpstreamRefused):
            found.setdefault(kind.status, []).append(kind.code)
    return found


def other(status: int | str) -> Json:
    """What is no 200: an error of the proxy, and what else may come."""
    named = ", ".join(f"`{code}`" for code in codes().get(status, ()))
    text = STATUSES[status] + (f" Codes: {named} and others." if named else "")
    names = (*(("retry-after",) if status in RETRIED else ()), *(LEFT if status in LIMITED else ()))
    found: Json = {"description": text, "headers": headers(*names)}
    if status == 101:
        return found
    return found | {"content": {"*/*": {}} if status == "default" else {JSON: {"schema": ref("Error")}}}


def not_now(schema: str) -> Json:
    return {"description": "The body says why.", "headers": headers(), "content": {JSON: {"schema": ref(schema)}}}


def others(operation: Operation, is_bare: bool) -> tuple[int | str, ...]:
    """The statuses of a route beside 200."""
    if "default" in operation.errors:
        return operation.errors
    return (*ANY, *(() if is_bare else ASKING), *operation.errors)


def operation_object(path: str, operation: Operation, text: str, is_bare: bool) -> Json:
    answers = {str(status): {"$ref": f"#/components/responses/{status}"} for status in others(operation, is_bare)}
    answers |= {str(status): not_now(schema) for status, schema in operation.told.items()}
    found: Json = {"operationId": operation.id, "description": text, "responses": {"200": success(operation)} | answers}
    if given := list(parameters(path, operation)):
        found["parameters"] = given
    if operation.body:
        content = {JSON: {"schema": ref(operation.body)}}
        found["requestBody"] = {"required": operation.is_body_required, "content": content}
    return found | ({"security": []} if is_bare else {})


def paths() -> Json:
    texts = descriptions()
    found: dict[str, Json] = {}
    for prefix, routes in (("/v1", ROUTES), ("", BARE_ROUTES)):
        for (method, path), operation in routes.items():
            text = texts[f"{method} {prefix}{path}"]
            place = found.setdefault(path, {} if prefix else {"servers": [{"url": "/"}]})
            place[method.lower()] = operation_object(path, operation, text, not prefix)
    return found


ABOUT = """\
The Responses API in front of any chat-completions backend. The routes under `/v1` answer without the prefix, too.

Any other path below `/v1/` goes through to a backend as it is, with any method: see [passthrough.md](passthrough.md).
Below `/v1/responses` and `/v1/conversations`, and without the prefix, any other path is a 404 and any other method a
405 with `Allow`, both with the body of every error. More than 64 KiB of request line and headers is a 431 without a
body. What a request holds besides these schemas is left out and named in `x-responses-proxy-ignored`, or
refused where they allow nothing besides. See [routes.md](routes.md), [state.md](state.md),
[background.md](background.md) and [operations.md](operations.md)."""
EVENTS = "Server-sent events: one terminal event, `response.completed`, `.incomplete` or `.failed`, and `[DONE]` last."


def document() -> Json:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requests = request_schemas()
    schemas = {**requests, **input_schemas(), **answer_schemas(requests["CreateResponse"])}
    schemas["Events"] = {"type": "string", "description": EVENTS}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": project["name"],
            "version": project["version"],
            "description": ABOUT,
            "license": {"name": project["license"], "identifier": project["license"]},
        },
        "servers": [{"url": "/v1"}, {"url": "/", "description": "for clients whose base URL leaves the prefix out"}],
        "security": [{}, {"key": []}],
        "paths": paths(),
        "components": {
            "schemas": schemas,
            "responses": {str(status): other(status) for status in STATUSES},
            "headers": HEADERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def main() -> int:
    wanted = orjson.dumps(document(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    if "--check" in sys.argv:
        is_current = DOCUMENT.is_file() and DOCUMENT.read_bytes() == wanted
        if not is_current:
            print("docs/openapi.json is out of date; run `make docs`")
        return 0 if is_current else 1
    DOCUMENT.write_bytes(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
