"""The report of an index: what it finds of what there is, how fast, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.command import counted


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of the exact k nearest that were found, 0 to 1, ties allowed.

    Attributes:
        mean: over the queries.
        low: lower end of the mean's interval, 95% of bootstrap means over the queries.
        high: its upper end.
        worst_5_percent: over the worst twentieth of them.
        complete: share of the queries of which nothing was missed.
    """

    mean: float
    low: float
    high: float
    worst_5_percent: float
    complete: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long searches take.

    Attributes:
        k: neighbours a query.
        n_single: queries that were asked one a call.
        p50_ms: half of them took no longer.
        p95_ms: 95% of them.
        p99_ms: 99% of them.
        single_qps: queries a second, one a call, one call at a time.
        n_batch: queries of one call.
        batched_qps: queries a second of that call, the median of three.
        latencies_ms: of every single query, in rising order.
    """

    k: int
    n_single: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    single_qps: float
    n_batch: int
    batched_qps: float
    latencies_ms: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way of searching.

    Attributes:
        name: all images, a filter, or a churned copy.
        filter: what may be found; None for all.
        n_images: that may be found.
        by_k: recall by the number of neighbours, each a search of its own.
        timing: of the search by the index.
    """

    name: str
    filter: str | None
    n_images: int
    by_k: Mapping[int, Recall]
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class RecallReport:
    """Everything that was measured of an index.

    Attributes:
        collection: its name.
        fingerprint: of the encoder that built it.
        factory: of the FAISS index; `Flat` where every search is exact.
        dim: length of a vector.
        metric: how vectors are compared.
        n_collection: images in it.
        queries: where they come from.
        is_against_itself: whether queries are images of the collection, each no answer to itself.
        n_queries: how many were asked.
        n_all_queries: how many there were.
        seed: of the sample of queries and of the churn.
        threads: CPU threads of a search.
        cpu: its name.
        bytes_by_file: bytes on the disk a vector, by kind of file; empty of a Milvus.
        bytes_a_vector: in all.
        exact: how long it takes to compare every vector.
        conditions: all images first.
        notes: what people should know.
        versions: of the libraries that measured it.
    """

    collection: str
    fingerprint: str
    factory: str
    dim: int
    metric: str
    n_collection: int
    queries: str
    is_against_itself: bool
    n_queries: int
    n_all_queries: int
    seed: int
    threads: int
    cpu: str
    bytes_by_file: Mapping[str, float]
    bytes_a_vector: float
    exact: Timing
    conditions: Sequence[Condition]
    notes: Sequence[str]
    versions: Mapping[str, str]


def as_text(report: RecallReport) -> str:
    """Lay the report out for a terminal."""
    sections = [
        _header(report), _recall_table(report), _timing_table(report)
    ]  # fmt: skip
    if report.bytes_by_file:
        sections.append(_bytes(report))
    if report.notes:
        sections.append("\n".join(f"  - {note}" for note in report.notes))
    return "\n\n".join(sections)


def _header(report: RecallReport) -> str:
    """State what was measured, and how."""
    k, found = next(iter(report.conditions[0].by_k.items()))
    timed = report.conditions[0].by_k.get(report.exact.k)
    if timed is not None:
        k, found = report.exact.k, timed
    of_all = "" if report.n_queries == report.n_all_queries else f" of {report.n_all_queries:,}"
    itself = ", each left out of its own answers" if report.is_against_itself else ""
    return "\n".join(
        [
            f"recall: {found.mean:.2%} [{100 * found.low:.2f}, {100 * found.high:.2f}] of the {k} "
            f"nearest, {found.worst_5_percent:.2%} for the worst 5% of queries ({report.factory})",
            f"  collection {report.collection}, {report.n_collection:,} images; {report.dim} "
            f"dimensions, {report.metric}; {report.fingerprint}",
            f"  queries {report.queries}, {report.n_queries:,}{of_all}, seed {report.seed}{itself}",
            "  found is what is as near as the exact k-th neighbour; every k is a search of its "
            "own; [..] holds 95% of bootstrap means",
            f"  {report.cpu}, {counted(report.threads, 'thread')}",
        ]
    )


def _recall_table(report: RecallReport) -> str:
    """Lay out recall: a row a condition, two columns a k."""
    width = max(len(one.name) for one in report.conditions)
    heads = "".join(f"{f'@{k} %':>10}{'worst 5%':>10}" for k in report.conditions[0].by_k)
    lines = [f"  {'recall':<{width}}{'images':>10}{heads}"]
    for one in report.conditions:
        cells = "".join(
            f"{100 * found.mean:>10.2f}{100 * found.worst_5_percent:>10.2f}"
            for found in one.by_k.values()
        )
        lines.append(f"  {one.name:<{width}}{one.n_images:>10,}{cells}")
    return "\n".join(lines)


def _timing_table(report: RecallReport) -> str:
    """Lay out how long searches take, exact ones last."""
    rows = [(one.name, one.timing) for one in report.conditions]
    rows.append(("exact, all images", report.exact))
    width = max(len(name) for name, _ in rows)
    first = rows[0][1]
    heads = "".join(
        f"{head:>10}" for head in ("p50 ms", "p95 ms", "p99 ms", "single/s", "batched/s")
    )
    lines = [
        f"  {'time':<{width}}{heads}  k = {first.k}; {first.n_single:,} single queries; "
        f"batches of {first.n_batch:,}"
    ]
    for name, timing in rows:
        lines.append(
            f"  {name:<{width}}{timing.p50_ms:>10.3f}{timing.p95_ms:>10.3f}{timing.p99_ms:>10.3f}"
            f"{timing.single_qps:>10,.0f}{timing.batched_qps:>10,.0f}"
        )
    return "\n".join(lines)


def _bytes(report: RecallReport) -> str:
    """Say what a vector takes on the disk."""
    kinds = ", ".join(f"{name} {value:,.0f}" for name, value in report.bytes_by_file.items())
    return f"  {report.bytes_a_vector:,.0f} bytes a vector on the disk: {kinds}"
