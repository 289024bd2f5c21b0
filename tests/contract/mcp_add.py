"""An MCP server on standard input and output, with one tool: it adds two numbers."""

from __future__ import annotations

import json
import sys
from typing import Any

Json = dict[str, Any]
NUMBERS = {"a": {"type": "integer"}, "b": {"type": "integer"}}
ADD = {
    "name": "add",
    "description": "Adds two numbers.",
    "inputSchema": {"type": "object", "properties": NUMBERS, "required": ["a", "b"]},
}


def initialized(params: Json) -> Json:
    about = {"name": "demo", "version": "1"}
    return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": about}


def called(params: Json) -> Json:
    total = params["arguments"]["a"] + params["arguments"]["b"]
    return {"content": [{"type": "text", "text": f"the sum is {total}"}], "isError": False}


ANSWERS = {
    "initialize": initialized,
    "ping": lambda params: {},
    "tools/list": lambda params: {"tools": [ADD]},
    "tools/call": called,
}


def answer(asked: Json) -> Json:
    """Source: JSON-RPC 2.0; -32601 is an unknown method."""
    made = ANSWERS.get(asked["method"])
    if made is None:
        return {"error": {"code": -32601, "message": "Unknown method."}}
    return {"result": made(asked.get("params", {}))}


for line in sys.stdin:
    asked = json.loads(line)
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer(asked)}), flush=True)
