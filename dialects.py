"""How backends differ: one frozen record for each, and how to tell them apart.

May not do I/O. The facts come from real servers' answers (tests/wire) and, where marked, from their sources or
documentation as read in November 2026: llama.cpp b11549, vLLM 0.32, transformers 5.23, Ollama, SGLang, TGI, Mistral,
Gemini, DeepSeek, Groq, OpenRouter, LM Studio. `generic` is the safest common form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one kind of backend understands; the defaults are what every server read takes."""

    name: str
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    # The field of an assistant message in which the backend wants its own reasoning back, if it does.
    reasoning_field: Literal["reasoning_content", "reasoning", "reasoning_details"] | None = None
    # How a reasoning effort is said: a field, a template variable (llama.cpp), or not at all.
    effort: Literal["reasoning_effort", "template"] | None = "reasoning_effort"
    # A system message after the first message is an error in many chat templates.
    late_system: bool = False
    # Templates of Mistral and Gemma raise on two neighbours of one role.
    merge_neighbours: bool = False
    # Mistral refuses a user message right after a tool message.
    assistant_after_tool: bool = False
    # "named": a tool can be demanded by name; "modes": only auto, none, required; "ignored": no such field.
    tool_choice: Literal["named", "modes", "ignored"] = "modes"
    required_word: Literal["required", "any"] = "required"
    parallel_tool_calls: bool = True
    # `strict` inside a function; unknown keys are refused by some.
    strict_tools: bool = True
    response_format: bool = True
    # A response format together with tools is an error on TGI, Groq and Gemini.
    response_format_with_tools: bool = True
    verbosity: bool = False
    service_tier: bool = False
    stream_usage: bool = True
    penalties: bool = True
    logprobs: bool = True
    # http(s) image URLs; Ollama takes data URLs only.
    image_urls: bool = True
    file_parts: bool = False
    # Tool call ids of nine letters and digits (Mistral).
    short_call_ids: bool = False
    # Rows of capacity.py: where, besides the list of models, a window is told, and where tokens are counted.
    window_source: Literal["lmstudio", "ollama", "tgi"] | None = None
    tokenizer: Literal["llamacpp", "vllm"] | None = None


GENERIC = Dialect("generic")

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        GENERIC,
        Dialect(
            "openai",
            max_tokens_field="max_completion_tokens",
            late_system=True,
            tool_choice="named",
            verbosity=True,
            service_tier=True,
            file_parts=True,
        ),
        Dialect("vllm", reasoning_field="reasoning", tool_choice="named", tokenizer="vllm"),
        Dialect("sglang", reasoning_field="reasoning_content", tool_choice="named"),
        Dialect("llamacpp", reasoning_field="reasoning_content", effort="template", tokenizer="llamacpp"),
        Dialect(
            "ollama",
            reasoning_field="reasoning",
            tool_choice="ignored",
            parallel_tool_calls=False,
            strict_tools=False,
            image_urls=False,
            window_source="ollama",
        ),
        Dialect("lmstudio", window_source="lmstudio"),
        Dialect(
            "tgi",
            merge_neighbours=True,
            response_format_with_tools=False,
            parallel_tool_calls=False,
            effort=None,
            window_source="tgi",
        ),
        Dialect(
            "transformers",
            tool_choice="ignored",
            parallel_tool_calls=False,
            response_format=False,
            logprobs=False,
            effort=None,
            reasoning_field="reasoning_content",
        ),
        Dialect(
            "mistral",
            required_word="any",
            merge_neighbours=True,
            assistant_after_tool=True,
            effort=None,
            stream_usage=False,
            penalties=False,
            short_call_ids=True,
        ),
        Dialect("gemini", merge_neighbours=True, response_format_with_tools=False, penalties=False),
        Dialect("deepseek", reasoning_field="reasoning_content", tool_choice="named"),
        Dialect("openrouter", reasoning_field="reasoning_details", tool_choice="named", late_system=True),
        Dialect(
            "groq",
            max_tokens_field="max_completion_tokens",
            reasoning_field="reasoning",
            tool_choice="named",
            response_format_with_tools=False,
            logprobs=False,
            service_tier=True,
        ),
    )
}

# A host that says by its name what it is: no request is needed.
DIALECT_OF_HOST = {
    "api.openai.com": "openai",
    "api.mistral.ai": "mistral",
    "generativelanguage.googleapis.com": "gemini",
    "api.deepseek.com": "deepseek",
    "openrouter.ai": "openrouter",
    "api.groq.com": "groq",
}
# `owned_by` of the first model in GET /v1/models.
DIALECT_OF_OWNER = {
    "llamacpp": "llamacpp",
    "vllm": "vllm",
    "sglang": "sglang",
    "library": "ollama",
    "organization_owner": "lmstudio",
    "mistralai": "mistral",
}
# The `server` header where it names the program.
DIALECT_OF_SERVER = {"llama.cpp": "llamacpp"}
# The default port of a program, for when nothing else tells.
DIALECT_OF_PORT = {11434: "ollama", 1234: "lmstudio"}


def named(name: str, **changes: Any) -> Dialect:
    """The dialect of that name, with single fields changed. Raises: KeyError."""
    return replace(DIALECTS[name], **changes)


def of_host(host: str) -> str | None:
    """The dialect that a well-known host speaks."""
    return DIALECT_OF_HOST.get(host) or ("openai" if host.endswith(".openai.azure.com") else None)


def of_models(models: Json, headers: Mapping[str, str], port: int | None) -> str:
    """The dialect that an answer to GET /v1/models points to; `generic` when it tells nothing."""
    if name := DIALECT_OF_SERVER.get(headers.get("Server", "")):
        return name
    for model in models.get("data") or ():
        if not isinstance(model, dict):
            continue
        if name := DIALECT_OF_OWNER.get(str(model.get("owned_by"))):
            return name
        if "meta" in model:
            return "llamacpp"
    return DIALECT_OF_PORT.get(port or 0, "generic")
