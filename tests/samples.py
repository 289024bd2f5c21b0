"""One valid sample of every item, tool, tool choice and section, to be sent as it is or with one thing wrong in it."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
SCHEMA: Json = {"type": "object", "properties": {"city": {"type": "string"}}}
PNG = "data:image/png;base64,AA=="

PARTS: list[Json] = [
    {"type": "input_text", "text": "a"},
    {"type": "input_image", "image_url": PNG, "detail": "high", "file_id": None},
    {"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,aGk="},
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
]
FUNCTION: Json = {"type": "function", "name": "look", "description": "d", "parameters": SCHEMA, "strict": True}
CUSTOM: Json = {
    "type": "custom",
    "name": "exec",
    "description": "d",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: A"},
}
NAMESPACE: Json = {
    "type": "namespace",
    "name": "mcp__demo",
    "description": "d",
    "tools": [{**FUNCTION, "name": "add", "defer_loading": True}, {**CUSTOM, "name": "run"}],
}
TOOLS: list[Json] = [
    FUNCTION,
    CUSTOM,
    NAMESPACE,
    {"type": "tool_search", "execution": "server", "description": "d", "parameters": SCHEMA},
    {"type": "apply_patch"},
    {"type": "shell", "environment": None},
    {"type": "local_shell"},
    {"type": "web_search", "external_web_access": True},
    {"type": "mcp", "server_label": "x"},
]
# Items that belong together stand together.
ITEMS: list[list[Json]] = [
    [{"type": "message", "role": "user", "content": PARTS}],
    [{"role": "developer", "content": [{"type": "input_text", "text": "a"}]}],
    [{"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "phase": None}],
    [
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "s"}],
            "content": [{"type": "reasoning_text", "text": "t"}],
            "encrypted_content": "e",
            "reasoning_details": [{"type": "reasoning.text"}],
        },
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "add",
            "namespace": "mcp__demo",
            "arguments": "{}",
            "status": "completed",
            "extra_content": {"google": {}},
        },
        {"type": "function_call_output", "call_id": "c1", "output": PARTS},
    ],
    [
        {"type": "custom_tool_call", "call_id": "c2", "name": "exec", "namespace": None, "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "ok"},
    ],
    [
        {"type": "tool_search_call", "call_id": "c3", "arguments": {"query": "q"}, "execution": "client"},
        {"type": "tool_search_output", "call_id": "c3", "execution": "client", "tools": [NAMESPACE]},
    ],
    [{"type": "additional_tools", "role": "developer", "tools": [FUNCTION, NAMESPACE]}],
    [
        {
            "type": "apply_patch_call",
            "call_id": "c4",
            "operation": {"type": "update_file", "path": "a", "diff": "+b"},
            "status": "completed",
        },
        {"type": "apply_patch_call_output", "call_id": "c4", "status": "failed", "output": "no such file"},
    ],
    [
        {"type": "shell_call", "call_id": "c5", "action": {"commands": ["ls"], "timeout_ms": None}},
        {
            "type": "shell_call_output",
            "call_id": "c5",
            "output": [{"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}],
        },
    ],
    [
        {
            "type": "local_shell_call",
            "id": "l1",
            "call_id": "c6",
            "action": {"type": "exec", "command": ["ls"], "env": {}},
        },
        {"type": "local_shell_call_output", "id": "c6", "output": "{}"},
    ],
    [
        {
            "type": "mcp_call",
            "id": "mcp_1",
            "name": "look",
            "server_label": "x",
            "arguments": "{}",
            "output": "o",
            "error": None,
        }
    ],
    [
        {
            "type": "configuration_update",
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": False}},
        }
    ],
    [{"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}}],
]
CHOICES: list[Any] = [
    "required",
    {"type": "function", "name": "look"},
    {"type": "function", "name": "add", "namespace": "mcp__demo"},
    {"type": "custom", "name": "exec"},
    {"type": "apply_patch"},
    {"type": "mcp", "server_label": "x"},
    {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [
            {"type": "function", "name": "look"},
            {"type": "namespace", "name": "mcp__demo"},
            {"type": "web_search"},
        ],
    },
]
SECTIONS: Json = {
    "instructions": "Be brief.",
    "max_output_tokens": 16,
    "max_tool_calls": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "top_logprobs": 2,
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto", "context": "all_turns"},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "user": "u",
    "store": False,
    "truncation": "disabled",
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "context_management": [{"type": "compaction", "compact_threshold": 1000}],
}


def bodies() -> list[Json]:
    """Small valid requests, which together hold every sample."""
    asked: Json = {"model": "m", "input": [{"role": "user", "content": "Hi"}]}
    return [
        *({**asked, "tools": TOOLS, "tool_choice": choice} for choice in CHOICES),
        *({**asked, "input": [*items, *asked["input"]], "tools": TOOLS} for items in ITEMS),
        {**asked, "tools": [{**TOOLS[3], "execution": "client"}, NAMESPACE]},
        {**asked, **SECTIONS},
    ]
