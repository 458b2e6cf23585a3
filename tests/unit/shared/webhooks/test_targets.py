"""The guard against SSRF: a corpus of URLs and addresses that lead where they do not say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared.errors import InvalidParameter
from shared.webhooks.requests import endpoint_values, job_webhook
from shared.webhooks.targets import (
    SETTING,
    ForbiddenTarget,
    Target,
    checked_addresses,
    is_public,
    parse_target,
)

REFUSED_URLS = [
    "",
    None,
    5,
    "x" * 3000,
    "http://example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "//example.com/",
    "https://",
    "https:///path",
    "gopher://example.com/",
    "javascript:alert(1)",
    "https://user@example.com/",
    "https://user:pw@example.com/",
    "https://example.com@127.0.0.1/",
    "https://127.0.0.1:443@example.com/",
    "https://example.com\\@127.0.0.1/",
    "https://example.com/#fragment",
    "https://exa mple.com/",
    "https://example.com/\r\nHost: x",
    "https://example.com/\x00",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.1/",
    "https://127.0.1/",
    "https://0/",
    "https://0x0/",
    "https://00000177.1/",
    "https://0X7F.1/",
    "https://[::ffff:0x7f.1]/",
    "https://127.0.0.1.:x/",
    "https://%31%32%37.0.0.1/",
    "https://127。0。0。1/",
    "https://[::1]@example.com/",
    "https://1.2.3.4.5/",
    "https://999.1.1.1/",
    "https://[::1/",
    "https://[fe80::1%25eth0]/",
    "https://[zz]/",
    "https://example.com:0/",
    "https://example.com:22/",
    "https://example.com:80/",
    "https://example.com:99999/",
    "https://example.com:x/",
    "https://ex\u00e4mple.com/",
    "https://\u2460\u2461\u2466.0.0.1/",
    "https://-a.com/",
    "https://a..b/",
]


@pytest.mark.parametrize("url", REFUSED_URLS, ids=[ascii(u)[:40] for u in REFUSED_URLS])
def test_urls_that_are_refused_by_form(url: object) -> None:
    with pytest.raises(InvalidParameter) as refused:
        parse_target(url, allow_private=False)
    assert refused.value.param == "url"


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("https://example.com", "example.com", 443, "/"),
        ("https://hooks.example.com:8443/a/b?c=d&e", "hooks.example.com", 8443, "/a/b?c=d&e"),
        ("https://93.184.216.34/x", "93.184.216.34", 443, "/x"),
        ("https://[2606:4700::1111]/x", "2606:4700::1111", 443, "/x"),
        ("HTTPS://Example.COM/X", "example.com", 443, "/X"),
    ],
)
def test_urls_that_are_taken(url: str, host: str, port: int, path: str) -> None:
    target = parse_target(url, allow_private=False)
    assert (target.host, target.port, target.path) == (host, port, path)


def test_authority_is_what_the_receiver_expects_as_host() -> None:
    assert (
        parse_target("https://a.example:8443/", allow_private=False).authority == "a.example:8443"
    )
    assert (
        parse_target("https://[2606:4700::1111]/", allow_private=False).authority
        == "[2606:4700::1111]"
    )


def test_private_receivers_are_a_setting() -> None:
    target = parse_target("http://127.0.0.1:80/x", allow_private=True)
    assert checked_addresses(
        target, allow_private=True, resolver=lambda host, port: ["127.0.0.1"]
    ) == ["127.0.0.1"]


PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd12::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "2001:db8::1",
    "::ffff:169.254.169.254",
    "fec0::1",
    "3fff::1",
    "192.88.99.1",
    "4000::1",
    "fe00::1",
    "::ffff:0:127.0.0.1",
    "64:ff9b:1::7f00:1",
    "5f00::1",
    "100::1",
    "2001:4860::5efe:7f00:1",
    "2001:4860::200:5efe:a00:1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "::ffff:0.0.0.0",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    target = parse_target("https://rebind.example/", allow_private=False)
    with pytest.raises(ForbiddenTarget):
        checked_addresses(target, allow_private=False, resolver=lambda host, port: [address])
    with pytest.raises(ForbiddenTarget):  # one bad address among good ones
        checked_addresses(
            target, allow_private=False, resolver=lambda host, port: ["93.184.216.34", address]
        )


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_a_name_that_does_not_resolve() -> None:
    target = parse_target("https://nowhere.example/", allow_private=False)

    def fails(host: str, port: int) -> list[str]:
        raise OSError("no")

    for resolver in (fails, lambda host, port: []):
        with pytest.raises(ForbiddenTarget):
            checked_addresses(target, allow_private=False, resolver=resolver)


@pytest.mark.parametrize("name", ["127.0.0.1.nip.example", "internal.example", "a.b"])
def test_a_name_is_what_it_resolves_to(name: str) -> None:
    """A name that looks public is judged by the address that it resolves to, at each attempt."""
    target = parse_target(f"https://{name}/", allow_private=False)
    answers = iter([["93.184.216.34"], ["169.254.169.254"]])
    asked: list[tuple[str, int]] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return next(answers)

    assert checked_addresses(target, allow_private=False, resolver=rebinding) == ["93.184.216.34"]
    with pytest.raises(ForbiddenTarget) as refused:
        checked_addresses(target, allow_private=False, resolver=rebinding)
    assert "169.254" not in str(refused.value)
    assert asked == [(name.lower(), 443)] * 2


def test_the_systems_resolver_is_asked_once_and_its_answer_checked() -> None:
    with pytest.raises(ForbiddenTarget):
        checked_addresses(Target("https", "localhost", 443, "/"), allow_private=False)


NEVER_REACHED = [
    ("https://127.0.0.1/", SETTING),
    ("https://[::1]/", SETTING),
    ("https://10.1.2.3/hook", SETTING),
    ("https://169.254.169.254/", SETTING),
    ("https://192.168.0.5:8443/", SETTING),
    ("https://[fd00::1]/", SETTING),
    ("https://[::ffff:10.0.0.1]/", SETTING),
    ("https://0.0.0.0/", SETTING),
    ("https://localhost/", SETTING),
    ("https://LocalHost./", SETTING),
    ("https://api.localhost/", SETTING),
    ("https://receiver/", SETTING),
    ("https://metadata.google.internal/", SETTING),
    ("https://nas.local/", SETTING),
    ("http://hooks.example.com/", SETTING),
    ("https://hooks.example.com:80/", SETTING),
    ("https:///hook", "has no host"),
    ("https://:443/", "has no host"),
    ("https://hooks.example.com:0/", "a port"),
    ("https://hooks.example.com:65536/", "a port"),
    ("https://hooks.example.com:-1/", "a port"),
]


@pytest.mark.parametrize(("url", "said"), NEVER_REACHED)
def test_what_no_attempt_could_reach_is_refused_when_it_is_configured(url: str, said: str) -> None:
    faces: list[tuple[str, Callable[[], object]]] = [
        ("url", lambda: endpoint_values({"url": url}, allow_private=False, partial=False)),
        ("url", lambda: endpoint_values({"url": url}, allow_private=False, partial=True)),
        ("webhook.url", lambda: job_webhook({"url": url}, allow_private=False)),
    ]
    for param, configure in faces:
        with pytest.raises(InvalidParameter, match=said) as refused:
            configure()
        assert refused.value.param == param


@pytest.mark.parametrize("url", [url for url, said in NEVER_REACHED if said == SETTING])
def test_the_setting_allows_what_its_name_says(url: str) -> None:
    assert parse_target(url, allow_private=True).host
