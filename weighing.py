"""What the window of a request weighs: as the backend counts it, or as it was learned from earlier counts.

May not know events, the store or compaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from operator import sub
from typing import Any, NamedTuple

import msgspec
import orjson

from auth import Caller
from counting import Counter, added_size, size_of, standing_size, thought_size, window_size
from dispatch import Way
from folding import Contents, laid_out
from items import is_from_user, item_type
from past import Past
from records import counted_tokens
from request import TurnRequest, echo
from tools import CALL_ID_PREFIX
from weights import Size, total

Json = dict[str, Any]

# Part of a limit from which on the backend's own tokenizer is asked, where there is one; of a model not known yet.
ASK_FROM, ASK_UNKNOWN_FROM = 0.75, 0.3
# To count more than that takes longer than it teaches.
MOST_LEARNED_TOKENS = 32_000
# How far a count may be from what was estimated.
LEAST_SCALE, MOST_SCALE = 0.25, 8.0


class Prompt(msgspec.Struct, frozen=True):
    """A request with what it continues, on its way to a model."""

    request: TurnRequest
    caller: Caller
    past: Past
    way: Way

    @property
    def passed(self) -> Mapping[str, str]:
        """What of the caller's goes to the backend."""
        return self.way.headers(self.caller, self.way.spoken_to)


class Base(NamedTuple):
    """What the backend counted of a window with the answer to it, and the settings of that response."""

    tokens: float
    said: Json


class Weigher:
    """Counts windows, exactly where it matters and the backend can."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    def base(self, prompt: Prompt) -> Base | None:
        """What the backend counted of all that the request continues; None where that tells nothing of this window.

        That was the backend that the model belongs to: others count otherwise, and theirs is not kept.
        """
        if prompt.way.is_fallback:
            return None
        before = prompt.past.before
        tokens = counted_tokens(before.body, len(before.items))
        if not tokens or _ends_with_cut_call(prompt.past.contents.history):
            return None
        said = orjson.loads(before.settings)
        return Base(tokens, said) if said.get("model") == prompt.request.model else None

    def sized(self, prompt: Prompt, base: Base | None) -> Size:
        """Of what is not in the base."""
        if base is None:
            return self.whole_size(prompt, prompt.past.contents)
        contents, units = prompt.past.contents, self._counter.units
        sends = prompt.way.dialect.reasoning_field is not None
        added = added_size([*contents.history, *contents.new], len(contents.history), units, sends)
        standing = standing_size(echo(prompt.request), units)
        return total([added, Size(*map(sub, standing, standing_size(base.said, units)))])

    def whole_size(self, prompt: Prompt, contents: Contents) -> Size:
        sends, units = prompt.way.dialect.reasoning_field is not None, self._counter.units
        return total([standing_size(echo(prompt.request), units), window_size(laid_out(contents), units, sends)])

    def estimated(self, prompt: Prompt) -> float:
        base = self.base(prompt)
        return (base.tokens if base else 0.0) + self._counter.tokens(prompt.way.name, self.sized(prompt, base))

    async def counted(self, prompt: Prompt, body: Json, near: float) -> float:
        """The tokens of a window: exact where the backend can count, when they are near the limit that matters."""
        estimate = self.estimated(prompt)
        if estimate < near * (ASK_FROM if self._counter.knows(prompt.way.name) else ASK_UNKNOWN_FROM):
            return estimate
        exact = await prompt.way.upstream.count_tokens(body, prompt.passed)
        return estimate if exact is None else float(exact)

    def learn(self, prompt: Prompt, tokens: float) -> None:
        """`tokens`: what the backend counted of the prompt."""
        if not self._counter.wants(prompt.way.name):
            return
        base = self.base(prompt)
        new = tokens - (base.tokens if base else 0.0)
        if new > MOST_LEARNED_TOKENS:
            return
        if base is None or new > 0:
            self._counter.learn(prompt.way.name, self.sized(prompt, base), new)

    def balance(self, prompt: Prompt, tokens: float) -> Balance:
        """For the parts of a window that came to so many tokens."""
        whole = self._counter.tokens(prompt.way.name, self.whole_size(prompt, prompt.past.contents))
        return Balance(self, prompt, min(max(tokens / max(whole, 1.0), LEAST_SCALE), MOST_SCALE))

    def standing_tokens(self, prompt: Prompt) -> float:
        """Of what stands before the items, as estimated."""
        return self._counter.tokens(prompt.way.name, standing_size(echo(prompt.request), self._counter.units))

    def contents_tokens(self, prompt: Prompt, contents: Contents) -> float:
        """Of other contents in the place of the window's, as estimated."""
        return self._counter.tokens(prompt.way.name, self.whole_size(prompt, contents))

    def item_tokens(self, way: Way, item: Json) -> float:
        units = self._counter.units
        return self._counter.tokens(way.name, total([size_of(item, units), thought_size(item, units)]))

    def text_tokens(self, way: Way, text: str) -> float:
        return self._counter.tokens(way.name, Size(*self._counter.units(text)))


class Balance:
    """Estimates of the parts of one window, set right by what the whole came to."""

    def __init__(self, weigher: Weigher, prompt: Prompt, scale: float) -> None:
        self.scale = scale
        self._weigher = weigher
        self._prompt = prompt
        # An item is kept as long as its count, so that its id stays its own.
        self._known: dict[int, tuple[Json, float]] = {}

    def standing_tokens(self) -> float:
        return self.scale * self._weigher.standing_tokens(self._prompt)

    def contents_tokens(self, contents: Contents) -> float:
        return self.scale * self._weigher.contents_tokens(self._prompt, contents)

    def item_tokens(self, item: Json) -> float:
        """Counted once for each item."""
        if id(item) not in self._known:
            self._known[id(item)] = item, self.scale * self._weigher.item_tokens(self._prompt.way, item)
        return self._known[id(item)][1]

    def text_tokens(self, way: Way, text: str) -> float:
        """For the model of the window, or for another one, of which nothing is known."""
        scale = self.scale if way.name == self._prompt.way.name else 1.0
        return scale * self._weigher.text_tokens(way, text)


def _ends_with_cut_call(history: list[Json]) -> bool:
    """A call that the limit of tokens cut was counted, and is not sent again."""
    newest = takewhile(lambda item: not is_from_user(item), reversed(history))
    return any(item.get("status") == "incomplete" and item_type(item) in CALL_ID_PREFIX for item in newest)
