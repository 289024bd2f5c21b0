"""The one item that is being written into a response, and its parts.

May not know events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(slots=True)
class OpenItem:
    """The one item being written; `part` names its open part, whose text is joined once, at its end."""

    index: int
    item: Json
    part: str = ""
    parts: list[Json] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.item["type"])

    def text(self) -> str:
        return "".join(self.pieces)


def empty_part(kind: str) -> Json:
    if kind == "refusal":
        return {"type": "refusal", "refusal": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def filled_part(item: OpenItem) -> Json:
    if item.part == "refusal":
        return {"type": "refusal", "refusal": item.text()}
    return {**item.parts[-1], "text": item.text(), "logprobs": item.logprobs}
