"""What the state machine of streaming.py has to know before it is fed.

May not do anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from think import Think
from tools import ToolRef

Json = dict[str, Any]


@dataclass(frozen=True)
class ReasoningSettings:
    """How reasoning text is shown to clients."""

    expose: Literal["summary", "text", "none"] = "summary"


class StreamPlan(msgspec.Struct, frozen=True):
    """What the machine has to know of the request."""

    refs: dict[str, ToolRef] = msgspec.field(default_factory=dict)
    taken_call_ids: frozenset[str] = frozenset()
    logprobs: bool = False
    parallel: bool = True
    expose: Literal["summary", "text", "none"] = "summary"
    think: Think = "auto"
    # Of a reasoning item: id, text and details -> `encrypted_content`. None: the client does not need it.
    seal: Callable[[str, str, list[Json]], str] | None = None
    # Whether nobody listens to events: a plain answer wants the response only.
    silent: bool = False
    # Of a stream that goes on where an earlier attempt stood: its response has been created before.
    first_number: int = 0
    # Of a response that is a compaction item and nothing else.
    is_mere: bool = False
    # Asked only when the backend gives no usage.
    estimate_input_tokens: Callable[[], int] = int
