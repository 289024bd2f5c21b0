"""PostgreSQL: the verbs of a store on one database that several machines share.

May not know HTTP, what an item means, or policy: how long things are kept and who may ask is decided by the caller.
Each verb is one statement wherever it can be; the others are one transaction.
"""

from __future__ import annotations

from functools import partial

import postgres_forgetting as forgetting
import postgres_quotas as quotas
import postgres_reads as reads
import postgres_runs as runs
import postgres_writes as writes
from errors import StoreError
from postgres_errors import Unheard
from postgres_news import News
from postgres_opening import listener, opened_database
from postgres_pool import Database, Verb, gone, surely
from quota_verbs import Charge, Used
from run_verbs import Batch, Ending, Held, NewRun, QueueLimits, QueueState, Run, RunInfo, RunStore, Stopped, Tail, Tell
from store import StoreSettings
from together import Together
from verbs import Conversation, KeptResponse, Listed, Lock, NewItem, NewTurn, Page, Purged, Window


async def open_store(settings: StoreSettings, may_make: bool = True) -> RunStore:
    """The store in a database, whose tables are made where there are none if that may be.

    Raises: StoreError when the database cannot be used.
    """
    db = await opened_database(settings, may_make)
    return PostgresStore(db, News(db, partial(listener, settings), is_direct=bool(settings.listen_url)))


