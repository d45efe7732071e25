"""What benchmarks have in common: whose turn it is, how far figures lie apart, the command."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def turns(items: Iterable[T], number: int) -> list[T]:
    """Order the contenders of a round: each round begins with the next, every other goes back.

    So each comes early and late, and after one neighbour and the other: what a contender leaves
    behind, in the caches or of heat, does not always meet the same one.
    """
    items = list(items)
    step = -1 if number % 2 else 1
    return [items[(number + step * place) % len(items)] for place in range(len(items))]


def spread_of(values: Sequence[float], digits: int | None = None) -> dict[str, float]:
    """Give the least, the median and the most, rounded where so many digits are asked for."""
    named = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return named if digits is None else {name: round(v, digits) for name, v in named.items()}


def command_line() -> str:
    """Give the command of this process as a person would type it."""
    return f"python {shlex.join(sys.orig_argv[1:])}"
