"""Documents that would go stale: the settings file, the support matrix, routes, commands and the changelog."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edge import PASSED_PATHS
from postgres_opening import PLANS
from settings import SECTIONS, Settings, load_settings
from stored import STORED_ROUTES
from windows import WINDOW_ROUTES

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config.example.toml"
# A backend has no default address; the example shows one.
WITHOUT_DEFAULT = {("upstream", "base_url")}


def example() -> dict[str, dict[str, Any]]:
    """The sections of the example; of the backends, the first."""
    tables = tomllib.loads(EXAMPLE.read_text())
    return {name: table[0] if isinstance(table, list) else table for name, table in tables.items()}


def defaults(section: str) -> dict[str, Any]:
    """The defaults of a section as TOML would say them."""
    fields = dataclasses.fields(SECTIONS[section])
    values = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_example_has_every_section() -> None:
    assert list(example()) == list(SECTIONS) == [field.name for field in dataclasses.fields(Settings)]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_shows_every_setting_with_its_default(section: str) -> None:
    shown = example()[section]
    expected = {key: shown.get(key) if (section, key) in WITHOUT_DEFAULT else v for key, v in defaults(section).items()}
    assert shown == expected


def test_the_example_loads() -> None:
    settings = load_settings(EXAMPLE, {}, {})
    assert dataclasses.replace(settings, upstream=()) == Settings()
    assert len(settings.upstream) == 1


def test_every_setting_has_a_reason_beside_it() -> None:
    lines = [line for line in read(EXAMPLE.name).splitlines() if re.match(r"\w+ = ", line)]
    obvious = {"port", "name", "base_url", "total_timeout_s"}
    assert [line for line in lines if "#" not in line and line.split()[0] not in obvious] == []


def test_the_support_matrix_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "matrix.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_stale_matrix_is_noticed(tmp_path: Path) -> None:
    for name in [f"{path.stem}.py" for path in ROOT.glob("*.py")] + ["docs/matrix.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(read(name))
    (tmp_path / "README.md").write_text(read("README.md").replace("| `model` | sent", "| `model` | lost"))
    command = [sys.executable, str(tmp_path / "docs" / "matrix.py")]
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 1
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 0
    assert "| `model` | sent" in (tmp_path / "README.md").read_text()


ROUTES = [
    "POST /v1/responses",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
    *(f"{method} /v1{path}" for method, path in (*STORED_ROUTES, *WINDOW_ROUTES)),
    "GET /v1/models",
    "GET /v1/models/{id}",
    *(f"POST /v1{path}" for path in PASSED_PATHS),
]


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_documented(route: str) -> None:
    assert f"| `{route}` |" in read("docs/routes.md")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", read(document), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_flag_in_the_readme_is_one_of_ours() -> None:
    commands = re.findall(r"^responses-proxy .*$", read("README.md"), re.MULTILINE)
    flags = {flag for command in commands for flag in re.findall(r"--[a-z]+", command.partition("#")[0])}
    usage = subprocess.run([sys.executable, "proxy.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert flags
    assert [flag for flag in flags if flag not in usage] == []


def test_every_variable_in_the_documents_is_a_setting() -> None:
    for document in ("README.md", EXAMPLE.name):
        for section, key in re.findall(r"RESPONSES_PROXY_([A-Z]+)__([A-Z_]+)", read(document)):
            assert key.lower() in {*defaults(section.lower()), "url"}


def test_every_relative_link_leads_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_changelog_has_a_place_for_the_next_change() -> None:
    assert "\n## [Unreleased]\n" in read("CHANGELOG.md")


def test_every_room_is_in_the_contributors_table() -> None:
    rooms = [path.name for path in ROOT.glob("*.py")]
    assert [room for room in rooms if f"| `{room}` |" not in read("CONTRIBUTING.md")] == []


def test_every_room_is_packaged() -> None:
    packaged = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["py-modules"]
    assert sorted(packaged) == sorted(path.stem for path in ROOT.glob("*.py"))


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[>=\[;]", each)[0] for each in wanted} - {"responses-proxy"}
    assert [name for name in sorted(names) if f"`{name}`" not in read("CONTRIBUTING.md")] == []


# A client in the table of docs/clients.md: what was tried, the language, and the test.
CLIENT = re.compile(r"^\| \[[^|]* \| ([^|]*) \| (Node|Python) \| [^|]* \| `([^|]*)` \|$", re.MULTILINE)
PACKAGE = re.compile(r"`([^`]+)` ([\d.]+)")


def tried(language: str) -> dict[str, str]:
    """Package -> the version that docs/clients.md tells."""
    rows = CLIENT.findall(read("docs/clients.md"))
    return {name: version for told, spoken, _ in rows if spoken == language for name, version in PACKAGE.findall(told)}


def test_the_node_clients_that_were_tried_are_the_pinned_ones() -> None:
    pinned = json.loads(read("tests/node/package.json"))["dependencies"]
    assert tried("Node") == {name: version for name, version in pinned.items() if name != "zod"}


def test_the_python_clients_that_were_tried_are_the_required_ones() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    wanted = [each.partition(",")[0] for each in (*extras["clients"], *extras["test"])]
    parts = [re.split(r"(?:\[\w+\])?[>=]=", each) for each in wanted]
    required = {
        name: version for name, version in (each for each in parts if len(each) == 2) if name in tried("Python")
    }
    assert {name: version[: len(required[name])] for name, version in tried("Python").items()} == required
    assert {re.split(r"[\[=]", each)[0] for each in extras["clients"]} <= set(required)


def test_every_client_that_was_tried_names_a_test_that_exists() -> None:
    tests = [test for _, _, test in CLIENT.findall(read("docs/clients.md"))]
    assert len(tests) >= 7
    assert [test for test in tests if not (ROOT / test).is_file()] == []


def test_an_alias_in_the_documents_is_a_setting(tmp_path: Path) -> None:
    (snippet,) = re.findall(
        r"^```toml\n(\[\[upstream\]\]\n.*?)^```$", read("docs/clients.md"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "config.toml").write_text(snippet)
    assert "gpt-5.5" in load_settings(tmp_path / "config.toml", {}, {}).upstream[0].aliases


def test_the_lock_of_the_node_clients_leaves_the_registry_open() -> None:
    packages = json.loads(read("tests/node/package-lock.json"))["packages"]
    assert [name for name, package in packages.items() if name and "integrity" not in package] == []
    assert [name for name, package in packages.items() if "resolved" in package] == []


def test_no_tracked_file_names_a_place_on_this_machine() -> None:
    places = [
        str(ROOT),
        str(Path.home()) + os.sep,
        *("/" + "/".join(way) for way in (("work", "shared"), ("tmp", "bash_"))),
    ]
    found = [(path.name, place) for path in tracked() for place in places if place.encode() in path.read_bytes()]
    assert found == []


def test_what_a_pooler_has_to_ignore_is_what_connections_begin_with() -> None:
    told = (ROOT / "docs" / "state.md").read_text().partition("startup parameters")[2].partition("search_path")[0]
    assert sorted(re.findall("`([a-z_]+)`", told)) == sorted([*PLANS, "idle_in_transaction_session_timeout"])
