"""Why a window does not fit its model, and when that is known: the decisions, before anything is done.

May not change a window.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, NamedTuple

from compaction import CompactionSettings, threshold_of
from request import TurnRequest
from upstream_errors import WindowExceeded
from weighing import Prompt, Weigher

Json = dict[str, Any]
log = logging.getLogger("responses_proxy.needs")

Cause = Literal["threshold", "overflow", "trigger", "route", "ahead"]
# Part of a window that is left for the answer where the client sets no limit to it.
ANSWER_PART = 0.1
# Part of a window from which on the answer that a client wants leaves too little for any prompt.
MOST_OUTPUT_PART = 0.75
# Part of a refused prompt that is taken for the window when nobody tells it.
REFUSED_PART = 0.8
# Part of a limit for the items when instructions and tools take more than the target by themselves.
LEAST_PART = 0.125


class Need(NamedTuple):
    """Why a window does not fit: the limit that counts, and its tokens."""

    cause: Cause
    limit: float
    tokens: float


class Needs:
    """Decides what windows need."""

    def __init__(self, weigher: Weigher, settings: CompactionSettings) -> None:
        self._weigher = weigher
        self._settings = settings

    def concerns(self, request: TurnRequest) -> bool:
        """Whether anything may be needed before the backend refuses."""
        return request.truncation == "auto" or self._is_limited(request)

    def _is_limited(self, request: TurnRequest) -> bool:
        is_set = self._settings.threshold_tokens or self._settings.threshold_fraction
        return bool(is_set or request.is_trigger or request.context_management)

    async def need(self, prompt: Prompt, body: Json) -> Need | None:
        """Why a window has to be compacted before it is sent, if it has to."""
        is_asked = prompt.request.is_trigger
        limit = await self.limit(prompt)
        if math.isinf(limit) and not is_asked:
            return None
        tokens = await self._weigher.counted(prompt, body, 0.0 if is_asked else limit)
        if tokens < limit and not is_asked:
            return None
        need = Need("trigger" if is_asked else "threshold", limit, tokens)
        if is_asked or self.helps(prompt, need):
            return need
        log.warning("instructions and tools take too much of %d tokens: compaction cannot help", need.limit)
        return None

    async def limit(self, prompt: Prompt) -> float:
        """The tokens from which on a window is compacted; inf: not before the backend refuses it."""
        request = prompt.request
        if not self._is_limited(request):
            return math.inf
        known = await prompt.way.upstream.window_tokens(prompt.way.model)
        threshold = threshold_of(request, self._settings, known) or math.inf
        return min(threshold, self.input_limit(request, known)) if known else threshold

    def helps(self, prompt: Prompt, need: Need) -> bool:
        """Not so when instructions and tools alone take the room; then items have to grow to be worth it."""
        standing = self._weigher.standing_tokens(prompt)
        return standing <= need.limit * self._settings.target or need.tokens - standing >= 2 * LEAST_PART * need.limit

    async def overflow(self, prompt: Prompt, refused: WindowExceeded) -> Need:
        """What the backend's refusal says of a window."""
        way = prompt.way
        if refused.window_tokens:
            way.upstream.told_window(way.model, refused.window_tokens)
        estimate = self._weigher.estimated(prompt)
        known = refused.window_tokens or await way.upstream.window_tokens(way.model)
        limit = self.input_limit(prompt.request, known or (refused.prompt_tokens or estimate) * REFUSED_PART)
        tokens = max(estimate, limit, float(refused.prompt_tokens or 0))  # what is told may be a lower bound
        return Need("overflow", limit, tokens)

    def input_limit(self, request: TurnRequest, window_tokens: float) -> float:
        """What of a window is left for the prompt."""
        return window_tokens - min(request.max_output_tokens or window_tokens * ANSWER_PART, window_tokens / 2)

    async def surplus(self, prompt: Prompt, body: Json) -> Need | None:
        """Why a window has to be truncated before it is sent, where that was asked for and the window is known."""
        if prompt.request.truncation != "auto":
            return None
        known = await prompt.way.upstream.window_tokens(prompt.way.model)
        if not known:
            return None
        limit = self.input_limit(prompt.request, known)
        tokens = await self._weigher.counted(prompt, body, limit)
        return Need("overflow", limit, tokens) if tokens > limit else None
