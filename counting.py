"""How many tokens items come to for a model: their size, and what the backend's own counts taught of its weight.

May not do I/O. A size is what can be counted of items. Its weight differs from model to model: the tokens of a text, of
an entry of the chat template, of an image. A ridge regression learns it from the `usage` of earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import orjson

from items import ITEMS, is_from_user, item_type
from records import OUTPUT_ID_PREFIX
from weights import Size, Told, Weights, restored, total

Json = dict[str, Any]
# What a text comes to: tokens, about, and bytes that make more of them than others do.
Units = Callable[[str], tuple[float, float]]

BYTES_PER_TOKEN = 5
# Prose in most vocabularies. Capitals, digits, signs and other scripts have more tokens to a byte.
PLAIN = b"abcdefghijklmnopqrstuvwxyz \n\t"
BASE64_BYTES = 3 / 4


def by_bytes(text: str) -> tuple[float, float]:
    raw = text.encode(errors="surrogatepass")
    return len(raw) / BYTES_PER_TOKEN, len(raw.translate(None, PLAIN))


# A longer text is counted by parts of it: its tokens are spread evenly enough.
SAMPLED_CHARS, SAMPLE_CHARS = 30_000, 10_000
MOST_KNOWN = 20_000


def by_vocabulary(tokens_in: Callable[[str], int]) -> Units:
    """Remembers what it has counted, by the hash of the text: windows grow by little from turn to turn."""
    known: dict[tuple[int, int], float] = {}

    def units(text: str) -> tuple[float, float]:
        key = hash(text), len(text)
        found = known.get(key)
        if found is None:
            found = _sampled(text, tokens_in)
            if len(known) >= MOST_KNOWN:
                known.clear()
            known[key] = found
        return found, 0.0

    return units


def _sampled(text: str, tokens_in: Callable[[str], int]) -> float:
    if len(text) <= SAMPLED_CHARS:
        return float(tokens_in(text))
    middle = (len(text) - SAMPLE_CHARS) // 2
    samples = (text[:SAMPLE_CHARS], text[middle : middle + SAMPLE_CHARS], text[-SAMPLE_CHARS:])
    return sum(map(tokens_in, samples)) * len(text) / (3 * SAMPLE_CHARS)


# -- sizes -------------------------------------------------------------------------------------------------------------

# What of an item never reaches the model.
UNSENT = frozenset(
    {"id", "type", "role", "status", "call_id", "annotations", "logprobs", "encrypted_content", "detail"}
)
# What weighs as an image does, whatever its length.
PICTURED = frozenset({"image_url", "input_audio", "file_url"})


def size_of(item: Json, units: Units) -> Size:
    """Of one item, reasoning aside."""
    kind = item_type(item)
    if kind == "reasoning" or (kind in ITEMS and ITEMS[kind].left_out):
        return Size()
    return _size(item, units)._replace(entries=1, outputs=kind in OUTPUT_ID_PREFIX)


def thought_size(item: Json, units: Units) -> Size:
    """Of the text of a reasoning item, which stands in its content or its summary; of no other item."""
    if item_type(item) != "reasoning":
        return Size()
    return _size(item.get("content") or item.get("summary"), units)


def _size(value: Any, units: Units) -> Size:
    """Of all texts and images in a value."""
    texts: list[str] = []
    images, data_chars = _gathered(value, texts)
    text, odd = units("".join(texts))
    return Size(text + data_chars * BASE64_BYTES / BYTES_PER_TOKEN, odd, images=images)


def _gathered(value: Any, texts: list[str]) -> tuple[int, int]:
    """Adds the texts of a value; how many images there are, and characters of files."""
    if isinstance(value, str):
        texts.append(value)
        return 0, 0
    images = data_chars = 0
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if key in PICTURED and each:
            images += 1
        elif key == "file_data" and isinstance(each, str):
            data_chars += len(each)
        elif key not in UNSENT:
            more = _gathered(each, texts)
            images, data_chars = images + more[0], data_chars + more[1]
    return images, data_chars


def standing_size(said: Json, units: Units) -> Size:
    """Of what stands before the items: instructions, tools and format, as a response repeats them."""
    instructions, tools = said.get("instructions") or "", said.get("tools") or []
    schema = ((said.get("text") or {}).get("format") or {}).get("schema")
    texts = (instructions, "".join(orjson.dumps(each).decode() for each in (*tools, schema) if each))
    whole = Size(whole=1, instructed=bool(instructions), tools=bool(tools))
    return total([whole, *(Size(*units(text)) for text in texts)])


def window_size(items: list[Json], units: Units, is_thought_sent: bool) -> Size:
    """Of a whole window."""
    size = total(size_of(item, units) for item in items)
    if not is_thought_sent:
        return size
    last = max((index for index, item in enumerate(items) if is_from_user(item)), default=0)
    early, late = (total(thought_size(item, units) for item in part) for part in (items[:last], items[last:]))
    return total([size, early, late, Size(thought=early.text)])


def added_size(items: list[Json], start: int, units: Units, is_thought_sent: bool) -> Size:
    """Of what comes to a window that the backend has counted up to `start`, the answer before it included.

    What the model thought for that answer was counted too, and may not be in the window any more.
    """
    new = total([Size(entries=1), *(size_of(item, units) for item in items[start:])])
    thought = _last_thought(items[:start], units)
    if not is_thought_sent:
        return new._replace(text=new.text - thought.text, odd=new.odd - thought.odd)
    is_over = any(map(is_from_user, items[start:]))
    return new._replace(thought=thought.text) if is_over else new


def _last_thought(items: list[Json], units: Units) -> Size:
    """Since the last user message."""
    since = takewhile(lambda item: not is_from_user(item), reversed(items))
    return total(thought_size(item, units) for item in since)


# -- all models --------------------------------------------------------------------------------------------------------

# A model whose backend has counted so often is known well enough.
KNOWN_AFTER = 3
# Clients name models as they like.
MOST_MODELS = 1000
# Of a model that is known, every so manieth count is learned from; a prime, because models may take turns.
LEARNED_ALWAYS, LEARNED_EVERY = 32, 61


class Counter:
    """The weights of all models, by name."""

    def __init__(self, units: Units = by_bytes, unit: str = "bytes") -> None:
        self.units = units
        self._unit = unit
        self._weights: dict[str, Weights] = {}
        self._unknown = Weights()
        self._offered = 0
        self._changed: set[str] = set()
        # What was read of the store, or written there.
        self._kept: dict[str, bytes] = {}

    def tokens(self, model: str, size: Size) -> float:
        return self._of(model).tokens(size)

    def knows(self, model: str) -> bool:
        return self._of(model).seen >= KNOWN_AFTER

    def wants(self, model: str) -> bool:
        """Whether a count of this model is worth the work of learning from it."""
        self._offered += 1
        weights = self._of(model)
        return self._offered % LEARNED_EVERY == 0 or weights.is_off or weights.seen < LEARNED_ALWAYS

    def learn(self, model: str, size: Size, tokens: float) -> None:
        name = self._name(model)
        if name not in self._weights and len(self._weights) < MOST_MODELS:
            self._weights[name] = Weights()
        if name in self._weights:
            self._weights[name].learn(size, tokens)
            self._changed.add(name)

    def remember(self, facts: dict[str, bytes]) -> None:
        """What all processes have told; what this one has learned since is put behind it."""
        for name, kept in facts.items():
            if self._kept.get(name) != kept and (name in self._weights or len(self._weights) < MOST_MODELS):
                self._weights.setdefault(name, Weights()).goes_on_from(restored(kept))
                self._kept[name] = kept

    @property
    def has_news(self) -> bool:
        """Whether anything was learned that was not told."""
        return bool(self._changed)

    def tell(self) -> dict[str, Told]:
        """What has news; `take_back` it when nobody could be told."""
        names, self._changed = self._changed, set()
        told = {name: self._weights[name].told() for name in names}
        self._kept |= {name: each.kept for name, each in told.items()}
        return told

    def take_back(self, told: dict[str, Told]) -> None:
        for name, each in told.items():
            self._weights[name].take_back(each)
            self._kept.pop(name, None)
        self._changed |= told.keys()

    def _of(self, model: str) -> Weights:
        return self._weights.get(self._name(model), self._unknown)

    def _name(self, model: str) -> str:
        return f"{self._unit} {model}"
