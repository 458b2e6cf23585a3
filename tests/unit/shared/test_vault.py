"""Secrets at rest: encrypted with the first key, readable with each, and never in an error message."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.settings import load_settings
from shared.vault import CLEAR, Vault, id_of, new_key, sealed_with, vault_of
from vdiff import local
from vdiff.doctor import secrets

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KEY = base64.urlsafe_b64encode(b"k" * 32).decode()


def test_a_sealed_secret_shows_nothing_and_names_its_key() -> None:
    key = new_key()
    vault = Vault([key])
    sealed = vault.seal(SECRET)
    assert SECRET not in sealed and sealed != vault.seal(SECRET)
    assert sealed_with(sealed) == id_of(key) == vault.seals_as
    assert vault.unseal(sealed) == SECRET
    assert vault.unseal(SECRET) == SECRET  # stored before there was a key


def test_the_first_key_encrypts_and_every_key_decrypts() -> None:
    old, new = new_key(), new_key()
    both = Vault([new, old])
    assert both.unseal(Vault([old]).seal(SECRET)) == SECRET
    assert sealed_with(both.seal(SECRET)) == id_of(new)
    with pytest.raises(ConfigurationError, match=f"lacks the key {id_of(old)}") as refused:
        Vault([new]).unseal(Vault([old]).seal(SECRET))
    assert old not in refused.value.message and refused.value.param == "secret_keys"


def test_without_keys_secrets_stay_as_they_are() -> None:
    assert Vault().seal(SECRET) == SECRET and Vault().seals_as == CLEAR
    assert vault_of(load_settings({}).secret_keys).key_ids == ()


def test_a_damaged_value_is_an_error_that_does_not_quote_it() -> None:
    vault = Vault([new_key()])
    sealed = vault.seal(SECRET)
    with pytest.raises(ConfigurationError, match="damaged") as refused:
        vault.unseal(sealed[:-6] + "AAAAAA")
    assert sealed[-20:-6] not in refused.value.message


@pytest.mark.parametrize("bad", ["x", "a" * 43, f"{KEY},short", "Ä" * 44, KEY[:-1]])
def test_bad_keys_are_refused_without_being_shown(bad: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"VDIFF_SECRET_KEYS: key [12] must be 32 bytes"
    ) as refused:
        load_settings({"VDIFF_SECRET_KEYS": bad})
    assert bad.split(",")[-1] not in refused.value.message or len(bad) == 1
    key = new_key()
    assert key not in repr(load_settings({"VDIFF_SECRET_KEYS": key}))


def test_the_key_of_a_folder_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    made = local.ensure_secret_key(tmp_path)
    file = tmp_path / local.SECRET_KEY_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert local.ensure_secret_key(tmp_path).get_secret_value() == made.get_secret_value()
    found = local.with_local_services(load_settings({"VDIFF_DATA_DIR": str(tmp_path)}))
    assert (
        found.secret_keys is not None
        and found.secret_keys.get_secret_value() == made.get_secret_value()
    )
    elsewhere = {"VDIFF_DATA_DIR": str(tmp_path), "VDIFF_DATABASE_URL": "postgresql://db.example/x"}
    assert local.with_local_services(load_settings(elsewhere)).secret_keys is None
    file.write_text("\n")
    with pytest.raises(ConfigurationError, match="no usable key"):
        local.ensure_secret_key(tmp_path)


class Count:
    def __init__(self, key_id: str, count: int) -> None:
        self.key_id, self.stored = key_id, count


def test_the_doctor_says_how_secrets_are_stored() -> None:
    key = new_key()
    keyed = Vault([key])
    assert secrets([], Vault()).state == "note" and "in clear" in secrets([], Vault()).text
    assert secrets([Count(id_of(key), 3)], keyed).state == "ok"
    old = secrets([Count(CLEAR, 2), Count(id_of(key), 3)], keyed)
    assert (old.state, old.text[:2], old.advice) == ("note", "2 ", "run `vdiff secrets rotate`")
    lost = secrets([Count("0123abcd", 1)], keyed)
    assert lost.state == "bad" and "0123abcd" in lost.text
