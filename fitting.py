"""Makes a window fit its model: counts it, decides, has a model write the record, and seals what takes its place.

May not know events, the HTTP framework or SQL.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import msgspec

from chunks import joined_usage, usage_of
from compaction import (
    CompactionSettings,
    Room,
    planned,
    room_for,
    threshold_of,
    truncated,
)
from counting import Counter
from dispatch import Renderer
from errors import UpstreamError, UpstreamGarbled, WindowExceeded
from folding import COMPACTION, FOLD, Contents, Fold, folded, is_standing, payload_of
from metrics import Metrics
from past import NO_WINDOW
from request import TurnRequest
from sealing import Seals
from streaming import ResponseStream, StreamPlan
from summaries import PROMPT, Answer, Question, Summariser, failed
from verbs import ItemIds
from weighing import Prompt, Weigher

Json = dict[str, Any]
log = logging.getLogger("responses_proxy.fitting")

Cause = Literal["threshold", "overflow", "trigger", "route", "ahead"]
# What is sealed as the work that was done ahead of a turn.
AHEAD = "compaction ahead"
# Part of a window that is left for the answer where the client sets no limit to it.
ANSWER_PART = 0.1
# Part of a window from which on the answer that a client wants leaves too little for any prompt.
MOST_OUTPUT_PART = 0.75
# Part of a refused prompt that is taken for the window when nobody tells it.
REFUSED_PART = 0.8
# Part of a limit for the items when instructions and tools take more than the target by themselves.
LEAST_PART = 0.125


class Need(NamedTuple):
    """Why a window does not fit: the limit that counts, its tokens, and what estimates have to be multiplied by."""

    cause: Cause
    limit: float
    tokens: float
    scale: float


class Made(msgspec.Struct, frozen=True):
    """What takes the place of a window: as it is kept, laid out, what it took to make it, and its tokens."""

    fold: Fold
    contents: Contents
    usage: Json
    tokens: float


class Fitted(msgspec.Struct, frozen=True):
    """A compaction item, and what is in it."""

    item: Json
    made: Made


@dataclass(frozen=True, slots=True)
class FitMeans:
    """What windows are made to fit with."""

    settings: CompactionSettings
    renderer: Renderer
    counter: Counter
    seals: Seals
    metrics: Metrics
    clock: Callable[[], float]


class Fitter:
    """Counts windows and compacts them."""

    def __init__(self, means: FitMeans) -> None:
        self.settings = means.settings
        self.renderer = means.renderer
        self.weigher = Weigher(means.counter)
        self._seals = means.seals
        self._metrics = means.metrics
        self._clock = means.clock

    # -- deciding ------------------------------------------------------------------------------------------------------

    async def need(self, prompt: Prompt, body: Json) -> Need | None:
        """Why a window has to be compacted before it is sent, if it has to."""
        is_asked = prompt.request.is_trigger
        limit = await self.limit(prompt)
        if math.isinf(limit) and not is_asked:
            return None
        tokens = await self.weigher.counted(prompt, body, 0.0 if is_asked else limit)
        if tokens < limit and not is_asked:
            return None
        need = Need("trigger" if is_asked else "threshold", limit, tokens, self.weigher.scale(prompt, tokens))
        if is_asked or self.helps(prompt, need):
            return need
        log.warning("instructions and tools take too much of %d tokens: compaction cannot help", need.limit)
        return None

    async def limit(self, prompt: Prompt) -> float:
        """The tokens from which on a window is compacted; inf: not before the backend refuses it."""
        request = prompt.request
        if not (request.is_trigger or request.context_management or self._has_threshold()):
            return math.inf
        known = await prompt.way.upstream.window_tokens(prompt.way.model)
        threshold = threshold_of(request, self.settings, known) or math.inf
        return min(threshold, self.input_limit(request, known)) if known else threshold

    def _has_threshold(self) -> bool:
        return bool(self.settings.threshold_tokens or self.settings.threshold_fraction)

    def helps(self, prompt: Prompt, need: Need) -> bool:
        """Not so when instructions and tools alone take the room; then items have to grow to be worth it."""
        standing = self.weigher.standing_tokens(prompt, need.scale)
        return standing <= need.limit * self.settings.target or need.tokens - standing >= 2 * LEAST_PART * need.limit

    async def overflow(self, prompt: Prompt, refused: WindowExceeded) -> Need:
        """What the backend's refusal says of a window."""
        way = prompt.way
        if refused.window_tokens:
            way.upstream.told_window(way.model, refused.window_tokens)
        estimate = self.weigher.estimated(prompt)
        known = refused.window_tokens or await way.upstream.window_tokens(way.model)
        limit = self.input_limit(prompt.request, known or (refused.prompt_tokens or estimate) * REFUSED_PART)
        tokens = max(estimate, limit, float(refused.prompt_tokens or 0))  # what is told may be a lower bound
        return Need("overflow", limit, tokens, self.weigher.scale(prompt, tokens))

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
        tokens = await self.weigher.counted(prompt, body, limit)
        return Need("overflow", limit, tokens, self.weigher.scale(prompt, tokens)) if tokens > limit else None

    def truncated(self, prompt: Prompt, need: Need) -> Contents:
        """Without its oldest turns."""
        room = need.limit - self.weigher.standing_tokens(prompt, need.scale)
        return truncated(prompt.past.contents, room, self.weigher.tokens_of(prompt, need.scale))

    # -- compacting ----------------------------------------------------------------------------------------------------

    async def compacted(self, prompt: Prompt, need: Need, item_id: str) -> Fitted:
        """Raises: UpstreamError; nothing is lost then."""
        made = self._from_ahead(prompt, need) or await self.made(prompt, need)
        return Fitted(self.sealed(prompt.caller.owner, item_id, made.fold), made)

    def sealed(self, owner: str, item_id: str, fold: Fold) -> Json:
        """The compaction item as clients see it."""
        blob = self._seals.seal(COMPACTION, owner, item_id, payload_of(fold))
        return {"id": item_id, "type": COMPACTION, "encrypted_content": blob}

    async def made(self, prompt: Prompt, need: Need) -> Made:
        """What takes the place of a window. Raises: UpstreamError."""
        began_at = self._clock()
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                fold, usage = await self._folded(prompt, need)
        except TimeoutError as error:
            self._metrics.compaction_failures.labels(need.cause).inc()
            raise failed(f"it took longer than {self.settings.timeout_s:g} s.") from error
        except UpstreamError as error:
            self._metrics.compaction_failures.labels(need.cause).inc()
            if error.http_status < 500 or isinstance(error, UpstreamGarbled):
                raise
            raise failed(error.message) from error
        made = self._weighed(prompt, need, fold, usage)
        self._metrics.compacted(need.cause, need.tokens, made.tokens, self._clock() - began_at)
        log.info("compacted (%s): %d tokens became %d", need.cause, need.tokens, made.tokens)
        return made

    def _weighed(self, prompt: Prompt, need: Need, fold: Fold, usage: Json) -> Made:
        contents = folded([{"type": COMPACTION, FOLD: fold}], [])
        tokens = self.weigher.contents_tokens(prompt, contents, need.scale)
        return Made(fold, contents, usage, tokens)

    def _from_ahead(self, prompt: Prompt, need: Need) -> Made | None:
        """What was made ahead of this turn, when that is enough."""
        blob = prompt.past.before.ahead
        if blob is None or need.cause not in ("threshold", "overflow"):
            return None
        payload = self._seals.open(AHEAD, prompt.caller.owner, None, blob.decode())
        if payload is None:
            return None
        ahead = msgspec.json.decode(payload, type=Fold)
        new = prompt.past.contents.new
        standing = [*ahead.standing, *filter(is_standing, new)]
        tail = [*ahead.tail, *(item for item in new if not is_standing(item))]
        fold = msgspec.structs.replace(ahead, standing=standing, tail=tail)
        made = self._weighed(prompt, need, fold, usage_of({}))
        return made if made.tokens < need.limit else None

    async def _folded(self, prompt: Prompt, need: Need) -> tuple[Fold, Json]:
        """And what it took to make it."""
        plan = planned(prompt.past.contents, self._room(prompt, need), self.weigher.tokens_of(prompt, need.scale))
        if not plan.lost:
            return plan.fold(plan.earlier), usage_of({})
        asking = _Asking(self.renderer, self.weigher, prompt, self.settings.model)
        summariser = await asking.summariser(self._instructions(prompt, need), need)
        return plan.fold(await summariser.summary(plan)), asking.usage

    def _instructions(self, prompt: Prompt, need: Need) -> str:
        """What the model is told; a client of the route may add to it."""
        added = prompt.request.instructions if need.cause == "route" else None
        return "\n\n".join(text for text in (self.settings.prompt or PROMPT, added) if text)

    def _room(self, prompt: Prompt, need: Need) -> Room:
        is_asked = need.cause in ("trigger", "route")
        if math.isinf(need.limit):
            tokens = need.tokens + self.settings.user_tokens + 8 * self.settings.summary_tokens
        else:
            standing = self.weigher.standing_tokens(prompt, need.scale)
            tokens = max(need.limit * self.settings.target - standing, need.limit * LEAST_PART)
        return room_for(tokens, self.settings, is_asked=is_asked)


