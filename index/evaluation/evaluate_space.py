"""Evaluation of an embedding space itself: rank, spread, hubs, and drift from another encoder.

Rules:
    No label is needed; where there are some, they say how near together a class lies.
    What follows from sums is measured over all images, block by block; what compares images
    with one another is measured among a seeded sample, and the report says of how many.
    Uniformity and alignment are of vectors of unit length, as in their source, whatever the
    collection's metric; neighbours are by the metric.

Formulas and their sources: `index.evaluation.space_measures`, `hubness` and `drift`.

Shapes: N images, D dimensions, K neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.errors import EvaluationError
from index.evaluation.drift import PairMoments, neighbour_overlap
from index.evaluation.hubness import hubness, neighbour_rows, occurrences
from index.evaluation.knn_scores import number_labels
from index.evaluation.output import hand_over, record, versions
from index.evaluation.space_measures import (
    ClassSums,
    Moments,
    alignment,
    entropy_rank,
    uniformity,
)
from index.evaluation.space_report import Drift, Hub, SpaceReport, as_text
from index.interface import AnyCollection, open_collection
from models.command import counted, progress
from models.errors import UsageError
from models.vectors import finish_vectors

BLOCK_ROWS = 8192
LARGEST_HUBS = 5
FEW_IMAGES = 10
"""Images a dimension, below which CKA is biased enough to be said."""


@dataclass(frozen=True, kw_only=True)
class SpaceOptions:
    """Measure the space that a collection's vectors fill."""

    collection: str
    """The collection: its directory, or milvus:URI#NAME."""
    other: str | None = None
    """A collection of the same images, by another encoder or of other views: joined by key."""
    k: int = 10
    """Neighbours, for hubs and for the overlap with the other collection."""
    sample: int = 20_000
    """Images that are compared with one another, a seeded sample; 0 for all."""
    seed: int = 0
    """Of the sample."""
    out: Path | None = None
    """Directory for report.txt, report.json and space.png."""
    record: bool = False
    """Keep the result in the encoder's bundle.json, too."""
    json: bool = False
    """Print the report as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if self.k < 1:
            raise UsageError("--k", expected="at least 1", found=str(self.k))
        if self.sample < 0 or 0 < self.sample <= self.k:
            raise UsageError("--sample", expected="0, or more than --k", found=str(self.sample))
        if self.seed < 0:
            raise UsageError("--seed", expected="at least 0", found=str(self.seed))


def main(options: SpaceOptions) -> None:
    """Measure, and hand the report over."""
    report = evaluate(options)
    document = dataclasses.asdict(report)

    def draw(out: Path) -> None:
        from index.evaluation.charts import draw_space

        draw_space(out / "space.png", report)

    hand_over(as_text(report), document, as_json=options.json, out=options.out, draw=draw)
    if options.record:
        record("space", document, collection=options.collection, encoder=None)


def evaluate(options: SpaceOptions) -> SpaceReport:
    """Measure the space.

    Raises:
        EvaluationError: there are too few images, or none in both collections.
        HoraceError: a collection cannot be opened.
    """
    with ExitStack() as stack:
        collection = stack.enter_context(closing(open_collection(options.collection)))
        if collection.count <= options.k:
            raise EvaluationError(
                f"collection {collection.name}",
                expected=f"more than k = {options.k} images",
                found=str(collection.count),
                mend="take a smaller --k",
            )
        moments, by_class, together = _sums(collection)
        ids_S = _sample(collection.ids, options.sample, options.seed)
        vectors_SD = collection.vectors(ids_S)
        counts_S = occurrences(neighbour_rows(vectors_SD, options.k, metric=collection.metric))
        drift: Drift | None = None
        notes: list[str] = []
        if options.other is not None:
            other = stack.enter_context(closing(open_collection(options.other)))
            drift, notes = _drift(collection, other, options)
        sigma_K = moments.singular_values()
        return SpaceReport(
            collection=collection.name,
            encoder=collection.encoder,
            fingerprint=collection.fingerprint,
            dim=collection.dim,
            metric=collection.metric,
            n=collection.count,
            n_sample=len(ids_S),
            seed=options.seed,
            rankme=entropy_rank(sigma_K),
            rankme_limit=len(sigma_K),
            singular_values=sigma_K.tolist(),
            dead=moments.dead().tolist(),
            uniformity=uniformity(finish_vectors(vectors_SD, normalize=True)),
            alignment=by_class.alignment(),
            mean_distance=together.alignment(),
            hubness=hubness(counts_S, options.k),
            largest_hubs=_largest_hubs(collection, ids_S, counts_S),
            occurrence_histogram=np.bincount(counts_S).tolist(),
            drift=drift,
            notes=notes,
            versions=versions(),
        )


def _sums(collection: AnyCollection) -> tuple[Moments, ClassSums, ClassSums]:
    """Add up all vectors, those of each class, and all of them as if they were one class."""
    labels = collection.labels()
    names = sorted({label for label in labels if label is not None})
    classes_N, ids_N = number_labels(labels, names), collection.ids
    moments = Moments.none(collection.dim)
    by_class = ClassSums.none(len(names), collection.dim)
    together = ClassSums.none(1, collection.dim)
    for rows in progress(
        _blocks(collection.count), what="vectors", total=collection.count, size=len
    ):
        vectors = collection.vectors(ids_N[rows])
        unit_ND = finish_vectors(vectors, normalize=True)
        moments.add(vectors)
        by_class.add(unit_ND, classes_N[rows])
        together.add(unit_ND, np.zeros(len(rows), np.int64))
    return moments, by_class, together


def _drift(
    collection: AnyCollection, other: AnyCollection, options: SpaceOptions
) -> tuple[Drift, list[str]]:
    """Compare the vectors of the images that two collections have in common.

    Returns:
        What was found, and notes for people.
    """
    ids_P, other_ids_P = _join(collection, other)
    is_same = collection.fingerprint == other.fingerprint
    moments = PairMoments.none(collection.dim, other.dim)
    distance = 0.0
    for rows in _blocks(len(ids_P)):
        first, second = collection.vectors(ids_P[rows]), other.vectors(other_ids_P[rows])
        moments.add(first, second)
        if is_same:
            units = [finish_vectors(one, normalize=True) for one in (first, second)]
            distance += len(rows) * alignment(*units)
    chosen = _sample(np.arange(len(ids_P)), options.sample, options.seed)
    k = min(options.k, len(chosen) - 1)
    shared = neighbour_overlap(
        neighbour_rows(collection.vectors(ids_P[chosen]), k, metric=collection.metric),
        neighbour_rows(other.vectors(other_ids_P[chosen]), k, metric=other.metric),
    )
    notes = []
    if n_alone := collection.count - len(ids_P):
        notes.append(f"{counted(n_alone, 'image is', plural='images are')} not in {other.name}")
    most_dims = max(collection.dim, other.dim)
    if len(ids_P) < FEW_IMAGES * most_dims:
        notes.append(f"CKA is biased upwards: {len(ids_P):,} images for {most_dims} dimensions")
    drift = Drift(
        collection=other.name,
        fingerprint=other.fingerprint,
        dim=other.dim,
        is_same_encoder=is_same,
        n_pairs=len(ids_P),
        linear_cka=moments.linear_cka(),
        procrustes_residual=moments.procrustes_residual(),
        n_overlap=len(chosen),
        neighbour_overlap=float(shared.mean()),
        overlap_by_chance=k / (len(chosen) - 1),
        alignment=distance / len(ids_P) if is_same else None,
        overlap_histogram=np.bincount(np.rint(shared * k).astype(int), minlength=k + 1).tolist(),
    )
    return drift, notes


def _join(
    collection: AnyCollection, other: AnyCollection
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair the ids of images that have the same key, in the first collection's order.

    Raises:
        EvaluationError: fewer than two have.
    """
    theirs = dict(zip(other.keys(), other.ids.tolist(), strict=True))
    pairs = [
        (id_, theirs[key])
        for key, id_ in zip(collection.keys(), collection.ids.tolist(), strict=True)
        if key in theirs
    ]
    if len(pairs) < 2:
        keys = collection.keys()
        raise EvaluationError(
            f"collection {other.name}",
            expected=f"images of {collection.name}, by their keys, such as {keys[0]!r}",
            found=f"{len(pairs)} of them among its {other.count}",
            mend="build it of the same source",
        )
    ids_P, other_ids_P = np.array(pairs, np.int64).T
    return ids_P, other_ids_P


def _largest_hubs(
    collection: AnyCollection, ids_S: NDArray[np.int64], counts_S: NDArray[np.int64]
) -> list[Hub]:
    """Name the images that are in the most lists."""
    most = np.argsort(-counts_S, kind="stable")[:LARGEST_HUBS]
    return [
        Hub(key=row.key, label=row.label, occurrences=int(counts_S[place]))
        for row, place in zip(collection.rows(ids_S[most]), most, strict=True)
    ]


def _sample(items_N: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Draw at most n without replacement, in their order; 0 for all."""
    if n == 0 or len(items_N) <= n:
        return items_N
    return items_N[np.sort(np.random.default_rng(seed).choice(len(items_N), n, replace=False))]


def _blocks(n: int) -> Iterator[NDArray[np.int64]]:
    """Cut row numbers into blocks."""
    for start in range(0, n, BLOCK_ROWS):
        yield np.arange(start, min(n, start + BLOCK_ROWS))
