"""The verbs of a store, and the values that they take and give.

May not do I/O. Settings, bodies and items are opaque JSON in bytes here. Every verb takes the owner first, and answers
for another owner's object exactly as for an unknown one. A verb raises StoreError when the store cannot do its work.
"""

from __future__ import annotations

from typing import Generic, Literal, Protocol, TypeVar

import msgspec

from errors import ConversationLocked, InvalidRequest, NotFound, StillRunning

T = TypeVar("T")
RETRY_AFTER_S = 1.0
# Statuses of turns whose items are in windows.
CONTINUED = frozenset({"completed", "incomplete"})


class NewItem(msgspec.Struct, frozen=True):
    """An item to be kept; `body` is its JSON and holds the same `id`."""

    id: str
    body: bytes
    # Whether `input_items` shows it: reasoning and compaction items are not shown.
    is_listed: bool = True
    # Whether a window that reaches it begins with it.
    is_compaction: bool = False
    is_hidden: bool = False  # from every list and window


class Lock(msgspec.Struct, frozen=True):
    """A lease and who holds it."""

    name: str
    holder: str


class FirstUse(msgspec.Struct, frozen=True):
    """What an Idempotency-Key was first used for. `digest` is of the request body; forgotten at `until_at`."""

    key: str
    digest: bytes
    until_at: int


class NewTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A response to be kept: its own input and output only, and what it continues.

    `settings` is what the responses of a chain share, and is kept once; `body` is what is this response's alone.
    `is_detached`: nothing continues it, so it joins no conversation (a failed turn). `is_brief`: nothing can continue
    it, and it is in no list; it lives until it is told how long.
    """

    id: str
    owner: str
    status: str
    created_at: int
    completed_at: int | None
    model: str
    settings: bytes
    body: bytes
    inputs: tuple[NewItem, ...] = ()
    outputs: tuple[NewItem, ...] = ()
    previous_id: str | None = None
    conversation_id: str | None = None
    is_detached: bool = False
    is_brief: bool = False
    lock: Lock | None = None
    first_use: FirstUse | None = None


class KeptResponse(msgspec.Struct, frozen=True):
    """A response as it was kept; `outputs` holds the JSON of its output items in order."""

    id: str
    status: str
    created_at: int
    completed_at: int | None
    previous_id: str | None
    settings: bytes
    body: bytes
    outputs: list[bytes]


class Window(msgspec.Struct, frozen=True):
    """The items from the newest compaction item on, oldest first, as JSON.

    `status`, `body` and `settings` are the newest turn's, whose items begin at index `newest`; what a client put into
    a conversation has neither body nor settings. `ahead` is what was kept to stand for all the items.
    """

    status: str
    items: list[bytes]
    newest: int
    body: bytes = b""
    settings: bytes = b""
    ahead: bytes | None = None


class Conversation(msgspec.Struct, frozen=True):
    """A conversation; `metadata` is JSON."""

    id: str
    created_at: int
    metadata: bytes


class Page(msgspec.Struct, frozen=True):
    """Which part of a list: at most `limit` entries next to the cursor. `after` and `before` are ids."""

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    before: str | None = None


class Listed(msgspec.Struct, Generic[T], frozen=True):
    """A page, in the order that was asked for."""

    rows: list[T]
    has_more: bool


class Purged(msgspec.Struct, frozen=True):
    """What a purge did: responses that are gone for clients, and bytes given back to the file system."""

    responses: int
    freed_bytes: int


class Store(Protocol):
    """What is kept between requests. Times are Unix seconds and come from the caller."""

    # -- responses -----------------------------------------------------------------------------------------------------

    async def save(self, turn: NewTurn) -> None:
        """Keeps a whole response, or nothing of it, and gives its lock back.

        Raises: InvalidRequest or NotFound when what it continues is gone, ConversationLocked when its lock was lost.
        """

    async def response(self, owner: str, response_id: str) -> KeptResponse | None: ...

    async def responses(self, owner: str, page: Page, model: str | None) -> Listed[KeptResponse]:
        """The owner's responses in the order in which they were saved; `model` None: of every model.

        Raises: InvalidRequest for a cursor that is not in the list.
        """

    async def delete_response(self, owner: str, response_id: str, now: float) -> bool:
        """Makes the id unknown. Items that a living descendant needs stay until the last of those is gone."""

    async def window(self, owner: str, response_id: str) -> Window | None:
        """What a child of this response begins with; a response that failed or was cancelled has no items here."""

    async def window_before(self, owner: str, response_id: str) -> Window | None:
        """What this response itself began with, whether or not the response before it was deleted."""

    async def keep_ahead(self, owner: str, response_id: str, blob: bytes, of: list[bytes] | None = None) -> bool:
        """Keeps what stands for the window of this response; whether anything can continue it.

        It goes with the response, with its conversation, and with any item that is taken out of that. `of`: the items
        that it stands for; when they are others by now, nothing is kept.
        """

    async def input_items(self, owner: str, response_id: str, page: Page) -> Listed[bytes] | None:
        """The listed items that the model was given for this response: earlier turns of its window, its own input.

        Raises: InvalidRequest for a cursor that is not in the list.
        """

    async def items(self, owner: str, ids: list[str]) -> dict[str, bytes]:
        """Those of the ids that name a living item of the owner, in a response or a conversation."""

    # -- conversations -------------------------------------------------------------------------------------------------

    async def create_conversation(self, owner: str, conversation: Conversation, items: tuple[NewItem, ...]) -> None: ...

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None: ...

    async def update_conversation(self, owner: str, conversation_id: str, metadata: bytes) -> Conversation | None: ...

    async def delete_conversation(self, owner: str, conversation_id: str, now: float) -> bool:
        """Makes the id unknown and erases the items that no response needs; its responses begin to age."""

    async def conversation_window(self, owner: str, conversation_id: str) -> Window | None: ...

    async def add_items(self, owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float) -> bool:
        """False for an unknown conversation.

        Raises: ConversationLocked while a turn holds it, InvalidRequest for an id that it has already.
        """

    async def conversation_items(self, owner: str, conversation_id: str, page: Page) -> Listed[bytes] | None:
        """All items of a conversation. Raises: InvalidRequest for a cursor that is not in the list."""

    async def conversation_item(self, owner: str, conversation_id: str, item_id: str) -> bytes | None: ...

    async def delete_conversation_item(self, owner: str, conversation_id: str, item_id: str, now: float) -> bool:
        """Takes an item out of a conversation; the response that made it keeps it. Raises: ConversationLocked."""

    # -- leases and first uses -----------------------------------------------------------------------------------------

    async def acquire(self, lock: Lock, now: float, until_at: float) -> bool:
        """Whether the lease is the holder's now: it was free, had run out, or was the holder's before."""

    async def renew(self, lock: Lock, until_at: float) -> bool:
        """Whether the holder had the lease still."""

    async def release(self, lock: Lock) -> None: ...

    async def first_use(self, owner: str, key: str, now: float) -> tuple[bytes, str] | None:
        """The digest and the response id of the first use of a key whose response is still there."""

    # -- housekeeping --------------------------------------------------------------------------------------------------

    async def secret(self, name: str) -> bytes:
        """32 random bytes, the same for everybody who shares this store, made at the first call."""

    async def learned(self) -> dict[str, bytes]:
        """What was learned about models, by name: the same for everybody who shares this store."""

    async def keep_learned(self, learned: dict[str, bytes]) -> None: ...

    async def purge(self, before_at: float, now: float) -> Purged:
        """Makes responses older than `before_at` unknown, unless a conversation holds them, and gives space back."""

    async def problems(self) -> list[str]:
        """What an integrity check finds wrong."""

    async def close(self) -> None: ...


class ItemIds:
    """Ids for the items of one response, which tell their response: such an id needs no row in an index."""

    def __init__(self, response_id: str, taken: int = 0) -> None:
        """`taken`: how many were made before."""
        self._digits = response_id.rpartition("_")[2]
        self._count = taken

    def __call__(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{self._digits}{self._count:04x}"


def response_of(item_id: str) -> str:
    """The response whose `ItemIds` would have made this id."""
    return f"resp_{item_id.rpartition('_')[2][:-4]}"


def clipped(given: str) -> str:
    """An id as a message shows it, whatever a client sent."""
    return given if len(given) <= 128 else f"{given[:128]}…"


def conversation_lease(conversation_id: str) -> str:
    """The name of the lease that a turn holds on its conversation."""
    return f"conversation {conversation_id}"


def no_response(response_id: str) -> NotFound:
    return NotFound(f"Response with id '{clipped(response_id)}' not found.")


def no_conversation(conversation_id: str, param: str | None = None) -> NotFound:
    return NotFound(f"Conversation with id '{clipped(conversation_id)}' not found.", param=param)


def cannot_continue(response_id: str, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"Previous response with id '{clipped(response_id)}' {reason}.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def repeated(item_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"Duplicate item found with id {clipped(item_id)}. Remove duplicate items from your input and try again.",
        param="input",
    )


def still_running(response_id: str) -> StillRunning:
    """What is said of a parent that has not ended; clients try again by themselves."""
    error = StillRunning(
        f"Previous response with id '{clipped(response_id)}' is still running.", param="previous_response_id"
    )
    error.retry_after_s = RETRY_AFTER_S
    return error


def locked() -> ConversationLocked:
    return ConversationLocked(
        "Another process is currently operating on this conversation. Please retry in a few seconds.",
        param="conversation",
    )
