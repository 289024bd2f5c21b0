"""Where the keys come from: the settings, or a file that is made once however many start at once, and rotated."""

from __future__ import annotations

import base64
import logging
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keys import KeyFile, load_keys, rotate_keys

OLD, NEW = b"o" * 32, b"\xfb\xff" * 16  # the second has both letters in which the two base64 alphabets differ


def b64(key: bytes) -> str:
    return base64.b64encode(key).decode()


@pytest.mark.parametrize(
    "text", [b64(NEW), base64.urlsafe_b64encode(NEW).decode(), b64(NEW).rstrip("="), f" {b64(NEW)}\n"]
)
def test_a_key_is_base64_of_either_alphabet(text: str) -> None:
    assert load_keys((text, b64(OLD)), None) == (NEW, OLD)


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
        load_keys((b64(OLD), text), None)
    assert str(caught.value) == "Invalid key 2 in sealing.keys: expected base64 of 32 bytes."
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_keys_of_the_settings_leave_the_file_alone(tmp_path: Path) -> None:
    assert load_keys((b64(OLD),), tmp_path / "key") == (OLD,)
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_the_key_is_a_fresh_one() -> None:
    keys = {load_keys((), None) for _ in range(100)}
    assert (len(keys), {len(key) for (key,) in keys}) == (100, {32})


def test_a_missing_file_is_made_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "key"
    made = load_keys((), file)
    assert load_keys((), file) == made
    assert file.read_text() == b64(made[0]) + "\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_there_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(b64(OLD))
    monkeypatch.delattr(os, "link")
    assert load_keys((), tmp_path / "key") == (OLD,)


def test_the_key_of_one_file_is_not_that_of_another(tmp_path: Path) -> None:
    assert load_keys((), tmp_path / "a") != load_keys((), tmp_path / "b")


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_keys((), tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_each_line_of_the_file_is_a_key_and_the_first_seals(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{b64(NEW)}\r\n\n{b64(OLD)}")
    assert load_keys((), tmp_path / "key") == (NEW, OLD)


@pytest.mark.parametrize("content", [b"", b"\n", b"secret\n", b"\xff\xfe", b64(OLD)[:-3].encode()])
def test_a_file_without_a_good_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="key") as caught:
        load_keys((), file)
    assert str(caught.value) == f"Invalid key 1 in {file}: expected base64 of 32 bytes."
    assert file.read_bytes() == content


def test_who_comes_second_takes_the_key_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "key", os.link

    def link_too_late(source: str, target: Path) -> None:
        file.write_text(b64(OLD))
        link(source, target)

    monkeypatch.setattr(os, "link", link_too_late)
    assert load_keys((), file) == (OLD,)
    assert list(tmp_path.iterdir()) == [file]


def test_who_start_at_once_have_one_key(tmp_path: Path) -> None:
    start = threading.Barrier(8, timeout=10)

    def load(_: int) -> tuple[bytes, ...]:
        start.wait()
        return load_keys((), tmp_path / "key")

    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(load, range(8)))
    assert (len(keys), list(tmp_path.iterdir())) == (1, [tmp_path / "key"])


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_keys((), tmp_path / "no" / "key")


# -- rotation ----------------------------------------------------------------------------------------------------------


