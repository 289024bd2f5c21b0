"""The settings: one TOML file, overridden by the environment, overridden by flags; one frozen dataclass a section.

May not read anything but that file and the environment, nor open what the settings name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from auth import AuthSettings
from background import BackgroundSettings
from compaction import CompactionSettings
from errors import Json
from logs import Form
from origins import refuse_malformed
from passing import PassthroughSettings
from quotas import QuotaSettings
from request import RequestLimits
from sealing import SealingSettings
from sockets import WebSocketSettings
from store import StoreSettings
from stream_plan import ReasoningSettings
from tracing import TracingSettings
from turns import TurnSettings
from upstream import UpstreamSettings, settings_for

ENV_PREFIX = "RESPONSES_PROXY_"
FILE_MODE = re.compile("0?[0-7]{3}")


@dataclass(frozen=True)
class ServerSettings:
    """The section `[server]`."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(le=65535)] = 8080
    unix_socket: str = ""
    unix_socket_mode: str = "0660"
    cors_origins: tuple[str, ...] = ()
    keepalive_s: Annotated[float, msgspec.Meta(gt=0)] = 15.0
    shutdown_grace_s: float = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Form = "console"
    access_log: bool = False

    def __post_init__(self) -> None:
        refuse_malformed(self.cors_origins)
        if not FILE_MODE.fullmatch(self.unix_socket_mode):
            raise ValueError(
                f"unix_socket_mode: expected three octal digits as in '0660', got {self.unix_socket_mode!r}"
            )


@dataclass(frozen=True)
class LimitSettings(RequestLimits, QuotaSettings):
    """The section `[limits]`."""

    body_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """The whole file; every section belongs to a room."""

    server: ServerSettings = field(default_factory=ServerSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    websocket: WebSocketSettings = field(default_factory=WebSocketSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    sealing: SealingSettings = field(default_factory=SealingSettings)
    turns: TurnSettings = field(default_factory=TurnSettings)
    background: BackgroundSettings = field(default_factory=BackgroundSettings)
    compaction: CompactionSettings = field(default_factory=CompactionSettings)
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)
    passthrough: PassthroughSettings = field(default_factory=PassthroughSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    upstream: tuple[UpstreamSettings, ...] = ()


SECTIONS: dict[str, type[Any]] = {
    "server": ServerSettings,
    "auth": AuthSettings,
    "limits": LimitSettings,
    "websocket": WebSocketSettings,
    "store": StoreSettings,
    "sealing": SealingSettings,
    "turns": TurnSettings,
    "background": BackgroundSettings,
    "compaction": CompactionSettings,
    "reasoning": ReasoningSettings,
    "passthrough": PassthroughSettings,
    "tracing": TracingSettings,
    "upstream": UpstreamSettings,
}


class SettingsError(Exception):
    """A setting that is unknown, malformed or missing; the message is for the person at the terminal."""


def load_settings(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The file, overridden by the environment, overridden by the flags. Raises: SettingsError."""
    tables = _read_file(path) if path else {}
    upstreams = list(tables.pop("upstream", ()))
    for given in (_from_environ(environ), flags):
        for section, values in given.items():
            if section == "upstream":
                upstreams[:1] = [{**(upstreams[0] if upstreams else {}), **values}]
            else:
                tables[section] = {**tables.get(section, {}), **values}
    sections = {name: _section(SECTIONS, name, table) for name, table in tables.items()}
    return Settings(**sections, upstream=_checked(tuple(_upstream(table) for table in upstreams)))


def settings_of_environ() -> Settings:
    """What `uvicorn proxy:app` runs with."""
    path = os.environ.get("RESPONSES_PROXY_CONFIG")
    return load_settings(Path(path) if path else None, os.environ, {})


def _upstream(table: Json) -> UpstreamSettings:
    """A table without a name is named after its host."""
    settings: UpstreamSettings = _section(SECTIONS, "upstream", table)
    try:
        named = settings_for(settings.base_url)
    except ValueError as error:
        raise SettingsError(f"upstream.base_url: {error}: {settings.base_url!r}") from error
    return settings if "name" in table else dataclasses.replace(settings, name=named.name)


def _checked(upstreams: tuple[UpstreamSettings, ...]) -> tuple[UpstreamSettings, ...]:
    """Refuses a fallback that is not exactly one other upstream, or that is named twice."""
    names = [each.name for each in upstreams]
    for each in upstreams:
        for name in each.fallback:
            shown = f"upstream.fallback '{name}' of '{each.name}'"
            if name not in names:
                raise SettingsError(_unknown("upstream", f"'{name}' in the fallback of '{each.name}'", name, names))
            if name == each.name:
                raise SettingsError(f"{shown}: an upstream is no fallback of itself")
            if names.count(name) > 1 or each.fallback.count(name) > 1:
                raise SettingsError(f"{shown}: there are two of that name")
    return upstreams


def _read_file(path: Path) -> Json:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # neither TOML nor, perhaps, text
        raise SettingsError(f"{path}: {error}") from error
    for name, table in tables.items():
        if name not in SECTIONS:
            raise SettingsError(_unknown("section", f"[{name}]", name, SECTIONS))
        inner = table if name == "upstream" else [table]
        if not isinstance(inner, list) or not all(isinstance(each, dict) for each in inner):
            form = "[[upstream]]" if name == "upstream" else f"[{name}]"
            raise SettingsError(f"{path}: '{name}' has to be a table: {form}")
    return tables


def _from_environ(environ: Mapping[str, str]) -> dict[str, Json]:
    """RESPONSES_PROXY_SECTION__KEY; UPSTREAM means the first one, and UPSTREAM__URL is short for its base_url."""
    given: dict[str, Json] = {}
    for name, value in environ.items():
        section, two, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if name.startswith(ENV_PREFIX) and two:
            key = "base_url" if (section, key) == ("upstream", "url") else key
            given.setdefault(section, {})[key] = _value(section, key, value)
    return given


def _value(section: str, key: str, text: str) -> Any:
    """A variable's text as a file would have its value; names that are unknown are told with those of the file."""
    hints = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    read = READERS.get(hints.get(key))
    try:
        return read(text) if read else text
    except ValueError as error:  # without the text: headers hold secrets
        raise SettingsError(f"{section}.{key} {error}") from None


def _texts(text: str) -> list[str]:
    return [stripped for part in text.split(",") if (stripped := part.strip())]


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in _texts(text)]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError("has to be given as name=value,name=value")
    return {name.rstrip(): value.lstrip() for name, _, value in pairs}


# The type of a setting -> what makes it of a variable's text; all others are single values.
READERS: dict[Any, Callable[[str], Any]] = {
    tuple[str, ...]: _texts,
    Mapping[str, str]: _pairs,
    dict[str, str]: _pairs,
}


def _section(sections: Mapping[str, type[Any]], name: str, table: Any) -> Any:
    cls = sections.get(name)
    if cls is None:
        raise SettingsError(_unknown("section", f"[{name}]", name, sections))
    known = [each.name for each in dataclasses.fields(cls)]
    for key in table:
        if key not in known:
            raise SettingsError(_unknown("setting", f"{name}.{key}", key, known))
    try:
        section = msgspec.convert(table, cls, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise SettingsError(f"[{name}]: {error}") from error
    for key in known:
        value = getattr(section, key)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise SettingsError(f"{name}.{key} has to be a number, 0 or more; got {value}")
    return section


def _unknown(what: str, shown: str, given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"unknown {what} {shown}" + (f"; did you mean '{close[0]}'?" if close else "")
