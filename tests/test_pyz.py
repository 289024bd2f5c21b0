"""The single file, where `make pyz` has built it of this code: it starts with nothing but Python."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, wait_for_200
from image_builder import make_read_only, make_writable, without_rights

PYZ = ROOT / "dist" / "responses-proxy.pyz"
LISTENING = re.compile(r"running on (http://\S+)")
BUILT_AT = PYZ.stat().st_mtime if PYZ.exists() else 0.0

pytestmark = pytest.mark.skipif(
    max(path.stat().st_mtime for path in ROOT.glob("*.py")) > BUILT_AT,
    reason="`make pyz` builds it of this code, which takes a network, and then runs these tests",
)


def command(*words: str) -> list[str]:
    """Of an interpreter that knows neither the packages of the tests nor this folder."""
    return [sys._base_executable, "-I", str(PYZ), *words]  # type: ignore[attr-defined]


def environ(root: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "SHIV_ROOT": str(root)}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first start has unpacked it."""
    root = tmp_path_factory.mktemp("shiv")
    done = subprocess.run(command("--version"), env=environ(root), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.split()[0]) == (0, "", "responses-proxy")
    return root


def test_it_serves(unpacked: Path, tmp_path: Path) -> None:
    words = command("--upstream", "http://127.0.0.1:9/v1", "--port", "0")
    with subprocess.Popen(words, env=environ(unpacked), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = next(filter(None, map(LISTENING.search, process.stderr)))
        wait_for_200(f"{found[1]}/healthz")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"responses.db", "responses.db.key"}


def test_once_unpacked_it_needs_to_write_nothing(unpacked: Path) -> None:
    before = without_rights()
    make_read_only(unpacked, unpacked / "none")
    try:
        words = [*before, *command("--version")]
        done = subprocess.run(words, env=environ(unpacked), capture_output=True, text=True, timeout=60)
    finally:
        make_writable(unpacked)
    assert (done.returncode, done.stderr) == (0, "")