def keys_of(file: Path) -> list[bytes]:
    return [base64.b64decode(line) for line in file.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A key file with one key."""
    path = tmp_path / "key"
    path.write_text(b64(OLD))
    return path


def test_a_rotation_puts_a_fresh_key_before_the_others(file: Path) -> None:
    for _ in range(3):
        before = keys_of(file)
        rotate_keys((), file)
        first, *others = keys_of(file)
        assert (len(first), others, first in before) == (32, before, False)


def test_a_rotation_says_what_it_did_and_shows_no_key(file: Path) -> None:
    said = rotate_keys((), file)
    expected = "a fresh key is first now, of 2 keys; running processes take it over by themselves"
    assert said == f"{file}: {expected}"


def test_a_rotation_without_a_file_makes_one(tmp_path: Path) -> None:
    said = rotate_keys((), tmp_path / "key")
    assert (said, len(keys_of(tmp_path / "key"))) == (f"{tmp_path / 'key'}: made, with 1 key", 1)


def test_a_rotation_leaves_one_file_that_only_its_owner_may_read(file: Path) -> None:
    file.chmod(0o644)
    rotate_keys((), file)
    assert (stat.S_IMODE(file.stat().st_mode), list(file.parent.iterdir())) == (0o600, [file])


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_rotation_by_root_leaves_the_file_to_its_owner(file: Path) -> None:
    os.chown(file, 12345, -1)
    rotate_keys((), file)
    assert file.stat().st_uid == 12345


def test_a_rotation_follows_a_link_to_the_file(file: Path) -> None:
    link = file.parent / "elsewhere"
    link.symlink_to(file)
    rotate_keys((), link)
    assert (link.is_symlink(), len(keys_of(file))) == (True, 2)


@pytest.mark.parametrize("name", ["fsync", "chown", "replace"])
def test_a_rotation_that_fails_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space"):
        rotate_keys((), file)
    assert (file.read_text(), list(file.parent.iterdir())) == (b64(OLD), [file])


def test_the_new_file_is_whole_on_the_disk_before_it_takes_the_place_of_the_old(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("replaced"), replace(old, new)))
    rotate_keys((), file)
    assert steps == [file.stat().st_size, "replaced", file.parent.stat().st_size]


def test_a_malformed_file_is_not_rotated(file: Path) -> None:
    file.write_text("no key\n")
    with pytest.raises(ValueError, match=r"^Invalid key 1 in .*: expected base64 of 32 bytes\.$"):
        rotate_keys((), file)
    assert file.read_text() == "no key\n"


def test_keys_of_the_settings_are_rotated_by_hand(file: Path) -> None:
    said, key = rotate_keys((b64(OLD),), file).splitlines()
    assert said == "sealing.keys is set, so no key file is used: put this key first there, before the others"
    assert (len(base64.b64decode(key)), b64(OLD) == key, keys_of(file)) == (32, False, [OLD])


def test_without_a_file_there_is_nothing_to_rotate() -> None:
    with pytest.raises(ValueError, match="':memory:' has no key file to rotate"):
        rotate_keys((), None)


@pytest.mark.parametrize("is_there", [True, False])
def test_rotations_at_once_lose_no_key(file: Path, is_there: bool) -> None:
    if not is_there:
        file.unlink()
    start = threading.Barrier(8, timeout=10)

    def rotate(_: int) -> set[bytes]:
        start.wait()
        for _ in range(10):
            rotate_keys((), file)
        return set(keys_of(file))

    with ThreadPoolExecutor(8) as pool:
        seen = set().union(*pool.map(rotate, range(8)))
    assert (len(keys_of(file)), seen - set(keys_of(file))) == (80 + is_there, set())


def test_who_makes_the_file_first_is_not_overwritten_by_a_rotation(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.unlink()
    link = os.link

    def link_too_late(source: str, target: Path) -> None:
        file.write_text(b64(OLD))
        link(source, target)

    monkeypatch.setattr(os, "link", link_too_late)
    rotate_keys((), file)
    assert keys_of(file)[1:] == [OLD]


# -- a file that changes -----------------------------------------------------------------------------------------------


def test_the_first_look_at_a_file_tells_its_keys(file: Path) -> None:
    assert KeyFile(file).changed() == (OLD,)


def test_a_file_that_was_rotated_is_read_once(file: Path) -> None:
    watched = KeyFile(file)
    watched.changed()
    rotate_keys((), file)
    assert [watched.changed(), watched.changed()] == [tuple(keys_of(file)), ()]


def test_only_another_stat_makes_it_read_the_file_again(file: Path) -> None:
    watched = KeyFile(file)
    watched.changed()
    times = file.stat()
    file.write_text(b64(NEW))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert watched.changed() == ()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert watched.changed() == (NEW,)


@pytest.mark.parametrize("content", ["", "no key\n", b64(OLD)[:-3]])
def test_a_malformed_file_is_logged_once_and_not_shown(
    file: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    watched = KeyFile(file)
    watched.changed()
    file.write_text(content)
    assert [watched.changed() for _ in range(3)] == [()] * 3
    expected = f"the sealing keys stay as they were: Invalid key 1 in {file}: expected base64 of 32 bytes."
    assert caplog.record_tuples == [("responses_proxy.keys", logging.WARNING, expected)]


def test_a_missing_file_is_logged_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = KeyFile(file)
    file.unlink()
    assert [watched.changed() for _ in range(3)] == [()] * 3
    expected = f"the sealing keys stay as they were: [Errno 2] No such file or directory: '{file}'"
    assert caplog.messages == [expected]


def test_a_file_that_is_well_again_is_read(file: Path) -> None:
    watched = KeyFile(file)
    for broken, well in ((lambda: file.write_text("no key"), (OLD,)), (file.unlink, (NEW, OLD))):
        broken()
        assert watched.changed() == ()
        file.write_text("\n".join(map(b64, well)))
        assert watched.changed() == well


def test_a_file_that_could_not_be_opened_is_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, say: it did not change, and was not read."""
    watched = KeyFile(file)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", Path("/nowhere").read_text)
        assert watched.changed() == ()
    assert watched.changed() == (OLD,)


def test_each_failure_after_a_good_look_is_logged(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = KeyFile(file)
    for well in ((NEW, OLD), (OLD,)):
        file.unlink()
        watched.changed()
        file.write_text("\n".join(map(b64, well)))
        watched.changed()
    assert len(caplog.messages) == 2
