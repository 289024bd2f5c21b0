"""Codex CLI against the running proxy: commands that are run, files that are patched, tools of servers, compaction.

The settings are those of docs/clients.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from codex import Codex, Line, World, done, installed, listening, mcp_server, said
from compacting import Answer, Talker, answered, backend, in_turn, tokens_of
from conftest import StartApp
from node import needs_node
from scripted import call_delta, refused
from snippets import adapted, snippets

Json = dict[str, Any]
StartCodex = Callable[..., Awaitable[Codex]]
__all__ = ["backend"]
pytestmark = [needs_node, pytest.mark.timeout(120)]

OWN_PROVIDER, BUILT_IN, ALONE = snippets("Codex CLI", "toml")
# Transport -> what Codex is told, and with what each of its connections begins.
WIRE = {
    "http": ("supports_websockets = false", "POST /v1/responses HTTP/1.1"),
    "websocket": ("supports_websockets = true", "GET /v1/responses HTTP/1.1"),
}
TRANSPORTS = ("http", "websocket")
# Names for which Codex offers: commands and namespaces; apply_patch and tool_search; code that calls tools.
UNKNOWN, KNOWN, CODING = "m", "gpt-5.5", "gpt-6.1-sol"
DEMO = mcp_server("demo", Path(__file__).parent / "mcp_add.py")
COMPACTS_SOON = "model_auto_compact_token_limit = 100\n"


def calling(name: str, call_id: str = "call_1", /, **arguments: Any) -> Answer:
    call = call_delta(0, json.dumps(arguments), name, call_id)
    return lambda body: answered(body, "", "tool_calls", tool_calls=[call])


def saying(text: str) -> Answer:
    return lambda body: answered(body, text)


def outputs(body: Json) -> dict[str, str]:
    """What the backend is told of calls, by their ids."""
    return {each["tool_call_id"]: each["content"] for each in body["messages"] if each["role"] == "tool"}


def names(body: Json) -> set[str]:
    return {tool["function"]["name"] for tool in body["tools"]}


def users(body: Json) -> list[str]:
    """What the user said, without what Codex says of the place."""
    texts = [each["content"] for each in body["messages"] if each["role"] == "user"]
    return [text for text in texts if not text.startswith("<environment_context>")]


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Nobody outside of loopback is asked for anything."""
    world = World()
    yield world
    assert world.asked == []


@pytest.fixture
async def start_codex(start_app: StartApp, tmp_path: Path, world: World, transport: str) -> AsyncIterator[StartCodex]:
    """Codex with the provider of docs/clients.md: `await start_codex("m", before="key = 1", after="[table]")`."""
    told, begins = WIRE[transport]
    lines: list[Line] = []
    async with AsyncExitStack() as stack:
        world_port = await stack.enter_async_context(listening(world.refuse))

        async def start(model: str = UNKNOWN, before: str = "", after: str = "", **sections: Any) -> Codex:
            app = await start_app(**sections)
            lines.append(Line(int(app.url.rpartition(":")[2])))
            port = await stack.enter_async_context(listening(lines[-1].carry))
            shown = adapted(OWN_PROVIDER, f"http://127.0.0.1:{port}", model)
            provider, changes = re.subn("supports_websockets = (true|false)", told, shown)
            assert changes == 1
            return installed(tmp_path, ALONE + before + provider + after, world_port)

        yield start
    assert {began for line in lines for began in line.began} == {begins}


# -- tools -------------------------------------------------------------------------------------------------------------


