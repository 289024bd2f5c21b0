"""Two hundred background runs, and a process that is killed ten times in the middle of them."""

from __future__ import annotations

from pathlib import Path

from campaign_harness import Plan, campaign
from store_places import Place

SEED = 20261121


async def test_no_run_is_lost_stuck_or_wrong_when_its_process_is_killed_again_and_again(
    place: Place, tmp_path: Path
) -> None:
    plan = Plan(SEED)
    report = await campaign(plan, place, tmp_path)
    print(f"seed {SEED}: {report}")
    assert (dict(report.faults), report.details) == ({}, []), f"seed {SEED}"
