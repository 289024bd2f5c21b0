"""Makes a window fit its model: has a model write the summary, and seals what takes its place.

May not know events, the HTTP framework or SQL.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import msgspec

from chat_stream import ChatStream
from chunks import joined_usage, usage_of
from compaction import CompactionSettings, Room, planned, room_for, truncated
from counting import Counter
from dispatch import Ready, Renderer, Way
from errors import InvalidRequest
from folding import COMPACTION, Contents, Fold, contents_of, is_standing
from needs import LEAST_PART, MOST_OUTPUT_PART, Need, Needs
from observing import Observer
from past import NO_WINDOW
from refusals import LATER
from request import TRIGGER, TurnRequest
from sealing import Seals
from stream_plan import StreamPlan
from streaming import ResponseStream
from summaries import FAILED, PROMPT, Answer, Question, Summariser, failed
from upstream_errors import UpstreamError, WindowExceeded
from verbs import ItemIds
from weighing import Balance, Prompt, Weigher

Json = dict[str, Any]
log = logging.getLogger("responses_proxy.fitting")

# What is sealed as the work that was done ahead of a turn.
AHEAD = "compaction ahead"


class Made(msgspec.Struct, frozen=True):
    """What takes the place of a window, what it took to make it, and its tokens."""

    fold: Fold
    usage: Json
    tokens: float


class FoldAhead(msgspec.Struct, frozen=True):
    """What was made ahead of a turn, and what a window with nothing else in it comes to."""

    fold: Fold
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
    observer: Observer
    clock: Callable[[], float]


class Fitter:
    """Has what takes the place of a window made, and seals it."""

    def __init__(self, means: FitMeans) -> None:
        self.settings = means.settings
        self.renderer = means.renderer
        self.weigher = Weigher(means.counter)
        self.needs = Needs(self.weigher, means.settings)
        self._seals = means.seals
        self._observer = means.observer
        self._metrics = means.observer.metrics
        self._clock = means.clock

    def truncated(self, prompt: Prompt, need: Need) -> Contents:
        """Without its oldest turns."""
        balance = self.weigher.balance(prompt, need.tokens)
        return truncated(prompt.past.contents, need.limit - balance.standing_tokens(), balance.item_tokens)

    async def compacted(self, prompt: Prompt, need: Need, item_id: str) -> Fitted:
        """Raises: UpstreamError; nothing is lost then."""
        made = self._from_ahead(prompt, need) or await self.made(prompt, need)
        return Fitted(self.sealed(prompt.caller.owner, item_id, made.fold), made)

    def sealed(self, owner: str, item_id: str, fold: Fold) -> Json:
        """The compaction item as clients see it."""
        blob = self._seals.seal(COMPACTION, owner, item_id, msgspec.json.encode(fold))
        return {"id": item_id, "type": COMPACTION, "encrypted_content": blob}

    async def made(self, prompt: Prompt, need: Need) -> Made:
        """What takes the place of a window. Raises: UpstreamError."""
        trace = prompt.caller.trace
        with self._observer.step("compact", trace, {"responses_proxy.compaction.cause": need.cause}) as step:
            caller = msgspec.structs.replace(prompt.caller, trace=step.trace)
            made = await self._made(msgspec.structs.replace(prompt, caller=caller), need)
            tokens = {"before_tokens": int(need.tokens), "after_tokens": int(made.tokens)}
            step.note({f"responses_proxy.compaction.{name}": number for name, number in tokens.items()})
            return made

    async def _made(self, prompt: Prompt, need: Need) -> Made:
        began_at = self._clock()
        balance = await asyncio.to_thread(self.weigher.balance, prompt, need.tokens)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                fold, usage = await self._folded(prompt, need, balance)
        except TimeoutError as error:
            self._metrics.compaction_failures.labels(need.cause).inc()
            raise failed(f"it took longer than {self.settings.timeout_s:g} s.") from error
        except UpstreamError as error:
            self._metrics.compaction_failures.labels(need.cause).inc()
            if error.http_status in LATER or error.error_code == FAILED:
                raise
            raise failed(error.message, error.logged) from error
        made = Made(fold, usage, balance.contents_tokens(contents_of(fold)))
        self._metrics.compacted(need.cause, need.tokens, made.tokens, self._clock() - began_at)
        numbers = (need.tokens, made.tokens, usage["total_tokens"])
        log.info("compacted (%s): %d tokens became %d; it took %d", need.cause, *numbers)
        return made

    def _from_ahead(self, prompt: Prompt, need: Need) -> Made | None:
        """What was made ahead of this turn, with what is new, when that is enough."""
        blob = prompt.past.before.ahead
        if blob is None or need.cause not in ("threshold", "overflow"):
            return None
        payload = self._seals.open(AHEAD, prompt.caller.owner, None, blob.decode())
        if payload is None:
            return None
        ahead, new = msgspec.json.decode(payload, type=FoldAhead), prompt.past.contents.new
        standing = [*ahead.fold.standing, *filter(is_standing, new)]
        late = [*ahead.fold.late, *(item for item in new if not is_standing(item))]
        fold = msgspec.structs.replace(ahead.fold, standing=standing, late=late)
        tokens = ahead.tokens + sum(self.weigher.item_tokens(prompt.way, item) for item in new)
        return Made(fold, usage_of({}), tokens) if tokens < need.limit else None

    async def _folded(self, prompt: Prompt, need: Need, balance: Balance) -> tuple[Fold, Json]:
        """And what it took to make it."""
        room = self._room(need, balance)
        plan = await asyncio.to_thread(planned, prompt.past.contents, room, balance.item_tokens)
        if not plan.lost:
            return plan.fold(plan.earlier), usage_of({})
        asking = _Asking(self.renderer, balance, prompt, self.settings.model)
        summariser = await asking.summariser(self.settings.prompt or PROMPT, need)
        return plan.fold(await summariser.summary(plan)), asking.usage

    def _room(self, need: Need, balance: Balance) -> Room:
        is_asked = need.cause in ("trigger", "route")
        if math.isinf(need.limit):
            tokens = need.tokens + self.settings.user_tokens + 8 * self.settings.summary_tokens
        else:
            room = need.limit * self.settings.target - balance.standing_tokens()
            tokens = max(room, need.limit * LEAST_PART)
        return room_for(tokens, self.settings, is_asked=is_asked)


class Fit:
    """The window of one turn, made to fit before it is sent, or once more when the backend refuses it."""

    def __init__(self, fitter: Fitter, prompt: Prompt, ready: Ready, item_ids: Callable[[str], str]) -> None:
        self.body = ready.rendered.body
        self.ignored = ready.ignored
        self.prompt = prompt
        self.is_mere = prompt.request.is_trigger
        self._fitter = fitter
        self._new_id = item_ids
        self._before_items = len(prompt.past.before.items)
        self._fitted: Fitted | None = None
        self._is_looked_at = False
        self._is_changed = False
        self._is_truncated = False

    async def look(self) -> Need | None:
        """Why it has to be compacted, told once; a window that is to be truncated is so at once.

        Raises: InvalidRequest.
        """
        if self._is_looked_at or not self._fitter.needs.concerns(self.prompt.request):
            return None
        self._is_looked_at = True
        need = await self._fitter.needs.need(self.prompt, self.body)
        if need is None and (surplus := await self._fitter.needs.surplus(self.prompt, self.body)):
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
            await self._send(contents_of(fitted.made.fold))
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
        need = await self._fitter.needs.overflow(self.prompt, refused)
        if self.prompt.request.truncation == "auto":
            await self._truncate(need)
            return None
        try:
            return await self.compact(need)
        except UpstreamError as error:
            both = WindowExceeded(f"{refused.message} {error.message}")
            both.log_message = f"{refused.logged} {error.logged}"
            raise both from error

    async def complete(self) -> Json:
        """The backend's whole answer. Raises: UpstreamError."""
        way, prompt = self._way, self.prompt
        return await way.upstream.complete(self.body, prompt.passed, way.terms(prompt.request))

    async def stream(self) -> ChatStream:
        """The backend's answer, once it has accepted the request. Raises: UpstreamError."""
        way, prompt = self._way, self.prompt
        return await way.upstream.stream(self.body, prompt.passed, way.terms(prompt.request))

    @property
    def _way(self) -> Way:
        return self.prompt.way

    async def go_on(self, error: UpstreamError) -> None:
        """To the next backend that may answer in the place of one that failed, for which the window is looked at anew.

        Raises: the error, where there is none.
        """
        request, past, renderer = self.prompt.request, self.prompt.past, self._fitter.renderer
        is_ready = False
        while not is_ready:
            way = await renderer.way_on(request.model, self._way, error)
            self.prompt = msgspec.structs.replace(self.prompt, way=way)
            try:
                ready = await renderer.rendered(request, past.window, past.left_out, way)
            except InvalidRequest as refused:
                log.warning("upstream '%s' cannot be asked: %s", way.upstream.settings.name, refused.logged)
            else:
                is_ready = True
        self.body, self.ignored = ready.rendered.body, ready.ignored
        self._is_looked_at = self._is_changed = False

    async def _truncate(self, need: Need) -> None:
        self._is_truncated = True
        await self._send(self._fitter.truncated(self.prompt, need))

    async def _send(self, contents: Contents) -> None:
        past = msgspec.structs.replace(self.prompt.past, contents=contents, before=NO_WINDOW)
        self.prompt = msgspec.structs.replace(self.prompt, past=past)
        ready = await self._fitter.renderer.rendered(self.prompt.request, past.window, (), self._way)
        self.body = ready.rendered.body

    def window_tokens(self, counted: Json) -> int | None:
        """Of the window and the answer, where the usage of the response does not tell; 0: nobody knows.

        What another backend than the model's own counted says nothing of the next turn.
        """
        if self._is_truncated or self._way.is_fallback:
            return 0
        if self.is_mere and self._fitted:
            return int(self._fitted.made.tokens)
        if self._fitted is None and counted.get("prompt_tokens"):
            return None
        return (counted.get("prompt_tokens") or 0) + (counted.get("completion_tokens") or 0)

    def window_items(self, output: list[Json]) -> int:
        """How many items are in the window that ends with this output, as the store will give it."""
        at = max((at for at, item in enumerate(output) if item["type"] == COMPACTION), default=None)
        own = sum(item.get("type") != TRIGGER for item in self.prompt.past.own)
        earlier = self._before_items + own if at is None else -at
        return earlier + len(output)

    def learn(self, counted: Json) -> None:
        """From what the backend counted."""
        if not self.is_mere and (tokens := counted.get("prompt_tokens")):
            self._fitter.weigher.learn(self.prompt, tokens)


