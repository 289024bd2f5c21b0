"""How PostgreSQL plans the statements of the store: by the keys that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from urllib.parse import urlencode

import pytest
from postgres_server import Beside
from store_places import PostgresPlace

import postgres_forgetting as forgetting
import postgres_reads as reads
import postgres_runs as runs
import postgres_writes as writes
from postgres_opening import PLANS
from postgres_pool import Statement
from postgres_tables import MIGRATIONS

# What turns wait for. The tables that grow with turns; those of owners, leases and settings are small.
HOT = {
    "window": reads.RESPONSE_WINDOW,
    "window before": reads.WINDOW_BEFORE,
    "window of a conversation": reads.CONVERSATION_WINDOW,
    "response": reads.ONE_RESPONSE,
    "items by ids": reads.ITEMS_WITH,
    **{f"items {order}": statement for order, statement in reads.ITEMS_IN.items()},
    **{f"responses {order}": statement for order, statement in reads.RESPONSES_IN.items()},
    **{f"save {place}": statement for place, statement in writes.SAVE.items()},
    **{f"admit {place}": statement for place, statement in runs.ADMIT.items()},
    "claim": runs.CLAIM,
    "held": runs.HELD,
    "renew": runs.RENEW,
    "expired": runs.EXPIRED,
    "log": runs.LOG,
    "tail": runs.TAIL,
    "states": runs.STATES,
    "settle": runs.SETTLE,
    "settle in a conversation": runs.SETTLE_JOINING,
    "stop": runs.STOP,
    "old": forgetting.OLD,
    "bury": forgetting.BURY,
    "erase turns": forgetting.ERASE_TURNS,
}
GROWING = ("turn", "item", "thread", "run", "event", "log", "conversation")


@pytest.fixture(scope="module")
def planner() -> Iterator[Beside]:
    """A connection with the settings of the store's own, to tables that are empty and of which nothing is known."""
    schema = f"plans_{os.getpid()}"
    with closing(PostgresPlace()) as place:
        url = f"{place.url.removesuffix(f'tests_{os.getpid()}')}{schema}&{urlencode(PLANS)}"
        place.asked(f"CREATE SCHEMA {schema}")
        try:
            with closing(Beside(url)) as beside:
                for statement in (each for migration in MIGRATIONS for each in migration):
                    beside.do(statement)
                yield beside
        finally:
            place.asked(f"DROP SCHEMA {schema} CASCADE")


# What reads an index from one end to the other: runs that are held, and the oldest turns as far as they are old.
FROM_END_TO_END = {"expired": {"run_by_holder"}, "old": {"turn_by_age"}}
OF_AN_OWNER = {"turn_by_owner"}
INDEX = re.compile(r"(?:using|Bitmap Index Scan on) (\w+)")


def plan_of(planner: Beside, name: str) -> list[str]:
    statement: Statement = HOT[name]
    planner.do(f"PREPARE planned AS {statement.text}")
    plan = planner.asked(f"EXPLAIN EXECUTE planned ({', '.join(['NULL'] * len(statement.names))})")
    planner.do("DEALLOCATE planned")
    return [line for (line,) in plan]


@pytest.mark.parametrize("name", HOT)
def test_a_statement_that_turns_wait_for_reads_no_growing_table_as_a_whole(planner: Beside, name: str) -> None:
    read = [line.split(" on ")[1].split()[0] for line in plan_of(planner, name) if "Seq Scan on " in line]
    assert not set(read) & set(GROWING)


@pytest.mark.parametrize("name", HOT)
def test_a_statement_that_turns_wait_for_reads_no_index_as_a_whole(planner: Beside, name: str) -> None:
    plan = plan_of(planner, name)
    scans = [(found[1], below) for line, below in pairwise([*plan, ""]) if (found := INDEX.search(line))]
    whole = {index for index, below in scans if "Index Cond:" not in below}
    assert whole == FROM_END_TO_END.get(name, set())


@pytest.mark.parametrize("name", [name for name in HOT if not name.startswith("responses ")])
def test_what_is_named_is_not_looked_for_among_all_that_its_owner_has(planner: Beside, name: str) -> None:
    indexes = {found[1] for line in plan_of(planner, name) if (found := INDEX.search(line))}
    assert not indexes & OF_AN_OWNER
