"""Images that do not belong, and labels that do not, by what lies around them.

Rules:
    Everything is worked out from one search: the k nearest of every image, itself left out.
    A score compares images of one collection and is no probability.
    Foreign images come in groups (a folder of scans, frames of one film), and an encoder puts
    a group together: a group of more than k images has its k neighbours in itself and looks at
    home. So k is large, and `farthest` looks at the k-th alone.
    A label is weighed without the image's own: the vote is of its neighbours only.

Source of the local outlier factor: Breunig et al., LOF: Identifying Density-Based Local Outliers
(SIGMOD 2000), definitions 3 to 7. Source of what a suspect is: Northcutt et al., Confident
Learning (arXiv 1911.00068), section 3.1. Which score and k are the default, and why:
docs/decisions/0020-curation.md, measured by benchmarks.outliers.

Shapes: N images that are looked at, B of them, K neighbours, C classes, P of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection
from index.knn import MISSING, padding, weighted_knn_vote
from index.selection import Selection
from index.storage.ids import Places
from models.command import progress
from models.errors import UsageError

BLOCK_ROWS = 1024
VOTE_ROWS = 32
"""Images whose votes are counted at once: what lies around them is of few classes, whatever the
number of all."""

MOST_NEIGHBOURS, FEWEST_NEIGHBOURS = 50, 5
NEIGHBOUR_SHARE = 0.05
"""Of the images: in a small collection fifty neighbours are everything there is."""

TEMPERATURE = 0.1
"""Of the vote over labels, for cosines."""

SMALLEST_DISTANCE = 0.1
"""Of the median distance. Copies of an image are infinitely dense, and would make whatever has
them for neighbours infinitely odd."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The nearest of every image that is looked at, itself left out.

    Attributes:
        ids: (N,) int64 ids of the images.
        places_NK: (N, K) int64, nearest first: places within `ids`; -1 where there is none.
        scores_NK: (N, K) float32, the collection's scores; -inf where there is none.
        distances_NK: (N, K) float32, the same as distances; inf where there is none.
    """

    ids: NDArray[np.int64]
    places_NK: NDArray[np.int64]
    scores_NK: NDArray[np.float32]
    distances_NK: NDArray[np.float32]

    def nearest(self, k: int) -> Surroundings:
        """Give the k nearest alone; fewer where there are fewer."""
        return replace(
            self,
            places_NK=self.places_NK[:, :k],
            scores_NK=self.scores_NK[:, :k],
            distances_NK=self.distances_NK[:, :k],
        )


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An image whose label its neighbours contradict.

    Attributes:
        place: of the image, within `Surroundings.ids`.
        given: its label.
        suggested: what its neighbours say.
        given_share: share of the vote for its label.
        suggested_share: share of the vote for the other.
    """

    place: int
    given: str
    suggested: str
    given_share: float
    suggested_share: float

    @property
    def margin(self) -> float:
        """By how much the neighbours prefer their label."""
        return self.suggested_share - self.given_share


def default_neighbours(count: int) -> int:
    """Say how many neighbours are asked, of so many images."""
    return max(FEWEST_NEIGHBOURS, min(MOST_NEIGHBOURS, int(NEIGHBOUR_SHARE * count)))


def find_surroundings(
    collection: Collection, k: int, *, exact: bool = False, selection: Selection | None = None
) -> Surroundings:
    """Search with every image that is looked at.

    Args:
        collection: where to look.
        k: neighbours of each; fewer where there are fewer.
        exact: whether to compare every pair instead of asking the index.
        selection: the images that are looked at, and are neighbours; all where None.

    Raises:
        UsageError: fewer than two images are looked at.
    """
    mask_N = np.ones(collection.count, np.bool_) if selection is None else selection.mask_N
    ids = collection.ids[mask_N]
    if len(ids) < 2:
        raise UsageError(
            f"images of collection {collection.name} to look at",
            expected="at least 2",
            found=str(len(ids)),
        )
    k = min(k, len(ids) - 1)
    scores_NK, found_NK = padding(len(ids), k)
    starts = range(0, len(ids), BLOCK_ROWS)
    blocks = [slice(start, min(start + BLOCK_ROWS, len(ids))) for start in starts]
    for block in progress(
        blocks, what="looking at neighbours", total=len(ids), size=lambda b: b.stop - b.start
    ):
        found = collection.search_ids(ids[block], k, exact=exact, filter=selection)
        width = found.ids.shape[1]
        found_NK[block, :width], scores_NK[block, :width] = found.ids, found.scores
    return Surroundings(
        ids=ids,
        places_NK=Places(ids).of(found_NK),
        scores_NK=scores_NK,
        distances_NK=_distances(scores_NK, collection.metric),
    )


def farthest_distances(around: Surroundings) -> NDArray[np.float64]:
    """Score each image by the distance to the farthest of its k nearest; (N,), odd is high."""
    return np.asarray(_known(around.distances_NK).max(axis=1))


def mean_distances(around: Surroundings) -> NDArray[np.float64]:
    """Score each image by the mean distance to its k nearest; (N,), odd is high."""
    known_NK = np.isfinite(around.distances_NK)
    sums_N = _known(around.distances_NK).sum(axis=1)
    return np.asarray(sums_N / np.maximum(1, known_NK.sum(axis=1)))


