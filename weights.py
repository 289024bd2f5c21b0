"""What the parts of a size weigh for one model, as the counts of its backend taught: a ridge regression.

May not know items, nor how many models there are. What one process learned is a lesson: it can be put behind what
others have learned meanwhile, as if it had been taught after that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import orjson


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


class Lesson(NamedTuple):
    """What some counts taught: how many they were, what is left of what was known before, and what they add to it.

    `sums`: of the products of parts with each other, and with tokens.
    """

    seen: int = 0
    memory: float = 1.0
    sums: tuple[float, ...] = (0.0,) * (len(PRIOR) * (len(PRIOR) + 1))

    def then(self, later: Lesson) -> Lesson:
        sums = (later.memory * before + after for before, after in zip(self.sums, later.sums, strict=True))
        return Lesson(self.seen + later.seen, self.memory * later.memory, tuple(sums))


NOTHING_LEARNED = Lesson()


class Told(NamedTuple):
    """What everybody is told of a model, and what of that was known and what was news."""

    kept: bytes
    known: Lesson
    news: Lesson


class Weights:
    """What the parts of a size weigh for one model: by what all processes have learned, and this one since."""

    def __init__(self, known: Lesson = NOTHING_LEARNED) -> None:
        self.is_off = False
        self.news = NOTHING_LEARNED
        self._known = known
        # Solved when it is asked for: most turns only add to the sums.
        self._weights: list[float] = []

    @property
    def seen(self) -> int:
        return self._known.seen + self.news.seen

    def goes_on_from(self, known: Lesson) -> None:
        """What others have learned meanwhile comes before the news."""
        self._known = known
        self._weights = []

    def told(self) -> Told:
        """The news are none any more: everybody is told what is kept."""
        known, news = self._known, self.news
        self._known, self.news = known.then(news), NOTHING_LEARNED
        return Told(self.kept(), known, news)

    def take_back(self, told: Told) -> None:
        """It could not be told."""
        self._known, self.news = told.known, told.news.then(self.news)

    def tokens(self, size: Size) -> float:
        self._weights = self._weights or self._solved()
        return max(0.0, sum(part * weight for part, weight in zip(size, self._weights, strict=True)))

    def learn(self, size: Size, tokens: float) -> None:
        """One count of the backend; earlier ones fade, and fast when they did not foretell it."""
        scale = max(abs(tokens), SMALLEST_TOKENS)
        self.is_off = bool(self._weights) and abs(self.tokens(size) - tokens) > FAR_OFF * scale
        memory = SHORT_MEMORY if self.is_off else MEMORY
        row = [part / scale for part in (*size, tokens)]
        self.news = self.news.then(Lesson(1, memory, tuple(row[i] * value for i in PARTS for value in row)))
        self._weights = []

    def kept(self) -> bytes:
        whole = self._known.then(self.news)
        return orjson.dumps([whole.seen, whole.sums])

    def _solved(self) -> list[float]:
        """The weights that fit best, drawn to the prior where little is known. Gauss-Jordan: the matrix is definite."""
        width = len(PRIOR) + 1
        sums = self._known.then(self.news).sums
        rows = [list(sums[i * width : (i + 1) * width]) for i in PARTS]
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


def restored(kept: bytes) -> Lesson:
    """What `kept` gave; of another version, whose sizes have other parts, nothing."""
    seen, sums = orjson.loads(kept)
    return Lesson(seen, 0.0, tuple(sums)) if len(sums) == len(NOTHING_LEARNED.sums) else NOTHING_LEARNED
