"""Makes a window fit its model: counts it, decides, has a model write the record, and seals what takes its place.

May not know events, the HTTP framework or SQL.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import msgspec

from auth import Caller
from chunks import joined_usage, usage_of
from compaction import (
    Answer,
    CompactionSettings,
    Question,
    Room,
    Summariser,
    planned,
    room_for,
    threshold_of,
    truncated,
)
from counting import Counter, Size, added_size, size_of, standing_size, thought_size, total, window_size
from dispatch import Renderer, Way
from errors import UpstreamError, WindowExceeded
from folding import COMPACTION, FOLD, Contents, Fold, folded, is_standing, laid_out, payload_of
from items import is_from_user, item_type
from metrics import Metrics
from past import NO_WINDOW, Past
from records import counted_tokens
from request import TurnRequest
from sealing import Seals
from streaming import ResponseStream, StreamPlan
from tools import CALL_ID_PREFIX
from verbs import ItemIds

Json = dict[str, Any]
log = logging.getLogger("responses_proxy.fitting")

Cause = Literal["threshold", "overflow", "trigger", "route", "ahead"]
# What is sealed as the work that was done ahead of a turn.
AHEAD = "compaction ahead"
# Part of a limit from which on the backend's own tokenizer is asked, where there is one; of a model not known yet.
ASK_FROM, ASK_UNKNOWN_FROM = 0.75, 0.3
# Part of a window that is left for the answer where the client sets no limit to it.
ANSWER_PART = 0.1
# Part of a refused prompt that is taken for the window when nobody tells it.
REFUSED_PART = 0.8
# Part of a limit for the items when instructions and tools take more than the target by themselves.
LEAST_PART = 0.125
# How far a count may be from what was estimated.
LEAST_SCALE, MOST_SCALE = 0.25, 8.0


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


class Window(msgspec.Struct, frozen=True):
    """A request with what it continues, on its way."""

    request: TurnRequest
    caller: Caller
    past: Past
    way: Way


class Fitter:
    """Counts windows and compacts them."""

    def __init__(self, means: FitMeans) -> None:
        self.settings = means.settings
        self.renderer = means.renderer
        self.counter = means.counter
        self._seals = means.seals
        self._metrics = means.metrics
        self._clock = means.clock

    # -- counting ------------------------------------------------------------------------------------------------------

    def base_tokens(self, window: Window) -> float | None:
        """What the backend counted of all that the request continues; None where that tells nothing of this window."""
        before = window.past.before
        if before.model != window.request.model or _ends_with_cut_call(window.past.contents.history):
            return None
        return counted_tokens(before.body)

    def sized(self, window: Window, base: float | None) -> Size:
        """Of what is not in the base."""
        contents, sends = window.past.contents, window.way.dialect.reasoning_field is not None
        units = self.counter.units
        if base is None:
            return self.whole_size(window, contents)
        return added_size([*contents.history, *contents.new], len(contents.history), units, sends)

    def whole_size(self, window: Window, contents: Contents) -> Size:
        sends = window.way.dialect.reasoning_field is not None
        units = self.counter.units
        return total([standing_size(window.request, units), window_size(laid_out(contents), units, sends)])

    def estimated(self, window: Window) -> float:
        base = self.base_tokens(window)
        return (base or 0.0) + self.counter.tokens(window.way.name, self.sized(window, base))

    async def counted(self, window: Window, body: Json, near: float) -> float:
        """The tokens of a window: exact where the backend can count, when they are near the limit that matters."""
        estimate = self.estimated(window)
        if estimate < near * (ASK_FROM if self.counter.knows(window.way.name) else ASK_UNKNOWN_FROM):
            return estimate
        exact = await window.way.upstream.count_tokens(body, window.caller.bearer)
        return estimate if exact is None else float(exact)

    def scale(self, window: Window, tokens: float) -> float:
        """What the estimates of single items are to be multiplied by, so that they come to what was counted."""
        whole = self.counter.tokens(window.way.name, self.whole_size(window, window.past.contents))
        return min(max(tokens / max(whole, 1.0), LEAST_SCALE), MOST_SCALE)

    def learn(self, window: Window, tokens: float) -> None:
        """`tokens`: what the backend counted of the prompt."""
        if not self.counter.wants(window.way.name):
            return
        base = self.base_tokens(window)
        new = tokens - (base or 0.0)
        if base is None or new > 0:
            self.counter.learn(window.way.name, self.sized(window, base), new)

    # -- deciding ------------------------------------------------------------------------------------------------------

    async def need(self, window: Window, body: Json) -> Need | None:
        """Why a window has to be compacted before it is sent, if it has to."""
        is_asked = window.request.is_trigger
        limit = await self.limit(window)
        if math.isinf(limit) and not is_asked:
            return None
        tokens = await self.counted(window, body, 0.0 if is_asked else limit)
        if tokens < limit and not is_asked:
            return None
        need = Need("trigger" if is_asked else "threshold", limit, tokens, self.scale(window, tokens))
        return need if is_asked or self._helps(window, need) else None

    async def limit(self, window: Window) -> float:
        """The tokens from which on a window is compacted; inf: not before the backend refuses it."""
        request = window.request
        if not (request.is_trigger or request.context_management or self._has_threshold()):
            return math.inf
        known = await window.way.upstream.window_tokens(window.way.model)
        threshold = threshold_of(request, self.settings, known) or math.inf
        return min(threshold, self.input_limit(request, known)) if known else threshold

    def _has_threshold(self) -> bool:
        return bool(self.settings.threshold_tokens or self.settings.threshold_fraction)

    def _helps(self, window: Window, need: Need) -> bool:
        """Not so when instructions and tools alone take the room; then items have to grow to be worth it."""
        standing = self.standing_tokens(window, need.scale)
        if standing <= need.limit * self.settings.target or need.tokens - standing >= 2 * LEAST_PART * need.limit:
            return True
        log.warning("instructions and tools take %d of %d tokens: compaction cannot help", standing, need.limit)
        return False

    async def overflow(self, window: Window, refused: WindowExceeded) -> Need:
        """What the backend's refusal says of a window."""
        way = window.way
        if refused.window_tokens:
            way.upstream.told_window(way.model, refused.window_tokens)
        estimate = self.estimated(window)
        known = refused.window_tokens or await way.upstream.window_tokens(way.model)
        limit = self.input_limit(window.request, known or (refused.prompt_tokens or estimate) * REFUSED_PART)
        tokens = max(estimate, limit, float(refused.prompt_tokens or 0))  # what is told may be a lower bound
        return Need("overflow", limit, tokens, self.scale(window, tokens))

    def input_limit(self, request: TurnRequest, window_tokens: float) -> float:
        """What of a window is left for the prompt."""
        return window_tokens - min(request.max_output_tokens or window_tokens * ANSWER_PART, window_tokens / 2)

    def standing_tokens(self, window: Window, scale: float) -> float:
        return scale * self.counter.tokens(window.way.name, standing_size(window.request, self.counter.units))

    async def surplus(self, window: Window, body: Json) -> Need | None:
        """Why a window has to be truncated before it is sent, where that was asked for and the window is known."""
        if window.request.truncation != "auto":
            return None
        known = await window.way.upstream.window_tokens(window.way.model)
        if not known:
            return None
        limit = self.input_limit(window.request, known)
        tokens = await self.counted(window, body, limit)
        return Need("overflow", limit, tokens, self.scale(window, tokens)) if tokens > limit else None

    def truncated(self, window: Window, need: Need) -> Contents:
        """Without its oldest turns."""
        room = need.limit - self.standing_tokens(window, need.scale)
        return truncated(window.past.contents, room, self._tokens_of(window, need.scale))

    def _tokens_of(self, window: Window, scale: float) -> Callable[[Json], float]:
        units, name = self.counter.units, window.way.name

        def tokens_of(item: Json) -> float:
            return scale * self.counter.tokens(name, total([size_of(item, units), thought_size(item, units)]))

        return tokens_of

    # -- compacting ----------------------------------------------------------------------------------------------------

    async def compacted(self, window: Window, need: Need, item_id: str) -> Fitted:
        """Raises: UpstreamError; nothing is lost then."""
        made = self._from_ahead(window, need) or await self.made(window, need)
        return Fitted(self.sealed(window.caller.owner, item_id, made.fold), made)

    def sealed(self, owner: str, item_id: str, fold: Fold) -> Json:
        """The compaction item as clients see it."""
        blob = self._seals.seal(COMPACTION, owner, item_id, payload_of(fold))
        return {"id": item_id, "type": COMPACTION, "encrypted_content": blob}

    async def made(self, window: Window, need: Need) -> Made:
        """What takes the place of a window. Raises: UpstreamError."""
        began_at = self._clock()
        try:
            fold, usage = await self._folded(window, need)
        except UpstreamError:
            self._metrics.compaction_failures.labels(need.cause).inc()
            raise
        made = self._weighed(window, need, fold, usage)
        self._metrics.compacted(need.cause, need.tokens, made.tokens, self._clock() - began_at)
        log.info("compacted (%s): %d tokens became %d", need.cause, need.tokens, made.tokens)
        return made

    def _weighed(self, window: Window, need: Need, fold: Fold, usage: Json) -> Made:
        contents = folded([{"type": COMPACTION, FOLD: fold}], [])
        tokens = need.scale * self.counter.tokens(window.way.name, self.whole_size(window, contents))
        return Made(fold, contents, usage, tokens)

    def _from_ahead(self, window: Window, need: Need) -> Made | None:
        """What was made ahead of this turn, when that is enough."""
        blob = window.past.before.ahead
        if blob is None or need.cause not in ("threshold", "overflow"):
            return None
        payload = self._seals.open(AHEAD, window.caller.owner, None, blob.decode())
        if payload is None:
            return None
        ahead = msgspec.json.decode(payload, type=Fold)
        new = window.past.contents.new
        standing = [*ahead.standing, *filter(is_standing, new)]
        tail = [*ahead.tail, *(item for item in new if not is_standing(item))]
        fold = msgspec.structs.replace(ahead, standing=standing, tail=tail)
        made = self._weighed(window, need, fold, usage_of({}))
        return made if made.tokens < need.limit else None

    async def _folded(self, window: Window, need: Need) -> tuple[Fold, Json]:
        """And what it took to make it."""
        plan = planned(window.past.contents, self._room(window, need), self._tokens_of(window, need.scale))
        if not plan.lost:
            return plan.fold(plan.earlier), usage_of({})
        asking = _Asking(self.renderer, self.counter, window, self.settings.model)
        summariser = await asking.summariser(self.settings.prompt, need)
        return plan.fold(await summariser.summary(plan)), asking.usage

    def _room(self, window: Window, need: Need) -> Room:
        is_asked = need.cause in ("trigger", "route")
        if math.isinf(need.limit):
            tokens = need.tokens + self.settings.user_tokens + 8 * self.settings.summary_tokens
        else:
            standing = self.standing_tokens(window, need.scale)
            tokens = max(need.limit * self.settings.target - standing, need.limit * LEAST_PART)
        return room_for(tokens, self.settings, is_asked=is_asked)


