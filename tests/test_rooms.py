"""The rooms as data: who may import whom, how large each may grow, and a few habits that the linter does not know."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Room -> its floor, its ceiling in lines, and the third-party packages it may import. A room imports only from lower
# floors, or from an earlier row of its own floor.
ROOMS: dict[str, tuple[int, int, set[str]]] = {
    "errors": (0, 150, set()),
    "upstream_errors": (0, 100, set()),
    "dialects": (0, 200, set()),
    "sources": (0, 100, set()),
    "verbs": (0, 300, {"msgspec"}),
    "quota_verbs": (0, 100, {"msgspec"}),
    "capacity": (1, 200, set()),
    "sse": (1, 100, set()),
    "looks": (1, 100, set()),
    "fields": (0, 100, set()),
    "circuits": (1, 100, set()),
    "gates": (1, 250, set()),
    "passing": (1, 300, {"msgspec"}),
    "overflows": (1, 150, set()),
    "refusals": (1, 200, {"orjson"}),
    "request": (1, 400, {"msgspec", "orjson"}),
    "tools": (1, 500, {"msgspec", "orjson"}),
    "chunks": (1, 150, {"orjson"}),
    "think": (1, 150, set()),
    "parts": (1, 100, set()),
    "leases": (1, 150, set()),
    "duties": (1, 100, set()),
    "frames": (1, 100, {"orjson"}),
    "tallies": (1, 100, {"prometheus_client"}),
    "metrics": (1, 250, {"prometheus_client"}),
    "logs": (1, 100, {"orjson"}),
    "tracing": (1, 150, set()),
    "spans": (1, 150, {"opentelemetry"}),
    "stream_lanes": (1, 150, set()),
    "run_tables": (1, 100, set()),
    "schema": (1, 200, set()),
    "lanes": (1, 200, {"aiosqlite"}),
    "keys": (1, 175, set()),
    "vocabulary": (1, 100, {"tiktoken"}),
    "sealing": (1, 150, {"cryptography"}),
    "auth": (1, 150, {"msgspec"}),
    "origins": (1, 150, set()),
    "quotas": (1, 200, {"msgspec"}),
    "replay": (1, 150, set()),
    "run_verbs": (1, 250, {"msgspec"}),
    "watching": (2, 175, set()),
    "jobs": (2, 100, set()),
    "reads": (2, 350, {"orjson"}),
    "writes": (2, 360, {"orjson"}),
    "run_rows": (2, 350, {"msgspec", "orjson"}),
    "facts": (2, 100, set()),
    "quota_rows": (2, 100, set()),
    "store": (2, 300, {"msgspec"}),
    "copying": (2, 300, {"msgspec"}),
    "sqlite_copying": (2, 400, {"msgspec"}),
    "postgres_tables": (2, 160, set()),
    "postgres_errors": (1, 110, {"asyncpg"}),
    "postgres_advice": (1, 125, {"asyncpg"}),
    "postgres_presence": (1, 150, set()),
    "together": (1, 75, set()),
    "postgres_pool": (2, 400, {"asyncpg"}),
    "postgres_quotas": (2, 100, {"msgspec"}),
    "postgres_reads": (2, 350, set()),
    "postgres_writes": (2, 350, set()),
    "postgres_forgetting": (2, 200, set()),
    "postgres_runs": (2, 400, set()),
    "postgres_opening": (2, 175, {"asyncpg"}),
    "postgres_news": (2, 200, {"asyncpg"}),
    "store_postgres": (2, 300, set()),
    "postgres_copying": (2, 300, {"asyncpg"}),
    "once": (2, 100, set()),
    "admissions": (2, 350, set()),
    "records": (2, 250, {"msgspec", "orjson"}),
    "lists": (2, 150, {"orjson"}),
    "calls": (2, 250, {"orjson"}),
    "items": (2, 450, {"msgspec", "pypdf"}),
    "observing": (2, 400, set()),
    "silence": (1, 100, set()),
    "chat_stream": (2, 200, {"aiohttp", "orjson"}),
    "relaying": (2, 250, {"aiohttp", "multidict", "yarl"}),
    "upstream": (2, 500, {"aiohttp", "multidict", "orjson", "yarl"}),
    "routing": (2, 150, set()),
    "catalogue": (3, 150, set()),
    "readiness": (3, 150, set()),
    "stream_plan": (3, 100, {"msgspec"}),
    "streaming": (3, 500, {"msgspec", "orjson"}),
    "translation": (3, 500, {"msgspec", "orjson"}),
    "remembered": (3, 150, set()),
    "history": (3, 150, {"orjson"}),
    "weights": (3, 200, {"orjson"}),
    "counting": (3, 250, {"orjson"}),
    "folding": (3, 200, {"msgspec", "orjson"}),
    "compaction": (4, 450, {"msgspec", "orjson"}),
    "summaries": (4, 200, {"orjson"}),
    "past": (4, 200, {"msgspec"}),
    "dispatch": (4, 150, {"msgspec"}),
    "event_log": (4, 250, set()),
    "weighing": (5, 200, {"msgspec", "orjson"}),
    "needs": (5, 150, set()),
    "fitting": (5, 400, {"msgspec"}),
    "ahead": (5, 100, {"msgspec"}),
    "keeper": (5, 150, {"msgspec"}),
    "turns": (5, 500, {"msgspec", "orjson"}),
    "background": (6, 450, {"msgspec"}),
    "answers": (6, 300, {"orjson"}),
    "sockets": (6, 450, {"msgspec", "orjson"}),
    "incoming": (6, 150, set()),
    "carrier": (6, 250, set()),
    "stored": (7, 400, {"msgspec", "orjson"}),
    "windows": (7, 150, {"msgspec"}),
    "settings": (7, 250, {"msgspec"}),
    "listening": (8, 200, {"httptools", "uvicorn"}),
    "upkeep": (8, 150, set()),
    "services": (8, 325, set()),
    "edge": (8, 450, {"msgspec", "orjson", "starlette"}),
    "outermost": (8, 250, {"orjson", "starlette"}),
    "commands": (8, 225, set()),
    "proxy": (9, 300, {"uvicorn"}),
}
ROOMS_WITH_BROAD_EXCEPT = {"edge", "outermost", "upkeep", "turns", "background", "items", "lanes", "sockets"}
MAX_LINES, MAX_NESTING = 60, 3
NESTS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match)
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)

Function = ast.FunctionDef | ast.AsyncFunctionDef
FOUND = sorted(path.stem for path in ROOT.glob("*.py"))
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in FOUND}
each_room = pytest.mark.parametrize("room", FOUND)


def imported(tree: ast.AST) -> set[str]:
    """The top-level modules that a tree imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the rooms stand flat: no relative import"
            names.add(str(node.module).partition(".")[0])
    return names


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep the blocks of a function stand in each other; `elif` is no deeper than its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, NESTS) and not is_elif)))
    return deepest


