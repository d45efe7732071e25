"""kNN evaluation: weighted vote over a collection's labels, beside honest baselines.

Rules:
    The headline is k = 20 at T = .07, fixed before any query is seen; the other k are shown
    and never chosen from.
    The headline is exact. The index stands beside it as a difference, with its recall.
    Raw pixels, whitened pixels and an untrained encoder are measured in the same run.
    Whatever was left out or looks suspicious (queries without a label, classes that the
    collection lacks, images that are in both splits) is said in the report.

Source: Wu et al. (arXiv 1805.01978) and Caron et al., DINO (arXiv 2104.14294), for the
vote and its k and T.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection, Neighbours
from index.embed import open_collection_encoder
from index.errors import EvaluationError
from index.evaluation import baselines
from index.evaluation.baselines import Seen, see_images
from index.evaluation.knn_report import (
    MAX_CONFUSION_CLASSES,
    BaselineRow,
    IndexDelta,
    KnnReport,
    as_text,
)
from index.evaluation.knn_scores import (
    Accuracy,
    class_scores,
    confusion_matrix,
    vote,
)
from index.evaluation.knn_task import Task, make_task
from index.evaluation.output import hand_over, record, versions
from index.evaluation.recall_scores import recall_by_score, worst_mean
from index.evaluation.same_images import is_same_vector, sources_of, stored_digests
from index.knn import MISSING, knn_search
from index.neighbours import require_cosine
from index.storage.ids import Places
from models.command import counted
from models.encoder import Encoder
from models.errors import SourceError, UsageError
from models.images import ImageSource, open_source
from models.providers import ON_CPU, split_placement
from models.runtime import OnnxEncoder, open_random_twin

HEADLINE_K = 20
RECALL_K = 10


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Measure an encoder by the labels of the nearest neighbours."""

    collection: Path
    """The collection whose labels vote."""
    images: str
    """The labelled images to classify: a source, as for index.build."""
    encoder: str | None = None
    """The encoder: a bundle or URI; by default the one that built the collection."""
    k: tuple[int, ...] = (1, 5, 10, 20, 100, 200)
    """Numbers of neighbours; 20, the headline, is always among them."""
    temperature: float = 0.07
    """T of the vote exp(s / T)."""
    baselines: bool = True
    """Measure raw pixels, whitened pixels and the untrained encoder, too."""
    out: Path | None = None
    """Directory for report.txt, report.json and confusion.png."""
    record: bool = False
    """Keep the result in the encoder's bundle.json, too."""
    json: bool = False
    """Print the report as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if not self.k or min(self.k) < 1:
            raise UsageError("--k", expected="numbers of at least 1", found=str(self.k))
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                "--temperature", expected="above 0, and finite", found=str(self.temperature)
            )


def main(options: KnnOptions) -> None:
    """Evaluate, and hand the report over."""
    report = evaluate(options)
    document = dataclasses.asdict(report)

    def draw(out: Path) -> None:
        from index.evaluation.plots import draw_confusion

        if not report.confusion:
            return
        headline = report.encoder_by_k[report.headline_k]
        draw_confusion(
            out / "confusion.png",
            np.array(report.confusion),
            report.classes,
            counts_C=np.array([one.n for one in report.per_class]),
            title=f"{report.encoder}: k = {report.headline_k}, {headline.top1:.2%} top-1",
        )

    hand_over(as_text(report), document, as_json=options.json, out=options.out, draw=draw)
    if options.record:
        kept = {name: value for name, value in document.items() if name != "confusion"}
        record("knn", kept, collection=str(options.collection), encoder=options.encoder)


def evaluate(options: KnnOptions) -> KnnReport:
    """Measure the encoder's row and, on request, the baselines' rows.

    Raises:
        UsageError: the collection compares no cosines.
        EvaluationError: there are no labels, none in common, or no query.
        HoraceError: collection, encoder or images cannot be used.
    """
    with ExitStack() as stack:
        collection = stack.enter_context(Collection.open(options.collection))
        require_cosine(collection.metric, "kNN evaluation")
        encoder = open_collection_encoder(collection, options.encoder)
        stack.enter_context(closing(encoder))
        twin = _open_twin(collection, options) if options.baselines else None
        encoders = [encoder] if twin is None else [encoder, stack.enter_context(closing(twin))]
        images = open_source(options.images)
        bank = _open_bank(collection) if options.baselines else []
        queries = see_images(
            [images],
            encoders,
            preprocess_for=encoder,
            with_pixels=options.baselines,
            what="queries",
        )
        ks = tuple(sorted({*options.k, HEADLINE_K}))
        task, queries, notes = make_task(
            collection, queries, images=options.images, ks=ks, temperature=options.temperature
        )
        return _report(options, collection, encoder, twin, queries, bank, task, notes)


def _report(
    options: KnnOptions,
    collection: Collection,
    encoder: Encoder,
    twin: OnnxEncoder | None,
    queries: Seen,
    bank_sources: Sequence[ImageSource],
    task: Task,
    notes: list[str],
) -> KnnReport:
    """Search, vote and count."""
    k_max = task.ks[-1]
    vectors_QD = queries.vectors_ND[0]
    exact = collection.search(vectors_QD, k_max, fingerprint=encoder.fingerprint, exact=True)
    places = Places(collection.ids)
    rows_QK = places.of(exact.ids)
    by_k = task.score(exact.scores, rows_QK)
    blocks = vote(
        exact.scores,
        task.labels_of(rows_QK),
        k=HEADLINE_K,
        temperature=task.temperature,
        n_classes=len(task.classes),
    )
    predicted_Q = np.concatenate(
        [
            np.where(votes_BC.max(axis=1) > 0, votes_BC.argmax(axis=1), MISSING)
            for _, votes_BC in blocks
        ]
    )
    if n_voteless := int((predicted_Q == MISSING).sum()):
        lacks = f"no labelled neighbour among {HEADLINE_K} and"
        one, many = f"query has {lacks} counts as wrong", f"queries have {lacks} count as wrong"
        notes.append(counted(n_voteless, one, plural=many))
    confusion = []
    if len(task.classes) <= MAX_CONFUSION_CLASSES:
        confusion = confusion_matrix(task.truth_Q, predicted_Q, len(task.classes)).tolist()
    else:
        notes.append(f"the confusion matrix is left out: there are {len(task.classes):,} classes")
    rows, digests = [], stored_digests(collection)
    if options.baselines:
        bank = _see_bank(collection, bank_sources, encoder, twin)
        rows = _baseline_rows(task, queries, bank, twin, encoder)
        digests = bank.digests
    in_bank = None if digests is None else set(digests)
    return KnnReport(
        collection=collection.name,
        images=options.images,
        encoder=encoder.name,
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        n_collection=collection.count,
        n_queries=len(queries.keys),
        classes=task.classes,
        temperature=task.temperature,
        ks=list(task.ks),
        headline_k=HEADLINE_K,
        encoder_by_k=by_k,
        index=_index_delta(collection, places, vectors_QD, exact, task, by_k),
        baselines=rows,
        same_vector=int(is_same_vector(vectors_QD, exact.scores[:, 0], collection.metric).sum()),
        duplicates=None
        if in_bank is None
        else sum(digest in in_bank for digest in queries.digests),
        per_class=class_scores(task.truth_Q, predicted_Q, task.classes),
        confusion=confusion,
        notes=notes,
        versions=versions(),
    )


def _index_delta(
    collection: Collection,
    places: Places,
    vectors_QD: NDArray[np.float32],
    exact: Neighbours,
    task: Task,
    by_k: dict[int, Accuracy],
) -> IndexDelta | None:
    """Measure what the index changes; None where every search is exact.

    Each k is a search of its own: a larger one makes HNSW look at more candidates.
    """
    if collection.factory == "Flat":
        return None
    through: dict[int, Accuracy] = {}
    for k in task.ks:
        found = collection.search(vectors_QD, k, fingerprint=collection.fingerprint)
        through |= task.score(found.scores, places.of(found.ids), (k,))
    at_10 = collection.search(vectors_QD, RECALL_K, fingerprint=collection.fingerprint)
    recall_Q = recall_by_score(collection, vectors_QD, at_10, exact, RECALL_K)
    return IndexDelta(
        factory=collection.factory,
        by_k={
            k: Accuracy(top1=through[k].top1 - by_k[k].top1, top5=through[k].top5 - by_k[k].top5)
            for k in task.ks
        },
        recall_at_10=float(recall_Q.mean()),
        worst_5_percent=worst_mean(recall_Q),
    )


def _open_bank(collection: Collection) -> list[ImageSource]:
    """Open the collection's own images, which the baselines are measured on."""
    try:
        return sources_of(collection)
    except SourceError as error:
        raise EvaluationError(
            f"sources of collection {collection.name}",
            expected="the images that were indexed, which the baselines need",
            found=f"{error.found} for {error.what}",
            mend="put them back, or leave the baselines out with --no-baselines",
        ) from error


