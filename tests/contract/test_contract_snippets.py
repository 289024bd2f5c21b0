"""The snippets of docs/clients.md, run as they stand there against the running proxy. Codex has a module of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from compacting import Talker, answered, backend, called
from conftest import App
from node import needs_node, node
from processes import Client
from scripted import Script
from snippets import adapted, snippets
from weather import ANSWER, PARIS, Json

__all__ = ["backend"]
pytestmark = pytest.mark.timeout(120)
PYTHON = ["Agents SDK", "openai for Python", "LangChain", "Pydantic AI"]
NODE = ["openai for Node", "AI SDK"]


def weather(body: Json) -> Script:
    """Asks for the weather where there is a tool that knows it, and then tells it."""
    if "tools" in body and body["messages"][-1]["role"] != "tool":
        return called(body, "call_1", "weather", PARIS)
    return answered(body, ANSWER)


@pytest.mark.parametrize("client", PYTHON)
async def test_a_python_snippet_tells_the_answer(app: App, backend: Talker, tmp_path: Path, client: str) -> None:
    backend.answer = weather
    (snippet,) = snippets(client, "python")
    python = Client(tmp_path, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    assert (
        (
            await python.run(
                sys.executable, "-W", "error::DeprecationWarning:__main__", "-", told=adapted(snippet, app.url)
            )
        )
        .strip()
        .endswith(ANSWER)
    )


@needs_node
@pytest.mark.parametrize("client", NODE)
async def test_a_node_snippet_tells_the_answer(app: App, backend: Talker, client: str) -> None:
    backend.answer = weather
    (snippet,) = snippets(client, "js")
    assert (await node(app).run("node", "--input-type=module", told=adapted(snippet, app.url))).strip().endswith(ANSWER)
