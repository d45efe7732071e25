"""Retrieval evaluation: whether what ranks first has the query's label.

Rules:
    Every ranking is exact; what an index changes is the matter of `index.evaluate recall`.
    Of equal scores the image that stands first in the collection ranks first.
    A query is no answer to itself. What else looks like the query's own image is flagged, and
    the figures stand there with such queries and without.
    Rankings are made in blocks, so that memory does not grow with the queries; a block holds
    as many places as its queries have relevant images.

Formulas and their sources: `index.evaluation.retrieval_scores`.

Shapes: N images of the collection, Q queries, K places, M measures.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.errors import EvaluationError
from index.evaluation.bootstrap import LEVEL, RESAMPLES, bootstrap_interval
from index.evaluation.knn_scores import number_labels
from index.evaluation.output import hand_over, record, versions
from index.evaluation.queries import Queries, open_queries, unread_notes
from index.evaluation.retrieval_report import (
    ClassRetrieval,
    Duplicates,
    Estimate,
    RetrievalReport,
    as_text,
)
from index.evaluation.retrieval_scores import (
    LEAST_PLACES,
    MAP_AT_R,
    MEASURES,
    retrieval_scores,
)
from index.evaluation.same_images import collection_digests, is_same_vector
from index.interface import AnyCollection, open_collection
from index.knn import MISSING
from index.storage.ids import Places
from models.command import counted, progress
from models.errors import UsageError

BLOCK_BYTES = 64 << 20
"""Of the scores and ids of one block of rankings."""

BYTES_A_PLACE = 4 + 8 + 8 + 16
"""A score, an id, its place, and what scoring makes of it."""


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Measure whether the nearest images are of the query's class."""

    collection: str
    """The labelled collection that is ranked: its directory, or milvus:URI#NAME."""
    queries: str | None = None
    """Another collection or a source of images; the collection itself by default."""
    encoder: str | None = None
    """Embeds a source's images: a bundle or URI; by default the one that built the collection."""
    n_queries: int = 10_000
    """A seeded sample of so many queries where there are more; 0 for all."""
    contents: bool = False
    """Read the images again to compare them byte for byte, where the builds took no digests."""
    seed: int = 0
    """Of the sample and of the bootstrap."""
    out: Path | None = None
    """Directory for report.txt, report.json and retrieval.png."""
    record: bool = False
    """Keep the result in the encoder's bundle.json, too."""
    json: bool = False
    """Print the report as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if self.n_queries < 0:
            raise UsageError("--n-queries", expected="at least 0", found=str(self.n_queries))
        if self.seed < 0:
            raise UsageError("--seed", expected="at least 0", found=str(self.seed))


def main(options: RetrievalOptions) -> None:
    """Evaluate, and hand the report over."""
    report = evaluate(options)
    document = dataclasses.asdict(report)

    def draw(out: Path) -> None:
        from index.evaluation.charts import draw_retrieval

        draw_retrieval(out / "retrieval.png", report)

    hand_over(as_text(report), document, as_json=options.json, out=options.out, draw=draw)
    if options.record:
        record("retrieval", document, collection=options.collection, encoder=options.encoder)


def evaluate(options: RetrievalOptions) -> RetrievalReport:
    """Rank, score and count.

    Raises:
        EvaluationError: there are no labels, or no query has a relevant image.
        HoraceError: collection, encoder or images cannot be used.
    """
    with ExitStack() as stack:
        collection = stack.enter_context(closing(open_collection(options.collection)))
        queries = open_queries(stack, collection, options.queries, encoder=options.encoder)
        bank = _Bank.of(collection)
        queries, n_relevant_Q, notes = _choose(collection, bank, queries, options)
        scores_QM, is_same_Q = _rank(collection, bank, queries, n_relevant_Q)
        is_copy_Q = _find_copies(collection, queries, may_read=options.contents)
        measures = _estimates(scores_QM, options.seed)
        per_class = _per_class(bank, queries, scores_QM)
        return RetrievalReport(
            collection=collection.name,
            queries=queries.name,
            is_against_itself=queries.ids_Q is not None,
            encoder=collection.encoder,
            fingerprint=collection.fingerprint,
            dim=collection.dim,
            metric=collection.metric,
            n_collection=collection.count,
            n_queries=len(queries),
            n_all_queries=queries.n_all,
            measures=measures,
            level=LEVEL,
            resamples=RESAMPLES,
            seed=options.seed,
            duplicates=_without_duplicates(scores_QM, is_same_Q, is_copy_Q, options.seed),
            per_class=per_class,
            worst_class=min(
                (one for one in per_class if one.means is not None),
                key=lambda one: (one.means or {})[MAP_AT_R],
            ).label,
            notes=notes,
            versions=versions(),
        )


@dataclass(frozen=True, kw_only=True)
class _Bank:
    """The labels of the collection.

    Attributes:
        classes: labels, sorted.
        class_N: class number of every image, -1 for none.
        counts_C: images a class.
        places: of ids.
    """

    classes: Sequence[str]
    class_N: NDArray[np.int64]
    counts_C: NDArray[np.int64]
    places: Places

    @classmethod
    def of(cls, collection: AnyCollection) -> _Bank:
        """Read the labels.

        Raises:
            EvaluationError: there are none.
        """
        labels = collection.labels()
        classes = sorted({label for label in labels if label is not None})
        if not classes:
            raise EvaluationError(
                f"collection {collection.name}",
                expected="labels",
                found="none",
                mend="build it of labelled images",
            )
        class_N = number_labels(labels, classes)
        return cls(
            classes=classes,
            class_N=class_N,
            counts_C=np.bincount(class_N[class_N >= 0], minlength=len(classes)),
            places=Places(collection.ids),
        )

    def classes_of(self, ids_QK: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the class numbers of ids; -1 where there is none."""
        return np.append(self.class_N, MISSING)[self.places.of(ids_QK)]


