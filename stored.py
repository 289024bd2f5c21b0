"""Stored responses and conversations: what the retrieve, list, change and delete routes answer.

May not know the HTTP framework or SQL. Every method takes a Visit and gives the JSON of a 200, or events.
Source: OpenAI openapi.json f85dbe2 and the resources of the openai SDK 3.52, read 2026-11-20.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson

from background import Background
from errors import ConversationLocked, InvalidRequest, NotFound
from event_log import Follower
from history import check_ids, refuse_repeated
from leases import ASK_AGAIN_S
from lists import conversation_object, item_list, list_object, listed_item, shown
from records import identified, new_items, restored
from request import INCLUDABLE, TRIGGER, RequestLimits, check_metadata, invalid, parse_body
from sources import Sources
from translation import check_items
from verbs import Conversation, KeptResponse, Page, Store, clipped, no_conversation, no_response

Json = dict[str, Any]
T = TypeVar("T")
ITEMS_AT_ONCE = 20


class Visit(msgspec.Struct, frozen=True):
    """One call of a route: who, the ids in the path, the query as it stands, and the body."""

    owner: str
    ids: Mapping[str, str]
    query: list[tuple[str, str]]
    body: bytes


class ItemQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include: list[INCLUDABLE] = []


class RetrieveQuery(ItemQuery, frozen=True):
    stream: bool = False
    starting_after: int | None = None
    include_obfuscation: bool | None = None


class ListQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    before: str | None = None

    @property
    def page(self) -> Page:
        return Page(self.limit, self.order, self.after, self.before)


class ItemsQuery(ListQuery, frozen=True):
    include: list[INCLUDABLE] = []


class ResponsesQuery(ListQuery, frozen=True):
    model: str | None = None


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class NewConversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    items: Annotated[list[Json], msgspec.Meta(max_length=ITEMS_AT_ONCE)] | None = None
    metadata: dict[str, str] | None = None


class ChangedConversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    metadata: dict[str, str] | None


class AddedItems(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    items: Annotated[list[Json], msgspec.Meta(min_length=1, max_length=ITEMS_AT_ONCE)]


class Stored:
    """The routes on stored objects."""

    def __init__(
        self,
        store: Store,
        background: Background,
        sources: Sources,
        limits: RequestLimits,
        conversation_wait_s: float,
    ) -> None:
        self._store = store
        self._background = background
        self._pasts = background.pasts
        self._sources = sources
        self._limits = limits
        self._conversation_wait_s = conversation_wait_s

    # -- responses -----------------------------------------------------------------------------------------------------

    async def response(self, visit: Visit) -> Json | Follower:
        query = _query(visit, RetrieveQuery)
        if query.stream:
            after = -1 if query.starting_after is None else query.starting_after
            return await self._background.logs.follower(visit.owner, visit.ids["id"], after)
        if query.starting_after is not None:
            raise InvalidRequest("'starting_after' is only allowed with 'stream=true'.", param="starting_after")
        kept = await self._store.response(visit.owner, visit.ids["id"])
        if kept is None:
            raise no_response(visit.ids["id"])
        return _shown_response(kept, query.include)

    async def responses(self, visit: Visit) -> Json:
        query = _query(visit, ResponsesQuery)
        listed = await self._store.responses(visit.owner, query.page, query.model)
        return list_object([_shown_response(kept, ()) for kept in listed.rows], listed.has_more)

    async def delete_response(self, visit: Visit) -> Json:
        _query(visit, NoQuery)
        response_id = visit.ids["id"]
        await self._background.delete(visit.owner, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, visit: Visit) -> Json:
        _query(visit, NoQuery)
        return _shown_response(await self._background.cancel(visit.owner, visit.ids["id"]), ())

    async def input_items(self, visit: Visit) -> Json:
        query = _query(visit, ItemsQuery)
        listed = await self._store.input_items(visit.owner, visit.ids["id"], query.page)
        if listed is None:
            raise no_response(visit.ids["id"])
        return item_list(listed, query.include)

    # -- conversations -------------------------------------------------------------------------------------------------

    async def create_conversation(self, visit: Visit) -> Json:
        _query(visit, NoQuery)
        given = self._body(visit, NewConversation)
        conversation = Conversation(
            self._sources.new_id("conv"), int(self._sources.clock()), _metadata_json(given.metadata)
        )
        items = await self._checked(visit.owner, given.items or [])
        await self._store.create_conversation(visit.owner, conversation, new_items(items))
        return conversation_object(conversation)

    async def conversation(self, visit: Visit) -> Json:
        _query(visit, NoQuery)
        return conversation_object(await self._conversation(visit))

    async def update_conversation(self, visit: Visit) -> Json:
        _query(visit, NoQuery)
        metadata = _metadata_json(self._body(visit, ChangedConversation).metadata)
        changed = await self._store.update_conversation(visit.owner, visit.ids["id"], metadata)
        if changed is None:
            raise no_conversation(visit.ids["id"])
        return conversation_object(changed)

    async def delete_conversation(self, visit: Visit) -> Json:
        _query(visit, NoQuery)
        conversation_id = visit.ids["id"]
        if not await self._store.delete_conversation(visit.owner, conversation_id, self._sources.clock()):
            raise no_conversation(visit.ids["id"])
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    async def add_items(self, visit: Visit) -> Json:
        include = _query(visit, ItemQuery).include
        await self._conversation(visit)
        items = await self._checked(visit.owner, self._body(visit, AddedItems).items)
        kept = new_items(items)
        owner, conversation_id, now = visit.owner, visit.ids["id"], self._sources.clock
        if not await self._patiently(lambda: self._store.add_items(owner, conversation_id, kept, now())):
            raise no_conversation(visit.ids["id"])
        return list_object([listed_item(item, include) for item in items], has_more=False)

    async def conversation_items(self, visit: Visit) -> Json:
        query = _query(visit, ItemsQuery)
        listed = await self._store.conversation_items(visit.owner, visit.ids["id"], query.page)
        if listed is None:
            raise no_conversation(visit.ids["id"])
        return item_list(listed, query.include)

    async def conversation_item(self, visit: Visit) -> Json:
        include = _query(visit, ItemQuery).include
        await self._conversation(visit)
        found = await self._store.conversation_item(visit.owner, visit.ids["id"], visit.ids["item"])
        if found is None:
            raise _no_item(visit)
        return listed_item(orjson.loads(found), include)

    async def delete_conversation_item(self, visit: Visit) -> Json:
        """Answers with the conversation. Source: the SDK's `conversations.items.delete`."""
        _query(visit, NoQuery)
        conversation = await self._conversation(visit)
        owner, ids, now = visit.owner, visit.ids, self._sources.clock
        deleted = await self._patiently(
            lambda: self._store.delete_conversation_item(owner, ids["id"], ids["item"], now())
        )
        if not deleted:
            raise _no_item(visit)
        return conversation_object(conversation)

    async def _conversation(self, visit: Visit) -> Conversation:
        conversation = await self._store.conversation(visit.owner, visit.ids["id"])
        if conversation is None:
            raise no_conversation(visit.ids["id"])
        return conversation

    async def _checked(self, owner: str, items: list[Json]) -> list[Json]:
        """Items that can be rendered later, references replaced, with ids. Raises: InvalidRequest, NotFound."""
        check_ids(items, "items")
        items = await self._pasts.own(items, owner)
        refuse_repeated([], items)
        check_items(items, "items")
        for index, item in enumerate(items):
            if item.get("type") == TRIGGER:
                at = f"items[{index}]"
                raise InvalidRequest(f"Invalid '{at}': a {TRIGGER} belongs into a request for a response.", param=at)
        self._pasts.check_folds(items, owner, "items")
        return identified(items, self._sources.new_id)

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Waits a little for a turn that holds the conversation. Raises: ConversationLocked."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._conversation_wait_s
        while True:
            try:
                return await work()
            except ConversationLocked:
                if loop.time() >= give_up_at:
                    raise
            await asyncio.sleep(ASK_AGAIN_S)

    def _body(self, visit: Visit, form: type[T]) -> T:
        body = parse_body(visit.body, self._limits) if visit.body else {}
        return _converted(body, form)


