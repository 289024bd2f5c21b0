"""Tool calls as their deltas gather: which call a delta belongs to, and the line in which calls wait to be written.

May not know events. No two kinds of backend number and name their calls alike (tests/wire, and DashScope, Gemini,
LM Studio, Ollama and TGI as read in November 2026); the rule here survives them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tools import ToolRef, dumps, is_object, resolve

Json = dict[str, Any]


@dataclass(slots=True)
class Call:
    """One tool call as far as it is known; `sent` counts the pieces of arguments that went out."""

    call_id: str
    chat_id: str = ""
    ref: ToolRef | None = None
    pieces: list[str] = field(default_factory=list)
    sent: int = 0
    extra: Json | None = None

    def arguments(self) -> str:
        return "".join(self.pieces)

    def is_whole(self) -> bool:
        return is_object(self.arguments())

    def extras(self) -> Json:
        """What a backend wants back with the call. Source: Gemini 3 thought signatures."""
        return {"extra_content": self.extra} if self.extra else {}


class CallLine:
    """The calls of one answer; `waiting` holds those that are not closed, in order."""

    def __init__(
        self, refs: dict[str, ToolRef], taken_ids: Iterable[str], new_id: Callable[[str], str], *, parallel: bool
    ) -> None:
        self.waiting: list[Call] = []
        self._refs = refs
        self._ids = set(taken_ids)
        self._new_id = new_id
        self._parallel = parallel
        self._slots: dict[int, Call] = {}
        self._last: Call | None = None

    def add(self, delta: Json, position: int) -> None:
        """Adds a delta to its call; of several calls only the first is kept when parallel ones were not wanted."""
        function = delta.get("function") or {}
        name, arguments = function.get("name"), function.get("arguments")
        call = self._call_of(delta, position)
        if name and call.ref is None:
            call.ref = resolve(self._refs, name)
        if arguments:
            call.pieces.append(arguments if isinstance(arguments, str) else dumps(arguments))
        if isinstance(delta.get("extra_content"), dict):
            call.extra = delta["extra_content"]

    def _call_of(self, delta: Json, position: int) -> Call:
        index = delta.get("index")
        call = self._last if index is None else self._slots.get(index)
        if call is None or _begins_another(delta, call):
            call = self._begin(delta.get("id") or "")
            self._slots[position if index is None else index] = call
        return call

    def _begin(self, chat_id: str) -> Call:
        call_id = chat_id if chat_id and chat_id not in self._ids else self._new_id("call")
        self._ids.add(call_id)
        call = Call(call_id, chat_id)
        if self._parallel or self._last is None:
            self.waiting.append(call)
        self._last = call
        return call


def _begins_another(delta: Json, call: Call) -> bool:
    """A new id; a name without id and index; or a named call over again after one that is whole."""
    chat_id, function = delta.get("id"), delta.get("function") or {}
    if chat_id and chat_id != call.chat_id:
        return True
    if not function.get("name"):
        return False
    return (delta.get("index") is None and not chat_id) or bool(function.get("arguments") and call.is_whole())
