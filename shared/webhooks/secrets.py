"""Secrets that sign webhooks: `whsec_` and base64 of 32 random bytes (Standard Webhooks allows 24
to 64).
"""

from __future__ import annotations

import base64
import secrets

PREFIX = "whsec_"
_BYTES = 32


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(_BYTES)).decode()
