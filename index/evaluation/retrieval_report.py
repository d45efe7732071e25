"""The report of a retrieval evaluation: what it holds, and how people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from index.evaluation.output import first_classes
from index.evaluation.retrieval_scores import MAP_AT_R, MEASURES
from index.evaluation.same_images import same_content_line, same_vector_line
from models.command import counted, shown

CLASS_COLUMNS = ("P@1", MAP_AT_R, "R-precision", "nDCG@10")
"""What the table of classes shows; the JSON has every measure."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over queries, 0 to 1, and how sure it is.

    Attributes:
        mean: over the queries.
        low: lower end of the bootstrap's interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ClassRetrieval:
    """How the queries of one class fared.

    Attributes:
        label: the class.
        n_queries: its queries.
        n_images: its images in the collection.
        means: by measure; None where there is no query.
    """

    label: str
    n_queries: int
    n_images: int
    means: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Queries whose very image is in the collection, and what they change.

    Attributes:
        same_vector: queries whose nearest neighbour has the same vector, up to rounding.
        same_content: queries whose content is that of an image of the collection, byte for
            byte; None if not looked for.
        n_flagged: queries of either kind.
        without: the measures over the other queries; None where none is flagged, or all are.
    """

    same_vector: int
    same_content: int | None
    n_flagged: int
    without: Mapping[str, Estimate] | None


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Everything that an evaluation found.

    Attributes:
        collection: its name.
        queries: where they come from.
        is_against_itself: whether queries are images of the collection, each no answer to itself.
        encoder: URI of the encoder that built the collection.
        fingerprint: of that encoder.
        dim: length of a vector.
        metric: how vectors are compared.
        n_collection: images in the collection.
        n_queries: queries that were scored.
        n_all_queries: queries that there were.
        measures: over the scored queries.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of the sample of queries and of the bootstrap.
        duplicates: queries that are in the collection.
        per_class: in the order of the labels.
        worst_class: with the least mAP@R among those that have queries.
        notes: what was left out or cannot be right.
        versions: of the libraries that measured it.
    """

    collection: str
    queries: str
    is_against_itself: bool
    encoder: str
    fingerprint: str
    dim: int
    metric: str
    n_collection: int
    n_queries: int
    n_all_queries: int
    measures: Mapping[str, Estimate]
    level: float
    resamples: int
    seed: int
    duplicates: Duplicates
    per_class: Sequence[ClassRetrieval]
    worst_class: str
    notes: Sequence[str]
    versions: Mapping[str, str]


def as_text(report: RetrievalReport) -> str:
    """Lay the report out for a terminal."""
    return "\n\n".join(
        [_header(report), _measure_table(report), _remarks(report), _class_table(report)]
    )


def _header(report: RetrievalReport) -> str:
    """State what was measured, and how."""
    headline = report.measures[MAP_AT_R]
    of_all = (
        "" if report.n_queries == report.n_all_queries else f" of {report.n_all_queries:,} there"
    )
    itself = "; the query itself is left out" if report.is_against_itself else ""
    return "\n".join(
        [
            f"retrieval: {headline.mean:.2%} mAP@R "
            f"[{100 * headline.low:.2f}, {100 * headline.high:.2f}], "
            f"{report.measures['P@1'].mean:.2%} P@1 (exact)",
            f"  collection {report.collection}, {report.n_collection:,} images; "
            f"queries {report.queries}, {report.n_queries:,}{of_all}; "
            f"{counted(len(report.per_class), 'class', plural='classes')}",
            f"  encoder {report.encoder}, {report.dim} dimensions, {report.metric}, "
            f"{report.fingerprint}",
            f"  relevant is what has the query's label{itself}",
            f"  [..] holds {report.level:.0%} of {report.resamples:,} bootstrap means over the "
            f"queries, seed {report.seed}",
        ]
    )


def _measure_table(report: RetrievalReport) -> str:
    """Lay out the measures, with and without duplicates."""
    without = report.duplicates.without
    head = f"  {'measure':<12}{'mean %':>8}  {'interval':<16}"
    lines = [head + ("without duplicates" if without else "")]
    for name in MEASURES:
        line = f"  {name:<12}{_cells(report.measures[name])}"
        lines.append(line + (_cells(without[name]) if without else ""))
    return "\n".join(line.rstrip() for line in lines)


def _cells(estimate: Estimate) -> str:
    """Write a mean and its interval."""
    interval = f"[{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"
    return f"{100 * estimate.mean:>8.2f}  {interval:<16}"


def _remarks(report: RetrievalReport) -> str:
    """Say what is suspicious, and what was left out."""
    found = report.duplicates
    lines = [
        f"worst class: {shown(report.worst_class)}",
        same_vector_line(found.same_vector, report.n_queries),
    ]
    if found.same_content is None:
        lines.append("images were not compared byte for byte (--contents does)")
    else:
        lines.append(same_content_line(found.same_content, report.n_queries))
    if found.without is not None:
        rest = report.n_queries - found.n_flagged
        lines.append(f"without duplicates: over the {rest:,} queries that are of neither kind")
    return "\n".join(f"  - {line}" for line in [*lines, *report.notes])


def _class_table(report: RetrievalReport) -> str:
    """Lay out the classes, the worst first."""
    width = max(5, *(len(shown(one.label)) for one in report.per_class))
    heads = "".join(f"{name + ' %':>15}" for name in CLASS_COLUMNS)
    head = f"  {'class':<{width}}{'queries':>9}{'images':>9}{heads}"
    lines = []
    for one in sorted(report.per_class, key=_from_worst):
        cells = [
            "-" if one.means is None else f"{100 * one.means[name]:.2f}" for name in CLASS_COLUMNS
        ]
        lines.append(
            f"  {shown(one.label):<{width}}{one.n_queries:>9,}{one.n_images:>9,}"
            + "".join(f"{cell:>15}" for cell in cells)
        )
    return "\n".join([head, *first_classes(lines)])


def _from_worst(one: ClassRetrieval) -> float:
    """Order classes by mAP@R; those without a query come last."""
    return 2.0 if one.means is None else one.means[MAP_AT_R]