def _see_bank(
    collection: Collection,
    sources: Sequence[ImageSource],
    encoder: Encoder,
    twin: OnnxEncoder | None,
) -> Seen:
    """Go over the collection's own images again, for pixels and for the untrained encoder."""
    bank = see_images(
        sources,
        [] if twin is None else [twin],
        preprocess_for=encoder,
        with_pixels=True,
        what="baselines",
    )
    return baselines.match_images(bank, collection.keys(), collection.name)


def _baseline_rows(
    task: Task, queries: Seen, bank: Seen, twin: OnnxEncoder | None, encoder: Encoder
) -> list[BaselineRow]:
    """Measure whitened pixels, raw pixels and the untrained encoder."""
    assert queries.pixels_NP is not None, "pixels were asked for"
    assert bank.pixels_NP is not None, "pixels were asked for"
    k_max = min(task.ks[-1], len(bank.keys))
    whitening = baselines.Whitening.fit(bank.pixels_NP)
    spec = encoder.preprocessing
    side = (baselines.reduced_side(spec.height), baselines.reduced_side(spec.width))
    reduced = side != (spec.height, spec.width)
    size = f"{side[0]} x {side[1]} x {spec.channels}" + (", averaged down" if reduced else "")
    rows = []
    for name, features, dim in (
        ("whitened pixels", whitening, whitening.weights_PD.shape[1]),
        ("raw pixels", baselines.unit_pixels, bank.pixels_NP.shape[1]),
    ):
        found = baselines.pixel_neighbours(queries.pixels_NP, bank.pixels_NP, k_max, features)
        rows.append(BaselineRow(name=name, dim=dim, by_k=task.score(*found), note=size))
    if twin is None:
        note = "none: the bundle has no random.onnx, or the encoder is a server's"
        return [*rows, BaselineRow(name="random encoder", dim=None, by_k=None, note=note)]
    found = knn_search(queries.vectors_ND[1], bank.vectors_ND[0], k_max)
    note = baselines.twin_note(twin.bundle.provenance)
    return [
        *rows,
        BaselineRow(name="random encoder", dim=twin.dim, by_k=task.score(*found), note=note),
    ]


def _open_twin(collection: Collection, options: KnnOptions) -> OnnxEncoder | None:
    """Open the untrained twin; a remote encoder shows none."""
    where, placement = split_placement(options.encoder or collection.manifest.encoder)
    return None if "://" in where else open_random_twin(Path(where), placement=placement or ON_CPU)
