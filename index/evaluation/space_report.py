"""The report of an embedding space: what it holds, and how people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from index.evaluation.hubness import Hubness
from models.command import shown

MANY_DEAD = 8
"""Numbers of dead dimensions that are printed; the JSON has all of them."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """An image that is in many neighbour lists.

    Attributes:
        key: which one.
        label: its class, where it has one.
        occurrences: N_k.
    """

    key: str
    label: str | None
    occurrences: int


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What two collections of the same images have in common.

    Attributes:
        collection: name of the other one.
        fingerprint: of its encoder.
        dim: length of its vectors.
        is_same_encoder: whether one encoder made both.
        n_pairs: images that both have, by key.
        linear_cka: 1 alike, 0 unrelated.
        procrustes_residual: share of variance that no turning and scaling explains.
        n_overlap: images of the sample that the overlap was measured among.
        neighbour_overlap: mean share of the k nearest that are the same.
        overlap_by_chance: what unrelated spaces would share.
        alignment: mean squared distance of an image's two vectors; None of two encoders.
        overlap_histogram: images by the number of shared neighbours, 0 to k.
    """

    collection: str
    fingerprint: str
    dim: int
    is_same_encoder: bool
    n_pairs: int
    linear_cka: float | None
    procrustes_residual: float | None
    n_overlap: int
    neighbour_overlap: float
    overlap_by_chance: float
    alignment: float | None
    overlap_histogram: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class SpaceReport:
    """Everything that was measured of a space.

    Attributes:
        collection: its name.
        encoder: URI of the encoder that built it.
        fingerprint: of that encoder.
        dim: length of a vector.
        metric: how vectors are compared.
        n: images.
        n_sample: images that were compared with one another, pair by pair.
        seed: of the sample.
        rankme: directions that the vectors fill.
        rankme_limit: the most that it can be.
        singular_values: of the vectors as they are, largest first.
        dead: numbers of the dimensions that do not vary.
        uniformity: of the sample: 0 collapsed, about -4 even; None of less than two vectors that
            are not zero.
        alignment: mean squared distance of two images of one class; None without labels.
        mean_distance: mean squared distance of two images, whatever their class.
        hubness: of the sample.
        largest_hubs: the most found first.
        occurrence_histogram: images by N_k, from 0 on.
        drift: from another collection; None where none was named.
        notes: what stands behind the figures.
        versions: of the libraries that measured it.
    """

    collection: str
    encoder: str
    fingerprint: str
    dim: int
    metric: str
    n: int
    n_sample: int
    seed: int
    rankme: float
    rankme_limit: int
    singular_values: Sequence[float]
    dead: Sequence[int]
    uniformity: float | None
    alignment: float | None
    mean_distance: float | None
    hubness: Hubness
    largest_hubs: Sequence[Hub]
    occurrence_histogram: Sequence[int]
    drift: Drift | None
    notes: Sequence[str]
    versions: Mapping[str, str]


def as_text(report: SpaceReport) -> str:
    """Lay the report out for a terminal."""
    sections = [_header(report), _shape(report), _hubs(report)]
    if report.drift is not None:
        sections.append(_drift(report.drift))
    if report.notes:
        sections.append("\n".join(f"  - {note}" for note in report.notes))
    return "\n\n".join(sections)


def _header(report: SpaceReport) -> str:
    """State what was measured."""
    return "\n".join(
        [
            f"space: RankMe {report.rankme:.1f} of {report.rankme_limit}, uniformity "
            f"{_number(report.uniformity)}, hubness {_number(report.hubness.skewness)}",
            f"  collection {report.collection}, {report.n:,} images; {report.dim} dimensions, "
            f"{report.metric}",
            f"  encoder {report.encoder}, {report.fingerprint}",
            f"  pairs and neighbours among {report.n_sample:,} images, seed {report.seed}; "
            "the rest over all of them",
        ]
    )


def _shape(report: SpaceReport) -> str:
    """Lay out what the sums say."""
    dead = ", ".join(map(str, report.dead[:MANY_DEAD]))
    more = ", ..." if len(report.dead) > MANY_DEAD else ""
    rows = [
        ("RankMe", f"{report.rankme:.2f}", f"directions filled, of {report.rankme_limit}"),
        ("dead dimensions", f"{len(report.dead)}", f"{dead}{more}"),
        ("uniformity", _number(report.uniformity), "0 collapsed, about -4 even"),
        ("alignment", _number(report.alignment), "mean squared distance within a class"),
        ("mean distance", _number(report.mean_distance), "the same of any two images"),
    ]
    return _table(rows)


def _hubs(report: SpaceReport) -> str:
    """Lay out how unevenly images are found."""
    found = report.hubness
    rows = [
        ("hubness", _number(found.skewness), f"skewness of N_{found.k}: 0 where all are alike"),
        ("anti-hubs", f"{found.anti_hubs:.2%}", "of the images are in nobody's list"),
        ("hubs", f"{found.hubs:.2%}", f"hold {found.held_by_hubs:.2%} of all places"),
    ]
    hubs = [
        f"    {hub.occurrences:>6,}  "
        + shown(hub.key + ("" if hub.label is None else f"  ({hub.label})"))
        for hub in report.largest_hubs
    ]
    return "\n".join([_table(rows), "  found the most", *hubs])


def _drift(drift: Drift) -> str:
    """Lay out what the two spaces have in common."""
    who = "the same encoder" if drift.is_same_encoder else f"encoder {drift.fingerprint[:12]}"
    k = len(drift.overlap_histogram) - 1
    rows = [
        ("linear CKA", _number(drift.linear_cka), "1 alike, 0 unrelated"),
        (
            "Procrustes",
            _number(drift.procrustes_residual),
            "share of variance that no turning and scaling explains",
        ),
        (
            f"same {k} nearest",
            f"{drift.neighbour_overlap:.2%}",
            f"{drift.overlap_by_chance:.2%} by chance; among {drift.n_overlap:,} images",
        ),
    ]
    if drift.alignment is not None:
        rows.append(
            ("alignment", _number(drift.alignment), "mean squared distance of an image's two")
        )
    head = (
        f"  beside collection {drift.collection}, {who}, {drift.dim} dimensions: "
        f"{drift.n_pairs:,} images in both"
    )
    return "\n".join([head, _table(rows)])


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Lay out names, figures and what they mean."""
    return "\n".join(
        f"  {name:<18}{figure:>10}  {meaning}".rstrip() for name, figure, meaning in rows
    )


def _number(value: float | None) -> str:
    """Write a figure that may be undefined."""
    return "-" if value is None else f"{value:.4f}"
