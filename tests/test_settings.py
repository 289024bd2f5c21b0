"""Settings: the file, the environment and the flags, and what is said of a mistake; the command line in process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import settings_of
from scripted import Backend

from commands import check
from proxy import main, parse_args, settings_of_args
from settings import Settings, SettingsError, load_settings, settings_of_environ

URL = "http://backend:8000/v1"
TWO = f"""
[server]
port = 1000
host = "0.0.0.0"
[[upstream]]
name = "first"
base_url = "{URL}"
models = ["a*"]
aliases = {{ "gpt-5" = "qwen3:30b" }}
[[upstream]]
base_url = "https://second.example/v1"
"""


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_file_fills_every_section(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, TWO), {}, {})
    first, second = settings.upstream
    assert (settings.server.port, settings.server.host) == (1000, "0.0.0.0")
    assert (first.name, first.models, first.aliases) == ("first", ("a*",), {"gpt-5": "qwen3:30b"})
    assert (second.name, second.base_url) == ("second.example", "https://second.example/v1")


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings(None, {}, {}) == Settings()


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environ = {
        "RESPONSES_PROXY_SERVER__PORT": "2000",
        "RESPONSES_PROXY_TURNS__STRICT": "true",
        "RESPONSES_PROXY_SERVER__KEEPALIVE_S": "2.5",
    }
    settings = load_settings(written(tmp_path, TWO), environ, {})
    assert (settings.server.port, settings.server.host) == (2000, "0.0.0.0")
    assert (settings.turns.strict, settings.server.keepalive_s) == (True, 2.5)


def test_flags_override_the_environment(tmp_path: Path) -> None:
    environ = {"RESPONSES_PROXY_SERVER__PORT": "2000"}
    settings = load_settings(written(tmp_path, TWO), environ, {"server": {"port": 3000}})
    assert settings.server.port == 3000


@pytest.mark.parametrize("name", ["RESPONSES_PROXY_UPSTREAM__URL", "RESPONSES_PROXY_UPSTREAM__BASE_URL"])
def test_the_environment_names_the_one_backend(name: str) -> None:
    (upstream,) = load_settings(None, {name: URL}, {}).upstream
    assert (upstream.base_url, upstream.name) == (URL, "backend")


def test_the_environment_changes_the_first_backend_only(tmp_path: Path) -> None:
    first, second = load_settings(written(tmp_path, TWO), {"RESPONSES_PROXY_UPSTREAM__API_KEY": "k"}, {}).upstream
    assert (first.api_key, first.name, second.api_key) == ("k", "first", "")


@pytest.mark.parametrize(
    ("text", "models"), [("a,b*", ("a", "b*")), (" a , b ,", ("a", "b")), ("qwen3:30b", ("qwen3:30b",)), ("", ())]
)
def test_a_variable_lists_names_between_commas(text: str, models: tuple[str, ...]) -> None:
    environ = {"RESPONSES_PROXY_UPSTREAM__URL": URL, "RESPONSES_PROXY_UPSTREAM__MODELS": text}
    (upstream,) = load_settings(None, environ, {}).upstream
    assert upstream.models == models


@pytest.mark.parametrize("name", ["ALIASES", "HEADERS"])
@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("gpt-5=qwen3:30b,gpt-4 = b", {"gpt-5": "qwen3:30b", "gpt-4": "b"}),
        ("x-key=c2VjcmV0==", {"x-key": "c2VjcmV0=="}),
        ("x-empty=", {"x-empty": ""}),
        ("", {}),
    ],
)
def test_a_variable_lists_a_table_as_pairs(name: str, text: str, pairs: dict[str, str]) -> None:
    environ = {"RESPONSES_PROXY_UPSTREAM__URL": URL, f"RESPONSES_PROXY_UPSTREAM__{name}": text}
    (upstream,) = load_settings(None, environ, {}).upstream
    assert getattr(upstream, name.lower()) == pairs


def test_an_empty_variable_empties_the_list_and_the_table_of_the_file(tmp_path: Path) -> None:
    environ = {"RESPONSES_PROXY_UPSTREAM__MODELS": "", "RESPONSES_PROXY_UPSTREAM__ALIASES": ""}
    first, _ = load_settings(written(tmp_path, TWO), environ, {}).upstream
    assert (first.models, first.aliases) == ((), {})


@pytest.mark.parametrize("text", ["s3cret", "a=b,s3cret", "=s3cret"])
def test_a_variable_without_pairs_is_told_but_not_shown(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"RESPONSES_PROXY_UPSTREAM__HEADERS": text}, {})
    assert str(caught.value) == "upstream.headers has to be given as name=value,name=value"


def test_a_file_does_not_list_between_commas(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="models"):
        load_settings(written(tmp_path, f"[[upstream]]\nbase_url = '{URL}'\nmodels = 'a,b'"), {}, {})


def test_other_variables_are_not_settings() -> None:
    environ = {"RESPONSES_PROXY_CONFIG": "x", "PATH": "y", "SERVER__PORT": "1", "OTHER__SERVER__PORT": "2"}
    assert load_settings(None, environ, {}) == Settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprot = 1", "unknown setting server.prot; did you mean 'port'?"),
        ("[servre]\nport = 1", "unknown section [servre]; did you mean 'server'?"),
        ("[zzz]", "unknown section [zzz]"),
        ("strict = true", "unknown section [strict]"),
        ("[server]\nport = 'many'", "[server]: "),
        ("[server]\nport = -1", "server.port"),
        ("[server]\nkeepalive_s = 0", "$.keepalive_s"),
        ("[server]\nport = 70000", "$.port"),
        ("[server]\nkeepalive_s = nan", "keepalive_s"),
        ("[server]\nshutdown_grace_s = -1", "server.shutdown_grace_s"),
        ("[server]\nlog_level = 'loud'", "[server]: "),
        ("[limits]\nbody_bytes = -5", "limits.body_bytes"),
        ("[turns]\ncreated_after_ms = -1", "turns.created_after_ms"),
        ("[reasoning]\nexpose = 'all'", "[reasoning]: "),
        ("server = 5", "[server]"),
        ("upstream = 5", "[[upstream]]"),
        ("[upstream]\nbase_url = 'http://x/v1'", "[[upstream]]"),
        ("[[upstream]]\nname = 'x'", "base_url must be an http(s) URL"),
        ("[[upstream]]\nbase_url = 'localhost:8000'", "base_url must be an http(s) URL"),
        ("[[upstream]]\nbase_url = 'http://['", "upstream"),
        ("[[upstream]]\nbase_url = 'http://x/v1'\ndialect = 'klingon'", "dialect must be auto or one of"),
        ("[[upstream]]\nbase_url = 'http://x/v1'\nretries = -1", "upstream.retries"),
        ("[[upstream]]\nbase_ulr = 'http://x/v1'", "did you mean 'base_url'?"),
        ("[server", "config.toml: "),
        (b"\xff\xfe", "config.toml: "),
    ],
)
def test_a_mistake_in_the_file_is_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(written(tmp_path, text), {}, {})
    assert said in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing\.toml: No such file"):
        load_settings(tmp_path / "missing.toml", {}, {})


@pytest.mark.parametrize("name", ["RESPONSES_PROXY_SERVER__PROT", "RESPONSES_PROXY_SERVR__PORT"])
def test_an_unknown_variable_of_ours_is_told(name: str) -> None:
    with pytest.raises(SettingsError, match="did you mean"):
        load_settings(None, {name: "1"}, {})


def test_the_command_line_becomes_settings() -> None:
    args = parse_args(["--upstream", URL, "--host", "::1", "--port", "0"])
    settings = settings_of_args(args, {})
    assert (args.command, settings.server.host, settings.server.port) == ("serve", "::1", 0)
    assert settings.upstream[0].base_url == URL


def test_the_config_flag_wins_over_the_variable(tmp_path: Path) -> None:
    args = parse_args(["check", "--config", str(written(tmp_path, TWO))])
    settings = settings_of_args(args, {"RESPONSES_PROXY_CONFIG": str(tmp_path / "missing.toml")})
    assert settings.upstream[0].name == "first"


def test_an_asgi_server_is_configured_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPONSES_PROXY_CONFIG", str(written(tmp_path, TWO)))
    monkeypatch.setenv("RESPONSES_PROXY_SERVER__PORT", "7")
    settings = settings_of_environ()
    assert (settings.server.port, settings.upstream[0].name) == (7, "first")


@pytest.mark.parametrize("arguments", [[], ["check"]])
def test_without_a_backend_the_exit_code_is_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("RESPONSES_PROXY_")]:
        monkeypatch.delenv(name)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("responses-proxy: no upstream: give --upstream URL")


async def test_check_tells_dialect_models_and_windows(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    model: dict[str, Any] = {"id": "qwen", "owned_by": "vllm", "max_model_len": 4096}
    backend.models = {"data": [model, {"id": "other", "owned_by": "vllm"}]}
    assert await check(settings_of(backend.url, upstream={"dialect": "auto", "name": "gpu"})) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"gpu ({backend.url}): dialect vllm, 2 model(s), tokenizer: no",
        "  qwen: window 4096 tokens",
        "  other: window not told",
    ]


async def test_check_tells_a_backend_that_cannot_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    assert await check(settings_of("http://127.0.0.1:1/v1")) == 1
    assert "cannot be reached" in capsys.readouterr().out


def test_the_check_command_gives_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--upstream", "http://127.0.0.1:1/v1"]) == 1
    assert capsys.readouterr().out.startswith("127.0.0.1 (http://127.0.0.1:1/v1): ")


@pytest.mark.parametrize(
    ("fallback", "message"),
    [
        ('["secnd"]', "unknown upstream 'secnd' in the fallback of 'first'; did you mean 'second'?"),
        ('["first"]', "upstream.fallback 'first' of 'first': an upstream is no fallback of itself"),
        ('["second", "second"]', "upstream.fallback 'second' of 'first': there are two of that name"),
        ('["twin"]', "upstream.fallback 'twin' of 'first': there are two of that name"),
    ],
)
def test_a_fallback_is_one_other_upstream(tmp_path: Path, fallback: str, message: str) -> None:
    tables = [f'[[upstream]]\nname = "{name}"\nbase_url = "{URL}"' for name in ("first", "second", "twin", "twin")]
    tables[0] += f"\nfallback = {fallback}"
    with pytest.raises(SettingsError) as caught:
        load_settings(written(tmp_path, "\n".join(tables)), {}, {})
    assert str(caught.value) == message
