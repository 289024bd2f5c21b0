"""What becomes of each request parameter, as the code acts on it and as the support matrix says it.

Source: ResponseCreateParams of the openai SDK 3.54 and the Open Responses schema, read 2026-11-20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fate = Literal["sent", "translated", "kept", "emulated", "refused", "left out"]


@dataclass(frozen=True, slots=True)
class Field:
    """What becomes of a request parameter, as the support matrix says it."""

    fate: Fate
    note: str


def sent(chat_name: str, note: str = "") -> Field:
    return Field("sent", f"as `{chat_name}`{note and '; '}{note}")


REQUEST_FIELDS: dict[str, Field] = {
    "model": sent("model", "an alias in the settings is replaced"),
    "input": Field("translated", "items become chat messages"),
    "instructions": Field("translated", "first in the leading system message; never inherited"),
    "max_output_tokens": sent("max_tokens", "`max_completion_tokens` where the backend wants it"),
    "temperature": sent("temperature"),
    "top_p": sent("top_p"),
    "presence_penalty": sent("presence_penalty"),
    "frequency_penalty": sent("frequency_penalty"),
    "tools": Field("translated", "see the tool types"),
    "tool_choice": Field("translated", "a named or allowed choice is emulated by sending only those tools"),
    "parallel_tool_calls": Field("emulated", "sent where the backend knows it; when off, only the first call is kept"),
    "text": Field("translated", "`format` as `response_format`; `verbosity` where the backend knows it"),
    "reasoning": Field("translated", "`effort` where the backend knows it; `summary` is always given"),
    "include": Field("emulated", "logprobs and `reasoning.encrypted_content`; the others belong to hosted tools"),
    "top_logprobs": sent("top_logprobs", "when `include` asks for logprobs"),
    "stream": Field("emulated", "server-sent events of our own"),
    "stream_options": Field("kept", "nothing is obfuscated"),
    "max_tool_calls": Field("kept", "counts hosted tools only, and none runs here"),
    "metadata": Field("kept", "echoed"),
    "service_tier": sent("service_tier", "where the backend knows it; else echoed as `default`"),
    "safety_identifier": Field("kept", "echoed"),
    "prompt_cache_key": Field("kept", "echoed"),
    "prompt_cache_retention": Field("kept", "echoed"),
    "prompt_cache_options": Field("kept", "caching is the backend's own"),
    "user": Field("kept", "echoed"),
    "store": Field("emulated", "on unless false; `false` leaves nothing on disk"),
    "truncation": Field(
        "emulated", "`auto` leaves out the oldest turns where the model's window is known or overflows"
    ),
    "previous_response_id": Field("emulated", "the chain's items come before `input`; any response can be continued"),
    "conversation": Field("emulated", "its items come before `input`; input and output join it"),
    "background": Field("emulated", "queued in the store, and carried out whoever stays connected"),
    "background_options": Field("left out", "named; a run begins as soon as it can"),
    "prompt": Field("refused", "stored prompt templates live at OpenAI; 400"),
    "context_management": Field("emulated", "a `compaction` entry: from its threshold on, the window is compacted"),
    "moderation": Field("left out", "named"),
    "image": Field("left out", "named"),
    "access_programs": Field("left out", "named"),
}
