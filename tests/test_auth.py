"""Callers and their owners: what each mode takes, what it refuses, and that no message shows a key."""

from __future__ import annotations

import hashlib
import hmac
import string
from collections.abc import Mapping
from typing import Any

import pytest

from auth import AuthSettings, Caller, Owners, new_key
from errors import Unauthorized

SECRET = b"s" * 32
ALICE, BOB = "rp-alice", "rp-bob"
NAMED = {"alice": "sha256:" + hashlib.sha256(ALICE.encode()).hexdigest(), "bob": "sha256:" + "0" * 64}
HEX = "0123456789abcdef"
MISSING = "Missing API key: send it in the header 'Authorization: Bearer <key>'."
ABSENT = [None, "", " ", "Bearer", "Bearer ", "bearer   ", "Basic YTpi", f"Token {ALICE}", ALICE]
GOOD_FORMS = [f"Bearer {ALICE}", f"bearer {ALICE}", f"BEARER {ALICE}", f"  Bearer   {ALICE}  "]


def owners(mode: Any, keys: Mapping[str, str] | None = None, secret: bytes = SECRET) -> Owners:
    return Owners(AuthSettings(mode, keys or {}), secret)


def refusal(found: Owners, authorization: str | None) -> tuple[int, str | None, str]:
    with pytest.raises(Unauthorized) as caught:
        found.caller(authorization)
    return caught.value.http_status, caught.value.error_code, caught.value.message


def malformed(settings: AuthSettings) -> str:
    with pytest.raises(ValueError, match="auth") as caught:
        Owners(settings, SECRET)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    return str(caught.value)


# -- none --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", [*ABSENT, *GOOD_FORMS])
def test_without_a_mode_everybody_is_one_owner(authorization: str | None) -> None:
    assert Owners(AuthSettings(), SECRET).caller(authorization) == Caller("", None)


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", GOOD_FORMS)
def test_a_known_key_gives_its_name_and_is_not_passed_on(authorization: str) -> None:
    assert owners("keys", NAMED).caller(authorization) == Caller("alice", None)


def test_every_client_has_its_own_name() -> None:
    found = owners("keys", {**NAMED, "bob2": "sha256:" + hashlib.sha256(BOB.encode()).hexdigest().upper()})
    assert [found.caller(f"Bearer {key}").owner for key in (ALICE, BOB)] == ["alice", "bob2"]


@pytest.mark.parametrize("authorization", ABSENT)
def test_a_missing_key_is_refused(authorization: str | None) -> None:
    assert refusal(owners("keys", NAMED), authorization) == (401, "invalid_api_key", MISSING)


@pytest.mark.parametrize(
    "key",
    [BOB, ALICE + "x", ALICE[:-1], ALICE.upper(), f"{ALICE} x", NAMED["alice"], NAMED["alice"][7:], "é", "\ud800"],
)
def test_an_unknown_key_is_refused_and_not_shown(key: str) -> None:
    found = refusal(owners("keys", NAMED), f"Bearer {key}")
    assert found == (401, "invalid_api_key", "Incorrect API key provided.")


def test_a_key_is_compared_with_every_hash_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one == other)
        return one == other

    found = owners("keys", NAMED)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    found.caller(f"Bearer {ALICE}")
    assert compared == [True, False]


def test_the_mode_needs_keys() -> None:
    assert (
        malformed(AuthSettings("keys"))
        == "auth.mode is 'keys', but auth.keys names no key: 'responses-proxy key' makes one."
    )


@pytest.mark.parametrize("mode", ["none", "passthrough"])
def test_keys_that_nobody_would_look_at_are_refused(mode: Any) -> None:
    message = f"auth.keys are given, but auth.mode is '{mode}', which does not look at them."
    assert malformed(AuthSettings(mode, NAMED)) == message


@pytest.mark.parametrize(
    "value", ["", ALICE, "a" * 64, "md5:" + "a" * 64, "sha256:" + "a" * 63, "sha256:" + "g" * 64, f"{NAMED['alice']}\n"]
)
def test_a_malformed_hash_is_refused_by_its_name_and_not_shown(value: str) -> None:
    message = "Invalid auth.keys.carol: expected 'sha256:' and 64 hexadecimal digits."
    assert malformed(AuthSettings("keys", {**NAMED, "carol": value})) == message


def test_a_key_needs_a_name_since_the_empty_one_is_everybodys() -> None:
    assert malformed(AuthSettings("keys", {"": NAMED["alice"]})) == "Invalid auth.keys: a key has an empty name."


# -- passthrough -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", GOOD_FORMS)
def test_a_token_is_passed_on_and_its_owner_is_a_pseudonym(authorization: str) -> None:
    pseudonym = hmac.new(SECRET, ALICE.encode(), "sha256").hexdigest()[:32]
    assert owners("passthrough").caller(authorization) == Caller(pseudonym, ALICE)


def test_every_token_and_every_secret_has_its_own_owner() -> None:
    found = [
        owners("passthrough", secret=secret).caller(f"Bearer {key}").owner for secret in (b"1", b"2") for key in "ab"
    ]
    assert (len(set(found)), {len(owner) for owner in found}) == (4, {32})


@pytest.mark.parametrize("authorization", ABSENT)
def test_a_missing_token_is_refused(authorization: str | None) -> None:
    assert refusal(owners("passthrough"), authorization) == (401, "invalid_api_key", MISSING)


@pytest.mark.parametrize("token", ["é", "\ud800", "a b"])
def test_an_odd_token_is_the_backends_to_judge(token: str) -> None:
    assert owners("passthrough").caller(f"Bearer {token}").bearer == token


# -- new keys ----------------------------------------------------------------------------------------------------------


def test_a_new_key_is_known_by_its_hash() -> None:
    key, hashed = new_key()
    assert owners("keys", {"dave": hashed}).caller(f"Bearer {key}") == Caller("dave", None)


def test_a_new_key_has_43_letters_that_need_no_quoting() -> None:
    key, hashed = new_key()
    assert (key[:3], len(key), hashed[:7], len(hashed)) == ("rp-", 46, "sha256:", 71)
    assert (set(key) <= {*string.ascii_letters, *string.digits, *"-_"}, set(hashed[7:]) <= set(HEX)) == (True, True)


def test_no_two_new_keys_are_alike() -> None:
    assert len({new_key() for _ in range(100)}) == 100
