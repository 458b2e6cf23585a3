"""The format of API keys, and when a server requires one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from api.auth import is_loopback, key_required
from api.limits import rate_headers
from shared.errors import ConfigurationError, Forbidden, InvalidRequest
from shared.keys import tokens
from shared.keys.principal import Limits, Principal, Scope
from shared.keys.requests import Giver, key_values
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
    "text",
    [
        "",
        "x",
        "vdk_",
        "vdk_abc_def",
        "sk-0123",
        "vdk_" + "0" * 26,
        "vdk_" + "u" * 26 + "_s",
        "\x00",
    ],
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


SOON = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], "body"),
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\x00"}, "name"),
        ({"name": 5}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes"),
        ({"name": "x", "scopes": "admin"}, "scopes"),
        ({"name": "x", "tenant": "a b"}, "tenant"),
        ({"name": "x", "weight": 1001}, "weight"),
        ({"name": "x", "weight": True}, "weight"),
        ({"name": "x", "max_queued_jobs": 0}, "max_queued_jobs"),
        ({"name": "x", "max_queued_tokens": 2**31}, "max_queued_tokens"),
        ({"name": "x", "expires_at": "tomorrow"}, "expires_at"),
        ({"name": "x", "id": "key_1"}, "id"),
    ],
)
def test_a_bad_key_is_named(body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        key_values(body, Giver("team", Limits()))
    assert refused.value.param == param


def test_what_a_new_key_does_not_name_is_its_givers() -> None:
    giver = Giver("team", Limits(60, None, 500), weight=3, expires_at=SOON)
    values = key_values({"name": "x"}, giver)
    assert (values["tenant"], values["requests_per_minute"], values["max_queued_tokens"]) == (
        "team",
        60,
        500,
    )
    assert (values["max_queued_jobs"], values["weight"], values["expires_at"]) == (None, 1, SOON)
    assert "admin" not in values["scopes"]
    assert (
        key_values({"name": "x"}, Giver("o", Limits(60), operator=True))["requests_per_minute"]
        is None
    )


@pytest.mark.parametrize(
    ("tenant", "limits", "weight", "expires_at", "param"),
    [
        ("other", Limits(60, 5, 500), 1, SOON, "tenant"),
        ("team", Limits(61, 5, 500), 1, SOON, "requests_per_minute"),
        ("team", Limits(None, 5, 500), 1, SOON, "requests_per_minute"),
        ("team", Limits(60, 6, 500), 1, SOON, "max_queued_jobs"),
        ("team", Limits(60, 5, None), 1, SOON, "max_queued_tokens"),
        ("team", Limits(60, 5, 500), 4, SOON, "weight"),
        ("team", Limits(60, 5, 500), 1, None, "expires_at"),
        ("team", Limits(60, 5, 500), 1, SOON.replace(year=2031), "expires_at"),
    ],
)
def test_nobody_gives_more_than_they_have(
    tenant: str, limits: Limits, weight: int, expires_at: datetime | None, param: str
) -> None:
    own = Limits(60, 5, 500)
    with pytest.raises(Forbidden) as refused:
        Giver("team", own, weight=3, expires_at=SOON).check(tenant, limits, weight, expires_at)
    assert refused.value.param == param
    Giver("o", own, operator=True).check(tenant, limits, weight, expires_at)
    Giver("team", own, weight=3, expires_at=SOON).check("team", own, 3, SOON)


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stored hash is looked at, by the one function that does not stop at the first
    difference.
    """
    looked: list[tuple[str, str]] = []

    def constant(a: str, b: str) -> bool:
        looked.append((a, b))
        return a == b

    monkeypatch.setattr(tokens.hmac, "compare_digest", constant)
    key = tokens.new_key(tokens.new_key_id())
    assert tokens.matches(key, tokens.hash_key(key), "0" * 64)
    assert [b for _, b in looked] == [tokens.hash_key(key), "0" * 64]  # also after it was found
    looked.clear()
    assert not tokens.same_text("a", "b")
    assert len(looked) == 1 and all(
        len(side) == 64 for side in looked[0]
    )  # of hashes: lengths tell nothing either
