"""The routes about windows: how many tokens one holds, and what it is compacted to. Nothing of them is kept.

May not know the HTTP framework or SQL. Source: openai SDK 3.52, `responses.compact` and `responses.input_tokens.count`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from auth import Caller
from errors import InvalidRequest
from fitting import Fitter
from lists import listed_item
from needs import Need
from past import Past, Pasts
from records import identified
from request import TRIGGER, RequestLimits, TurnRequest, parse_body, parse_request
from sources import Sources
from verbs import ItemIds, still_running
from weighing import Prompt

Json = dict[str, Any]

COMPACT_FIELDS = frozenset({"model", "input", "previous_response_id"})
COUNTED_FIELDS = frozenset(
    {"model", "input", "previous_response_id", "conversation", "instructions", "tools", "tool_choice", "text"}
    | {"reasoning", "parallel_tool_calls", "truncation"}
)
# For a count without a model: the first backend's.
ANY_MODEL = "default"
WITH_IMAGES = frozenset({"message.input_image.image_url"})


class Told(NamedTuple):
    """An answer, and the names of what was left out of the request."""

    body: Json
    ignored: tuple[str, ...]


class Windows:
    """Answers for what a request would send."""

    def __init__(self, pasts: Pasts, fitter: Fitter, sources: Sources, limits: RequestLimits) -> None:
        self._pasts = pasts
        self._fitter = fitter
        self._sources = sources
        self._limits = limits

    async def input_tokens(self, caller: Caller, raw: bytes) -> Told:
        """POST /v1/responses/input_tokens. Raises: ProxyError."""
        given = {"model": ANY_MODEL, **_given(parse_body(raw, self._limits))}
        request = self._parsed(given, COUNTED_FIELDS, may_be_empty=True)
        past = await self._past(request, caller)
        ready = await self._fitter.renderer.ready(request, past.window, past.left_out)
        chat = ready.rendered.body
        prompt = Prompt(request, caller, past, ready.way)
        tokens = await self._fitter.weigher.counted(prompt, chat, 0.0) if chat["messages"] or chat.get("tools") else 0.0
        return Told({"object": "response.input_tokens", "input_tokens": round(tokens)}, ready.ignored)

    async def compact(self, caller: Caller, raw: bytes) -> Told:
        """POST /v1/responses/compact. Raises: ProxyError."""
        request = self._parsed(_given(parse_body(raw, self._limits)), COMPACT_FIELDS)
        self._fitter.renderer.refuse_ignored(request.unused)
        request = msgspec.structs.replace(request, input=[*request.items, {"type": TRIGGER}], store=False)
        past = await self._past(request, caller)
        if not past.window:
            raise InvalidRequest("Invalid 'input': there is nothing to compact.", param="input")
        prompt = Prompt(request, caller, past, await self._fitter.renderer.way(request.model))
        tokens = self._fitter.weigher.estimated(prompt)
        need = Need("route", await self._fitter.needs.limit(prompt), tokens)
        made = await self._fitter.made(prompt, need)
        response_id = self._sources.new_id("resp")
        new_id = ItemIds(response_id)
        users = [_user_message(item, new_id) for item in made.fold.users]
        rest = msgspec.structs.replace(made.fold, users=[], is_whole=False)
        item = self._fitter.sealed(caller.owner, new_id("cmp"), rest)
        told = {"id": response_id, "object": "response.compaction", "created_at": int(self._sources.clock())}
        return Told({**told, "output": [*users, item], "usage": made.usage}, request.unused + past.left_out)

    def _parsed(self, body: Json, fields: frozenset[str], *, may_be_empty: bool = False) -> TurnRequest:
        """What a route does not take is named in it. Raises: InvalidRequest."""
        taken = {name: value for name, value in body.items() if name in fields}
        request = parse_request(taken, self._limits, may_be_empty=may_be_empty)
        return msgspec.structs.replace(request, unused=(*request.unused, *sorted(body.keys() - fields)))

    async def _past(self, request: TurnRequest, caller: Caller) -> Past:
        """Raises: StillRunning for a parent that has not ended."""
        past, parent_has_ended = await self._pasts.seen(request, caller.owner)
        if not parent_has_ended:
            raise still_running(request.previous_response_id or "")
        return past


def _given(body: Json) -> Json:
    return {name: value for name, value in body.items() if value is not None}


def _user_message(item: Json, new_id: Callable[[str], str]) -> Json:
    """As the API shows it."""
    (message,) = identified([item], new_id)
    return listed_item({**message, "status": "completed"}, WITH_IMAGES)


Work = Callable[[Windows, Caller, bytes], Awaitable[Told]]
WINDOW_ROUTES: dict[tuple[str, str], Work] = {
    ("POST", "/responses/compact"): Windows.compact,
    ("POST", "/responses/input_tokens"): Windows.input_tokens,
}
# What works a backend's tokenizer at most.
LIGHT_WORK = frozenset({Windows.input_tokens})