class Fit:
    """The window of one turn, made to fit before it is sent, or once more when the backend refuses it."""

    def __init__(self, fitter: Fitter, prompt: Prompt, body: Json, item_ids: Callable[[str], str]) -> None:
        self.body = body
        self.prompt = prompt
        self.is_mere = prompt.request.is_trigger
        self._fitter = fitter
        self._new_id = item_ids
        self._fitted: Fitted | None = None
        self._is_looked_at = False
        self._is_changed = False
        self._is_truncated = False

    async def look(self) -> Need | None:
        """Why it has to be compacted, told once; a window that is to be truncated is so at once.

        Raises: InvalidRequest.
        """
        if self._is_looked_at:
            return None
        self._is_looked_at = True
        need = await self._fitter.need(self.prompt, self.body)
        if need is None and (surplus := await self._fitter.surplus(self.prompt, self.body)):
            await self._truncate(surplus)
        return need

    @cached_property
    def item_id(self) -> str:
        """Of the compaction item of a mere compaction, which is told before it is made."""
        return self._new_id("cmp")

    async def compact(self, need: Need) -> Fitted:
        """Raises: UpstreamError; the window is as before then."""
        item_id = self.item_id if self.is_mere else self._new_id("cmp")
        fitted = self._fitted = await self._fitter.compacted(self.prompt, need, item_id)
        if not self.is_mere:
            await self._send(fitted.made.contents)
        return fitted

    def can_change(self, refused: WindowExceeded) -> bool:
        """Whether a window that the backend refuses may be sent once more, in another form, and that can help."""
        request = self.prompt.request
        is_allowed = self._fitter.settings.on_overflow or request.truncation == "auto"
        left = MOST_OUTPUT_PART * (refused.window_tokens or math.inf)
        return is_allowed and not self._is_changed and (request.max_output_tokens or 0) <= left

    async def change(self, refused: WindowExceeded) -> Fitted | None:
        """Compacts or truncates a window that was refused. Raises: WindowExceeded where that cannot help."""
        if not self.can_change(refused):
            raise refused
        self._is_changed = True
        need = await self._fitter.overflow(self.prompt, refused)
        if self.prompt.request.truncation == "auto":
            await self._truncate(need)
            return None
        try:
            return await self.compact(need)
        except UpstreamError as error:
            raise WindowExceeded(f"{refused.message} {error.message}") from error

    async def _truncate(self, need: Need) -> None:
        self._is_truncated = True
        await self._send(self._fitter.truncated(self.prompt, need))

    async def _send(self, contents: Contents) -> None:
        past = msgspec.structs.replace(self.prompt.past, contents=contents, before=NO_WINDOW)
        self.prompt = msgspec.structs.replace(self.prompt, past=past)
        ready = await self._fitter.renderer.rendered(self.prompt.request, past.window, ())
        self.body = ready.rendered.body

    def window_tokens(self, counted: Json) -> int | None:
        """Of the window and the answer, where the usage of the response does not tell; 0: nobody knows."""
        if self._is_truncated:
            return 0
        if self.is_mere and self._fitted:
            return int(self._fitted.made.tokens)
        if self._fitted is None and counted:
            return None
        return (counted.get("prompt_tokens") or 0) + (counted.get("completion_tokens") or 0)

    def learn(self, counted: Json) -> None:
        """From what the backend counted."""
        if not self.is_mere and (tokens := counted.get("prompt_tokens")):
            self._fitter.weigher.learn(self.prompt, tokens)


