"""What is sealed opens for the same kind, owner and item, and for nobody else; and where the keys come from."""

from __future__ import annotations

import base64
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealing import HEAD_BYTES, SealingSettings, Seals, load_keys

OLD, NEW = b"o" * 32, b"\xfb\xff" * 16  # the second has both letters in which the two base64 alphabets differ
SEALS = Seals((OLD,))
BLOB = SEALS.seal("reasoning", "alice", "rs_1", b"a thought")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def b64(key: bytes) -> str:
    return base64.b64encode(key).decode()


def opened(blob: str, kind: str = "reasoning", owner: str = "alice", item_id: str | None = "rs_1") -> bytes | None:
    return SEALS.open(kind, owner, item_id, blob)


# -- blobs -------------------------------------------------------------------------------------------------------------


def test_what_is_sealed_opens_for_its_kind_owner_and_item() -> None:
    assert opened(BLOB) == b"a thought"


@settings(deadline=None)
@given(st.text(), st.text(), st.text(), st.binary())
def test_any_names_and_payload_go_through_byte_for_byte(kind: str, owner: str, item_id: str, payload: bytes) -> None:
    blob = SEALS.seal(kind, owner, item_id, payload)
    assert SEALS.open(kind, owner, item_id, blob) == SEALS.open(kind, owner, None, blob) == payload


def test_a_blob_says_that_it_is_ours_and_fits_into_a_url() -> None:
    assert BLOB.startswith("rp1_")
    assert set(BLOB.removeprefix("rp1_")) <= set(ALPHABET)


def test_a_blob_shows_nothing_of_what_is_in_it() -> None:
    raw = base64.urlsafe_b64decode(BLOB.removeprefix("rp1_") + "==")
    assert [word for word in (b"thought", b"rs_1", b"alice", b"reasoning") if word in raw] == []


def test_the_same_payload_is_sealed_differently_each_time() -> None:
    assert len({SEALS.seal("reasoning", "alice", "rs_1", b"a thought") for _ in range(100)}) == 100


def test_another_owner_gets_nothing() -> None:
    assert opened(BLOB, owner="bob") is None


def test_another_kind_gets_nothing() -> None:
    assert opened(BLOB, kind="compaction") is None


@pytest.mark.parametrize(
    ("kind", "owner"),
    [("reasoninga", "lice"), ("reasonin", "galice"), ("", "reasoningalice"), ("reasoning\0\0\0\5", "alice")],
)
def test_kind_and_owner_do_not_run_into_each_other(kind: str, owner: str) -> None:
    assert opened(BLOB, kind=kind, owner=owner) is None


@pytest.mark.parametrize("item_id", ["rs_2", "", "rs_", "rs_1a", "\ud800"])
def test_another_item_gets_nothing(item_id: str) -> None:
    assert opened(BLOB, item_id=item_id) is None


def test_an_item_without_its_id_gets_what_was_sealed() -> None:
    assert opened(BLOB, item_id=None) == b"a thought"


def test_another_key_opens_nothing() -> None:
    assert Seals((NEW,)).open("reasoning", "alice", "rs_1", BLOB) is None


def test_every_key_opens_and_the_first_seals() -> None:
    both = Seals((NEW, OLD))
    blob = both.seal("reasoning", "alice", "rs_1", b"later")
    assert both.open("reasoning", "alice", "rs_1", BLOB) == b"a thought"
    assert (Seals((NEW,)).open("reasoning", "alice", "rs_1", blob), opened(blob)) == (b"later", None)


@pytest.mark.parametrize("place", range(len(BLOB)))
def test_a_blob_with_another_letter_anywhere_opens_nothing(place: int) -> None:
    """In the last place too, where two of the six bits mean nothing."""
    others = [BLOB[:place] + letter + BLOB[place + 1 :] for letter in ALPHABET if letter != BLOB[place]]
    assert {opened(other) for other in others} == {None}


@pytest.mark.parametrize("size", range(len(BLOB)))
def test_a_blob_cut_anywhere_opens_nothing(size: int) -> None:
    assert opened(BLOB[:size]) is None


@pytest.mark.parametrize("more", ["=", "==", "\n", " ", "!", "A", "AAAA", "é"])
def test_a_blob_with_letters_added_opens_nothing(more: str) -> None:
    assert [opened(blob) for blob in (BLOB + more, more + BLOB, BLOB[:30] + more + BLOB[30:])] == [None] * 3


def test_the_other_base64_alphabet_opens_nothing() -> None:
    blob = next(b for b in iter(lambda: SEALS.seal("k", "o", "i", b"x" * 99), "") if "-" in b[4:] and "_" in b[4:])
    assert SEALS.open("k", "o", "i", blob[:4] + blob[4:].replace("-", "+").replace("_", "/")) is None


@pytest.mark.parametrize(
    "blob",
    ["", "rp1_", "rp1_====", "rp1_é", "\ud800", "rp1_\ud800", "\x00", "rp2_" + BLOB[4:], "gAAAAABhZ", "x" * 10**7],
)
def test_garbage_opens_nothing(blob: str) -> None:
    assert opened(blob) is None


@settings(deadline=None)
@given(st.binary(max_size=2 * HEAD_BYTES))
def test_garbage_that_names_our_key_opens_nothing(tail: bytes) -> None:
    raw = base64.urlsafe_b64decode(BLOB.removeprefix("rp1_") + "==")[:4] + tail
    assert opened("rp1_" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()) is None


@settings(deadline=None)
@given(st.text(st.characters()))
def test_no_string_raises(blob: str) -> None:
    assert [opened(blob), opened("rp1_" + blob)] == [None, None]


@pytest.mark.parametrize("keys", [(), (b"short",), (OLD, b"k" * 16), (b"",)])
def test_seals_need_keys_of_32_bytes(keys: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match=r"^Sealing needs at least one key, each of 32 bytes\.$"):
        Seals(keys)


# -- keys --------------------------------------------------------------------------------------------------------------


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
