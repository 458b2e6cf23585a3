"""Guard against SSRF: the form of webhook URLs, and the addresses that their names resolve to.

`parse_target` refuses at once what no attempt could ever reach. A name is resolved once per
attempt, every address must be public, and the connection goes to the address that was checked:
a name that answers differently a moment later (DNS rebinding) gains nothing. `allow_private` opens
loopback and private ranges, and plain http.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from shared.errors import InvalidParameter

MAX_URL = 2048
_NAME = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.?",
    re.I,
)
_NUMBERLIKE = re.compile(r"(?:0x[0-9a-f]*|\d+)(?:\.(?:0x[0-9a-f]*|\d+))*\.?", re.I)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")
_GLOBAL_UNICAST = ipaddress.ip_network(
    "2000::/3"
)  # all that is routed; site-local fec0::/10 is `is_global` to Python
_NEVER = tuple(
    ipaddress.ip_network(n) for n in ("3fff::/20", "192.88.99.0/24")
)  # documentation; dead 6to4 relays
# Names that stand for this machine or a private network alone: RFC 6761, RFC 6762, and ICANN's
# reservation of `internal`.
_PRIVATE_NAMES = ("localhost", "local", "internal", "home.arpa")
SETTING = "VDIFF_WEBHOOK_ALLOW_PRIVATE"
_ISATAP = (0x00005EFE, 0x02005EFE)  # in the interface id, before an IPv4 address

Resolver = Callable[[str, int], Sequence[str]]


class ForbiddenTarget(Exception):
    """The address may not be reached; the message names the reason, never what is there."""


@dataclass(frozen=True, slots=True)
class Target:
    scheme: str
    host: str
    port: int
    path: str  # with the query

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (
            host if self.port == {"https": 443, "http": 80}[self.scheme] else f"{host}:{self.port}"
        )


def parse_target(url: object, *, allow_private: bool, param: str = "url") -> Target:
    """Return the parts of a URL that a webhook may go to.

    Raises:
        InvalidParameter: no attempt could reach it, with the setting that would allow it, if one
            does.
    """

    def bad(why: str) -> InvalidParameter:
        return InvalidParameter(f"{param} {why}", param=param)

    if not isinstance(url, str) or not 1 <= len(url) <= MAX_URL:
        raise bad(f"must be a URL of at most {MAX_URL} characters")
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise bad("must consist of printable ASCII characters, percent-encoded where needed")
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise bad("is not a URL") from exc
    try:
        port = parts.port
    except ValueError as exc:
        raise bad("has a port that is not a number from 1 to 65535") from exc
    if parts.scheme != "https" and not (allow_private and parts.scheme == "http"):
        also = (
            " or http://"
            if allow_private
            else f"; {SETTING}=true allows http and private addresses"
        )
        raise bad(f"must start with https://{also}")
    if "@" in parts.netloc:
        raise bad("must not hold credentials")
    if "#" in url:
        raise bad("must not have a fragment")
    host = parts.hostname or ""
    if not host:
        raise bad("has no host")
    _check_host(host, bad)
    if not allow_private and _is_private_host(host):
        raise bad(
            f"names {host[:80]}, which is this machine or a private network; {SETTING}=true allows such receivers"
        )
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    if port == 0:
        raise bad("has a port that is not a number from 1 to 65535")
    if not allow_private and port != 443 and port < 1024:
        raise bad(f"must use port 443 or one from 1024; {SETTING}=true allows every port")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port, path)


def _check_host(host: str, bad: Callable[[str], InvalidParameter]) -> None:
    if ":" in host:
        if "%" in host:
            raise bad("must not name a zone")
        try:
            ipaddress.IPv6Address(host)
        except ValueError as exc:
            raise bad("has no valid host") from exc
        return
    if _NUMBERLIKE.fullmatch(host):
        # Decimal, octal and hexadecimal spellings of an address: resolvers disagree about them.
        try:
            ipaddress.IPv4Address(host)
        except ValueError as exc:
            raise bad("spells an address in an unusual way; write it as four numbers") from exc
        return
    if not _NAME.fullmatch(host):
        raise bad("has no valid host")


def _is_private_host(host: str) -> bool:
    """Return whether a host, as it is written, can only be this machine or one of a private
    network.
    """
    try:
        return not is_public(host)
    except ValueError:
        name = host.lower().removesuffix(".")
        return "." not in name or name.endswith(tuple(f".{private}" for private in _PRIVATE_NAMES))


def is_public(address: str) -> bool:
    """Return whether an address, and whatever IPv4 address is inside it, is one of the public
    internet.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64 or ip in _COMPATIBLE:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if (int(ip) >> 32) & 0xFFFFFFFF in _ISATAP:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(one is not None and not is_public(str(one)) for one in inner):
            return False
        if ip.ipv4_mapped is not None or ip in _NAT64:
            return True
        if ip not in _GLOBAL_UNICAST:
            return False
    if any(ip in network for network in _NEVER if network.version == ip.version):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a name. Raises OSError."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def checked_addresses(
    target: Target, *, allow_private: bool, resolver: Resolver = resolve
) -> list[str]:
    """The addresses to connect to, in order.

    Raises:
        ForbiddenTarget: one of them is not public, or there are none.
    """
    try:
        addresses = list(dict.fromkeys(resolver(target.host, target.port)))
    except (OSError, UnicodeError) as exc:
        raise ForbiddenTarget(f"the host name does not resolve ({type(exc).__name__})") from exc
    if not addresses:
        raise ForbiddenTarget("the host name does not resolve")
    if not allow_private and not all(is_public(one) for one in addresses):
        raise ForbiddenTarget("the host name stands for an address that is not public")
    return addresses
