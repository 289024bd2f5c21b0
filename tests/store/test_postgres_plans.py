"""How PostgreSQL plans the statements of the store: by the keys that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
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
    """A connection with the settings of the store's own; its tables are empty, and nothing is known of them."""
    with closing(PostgresPlace()) as place, closing(Beside(f"{place.url}&{urlencode(PLANS)}")) as beside:
        yield beside


@pytest.mark.parametrize("name", HOT)
def test_a_statement_that_turns_wait_for_reads_no_growing_table_as_a_whole(planner: Beside, name: str) -> None:
    statement: Statement = HOT[name]
    planner.do(f"PREPARE planned AS {statement.text}")
    plan = planner.asked(f"EXPLAIN EXECUTE planned ({', '.join(['NULL'] * len(statement.names))})")
    planner.do("DEALLOCATE planned")
    read = [line.split(" on ")[1].split()[0] for (line,) in plan if "Seq Scan on " in line]
    assert not set(read) & set(GROWING)
