"""How a backend is told from its host, its list of models, its headers or its port."""

from __future__ import annotations

from typing import Any

import pytest

import dialects

Json = dict[str, Any]
# GET /v1/models, shortened to what tells something. Source: tests/wire/<source>/models.txt and the servers' sources.
LLAMACPP: Json = {"data": [{"id": "tiny", "owned_by": "llamacpp", "meta": {"n_ctx": 1024, "n_ctx_train": 2048}}]}
VLLM: Json = {"data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": 1024}]}
LITELLM: Json = {"data": [{"id": "mock", "owned_by": "openai"}, {"id": "b", "owned_by": "openai"}]}
TRANSFORMERS: Json = {"data": []}


@pytest.mark.parametrize(
    ("models", "headers", "port", "name"),
    [
        (LLAMACPP, {}, 8080, "llamacpp"),
        ({"data": [{"id": "x", "meta": {}}]}, {}, 8080, "llamacpp"),
        (TRANSFORMERS, {"Server": "llama.cpp"}, 8080, "llamacpp"),
        (VLLM, {"Server": "uvicorn"}, 8000, "vllm"),
        ({"data": [{"id": "q", "owned_by": "sglang"}]}, {}, None, "sglang"),
        ({"data": [{"id": "q", "owned_by": "library"}]}, {}, 8080, "ollama"),
        ({"data": [{"id": "q", "owned_by": "organization_owner"}]}, {}, 8080, "lmstudio"),
        (LITELLM, {}, 4000, "generic"),
        (TRANSFORMERS, {}, 8000, "generic"),
        (TRANSFORMERS, {}, 11434, "ollama"),
        (TRANSFORMERS, {}, 1234, "lmstudio"),
        ({"data": None}, {}, None, "generic"),
        ({"data": [5, {"owned_by": "vllm"}]}, {}, None, "vllm"),
    ],
)
def test_a_list_of_models_tells_the_dialect(models: Json, headers: dict[str, str], port: int | None, name: str) -> None:
    assert name == dialects.of_models(models, headers, port)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.openai.com", "openai"),
        ("mine.openai.azure.com", "openai"),
        ("api.mistral.ai", "mistral"),
        ("generativelanguage.googleapis.com", "gemini"),
        ("api.deepseek.com", "deepseek"),
        ("openrouter.ai", "openrouter"),
        ("api.groq.com", "groq"),
        ("localhost", None),
        ("evil-api.openai.com.example", None),
    ],
)
def test_a_well_known_host_tells_its_dialect(host: str, name: str | None) -> None:
    assert name == dialects.of_host(host)


def test_a_named_dialect_can_be_changed_in_single_fields() -> None:
    changed = dialects.named("vllm", late_system=True)
    assert (changed.late_system, changed.tool_choice, dialects.DIALECTS["vllm"].late_system) == (True, "named", False)


def test_an_unknown_dialect_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        dialects.named("nobody")


def test_whatever_detection_finds_is_a_dialect() -> None:
    tables = (dialects.DIALECT_OF_HOST, dialects.DIALECT_OF_OWNER, dialects.DIALECT_OF_SERVER, dialects.DIALECT_OF_PORT)
    assert set() == {name for table in tables for name in table.values()} - dialects.DIALECTS.keys()
