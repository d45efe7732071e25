"""Decides what to load, of what a look at the disk has seen: pure policy.

Rules:
    What has changed is loaded when two looks in a row see the same: a copy that is still
    under way is left alone until it rests.
    What was tried is not tried again before it changes again, also where it was refused.
    What is gone is told once, after two looks, too.
    What a look could not see is neither changed nor gone: it is as the look before saw it.

It reads no file and loads nothing; see `files` and `manager`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.lifecycle.files import Signature


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a look has found.

    Attributes:
        changed: new or different, and at rest.
        gone: no longer there.
    """

    changed: tuple[str, ...]
    gone: tuple[str, ...]


class Watcher:
    """Remembers what was tried and what the last look saw."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._tried: dict[str, Signature] = {}
        self._last: dict[str, Signature] = {}

    def __repr__(self) -> str:
        return f"<Watcher of {', '.join(self._tried) or 'nothing'}>"

    def tried(self, name: str, signature: Signature) -> None:
        """Remember that what looks like this was loaded, or refused."""
        self._tried[name] = signature

    def forget(self, name: str) -> None:
        """Take what comes under that name for new, whatever it looks like."""
        self._tried.pop(name, None)
        self._last.pop(name, None)

    def is_new(self, name: str, signature: Signature) -> bool:
        """Whether something else was tried last under that name, or nothing."""
        return self._tried.get(name) != signature

    def look(self, seen: Mapping[str, Signature]) -> Changes:
        """Take what was seen now; an empty signature is nothing."""
        there = {name: signature for name, signature in seen.items() if signature}
        changed = [
            name
            for name, signature in there.items()
            if self._last.get(name) == signature and self.is_new(name, signature)
        ]
        missing = seen.keys() - there.keys()
        gone = [name for name in self._tried if name in missing and name not in self._last]
        for name in gone:
            del self._tried[name]
        for name in missing:
            self._last.pop(name, None)
        self._last.update(there)
        return Changes(changed=tuple(changed), gone=tuple(gone))
