"""Where a backend tells a model's window and the size of a prompt: what to ask, and how to read the answers.

May not do I/O. Source: tests/wire where a server was run, else what is named beside a table, read in November 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dialects import Dialect

Json = dict[str, Any]


def _tokens(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


# -- windows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """What a look at a backend found."""

    dialect: Dialect
    models: tuple[str, ...] = ()
    windows: Mapping[str, int] = field(default_factory=dict)

    def window_tokens(self, model: str) -> int | None:
        """The window of a model; a backend of one model, as llama.cpp, answers to any name."""
        for name in (model, f"{model}:latest"):
            if name in self.windows:
                return self.windows[name]
        told = set(self.windows.values()) if len(self.models) <= 1 else set()
        return told.pop() if len(told) == 1 else None

    @property
    def may_tell_more(self) -> bool:
        """Whether a window that is not told now may be told a little later: by a model that has been loaded."""
        return not self.models or self.dialect.window_source is not None


class ToldWindows:
    """The windows that overflows told, of the models that told one last: clients choose the names of models."""

    MODELS = 1000

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def get(self, model: str) -> int | None:
        return self._tokens.get(model)

    def remember(self, model: str, tokens: int) -> None:
        self._tokens.pop(model, None)
        self._tokens[model] = tokens
        if len(self._tokens) > self.MODELS:
            del self._tokens[next(iter(self._tokens))]

    def forget_changed(self, before: Probe, now: Probe) -> None:
        """Forgets where a look finds another window than the one before it: the backend was started anew."""
        for model in tuple(self._tokens):
            old, new = before.window_tokens(model), now.window_tokens(model)
            if old and new and old != new:
                del self._tokens[model]


# Who says how large a window is, of each model the surest word first.
Words = Iterator[tuple[Any, Any]]


def entries(answer: Any, key: str) -> list[Json]:
    """The objects in a list of an answer, whatever else it holds."""
    found = answer.get(key) if isinstance(answer, dict) else None
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def listed(answer: Any) -> Words:
    """From GET /v1/models: llama.cpp (per slot), vLLM and SGLang, Groq, OpenRouter, Mistral."""
    for model in entries(answer, "data"):
        meta = model.get("meta")
        yield model.get("id"), meta.get("n_ctx") if isinstance(meta, dict) else None
        for key in ("max_model_len", "context_window", "context_length", "max_context_length"):
            yield model.get("id"), model.get(key)


def _lmstudio_v0(answer: Any) -> Words:
    for model in entries(answer, "data"):
        yield model.get("id"), model.get("loaded_context_length")
        yield model.get("id"), model.get("max_context_length")


def _lmstudio_v1(answer: Any) -> Words:
    for model in entries(answer, "models"):
        for loaded in entries(model, "loaded_instances"):
            config = loaded.get("config")
            tokens = config.get("context_length") if isinstance(config, dict) else None
            yield loaded.get("id"), tokens
            yield model.get("key"), tokens
        yield model.get("key"), model.get("max_context_length")


def _ollama(answer: Any) -> Words:
    for model in entries(answer, "models"):
        yield model.get("name"), model.get("context_length")
        yield model.get("model"), model.get("context_length")


def _tgi(answer: Any) -> Words:
    info = answer if isinstance(answer, dict) else {}
    yield info.get("model_id"), info.get("max_total_tokens")
    yield info.get("model_id"), info.get("max_input_tokens")


def windows_told(words: Words) -> dict[str, int]:
    """The windows by model, in tokens."""
    windows: dict[str, int] = {}
    for model, value in words:
        if isinstance(model, str) and (tokens := _tokens(value)):
            windows.setdefault(model, tokens)
    return windows


# Of a dialect: what to GET below the root, which is the base URL without its /v1, until an answer tells a window.
# Ollama tells the window with which a model is loaded; /api/show would tell the one with which it was trained.
# Source: https://lmstudio.ai/docs/developer/rest, https://docs.ollama.com/api/ps, TGI's router/src/lib.rs (Info).
WINDOW_SOURCES: dict[str | None, tuple[tuple[str, Callable[[Any], Words]], ...]] = {
    "lmstudio": (("/api/v0/models", _lmstudio_v0), ("/api/v1/models", _lmstudio_v1)),
    "ollama": (("/api/ps", _ollama),),
    "tgi": (("/info", _tgi),),
}


# -- sizes of prompts --------------------------------------------------------------------------------------------------

# What says how to answer, and so is no part of a prompt.
NOT_IN_PROMPT = frozenset(
    (
        *("stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "stop", "seed", "temperature"),
        *("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
        *("top_logprobs", "user", "metadata", "store", "service_tier"),
    )
)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Where a backend counts the tokens of a chat request: what to POST below the root, and the field to read."""

    path: str
    body: Callable[[Json], Json]
    field: str

    def read(self, answer: Any) -> int | None:
        return _tokens(answer.get(self.field)) if isinstance(answer, dict) else None


def _prompt_only(body: Json) -> Json:
    return {key: value for key, value in body.items() if key not in NOT_IN_PROMPT}


def _vllm_body(body: Json) -> Json:
    """Takes a reasoning effort as the argument of the template that it becomes in a chat request."""
    effort = {"reasoning_effort": body["reasoning_effort"]} if body.get("reasoning_effort") else {}
    arguments = (body.get("chat_template_kwargs") or {}) | effort
    kept = {key: body[key] for key in ("model", "messages", "tools") if body.get(key)}
    return kept | {"add_generation_prompt": True} | ({"chat_template_kwargs": arguments} if arguments else {})


# Source: llama.cpp's tools/server/README.md, and vLLM's serve/tokenize/protocol.py and chat_completion/protocol.py.
# SGLang's /tokenize takes a prompt only, and LiteLLM counts no chat requests.
TOKENIZERS: dict[str | None, Tokenizer] = {
    "llamacpp": Tokenizer("/v1/chat/completions/input_tokens", _prompt_only, "input_tokens"),
    "vllm": Tokenizer("/tokenize", _vllm_body, "count"),
}
