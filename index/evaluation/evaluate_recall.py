"""Evaluation of an index: what it finds of what an exact search finds, how fast, at what size.

Rules:
    Truth is an exact search of the same collection, under the same filter, after the same churn.
    Filters are bounds of the ids, which are hashes: what they leave has nothing to do with what
    an image shows, as a filter on a date or an owner has not.
    Churn happens to a copy.
    Queries that are images of the collection are left out of their own answers; they lie where
    vectors lie, so that they are easier than new images. The report says which they are.

Recall and its source: `index.evaluation.recall_scores`.

Shapes: Q queries, D dimensions, K neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection
from index.errors import EvaluationError
from index.evaluation.bootstrap import bootstrap_interval
from index.evaluation.churn import churned
from index.evaluation.output import hand_over, versions
from index.evaluation.queries import Queries, open_queries, unread_notes
from index.evaluation.recall_report import Condition, Recall, RecallReport, as_text
from index.evaluation.recall_scores import recall_by_score, worst_mean
from index.evaluation.timing import time_searches
from index.interface import AnyCollection, open_collection
from index.neighbours import Neighbours
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """Measure what an index finds of what an exact search finds."""

    collection: str
    """The collection whose index is measured: its directory, or milvus:URI#NAME."""
    queries: str | None = None
    """Another collection or a source of images; the collection's own by default."""
    encoder: str | None = None
    """Embeds a source's images: a bundle or URI; by default the one that built the collection."""
    n_queries: int = 1000
    """A seeded sample of so many queries where there are more; 0 for all."""
    k: tuple[int, ...] = (1, 10, 100)
    """Numbers of neighbours."""
    selectivity: tuple[float, ...] = (0.5, 0.1, 0.01)
    """Shares of the images that filters leave, above 0 and below 1."""
    churn: float = 0.2
    """Share of the images that are deleted from a copy and added back; 0 leaves it out, as does a
    Milvus, which makes no copies."""
    scratch: Path | None = None
    """Directory for that copy; the system's by default."""
    threads: int | None = None
    """CPU threads of a search; the CPU budget by default."""
    seed: int = 0
    """Of the sample, the intervals and the churn."""
    out: Path | None = None
    """Directory for report.txt, report.json and recall.png."""
    json: bool = False
    """Print the report as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if not self.k or min(self.k) < 1:
            raise UsageError("--k", expected="numbers of at least 1", found=str(self.k))
        if self.n_queries < 0:
            raise UsageError("--n-queries", expected="at least 0", found=str(self.n_queries))
        if self.seed < 0:
            raise UsageError("--seed", expected="at least 0", found=str(self.seed))
        if not all(0 < share < 1 for share in self.selectivity):
            raise UsageError(
                "--selectivity", expected="shares above 0, below 1", found=str(self.selectivity)
            )
        if not 0 <= self.churn < 1:
            raise UsageError("--churn", expected="0 to below 1", found=str(self.churn))
        if self.threads is not None and self.threads < 1:
            raise UsageError("--threads", expected="at least 1", found=str(self.threads))
        if self.scratch is not None and not self.scratch.is_dir():
            raise UsageError("--scratch", expected="a directory", found=str(self.scratch))


def main(options: RecallOptions) -> None:
    """Measure, and hand the report over."""
    report = evaluate(options)

    def draw(out: Path) -> None:
        from index.evaluation.charts import draw_recall

        draw_recall(out / "recall.png", report)

    hand_over(
        as_text(report), dataclasses.asdict(report), as_json=options.json, out=options.out,
        draw=draw,
    )  # fmt: skip


def evaluate(options: RecallOptions) -> RecallReport:
    """Measure the index.

    Raises:
        EvaluationError: there are too few images, or there is no room for a copy.
        HoraceError: collection, encoder or images cannot be used.
    """
    with ExitStack() as stack:
        collection = stack.enter_context(
            closing(open_collection(options.collection, threads=options.threads))
        )
        if collection.count < 2:
            raise EvaluationError(
                f"collection {collection.name}",
                expected="at least 2 images",
                found=str(collection.count),
            )
        queries = open_queries(stack, collection, options.queries, encoder=options.encoder)
        queries = queries.sample(options.n_queries, seed=options.seed)
        if not len(queries):
            raise EvaluationError(
                f"queries {queries.name}", expected="at least 1 image", found="none"
            )
        asked = _Asked.of(queries, tuple(sorted(set(options.k))), seed=options.seed)
        filters, notes = _filters(collection, options.selectivity)
        notes += unread_notes(queries.rejects)
        if collection.factory == "Flat":
            notes.append("the collection is Flat: every search is exact")
        exact = time_searches(
            lambda rows, k: asked.search(collection, k, rows=rows, exact=True), len(queries)
        )
        conditions = [
            asked.measure(collection, name, filter=filter) for name, filter in filters
        ] + list(_after_churn(collection, asked, options))
        sizes = _bytes_by_file(collection) if isinstance(collection, Collection) else {}
        return RecallReport(
            collection=collection.name,
            fingerprint=collection.fingerprint,
            factory=collection.factory,
            dim=collection.dim,
            metric=collection.metric,
            n_collection=collection.count,
            queries=queries.name,
            is_against_itself=queries.ids_Q is not None,
            n_queries=len(queries),
            n_all_queries=queries.n_all,
            seed=options.seed,
            threads=options.threads or cpu_budget(),
            cpu=cpu_name(),
            bytes_by_file=sizes,
            bytes_a_vector=sum(sizes.values()),
            exact=exact,
            conditions=conditions,
            notes=notes,
            versions=versions(),
        )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Queries that are asked again and again.

    Attributes:
        vectors_QD: float32.
        ids_Q: those of the queries themselves, where they are images of the collection.
        ks: numbers of neighbours, rising.
        seed: of the bootstrap.
    """

    vectors_QD: NDArray[np.float32]
    ids_Q: NDArray[np.int64] | None
    ks: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, queries: Queries, ks: tuple[int, ...], *, seed: int) -> _Asked:
        """Read the queries' vectors."""
        vectors_QD = queries.vectors(np.arange(len(queries)))
        return cls(vectors_QD=vectors_QD, ids_Q=queries.ids_Q, ks=ks, seed=seed)

    def search(
        self,
        collection: AnyCollection,
        k: int,
        *,
        rows: NDArray[np.int64] | None = None,
        filter: str | None = None,
        exact: bool = False,
    ) -> Neighbours:
        """Search with the queries of these numbers; with all of them where None."""
        own = slice(None) if rows is None else rows
        return collection.search(
            self.vectors_QD[own], k, fingerprint=collection.fingerprint, exact=exact,
            filter=filter, without_QW=None if self.ids_Q is None else self.ids_Q[own][:, None],
        )  # fmt: skip

    def measure(
        self, collection: AnyCollection, name: str, *, filter: str | None = None
    ) -> Condition:
        """Measure recall and time of one way of searching."""
        truth = self.search(collection, self.ks[-1], filter=filter, exact=True)
        by_k = {}
        for k in self.ks:
            found = self.search(collection, k, filter=filter)
            recall_Q = recall_by_score(collection, self.vectors_QD, found, truth, k)
            low, high = bootstrap_interval(recall_Q[:, None], seed=self.seed)
            by_k[k] = Recall(
                mean=float(recall_Q.mean()),
                low=float(low[0]),
                high=float(high[0]),
                worst_5_percent=worst_mean(recall_Q),
                complete=float((recall_Q == 1).mean()),
            )
        return Condition(
            name=name,
            filter=filter,
            n_images=collection.count if filter is None else collection.select(filter).count,
            by_k=by_k,
            timing=time_searches(
                lambda rows, k: self.search(collection, k, rows=rows, filter=filter),
                len(self.vectors_QD),
            ),
        )


