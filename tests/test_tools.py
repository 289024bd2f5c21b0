"""Tools as chat functions, tool choice, and calls back as the items that clients expect."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rendering import messages, refused, rendered, user
from samples import CUSTOM, FUNCTION, NAMESPACE, SCHEMA

from tools import ToolRef, call_item, chat_name, resolve

Json = dict[str, Any]
EMPTY = {"type": "object", "properties": {}}
LOOK = {"name": "look", "description": "d", "parameters": SCHEMA, "strict": True}


def functions(*tools: Json, dialect: str = "generic", **body: Any) -> list[Json]:
    """The chat functions that these tools become."""
    sent = rendered(dialect, tools=list(tools), **body).body.get("tools", [])
    assert {"function"} >= {tool["type"] for tool in sent}
    return [tool["function"] for tool in sent]


def names(*tools: Json, **body: Any) -> list[str]:
    return [function["name"] for function in functions(*tools, **body)]


def tool(name: str, **more: Any) -> Json:
    return {"type": "function", "name": name, **more}


# -- declarations ------------------------------------------------------------------------------------------------------


def test_a_function_is_nested_for_chat() -> None:
    assert functions(FUNCTION) == [LOOK]


def test_null_keys_of_a_function_are_not_sent() -> None:
    bare = tool("look", description=None, parameters=None, strict=None)
    assert functions(bare) == [{"name": "look", "parameters": EMPTY}]


def test_what_only_responses_knows_of_a_function_is_not_sent() -> None:
    more = {"async": True, "allowed_callers": ["direct"], "output_schema": SCHEMA, "defer_loading": True}
    assert functions({**FUNCTION, **more}) == [LOOK]


@pytest.mark.parametrize(("dialect", "kept"), [("generic", True), ("openai", True), ("ollama", False)])
def test_strict_false_goes_where_strict_is_known(dialect: str, kept: bool) -> None:
    assert kept is ("strict" in functions({**FUNCTION, "strict": False}, dialect=dialect)[0])


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        ({"type": "function", "function": {"name": "look"}}, "missing_required_parameter", "tools[0].name"),
        (tool(""), "invalid_value", "tools[0].name"),
        (tool("look", parameters=[]), "invalid_type", "tools[0].parameters"),
        (tool("look", description=5), "invalid_type", "tools[0].description"),
        (tool("look", strict="yes"), "invalid_type", "tools[0].strict"),
        ({"type": "custom"}, "missing_required_parameter", "tools[0].name"),
        ({**CUSTOM, "format": []}, "invalid_type", "tools[0].format"),
        ({**CUSTOM, "format": {"type": "json"}}, "invalid_value", "tools[0].format.type"),
        ({**CUSTOM, "format": {"type": "grammar"}}, "missing_required_parameter", "tools[0].format.syntax"),
        ({"type": "namespace", "name": "n"}, "missing_required_parameter", "tools[0].tools"),
        ({"type": "namespace", "name": "n", "tools": {}}, "invalid_type", "tools[0].tools"),
        ({"type": "namespace", "name": "n", "tools": [5]}, "invalid_value", "tools[0].tools[0].type"),
        ({"type": "namespace", "name": "n", "tools": [tool("")]}, "invalid_value", "tools[0].tools[0].name"),
        ({"type": "telepathy"}, "invalid_value", "tools[0].type"),
        ({"name": "look"}, "invalid_value", "tools[0].type"),
    ],
)
def test_a_malformed_tool_is_a_400_with_its_path(wrong: Json, code: str, param: str) -> None:
    assert (400, code, param) == refused(tools=[wrong])[:3]


def test_no_tools_key_is_sent_for_an_empty_list() -> None:
    body = rendered(tools=[], tool_choice="auto", parallel_tool_calls=False).body
    assert {"model", "messages"} == body.keys()


def test_a_custom_tool_is_a_function_with_one_string() -> None:
    (function,) = functions({"type": "custom", "name": "exec", "description": "Runs."})
    assert (
        function["name"],
        function["description"],
        function["parameters"]["required"],
    ) == ("exec", "Runs.", ["input"])


def test_the_model_is_told_the_grammar_of_a_custom_tool() -> None:
    assert functions(CUSTOM)[0]["description"] == "d\n\nThe input must match this lark grammar:\nstart: A"


def test_a_namespace_is_flattened_with_its_name_in_front() -> None:
    assert names(NAMESPACE) == ["mcp__demo__add", "mcp__demo__run"]


def test_a_tool_listed_twice_keeps_its_first_place_and_form() -> None:
    assert functions(FUNCTION, tool("b"), tool("look")) == [LOOK, {"name": "b", "parameters": EMPTY}]


def test_two_tools_that_would_share_a_name_get_two() -> None:
    first, second = names(tool("a__b"), {"type": "namespace", "name": "a", "tools": [tool("b")]})
    assert (first, re.fullmatch(r"a__b_[0-9a-f]{8}", second) is not None) == ("a__b", True)


@pytest.mark.parametrize("name", ["x" * 65, "mcp.demo/add", "größe", "a b", "x" * 300])
def test_a_name_that_chat_forbids_becomes_legal_and_distinct(name: str) -> None:
    made = chat_name(name)
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", made)
    assert made != chat_name(name + "!")


@pytest.mark.parametrize("name", ["x" * 64, "a-b_C9"])
def test_a_legal_name_stays(name: str) -> None:
    assert name == chat_name(name)


@pytest.mark.parametrize(("namespace", "name"), [("mcp__demo", "add"), ("n" * 60, "tool.with.dots"), ("a b", "c")])
def test_a_flattened_name_is_restored_on_the_way_back(namespace: str, name: str) -> None:
    chat = rendered(tools=[{"type": "namespace", "name": namespace, "tools": [tool(name)]}])
    item = call_item(resolve(chat.refs, chat.body["tools"][0]["function"]["name"]), "{}")
    assert {"type": "function_call", "name": name, "namespace": namespace, "arguments": "{}"} == item


def test_a_replayed_call_has_the_same_chat_name_as_the_tool() -> None:
    namespace = {"type": "namespace", "name": "n" * 60, "tools": [tool("tool.a")]}
    call = {"type": "function_call", "call_id": "c", "name": "tool.a", "namespace": "n" * 60, "arguments": "{}"}
    answer = {"type": "function_call_output", "call_id": "c", "output": ""}
    body = rendered(tools=[namespace], input=[user(), call, answer]).body
    assert body["tools"][0]["function"]["name"] == body["messages"][1]["tool_calls"][0]["function"]["name"]


@pytest.mark.parametrize("kind", ["apply_patch", "shell", "local_shell"])
def test_a_client_executed_tool_is_a_function_of_its_own_name(kind: str) -> None:
    assert [kind] == names({"type": kind})


@pytest.mark.parametrize(
    "kind", ["web_search", "file_search", "code_interpreter", "mcp", "image_generation", "computer"]
)
def test_a_hosted_tool_is_left_out_and_named(kind: str) -> None:
    chat = rendered(tools=[FUNCTION, {"type": kind}])
    assert (("tools[1].type=" + kind,), 1) == (chat.ignored, len(chat.body["tools"]))


# -- tool search -------------------------------------------------------------------------------------------------------

SEARCH: Json = {"type": "tool_search", "execution": "client", "description": "Find.", "parameters": SCHEMA}
FOUND: list[Json] = [
    user(),
    {"type": "tool_search_call", "call_id": "c", "arguments": {"query": "add"}, "execution": "client"},
    {"type": "tool_search_output", "call_id": "c", "execution": "client", "tools": [NAMESPACE]},
]


def test_a_search_on_the_client_is_a_function_and_deferred_tools_wait() -> None:
    assert names(SEARCH, NAMESPACE, {**FUNCTION, "defer_loading": True}) == ["tool_search", "mcp__demo__run"]


def test_a_search_on_the_server_is_not_needed_as_every_tool_is_loaded() -> None:
    assert names({"type": "tool_search"}, NAMESPACE) == ["mcp__demo__add", "mcp__demo__run"]


def test_tools_that_a_search_has_found_join_the_tools() -> None:
    assert names(SEARCH, NAMESPACE, input=FOUND) == ["tool_search", "mcp__demo__run", "mcp__demo__add"]


def test_the_path_of_a_wrong_tool_counts_its_deferred_neighbours() -> None:
    wrong = {**NAMESPACE, "tools": [{**FUNCTION, "defer_loading": True}, {"type": "function"}]}
    assert refused(tools=[SEARCH, wrong])[2] == "tools[1].tools[1].name"


def test_additional_tools_join_the_tools() -> None:
    more = {"type": "additional_tools", "role": "developer", "tools": [NAMESPACE]}
    assert names(FUNCTION, input=[more, user()]) == ["look", "mcp__demo__add", "mcp__demo__run"]


def test_deferred_additional_tools_wait_for_a_search_on_the_client() -> None:
    more = {"type": "additional_tools", "role": "developer", "tools": [NAMESPACE]}
    assert names(SEARCH, input=[more, user()]) == ["tool_search", "mcp__demo__run"]


def test_a_search_call_is_replayed_as_a_call_and_its_finding() -> None:
    _, said, answer = messages(*FOUND, tools=[SEARCH])
    assert (
        said["tool_calls"][0]["function"]["arguments"],
        answer["content"],
    ) == ('{"query":"add"}', "Loaded tools: mcp__demo")


# -- tool choice -------------------------------------------------------------------------------------------------------

BOTH = [FUNCTION, CUSTOM]


@pytest.mark.parametrize(
    ("dialect", "choice", "sent", "offered"),
    [
        ("generic", None, None, ["look", "exec"]),
        ("generic", "auto", None, ["look", "exec"]),
        ("generic", "none", "none", ["look", "exec"]),
        ("generic", "required", "required", ["look", "exec"]),
        ("mistral", "required", "any", ["look", "exec"]),
        ("ollama", "none", None, []),
        ("generic", {"type": "function", "name": "look"}, "required", ["look"]),
        ("openai", {"type": "function", "name": "look"}, {"type": "function", "function": {"name": "look"}}, ["look"]),
        ("vllm", {"type": "custom", "name": "exec"}, {"type": "function", "function": {"name": "exec"}}, ["exec"]),
        ("ollama", {"type": "function", "name": "look"}, None, ["look"]),
        ("mistral", {"type": "custom", "name": "exec"}, "any", ["exec"]),
    ],
)
def test_a_choice_is_said_as_the_dialect_can(dialect: str, choice: Any, sent: Any, offered: list[str]) -> None:
    body = rendered(dialect, tools=BOTH, tool_choice=choice).body
    assert (sent, offered) == (body.get("tool_choice"), [t["function"]["name"] for t in body.get("tools", ())])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_a_demand_that_the_backend_cannot_hear_is_named(choice: Any) -> None:
    assert rendered("ollama", tools=BOTH, tool_choice=choice).ignored == ("tool_choice",)


def test_a_demand_without_tools_is_named() -> None:
    chat = rendered(tool_choice="required")
    assert (chat.ignored, "tool_choice" in chat.body) == (("tool_choice",), False)


@pytest.mark.parametrize(("mode", "sent"), [("auto", None), ("required", "required")])
def test_allowed_tools_are_the_only_ones_sent(mode: str, sent: str | None) -> None:
    allowed = [{"type": "custom", "name": "exec"}, {"type": "namespace", "name": "mcp__demo"}]
    choice = {"type": "allowed_tools", "mode": mode, "tools": allowed}
    body = rendered(tools=[FUNCTION, CUSTOM, NAMESPACE], tool_choice=choice).body
    assert (sent, ["exec", "mcp__demo__add", "mcp__demo__run"]) == (
        body.get("tool_choice"),
        [t["function"]["name"] for t in body["tools"]],
    )


def test_an_allowed_hosted_tool_is_named() -> None:
    allowed = [{"type": "function", "name": "look"}, {"type": "web_search"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
    assert rendered(tools=BOTH, tool_choice=choice).ignored == ("tool_choice.tools[1].type=web_search",)


@pytest.mark.parametrize("kind", ["web_search", "web_search_preview", "mcp", "code_interpreter"])
def test_the_choice_of_a_hosted_tool_is_left_out_and_named(kind: str) -> None:
    chat = rendered(tools=BOTH, tool_choice={"type": kind})
    assert (("tool_choice.type=" + kind,), False) == (chat.ignored, "tool_choice" in chat.body)


def test_a_tool_is_chosen_by_its_bare_name_where_only_one_namespace_has_it() -> None:
    assert names(NAMESPACE, tool_choice={"type": "function", "name": "add"}) == ["mcp__demo__add"]


@pytest.mark.parametrize(
    ("choice", "code", "param"),
    [
        ("invalid_choice", "invalid_value", "tool_choice"),
        ({"type": "wish"}, "invalid_value", "tool_choice.type"),
        ({}, "invalid_value", "tool_choice.type"),
        ({"type": "function"}, "missing_required_parameter", "tool_choice.name"),
        ({"type": "function", "name": ["look"]}, "invalid_type", "tool_choice.name"),
        ({"type": "function", "function": {"name": "look"}}, "missing_required_parameter", "tool_choice.name"),
        ({"type": "function", "name": "gone"}, None, "tool_choice"),
        ({"type": "custom", "name": "look"}, None, "tool_choice"),
        ({"type": "shell"}, None, "tool_choice"),
        ({"type": "allowed_tools", "tools": []}, None, "tool_choice.mode"),
        ({"type": "allowed_tools", "mode": "auto"}, "missing_required_parameter", "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [5]}, "invalid_value", "tool_choice.tools[0].type"),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "gone"}]},
            None,
            "tool_choice.tools[0]",
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "namespace", "name": "gone"}]},
            None,
            "tool_choice.tools[0]",
        ),
    ],
)
def test_a_choice_of_nothing_is_a_400_with_its_path(choice: Any, code: str | None, param: str) -> None:
    assert (400, code, param) == refused(tools=BOTH, tool_choice=choice)[:3]


@pytest.mark.parametrize(
    ("dialect", "asked", "sent"),
    [("generic", False, False), ("generic", True, None), ("generic", None, None), ("ollama", False, None)],
)
def test_parallel_calls_are_turned_off_where_the_backend_knows_how(dialect: str, asked: Any, sent: Any) -> None:
    assert sent is rendered(dialect, tools=BOTH, parallel_tool_calls=asked).body.get("parallel_tool_calls")


# -- calls back to the client ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "arguments", "item"),
    [
        (ToolRef("function", "a"), '{"x": 1}', {"type": "function_call", "name": "a", "arguments": '{"x": 1}'}),
        (ToolRef("custom", "a"), '{"input":"x"}', {"type": "custom_tool_call", "name": "a", "input": "x"}),
        (ToolRef("custom", "a"), '{"code":"x"}', {"type": "custom_tool_call", "name": "a", "input": "x"}),
        (ToolRef("custom", "a"), "raw", {"type": "custom_tool_call", "name": "a", "input": "raw"}),
        (ToolRef("custom", "a"), '{"input":5}', {"type": "custom_tool_call", "name": "a", "input": '{"input":5}'}),
        (
            ToolRef("custom", "a", "n"),
            '{"input":""}',
            {"type": "custom_tool_call", "name": "a", "input": "", "namespace": "n"},
        ),
        (
            ToolRef("tool_search", "tool_search"),
            '{"query":"q"}',
            {"type": "tool_search_call", "arguments": {"query": "q"}, "execution": "client"},
        ),
        (
            ToolRef("tool_search", "tool_search"),
            "[]",
            {"type": "tool_search_call", "arguments": {}, "execution": "client"},
        ),
        (
            ToolRef("apply_patch", "apply_patch"),
            '{"type":"delete_file","path":"a","diff":"x"}',
            {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}},
        ),
        (
            ToolRef("apply_patch", "apply_patch"),
            '{"type":"create_file","path":"a"}',
            {"type": "apply_patch_call", "operation": {"type": "create_file", "path": "a", "diff": ""}},
        ),
        (
            ToolRef("shell", "shell"),
            '{"commands":"ls","timeout_ms":5}',
            {"type": "shell_call", "action": {"commands": ["ls"], "timeout_ms": 5, "max_output_length": None}},
        ),
        (
            ToolRef("local_shell", "local_shell"),
            '{"command":["ls",1],"working_directory":"/"}',
            {
                "type": "local_shell_call",
                "action": {"type": "exec", "command": ["ls", "1"], "env": {}, "working_directory": "/"},
            },
        ),
    ],
)
def test_a_call_comes_back_in_the_item_of_its_tool(ref: ToolRef, arguments: str, item: Json) -> None:
    assert item == call_item(ref, arguments)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("apply_patch", '{"type":"rename","path":"a"}'),
        ("apply_patch", '{"type":"create_file"}'),
        ("shell", "{}"),
        ("shell", '{"commands":5}'),
        ("local_shell", "broken"),
    ],
)
def test_arguments_that_fit_no_typed_call_come_back_as_a_function_call(kind: str, arguments: str) -> None:
    assert {"type": "function_call", "name": kind, "arguments": arguments} == call_item(ToolRef(kind, kind), arguments)


def test_a_namespaced_tool_called_by_its_bare_name_is_understood() -> None:
    ref = ToolRef("function", "add", "mcp__demo")
    assert ref == resolve({"mcp__demo__add": ref}, "add")


def test_a_bare_name_that_two_namespaces_share_stays_as_it_is() -> None:
    refs = {f"{n}__add": ToolRef("function", "add", n) for n in ("a", "b")}
    assert ToolRef("function", "add") == resolve(refs, "add")


def test_a_name_that_nobody_declared_stays_a_function_call() -> None:
    assert ToolRef("function", "made_up") == resolve({}, "made_up")