def _choose(
    collection: AnyCollection, bank: _Bank, queries: Queries, options: RetrievalOptions
) -> tuple[Queries, NDArray[np.int64], list[str]]:
    """Leave out the queries that cannot be scored, and take a sample of the others.

    Returns:
        The queries, R of each, and notes for people.
    """
    truth_Q = number_labels(queries.labels, bank.classes)
    counts_Q = np.append(bank.counts_C, 0)[truth_Q]
    n_relevant_Q = counts_Q - (queries.ids_Q is not None) * (truth_Q >= 0)
    notes = unread_notes(queries.rejects)
    unlabelled = sum(label is None for label in queries.labels)
    if unlabelled:
        one, many = "query has no label and is left out", "queries have no label and are left out"
        notes.append(counted(unlabelled, one, plural=many))
    alone = int((n_relevant_Q == 0).sum()) - unlabelled
    if alone:
        one = "query has no other image of its class and is left out"
        many = "queries have no other image of their class and are left out"
        notes.append(counted(alone, one, plural=many))
    without_label = int((bank.class_N < 0).sum())
    if without_label:
        one, many = "image of the collection has", "images of the collection have"
        notes.append(f"{counted(without_label, one, plural=many)} no label or relevance")
    kept = np.flatnonzero(n_relevant_Q > 0)
    if not len(kept):
        raise EvaluationError(
            f"queries {queries.name}",
            expected=f"an image of a class that collection {collection.name} has another image of",
            found=f"none among {queries.n_all}",
            mend="evaluate with labelled images of the collection's classes",
        )
    chosen = queries.pick(kept).sample(options.n_queries, seed=options.seed)
    truth_Q = number_labels(chosen.labels, bank.classes)
    return chosen, bank.counts_C[truth_Q] - (chosen.ids_Q is not None), notes


