"""What the values in a chat chunk mean for a response: tables and pure functions.

May not know events. Source: tests/wire; DeepSeek, SGLang, OpenRouter and Mistral where a function names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

Json = dict[str, Any]

# Chat finish_reason -> response status and incomplete_details.reason. An unknown reason counts as `stop`.
FINISH: dict[str, tuple[str, str | None]] = {
    "stop": ("completed", None),
    "tool_calls": ("completed", None),
    "function_call": ("completed", None),
    "eos_token": ("completed", None),
    "length": ("incomplete", "max_output_tokens"),
    "max_tokens": ("incomplete", "max_output_tokens"),
    "content_filter": ("incomplete", "content_filter"),
}
# Reasons that say the backend gave up.
FAILED_FINISHES = frozenset({"error", "abort"})
# Where backends put reasoning text, best first; some send the same text under two names.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
# Rough size of a token, for usage that no backend gave.
BYTES_PER_TOKEN = 4
# Where a call item keeps what the model wrote.
WRITTEN = ("arguments", "input", "operation", "action")


def delta_of(choice: Json) -> Json:
    """A whole message is a delta too; each of its calls is one of its own, whatever ids and indices it has."""
    delta: Json = choice.get("delta") or choice.get("message") or {}
    if "message" in choice and delta.get("tool_calls"):
        return {**delta, "tool_calls": [{**call, "index": n} for n, call in enumerate(delta["tool_calls"])]}
    return delta


def says_anything(chunk: Json) -> bool:
    """Not so for what only opens an answer: a role, and fields without a value."""
    if chunk.get("usage"):
        return True
    for choice in (chunk.get("choices") or ())[:1]:
        return bool(choice.get("finish_reason")) or any(v for key, v in delta_of(choice).items() if key != "role")
    return False


def details_text(details: Iterable[Any]) -> str:
    """The readable text of reasoning records. Source: OpenRouter reasoning.text / .summary, Mistral thinking parts."""
    parts = [detail for detail in details if isinstance(detail, dict)]
    return "".join(str(part.get("text") or part.get("summary") or "") for part in parts)


def flat_annotation(annotation: Json) -> Json:
    """Chat nests a citation under its type; here it is flat."""
    kind = str(annotation.get("type"))
    nested = annotation.get(kind)
    return {"type": kind, **(nested if isinstance(nested, dict) else annotation)}


def logprobs_of(logprobs: Json | None) -> list[Json]:
    """A chat choice's logprobs in the form of output_text parts."""
    content = (logprobs or {}).get("content") or ()
    return [
        {**_logprob(token), "top_logprobs": [_logprob(top) for top in token.get("top_logprobs") or ()]}
        for token in content
    ]


def _logprob(token: Json) -> Json:
    return {"token": token.get("token"), "bytes": token.get("bytes") or [], "logprob": token.get("logprob")}


def usage_of(usage: Json, beside: Json | None = None) -> Json:
    """Chat usage as Responses usage; a backend that gives no details counts zero. `beside`: Responses usage to add.

    Source: DeepSeek `prompt_cache_hit_tokens`, SGLang top-level `reasoning_tokens`.
    """
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = usage.get("prompt_tokens_details") or {}
    produced = usage.get("completion_tokens_details") or {}
    counted = {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": cached.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0,
            "cache_write_tokens": cached.get("cache_write_tokens") or 0,
        },
        "output_tokens": completion,
        "output_tokens_details": {
            "reasoning_tokens": produced.get("reasoning_tokens") or usage.get("reasoning_tokens") or 0
        },
        "total_tokens": prompt + completion,
    }
    return counted if beside is None else joined_usage(counted, beside)


def joined_usage(first: Json, second: Json) -> Json:
    """The sum of two Responses usages."""
    return {
        key: joined_usage(value, second[key]) if isinstance(value, dict) else value + second[key]
        for key, value in first.items()
    }


def written_bytes(item: Json) -> int:
    """About how much the model wrote for an item."""
    parts = [*item.get("content", ()), *item.get("summary", ())]
    if parts:
        return sum(len((part.get("text") or part.get("refusal") or "").encode()) for part in parts)
    written = [item[key] for key in WRITTEN if item.get(key)]
    return sum(len(value.encode()) if isinstance(value, str) else len(orjson.dumps(value)) for value in written)