async def test_a_command_is_run_and_its_output_is_told(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex()
    backend.answer = in_turn(calling("exec_command", cmd="echo kept > made.txt; echo told"), saying("It is made."))
    events = await codex.run("Make it.")
    assert (codex.project / "made.txt").read_text() == "kept\n"
    assert [item["aggregated_output"] for item in done(events, "command_execution")] == ["told\n"]
    assert outputs(backend.requests[1].body)["call_1"].endswith("\nOutput:\ntold\n")
    assert said(events) == "It is made."


async def test_a_patch_is_applied(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex(KNOWN)
    (codex.project / "old.txt").write_text("one\ntwo\n")
    lines = [
        "*** Begin Patch",
        "*** Update File: old.txt",
        "@@",
        " one",
        "-two",
        '+zwei ünd "drei"',
        "*** End Patch",
        "",
    ]
    patch = "\n".join(lines)
    backend.answer = in_turn(calling("apply_patch", input=patch), saying("Patched."))
    events = await codex.run("Patch it.")
    assert (codex.project / "old.txt").read_text() == 'one\nzwei ünd "drei"\n'
    assert [item["status"] for item in done(events, "file_change")] == ["completed"]
    again = backend.requests[1].body["messages"][-2]["tool_calls"][0]["function"]
    assert (again["name"], json.loads(again["arguments"])) == ("apply_patch", {"input": patch})
    assert "M old.txt" in outputs(backend.requests[1].body)["call_1"]


async def test_a_tool_of_a_server_is_called(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex(after=DEMO)
    backend.answer = in_turn(calling("mcp__demo__add", a=2, b=40), saying("42"))
    events = await codex.run("Add.")
    (call,) = done(events, "mcp_tool_call")
    assert (call["server"], call["tool"], call["status"]) == ("demo", "add", "completed")
    assert outputs(backend.requests[1].body)["call_1"].endswith("the sum is 42")


async def test_a_tool_that_was_searched_for_is_called(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex(KNOWN, after=DEMO)
    search, call = calling("tool_search", query="add"), calling("mcp__demo__add", "call_2", a=2, b=40)
    backend.answer = in_turn(search, call, saying("42"))
    await codex.run("Add.")
    assert [("mcp__demo__add" in names(request.body)) for request in backend.requests] == [False, True, True]
    assert outputs(backend.requests[2].body)["call_2"].endswith("the sum is 42")


async def test_code_calls_tools(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex(CODING)
    code = 'const done = await tools.exec_command({ cmd: "echo kept > made.txt; echo told" });\ntext(done.output);\n'
    backend.answer = in_turn(calling("functions__exec", input=code), saying("It is made."))
    assert said(await codex.run("Make it.")) == "It is made."
    assert (codex.project / "made.txt").read_text() == "kept\n"
    assert outputs(backend.requests[1].body)["call_1"].endswith("told\n")


async def test_two_calls_of_one_answer_are_both_carried_out(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex()
    deltas = [call_delta(n, json.dumps({"cmd": f"echo told {n}"}), "exec_command", f"call_{n}") for n in range(2)]
    backend.answer = in_turn(lambda body: answered(body, "", "tool_calls", tool_calls=deltas), saying("Both."))
    await codex.run("Do both.")
    told = backend.requests[1].body["messages"][-3:]
    assert [message["role"] for message in told] == ["assistant", "tool", "tool"]
    assert [told[n + 1]["content"].splitlines()[-1] for n in range(2)] == ["told 0", "told 1"]


async def test_an_agent_is_spawned_and_waited_for(start_codex: StartCodex, backend: Talker) -> None:
    """Two threads of Codex ask at the same time, so the answer goes by what they ask."""

    def answer(body: Json) -> Any:
        if "multi_agent_v1__spawn_agent" not in names(body):
            return answered(body, "Said by the other.")
        told = outputs(body)
        if "call_1" not in told:
            return calling("multi_agent_v1__spawn_agent", message="Say it.")(body)
        if "call_2" not in told:
            spawned = json.loads(told["call_1"])["agent_id"]
            return calling("multi_agent_v1__wait_agent", "call_2", targets=[spawned], timeout_ms=20_000)(body)
        return answered(body, "Waited for.")

    codex = await start_codex()
    backend.answer = answer
    assert said(await codex.run("Let another say it.")) == "Waited for."
    assert "Said by the other." in outputs(backend.requests[-1].body)["call_2"]


async def test_a_picture_is_shown_to_the_backend(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex()
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    (codex.project / "dot.png").write_bytes(base64.b64decode(dot))
    backend.answer = in_turn(calling("view_image", path="dot.png"), saying("A dot."))
    await codex.run("Look.")
    (part,) = backend.requests[1].body["messages"][-1]["content"]
    assert part["image_url"]["url"] == f"data:image/png;base64,{dot}"


async def test_an_answer_has_the_form_that_was_asked_for(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex()
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    (codex.project / "schema.json").write_text(json.dumps(schema))
    backend.answer = saying('{"n":1}')
    assert said(await codex.run("--output-schema", "schema.json", "Count.")) == '{"n":1}'
    assert backend.requests[0].body["response_format"]["json_schema"]["schema"] == schema


# -- long tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_id", [False, True], ids=["last", "by-id"])
async def test_a_task_that_is_resumed_knows_what_was_said(
    start_codex: StartCodex, backend: Talker, by_id: bool
) -> None:
    codex = await start_codex()
    backend.answer = in_turn(calling("exec_command", cmd="echo told"), saying("One."), saying("Two."))
    first = await codex.run("First.")
    which = first[0]["thread_id"] if by_id else "--last"
    assert said(await codex.run("resume", which, "Second.")) == "Two."
    body = backend.requests[-1].body
    assert users(body) == ["First.", "Second."]
    assert [each["content"] for each in body["messages"] if each["role"] == "assistant"] == ["", "One."]
    assert list(outputs(body)) == ["call_1"]


async def test_the_proxy_writes_the_summary_for_a_provider_of_the_name_openai(
    start_codex: StartCodex, backend: Talker
) -> None:
    codex = await start_codex(before=COMPACTS_SOON)
    codex.change('name = "responses-proxy"', 'name = "OpenAI"')
    backend.answer = in_turn(calling("exec_command", cmd="echo FACT 1: red"), saying("Done."))
    assert said(await codex.run("Find out.")) == "Done."
    assert len(backend.records) == 1
    told = json.dumps(backend.turns[-1].body["messages"])
    assert "FACT 1: red" in told
    assert "Find out." in told
    assert outputs(backend.turns[-1].body) == {}


async def test_the_model_writes_the_summary_for_any_other_provider(start_codex: StartCodex, backend: Talker) -> None:
    codex = await start_codex()
    codex.change("model_context_window = 32768", "model_context_window = 6000")
    backend.answer = in_turn(
        calling("exec_command", cmd="yes told | head -n 1000"), saying("Told once."), saying("Done.")
    )
    assert said(await codex.run("Find out.")) == "Done."
    asked, after = (request.body for request in backend.requests[1:])
    assert "tools" not in asked
    assert "CONTEXT CHECKPOINT COMPACTION" in users(asked)[-1]
    assert users(after)[0] == "Find out."
    assert users(after)[-1].endswith("Told once.")


async def test_a_window_that_is_too_full_does_not_end_the_task(start_codex: StartCodex, backend: Talker) -> None:
    window_tokens = 14_000
    full = refused(
        400, f"This model's maximum context length is {window_tokens} tokens.", code="context_length_exceeded"
    )
    found = [calling("exec_command", f"call_{n}", cmd=f"yes FACT {n}: red | head -n 1800") for n in range(4)]
    answer = in_turn(*found, saying("Done."))
    codex = await start_codex()
    backend.answer = lambda body: full if tokens_of(body["messages"]) > window_tokens else answer(body)
    assert said(await codex.run("Find out.")) == "Done."
    assert backend.records
    told = json.dumps(backend.turns[-1].body["messages"])
    assert [f"FACT {n}: red" in told for n in range(4)] == [True] * 4


# -- providers ---------------------------------------------------------------------------------------------------------


async def test_a_key_of_the_proxy_is_taken_from_the_environment(start_codex: StartCodex, backend: Talker) -> None:
    digest = hashlib.sha256(b"a key").hexdigest()
    codex = await start_codex(auth={"mode": "keys", "keys": {"somebody": f"sha256:{digest}"}})
    codex.change('wire_api = "responses"', 'wire_api = "responses"\nenv_key = "PROXY_KEY"')
    codex.client.environment["PROXY_KEY"] = "a key"
    backend.answer = saying("Come in.")
    assert said(await codex.run("Hello.")) == "Come in."


async def test_the_built_in_provider_speaks_to_the_proxy_and_has_it_compact(
    start_app: StartApp, tmp_path: Path, world: World, backend: Talker
) -> None:
    app = await start_app()
    async with listening(world.refuse) as world_port:
        codex = installed(tmp_path, ALONE + COMPACTS_SOON + adapted(BUILT_IN, app.url), world_port)
        backend.answer = in_turn(calling("exec_command", cmd="echo FACT 1: red"), saying("Done."))
        assert said(await codex.run("Find out.")) == "Done."
    assert len(backend.records) == 1
    assert "FACT 1: red" in json.dumps(backend.turns[-1].body["messages"])


async def test_a_setting_of_strict_refuses_codex_and_names_what_it_sent(
    start_codex: StartCodex, backend: Talker
) -> None:
    codex = await start_codex(turns={"strict": True})
    with pytest.raises(AssertionError, match="Unsupported: client_metadata"):
        await codex.run("Hello.")
    assert backend.requests == []
