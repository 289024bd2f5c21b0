"""The program as it is started: real processes, their exit codes, and what they say."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest
from conftest import ROOT
from scripted import DEADLINE_S, END, Backend, Script, chunk, plain
from store_places import Place

from jobs import CLEAR

HI = {"model": "m", "input": "Hi"}
LISTENING = re.compile(r"running on (http://\S+)")
UVICORN = ["-m", "uvicorn", "proxy:app", "--port", "0"]


def environment(**extra: str) -> dict[str, str]:
    """Ours without any setting of the proxy that the tests were started with; nothing is kept in the directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RESPONSES_PROXY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "RESPONSES_PROXY_STORE__PATH": ":memory:", **extra}


def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "proxy.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment(**extra))


class Process:
    """A running proxy: its address, and everything it wrote so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""
        self.url = ""

    async def start(self) -> None:
        assert self.process.stderr is not None
        while not self.url:
            line = (await self.process.stderr.readline()).decode()
            assert line, f"it ended early: {self.output}"
            self.output += line
            if found := LISTENING.search(line):
                self.url = found[1]

    async def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        async with asyncio.timeout(DEADLINE_S):
            _, rest = await self.process.communicate()
        self.output += rest.decode()
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def started(*arguments: str, **extra: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, env=environment(**extra), stderr=asyncio.subprocess.PIPE
    )
    try:
        running = Process(process)
        async with asyncio.timeout(30):
            await running.start()
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def served(backend: Backend, *arguments: str) -> contextlib.AbstractAsyncContextManager[Process]:
    return started("proxy.py", "--upstream", backend.url, "--port", "0", *arguments)


async def answer_of(url: str, path: str = "/v1/responses") -> dict[str, object]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=HI) as answer:
        body: dict[str, object] = await answer.json()
    return body


# -- commands that end -------------------------------------------------------------------------------------------------


def test_version_is_printed() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"responses-proxy \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("arguments", [[], ["check"]])
def test_without_a_backend_it_says_so(arguments: list[str]) -> None:
    done = run(*arguments)
    expected = "responses-proxy: no upstream: give --upstream URL or [[upstream]] in the settings file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_mistake_in_the_settings_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[server]\nprot = 1\n")
    done = run("--config", str(config))
    expected = "responses-proxy: unknown setting server.prot; did you mean 'port'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_an_unknown_flag_is_refused() -> None:
    done = run("--upstrem", "http://x/v1")
    assert done.returncode == 2
    assert "usage: responses-proxy" in done.stderr


async def test_check_describes_a_good_backend(backend: Backend) -> None:
    backend.models = {"data": [{"id": "qwen", "owned_by": "vllm", "max_model_len": 4096}]}
    done = await asyncio.to_thread(run, "check", "--upstream", backend.url)
    expected = f"127.0.0.1 ({backend.url}): dialect vllm, 1 model(s), tokenizer: no\n  qwen: window 4096 tokens\n"
    assert (done.returncode, done.stdout) == (0, expected)


async def test_check_describes_a_real_backend(llamacpp: str) -> None:
    done = await asyncio.to_thread(run, "check", "--upstream", llamacpp)
    assert done.returncode == 0
    assert "dialect llamacpp, 1 model(s), tokenizer: yes" in done.stdout
    assert "tiny-think: window 1024 tokens" in done.stdout


async def test_check_describes_the_routes_of_several_backends(backend: Backend, tmp_path: Path) -> None:
    backend.models = {"data": []}
    config = tmp_path / "config.toml"
    config.write_text(f"""
