"""How many tokens items come to for a model: their size, and what the backend's own counts taught of its weight.

May not do I/O. A size is what can be counted of items. Its weight differs from model to model: the tokens of a text, of
an entry of the chat template, of an image. A ridge regression learns it from the `usage` of earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any, NamedTuple

import orjson

from items import ITEMS, is_from_user, item_type
from records import OUTPUT_ID_PREFIX

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


class Size(NamedTuple):
    """What can be counted of items.

    text and odd: as `Units` gives them; entries: of the chat template; outputs: those of tools among them; images: how
    many; thought: units of reasoning before the last user message, which many templates leave out; whole, instructed,
    tools: 1 for a prompt from its beginning, with instructions, with tools.
    """

    text: float = 0.0
    odd: float = 0.0
    entries: float = 0.0
    outputs: float = 0.0
    images: float = 0.0
    thought: float = 0.0
    whole: float = 0.0
    instructed: float = 0.0
    tools: float = 0.0


def total(sizes: Iterable[Size]) -> Size:
    return Size(*map(sum, zip(Size(), *sizes, strict=True)))


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


# -- weights -----------------------------------------------------------------------------------------------------------

# Tokens for each part of a size before anything is known of a model, and how far they may be from it.
PRIOR = Size(1.0, 0.25, 4.0, 4.0, 800.0, 0.0, 4.0, 0.0, 40.0)
SPREAD = Size(0.5, 0.25, 4.0, 15.0, 600.0, 0.5, 30.0, 15.0, 60.0)
LOWEST = Size(0.1, 0.0, 0.0, 0.0, 0.0, -2.0, 0.0, -500.0, 0.0)
HIGHEST = Size(10.0, 3.0, 50.0, 100.0, 20_000.0, 0.0, 5000.0, 500.0, 5000.0)
# How far a backend's count is from what the size tells, relative to it.
NOISE = 0.02
MEMORY = 0.98
# From that error on another model may stand behind the name.
FAR_OFF, SHORT_MEMORY = 0.15, 0.8
# Smaller counts are not to weigh more than this.
SMALLEST_TOKENS = 16
RIDGE = tuple((NOISE / spread) ** 2 for spread in SPREAD)
PARTS = range(len(PRIOR))


class Weights:
    """What the parts of a size weigh for one model."""

    def __init__(self, seen: int = 0, sums: list[float] | None = None) -> None:
        """`sums`: of the products of parts with each other, and with tokens, as `kept` gives them."""
        self.seen = seen
        self.is_off = False
        self._sums = sums or [0.0] * (len(PRIOR) * (len(PRIOR) + 1))
        # Solved when it is asked for: most turns only add to the sums.
        self._weights: list[float] = []

    def tokens(self, size: Size) -> float:
        self._weights = self._weights or self._solved()
        return max(0.0, sum(part * weight for part, weight in zip(size, self._weights, strict=True)))

    def learn(self, size: Size, tokens: float) -> None:
        """One count of the backend; earlier ones fade, and fast when they did not foretell it."""
        scale = max(abs(tokens), SMALLEST_TOKENS)
        self.is_off = bool(self._weights) and abs(self.tokens(size) - tokens) > FAR_OFF * scale
        memory = SHORT_MEMORY if self.is_off else MEMORY
        row = [part / scale for part in (*size, tokens)]
        products = (row[i] * value for i in PARTS for value in row)
        self._sums = [memory * kept + product for kept, product in zip(self._sums, products, strict=True)]
        self._weights = []
        self.seen += 1

    def kept(self) -> bytes:
        return orjson.dumps([self.seen, self._sums])

    def _solved(self) -> list[float]:
        """The weights that fit best, drawn to the prior where little is known. Gauss-Jordan: the matrix is definite."""
        width = len(PRIOR) + 1
        rows = [self._sums[i * width : (i + 1) * width] for i in PARTS]
        for i in PARTS:
            rows[i][i] += RIDGE[i]
            rows[i][-1] += RIDGE[i] * PRIOR[i]
        for i in PARTS:
            pivot = max(rows[i][i], RIDGE[i])  # no less, but for rounding
            rows[i] = [value / pivot for value in rows[i]]
            for j in PARTS:
                if j != i:
                    rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
        return [min(max(row[-1], low), high) for row, low, high in zip(rows, LOWEST, HIGHEST, strict=True)]


def restored_weights(kept: bytes) -> Weights:
    """What `kept` gave; of another version, whose sizes have other parts, nothing."""
    seen, sums = orjson.loads(kept)
    return Weights(seen, sums) if len(sums) == len(PRIOR) * (len(PRIOR) + 1) else Weights()


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
        """What `changed` gave at some time."""
        self._weights |= {name: restored_weights(kept) for name, kept in facts.items()}

    def changed(self) -> dict[str, bytes]:
        """What was learned since this was last asked, as it is kept."""
        names, self._changed = self._changed, set()
        return {name: self._weights[name].kept() for name in names}

    def _of(self, model: str) -> Weights:
        return self._weights.get(self._name(model), self._unknown)

    def _name(self, model: str) -> str:
        return f"{self._unit} {model}"