def _filters(
    collection: AnyCollection, shares: tuple[float, ...]
) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Make a filter for each share of the images, no filter first.

    Returns:
        Names and filters, and notes for people.
    """
    filters: list[tuple[str, str | None]] = [("all images", None)]
    notes = []
    ids_N = np.sort(collection.ids)
    for share in shares:
        n = round(share * len(ids_N))
        if n < 1:
            notes.append(f"a filter of {share:g} of {len(ids_N)} images leaves none")
            continue
        filters.append((f"{100 * share:g}% by a filter", f"id <= {ids_N[n - 1]}"))
    return filters, notes


def _after_churn(
    collection: AnyCollection, asked: _Asked, options: RecallOptions
) -> Iterator[Condition]:
    """Measure what is left of recall in a copy that images come and go in."""
    if not options.churn or not isinstance(collection, Collection):
        return
    steps = churned(
        collection, options.churn,
        seed=options.seed, scratch=options.scratch, threads=options.threads,
    )  # fmt: skip
    with closing(steps):
        for name, copy in steps:
            yield asked.measure(copy, name)


def _bytes_by_file(collection: Collection) -> dict[str, float]:
    """Give the bytes a vector of the files that the manifest names, the largest first.

    What a sync remembers, the lock, and what a killed writer left are no part of the content.
    """
    sizes: dict[str, int] = {}
    for name, entry in collection.manifest.files.items():
        kind = PurePosixPath(name).name
        sizes[kind] = sizes.get(kind, 0) + entry.size_bytes
    if (journal := collection.manifest.journal) is not None:
        with suppress(OSError):  # sealed meanwhile: this snapshot has it open
            sizes["journal"] = (collection.path / journal.name).stat().st_size
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return {name: size / collection.count for name, size in ordered}