def local_outlier_factors(around: Surroundings) -> NDArray[np.float64]:
    """Score each image by how much denser it is around its neighbours; (N,), 1 is like them."""
    distances_NK, places_NK = _known(around.distances_NK), around.places_NK
    known_NK = places_NK >= 0
    counts_N = np.maximum(1, known_NK.sum(axis=1))
    floor = SMALLEST_DISTANCE * float(np.median(distances_NK[known_NK])) or 1.0
    reached_NK = np.maximum(distances_NK, distances_NK.max(axis=1)[places_NK])
    reach_N = np.where(known_NK, reached_NK, 0).sum(axis=1) / counts_N
    density_N = 1 / np.maximum(reach_N, floor)
    around_N = np.where(known_NK, density_N[places_NK], 0).sum(axis=1) / counts_N
    return np.asarray(around_N / density_N)


Scorer = Callable[[Surroundings], NDArray[np.float64]]
SCORERS: Mapping[str, Scorer] = {
    "farthest": farthest_distances,
    "mean": mean_distances,
    "lof": local_outlier_factors,
}


def find_suspects(
    around: Surroundings,
    labels: Sequence[str | None],
    *,
    temperature: float = TEMPERATURE,
    voters: int = MOST_NEIGHBOURS,
) -> list[Suspect]:
    """Find labels that the neighbours contradict, the most doubtful first.

    The share of the vote that a class has around its own images, on average, is what a class
    must reach around an image to claim it. Where the claimant is not the label, the label is
    suspect.

    Args:
        around: the neighbours.
        labels: N labels; None of an image that has none, which neither votes nor is judged.
        temperature: of the vote; infinity counts every neighbour alike.
        voters: so many of the nearest vote, whatever k a score asks.
    """
    names = sorted({label for label in labels if label is not None})
    if len(names) < 2:
        return []
    numbers = {name: number for number, name in enumerate(names)}
    given_N = np.array([MISSING if label is None else numbers[label] for label in labels])

    def votes() -> Iterator[_Votes]:
        return _count_votes(around, given_N, temperature, voters)

    enough_C = _means(np.concatenate([one.own_B for one in votes()]), given_N, len(names))
    suspects: list[Suspect] = []
    for one in votes():
        claims_BP = np.where(one.shares_BP >= enough_C[one.classes_P], one.shares_BP, 0.0)
        claimed_B = claims_BP.argmax(axis=1)
        is_suspect_B = (claims_BP.max(axis=1) > 0) & (one.given_B >= 0) & (claimed_B != one.given_B)
        suspects += [
            Suspect(
                place=one.start + int(row),
                given=names[one.classes_P[one.given_B[row]]],
                suggested=names[one.classes_P[claimed_B[row]]],
                given_share=float(one.own_B[row]),
                suggested_share=float(one.shares_BP[row, claimed_B[row]]),
            )
            for row in np.flatnonzero(is_suspect_B)
        ]
    return sorted(suspects, key=lambda suspect: (-suspect.margin, suspect.place))


@dataclass(frozen=True, kw_only=True)
class _Votes:
    """The votes around B images that follow one another, for the P classes that are among them.

    Attributes:
        start: place of the first image.
        classes_P: class numbers, rising.
        shares_BP: of each class; they sum to 1, or to 0 where no neighbour has a label.
        given_B: place within `classes_P` of each image's own class; -1 of one without a label.
    """

    start: int
    classes_P: NDArray[np.int64]
    shares_BP: NDArray[np.float64]
    given_B: NDArray[np.int64]

    @property
    def own_B(self) -> NDArray[np.float64]:
        """Each image's share of its own class; 0 of one without a label."""
        own_B = self.shares_BP[np.arange(len(self.given_B)), np.maximum(self.given_B, 0)]
        return np.where(self.given_B >= 0, own_B, 0.0)


def _count_votes(
    around: Surroundings, given_N: NDArray[np.int64], temperature: float, voters: int
) -> Iterator[_Votes]:
    """Count the votes around every image, some images at a time: N x C need not fit."""
    for start in range(0, len(given_N), VOTE_ROWS):
        block = slice(start, start + VOTE_ROWS)
        places_BK = around.places_NK[block, :voters]
        labels_BK = np.where(places_BK < 0, MISSING, given_N[places_BK])
        classes_P = np.unique(np.maximum(np.append(labels_BK, given_N[block]), 0))
        labels_BK, given_B = (
            np.where(some < 0, MISSING, np.searchsorted(classes_P, some))
            for some in (labels_BK, given_N[block])
        )
        votes_BP = weighted_knn_vote(
            around.scores_NK[block],
            labels_BK,
            k=voters,
            temperature=temperature,
            n_classes=len(classes_P),
        ).astype(np.float64)
        yield _Votes(
            start=start,
            classes_P=classes_P,
            shares_BP=votes_BP / np.maximum(votes_BP.sum(axis=1, keepdims=True), 1e-30),
            given_B=given_B,
        )


def _means(
    values_N: NDArray[np.float64], given_N: NDArray[np.int64], n_classes: int
) -> NDArray[np.float64]:
    """Give the mean over the images of each class, of which every one has some: (C,)."""
    order = np.argsort(given_N, kind="stable")
    ends_C = np.searchsorted(given_N[order], np.arange(n_classes), side="right")
    starts_C = np.searchsorted(given_N[order], np.arange(n_classes))
    sorted_N = values_N[order]
    return np.array([sorted_N[n:m].mean() for n, m in zip(starts_C, ends_C, strict=True)])


def _distances(scores_NK: NDArray[np.float32], metric: str) -> NDArray[np.float32]:
    """Turn scores into distances: 1 - cosine, or the root of the squared distance."""
    if metric == "cosine":
        return 1 - scores_NK
    return np.sqrt(np.maximum(0, -scores_NK))


def _known(distances_NK: NDArray[np.float32]) -> NDArray[np.float64]:
    """Count what does not exist as 0."""
    return np.where(np.isfinite(distances_NK), distances_NK, 0.0)