def _rank(
    collection: AnyCollection, bank: _Bank, queries: Queries, n_relevant_Q: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Rank the collection for every query.

    Queries with as many relevant images go together, so that no place is found for nothing.

    Returns:
        (Q, M) scores, and (Q,) whether the nearest image's vector is the query's own.
    """
    truth_Q = number_labels(queries.labels, bank.classes)
    order = np.argsort(n_relevant_Q, kind="stable")
    scores_QM = np.empty((len(queries), len(MEASURES)))
    is_same_Q = np.empty(len(queries), np.bool_)
    for block in progress(
        _blocks(order, n_relevant_Q), what="ranking", total=len(queries), size=len
    ):
        k = max(LEAST_PLACES, int(n_relevant_Q[block].max()))
        vectors_QD = queries.vectors(block)
        found = collection.search(
            vectors_QD, k, fingerprint=collection.fingerprint, exact=True,
            without_QW=None if queries.ids_Q is None else queries.ids_Q[block, None],
        )  # fmt: skip
        relevant_QK = bank.classes_of(found.ids) == truth_Q[block, None]
        missing = max(0, k - relevant_QK.shape[1])
        relevant_QK = np.pad(relevant_QK, ((0, 0), (0, missing)))
        scores_QM[block] = retrieval_scores(relevant_QK, n_relevant_Q[block])
        is_same_Q[block] = is_same_vector(vectors_QD, found.scores[:, 0], collection.metric)
    return scores_QM, is_same_Q


def _blocks(order: NDArray[np.int64], n_relevant_Q: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut queries, ordered by R, so that the places of each block fit `BLOCK_BYTES`."""
    blocks, start = [], 0
    while start < len(order):
        # The last of a block has the most places; a guess by the first is mended once.
        n = len(order) - start
        for _ in range(2):
            most = max(LEAST_PLACES, int(n_relevant_Q[order[start + n - 1]]))
            n = min(n, max(1, BLOCK_BYTES // (BYTES_A_PLACE * most)))
        blocks.append(order[start : start + n])
        start += n
    return blocks


def _find_copies(
    collection: AnyCollection, queries: Queries, *, may_read: bool
) -> NDArray[np.bool_] | None:
    """Find the queries whose content is that of another image of the collection."""
    digests = collection_digests(collection, may_read=may_read)
    asked = None if digests is None else queries.digests(may_read)
    if digests is None or asked is None:
        return None
    counts = Counter(digests)
    own = 0 if queries.ids_Q is None else 1
    return np.array([counts[digest] > own for digest in asked])


def _without_duplicates(
    scores_QM: NDArray[np.float64],
    is_same_Q: NDArray[np.bool_],
    is_copy_Q: NDArray[np.bool_] | None,
    seed: int,
) -> Duplicates:
    """Count the queries that are in the collection, and score the others alone."""
    is_flagged_Q = is_same_Q if is_copy_Q is None else is_same_Q | is_copy_Q
    n_flagged = int(is_flagged_Q.sum())
    is_told = 0 < n_flagged < len(is_flagged_Q)
    return Duplicates(
        same_vector=int(is_same_Q.sum()),
        same_content=None if is_copy_Q is None else int(is_copy_Q.sum()),
        n_flagged=n_flagged,
        without=_estimates(scores_QM[~is_flagged_Q], seed) if is_told else None,
    )


def _estimates(scores_QM: NDArray[np.float64], seed: int) -> dict[str, Estimate]:
    """Give the mean of every measure with its interval."""
    low_M, high_M = bootstrap_interval(scores_QM, seed=seed)
    columns = zip(MEASURES, scores_QM.mean(axis=0), low_M, high_M, strict=True)
    return {
        name: Estimate(mean=float(mean), low=float(low), high=float(high))
        for name, mean, low, high in columns
    }


def _per_class(
    bank: _Bank, queries: Queries, scores_QM: NDArray[np.float64]
) -> list[ClassRetrieval]:
    """Give the means of every class."""
    truth_Q = number_labels(queries.labels, bank.classes)
    found = []
    for number, label in enumerate(bank.classes):
        own = scores_QM[truth_Q == number]
        means = dict(zip(MEASURES, map(float, own.mean(axis=0)), strict=True)) if len(own) else None
        found.append(
            ClassRetrieval(
                label=label,
                n_queries=len(own),
                n_images=int(bank.counts_C[number]),
                means=means,
            )
        )
    return found
