"""The format of API keys, and the comparison of a given key with a stored hash. Pure.

    vdk_01j9z3k8w5q2e7r4t6y8u0i2o4_5Qw...      prefix, the key's public id, 43 characters (256
                                               random bits)

Stored is the SHA-256 of the whole: with 256 random bits nothing can be guessed from it, so a slow
hash would only make every request slow.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from shared.ids import is_id, new_id

PREFIX = "vdk"
ID_PREFIX = "key"
_SECRET_BYTES = 32


def new_key_id() -> str:
    return new_id(ID_PREFIX)


def new_key(key_id: str) -> str:
    """A fresh secret for the key `key_id`; the only time that it is seen."""
    return f"{PREFIX}_{key_id.removeprefix(ID_PREFIX + '_')}_{secrets.token_urlsafe(_SECRET_BYTES)}"


def key_id_of(key: str) -> str | None:
    """The id inside a key; None for something that is no key of ours."""
    prefix, _, rest = key.partition("_")
    tail, _, secret = rest.partition("_")
    key_id = f"{ID_PREFIX}_{tail}"
    return key_id if prefix == PREFIX and secret and is_id(key_id, ID_PREFIX) else None


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def matches(key: str, *stored: str | None) -> bool:
    """Return whether a stored hash is of this key; takes the same time wherever they differ."""
    given = hash_key(key)
    found = False
    for one in stored:
        found |= hmac.compare_digest(given, one or "")
    return found


def same_text(given: str, expected: str) -> bool:
    """Compares two secrets in a time that tells nothing about them."""
    return hmac.compare_digest(hash_key(given), hash_key(expected))
