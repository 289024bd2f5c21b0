"""Where backends tell windows and sizes of prompts: their answers in, tokens out; chat requests in, questions out."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from wire_reader import transcript

from capacity import TOKENIZERS, WINDOW_SOURCES, Probe, ToldWindows, listed, windows_told
from dialects import DIALECTS, GENERIC

Json = dict[str, Any]

# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "windows"),
    [
        ("llamacpp", {"tiny-demo": 1024}),
        ("vllm", {"tiny-demo": 1024}),
        ("transformers", {}),
        ("litellm", {}),
        ("aimock", {}),
    ],
)
def test_the_windows_of_recorded_models_are_read(source: str, windows: Json) -> None:
    assert windows_told(listed(orjson.loads(transcript(f"{source}/models").body))) == windows


@pytest.mark.parametrize(
    ("model", "windows"),
    [
        ({"meta": {"n_ctx": 1024, "n_ctx_train": 2048}}, {"m": 1024}),
        ({"max_model_len": 1024}, {"m": 1024}),
        ({"context_window": 131072}, {"m": 131072}),
        ({"context_length": 4096}, {"m": 4096}),
        ({"max_context_length": 32768}, {"m": 32768}),
        ({}, {}),
        ({"max_model_len": "1024", "meta": None}, {}),
        ({"max_model_len": 0, "meta": []}, {}),
        ({"max_model_len": True}, {}),
        ({"id": 5, "max_model_len": 1024}, {}),
    ],
)
def test_a_window_is_read_where_a_listed_model_tells_it(model: Json, windows: Json) -> None:
    assert windows_told(listed({"data": [{"id": "m", **model}]})) == windows


def loaded(id_: Any, tokens: Any) -> Json:
    return {"id": id_, "config": {"context_length": tokens}}


# Source: https://lmstudio.ai/docs/developer/rest, https://docs.ollama.com/api/ps, TGI's router/src/lib.rs.
@pytest.mark.parametrize(
    ("source", "path", "answer", "windows"),
    [
        (
            "lmstudio",
            "/api/v0/models",
            {
                "data": [
                    {"id": "a", "state": "loaded", "max_context_length": 131072, "loaded_context_length": 4096},
                    {"id": "b", "state": "not-loaded", "max_context_length": 32768},
                ]
            },
            {"a": 4096, "b": 32768},
        ),
        (
            "lmstudio",
            "/api/v1/models",
            {
                "models": [
                    {
                        "key": "a",
                        "max_context_length": 131072,
                        "loaded_instances": [loaded("a", 4096), loaded("a:2", 8192)],
                    },
                    {"key": "b", "max_context_length": 32768, "loaded_instances": []},
                    {"key": "c", "max_context_length": 32768, "loaded_instances": [{"id": "c"}]},
                ]
            },
            {"a": 4096, "a:2": 8192, "b": 32768, "c": 32768},
        ),
        (
            "ollama",
            "/api/ps",
            {"models": [{"name": "gemma3:latest", "model": "gemma3:latest", "context_length": 4096}, {"name": "x"}]},
            {"gemma3:latest": 4096},
        ),
        ("tgi", "/info", {"model_id": "a/b", "max_input_tokens": 4095, "max_total_tokens": 4096}, {"a/b": 4096}),
        ("tgi", "/info", {"model_id": "a/b", "max_input_tokens": 4095}, {"a/b": 4095}),
    ],
)
def test_a_window_is_read_where_a_loaded_model_tells_it(source: str, path: str, answer: Json, windows: Json) -> None:
    words = dict(WINDOW_SOURCES[source])[path]
    assert windows_told(words(answer)) == windows


@pytest.mark.parametrize("answer", [None, [], 5, {"data": 5, "models": {}}, {"data": [5], "models": [None, {}]}])
@pytest.mark.parametrize("source", WINDOW_SOURCES)
def test_an_answer_in_no_known_form_tells_no_window(source: str, answer: Any) -> None:
    assert [windows_told(words(answer)) for _, words in WINDOW_SOURCES[source]] == [{}] * len(WINDOW_SOURCES[source])


@pytest.mark.parametrize(
    ("models", "windows", "model", "tokens"),
    [
        (("a", "b"), {"a": 1, "b": 2}, "b", 2),
        (("a", "b"), {"a": 1}, "b", None),
        (("gemma3:latest", "b"), {"gemma3:latest": 1}, "gemma3", 1),
        (("a",), {"a": 1}, "any", 1),
        ((), {"a": 1}, "any", 1),
        (("a",), {"a": 1, "a:2": 2}, "any", None),
        (("a",), {"a": 1, "a:2": 1}, "any", 1),
        (("a",), {}, "a", None),
    ],
)
def test_a_window_is_found_by_the_name_of_its_model(
    models: tuple[str, ...], windows: dict[str, int], model: str, tokens: int | None
) -> None:
    assert Probe(GENERIC, models, windows).window_tokens(model) == tokens


@pytest.mark.parametrize(
    ("dialect", "models", "more"), [("vllm", ("a",), False), ("vllm", (), True), ("ollama", ("a",), True)]
)
def test_more_windows_are_told_by_backends_that_load_models(dialect: str, models: tuple[str, ...], more: bool) -> None:
    assert Probe(DIALECTS[dialect], models).may_tell_more is more


def seen(tokens: int | None) -> Probe:
    return Probe(GENERIC, ("m",), {"m": tokens} if tokens else {})


@pytest.mark.parametrize(
    ("before", "now", "told"), [(8, 9, None), (8, 8, 5), (None, 9, 5), (8, None, 5), (None, None, 5)]
)
def test_a_told_window_is_kept_until_the_backend_tells_another_one(
    before: int | None, now: int | None, told: int | None
) -> None:
    windows = ToldWindows()
    windows.remember("m", 5)
    windows.forget_changed(seen(before), seen(now))
    assert windows.get("m") == told


def test_the_windows_told_last_are_remembered() -> None:
    windows = ToldWindows()
    for n in range(ToldWindows.MODELS):
        windows.remember(f"m{n}", n + 1)
    windows.remember("m0", 7)
    windows.remember("more", 8)
    assert [windows.get(model) for model in ("m0", "m1", "m2", "more")] == [7, None, 3, 8]


# -- sizes of prompts --------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PROMPT: Json = {"model": "m", "messages": MESSAGES, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}
ANSWERING: Json = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "logprobs": True,
    "top_logprobs": 2,
    "presence_penalty": 1,
    "frequency_penalty": 1,
}


@pytest.mark.parametrize(
    ("tokenizer", "body", "asked"),
    [
        ("llamacpp", PROMPT | ANSWERING, PROMPT),
        ("llamacpp", PROMPT | {"tool_choice": "required"}, PROMPT | {"tool_choice": "required"}),
        ("vllm", PROMPT | ANSWERING | {"tool_choice": "auto"}, PROMPT | {"add_generation_prompt": True}),
        (
            "vllm",
            {"model": "m", "messages": MESSAGES, "tools": [], "chat_template_kwargs": None},
            {"model": "m", "messages": MESSAGES, "add_generation_prompt": True},
        ),
        (
            "vllm",
            {"model": "m", "messages": MESSAGES, "reasoning_effort": "low", "chat_template_kwargs": {"a": 1}},
            {
                "model": "m",
                "messages": MESSAGES,
                "add_generation_prompt": True,
                "chat_template_kwargs": {"a": 1, "reasoning_effort": "low"},
            },
        ),
    ],
)
def test_a_tokenizer_is_asked_about_the_prompt_only(tokenizer: str, body: Json, asked: Json) -> None:
    before = orjson.dumps(body)
    assert TOKENIZERS[tokenizer].body(body) == asked
    assert orjson.dumps(body) == before


@pytest.mark.parametrize(
    ("tokenizer", "answer", "tokens"),
    [
        ("llamacpp", orjson.loads(transcript("llamacpp/chat-input-tokens").body), 32),
        ("vllm", orjson.loads(transcript("vllm/tokenize").body), 4),
        ("vllm", {"count": "4"}, None),
        ("vllm", {"count": 0}, None),
        ("vllm", [4], None),
        ("vllm", None, None),
    ],
)
def test_the_size_of_a_prompt_is_read(tokenizer: str, answer: Any, tokens: int | None) -> None:
    assert TOKENIZERS[tokenizer].read(answer) == tokens


def test_whatever_a_dialect_names_is_in_the_tables() -> None:
    assert {d.window_source for d in DIALECTS.values()} - {None} == set(WINDOW_SOURCES)
    assert {d.tokenizer for d in DIALECTS.values()} - {None} == set(TOKENIZERS)
