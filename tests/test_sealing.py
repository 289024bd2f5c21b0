"""What is sealed opens for the same kind, owner and item, and for nobody else."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys import KeyFile, load_keys, rotate_keys
from sealing import HEAD_BYTES, Seals

OLD, NEW = b"o" * 32, b"\xfb\xff" * 16
SEALS = Seals((OLD,))
BLOB = SEALS.seal("reasoning", "alice", "rs_1", b"a thought")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


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


GARBAGE = ["", "rp1_", "rp1_====", "rp1_é", "\ud800", "rp1_\ud800", "\x00", "rp2_" + BLOB[4:], "gAAAAABhZ", "x" * 10**7]


@pytest.mark.parametrize("blob", GARBAGE, ids=range(len(GARBAGE)))
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


# -- keys that change --------------------------------------------------------------------------------------------------


class Process:
    """Seals as a process has them, on a key file that it shares with others."""

    def __init__(self, file: Path) -> None:
        self.seals = Seals(load_keys((), file), KeyFile(file).changed)

    def seal(self) -> str:
        return self.seals.seal("reasoning", "alice", "rs_1", b"a thought")

    def opens(self, blob: str) -> bool:
        return self.seals.open("reasoning", "alice", "rs_1", blob) == b"a thought"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "key"


def is_of_first_key(blob: str, file: Path) -> bool:
    return Seals(load_keys((), file)[:1]).item_id("reasoning", "alice", blob) == "rs_1"


def test_processes_on_one_file_understand_each_other_during_a_rotation(file: Path) -> None:
    running, sealing = Process(file), Process(file)
    before = sealing.seal()
    rotate_keys((), file)
    started = Process(file)
    blobs = [before, started.seal(), sealing.seal(), running.seal()]
    assert [[process.opens(blob) for blob in blobs] for process in (running, sealing, started)] == [[True] * 4] * 3


def test_a_blob_by_a_new_key_opens_without_a_restart(file: Path) -> None:
    running = Process(file)
    rotate_keys((), file)
    assert running.opens(Process(file).seal())


def test_a_blob_by_a_new_key_names_its_item_without_a_restart(file: Path) -> None:
    running = Process(file)
    rotate_keys((), file)
    assert running.seals.item_id("reasoning", "alice", Process(file).seal()) == "rs_1"


def test_a_lone_process_seals_with_the_new_key_after_a_rotation(file: Path) -> None:
    running = Process(file)
    running.seal()
    rotate_keys((), file)
    assert is_of_first_key(running.seal(), file)


def test_several_rotations_are_taken_over_in_one_look(file: Path) -> None:
    running = Process(file)
    blobs = []
    for _ in range(3):
        rotate_keys((), file)
        blobs.append(Process(file).seal())
    assert [running.opens(blob) for blob in blobs] == [True] * 3


def test_a_key_that_was_taken_out_of_the_file_opens_nothing_more(file: Path) -> None:
    running = Process(file)
    blob = running.seal()
    rotate_keys((), file)
    file.write_text(file.read_text().splitlines()[0])
    assert running.opens(Process(file).seal())
    assert not running.opens(blob)


@pytest.mark.parametrize("break_it", [Path.unlink, lambda file: file.write_text("no key")])
def test_a_file_that_is_gone_or_malformed_leaves_the_old_keys_in_force(
    file: Path, break_it: Callable[[Path], object]
) -> None:
    running, other = Process(file), Process(file)
    break_it(file)
    assert not running.opens(Seals((NEW,)).seal("reasoning", "alice", "rs_1", b"a thought"))
    assert other.opens(running.seal())


def test_only_a_key_that_is_not_known_causes_a_look_at_the_file() -> None:
    looks: list[None] = []
    seals = Seals((OLD,), lambda: looks.append(None) or ())
    for blob in (BLOB, BLOB[:-1], "rp1_", "", "garbage", "rp1_" + "!" * 40, BLOB[:-6] + "AAAAAA"):
        seals.open("reasoning", "alice", "rs_1", blob)
    assert looks == []
    assert seals.open("reasoning", "alice", "rs_1", Seals((NEW,)).seal("reasoning", "alice", "rs_1", b"x")) is None
    assert looks == [None]


def test_blobs_that_nobody_made_do_not_make_it_read_the_file_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Process(file)
    running.seal()
    monkeypatch.delattr(Path, "read_text")
    strange = [Seals((os.urandom(32),)).seal("reasoning", "alice", "rs_1", b"a thought") for _ in range(100)]
    assert [running.opens(blob) for blob in strange] == [False] * 100
