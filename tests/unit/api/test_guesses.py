"""The cost of unknown keys: a budget per address, within bounds of memory."""

from __future__ import annotations

from typing import Any, cast

import pytest

from api import guesses
from api.auth import Authenticator
from api.guesses import Guesses, RefusedKeys, network_of
from shared.errors import TooManyRequests
from shared.keys import tokens
from shared.settings import load_settings


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def count_allowed(found: Guesses, address: str | None, tries: int) -> int:
    allowed = 0
    for _ in range(tries):
        try:
            found.take(address)
        except TooManyRequests as refused:
            assert 1 <= refused.retry_after_seconds <= 1 / guesses.PER_SECOND
        else:
            allowed += 1
    return allowed


def test_an_address_has_a_burst_and_then_a_trickle() -> None:
    clock = Clock()
    found = Guesses(clock)
    assert count_allowed(found, "192.0.2.1", 100) == guesses.BURST
    assert count_allowed(found, "192.0.2.2", 5) == 5  # another address
    clock.now += 10
    assert count_allowed(found, "192.0.2.1", 100) == 10 * guesses.PER_SECOND
    clock.now += 1e6
    assert count_allowed(found, "192.0.2.1", 100) == guesses.BURST


async def test_valid_keys_do_not_use_up_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Authenticator(cast(Any, None), load_settings({"VDIFF_AUTH": "required"}))

    async def read(*_: Any) -> object:
        return object()

    monkeypatch.setattr(found, "_read", read)
    monkeypatch.setattr(found, "_principal", lambda row: row)
    for _ in range(guesses.BURST * 2):
        assert await found.principal(tokens.new_key(tokens.new_key_id()), None, "192.0.2.1")


def test_a_network_of_ipv6_is_one_address() -> None:
    found = Guesses(Clock())
    assert sum(count_allowed(found, f"2001:db8::{i:x}", 1) for i in range(100)) == guesses.BURST
    assert count_allowed(found, "2001:db8:0:1::1", 1) == 1
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1")
    assert network_of("fe80::1%eth0") == network_of("fe80::2%eth1")
    assert network_of(None) == network_of("/run/socket") == "other"


def test_both_memories_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "ADDRESSES_MAX", 10)
    monkeypatch.setattr(guesses, "REFUSED_MAX", 10)
    clock = Clock()
    found, refused = Guesses(clock), RefusedKeys(clock)
    for i in range(100):
        count_allowed(found, f"192.0.2.{i}", 1)
        refused.add(f"{i}")
    assert (len(found), len(refused)) == (10, 10)
    assert "99" in refused and "0" not in refused
    clock.now += guesses.REFUSED_SECONDS
    assert "99" not in refused