class _Asking:
    """Asks the model that writes summaries, and adds up what that takes."""

    def __init__(self, renderer: Renderer, balance: Balance, prompt: Prompt, model: str) -> None:
        self.usage = usage_of({})
        self._renderer = renderer
        self._balance = balance
        self._prompt = prompt
        self._model = model or prompt.request.model
        self._way = prompt.way
        self._is_own = not model

    async def summariser(self, instructions: str, need: Need) -> Summariser:
        if not self._is_own:
            self._way = await self._renderer.way(self._model)
        known = await self._way.upstream.window_tokens(self._way.model)
        same = self._way.name == self._prompt.way.name
        tokens = known or (need.limit if same and need.cause == "overflow" else math.inf)
        return Summariser(self._ask, partial(self._balance.text_tokens, self._way), instructions, tokens)

    async def _ask(self, question: Question) -> Answer:
        """Raises: UpstreamError."""
        request = TurnRequest(
            model=self._model,
            instructions=question.instructions,
            input=question.text,
            max_output_tokens=question.answer_tokens,
        )
        completion = None
        while completion is None:
            try:
                completion = await self._completion(request)
            except UpstreamError as error:
                self._way = await self._renderer.way_on(self._model, self._way, error)
        plan = StreamPlan(silent=True, think=self._way.upstream.settings.think)
        machine = ResponseStream({}, plan, ItemIds("resp_0"), float)
        machine.feed(completion)
        machine.close()
        response = machine.snapshot()
        self.usage = joined_usage(self.usage, response["usage"])
        said = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
        return Answer("".join(part.get("text", "") for part in said), response["status"] == "incomplete")

    async def _completion(self, request: TurnRequest) -> Json:
        """Raises: UpstreamError."""
        way = self._way
        ready = await self._renderer.ready(request, request.items, (), way)
        passed = way.headers(self._prompt.caller, self._prompt.way.spoken_to)
        return await way.upstream.complete(ready.rendered.body, passed, way.terms(self._prompt.request))