class _Asking:
    """Asks the model that writes summaries, and adds up what that takes."""

    def __init__(self, renderer: Renderer, weigher: Weigher, prompt: Prompt, model: str) -> None:
        self.usage = usage_of({})
        self._renderer = renderer
        self._weigher = weigher
        self._window = prompt
        self._model = model or prompt.request.model
        self._way = prompt.way

    async def summariser(self, prompt: str, need: Need) -> Summariser:
        self._way = await self._renderer.way(self._model)
        known = await self._way.upstream.window_tokens(self._way.model)
        same = self._way.name == self._window.way.name
        tokens = known or (need.limit if same and need.cause == "overflow" else math.inf)
        tokens_in = partial(self._tokens_in, scale=need.scale if same else 1.0)
        return Summariser(self._ask, tokens_in, prompt, tokens)

    def _tokens_in(self, text: str, scale: float) -> float:
        return scale * self._weigher.text_tokens(self._way, text)

    async def _ask(self, question: Question) -> Answer:
        """Raises: UpstreamError."""
        request = TurnRequest(
            model=self._model,
            instructions=question.instructions,
            input=question.text,
            max_output_tokens=question.answer_tokens,
        )
        ready = await self._renderer.ready(request, request.items, ())
        completion = await ready.way.upstream.complete(ready.rendered.body, self._window.caller.bearer)
        plan = StreamPlan(silent=True, think=ready.way.upstream.settings.think)
        machine = ResponseStream({}, plan, ItemIds("resp_0"), float)
        machine.feed(completion)
        machine.close()
        response = machine.snapshot()
        self.usage = joined_usage(self.usage, response["usage"])
        said = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
        return Answer("".join(part.get("text", "") for part in said), response["status"] == "incomplete")