[[upstream]]
name = "first"
base_url = "{backend.url}"
aliases = {{ gpt-5 = "qwen3:30b", small = "qwen3:4b" }}
fallback = ["second"]
[[upstream]]
name = "second"
base_url = "http://127.0.0.1:1/v1"
models = ["qwen*"]
aliases = {{ gpt-5 = "llama" }}
""")
    done = await asyncio.to_thread(run, "check", "--config", str(config))
    assert (done.returncode, done.stdout.splitlines()) == (
        1,
        [
            f"first ({backend.url}): dialect generic, 0 model(s), tokenizer: no",
            "  serves: gpt-5 as qwen3:30b, small as qwen3:4b, what it lists, every model that nobody names",
            "  falls back to: second (gpt-5 as llama, small as small)",
            "second (http://127.0.0.1:1/v1): "
            "Upstream 'second' at 127.0.0.1:1 cannot be reached (ClientConnectorError).",
            "  serves: gpt-5 as llama, qwen*",
        ],
    )


def test_check_fails_on_an_unreachable_backend() -> None:
    done = run("check", "--upstream", "http://127.0.0.1:1/v1")
    assert done.returncode == 1
    assert "cannot be reached" in done.stdout
    assert "Traceback" not in done.stderr


async def test_a_port_in_use_ends_it_without_a_traceback(backend: Backend) -> None:
    port = backend.url.split(":")[2].partition("/")[0]
    done = await asyncio.to_thread(run, "--upstream", backend.url, "--port", port)
    assert done.returncode != 0
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr


# -- serving -----------------------------------------------------------------------------------------------------------


async def test_it_serves_a_backend_given_by_flag(backend: Backend) -> None:
    async with served(backend) as process:
        assert (await answer_of(process.url))["status"] == "completed"


async def test_it_serves_a_backend_given_by_file(backend: Backend, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[server]\nport = 0\n[[upstream]]\nbase_url = "{backend.url}"\naliases = {{ m = "real" }}\n')
    async with started("proxy.py", "--config", str(config)) as process:
        assert (await answer_of(process.url))["model"] == "m"
    assert (await backend.received()).body["model"] == "real"


@pytest.mark.parametrize("name", ["RESPONSES_PROXY_UPSTREAM__URL", "RESPONSES_PROXY_UPSTREAM__BASE_URL"])
async def test_any_server_runs_the_app_from_the_environment(backend: Backend, name: str) -> None:
    async with started(*UVICORN, **{name: backend.url}) as process:
        assert (await answer_of(process.url))["status"] == "completed"


async def test_any_server_runs_the_app_from_a_file(backend: Backend, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[[upstream]]\nbase_url = "{backend.url}"\n')
    async with started(*UVICORN, RESPONSES_PROXY_CONFIG=str(config)) as process:
        assert (await answer_of(process.url))["status"] == "completed"


async def test_any_server_may_serve_it_below_a_path(backend: Backend) -> None:
    environ = {"RESPONSES_PROXY_UPSTREAM__URL": backend.url}
    async with started(*UVICORN, "--root-path", "/ai", **environ) as process:
        assert (await answer_of(process.url))["status"] == "completed"


def test_another_server_is_told_what_is_missing() -> None:
    command = [sys.executable, *UVICORN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, env=environment())
    assert done.returncode != 0
    assert "no upstream" in done.stderr


async def test_log_lines_name_the_request(backend: Backend) -> None:
    async with served(backend) as process, aiohttp.ClientSession() as session:
        async with session.post(f"{process.url}/v1/responses", json={**HI, "seed": 1}) as answer:
            request_id = answer.headers["x-request-id"]
        await process.stop()
    (line,) = [line for line in process.output.splitlines() if "seed" in line]
    assert f"[{request_id}]" in line


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_0(backend: Backend, number: int) -> None:
    async with served(backend) as process:
        assert await process.stop(number) == 0
    assert "Traceback" not in process.output


async def test_sigterm_lets_a_running_stream_finish(backend: Backend) -> None:
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), goes_on, chunk(content="lo"), *END]))
    async with served(backend) as process, aiohttp.ClientSession() as session:
        async with session.post(f"{process.url}/v1/responses", json={**HI, "stream": True}) as answer:
            while b"Hel" not in await answer.content.readline():
                pass
            process.process.send_signal(signal.SIGTERM)
            await refuses_connections(process.url)
            goes_on.set()
            *_, last, done, _ = (await answer.content.read()).split(b"\n\n")
        assert await process.ended() == 0
    assert json.loads(last.partition(b"data: ")[2])["response"]["status"] == "completed"
    assert done == b"data: [DONE]"


async def test_a_stream_that_outlives_the_grace_ends_with_response_failed(backend: Backend, tmp_path: Path) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))
    config = tmp_path / "config.toml"
    config.write_text(f'[server]\nport = 0\nshutdown_grace_s = 0.1\n[[upstream]]\nbase_url = "{backend.url}"\n')
    async with (
        started("proxy.py", "--config", str(config)) as process,
        aiohttp.ClientSession() as session,
        session.post(f"{process.url}/v1/responses", json={**HI, "stream": True}) as answer,
    ):
        while b"Hel" not in await answer.content.readline():
            pass
        assert await process.stop() == 0
        rest = (await answer.content.read()).decode()
    assert "event: response.failed" in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert await (await backend.received()).is_let_go()


async def refuses_connections(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except ConnectionError:
                return
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            await asyncio.sleep(0.01)


# -- jobs --------------------------------------------------------------------------------------------------------------

NO_JOBS = "RESPONSE  OWNER  STATE  AGE  ATTEMPT  EVENTS\n0 queued, 0 running\n"


def running_script() -> Script:
    return Script([chunk(content="Hel")], end="silent")


@pytest.fixture
async def empty(place: Place) -> Place:
    """A store without anything in it."""
    await (await place.open()).close()
    return place


@contextlib.asynccontextmanager
async def watched(place: Place) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command `jobs --watch`, stopped by its pid at the end."""
    command = (sys.executable, str(ROOT / "proxy.py"), "jobs", "--watch", "--store", place.address)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=environment(), stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def next_table(process: asyncio.subprocess.Process) -> str:
    """The lines up to the next line of counts."""
    assert process.stdout is not None
    lines: list[str] = []
    async with asyncio.timeout(DEADLINE_S):
        while not lines or "queued, " not in lines[-1]:
            line = (await process.stdout.readline()).decode()
            assert line, "it ended early"
            lines.append(line)
    return "".join(lines)


