"""Which backend serves a model, and which ones may answer in its place.

May not know what a request says. Routes are told by the settings, and by the backends' own lists of models.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from fnmatch import translate

from circuits import is_failure
from metrics import Metrics
from observing import Observer
from upstream import Upstream, UpstreamSettings, new_session
from upstream_errors import UpstreamError

log = logging.getLogger("responses_proxy.routing")

WILDCARDS = re.compile(r"\[[^]]*\]|[*?]")
TOO_MANY = 429
# Of a fallback: it was not set up for the model, or not for us. That says nothing of the request.
NOT_SET_UP = frozenset({401, 403, 404})


class Routes:
    """The settings as they are asked: by name at once, then by glob, of which the one that names most comes first.

    Of two of the same kind the earlier backend's counts.
    """

    def __init__(self, upstreams: tuple[Upstream, ...]) -> None:
        self._by_name: dict[str, tuple[Upstream, str]] = {}
        named = [(upstream, model) for upstream in upstreams for model in upstream.settings.models]
        for upstream in upstreams:
            for alias, model in upstream.settings.aliases.items():
                self._by_name.setdefault(alias, (upstream, model))
        for upstream, model in named:
            if not WILDCARDS.search(model):
                self._by_name.setdefault(model, (upstream, model))
        globs = [(glob, upstream) for upstream, glob in named if WILDCARDS.search(glob)]
        globs.sort(key=lambda row: -len(WILDCARDS.sub("", row[0])))
        self._globs = tuple((re.compile(translate(glob)), upstream) for glob, upstream in globs)

    def get(self, model: str) -> tuple[Upstream, str] | None:
        if found := self._by_name.get(model):
            return found
        return next(((upstream, model) for glob, upstream in self._globs if glob.match(model)), None)


class Upstreams:
    """The backends in the order of the settings, and the one connection pool they share. `close` them.

    `observer` is told of every failure of theirs, and of every request that goes on with another one.
    """

    def __init__(self, settings: tuple[UpstreamSettings, ...], observer: Observer | None = None) -> None:
        """Raises: KeyError for a fallback that is none of them."""
        self._observer = observer or Observer(Metrics())
        self._session = new_session()
        self._all = tuple(Upstream(each, self._session, self._observer) for each in settings)
        self._routes = Routes(self._all)
        by_name = {upstream.settings.name: upstream for upstream in self._all}
        # Where there is nothing to choose, nothing is looked up.
        is_alone = len(self._all) == 1 and not self._all[0].settings.aliases
        self.only = self._all[0] if is_alone else None
        self._fallbacks = {each: tuple(by_name[name] for name in each.settings.fallback) for each in self._all}

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._all)

    def route(self, model: str) -> tuple[Upstream, str]:
        """The backend for a model, and the model's name there: by alias, name, glob, or the backends' own lists.

        What none of them names goes to the first backend.
        """
        if found := self._routes.get(model):
            return found
        return next((each for each in self._all if each.lists(model)), self._all[0]), model

    def names(self, model: str) -> bool:
        """Whether the settings tell where it goes: with one backend they always do."""
        return len(self._all) == 1 or self._routes.get(model) is not None

    def spoken_to(self, model: str) -> Upstream:
        """The only backend that a client's own key may go to: by the settings, for a list could draw keys to itself."""
        return (self._routes.get(model) or self._all)[0]

    async def known(self, model: str) -> None:
        """Has the lists looked at again, which count for what is not named; one in none waits for it, but not long."""
        for upstream in self._all:
            upstream.look_again()
        if not any(each.lists(model) for each in self._all):
            await self._looked()

    async def _looked(self) -> None:
        for upstream in self._all:
            await upstream.looked()

    def fallbacks(self, upstream: Upstream) -> tuple[Upstream, ...]:
        """The backends that may answer in its place, best first; theirs are not asked in turn."""
        return self._fallbacks[upstream]

    def falls_back(self, upstream: Upstream, to: Upstream, error: UpstreamError) -> None:
        """Notes that a request goes on with another backend: all of them pass here."""
        names = (upstream.settings.name, to.settings.name)
        log.warning("upstream '%s' has failed, '%s' is asked in its place: %s", *names, error.logged)
        self._observer.fell_back(*names, error)

    async def look(self) -> None:
        """Looks at every backend, so that the first request need not."""
        if len(self._all) > 1:
            for upstream in self._all:
                upstream.look_again()
        await asyncio.gather(*(upstream.dialect() for upstream in self._all))

    async def close(self) -> None:
        await asyncio.gather(*(upstream.close() for upstream in self._all))
        await self._session.close()


def may_go_on(error: UpstreamError, *, at_fallback: bool) -> bool:
    """Whether another backend may do better: not so where the request itself is at fault."""
    return is_failure(error) or error.http_status == TOO_MANY or (at_fallback and error.http_status in NOT_SET_UP)