class PostgresStore:
    """The verbs of `run_verbs.RunStore` on PostgreSQL."""

    def __init__(self, db: Database, news: News) -> None:
        self._db = db
        self._news = news
        self._logging = Together(partial(runs.log_together, db))

    @property
    def _patient(self) -> Verb:
        """For what no request waits for."""
        return self._db.verb(is_patient=True)

    async def save(self, turn: NewTurn) -> None:
        db = self._db.verb(repeats=False)
        await surely(lambda: writes.save(db, turn), lambda: reads.is_kept(db, turn.owner, turn.id))

    async def response(self, owner: str, response_id: str) -> KeptResponse | None:
        return await reads.response(self._db, owner, response_id)

    async def responses(self, owner: str, page: Page, model: str | None) -> Listed[KeptResponse]:
        return await self._db.read(lambda db: reads.responses(db, owner, page, model))

    async def delete_response(self, owner: str, response_id: str, now: float) -> bool:
        verb = self._db.verb(repeats=False)
        return await gone(lambda: verb.write(lambda db: forgetting.delete_response(db, owner, response_id, now)))

    async def window(self, owner: str, response_id: str) -> Window | None:
        return await reads.window(self._db, reads.RESPONSE_WINDOW, owner, response_id)

    async def window_before(self, owner: str, response_id: str) -> Window | None:
        return await reads.window(self._db, reads.WINDOW_BEFORE, owner, response_id)

    async def keep_ahead(self, owner: str, response_id: str, blob: bytes, of: list[bytes] | None = None) -> bool:
        return await self._db.write(lambda db: writes.keep_ahead(db, owner, response_id, blob, of))

    async def input_items(self, owner: str, response_id: str, page: Page) -> Listed[bytes] | None:
        return await self._db.read(lambda db: reads.input_items(db, owner, response_id, page))

    async def items(self, owner: str, ids: list[str]) -> dict[str, bytes]:
        return await reads.living_items(self._db, owner, ids)

    async def create_conversation(self, owner: str, conversation: Conversation, items: tuple[NewItem, ...]) -> None:
        db = self._db.verb(repeats=False)
        await surely(
            lambda: writes.create_conversation(db, owner, conversation, items),
            lambda: reads.is_conversation(db, owner, conversation.id),
        )

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        return await reads.conversation(self._db, owner, conversation_id)

    async def update_conversation(self, owner: str, conversation_id: str, metadata: bytes) -> Conversation | None:
        return await self._db.write(lambda db: writes.update_conversation(db, owner, conversation_id, metadata))

    async def delete_conversation(self, owner: str, conversation_id: str, now: float) -> bool:
        verb = self._db.verb(repeats=False)
        return await gone(
            lambda: verb.write(lambda db: forgetting.delete_conversation(db, owner, conversation_id, now))
        )

    async def conversation_window(self, owner: str, conversation_id: str) -> Window | None:
        return await reads.window(self._db, reads.CONVERSATION_WINDOW, owner, conversation_id)

    async def add_items(self, owner: str, conversation_id: str, items: tuple[NewItem, ...], now: float) -> bool:
        verb = self._db.verb(repeats=False)
        return await surely(
            lambda: verb.write(lambda db: writes.add_items(db, owner, conversation_id, items, now)),
            lambda: reads.holds(verb, owner, conversation_id, items),
        )

    async def conversation_items(self, owner: str, conversation_id: str, page: Page) -> Listed[bytes] | None:
        return await self._db.read(lambda db: reads.conversation_items(db, owner, conversation_id, page))

    async def conversation_item(self, owner: str, conversation_id: str, item_id: str) -> bytes | None:
        return await reads.conversation_item(self._db, owner, conversation_id, item_id)

    async def delete_conversation_item(self, owner: str, conversation_id: str, item_id: str, now: float) -> bool:
        name = (conversation_id, item_id)
        verb = self._db.verb(repeats=False)
        return await gone(lambda: verb.write(lambda db: writes.delete_conversation_item(db, owner, name, now)))

    async def acquire(self, lock: Lock, now: float, until_at: float) -> bool:
        return await writes.acquire(self._db, lock, now, until_at)

    async def renew(self, lock: Lock, until_at: float) -> bool:
        return await writes.renew(self._db, lock, until_at)

    async def release(self, lock: Lock) -> None:
        await writes.release(self._db, lock)

    async def first_use(self, owner: str, key: str, now: float) -> tuple[bytes, str] | None:
        return await reads.first_use(self._db, owner, key, now)

    async def secret(self, name: str) -> bytes:
        return await writes.secret(self._db.verb(), name)

    async def learned(self) -> dict[str, bytes]:
        return await writes.learned(self._db)

    async def keep_learned(self, learned: dict[str, bytes]) -> None:
        await writes.keep_learned(self._db, learned)

    async def purge(self, before_at: float, now: float) -> Purged:
        """The space is used again by the database, which gives none back."""
        responses = 0
        while forgotten := await self._patient.write(lambda db: forgetting.forget_some(db, before_at, now)):
            responses += forgotten
        await forgetting.sweep(self._patient, now)
        return Purged(responses, 0)

    async def admit(self, run: NewRun, limits: QueueLimits) -> None:
        db, turn = self._db.verb(repeats=False), run.turn
        await surely(lambda: runs.admit(db, run, limits), lambda: reads.is_kept(db, turn.owner, turn.id))

    async def claim(self, holder: str, until_at: float, limit: int) -> list[Run]:
        return await runs.claim(self._db.verb(repeats=False), holder, until_at, limit)

    async def renew_runs(self, holder: str, until_at: float) -> list[Held]:
        return await runs.renew(self._db, holder, until_at)

    async def held(self, holder: str) -> list[Held]:
        return await runs.held(self._db, holder)

    async def release_runs(self, holder: str) -> None:
        await runs.release(self._db, holder)

    async def log(self, held: Held, batch: Batch) -> bool:
        return await self._logging.call((held, batch)) or await runs.log(self._db, held, batch)

    async def settle(self, held: Held, ending: Ending) -> bool:
        return await runs.settle(self._db.verb(repeats=False), held, ending)

    async def free(self, held: Held, before_at: float) -> None:
        await runs.free(self._db, held, before_at)

    async def release_run(self, held: Held) -> None:
        await runs.release_run(self._db, held)

    async def let_go(self, held: Held) -> None:
        await runs.let_go(self._db, held)

    async def stop(self, owner: str, response_id: str, log_until_at: float, lives_until: float) -> Stopped | None:
        return await runs.stop(self._db.verb(), (owner, response_id), log_until_at, lives_until)

    async def is_held(self, run: int) -> bool:
        return await runs.is_held(self._db, run)

    async def tail(self, owner: str, response_id: str, after: int) -> Tail | None:
        return await runs.tail(self._db, owner, response_id, after)

    async def states(self, response_ids: list[str]) -> dict[str, tuple[str, int | None]]:
        return await runs.states(self._db, response_ids)

    async def version(self) -> int:
        return await self._news.version()

    def announce(self, what: str) -> None:
        self._news.announce(what)

    async def hear(self, tell: Tell) -> None:
        await self._news.hear(tell)

    @property
    def hears(self) -> bool:
        return self._news.are_heard

    async def expired(self, now: float) -> list[Held]:
        return await runs.expired(self._db, now)

    async def forget_ended(self, now: float) -> None:
        while await runs.forget_ended(self._patient, now):
            pass

    async def runs(self) -> list[RunInfo]:
        return await runs.runs(self._db)

    async def queue(self) -> QueueState:
        return await runs.queue(self._db)

    async def charge(self, charge: Charge) -> Used:
        """What it costs is put on the account once at most: an owner is given what nobody knows of."""
        db = self._db.verb(repeats=False)
        try:
            return await quotas.charge(db, charge)
        except Unheard as unsure:
            try:
                return await quotas.charge(db, quotas.without_cost(charge))
            except StoreError:
                raise unsure from None

    @property
    def waiting(self) -> int:
        return self._db.waiting

    async def size_bytes(self) -> int:
        return await reads.size_bytes(self._db)

    async def problems(self) -> list[str]:
        return await reads.problems(self._patient)

    async def close(self) -> None:
        await self._logging.close()
        await self._db.close()