async def test_jobs_shows_what_waits_and_what_runs(backend: Backend, place: Place) -> None:
    backend.script(running_script())
    environ = {"RESPONSES_PROXY_BACKGROUND__WORKERS": "1", **place.environ}
    async with started("proxy.py", "--upstream", backend.url, "--port", "0", **environ) as process:
        ids = []
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.post(f"{process.url}/v1/responses", json={**HI, "background": True}) as answer:
                    ids.append((await answer.json())["id"])
            await backend.received()
        done = await asyncio.to_thread(run, "jobs", "--store", place.address)
    heading, first, second, counts = done.stdout.splitlines()
    assert (done.returncode, done.stderr, counts) == (0, "", "1 queued, 1 running")
    assert heading.split() == ["RESPONSE", "OWNER", "STATE", "AGE", "ATTEMPT", "EVENTS"]
    assert [line.split()[:3] for line in (first, second)] == [[ids[0], "-", "running"], [ids[1], "-", "queued"]]


async def test_jobs_of_a_store_without_any_says_so(empty: Place) -> None:
    done = await asyncio.to_thread(run, "jobs", "--store", empty.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, NO_JOBS, "")


def test_jobs_without_a_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "nowhere.db"
    done = run("jobs", "--store", str(file))
    expected = f"responses-proxy: store.path: there is no file '{file}'\n"
    assert (done.returncode, done.stdout, done.stderr, file.exists()) == (2, "", expected, False)


def test_jobs_of_a_file_that_is_no_store_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("No database. " * 1000)
    done = run("jobs", "--store", str(file))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("responses-proxy: ")


async def test_watched_jobs_are_shown_again_when_they_change(backend: Backend, empty: Place) -> None:
    backend.script(running_script())
    async with (
        started("proxy.py", "--upstream", backend.url, "--port", "0", **empty.environ) as process,
        watched(empty) as jobs,
        aiohttp.ClientSession() as session,
    ):
        assert await next_table(jobs) == NO_JOBS
        async with session.post(f"{process.url}/v1/responses", json={**HI, "background": True}) as answer:
            response_id = (await answer.json())["id"]
        await backend.received()
        async with asyncio.timeout(DEADLINE_S):
            while response_id not in (table := await next_table(jobs)):
                assert table == CLEAR + NO_JOBS
        assert table.startswith(CLEAR)
        assert "0 queued, 1 running" in table


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_watched_jobs_end_at_a_signal_without_a_traceback(empty: Place, number: int) -> None:
    async with watched(empty) as jobs:
        await next_table(jobs)
        jobs.send_signal(number)
        async with asyncio.timeout(DEADLINE_S):
            _, said = await jobs.communicate()
    assert b"Traceback" not in said


