"""The trace that a request is part of: the headers that tell of it, and what records spans where that is wanted.

May not know who records them. Source: W3C Trace Context, level 2 (traceparent, tracestate).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

Trace = Mapping[str, str]
Attributes = Mapping[str, Any]
NO_TRACE: Trace = MappingProxyType({})
NOTHING: Attributes = MappingProxyType({})

# Version, trace id, parent id, flags; later versions may add what begins with another dash.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
PARENT_CHARACTERS, STATE_CHARACTERS, STATE_MEMBERS = 128, 512, 32
MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")


@dataclass(frozen=True)
class TracingSettings:
    """The section `[tracing]`."""

    enabled: bool = False


def trace_of(headers: Iterable[tuple[bytes, bytes]]) -> Trace:
    """The headers of a request that go on to the backend: valid ones only, and no state without a parent."""
    given: dict[bytes, list[str]] = {b"traceparent": [], b"tracestate": []}
    for name, value in headers:
        if name in given:
            given[name].append(value.decode("latin-1").strip())
    parents = given[b"traceparent"]
    if len(parents) != 1 or not _is_parent(parents[0]):
        return NO_TRACE
    state = ",".join(filter(None, given[b"tracestate"]))
    return {"traceparent": parents[0]} | ({"tracestate": state} if _is_state(state) else {})


def _is_parent(text: str) -> bool:
    found = TRACEPARENT.fullmatch(text)
    return found is not None and len(text) <= PARENT_CHARACTERS and not (found[1] == "00" and found[2])


def _is_state(text: str) -> bool:
    members = [stripped for member in text.split(",") if (stripped := member.strip(" \t"))]
    is_short = len(text) <= STATE_CHARACTERS and 0 < len(members) <= STATE_MEMBERS
    keys = {member.partition("=")[0] for member in members}
    return is_short and len(keys) == len(members) and all(MEMBER.fullmatch(member) for member in members)


class Span(Protocol):
    """Something that takes time, as traces show it. `end` it once."""

    @property
    def trace(self) -> Trace:
        """The headers for whoever is called in it."""

    def note(self, attributes: Attributes) -> None: ...

    def rename(self, name: str) -> None:
        """Some names are known only at the end."""

    def end(self, error: str | None = None) -> None:
        """`error`: a word for what went wrong, never a message."""


class Tracing(Protocol):
    """What records spans. `close` it."""

    def begin(
        self, name: str, kind: Literal["server", "client", "internal"], of: Trace, attributes: Attributes
    ) -> Span:
        """A span that has begun, in the trace `of` whoever asks."""

    async def close(self) -> None: ...
