"""News between the processes on one database: what each has changed, told by NOTIFY and heard by LISTEN.

May not know what a change means, nor rely on being heard: who waits looks now and then in any case. Nothing is told
within the transactions that change something, since a NOTIFY keeps all others from ending while its own one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg  # type: ignore[import-untyped]

from errors import StoreError
from postgres_errors import FAILURES, store_error
from postgres_pool import Database, Statement, Transaction
from postgres_runs import version
from run_verbs import Tell

log = logging.getLogger("responses_proxy.postgres_news")

# The first change is told at once, and those of the time after it together.
GATHER_S = 0.02
# An id has some 50 bytes, a message less than 8000. Source: postgresql.org/docs/current/sql-notify.html
WORDS_AT_ONCE = 100
# How long the last words of a process that ends may take.
LAST_WORDS_S = 1.0
# How soon a connection that listens has to hear what this process tells itself.
ECHO_WITHIN_S = 2.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
NOBODY = "-"

# After a table, so that each schema has a channel of its own.
CHANNEL = "'responses_proxy_' || 'run'::regclass::oid"
NAME_OF_CHANNEL = Statement(f"SELECT {CHANNEL} AS name")
ANNOUNCE = Statement(f"SELECT pg_notify({CHANNEL}, news) FROM unnest(:news::text[]) AS news")

Connect = Callable[[], Awaitable[asyncpg.Connection]]


class News:
    """What this process tells others and hears of them, for as long as it is told to `hear`."""

    def __init__(self, db: Database, connect: Connect, is_direct: bool) -> None:
        """`is_direct`: a connection is taken for one to the database itself, whatever it looks like."""
        self._db = db
        self._connect = connect
        self._is_direct = is_direct
        self._words: set[str] = set()
        self._has_words = asyncio.Event()
        self._connection: asyncpg.Connection | None = None
        self._asking = asyncio.Lock()
        # How this process signs what it tells: it hears itself, too.
        self._name = NOBODY
        self._echo = asyncio.Event()
        self._is_deaf = False

    @property
    def are_heard(self) -> bool:
        return self._connection is not None

    def announce(self, word: str) -> None:
        self._words.add(word)
        self._has_words.set()

    async def hear(self, tell: Tell) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._speak())
            group.create_task(self._listen(tell))

    async def version(self) -> int:
        """Asked of the connection that listens, if one does: one that is dead is found so. Raises: StoreError."""
        async with self._asking:
            connection = self._connection
            if connection is None:
                return await version(self._db)
            try:
                return await version(Transaction(connection))
            except FAILURES as error:
                connection.terminate()
                raise store_error(error) from error

    # -- telling -------------------------------------------------------------------------------------------------------

    async def _speak(self) -> None:
        try:
            while await self._has_words.wait():
                try:
                    await self._send()
                    await asyncio.sleep(GATHER_S)
                except StoreError as error:
                    log.log(error.log_level, "other processes could not be told what has changed: %s", error.message)
                    await asyncio.sleep(FIRST_PAUSE_S)
        finally:
            with contextlib.suppress(StoreError, TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self._send()

    async def _send(self) -> None:
        """What could not be sent waits. Raises: StoreError."""
        words, self._words = self._words, set()
        self._has_words.clear()
        try:
            await self._tell(sorted(words))
            words = set()
        finally:
            for word in words:
                self.announce(word)

    async def _tell(self, words: list[str]) -> None:
        """Raises: StoreError."""
        cuts = range(0, len(words), WORDS_AT_ONCE)
        news = [" ".join((self._name, *words[cut : cut + WORDS_AT_ONCE])) for cut in cuts]
        if news:
            await self._db.rows(ANNOUNCE, {"news": news})

    # -- hearing -------------------------------------------------------------------------------------------------------

    async def _listen(self, tell: Tell) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with self._listening(tell) as lost:
                    pause_s = FIRST_PAUSE_S
                    self._note(None)
                    await lost.wait()
                reason = "The database has lost its connection."
            except StoreError as error:
                reason = error.message
            except (*FAILURES, ValueError) as error:
                reason = store_error(error, "The database").message
            self._note(reason)
            tell(None)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    @contextlib.asynccontextmanager
    async def _listening(self, tell: Tell) -> AsyncIterator[asyncio.Event]:
        """Gives what is set when nothing is heard any more. Raises: StoreError, and errors of a connection."""
        connection, lost = await self._connect(), asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await self._begin(connection, tell)
            self._connection = connection
            tell(None)
            yield lost
        finally:
            self._connection, self._name = None, NOBODY
            with contextlib.suppress(*FAILURES):
                await connection.close(timeout=LAST_WORDS_S)

    async def _begin(self, connection: asyncpg.Connection, tell: Tell) -> None:
        """Listens, and makes sure that it hears. Raises: StoreError when it does not."""
        pid = connection.get_server_pid()
        # A pooler makes up the number that it tells, and would leave another one's connection listening.
        if not self._is_direct and pid != await connection.fetchval("SELECT pg_backend_pid()"):
            raise StoreError("A pooler is between; store.listen_url may lead to the database itself.")
        self._name = str(pid)
        self._echo.clear()
        row = await self._db.row(NAME_OF_CHANNEL, {})
        await connection.add_listener(row and row["name"], lambda *heard: self._heard(tell, heard[-1]))
        await self._tell([""])
        try:
            async with asyncio.timeout(ECHO_WITHIN_S):
                await self._echo.wait()
        except TimeoutError:
            raise StoreError("The connection that listens does not hear what is told.") from None

    def _heard(self, tell: Tell, payload: str) -> None:
        name, *words = payload.split()
        if name == self._name:
            self._echo.set()
        elif words:
            tell(frozenset(words))

    def _note(self, why_it_is_deaf: str | None) -> None:
        if why_it_is_deaf and not self._is_deaf:
            log.warning("changes of other processes are not heard, and looked for instead: %s", why_it_is_deaf)
        if self._is_deaf and not why_it_is_deaf:
            log.info("changes of other processes are heard again")
        self._is_deaf = bool(why_it_is_deaf)
