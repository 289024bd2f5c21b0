"""How PostgreSQL plans the statements of the store: by the keys that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any, NamedTuple
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
    "log together": runs.LOG_TOGETHER,
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


# What reads an index from one end on: runs that are held; owners in the order of the round, as far as they are needed.
FROM_END_TO_END = {"expired": {"run_by_holder"}, "claim": {"queue_by_served"}}
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


OWNERS, RUNS_OF_EACH, LEASES = 500, 4, 500
RUNS = OWNERS * RUNS_OF_EACH
# Of one owner all responses, each with a run, whose owners are many.
FILL = f"""INSERT INTO settings VALUES ('', 'm', '');
    INSERT INTO thread (tip, is_conversation) SELECT 0, false FROM generate_series(1, {RUNS});
    INSERT INTO turn (id, owner, thread, depth, settings, status, created_at, ages_from, body)
        SELECT 'resp_' || seq, 'o', seq, 0, '', 'queued', 1000, 1000, '' FROM thread;
    INSERT INTO run (turn, owner, request, admitted_at) SELECT seq, 'o' || seq % {OWNERS}, '', 1 FROM turn ORDER BY seq;
    INSERT INTO queue SELECT owner, nextval('round') FROM run GROUP BY owner;
    INSERT INTO lease SELECT 'lease ' || n, n, 1e12 FROM generate_series(1, {LEASES}) AS n"""
# Statement -> its values, and how many rows it may look at, each time that it looks: of thousands.
LOOKS: dict[str, tuple[Statement, dict[str, Any], int]] = {
    "claim": (runs.CLAIM, {"holder": "me", "until_at": 1e12, "at_most": 8}, OWNERS),
    "old": (forgetting.OLD, {"before_at": 999, "at_most": 100}, 10),
    "sweep of the queue": (forgetting.SWEEP_QUEUE, {}, RUNS),
    "response": (reads.ONE_RESPONSE, {"owner": "o", "id": "resp_0"}, 10),
    "window": (reads.RESPONSE_WINDOW, {"owner": "o", "id": "resp_0"}, 10),
    "stop": (runs.STOP, {"owner": "o", "id": "resp_0", "log_until_at": 0.0, "lives_until": 0.0}, 10),
}


@pytest.fixture(scope="module")
def filled(planner: Beside) -> Beside:
    """Rows that have just come, of which nothing is known."""
    planner.do(FILL)
    return planner


class Looked(NamedTuple):
    """How a statement was carried out, and how many rows each part of it has looked at."""

    text: str
    rows: list[int]


def looked(beside: Beside, statement: Statement, values: dict[str, Any]) -> Looked:
    asked = f"EXPLAIN (ANALYZE, TIMING OFF) {statement.text}"
    text = "\n".join(line for (line,) in beside.asked(asked, *statement.values(values)))
    counted = re.findall(r"actual rows=(\d+) loops=(\d+)|Rows Removed by .*: (\d+)", text)
    return Looked(text, [int(rows or 0) * int(loops or 0) + int(removed or 0) for rows, loops, removed in counted])


@pytest.mark.parametrize("name", LOOKS)
def test_a_statement_looks_at_few_rows_of_tables_that_have_just_grown(filled: Beside, name: str) -> None:
    statement, values, at_most = LOOKS[name]
    filled.do("BEGIN")
    try:
        plan = looked(filled, statement, values)
    finally:
        filled.do("ROLLBACK")
    assert max(plan.rows) <= at_most, plan.text


# All of a sudden, after statistics that know of none.
FORKS = f"""INSERT INTO thread (parent, parent_depth, tip, is_conversation)
        SELECT seq, 0, 1, false FROM thread ORDER BY seq LIMIT {RUNS};
    INSERT INTO turn (id, owner, thread, depth, settings, status, created_at, body)
        SELECT 'resp_fork', 'o', max(seq), 1, '', 'completed', 1000, '' FROM thread"""


@pytest.mark.parametrize("statement", [reads.RESPONSE_WINDOW, reads.WINDOW_BEFORE], ids=["window", "window before"])
def test_a_window_looks_at_its_own_threads_only(filled: Beside, statement: Statement) -> None:
    filled.do(f"BEGIN; ANALYZE thread; {FORKS}")
    try:
        plan = looked(filled, statement, {"owner": "o", "id": "resp_fork"})
    finally:
        filled.do("ROLLBACK")
    assert max(plan.rows) <= 10, plan.text
