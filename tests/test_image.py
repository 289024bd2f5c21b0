"""The Dockerfile, carried out in a directory: the program is installed, and serves from a root that it cannot write."""

from __future__ import annotations

import http.server
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from conftest import ROOT
from image_builder import Builder, Image, context, make_read_only, make_writable, without_rights
from scripted import DEADLINE_S, Backend, plain

HI = {"model": "m", "input": "Hi"}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    built = Builder(ROOT, tmp_path_factory.mktemp("image")).carry_out(DOCKERFILE)
    make_read_only(built.root, built.path("/data"))
    yield built
    make_writable(built.root)


@pytest.fixture
def environ(image: Image) -> dict[str, str]:
    """As `docker run --env` would set it: a port that is free, on loopback, and an upstream that is not asked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return image.running() | {
        "RESPONSES_PROXY_SERVER__HOST": "127.0.0.1",
        "RESPONSES_PROXY_SERVER__PORT": str(port),
        "RESPONSES_PROXY_UPSTREAM__BASE_URL": "http://127.0.0.1:9/v1",
        "RESPONSES_PROXY_UPSTREAM__DIALECT": "generic",
    }


def run(image: Image, words: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        image.command(words), env=environ, cwd=image.path(image.workdir), capture_output=True, text=True, timeout=30
    )


@contextmanager
def running(image: Image, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command of the image, until its own healthcheck says that it is healthy, and then until SIGTERM."""
    command = [*without_rights(), *image.command(image.entrypoint)]
    with subprocess.Popen(command, env=environ, cwd=image.path(image.workdir)) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while run(image, image.healthcheck, environ).returncode:
                assert process.poll() is None, "it ended"
                assert time.monotonic() < deadline, "it is not healthy"
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def address(environ: dict[str, str]) -> str:
    return f"http://127.0.0.1:{environ['RESPONSES_PROXY_SERVER__PORT']}"


def written(image: Image) -> dict[Path, float]:
    """Everything outside the volume, and when it was changed."""
    data = image.path("/data")
    found = (path for path in image.root.rglob("*") if path != data and data not in path.parents)
    return {path: path.lstat().st_mtime_ns for path in found}


async def test_the_image_serves_from_a_root_that_it_cannot_write(
    image: Image, environ: dict[str, str], backend: Backend
) -> None:
    environ["RESPONSES_PROXY_UPSTREAM__BASE_URL"] = backend.url
    backend.script(plain("Hello."))
    before = written(image)
    with running(image, environ) as process:
        async with aiohttp.ClientSession() as http, http.post(f"{address(environ)}/v1/responses", json=HI) as answer:
            made = await answer.json()
        assert (answer.status, made["status"]) == (200, "completed")
    assert process.returncode == 0
    with running(image, environ):
        async with aiohttp.ClientSession() as http, http.get(f"{address(environ)}/v1/responses/{made['id']}") as again:
            assert (again.status, (await again.json())["output"]) == (200, made["output"])
    assert written(image) == before
    assert {path.name for path in image.path("/data").iterdir()} >= {"responses.db", "responses.db.key"}


def test_the_root_is_read_only_for_what_runs_in_it(image: Image) -> None:
    touch = [*without_rights(), "/bin/sh", "-c", f"echo > {image.root}/opt/venv/new"]
    assert subprocess.run(touch, capture_output=True).returncode != 0


def test_the_healthcheck_fails_without_a_server(image: Image, environ: dict[str, str]) -> None:
    assert run(image, image.healthcheck, environ).returncode == 1


class Ailing(http.server.BaseHTTPRequestHandler):
    """Answers, but not that it is well."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_healthcheck_fails_where_the_answer_is_not_200(image: Image, environ: dict[str, str]) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Ailing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        port = {"RESPONSES_PROXY_SERVER__PORT": str(server.server_port)}
        assert run(image, image.healthcheck, environ | port).returncode == 1
        thread.join()


def test_the_healthcheck_goes_past_the_proxy_of_the_environment(image: Image, environ: dict[str, str]) -> None:
    with running(image, environ):
        elsewhere = environ | {"http_proxy": "http://127.0.0.1:9"}
        assert run(image, image.healthcheck, elsewhere).returncode == 0


def test_without_an_upstream_the_image_says_what_it_lacks(image: Image, environ: dict[str, str]) -> None:
    bare = {name: value for name, value in environ.items() if "UPSTREAM" not in name}
    done = run(image, image.entrypoint, bare)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no upstream: give --upstream URL" in done.stderr


def test_the_image_speaks_to_a_database(image: Image, environ: dict[str, str]) -> None:
    """With nobody there to answer, it says that, and not that a package is missing."""
    database = "postgresql://user@127.0.0.1:9/database"
    done = run(image, [*image.entrypoint, "check", "--store", database], environ)
    assert done.returncode == 2
    assert "'postgresql://127.0.0.1:9/database' cannot be reached" in done.stderr


def test_the_program_takes_its_arguments_from_the_command(image: Image, environ: dict[str, str]) -> None:
    done = run(image, [*image.entrypoint, "--version"], environ)
    assert (done.returncode, done.stdout.split()[0]) == (0, "responses-proxy")


def test_nothing_but_root_may_be_needed_and_the_port_is_told(image: Image) -> None:
    assert (image.user, image.ports, image.volumes, image.workdir) == ("65532:65532", [8080], ["/data"], "/data")
    assert image.environ["RESPONSES_PROXY_SERVER__PORT"] == "8080"
    assert image.environ["RESPONSES_PROXY_SERVER__HOST"] == "0.0.0.0"


def test_nothing_of_the_sources_is_left_in_the_image(image: Image) -> None:
    assert sorted(path.name for path in image.root.iterdir()) == ["data", "opt"]


def test_stores_keys_and_settings_stay_outside(tmp_path: Path) -> None:
    for name in ("proxy.py", "pyproject.toml", "README.md", "LICENSE", "config.toml", "responses.db", "x.key", ".env"):
        (tmp_path / name).touch()
    (tmp_path / "tests").mkdir()
    kept = [path.name for path in context(tmp_path, (ROOT / ".dockerignore").read_text())]
    assert kept == ["LICENSE", "README.md", "proxy.py", "pyproject.toml"]
