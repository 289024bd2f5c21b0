"""Carries out a Dockerfile in a directory: what `docker build` and `docker run` do, as far as one can without either.

Only the words that ours uses. Absolute paths of the image are moved under the directory; `python` is the one that runs
the tests, and what PyPI would give is what is installed here, but no more than the project says that it needs.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement

# First parts of the absolute paths that the image has of its own; any other path is one of the system.
OWN = re.compile(r"(?<![\w.}/-])/(?=(?:src|opt|data)(?![\w.-]))")


@dataclass
class Image:
    """What the last FROM has become."""

    root: Path
    environ: dict[str, str]
    workdir: str = "/"
    user: str = ""
    volumes: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def moved(self, text: str) -> str:
        return OWN.sub(f"{self.root}/", text)

    def path(self, name: str) -> Path:
        return Path(self.moved(name))

    def command(self, words: list[str]) -> list[str]:
        """Found as a container would find it: by the PATH of the image."""
        environ = self.running()
        found = shutil.which(words[0], path=environ["PATH"])
        assert found, f"{words[0]} is not in the image"
        return [found, *words[1:]]

    def running(self) -> dict[str, str]:
        return {name: self.moved(value) for name, value in self.environ.items()}


def steps(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions and what follows them: comments left out, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def context(folder: Path, ignore: str) -> list[Path]:
    """The files at the top of a folder that .dockerignore leaves to COPY; of its rules, the last that fits counts."""
    assert all("/" not in line for line in ignore.splitlines() if not line.startswith("#")), "only names at the top"
    rules = [line for line in ignore.splitlines() if line and not line.startswith("#")]
    kept = []
    for path in sorted(folder.iterdir()):
        fitting = [rule for rule in rules if fnmatch.fnmatchcase(path.name, rule.removeprefix("!"))]
        if path.is_file() and (not fitting or fitting[-1].startswith("!")):
            kept.append(path)
    return kept


class Builder:
    """Carries out one instruction after the other; `image` is the stage that it is at."""

    def __init__(self, folder: Path, at: Path) -> None:
        self._files = context(folder, (folder / ".dockerignore").read_text())
        self._at = at
        self._stages: dict[str, Path] = {}
        self._name = ""
        self._system = base_system(at / "system", folder)
        self.image = Image(at / "root", {})

    def carry_out(self, dockerfile: str) -> Image:
        for word, rest in steps(dockerfile):
            getattr(self, f"_{word.lower()}")(rest)
        return self.image

    def _arg(self, rest: str) -> None:
        assert rest.startswith("PYTHON=")

    def _from(self, rest: str) -> None:
        """A stage that is left moves aside, since paths in it stay true only for who stands at its place."""
        if self._name:
            self._stages[self._name] = self.image.root.rename(self._at / f"stage-{self._name}")
        assert rest.startswith("python:${PYTHON}-slim")
        self._name = rest.partition(" AS ")[2] or "last"
        self.image = Image(self._at / "root", dict(self._system))
        self.image.root.mkdir()

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        if sources[0].startswith("--from="):
            stage = self._stages[sources[0].removeprefix("--from=")]
            shutil.copytree(stage / sources[1].lstrip("/"), self.image.path(target), symlinks=True)
            return
        folder = self.image.path(target)
        folder.mkdir(parents=True)
        for source in sources:
            found = [path for path in self._files if fnmatch.fnmatchcase(path.name, source)]
            assert found, f"COPY {source}: .dockerignore leaves no such file"
            for path in found:
                shutil.copy(path, folder)

    def _run(self, rest: str) -> None:
        where = self.image.path(self.image.workdir)
        done = subprocess.run(
            self.image.moved(rest), shell=True, cwd=where, env=self.image.running(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"RUN {rest}: {done.stdout}{done.stderr}"

    def _env(self, rest: str) -> None:
        for name, _, value in (pair.partition("=") for pair in shlex.split(rest)):
            self.image.environ[name] = value.replace("$PATH", self.image.environ["PATH"])

    def _user(self, rest: str) -> None:
        self.image.user = rest

    def _workdir(self, rest: str) -> None:
        self.image.workdir = rest

    def _volume(self, rest: str) -> None:
        self.image.volumes.append(rest)

    def _expose(self, rest: str) -> None:
        self.image.ports.append(int(rest))

    def _entrypoint(self, rest: str) -> None:
        self.image.entrypoint = json.loads(rest)  # the form with a shell is no JSON, and would swallow SIGTERM

    def _healthcheck(self, rest: str) -> None:
        self.image.healthcheck = json.loads(rest.partition(" CMD ")[2])


# -- what the base image and PyPI would give ---------------------------------------------------------------------------


def base_system(at: Path, folder: Path) -> dict[str, str]:
    """An environment with `python`, and with the installed packages that the project needs; pip stays offline."""
    packages = at / "packages"
    packages.mkdir(parents=True)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["pdf"], *extras["postgres"]]
    for name in closure([*wanted, *project["build-system"]["requires"]]):
        link_distribution(name, packages)
    program(at / "bin" / "python", f'exec {shlex.quote(sys._base_executable)} "$@"')  # type: ignore[attr-defined]
    program(at / "bin" / "chown", ":")  # needs root, and nobody else is here
    return {
        "PATH": f"{at / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(packages),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the wrong way round
        "PIP_REQUIRE_VIRTUALENV": "1",  # a step that installs into the interpreter of the tests fails
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def program(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def closure(wanted: list[str]) -> set[str]:
    """The names of all distributions that these requirements come to here."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        key = f"{requirement.name}{sorted(requirement.extras)}"
        if key not in found:
            found.add(key)
            needs = [Requirement(text) for text in importlib.metadata.requires(requirement.name) or ()]
            waiting += [(each, name) for each in needs for name in (*requirement.extras, "")]
    return {key.partition("[")[0] for key in found}


def link_distribution(name: str, packages: Path) -> None:
    """Everything of an installed distribution, as it lies at the top of site-packages."""
    installed = importlib.metadata.distribution(name)
    tops = {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}
    for top in tops:
        if not top.endswith(".pth") and not (packages / top).is_symlink():
            (packages / top).symlink_to(Path(str(installed.locate_file(top))))


# -- a root that nobody can write --------------------------------------------------------------------------------------


def without_rights() -> list[str]:
    """What to begin a command with: root would write what is read-only, but not as compose.yaml lets it run."""
    if os.geteuid():
        return []
    found = shutil.which("setpriv")
    if not found:
        pytest.skip("root writes what is read-only, and there is no setpriv to give that up")
    return [found, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]


def make_read_only(root: Path, but: Path) -> None:
    for path in sorted([root, *root.rglob("*")], reverse=True):
        if not path.is_symlink() and path != but and but not in path.parents:
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def make_writable(root: Path) -> None:
    """So that it can be removed."""
    for path in (root, *root.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