@pytest.mark.stores("file")
async def test_a_table_is_there_at_once_for_who_reads_it_through_a_pipe(empty: Place) -> None:
    """The first table is not kept in a buffer until the second one comes."""
    async with watched(empty) as jobs:
        assert (await next_table(jobs)).startswith("RESPONSE")


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keys_are_rotated_beside_the_store(tmp_path: Path) -> None:
    file = tmp_path / "responses.db.key"
    first, second = (run("keys", "rotate", "--store", str(tmp_path / "responses.db")) for _ in range(2))
    assert (first.returncode, first.stdout, first.stderr) == (0, f"{file}: made, with 1 key\n", "")
    expected = "a fresh key is first now, of 2 keys; running processes take it over by themselves"
    assert (second.returncode, second.stdout, second.stderr) == (0, f"{file}: {expected}\n", "")
    assert [len(base64.b64decode(line)) for line in file.read_text().splitlines()] == [32, 32]


def test_rotations_by_two_processes_at_once_lose_no_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: run("keys", "rotate", "--store", str(tmp_path / "responses.db")), range(2)))
    assert [each.returncode for each in done] == [0, 0]
    assert len((tmp_path / "responses.db.key").read_text().splitlines()) == 2


def test_a_flag_may_stand_between_the_words_of_a_command(tmp_path: Path) -> None:
    done = run("keys", "--store", str(tmp_path / "responses.db"), "rotate")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_key_for_the_settings_is_printed() -> None:
    key = base64.b64encode(bytes(32)).decode()
    done = run("keys", "rotate", RESPONSES_PROXY_SEALING__KEYS=key)
    said, fresh = done.stdout.splitlines()
    assert (done.returncode, len(base64.b64decode(fresh)), fresh == key) == (0, 32, False)
    assert said == "sealing.keys is set, so no key file is used: put this key first there, before the others"


def test_a_store_in_memory_has_no_keys_to_rotate() -> None:
    done = run("keys", "rotate")
    expected = "store.path: ':memory:' has no key file to rotate; name a file, or set sealing.keys"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"responses-proxy: {expected}\n")


def test_a_key_file_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    done = run("keys", "rotate", "--store", str(tmp_path / "no" / "responses.db"))
    expected = f"responses-proxy: {tmp_path / 'no' / 'responses.db.key'}: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_malformed_key_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "responses.db.key"
    file.write_text("no key")
    done = run("keys", "rotate", "--store", str(tmp_path / "responses.db"))
    expected = f"responses-proxy: Invalid key 1 in {file}: expected base64 of 32 bytes.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["keys"], "after 'keys' comes rotate"),
        (["keys", "spin"], "after 'keys' comes rotate"),
        (["check", "rotate"], "after 'check' comes no other word"),
        (["serve", "rotate"], "after 'serve' comes no other word"),
        (["fetch-vocab", "words"], "after 'fetch-vocab' comes o200k_base or cl100k_base"),
        (["keys", "rotate", "rotate"], "unrecognized arguments: rotate"),
    ],
)
def test_a_word_too_few_or_too_many_is_refused(arguments: list[str], expected: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (
        2,
        "",
        f"responses-proxy: error: {expected}",
    )


async def test_a_running_process_takes_rotated_keys_over(backend: Backend, tmp_path: Path) -> None:
    """What another sealed with the new key, it gives back to the backend, without a restart."""
    store = str(tmp_path / "responses.db")
    question = {"type": "message", "role": "user", "content": "Hi"}
    backend.script(plain("Ulm.", reasoning_content="By the Danube."), plain())
    async with served(backend, "--store", store) as running, aiohttp.ClientSession() as session:
        await asyncio.to_thread(run, "keys", "rotate", "--store", store)
        async with (
            served(backend, "--store", store) as started_later,
            session.post(f"{started_later.url}/v1/responses", json={**HI, "store": False}) as answer,
        ):
            output = (await answer.json())["output"]
        body = {**HI, "input": [question, *output, question]}
        async with session.post(f"{running.url}/v1/responses", json=body) as answer:
            assert (answer.status, answer.headers.get("x-responses-proxy-ignored")) == (200, None)
    assert "encrypted_content" in output[0]


# -- vocabularies ------------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_cannot_be_reached_says_where_it_belongs(tmp_path: Path) -> None:
    """Nothing listens where this process is told to go, whether or not the machine has a network."""
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:1")
    done = run("fetch-vocab", TIKTOKEN_CACHE_DIR=str(tmp_path), **nowhere)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (1, "", [])
    first, second = done.stderr.splitlines()
    address = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
    place = tmp_path / "fb374d419588a4632f3f557e76b4b70aebbca790"
    assert first == f"responses-proxy: {address} could not be fetched; it can be brought by hand, as {place}"
    assert "Connection refused" in second
