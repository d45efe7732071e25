from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from serve.security.caller import CURRENT, caller_of, host_of, request_id_of


@dataclass
class FakeContext:
    """A call's context, with what is asked of it."""

    address: str = "ipv4:192.0.2.7:4711"
    found: dict[str, list[bytes]] = field(default_factory=dict)

    def peer(self) -> str:
        """Give the address."""
        return self.address

    def auth_context(self) -> dict[str, list[bytes]]:
        """Give what TLS found."""
        return self.found


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:4711", "192.0.2.7"),
        ("ipv6:[::ffff:192.0.2.7]:4711", "192.0.2.7"),
        ("ipv6:%5B2001:db8::1%5D:4711", "2001:db8::1"),
        ("ipv6:[::1]:4711", "::1"),
        ("unix:", "unix"),
        ("unix:/run/some/socket", "unix"),
        ("", "unknown"),
        ("ipv4:", "unknown"),
    ],
)
def test_an_address_is_a_host_without_its_port(peer, host):
    """All connections of one machine are one caller, and no path gets into a name."""
    assert host_of(peer) == host


def test_a_certificate_names_the_caller_before_its_address():
    """The subject, as the authority signed it."""
    found = {
        "transport_security_type": [b"ssl"],
        "security_level": [b"TSI_PRIVACY_AND_INTEGRITY"],
        "x509_subject": [b"CN=app-1,O=Example"],
    }
    assert caller_of(FakeContext(found=found)) == "CN=app-1,O=Example"


def test_a_certificate_without_a_subject_goes_by_its_other_name():
    """Certificates of services often have nothing but a subject alternative name."""
    found = {
        "transport_security_type": [b"ssl"],
        "security_level": [b"TSI_PRIVACY_AND_INTEGRITY"],
        "x509_subject": [b""],
        "x509_subject_alternative_name": [b"app-1.example"],
    }
    assert caller_of(FakeContext(found=found)) == "app-1.example"


def test_what_the_guard_found_comes_first():
    """The name of a key wins over the address."""
    before = CURRENT.set("key-name")
    try:
        assert caller_of(FakeContext()) == "key-name"
    finally:
        CURRENT.reset(before)
    assert caller_of(FakeContext()) == "192.0.2.7"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("0af7651916cd43dd-8448eb211c80319c", "0af7651916cd43dd-8448eb211c80319c"),
        ("two\nlines", ""),
        ("x" * 129, ""),
        (b"bytes", ""),
    ],
)
def test_an_id_of_a_request_is_kept_where_it_can_be_logged(value, kept):
    """It comes from outside and goes into logs: short and printable, or nothing."""
    assert request_id_of((("other", "a"), ("x-request-id", value))) == kept
    assert request_id_of(()) == ""
