"""Background runs under kill -9: `bench/campaign.py --runs 2000 --kills 50 --processes 3 --seed N`.

Clients create, stream, continue and poll runs on processes that share one file, while one process after the other is
killed and started again. Prints what must not happen and how often it did; exit code 1 when it did at all.
"""

import argparse
import asyncio
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from random import SystemRandom
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.campaign_harness import KINDS, Knobs, Plan, Report, campaign  # noqa: E402 - one folder up

# What is shown of a fault.
DETAIL_CHARACTERS = 500
DETAILS = 20
# A run that is killed again and again takes that much longer: the campaign has failed after this, for each run.
DEADLINE_S_A_RUN = 1.0
DEADLINE_S_A_KILL = 10.0
# What a key or a conversation of a process that died keeps others waiting.
LEASE_S = 60.0


class File:
    """The store of the campaign."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "responses.db")
        self.environ = {"RESPONSES_PROXY_STORE__PATH": self._path}

    def asked(self, query: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self._path, isolation_level=None)) as db:
            return db.execute(query, values).fetchall()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Background runs while processes are killed.")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1 << 32))
    return parser.parse_args()


def plan_of(args: argparse.Namespace) -> Plan:
    deadline_s = LEASE_S + args.runs * DEADLINE_S_A_RUN + args.kills * DEADLINE_S_A_KILL
    knobs = Knobs(workers=16 // args.processes + 1, lease_s=2.0)
    return Plan(
        args.seed, args.runs, args.kills, args.processes, knobs=knobs, deadline_s=deadline_s, is_impatient=False
    )


def table_of(report: Report) -> str:
    """Faults first, then what shows that there was much to go wrong."""
    rows = [(kind, str(report.faults[kind])) for kind in KINDS]
    shown = ("runs", "streamed", "on_unfinished", "kills", "takeovers", "resumes", "resumed_attempts", "creates_again")
    rows += [(name, str(getattr(report, name))) for name in shown]
    rows.append(("seconds", f"{report.seconds:.1f}"))
    return "\n".join(f"| {name:<16} | {value:>8} |" for name, value in rows)


def main() -> int:
    args = parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="campaign_") as folder:
        report = asyncio.run(campaign(plan_of(args), File(Path(folder)), Path(folder)))
    print(table_of(report))
    for detail in report.details[:DETAILS]:
        print(detail[:DETAIL_CHARACTERS])
    return 1 if report.faults or report.details else 0


if __name__ == "__main__":
    sys.exit(main())
