"""What an API key looks like, and when a server wants one."""

from __future__ import annotations

import pytest

from api.auth import is_loopback, key_required
from api.limits import rate_headers
from shared.errors import ConfigurationError
from shared.keys import tokens
from shared.keys.principal import Principal, Scope
from shared.settings import load_settings


def test_a_key_carries_its_id_and_matches_its_hash_alone() -> None:
    key_id = tokens.new_key_id()
    key, other = tokens.new_key(key_id), tokens.new_key(key_id)
    assert tokens.key_id_of(key) == key_id
    assert tokens.matches(key, tokens.hash_key(key))
    assert tokens.matches(key, tokens.hash_key(other), tokens.hash_key(key))
    assert not tokens.matches(key, tokens.hash_key(other), None)
    assert not tokens.matches(key[:-1], tokens.hash_key(key))
    assert len(key.rpartition("_")[2]) >= 40 or "_" in key  # 256 bits


@pytest.mark.parametrize(
    "text", ["", "x", "vdk_", "vdk_abc_def", "sk-0123", "vdk_" + "0" * 26, "vdk_" + "u" * 26 + "_s", "\x00"]
)
def test_what_is_no_key_has_no_id(text: str) -> None:
    assert tokens.key_id_of(text) is None


@pytest.mark.parametrize(
    ("environ", "needed"),
    [
        ({}, False),
        ({"VDIFF_HOST": "::1"}, False),
        ({"VDIFF_HOST": "localhost"}, False),
        ({"VDIFF_HOST": "0.0.0.0"}, True),
        ({"VDIFF_HOST": "::"}, True),
        ({"VDIFF_HOST": "gpu.example"}, True),
        ({"VDIFF_HOST": "0.0.0.0", "VDIFF_AUTH": "open"}, False),
        ({"VDIFF_AUTH": "required"}, True),
        ({"VDIFF_API_KEY": "k"}, True),
        ({"VDIFF_API_KEY": "k", "VDIFF_AUTH": "open"}, False),
    ],
)
def test_a_key_is_needed_beyond_loopback(environ: dict[str, str], needed: bool) -> None:
    assert key_required(load_settings(environ)) is needed


def test_loopback_is_all_of_127() -> None:
    assert is_loopback("127.8.8.8")
    assert not is_loopback("10.0.0.1")


def test_a_bad_auth_setting_stops_and_a_key_does_not_show() -> None:
    with pytest.raises(ConfigurationError, match="VDIFF_AUTH"):
        load_settings({"VDIFF_AUTH": "maybe"})
    assert "hush" not in repr(load_settings({"VDIFF_API_KEY": "hush"}))


def test_admin_may_everything() -> None:
    assert Principal("t", frozenset({"admin"})).may(Scope.WEBHOOKS)
    assert not Principal("t", frozenset({"jobs"})).may(Scope.WEBHOOKS)


def test_rate_headers() -> None:
    headers = rate_headers(100, 7, 12.2)
    assert headers["RateLimit"] == '"requests";r=7;t=13'
    assert headers["RateLimit-Policy"] == '"requests";q=100;w=60'
    assert headers["x-ratelimit-remaining-requests"] == "7"
