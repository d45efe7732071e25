"""The report of a kNN evaluation: what it holds, and how people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from index.evaluation.knn_scores import Accuracy, ClassScore
from index.evaluation.output import first_classes
from index.evaluation.same_images import same_content_line, same_vector_line
from models.command import counted, shown

MAX_PRINTED_CLASSES = 20
"""A wider confusion matrix fits no terminal; the picture and the JSON have all of it."""

MAX_CONFUSION_CLASSES = 1000
"""A wider one is in no report: as JSON it would be read by nobody, and take gigabytes to write."""

FEW_KNOWN = 0.01
"""Queries that the collection has itself, up to which the accuracy is hardly theirs."""


@dataclass(frozen=True, kw_only=True)
class BaselineRow:
    """One row beside the encoder's.

    Attributes:
        name: what was compared instead of the encoder's vectors.
        dim: length of its vectors.
        by_k: its accuracies; None where it could not be measured, as `note` says.
        note: what people should know.
    """

    name: str
    dim: int | None
    by_k: dict[int, Accuracy] | None
    note: str


@dataclass(frozen=True, kw_only=True)
class IndexDelta:
    """What searching through the index changes.

    Attributes:
        factory: of the FAISS index.
        by_k: accuracies through the index, less the exact ones.
        recall_at_10: share of the exact ten neighbours that the index finds.
        worst_5_percent: the same over the worst twentieth of the queries.
    """

    factory: str
    by_k: dict[int, Accuracy]
    recall_at_10: float
    worst_5_percent: float


@dataclass(frozen=True, kw_only=True)
class KnnReport:
    """Everything that an evaluation found.

    Attributes:
        collection: its name.
        images: the source of the queries.
        encoder: its name.
        fingerprint: of the encoder.
        dim: length of its vectors.
        n_collection: images that vote.
        n_queries: images that were classified.
        classes: labels, in the order of `confusion`.
        temperature: T of the vote.
        ks: numbers of neighbours.
        headline_k: the one that was fixed beforehand.
        encoder_by_k: accuracies of the encoder, by exact search.
        index: what the index changes; None where the collection is Flat.
        baselines: rows to hold it against.
        same_vector: queries whose nearest neighbour has the same vector, up to rounding.
        duplicates: queries whose very content is in the collection; None if not looked for.
        per_class: at the headline's k.
        confusion: counts at the headline's k; rows are true classes, and lack the queries that
            no neighbour voted for. Empty of more than `MAX_CONFUSION_CLASSES`.
        notes: what was left out or cannot be right.
        centring: of the vectors before comparison: none.
        metric: `cosine`.
        versions: of the libraries that measured it.
    """

    collection: str
    images: str
    encoder: str
    fingerprint: str
    dim: int
    n_collection: int
    n_queries: int
    classes: list[str]
    temperature: float
    ks: list[int]
    headline_k: int
    encoder_by_k: dict[int, Accuracy]
    index: IndexDelta | None
    baselines: list[BaselineRow]
    same_vector: int
    duplicates: int | None
    per_class: list[ClassScore]
    confusion: list[list[int]]
    notes: list[str]
    versions: dict[str, str]
    centring: str = "none"
    metric: str = "cosine"


def as_text(report: KnnReport) -> str:
    """Lay the report out for a terminal."""
    sections = [
        _header(report),
        _accuracy_table(report, "top1", "top-1 %"),
        *([_accuracy_table(report, "top5", "top-5 %")] if _has_top5(report) else []),
        _remarks(report),
        _class_table(report),
    ]
    if 0 < len(report.confusion) <= MAX_PRINTED_CLASSES:
        sections.append(_confusion_table(report))
    return "\n\n".join(sections)


def _header(report: KnnReport) -> str:
    """State what was measured, and how."""
    headline = report.encoder_by_k[report.headline_k]
    top5 = f", {headline.top5:.2%} top-5" if _has_top5(report) else ""
    return "\n".join(
        [
            f"kNN: {headline.top1:.2%} top-1{top5} (k = {report.headline_k}, exact)",
            *_known_queries(report),
            f"  collection {report.collection}, {report.n_collection:,} images; "
            f"queries {report.images}, {report.n_queries:,} images; "
            f"{counted(len(report.classes), 'class', plural='classes')}",
            f"  encoder {report.encoder}, {report.dim} dimensions, {report.fingerprint}",
            f"  vote exp(s / T), T = {report.temperature:g}, s = cosine, not centred; "
            f"k = {report.headline_k} (*) was fixed beforehand",
        ]
    )


def _known_queries(report: KnnReport) -> list[str]:
    """Warn where many queries vote for themselves: that is no accuracy on unseen images."""
    share = max(report.same_vector, report.duplicates or 0) / report.n_queries
    if share <= FEW_KNOWN:
        return []
    return [
        f"  not of unseen images: {share:.2%} of the queries are in the collection and vote for "
        "themselves; `index.evaluate retrieval` leaves them out"
    ]


def _has_top5(report: KnnReport) -> bool:
    """Tell whether five guesses can be wrong."""
    return len(report.classes) > 5


def _accuracy_table(report: KnnReport, which: str, title: str) -> str:
    """Lay out one measure: a row an encoder, a column a k."""
    ks = report.ks
    heads = [f"k={k}" + ("*" if k == report.headline_k else "") for k in ks]
    lines = [f"  {title:<26}{'dims':>5}" + "".join(f"{head:>8}" for head in heads)]

    def add(name: str, dim: int | None, cells: Sequence[str]) -> None:
        lines.append(f"  {name:<26}{dim or '-':>5}" + "".join(f"{cell:>8}" for cell in cells))

    def values(by_k: dict[int, Accuracy], form: str) -> list[str]:
        return [format(100 * float(getattr(by_k[k], which)), form) for k in ks]

    add("encoder", report.dim, values(report.encoder_by_k, ".2f"))
    if report.index is not None:
        add(f"  through {report.index.factory}", report.dim, values(report.index.by_k, "+.2f"))
    for row in report.baselines:
        cells = ["-"] * len(ks) if row.by_k is None else values(row.by_k, ".2f")
        add(row.name, row.dim, cells)
    return "\n".join(lines)


def _remarks(report: KnnReport) -> str:
    """Say what stands behind the rows, and what is suspicious."""
    if report.index is None:
        lines = ["the collection is Flat: every search is exact"]
    else:
        lines = [
            f"{report.index.factory} finds {report.index.recall_at_10:.2%} of the exact 10 nearest"
            f", {report.index.worst_5_percent:.2%} for its worst 5% of queries"
        ]
    lines += [f"{row.name}: {row.note}" for row in report.baselines]
    lines.append(same_vector_line(report.same_vector, report.n_queries))
    if report.duplicates is None:
        lines.append("images were not compared byte for byte (--no-baselines)")
    else:
        lines.append(same_content_line(report.duplicates, report.n_queries))
    return "\n".join(f"  - {line}" for line in [*lines, *report.notes])


def _class_table(report: KnnReport) -> str:
    """Lay out the classes, the worst first."""
    width = max(5, *(len(shown(label)) for label in report.classes))
    head = f"  {'class':<{width}}{'n':>7}{'top-1 %':>9}  most confused with"
    lines = []
    order = sorted(report.per_class, key=lambda one: (one.accuracy is None, one.accuracy))
    for one in order:
        accuracy = "-" if one.accuracy is None else f"{100 * one.accuracy:.2f}"
        confused = "" if one.confused_with is None else f"{one.confused_with} ({one.n_confused})"
        line = f"  {shown(one.label):<{width}}{one.n:>7}{accuracy:>9}  {shown(confused)}"
        lines.append(line.rstrip())
    return "\n".join([head, *first_classes(lines)])


def _confusion_table(report: KnnReport) -> str:
    """Lay out the confusion matrix, columns numbered as its rows are, which have the names."""
    labels = [shown(label) for label in report.classes]
    width = max(6, *map(len, labels))
    cell = max(6, *(len(str(count)) + 2 for row in report.confusion for count in row))
    columns = "".join(f"{n:>{cell}}" for n in range(len(report.classes)))
    lines = [
        "  rows are true classes, columns predicted ones, by the numbers of the rows",
        f"  {'':<{width + 4}}{columns}",
    ]
    for n, (label, row) in enumerate(zip(labels, report.confusion, strict=True)):
        counts = "".join(f"{count or '.':>{cell}}" for count in row)
        lines.append(f"  {n:>2}  {label:<{width}}{counts}")
    return "\n".join(line.rstrip() for line in lines)
