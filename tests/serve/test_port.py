"""One port of every address that a name has."""

import errno
import socket

import pytest

from serve.errors import StartError
from serve.port import bind_all, check_address


def answering(monkeypatch, *addresses):
    """Let names have these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_every_address_has_the_same_port(monkeypatch):
    """Port 0 is chosen once."""
    answering(monkeypatch, "127.0.0.1", "127.0.0.2")
    sockets = bind_all("two", 0)
    try:
        (first, port), (second, again) = (one.getsockname() for one in sockets)
        assert (first, second) == ("127.0.0.1", "127.0.0.2")
        assert port == again
    finally:
        for one in sockets:
            one.close()


def test_a_name_that_is_listed_twice_is_one_address(monkeypatch):
    """As in an /etc/hosts with two lines of it: it does not collide with itself."""
    answering(monkeypatch, "127.0.0.1", "127.0.0.1")
    (one,) = bind_all("twice", 0)
    one.close()


def test_a_kernel_without_a_family_is_a_clear_refusal(monkeypatch):
    """The name has an address of IPv6, and sockets of it cannot be made."""

    def refuse(*_):
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(StartError, match=r"found Address family not supported .*; "):
        check_address("localhost", 0)
