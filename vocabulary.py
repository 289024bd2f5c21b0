"""The vocabularies in which tokens are counted: where they are on this machine, and how they get there.

May not download but in `fetch`, which a person asks for: what a request needs is on the disk, or is not there.
Source: tiktoken 0.14, load.py (the places) and openai_public.py (the vocabularies), read 2026-11-21.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tiktoken
from tiktoken.load import read_file_cached

CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
# At about a million spaces in a row tiktoken panics, past every `except Exception`. A cut adds a token or two.
SLICE_CHARS = 10_000


class Vocabulary(NamedTuple):
    """A file of tokens with their ranks, and the expression that cuts a text into words."""

    url: str
    sha256: str
    pattern: str


VOCABULARIES = {
    "o200k_base": Vocabulary(
        "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "cl100k_base": Vocabulary(
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ),
}


class VocabularyError(Exception):
    """A vocabulary that could not be fetched; the message is for the person at the terminal."""


def load(name: str, environ: Mapping[str, str] = os.environ) -> Callable[[str], int] | None:
    """Counts the tokens of any text, special ones as text; None without a whole vocabulary. Takes 0.4 s and 100 MB."""
    lines = next(filter(None, (_lines(name, path) for path in _places(name, environ))), None)
    if lines is None:
        return None
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    pattern = VOCABULARIES[name].pattern
    return partial(_count, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))


def _count(encoding: tiktoken.Encoding, text: str) -> int:
    return sum(len(encoding.encode_ordinary(text[at : at + SLICE_CHARS])) for at in range(0, len(text), SLICE_CHARS))


def fetch(name: str) -> Path:
    """The file that keeps a vocabulary; tiktoken downloads it unless it is there, whole. Raises: VocabularyError."""
    url, path = VOCABULARIES[name].url, _places(name, os.environ)[0]
    os.environ[CACHE_VARIABLE] = str(path.parent)  # there is no other way to tell tiktoken
    try:
        read_file_cached(url, VOCABULARIES[name].sha256)
    except (OSError, ValueError) as error:  # OSError: those of `requests` too
        raise VocabularyError(f"{url} could not be fetched; it can be brought by hand, as {path}\n{error}") from error
    return path


def _places(name: str, environ: Mapping[str, str]) -> list[Path]:
    """Where tiktoken keeps what it downloads; before its default, which a reboot empties, a place that lasts."""
    chosen = environ.get(CACHE_VARIABLE) or environ.get("DATA_GYM_CACHE_DIR")
    caches = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    temporary = next(filter(None, map(environ.get, ("TMPDIR", "TEMP", "TMP"))), "/tmp")
    unless_chosen = [Path(caches, "responses-proxy"), Path(temporary, "data-gym-cache")]
    file_name = hashlib.sha1(VOCABULARIES[name].url.encode()).hexdigest()
    return [folder / file_name for folder in ([Path(chosen)] if chosen else unless_chosen)]


def _lines(name: str, path: Path) -> list[bytes]:
    """Those of a whole vocabulary; none of any other file."""
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError:
        return []
    return content.splitlines() if hashlib.sha256(content).hexdigest() == VOCABULARIES[name].sha256 else []
