"""Checks what a caller gives the client: every refusal is one line, before anything is sent."""

from __future__ import annotations

import math
import operator
import re
from os import PathLike
from typing import SupportsFloat

from models.endpoints import MAX_PORT
from models.errors import UsageError

MAX_UINT32 = (1 << 32) - 1
MAX_UINT64 = (1 << 64) - 1
MAX_TIMEOUT_S = 365 * 86_400.0
"""gRPC keeps deadlines in 64 bits of nanoseconds; nobody waits for a year."""

SCHEME = "(?:dns|ipv4|ipv6|unix|unix-abstract|xds|passthrough):"

NAME = re.compile(f"{SCHEME}.+")
"""What a server may be called: a name of gRPC's with its scheme."""

HOST_AND_PORT = re.compile(
    rf"(?:dns:(?://[^/]*)?/?)?(?!{SCHEME})(?:[^][:/\s]+|\[[^][\s]+\]):(?P<port>[0-9]{{1,19}})"
)
"""What else: `host:port`, with gRPC's scheme of DNS or without one."""

REQUEST_ID = re.compile("[!-~]{1,128}")

ONE_IMAGE = (str, bytes, bytearray, memoryview, PathLike)
"""What would be iterated over as something else than images."""


def check_integer(name: str, value: object, least: int, most: int = MAX_UINT32) -> int:
    """Give an integer of any library as Python's.

    Raises:
        UsageError: it is none, or outside its bounds.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # what is none raises
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise UsageError(name, expected=f"an integer, {least} to {most}", found=describe(value))
    return number


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Refuse what is no number, or outside its bounds.

    Raises:
        UsageError: it is.
    """
    try:  # of text `float` makes a number, of which nobody else knows
        good = isinstance(value, SupportsFloat) and least <= float(value) <= most
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        expected = f"a number, {least:g} to {most:g}"
        raise UsageError(name, expected=expected, found=describe(value))


def check_text(name: str, value: object) -> None:
    """Refuse what is neither None nor text that can be sent.

    Raises:
        UsageError: it is something else, or holds half a surrogate pair, as the name of a file
            does that is not UTF-8.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise UsageError(name, expected="text", found=describe(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        expected = "text that UTF-8 can write"
        raise UsageError(name, expected=expected, found=describe(value)) from error


def check_target(name: str, value: object) -> None:
    """Refuse what gRPC would look for elsewhere: at port 443, or at the lowest 16 bits of one.

    Raises:
        UsageError: it is neither `host:port`, with a port of 1 to 65535, nor a name with one of
            gRPC's schemes.
    """
    text = value if isinstance(value, str) else ""
    check_text(name, text)
    if numbered := HOST_AND_PORT.fullmatch(text):
        check_integer(f"port of {name}", int(numbered["port"]), 1, MAX_PORT)
    elif not NAME.fullmatch(text):
        expected = "HOST:PORT, such as localhost:50051"
        raise UsageError(name, expected=expected, found=describe(value) if value else "nothing")


def check_request_id(value: object) -> None:
    """Refuse what cannot travel as a header and stand in a log line.

    Raises:
        UsageError: it is no text, or has other characters than visible ASCII.
    """
    good = value is None or (isinstance(value, str) and REQUEST_ID.fullmatch(value))
    if not good:
        expected = "1 to 128 visible ASCII characters without spaces"
        raise UsageError("request_id", expected=expected, found=describe(value))


def check_timeout(value: object) -> float:
    """Give a timeout in seconds.

    Raises:
        UsageError: it is not a positive number, or longer than a year.
    """
    try:
        seconds = float(value)  # type: ignore[arg-type]  # what is none raises
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        expected = f"a positive number of seconds, at most {MAX_TIMEOUT_S:.0f}"
        raise UsageError("timeout_s", expected=expected, found=describe(value))
    return seconds


def describe(value: object) -> str:
    """Show a value in a few characters of one line."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
