"""`demo/run.py` as a user starts it: a real process, a real llama.cpp server, the printed commands pasted into bash."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parent.parent / "demo" / "run.py"
COMMAND = re.compile(r"^curl .*?'$", re.DOTALL | re.MULTILINE)
LAST_LINE = "Ctrl-C stops everything.\n"


class Demo:
    """The running demo, as far as its output tells."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == LAST_LINE:
                break
        self.output = "".join(lines)
        assert lines[-1:] == [LAST_LINE], f"the demo ended early: {self.output}"

    @property
    def commands(self) -> list[str]:
        return COMMAND.findall(self.output)

    @property
    def pids(self) -> list[int]:
        """Of the proxy and of the backend."""
        return [int(pid) for pid in re.findall(r"pid (\d+)\)", self.output)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(port: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, str(RUN), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "RESPONSES_PROXY_STORE__PATH": ":memory:"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@contextmanager
def running_demo() -> Iterator[Demo]:
    port = free_port()
    with start(port) as process:
        try:
            yield Demo(process, port)
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with running_demo() as demo:
        yield demo


def paste(command: str) -> str:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def events_of(stream: str) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


def test_the_demo_says_what_runs_and_prints_three_commands(demo: Demo) -> None:
    assert f"http://127.0.0.1:{demo.port}/v1" in demo.output
    assert "tiny-think" in demo.output
    assert len(demo.commands) == 3
    assert all(map(is_alive, demo.pids))


def test_the_plain_command_prints_a_response_with_the_greeting(demo: Demo) -> None:
    response = json.loads(paste(demo.commands[0]))
    assert response["object"] == "response"
    assert response["status"] == "completed"
    assert response["output"][-1]["content"][0]["text"] == "Hello! How can I help you today?"


def test_the_streamed_command_ends_with_completed_and_done(demo: Demo) -> None:
    stream = paste(demo.commands[1])
    events = events_of(stream)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    assert text.startswith("Once upon a time")
    assert text.endswith("The end.")
    assert stream.rstrip().endswith("data: [DONE]")


def test_the_tool_command_prints_a_call_with_json_arguments(demo: Demo) -> None:
    response = json.loads(paste(demo.commands[2]))
    (call,) = [item for item in response["output"] if item["type"] == "function_call"]
    assert call["name"] == "get_weather"
    assert list(json.loads(call["arguments"])) == ["city"]


def test_sigterm_ends_the_demo_and_both_children() -> None:
    with running_demo() as demo:
        pids = demo.pids
        demo.process.terminate()
        assert demo.process.wait(timeout=30) == 0
        assert len(pids) == 2
        assert not any(map(is_alive, pids))


@pytest.mark.parametrize(("victim", "name"), [(0, "proxy"), (1, "backend")])
def test_a_dead_child_ends_the_demo_with_a_message(victim: int, name: str) -> None:
    with running_demo() as demo:
        pids = demo.pids
        os.kill(pids[victim], 9)
        output, _ = demo.process.communicate(timeout=30)
        assert demo.process.returncode == 1
        assert f"The {name} ended by itself with exit code -9." in output
        assert not any(map(is_alive, pids))


def test_sigterm_while_starting_leaves_no_child_behind() -> None:
    with start(free_port()) as process:
        assert process.stdout is not None
        backend_port = int(process.stdout.readline().rpartition(":")[2])
        process.terminate()
        # The children hold the pipe too: its end is theirs.
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "curl" not in output
    assert not is_listening(backend_port)


def test_a_port_in_use_is_told_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with start(port) as process:
            output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = output.splitlines()
    assert line == f"Cannot listen on 127.0.0.1 port {port}: Address already in use. Try `make run PORT=8081`."
