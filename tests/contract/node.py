"""Node and the packages of tests/node, where they are there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import App
from processes import Client

FOLDER = Path(__file__).parent.parent / "node"
COMMANDS = FOLDER / "node_modules" / ".bin"
IS_INSTALLED = shutil.which("node") is not None and COMMANDS.is_dir()
needs_node = pytest.mark.skipif(not IS_INSTALLED, reason="no Node clients: `make test` installs them where npm is")


def node(app: App) -> Client:
    """Starts scripts that take the proxy for OpenAI."""
    openai = {"OPENAI_BASE_URL": f"{app.url}/v1", "OPENAI_API_KEY": "unused"}
    return Client(FOLDER, {"PATH": os.environ["PATH"], **openai})
