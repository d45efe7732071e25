"""What a collection must hold after writes of which some were acknowledged and one perhaps not.

A write is a `Write`: it names the rows that it puts or takes. A row is a key and a version, which
decide its label and its vector to the bit, so that whoever reads a collection can be held against
the ledger without a copy of what was written.

Rules:
    Acknowledged is what returned to its caller. A write that was begun and not acknowledged is
    there whole, or not at all; nothing else may be.
    Of two keys no vector is alike: what is found twice or under another key shows.

`benchmarks.index_kills` and `benchmarks.index_readers` keep one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.collection import Collection, id_of
from index.storage.segment import ROW_SCHEMA

DIM = 16
FINGERPRINT = "5e" * 32
SOURCE = "ledger:"

Kind = Literal["add", "upsert", "delete", "seal", "compact"]
State = Mapping[str, int]
"""The living images: version by key."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """One call of a writer.

    Attributes:
        kind: which one.
        put: version by key, of add and upsert.
        taken: keys of delete.
        all: of compact, whether into one segment with an index.
    """

    kind: Kind
    put: Mapping[str, int] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    all: bool = False

    def apply(self, state: State) -> dict[str, int]:
        """Give what is there after it."""
        left = {key: version for key, version in state.items() if key not in self.taken}
        return {**left, **self.put}

    def to_line(self) -> str:
        """Write it on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Write:
        """Read what `to_line` wrote."""
        document = json.loads(line)
        return cls(**{**document, "taken": tuple(document["taken"])})


@dataclass(kw_only=True)
class Ledger:
    """What was acknowledged, and what is under way.

    Attributes:
        state: after every acknowledged write.
        under_way: the write that was begun and not acknowledged.
        acknowledged: how many were, by kind.
    """

    state: dict[str, int] = field(default_factory=dict)
    under_way: Write | None = None
    acknowledged: dict[str, int] = field(default_factory=dict)

    def begin(self, write: Write) -> None:
        """Note that a write is about to be called."""
        assert self.under_way is None, "one write at a time"
        self.under_way = write

    def acknowledge(self) -> None:
        """Note that the write that is under way has returned."""
        assert self.under_way is not None
        kind = self.under_way.kind
        self.state = self.under_way.apply(self.state)
        self.acknowledged[kind] = self.acknowledged.get(kind, 0) + 1
        self.under_way = None

    def settle(self, collection: Collection) -> bool | None:
        """Hold a collection against the ledger after its writer was killed, and go on from there.

        Returns:
            Whether the write that was under way is there; None where there was none, or where it
            changes nothing that can be seen.

        Raises:
            AssertionError: the collection holds neither what was acknowledged, nor that and the
                write that was under way.
        """
        found = read_state(collection)
        before, write = self.state, self.under_way
        after = before if write is None else write.apply(before)
        assert found in (before, after), _differences(found, before, after)
        self.state, self.under_way = found, None
        return None if before == after else found == after


def read_state(collection: Collection) -> dict[str, int]:
    """Read what a collection holds, and check that every part of every row belongs together.

    Raises:
        AssertionError: an image is there twice, or has another's id, label, source or vector.
    """
    ids, keys, labels = collection.ids, collection.keys(), collection.labels()
    assert len(ids) == len(keys) == len(labels) == collection.count
    assert len(set(keys)) == len(keys), "a key is there twice"
    assert [id_of(key) for key in keys] == ids.tolist(), "an id is not its key's"
    state = {key: int(label or -1) for key, label in zip(keys, labels, strict=True)}
    if state:
        assert {row.source for row in collection.rows(ids)} == {SOURCE}
        expected = vectors_of(state)
        wrong = np.flatnonzero((collection.vectors(ids) != expected).any(axis=1))
        assert not wrong.size, f"{keys[wrong[0]]} has another vector than it was written with"
    return state


def rows_of(put: State) -> pa.Table:
    """Give the metadata of rows as a writer takes it."""
    columns = {
        "id": [id_of(key) for key in put],
        "key": list(put),
        "label": [str(version) for version in put.values()],
        "source": [SOURCE] * len(put),
    }
    return pa.table(columns, schema=ROW_SCHEMA)


def vectors_of(put: State) -> NDArray[np.float32]:
    """Give the vectors of rows, (n, DIM) float32 of unit length."""
    rows = [_vector_of(key, version) for key, version in put.items()]
    return np.stack(rows) if rows else np.empty((0, DIM), np.float32)


@lru_cache(maxsize=1 << 17)
def _vector_of(key: str, version: int) -> NDArray[np.float32]:
    """Draw a row's vector from its key and version."""
    digest = hashlib.blake2b(f"{key}/{version}".encode(), digest_size=8).digest()
    vector_D = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(DIM)
    return (vector_D / np.linalg.norm(vector_D)).astype(np.float32)


def _differences(found: State, before: State, after: State) -> str:
    """Say in what a collection differs from both of what it may hold."""
    return "; ".join(
        f"{len(lost)} lost, {len(more)} more, {len(other)} of another version than {word}"
        f"{_some(lost or more or other)}"
        for word, expected in (("acknowledged", before), ("with the write under way", after))
        for lost in [expected.keys() - found.keys()]
        for more in [found.keys() - expected.keys()]
        for other in [[k for k in found.keys() & expected.keys() if found[k] != expected[k]]]
    )


def _some(keys: Iterable[str]) -> str:
    """Name a few keys."""
    return f" ({', '.join(sorted(keys)[:3])})"
