"""What docs/clients.md tells people to write, for a proxy that a test has started."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "clients.md"
ADDRESS = "http://127.0.0.1:8080"
MODEL = "qwen3:30b"


def snippets(client: str, language: str) -> list[str]:
    """The snippets in this language below a client's heading, as they stand there."""
    _, _, rest = PAGE.read_text().partition(f"\n## {client}\n")
    return re.findall(rf"^```{language}\n(.*?)^```$", rest.partition("\n## ")[0], re.MULTILINE | re.DOTALL)


def adapted(snippet: str, url: str, model: str = "m") -> str:
    assert MODEL in snippet
    assert ADDRESS in snippet
    return snippet.replace(MODEL, model).replace(ADDRESS, url)
