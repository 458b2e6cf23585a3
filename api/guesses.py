"""Bound what API keys that are not known may cost: lookups per address, and a memory of refused
keys.

A key that this process has accepted before is never counted here, so a flood of bad keys from one
address does not lock out the clients that share it. It can delay, for seconds, a key that this
process sees for the first time. Both memories are bounded; the entries unused for longest go first.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from shared.errors import TooManyRequests

BURST = 20  # bad keys of one address at once
PER_SECOND = 0.5  # bad keys of one address in the long run
ADDRESSES_MAX = 10_000
REFUSED_SECONDS = 10.0
REFUSED_MAX = 10_000
_IPV6_PREFIX = 64  # one customer's network: every address in it is as good as one


def network_of(address: str | None) -> str:
    """Return what shares a budget of bad keys: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "other"  # a Unix socket, or no address at all
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, _IPV6_PREFIX), strict=False))
    return str(ip)


class Guesses:
    """A token bucket of unknown keys for each address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (tokens, at)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str | None) -> None:
        """Count one unknown key. Raises TooManyRequests."""
        network, now = network_of(address), self._clock()
        left, at = self._buckets.pop(network, (float(BURST), now))
        left = min(float(BURST), left + (now - at) * PER_SECOND)
        allowed = left >= 1.0
        self._buckets[network] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > ADDRESSES_MAX:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = max(1.0, (1.0 - left) / PER_SECOND)
            raise TooManyRequests(
                f"too many unknown API keys came from this address; try again in {math.ceil(wait)} s",
                retry_after_seconds=wait,
            )

    def give_back(self, address: str | None) -> None:
        """Undo one `take`: the key turned out to be valid."""
        network = network_of(address)
        if network in self._buckets:
            left, at = self._buckets[network]
            self._buckets[network] = (min(float(BURST), left + 1.0), at)


class RefusedKeys:
    """The hashes of keys that were looked up and refused a moment ago."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, key_hash: object) -> bool:
        return self._clock() < self._until.get(str(key_hash), float("-inf"))

    def add(self, key_hash: str) -> None:
        self._until.pop(key_hash, None)
        self._until[key_hash] = self._clock() + REFUSED_SECONDS
        if len(self._until) > REFUSED_MAX:
            self._until.popitem(last=False)
