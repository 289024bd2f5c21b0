"""A request body through the same three steps as at the edge, for tests of what becomes of it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from dialects import DIALECTS
from errors import ProxyError
from request import RequestLimits, TurnRequest, parse_body, parse_request
from translation import Rendered, render

Json = dict[str, Any]
LIMITS = RequestLimits()


def parsed(**body: Any) -> TurnRequest:
    """The validated request; `model` and `input` are there unless given."""
    return parse_request(parse_body(orjson.dumps({"model": "m", "input": "Hi", **body}), LIMITS), LIMITS)


def rendered(dialect: str = "generic", **body: Any) -> Rendered:
    request = parsed(**body)
    return render(request, request.items, DIALECTS[dialect], request.model)


def messages(*items: Json, dialect: str = "generic", **body: Any) -> list[Json]:
    """The chat messages of these input items."""
    found: list[Json] = rendered(dialect, input=list(items), **body).body["messages"]
    return found


def refused(dialect: str = "generic", **body: Any) -> tuple[int, str | None, str | None, str]:
    """Status, code, param and message of the refusal."""
    with pytest.raises(ProxyError) as caught:
        rendered(dialect, **body)
    error = caught.value
    return error.http_status, error.error_code, error.param, error.message


def user(content: Any = "Hi") -> Json:
    return {"type": "message", "role": "user", "content": content}


def assistant(text: str) -> Json:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def call(call_id: str, name: str = "look", arguments: str = "{}", **more: Any) -> Json:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


def output(call_id: str, content: Any = "done") -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": content}


def reasoning(text: str) -> Json:
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": text}], "content": None}


def chat_call(call_id: str, name: str = "look", arguments: str = "{}") -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat_output(call_id: str, content: str = "done") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}
