"""Tokens are counted in a vocabulary that is on the disk, whole; nothing but `fetch` brings one there."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken_ext.openai_public as published
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy import main
from vocabulary import SLICE_CHARS, VOCABULARIES, VocabularyError, fetch, load

O200K = "o200k_base"
O200K_FILE = "fb374d419588a4632f3f557e76b4b70aebbca790"
# Every byte, and every pair of some, so that it shows in the count where a text was cut.
PAIRED = [letter.encode() for letter in "theTHE'sS123 \r\n\t/.,"]
PAIRS = [one + other for one in PAIRED for other in PAIRED]
TOKENS = [*(bytes([byte]) for byte in range(256)), *PAIRS, b"the", b" the"]
CONTENT = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(TOKENS))
PIECES = [
    *"theTHE123 \r\n\t/.,éªʰ\u0301😀中_",
    "the",
    "The",
    "THE",
    "'s",
    "'S",
    "123",
    "  ",
    "..",
    "//",
    "<|endoftext|>",
]
ODD = ["", "\0", "\ud83d", "\udc00\ud800", "\ud83d\ude00", "a\ud800b", "\u0301" * 50, "<|endoftext|>", "\ufeff", "😀"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabularies are of a few tokens, and no variable says where they are kept."""
    for name, known in VOCABULARIES.items():
        monkeypatch.setitem(VOCABULARIES, name, known._replace(sha256=hashlib.sha256(CONTENT).hexdigest()))
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was downloaded: each address is answered with the tiny vocabulary."""
    addresses: list[str] = []
    monkeypatch.setattr("tiktoken.load.read_file", lambda address: addresses.append(address) or CONTENT)
    return addresses


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tiktoken is told to keep its files."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def file(folder: Path) -> Path:
    """A vocabulary that is there."""
    (folder / O200K_FILE).write_bytes(CONTENT)
    return folder / O200K_FILE


def encoding_of(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[tiktoken.Encoding, dict[str, Any]]:
    """The encoding as tiktoken builds it, of our tokens, and what it would have read."""
    asked: dict[str, Any] = {}

    def load_tiktoken_bpe(url: str, expected_hash: str) -> dict[bytes, int]:
        asked.update(url=url, sha256=expected_hash)
        return {token: rank for rank, token in enumerate(TOKENS)}

    monkeypatch.setattr(published, "load_tiktoken_bpe", load_tiktoken_bpe)
    return tiktoken.Encoding(**published.ENCODING_CONSTRUCTORS[name]()), asked


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_table_says_what_tiktoken_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, asked = encoding_of(name, monkeypatch)
    assert (VOCABULARIES[name].url, VOCABULARIES[name].sha256) == (asked["url"], asked["sha256"])


@pytest.mark.parametrize("name", VOCABULARIES)
def test_texts_are_counted_as_tiktoken_counts_them(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(name)
    count = load(name)
    encoding, _ = encoding_of(name, monkeypatch)
    assert count

    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
    @example("12312")
    @example("..\n/")
    @example("the\n ")
    def check(text: str) -> None:
        assert count(text) == len(encoding.encode(text, disallowed_special=()))

    check()


# -- counting ----------------------------------------------------------------------------------------------------------


def test_tokens_are_counted(file: Path) -> None:
    count = load(O200K)
    assert count
    assert [count(text) for text in ("", "the", "the the", "x", "é")] == [0, 1, 2, 1, 2]


def test_special_tokens_count_as_the_text_they_are(file: Path) -> None:
    count = load(O200K)
    assert count
    assert count("<|endoftext|>") > 5


@pytest.mark.parametrize("text", ODD)
def test_no_text_is_refused(file: Path, text: str) -> None:
    count = load(O200K)
    assert count
    assert 0 <= count(text) <= 4 * len(text)


@pytest.mark.parametrize("text", [" " * 1_100_000, "a" * 1_100_000, " " * 1_000_000 + "x", "\ud800" * 100_000])
def test_a_million_of_one_letter_does_not_end_the_program(file: Path, text: str) -> None:
    count = load(O200K)
    assert count
    assert count(text) >= len(text) / 2


def test_a_long_text_is_counted_in_slices_without_losing_any(file: Path) -> None:
    count = load(O200K)
    assert count
    assert [count("x " * n) for n in (SLICE_CHARS // 2, SLICE_CHARS, SLICE_CHARS * 2 + 1)] == [
        SLICE_CHARS,
        SLICE_CHARS * 2,
        SLICE_CHARS * 4 + 2,
    ]


# -- on the disk -------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_none_and_is_not_downloaded(folder: Path, asked: list[str]) -> None:
    assert (load(O200K), asked, list(folder.iterdir())) == (None, [], [])


def test_what_is_there_is_read_and_not_downloaded(file: Path, asked: list[str]) -> None:
    assert (load(O200K) is None, asked) == (False, [])


@pytest.mark.parametrize("content", [b"", b"\n", CONTENT[:-1], CONTENT + b"\n", b"<html>", b"\xff" * 1000])
def test_a_file_that_is_not_whole_is_none_and_stays(file: Path, asked: list[str], content: bytes) -> None:
    file.write_bytes(content)
    assert (load(O200K), asked, file.read_bytes()) == (None, [], content)


def test_a_file_that_cannot_be_read_is_none(file: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert (load(O200K), asked) == (None, [])


def test_a_pipe_in_the_place_of_a_file_is_none(folder: Path) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(folder / O200K_FILE)
    assert load(O200K) is None


@pytest.mark.parametrize(
    ("environ", "kept"),
    [
        ({"TIKTOKEN_CACHE_DIR": "{tmp}/a"}, "a"),
        ({"DATA_GYM_CACHE_DIR": "{tmp}/b"}, "b"),
        ({"TIKTOKEN_CACHE_DIR": "{tmp}/a", "DATA_GYM_CACHE_DIR": "{tmp}/b"}, "a"),
        ({"TIKTOKEN_CACHE_DIR": "", "XDG_CACHE_HOME": "{tmp}/c"}, "c/responses-proxy"),
        ({"XDG_CACHE_HOME": "{tmp}/c"}, "c/responses-proxy"),
        ({}, "home/.cache/responses-proxy"),
        ({}, "temp/data-gym-cache"),
        ({"TMPDIR": "", "TEMP": "{tmp}/d"}, "d/data-gym-cache"),
    ],
)
def test_the_places_are_those_of_tiktoken_and_one_that_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], kept: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    environ = {name: value.format(tmp=tmp_path) for name, value in ({"TMPDIR": "{tmp}/temp"} | environ).items()}
    before = load(O200K, environ)
    (tmp_path / kept).mkdir(parents=True)
    (tmp_path / kept / O200K_FILE).write_bytes(CONTENT)
    assert (before is None, load(O200K, environ) is None) == (True, False)


def test_a_damaged_file_in_one_place_does_not_hide_a_whole_one_in_another(tmp_path: Path) -> None:
    for place, content in (("responses-proxy", b"damaged"), ("data-gym-cache", CONTENT)):
        (tmp_path / place).mkdir()
        (tmp_path / place / O200K_FILE).write_bytes(content)
    assert load(O200K, {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)})


def test_the_temporary_folder_is_that_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(Path, "is_file", lambda path: bool(looked.append(str(path))))
    load(O200K)
    assert looked[-1] == os.path.join(tempfile.gettempdir(), "data-gym-cache", O200K_FILE)


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_a_fetched_vocabulary_is_kept_where_tiktoken_finds_it(folder: Path, asked: list[str]) -> None:
    assert (fetch(O200K), asked) == (folder / O200K_FILE, [VOCABULARIES[O200K].url])
    assert load(O200K)


def test_without_a_choice_it_is_kept_where_a_reboot_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch(O200K) == tmp_path / "responses-proxy" / O200K_FILE
    assert load(O200K, {"XDG_CACHE_HOME": str(tmp_path)})


def test_what_is_there_is_not_fetched_again(file: Path, asked: list[str]) -> None:
    assert (fetch(O200K), asked) == (file, [])


def test_a_damaged_file_is_fetched_again(file: Path, asked: list[str]) -> None:
    file.write_bytes(CONTENT[:-1])
    fetch(O200K)
    assert (file.read_bytes(), len(asked)) == (CONTENT, 1)


def test_what_came_from_elsewhere_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a network that asks for a password, say."""
    monkeypatch.setattr("tiktoken.load.read_file", lambda address: b"<html>")
    with pytest.raises(VocabularyError, match="Hash mismatch"):
        fetch(O200K)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "file" / "inside"))
    with pytest.raises(VocabularyError, match="Not a directory"):
        fetch(O200K)


def test_a_failure_says_what_belongs_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(address: str) -> bytes:
        raise ConnectionError("no way there")

    monkeypatch.setattr("tiktoken.load.read_file", fail)
    with pytest.raises(VocabularyError) as caught:
        fetch(O200K)
    by_hand = f"it can be brought by hand, as {folder / O200K_FILE}"
    assert str(caught.value) == f"{VOCABULARIES[O200K].url} could not be fetched; {by_hand}\nno way there"


@pytest.mark.parametrize(("arguments", "name"), [([], O200K), (["cl100k_base"], "cl100k_base")])
def test_the_command_fetches_the_vocabulary_that_it_names(
    folder: Path, asked: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], name: str
) -> None:
    assert main(["fetch-vocab", *arguments]) == 0
    (kept,) = folder.iterdir()
    assert (capsys.readouterr().out, asked) == (f"{name}: {kept}\n", [VOCABULARIES[name].url])
    assert load(name)