def _ends_with_cut_call(history: list[Json]) -> bool:
    """A call that the limit of tokens cut was counted, and is not sent again."""
    newest = takewhile(lambda item: not is_from_user(item), reversed(history))
    return any(item.get("status") == "incomplete" and item_type(item) in CALL_ID_PREFIX for item in newest)


class Fit:
    """The window of one turn, made to fit before it is sent, or once more when the backend refuses it."""

    def __init__(self, fitter: Fitter, window: Window, body: Json, item_ids: Callable[[str], str]) -> None:
        self.body = body
        self.window = window
        self.need: Need | None = None
        self.is_mere = window.request.is_trigger
        self._fitter = fitter
        self._new_id = item_ids
        self._fitted: Fitted | None = None
        self._is_truncated = False

    async def look(self) -> None:
        """Decides; a window that is to be truncated is so at once. Raises: InvalidRequest."""
        self.need = await self._fitter.need(self.window, self.body)
        if self.need is None and (surplus := await self._fitter.surplus(self.window, self.body)):
            await self._truncate(surplus)

    @cached_property
    def item_id(self) -> str:
        """Of the compaction item."""
        return self._new_id("cmp")

    async def compact(self, need: Need) -> Fitted:
        """Raises: UpstreamError; the window is as before then."""
        fitted = self._fitted = await self._fitter.compacted(self.window, need, self.item_id)
        if not self.is_mere:
            await self._send(fitted.made.contents)
        return fitted

    @property
    def can_change(self) -> bool:
        """Whether a window that the backend refuses may be sent once more, in another form."""
        is_allowed = self._fitter.settings.on_overflow or self.window.request.truncation == "auto"
        return is_allowed and self._fitted is None

    async def change(self, refused: WindowExceeded) -> Fitted | None:
        """Compacts or truncates a window that was refused. Raises: WindowExceeded where that cannot help."""
        if not self.can_change:
            raise refused
        need = await self._fitter.overflow(self.window, refused)
        if self.window.request.truncation == "auto":
            await self._truncate(need)
            return None
        try:
            return await self.compact(need)
        except UpstreamError as error:
            raise WindowExceeded(f"{refused.message} {error.message}") from error

    async def _truncate(self, need: Need) -> None:
        self._is_truncated = True
        await self._send(self._fitter.truncated(self.window, need))

    async def _send(self, contents: Contents) -> None:
        past = msgspec.structs.replace(self.window.past, contents=contents, before=NO_WINDOW)
        self.window = msgspec.structs.replace(self.window, past=past)
        ready = await self._fitter.renderer.rendered(self.window.request, past.window, ())
        self.body = ready.rendered.body

    def window_tokens(self, counted: Json) -> int | None:
        """Of the window and the answer, where the usage of the response does not tell; 0: nobody knows."""
        if self._is_truncated:
            return 0
        if self._fitted is None:
            return None
        if self.is_mere:
            return int(self._fitted.made.tokens)
        return (counted.get("prompt_tokens") or 0) + (counted.get("completion_tokens") or 0)

    def learn(self, counted: Json) -> None:
        """From what the backend counted."""
        if not self.is_mere and (tokens := counted.get("prompt_tokens")):
            self._fitter.learn(self.window, tokens)


class _Asking:
    """Asks the model that writes summaries, and adds up what that takes."""

    def __init__(self, renderer: Renderer, counter: Counter, window: Window, model: str) -> None:
        self.usage = usage_of({})
        self._renderer = renderer
        self._counter = counter
        self._window = window
        self._model = model or window.request.model
        self._way = window.way

    async def summariser(self, prompt: str, need: Need) -> Summariser:
        self._way = await self._renderer.way(self._model)
        known = await self._way.upstream.window_tokens(self._way.model)
        same = self._way.name == self._window.way.name
        tokens = known or (need.limit if same and need.cause == "overflow" else math.inf)
        tokens_in = partial(self._tokens_in, scale=need.scale if same else 1.0)
        return Summariser(self._ask, tokens_in, prompt, tokens)

    def _tokens_in(self, text: str, scale: float) -> float:
        return scale * self._counter.tokens(self._way.name, Size(*self._counter.units(text)))

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
