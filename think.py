"""Reasoning that a backend left in the text: `<think>` tags, wherever the network cuts them.

May not know events and items. Source: tests/wire/vllm (a server without a reasoning parser sends the tags as text),
Qwen3 (a template may swallow the opening tag, and an empty block means "no reasoning").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"

Think = Literal["auto", "open", "off"]
# Whether it is reasoning, and the text.
Piece = tuple[bool, str]


class ThinkTags:
    """Parts text into reasoning and answer.

    "auto": a block at the very start; or one whose opening tag the template swallowed, if the first text that comes
    holds the closing tag (text that has gone out cannot be called back, so a later closing tag is text).
    "open": the answer starts inside a block. "off": tags are text. White space is held back until it is known what it
    stands before.
    """

    def __init__(self, mode: Think) -> None:
        self._state = "lead" if mode == "off" else "start"
        self._untagged = "inside" if mode == "open" else "unopened"
        self._held = ""

    def never(self) -> None:
        """The backend parts reasoning itself."""
        if self._state in ("start", "unopened"):
            self._state = "lead"

    def split(self, text: str) -> list[Piece]:
        """What is certain so far. A piece of reasoning may be empty: it tells that a block was there."""
        if self._state == "plain":
            return [(False, text)]
        self._held, text = "", self._held + text
        pieces: list[Piece] = []
        while text:
            text = self._STEPS[self._state](self, text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        is_reasoning = self._state == "inside" or (self._state, self._untagged) == ("start", "inside")
        return [(is_reasoning, held)] if held else []

    # -- one method a state: takes from the text, gives what is left ---------------------------------------------------

    def _start(self, text: str, pieces: list[Piece]) -> str:
        lead = text.lstrip()
        if OPEN_TAG.startswith(lead):
            return self._hold(text)
        if lead.startswith(OPEN_TAG):
            self._state = "inside"
            return lead[len(OPEN_TAG) :]
        self._state = self._untagged
        return text

    def _inside(self, text: str, pieces: list[Piece]) -> str:
        before, tag, after = text.partition(CLOSE_TAG)
        if tag:
            pieces.append((True, before))
            self._state = "plain"
            return after
        kept = len(text) - _overlap(text, CLOSE_TAG)
        pieces.append((True, text[:kept]))
        return self._hold(text[kept:])

    def _unopened(self, text: str, pieces: list[Piece]) -> str:
        if CLOSE_TAG.startswith(text.lstrip()):
            return self._hold(text)
        before, tag, _ = text.partition(CLOSE_TAG)
        self._state = "inside" if tag and OPEN_TAG not in before else "plain"
        return text

    def _lead(self, text: str, pieces: list[Piece]) -> str:
        if not text.strip():
            return self._hold(text)
        self._state = "plain"
        return text

    def _plain(self, text: str, pieces: list[Piece]) -> str:
        pieces.append((False, text))
        return ""

    _STEPS: ClassVar[dict[str, Callable[[ThinkTags, str, list[Piece]], str]]] = {
        "start": _start,
        "inside": _inside,
        "unopened": _unopened,
        "lead": _lead,
        "plain": _plain,
    }

    def _hold(self, text: str) -> str:
        self._held = text
        return ""


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    if "<" not in text[-len(tag) :]:
        return 0
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
