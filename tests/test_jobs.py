"""The table of background responses that people look at."""

from __future__ import annotations

import pytest

from jobs import age, jobs_table
from run_verbs import RunInfo

NOW = 1_000_000.0


def run(response_id: str = "resp_1", **changes: object) -> RunInfo:
    given = {"is_waiting": False, "owner": "", "admitted_at": NOW, "attempts": 0, "events": None, "holder": None}
    return RunInfo(response_id=response_id, **{**given, **changes})  # type: ignore[arg-type]


def test_without_runs_there_are_headings_and_a_count() -> None:
    assert jobs_table([], NOW) == "RESPONSE  OWNER  STATE  AGE  ATTEMPT  EVENTS\n0 queued, 0 running"


def test_each_run_is_a_line_in_the_order_given() -> None:
    table = jobs_table(
        [
            run("resp_b", admitted_at=NOW - 61, attempts=2, events=17, holder="proc_1", owner="alice"),
            run("resp_a", admitted_at=NOW - 3, events=2, is_waiting=True),
            run("resp_c", owner="bob"),
        ],
        NOW,
    )
    assert table.splitlines() == [
        "RESPONSE  OWNER  STATE    AGE    ATTEMPT  EVENTS",
        "resp_b    alice  running  1 min  2        17",
        "resp_a    -      waiting  3 s    0        2",
        "resp_c    bob    queued   0 s    0        -",
        "2 queued, 1 running",
    ]


def test_a_run_that_had_to_wait_and_is_held_is_running() -> None:
    assert "running" in jobs_table([run(is_waiting=True, holder="proc_1")], NOW).splitlines()[1]


def test_no_line_ends_with_a_space() -> None:
    table = jobs_table([run("resp_1" * 9, owner="o" * 40), run()], NOW)
    assert [line for line in table.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize(
    ("age_s", "shown"),
    [
        (-5.0, "0 s"),
        (0.0, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60.0, "1 min"),
        (3599.0, "59 min"),
        (3600.0, "1 h"),
        (86_399.0, "23 h"),
        (86_400.0, "1 d"),
        (9_000_000.0, "104 d"),
    ],
)
def test_an_age_is_shown_in_the_largest_unit_that_fits(age_s: float, shown: str) -> None:
    assert age(age_s) == shown
