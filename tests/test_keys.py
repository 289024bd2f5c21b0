"""Where the keys come from: the settings, or a file that is made once however many start at once."""

from __future__ import annotations

import base64
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keys import SealingSettings, load_keys

OLD, NEW = b"o" * 32, b"\xfb\xff" * 16  # the second has both letters in which the two base64 alphabets differ


def b64(key: bytes) -> str:
    return base64.b64encode(key).decode()


@pytest.mark.parametrize(
    "text", [b64(NEW), base64.urlsafe_b64encode(NEW).decode(), b64(NEW).rstrip("="), f" {b64(NEW)}\n"]
)
def test_a_key_is_base64_of_either_alphabet(text: str) -> None:
    assert load_keys(SealingSettings((text, b64(OLD))), None) == (NEW, OLD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=",
        "secret!",
        "sécret",
        "\ud800",
        b64(OLD) * 2,
        "!" + b64(OLD),
        *(b64(b"k" * size) for size in (16, 29, 31, 33, 35, 64)),
    ],
)
def test_a_malformed_key_is_refused_by_its_place_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match="key") as caught:
        load_keys(SealingSettings((b64(OLD), text)), None)
    assert str(caught.value) == "Invalid key 2 in sealing.keys: expected base64 of 32 bytes."
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_keys_of_the_settings_leave_the_file_alone(tmp_path: Path) -> None:
    assert load_keys(SealingSettings((b64(OLD),)), tmp_path / "key") == (OLD,)
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_the_key_is_a_fresh_one() -> None:
    keys = {load_keys(SealingSettings(), None) for _ in range(100)}
    assert (len(keys), {len(key) for (key,) in keys}) == (100, {32})


def test_a_missing_file_is_made_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "key"
    made = load_keys(SealingSettings(), file)
    assert load_keys(SealingSettings(), file) == made
    assert file.read_text() == b64(made[0]) + "\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_there_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(b64(OLD))
    monkeypatch.delattr(os, "link")
    assert load_keys(SealingSettings(), tmp_path / "key") == (OLD,)


def test_the_key_of_one_file_is_not_that_of_another(tmp_path: Path) -> None:
    assert load_keys(SealingSettings(), tmp_path / "a") != load_keys(SealingSettings(), tmp_path / "b")


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_keys(SealingSettings(), tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_each_line_of_the_file_is_a_key_and_the_first_seals(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{b64(NEW)}\r\n\n{b64(OLD)}")
    assert load_keys(SealingSettings(), tmp_path / "key") == (NEW, OLD)


@pytest.mark.parametrize("content", [b"", b"\n", b"secret\n", b"\xff\xfe", b64(OLD)[:-3].encode()])
def test_a_file_without_a_good_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="key") as caught:
        load_keys(SealingSettings(), file)
    assert str(caught.value) == f"Invalid key 1 in {file}: expected base64 of 32 bytes."
    assert file.read_bytes() == content


def test_who_comes_second_takes_the_key_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "key", os.link

    def link_too_late(source: str, target: Path) -> None:
        file.write_text(b64(OLD))
        link(source, target)

    monkeypatch.setattr(os, "link", link_too_late)
    assert load_keys(SealingSettings(), file) == (OLD,)
    assert list(tmp_path.iterdir()) == [file]


def test_who_start_at_once_have_one_key(tmp_path: Path) -> None:
    start = threading.Barrier(8, timeout=10)

    def load(_: int) -> tuple[bytes, ...]:
        start.wait()
        return load_keys(SealingSettings(), tmp_path / "key")

    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(load, range(8)))
    assert (len(keys), list(tmp_path.iterdir())) == (1, [tmp_path / "key"])


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_keys(SealingSettings(), tmp_path / "no" / "key")
