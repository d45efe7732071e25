"""Groups of near-duplicates by a threshold, without chains.

Rules:
    One image of a group is kept: the first of the group in the collection's order. Every other
    one is at least as near to it as the threshold says, and no two kept images are: so that
    after the others are deleted nothing near is left, and nothing is gone without a twin.
    (Connected components, the usual way, chain images together that have nothing in common:
    fastdup#302.)
    An image that is near to several kept ones goes to the nearest.
    Only kept images are searched with to the end of their neighbourhood: a thousand copies of
    one image are a thousand neighbours once, not a million pairs.

Where the collection has an index, a neighbour that it misses may be kept, too, near as it is;
with `exact` none is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection
from index.knn import ROUNDING
from index.neighbours import require_cosine
from index.selection import Selection
from models.command import progress

BLOCK_ROWS = 256
FIRST_NEIGHBOURS = 16
"""Asked for at first; a query whose last neighbour is still near asks for more."""
MORE = 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """Near-duplicates.

    Attributes:
        kept: id of the one that stays.
        others: ids of the others, nearest first.
        scores: cosines of those to the kept one.
    """

    kept: int
    others: Sequence[int]
    scores: Sequence[float]


def find_groups(
    collection: Collection,
    threshold: float,
    *,
    exact: bool = False,
    selection: Selection | None = None,
) -> list[Group]:
    """Find groups of near-duplicates, the largest first.

    Args:
        collection: where to look.
        threshold: cosine from which two images are near, above 0.
        exact: whether to compare every pair instead of asking the index.
        selection: the images that are looked at; all where None.

    Raises:
        UsageError: the collection compares vectors by something else than cosine.
    """
    require_cosine(collection.metric, "--threshold")
    grouping = Grouping()
    mask_N = np.ones(collection.count, np.bool_) if selection is None else selection.mask_N
    ids = collection.ids[mask_N]
    blocks = [ids[start : start + BLOCK_ROWS] for start in range(0, len(ids), BLOCK_ROWS)]
    for block_ids in progress(blocks, what="looking for near-duplicates", total=len(ids), size=len):
        block = [id_ for id_ in block_ids.tolist() if id_ not in grouping.taken]
        for id_, near in _neighbours(collection, block, threshold, exact, selection, grouping):
            grouping.add(id_, near)
    return grouping.groups()


class Grouping:
    """Decides what is kept, image by image; it searches nothing."""

    def __init__(self) -> None:
        """Begin without an image."""
        self._kept: dict[int, None] = {}  # in the order of the collection
        self.taken: dict[int, tuple[int, float]] = {}
        """The images that go: to which kept one, and how near."""

    def add(self, id_: int, near: Sequence[tuple[int, float]]) -> None:
        """Take the next image in, with its neighbours that are near enough.

        An index may show A to B and not B to A: an image that sees a kept one goes to it.
        """
        if id_ in self.taken:
            return
        kept = [(score, other) for other, score in near if other in self._kept]
        if kept:
            score, other = max(kept)
            self.taken[id_] = (other, score)
            return
        self._kept[id_] = None
        for other, score in near:
            if other not in self.taken or self.taken[other][1] < score:
                self.taken[other] = (id_, score)

    def groups(self) -> list[Group]:
        """Give the groups of at least two, the largest first."""
        members: dict[int, list[tuple[float, int]]] = {}
        for id_, (kept, score) in self.taken.items():
            members.setdefault(kept, []).append((-score, id_))
        groups = []
        for kept in self._kept:
            found = sorted(members.get(kept, []))
            if found:
                others, scores = [id_ for _, id_ in found], [-score for score, _ in found]
                groups.append(Group(kept=kept, others=others, scores=scores))
        return sorted(groups, key=lambda group: -len(group.others))


def _neighbours(
    collection: Collection,
    ids: Sequence[int],
    threshold: float,
    exact: bool,
    selection: Selection | None,
    grouping: Grouping,
) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Search with stored images; give each with all its neighbours that are near."""
    if not ids:
        return
    found = collection.search_ids(ids, FIRST_NEIGHBOURS, exact=exact, filter=selection)
    for id_, ids_K, scores_K in zip(ids, found.ids, found.scores, strict=True):
        if id_ in grouping.taken:
            continue
        k = FIRST_NEIGHBOURS
        while len(scores_K) == k and scores_K[-1] >= threshold - ROUNDING:
            k *= MORE
            more = collection.search_ids([id_], k, exact=exact, filter=selection)
            ids_K, scores_K = more.ids[0], more.scores[0]
        yield id_, _near(ids_K, scores_K, threshold)


def _near(
    ids_K: NDArray[np.int64], scores_K: NDArray[np.float32], threshold: float
) -> list[tuple[int, float]]:
    """Keep the neighbours that are near enough."""
    is_near = scores_K >= threshold - ROUNDING
    return list(zip(ids_K[is_near].tolist(), scores_K[is_near].tolist(), strict=True))
