"""Reads the recorded answers in tests/wire: request, status, headers and the bytes of the body."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
WIRE = Path(__file__).parent / "wire"
TRAILER = re.compile(rb"\n?(?:### curl exit [^\n]*\n?)+\Z")
CURL_FAULT = re.compile(rb"curl: \(\d+\) [^\n]*\n*\Z")


@dataclass(frozen=True)
class Transcript:
    """One recorded answer; `request` is None where the recording has no JSON body, `cut` where curl saw it break."""

    name: str
    asked: str
    request: Json | None
    status: int
    headers: dict[str, str]
    body: bytes
    cut: bool

    @property
    def is_chat(self) -> bool:
        return "choices" in self.body.decode(errors="replace")

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")


def transcript(name: str) -> Transcript:
    """The transcript of that name, like `vllm/plain`."""
    data = (WIRE / f"{name}.txt").read_bytes()
    asked = []
    while data.startswith(b"###"):
        line, _, data = data.partition(b"\n")
        asked.append(line.removeprefix(b"###").strip().decode())
    head, _, body = re.sub(rb"\A\s+", b"", data).replace(b"\r\n", b"\n", 64).partition(b"\n\n")
    first, *lines = head.decode().split("\n")
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    body = TRAILER.sub(b"", body.lstrip(b"\r\n"))
    whole = CURL_FAULT.sub(b"", body)
    status = int(first.split()[1])
    return Transcript(name, (asked or [""])[0], _request(asked[1:]), status, headers, whole, whole != body)


def _request(asked: list[str]) -> Json | None:
    try:
        request: Json = json.loads(asked[0])
    except (IndexError, json.JSONDecodeError):
        return None
    return request


def transcripts() -> list[Transcript]:
    files = sorted(WIRE.glob("*/*.txt"))
    return [transcript(f"{file.parent.name}/{file.stem}") for file in files]