def test_every_module_is_a_room_of_the_table() -> None:
    assert sorted(ROOMS) == FOUND


@each_room
def test_imports_go_down_only(room: str) -> None:
    order = list(ROOMS)
    used = imported(TREES[room]) & set(ROOMS)
    assert [other for other in used if order.index(other) >= order.index(room)] == []
    assert [other for other in used if ROOMS[other][0] > ROOMS[room][0]] == []


@each_room
def test_third_party_packages_stay_in_their_rooms(room: str) -> None:
    packages = imported(TREES[room]) - set(ROOMS) - set(sys.stdlib_module_names)
    assert packages <= ROOMS[room][2]


@each_room
def test_no_room_outgrows_its_ceiling(room: str) -> None:
    assert len((ROOT / f"{room}.py").read_text().splitlines()) <= ROOMS[room][1]


@each_room
def test_nothing_is_imported_inside_a_function(room: str) -> None:
    inner = [f"{function.name}: {found}" for function in functions(TREES[room]) if (found := imported(function))]
    assert inner == []


@each_room
def test_no_function_is_long(room: str) -> None:
    long = [f.name for f in functions(TREES[room]) if f.end_lineno and f.end_lineno - f.lineno >= MAX_LINES]
    assert long == []


@each_room
def test_no_function_is_deeply_nested(room: str) -> None:
    assert [function.name for function in functions(TREES[room]) if nesting(function) > MAX_NESTING] == []


def test_half_of_all_functions_have_fewer_than_ten_lines() -> None:
    lines = sorted(f.end_lineno - f.lineno + 1 for tree in TREES.values() for f in functions(tree) if f.end_lineno)
    assert lines[len(lines) // 2] < 10


@each_room
def test_broad_excepts_stand_where_they_are_allowed(room: str) -> None:
    handlers = [node.type for node in ast.walk(TREES[room]) if isinstance(node, ast.ExceptHandler)]
    broad = [h for h in handlers if h is None or ast.unparse(h) in ("Exception", "BaseException")]
    assert not broad or room in ROOMS_WITH_BROAD_EXCEPT


def test_the_only_broad_except_of_items_is_the_pdf_reader() -> None:
    broad = [
        function.name
        for function in functions(TREES["items"])
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception")
    ]
    assert broad == ["_pdf_text"]


@each_room
def test_module_level_mutables_are_tables(room: str) -> None:
    mutable = [
        name
        for node in TREES[room].body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, MUTABLE)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if not (name := ast.unparse(target)).isupper()
    ]
    assert mutable == []


@each_room
def test_no_table_is_changed_by_a_function(room: str) -> None:
    assert [node.names for node in ast.walk(TREES[room]) if isinstance(node, ast.Global)] == []


@each_room
def test_a_room_says_what_it_is(room: str) -> None:
    first, *_ = (ast.get_docstring(TREES[room]) or "").splitlines() or [""]
    assert first.endswith((".", ":", "and", ","))
    assert len(first) > 20


def test_only_one_room_knows_each_side_of_http() -> None:
    users = {
        package: {room for room in FOUND if package in imported(TREES[room])}
        for package in ("starlette", "uvicorn", "aiohttp", "socket", "http")
    }
    assert users == {
        "starlette": {"edge", "outermost"},
        "uvicorn": {"listening", "proxy"},
        "aiohttp": {"chat_stream", "relaying", "upstream"},
        "socket": {"listening"},
        "http": set(),
    }