def _shown_response(kept: KeptResponse, include: Collection[str]) -> Json:
    response = restored(kept)
    return {**response, "output": [shown(item, include) for item in response["output"]]}


def _metadata_json(metadata: dict[str, str] | None) -> bytes:
    check_metadata(metadata or {})
    return orjson.dumps(metadata or {})


def _query(visit: Visit, form: type[T]) -> T:
    """The query, validated; lists are given as `name=` or `name[]=`, once for each value."""
    given: Json = {}
    for name, value in visit.query:
        name = name.removesuffix("[]")
        if name == "include":
            given.setdefault(name, []).append(value)
        else:
            given[name] = value
    return _converted(given, form)


# How msgspec speaks of a field -> the live API's code and words.
FIELD_ERRORS = {
    "Object contains unknown field": ("unknown_parameter", "Unknown parameter: '{}'."),
    "Object missing required field": ("missing_required_parameter", "Missing required parameter: '{}'."),
}
FIELD_ERROR = re.compile(rf"^({'|'.join(FIELD_ERRORS)}) `(.*?)`")


def _converted(given: Json, form: type[T]) -> T:
    try:
        return msgspec.convert(given, form, strict=False)
    except msgspec.ValidationError as error:
        found = FIELD_ERROR.match(str(error))
        if found is None:
            raise invalid(error) from error
        code, words = FIELD_ERRORS[found[1]]
        raise InvalidRequest(words.format(found[2]), param=found[2], code=code) from error


def _no_item(visit: Visit) -> NotFound:
    return NotFound(f"Item with id '{clipped(visit.ids['item'])}' not found in conversation '{visit.ids['id']}'.")


# What answers a visit: the JSON of a 200, or events.
Work = Callable[[Stored, Visit], Awaitable[Json | Follower]]
STORED_ROUTES: dict[tuple[str, str], Work] = {
    ("GET", "/responses"): Stored.responses,
    ("GET", "/responses/{id}"): Stored.response,
    ("DELETE", "/responses/{id}"): Stored.delete_response,
    ("POST", "/responses/{id}/cancel"): Stored.cancel,
    ("GET", "/responses/{id}/input_items"): Stored.input_items,
    ("POST", "/conversations"): Stored.create_conversation,
    ("GET", "/conversations/{id}"): Stored.conversation,
    ("POST", "/conversations/{id}"): Stored.update_conversation,
    ("DELETE", "/conversations/{id}"): Stored.delete_conversation,
    ("POST", "/conversations/{id}/items"): Stored.add_items,
    ("GET", "/conversations/{id}/items"): Stored.conversation_items,
    ("GET", "/conversations/{id}/items/{item}"): Stored.conversation_item,
    ("DELETE", "/conversations/{id}/items/{item}"): Stored.delete_conversation_item,
}
