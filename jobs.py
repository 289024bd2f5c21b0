"""The background responses that have not ended, as a table for people.

May not do I/O.
"""

from __future__ import annotations

from run_verbs import RunInfo

# Moves the cursor to the corner and clears the screen. Source: ECMA-48.
CLEAR = "\x1b[H\x1b[2J"
HEADINGS = ("RESPONSE", "OWNER", "STATE", "AGE", "ATTEMPT", "EVENTS")
# Seconds in a unit of time.
UNITS = (("d", 86_400), ("h", 3600), ("min", 60))


def jobs_table(runs: list[RunInfo], now: float) -> str:
    """One line for each, in the order of their admission; `now` in Unix seconds."""
    rows = [HEADINGS, *(_row(run, now) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    running = sum(run.holder is not None for run in runs)
    return "\n".join([*lines, f"{len(runs) - running} queued, {running} running"])


def _row(run: RunInfo, now: float) -> tuple[str, ...]:
    state = "running" if run.holder else "waiting" if run.is_waiting else "queued"
    events = "-" if run.events is None else str(run.events)
    return run.response_id, run.owner or "-", state, age(now - run.admitted_at), str(run.attempts), events


def age(age_s: float) -> str:
    """In the largest unit that fits."""
    for unit, unit_s in UNITS:
        if age_s >= unit_s:
            return f"{int(age_s / unit_s)} {unit}"
    return f"{max(int(age_s), 0)} s"
