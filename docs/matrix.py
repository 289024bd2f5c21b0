"""Writes the support matrix into README.md from the tables in the code; with --check, fails when it differs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dialects import DIALECTS, GENERIC, Dialect  # noqa: E402 - the rooms stand one folder up
from fields import REQUEST_FIELDS  # noqa: E402
from items import ITEMS, PARTS  # noqa: E402
from tools import TOOL_CHOICES, TOOLS  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {title} | what becomes of it |", "|---|---|"]
    lines += [f"| `{name}` | {note} |" for name, note in rows]
    return "\n".join(lines)


def differences(dialect: Dialect) -> str:
    """What a dialect has otherwise than `generic`."""
    fields = (field.name for field in dataclasses.fields(dialect) if field.name != "name")
    differing = [f"{f} = {getattr(dialect, f)}" for f in fields if getattr(dialect, f) != getattr(GENERIC, f)]
    return ", ".join(differing) or "the safest common form"


def matrix() -> str:
    """All tables, in the order in which a request is read."""
    return "\n\n".join(
        [
            table("parameter", ((name, f"{row.fate}: {row.note}") for name, row in REQUEST_FIELDS.items())),
            table("input item", ((name, row.note) for name, row in ITEMS.items())),
            table("content part", ((name, note) for name, (_, note) in PARTS.items())),
            table("tool", ((name, row.note) for name, row in TOOLS.items())),
            table("tool choice", ((name, note) for name, (_, note) in TOOL_CHOICES.items())),
            table("dialect", ((name, differences(dialect)) for name, dialect in DIALECTS.items())),
        ]
    )


def main() -> int:
    text = README.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    wanted = f"{before}{BEGIN}\n{matrix()}\n{END}{after}"
    if "--check" in sys.argv:
        if text != wanted:
            print("README.md: the support matrix is out of date; run `make docs`")
        return 0 if text == wanted else 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
