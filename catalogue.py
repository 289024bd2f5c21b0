"""The models of all backends as one list, asked for in parallel.

May not know routes, nor what an entry says beyond its name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from auth import Caller
from errors import NotFound
from routing import Upstreams
from upstream import Upstream
from upstream_errors import UpstreamError

Json = dict[str, Any]
log = logging.getLogger("responses_proxy.catalogue")

# How long what the backends told is told again: a client that lists models asks more than once.
KEPT_S = 5.0


class Told(NamedTuple):
    """The entries by name, and who could not be asked."""

    entries: dict[str, Json]
    failures: list[tuple[Upstream, UpstreamError]]


class Catalogue:
    """Asks the backends; what a client's own key was told is told to nobody else."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams
        self._asking: asyncio.Task[Told] | None = None
        self._told_at = 0.0

    async def listed(self, caller: Caller) -> Json:
        """The answer to GET /v1/models. Raises: UpstreamError when no backend could be asked."""
        told = await self._told(caller)
        if len(told.failures) == len(list(self._upstreams)):
            raise failure_of_all(told.failures)
        return {"object": "list", "data": list(told.entries.values())}

    async def entry(self, caller: Caller, model: str) -> Json:
        """One of them. Raises: NotFound, UpstreamError when the backend that would know it could not be asked."""
        told = await self._told(caller)
        if model in told.entries:
            return told.entries[model]
        serving, _ = self._upstreams.route(model)
        for upstream, error in told.failures:
            if upstream is serving:
                raise error
        raise NotFound(f"The model '{model}' does not exist.", param="model", code="model_not_found")

    async def _told(self, caller: Caller) -> Told:
        if caller.bearer is not None:
            return await self._ask(caller)
        time_of = asyncio.get_running_loop().time
        if self._asking is None or (self._asking.done() and time_of() - self._told_at >= KEPT_S):
            self._asking = asyncio.create_task(self._ask(Caller("")))
        await asyncio.wait({self._asking})
        return self._asking.result()

    async def _ask(self, caller: Caller) -> Told:
        upstreams = list(self._upstreams)
        # A client's own key is for the backend that it speaks to; the others have one of the settings, or none.
        passed = [caller.passed, *[caller.trace] * (len(upstreams) - 1)]
        answers = await asyncio.gather(*map(asked, upstreams, passed))
        entries: dict[str, Json] = {}
        failures = []
        for upstream, answer in zip(upstreams, answers, strict=True):
            if isinstance(answer, UpstreamError):
                failures.append((upstream, answer))
            else:
                entries |= self._served(upstream, answer)
        self._told_at = asyncio.get_running_loop().time()
        return Told(entries, failures)

    def _served(self, upstream: Upstream, answer: list[Json]) -> dict[str, Json]:
        """What a request for that name would reach there, and the names that clients have for it."""
        by_name = {entry["id"]: entry for entry in reversed(answer) if isinstance(entry.get("id"), str)}
        entries = {
            name: entry for name, entry in reversed(by_name.items()) if self._upstreams.route(name) == (upstream, name)
        }
        for alias, name in upstream.settings.aliases.items():
            if alias not in entries and self._upstreams.route(alias)[0] is upstream:
                entries[alias] = alias_entry(alias, by_name.get(name, {}), upstream.settings.name)
        return entries

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})


async def asked(upstream: Upstream, passed: Mapping[str, str]) -> list[Json] | UpstreamError:
    """The entries of one backend, or why there are none."""
    try:
        return await upstream.models(passed)
    except UpstreamError as error:
        log.warning("the models of upstream '%s' are not listed: %s", upstream.settings.name, error.logged)
        return error


def alias_entry(alias: str, target: Json, owner: str) -> Json:
    created, owned_by = target.get("created", 0), target.get("owned_by", owner)
    return {"id": alias, "object": "model", "created": created, "owned_by": owned_by}


def failure_of_all(failures: list[tuple[Upstream, UpstreamError]]) -> UpstreamError:
    """What all say, as when a client's key is no good anywhere; else that nobody could be asked."""
    errors = [error for _, error in failures]
    if len({error.http_status for error in errors}) == 1:
        return errors[0]
    names = ", ".join(f"'{upstream.settings.name}'" for upstream, _ in failures)
    return UpstreamError(f"None of the upstreams {names} told its models.")
