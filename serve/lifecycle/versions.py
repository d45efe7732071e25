"""Decides which versions of a model are opened, and which are served afterwards: pure policy.

Rules:
    A bundle alone is version 1, and one more at every load. Of a directory of versions each
    has the number of its directory.
    The newest `keep` versions are served. One that is served and has not changed is not
    opened again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do with the versions of a model.

    Attributes:
        opened: where each version is that is to be opened, oldest first.
        served: the versions that are served when they are.
    """

    opened: Mapping[str, str]
    served: frozenset[str]


def plan_versions(
    found: Mapping[str, str],
    *,
    served: Collection[str],
    changed: Collection[str],
    last: int,
    keep: int,
) -> Plan:
    """Decide, of what lies on the disk and what is served.

    Args:
        found: directories by version; "" for a bundle that has none.
        served: versions that are served now.
        changed: versions that look different than when they were opened.
        last: the highest number that was ever served.
        keep: how many versions to serve.
    """
    if "" in found:
        version = str(last + 1)
        kept = _newest({*served, version}, keep)
        return Plan(opened={version: found[""]}, served=frozenset(kept))
    wanted = _newest(found, keep)
    opened = {v: found[v] for v in wanted if v not in served or v in changed}
    return Plan(opened=opened, served=frozenset(wanted))


def _newest(versions: Collection[str], keep: int) -> list[str]:
    """Give the versions of the highest numbers, oldest first."""
    return sorted(versions, key=int)[-keep:]
