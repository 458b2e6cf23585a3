"""Encrypt secrets before they are stored, with keys that are not in the database.

    VDIFF_SECRET_KEYS=NEW,OLD     the first key encrypts, every key decrypts

A stored secret is `fernet:KEY_ID:TOKEN` (Fernet: AES-128-CBC with HMAC-SHA256). The key id is the
start of the key's SHA-256; it says which key decrypts a value and which values still have an older
key. Without keys, secrets are stored as they are. A value without the prefix is such a clear one.

The columns that hold secrets, and their SQL, are in `shared.webhooks.stored_secrets`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.fernet import Fernet
    from pydantic import SecretStr

PREFIX = "fernet"
CLEAR = "clear"  # stands for the key id of a value that is not encrypted
KEY_BYTES = 32
SETTING = "VDIFF_SECRET_KEYS"


def new_key() -> str:
    """Return a fresh key: 32 random bytes in URL-safe base64, as Fernet takes it."""
    return base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def parse_keys(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of keys. Raises ValueError, without any part of a key."""
    keys = tuple(part.strip() for part in text.split(",") if part.strip())
    for number, key in enumerate(keys, 1):
        try:
            raw = base64.b64decode(key.encode("ascii"), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raw = b""
        if len(raw) != KEY_BYTES:
            raise ValueError(
                f"key {number} must be {KEY_BYTES} bytes in URL-safe base64; `vdiff secrets new-key` makes one"
            )
    return keys


def id_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:8]


class Vault:
    """Encrypts with the first key and decrypts with each of them."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._fernets: dict[str, Fernet] = {}
        if keys:
            from cryptography.fernet import Fernet

            self._fernets = {id_of(key): Fernet(key) for key in keys}

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of the keys; the first one encrypts."""
        return tuple(self._fernets)

    @property
    def seals_as(self) -> str:
        """The key id of what is stored now, or `clear`."""
        return next(iter(self._fernets), CLEAR)

    def seal(self, text: str) -> str:
        """Return a secret as it is stored."""
        if not self._fernets:
            return text
        key_id = self.seals_as
        return f"{PREFIX}:{key_id}:{self._fernets[key_id].encrypt(text.encode()).decode()}"

    def unseal(self, stored: str) -> str:
        """Return a stored secret in clear. Raises ConfigurationError: its key is not among ours."""
        key_id = sealed_with(stored)
        if key_id == CLEAR:
            return stored
        if key_id not in self._fernets:
            raise ConfigurationError(unknown_keys_message([key_id]), param="secret_keys")
        from cryptography.fernet import InvalidToken

        try:
            return self._fernets[key_id].decrypt(stored.rpartition(":")[2]).decode()
        except InvalidToken as exc:
            message = f"a stored secret is damaged: key {key_id} does not decrypt it"
            raise ConfigurationError(message, param="secret_keys") from exc


def sealed_with(stored: str) -> str:
    """Return the id of the key that a stored secret is encrypted with, or `clear`."""
    prefix, _, rest = stored.partition(":")
    return rest.partition(":")[0] if prefix == PREFIX else CLEAR


def unknown_keys_message(key_ids: Sequence[str]) -> str:
    named = ", ".join(key_ids)
    return f"{SETTING} lacks the key {named}, with which stored webhook secrets are encrypted; add it to the list"


@lru_cache(maxsize=8)
def _vault(text: str) -> Vault:
    return Vault(parse_keys(text))


def vault_of(secret_keys: SecretStr | None) -> Vault:
    """Return the vault with the keys of the setting."""
    return _vault("" if secret_keys is None else secret_keys.get_secret_value())
