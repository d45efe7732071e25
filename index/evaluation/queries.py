"""What a collection is asked with: its own images, another collection's, or a source's.

Rules:
    Queries are of the collection's encoder; another one's are refused.
    Vectors are given in blocks, so that a million queries are never in memory at once, unless
    they were embedded for this evaluation.
    Where there are more queries than wanted, a seeded sample of them stands for all.

Shapes: Q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.embed import Reject, open_collection_encoder
from index.errors import EvaluationError
from index.evaluation.baselines import Seen, see_images
from index.evaluation.same_images import collection_digests
from index.interface import AnyCollection, open_collection
from index.knn import COSINE
from index.milvus.connection import is_milvus
from index.storage.manifest import MANIFEST_FILE
from models.command import counted, shown
from models.images import open_source


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Images to ask a collection with.

    Attributes:
        name: where they come from, for people.
        keys: of the Q images.
        labels: of the same.
        ids_Q: their ids, where they are images of the collection itself; else None.
        n_all: how many there were before a sample was taken.
        rejects: images that could not be read.
        vectors: gives (n, D) float32 of the queries with these numbers.
        digests: gives a hash of each query's content; None where that is not stored, unless it
            is told that it may read them all.
    """

    name: str
    keys: Sequence[str]
    labels: Sequence[str | None]
    ids_Q: NDArray[np.int64] | None
    n_all: int
    rejects: Sequence[Reject] = ()
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    digests: Callable[[bool], list[str] | None]

    def __len__(self) -> int:
        return len(self.keys)

    def pick(self, numbers: NDArray[np.int64]) -> Queries:
        """Give the queries with these numbers, in this order."""
        vectors, digests = self.vectors, self.digests

        def picked_digests(may_read: bool) -> list[str] | None:
            found = digests(may_read)
            return None if found is None else [found[n] for n in numbers]

        return replace(
            self,
            keys=[self.keys[n] for n in numbers],
            labels=[self.labels[n] for n in numbers],
            ids_Q=None if self.ids_Q is None else self.ids_Q[numbers],
            vectors=lambda rows: vectors(numbers[rows]),
            digests=picked_digests,
        )

    def sample(self, n: int, *, seed: int) -> Queries:
        """Give at most n of the queries, in their order, drawn without replacement; 0 for all."""
        if n == 0 or len(self) <= n:
            return self
        drawn = np.random.default_rng(seed).choice(len(self), n, replace=False)
        return self.pick(np.sort(drawn))


def open_queries(
    stack: ExitStack, collection: AnyCollection, queries: str | None, *, encoder: str | None = None
) -> Queries:
    """Open what the collection is asked with.

    Args:
        stack: closes what is opened.
        collection: what is asked.
        queries: address of another collection, or a source as for `index.build`; the
            collection's own images where None.
        encoder: embeds the images of a source; the one that built the collection where None.

    Raises:
        FingerprintMismatchError: another encoder made the queries.
        EvaluationError: not one image of a source can be read.
        HoraceError: they cannot be opened or read.
    """
    if queries is None:
        return _stored(collection, collection, name=f"of {collection.name} itself")
    if is_milvus(queries) or (Path(queries) / MANIFEST_FILE).is_file():
        other = stack.enter_context(closing(open_collection(queries)))
        collection.require(other.fingerprint)
        return _stored(other, None, name=f"of collection {queries}")
    with closing(open_collection_encoder(collection, encoder)) as opened:
        seen = see_images(
            [open_source(queries)], [opened],
            preprocess_for=opened, with_pixels=False, what="queries",
            normalize=collection.metric == COSINE,
        )  # fmt: skip
    require_readable(f"--queries {queries}", seen)
    return Queries(
        name=queries,
        keys=seen.keys,
        labels=seen.labels,
        ids_Q=None,
        n_all=len(seen.keys),
        rejects=seen.rejects,
        vectors=lambda rows: seen.vectors_ND[0][rows],
        digests=lambda _: seen.digests,
    )


def _stored(asking: AnyCollection, itself: AnyCollection | None, *, name: str) -> Queries:
    """Make queries of the images of a collection."""
    ids_Q, keys = asking.ids, asking.keys()
    return Queries(
        name=name,
        keys=keys,
        labels=asking.labels(),
        ids_Q=None if itself is None else ids_Q,
        n_all=len(keys),
        vectors=lambda rows: asking.vectors(ids_Q[rows]),
        digests=lambda may_read: collection_digests(asking, may_read=may_read),
    )


def require_readable(what: str, seen: Seen) -> None:
    """Refuse a source, named by its option, of which not one image could be read.

    Raises:
        EvaluationError: it is so; says why the first cannot.
    """
    if seen.keys:
        return
    rejects = seen.rejects
    first = f", the first {rejects[0].key}: {rejects[0].message}" if rejects else ""
    raise EvaluationError(
        what,
        expected="images that can be read",
        found=f"none, and {len(rejects)} that cannot{first}",
        mend="check the images",
    )


def unread_notes(rejects: Sequence[Reject]) -> list[str]:
    """Say in a report how many images could not be read, and why the first; nothing of none."""
    if not rejects:
        return []
    first = f"the first {shown(rejects[0].key)}: {rejects[0].message}"
    return [f"{counted(len(rejects), 'query', plural='queries')} could not be read, {first}"]
