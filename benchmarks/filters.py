"""Search under filters of 50 to .1%: recall@10 and time against search without one.

The bar: recall@10 of at least .99 against an exact search of what the filter leaves, at no
more than 3 times the time of a search without a filter or of an exact one, whichever is less.
It is about filters of 50, 10, 1 and .1% (`bar_holds`); whether the shares between keep to it
(`every_share_holds`), and a label (`label_holds`), stands beside.

Filters are texts over the metadata, as anybody would write them. Those of a share are bounds of
the ids, which are hashes: what they leave has nothing to do with what is on the picture, and
lies scattered over the file. `label` chooses one class, and most queries are of another: there
the neighbourhood of the query has nothing of what is asked for.

Four ways take turns within every round, so that a noisy moment hits all of them:
`search` is `Collection.search`, which picks between the next two; `index` asks the index for
more candidates and drops what the filter excludes; `rows` compares every row that is left;
`selector` is faiss's own IDSelectorBitmap in HNSW at the collection's efSearch, for comparison,
where the index is an HNSW.
A query a call on one thread, and batches of 256 on all. Times are those of searches whose
filter was seen before; `first_ms` is what a filter costs once.

Run from the root, after `python -m index.build --images fashion-mnist --encoder
models/shipped/fashion-mnist --out C`:
`python -m benchmarks.filters C --out benchmarks/results/filters.json`; or without C, on clustered
random vectors: `python -m benchmarks.filters --synthetic 60000`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import tyro
from numpy.typing import NDArray

from benchmarks.measuring import command_line, spread_of, turns
from index.collection import Collection, id_of
from index.knn import MISSING, faiss_threads
from index.storage import segment
from index.storage.manifest import Manifest, SegmentEntry, hash_files, write_manifest
from index.storage.rows import ROW_SCHEMA
from index.storage.segment import EF_SEARCH, HNSW, Block, write_segment
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.encoder import open_encoder
from models.errors import UsageError
from models.fashion_mnist import open_fashion_mnist
from models.vectors import finish_vectors

K = 10
SHARES = (0.5, 0.2, 0.1, 0.07, 0.05, 0.02, 0.01, 0.001)
BARS = (0.5, 0.1, 0.01, 0.001)
LABEL = "label"
MIN_RECALL, MAX_RATIO = 0.99, 3.0
BATCH = 256
MIN_INDEX_SHARE = 0.04
SYNTHETIC_DIM, CLUSTERS = 256, 100

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class FilterBenchmarkOptions:
    """Compare search under filters with search without one."""

    collection: tyro.conf.Positional[Path | None] = None
    """A collection of Fashion-MNIST's training images with an HNSW index."""
    synthetic: int = 0
    """So many clustered random vectors instead."""
    queries: int = 256
    """How many test images, or more vectors of the clusters, to search with."""
    singles: int = 100
    """How many of them are timed a query a call, in every round."""
    rounds: int = 5
    """How often the ways take turns."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Check that there is one thing to search in."""
        if (self.collection is None) == (self.synthetic == 0):
            raise UsageError(
                "what to search in", expected="a collection or --synthetic N", found="none or both"
            )


def main(options: FilterBenchmarkOptions) -> None:
    """Measure, print, and write the result."""
    with tempfile.TemporaryDirectory() as place:
        path = options.collection
        if path is None:
            path = write_synthetic(Path(place) / "synthetic", options.synthetic)
        queries_QD = make_queries(path, options)
        report = measure(path, queries_QD, options)
    print(json.dumps(report, indent=2))
    print(as_table(report), file=sys.stderr)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(path: Path, queries_QD: NDArray[np.float32], options: FilterBenchmarkOptions) -> dict:
    """Search a query a call on one thread, and in batches on all."""
    singles_QD = queries_QD[: options.singles]
    with Collection.open(path, threads=1) as one, Collection.open(path, verify=False) as all_:
        report = {
            "command": command_line(),
            "cpu": cpu_name(),
            "cpus": cpu_budget(),
            "versions": {name: version(name) for name in ("faiss-cpu", "numpy", "pyarrow")},
            "count": one.count,
            "dim": one.dim,
            "index": one.factory,
            "parameters": dict(one.manifest.segments[0].parameters),
            "k": K,
            "queries": len(queries_QD),
            "rounds": options.rounds,
            "filters": [],
        }
        unfiltered = plain(all_)
        report["unfiltered_recall"] = recall(
            unfiltered["search"](queries_QD), unfiltered["exact"](queries_QD)
        )
        filters = filters_of(one)
        for name in progress(filters, what="filters", total=len(filters), unit="filter"):
            share, text = filters[name]
            row = {"name": name, "share": share, "filter": text}
            row["first_ms"] = 1e3 * seconds(lambda text=text: one.select(text))
            row["chosen"] = one.select(text).count
            row |= compare(one, all_, text, queries_QD, singles_QD, options.rounds)
            row["holds"] = holds(row)
            report["filters"].append(row)
    bar = {"min_recall": MIN_RECALL, "max_ratio": MAX_RATIO, "about": [*map(name_of, BARS)]}
    return report | {"bar": bar} | verdict(report["filters"])


def verdict(rows: Sequence[dict]) -> dict[str, bool]:
    """Say what keeps to the bar: the shares that it is about, all of them, and the label."""
    held = {row["name"]: row["holds"] for row in rows}
    return {
        "bar_holds": all(held[name_of(share)] for share in BARS),
        "every_share_holds": all(held[name_of(share)] for share in SHARES),
        "label_holds": held[LABEL],
    }


def compare(
    one: Collection,
    all_: Collection,
    text: str,
    queries_QD: NDArray[np.float32],
    singles_QD: NDArray[np.float32],
    rounds: int,
) -> dict:
    """Take turns at one filter."""
    truth = all_.search(queries_QD, K, fingerprint=all_.fingerprint, exact=True, filter=text).ids
    single = {f"unfiltered_{k}": v for k, v in plain(one).items()} | filtered(one, text)
    batch = {f"unfiltered_{k}": v for k, v in plain(all_).items()} | filtered(all_, text)
    batch.pop("selector", None)
    found = {name: way(queries_QD) for name, way in filtered(all_, text).items()}
    row: dict = {"recall": {name: recall(ids, truth) for name, ids in found.items()}}
    row["recall"]["single_search"] = recall(
        np.concatenate([single["search"](query_D[None]) for query_D in queries_QD]), truth
    )
    row["single_ms"] = take_turns(single, [query_D[None] for query_D in singles_QD], rounds)
    blocks = [queries_QD[n : n + BATCH] for n in range(0, len(queries_QD), BATCH)]
    row["batch_ms"] = take_turns(batch, blocks, rounds)
    return row


def plain(collection: Collection) -> dict[str, Search]:
    """Search without a filter: through the index, and exactly."""

    def run(queries_QD: NDArray[np.float32], *, exact: bool) -> NDArray[np.int64]:
        return collection.search(queries_QD, K, fingerprint=collection.fingerprint, exact=exact).ids

    return {"search": lambda q: run(q, exact=False), "exact": lambda q: run(q, exact=True)}


def filtered(collection: Collection, text: str) -> dict[str, Search]:
    """Search under a filter in every way; through the index only where that is no folly."""
    share = collection.select(text).count / collection.count
    kind = collection._snapshot.parts[0].segment.index.kind

    def run(queries_QD: NDArray[np.float32], *, exact: bool = False) -> NDArray[np.int64]:
        return collection.search(
            queries_QD, K, fingerprint=collection.fingerprint, exact=exact, filter=text
        ).ids

    def through_index(queries_QD: NDArray[np.float32]) -> NDArray[np.int64]:
        decide, segment.is_exact_cheaper = segment.is_exact_cheaper, lambda **_: False
        try:  # by hand: unittest's `patch` takes a quarter of a millisecond
            return run(queries_QD)
        finally:
            segment.is_exact_cheaper = decide

    return {
        "search": run,
        **({"index": through_index} if share >= MIN_INDEX_SHARE else {}),
        "rows": lambda queries_QD: run(queries_QD, exact=True),
        **({} if kind.refines else {"selector": selector_search(collection, text)}),
    }


def selector_search(collection: Collection, text: str) -> Search:
    """Search with faiss's own selector, on one thread."""
    (part,) = collection._snapshot.parts
    entry, index = part.segment.entry, part.segment.index._top
    bits = np.packbits(collection.select(text).mask_N, bitorder="little")
    parameters = faiss.SearchParametersHNSW(
        efSearch=entry.parameters.get("efSearch", EF_SEARCH),
        check_relative_distance=True,
        bounded_queue=True,
    )
    selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
    parameters.sel = selector

    def run(queries_QD: NDArray[np.float32]) -> NDArray[np.int64]:
        with faiss_threads(1):
            _, rows = index.search(queries_QD, K, params=parameters)
        return np.where(rows < 0, MISSING, collection.ids[rows])

    run.kept = (bits, selector)  # faiss borrows them
    return run


def take_turns(
    ways: Mapping[str, Search], calls: list[NDArray[np.float32]], rounds: int
) -> dict[str, dict[str, float]]:
    """Give each way's milliseconds a query: least, median and most of the rounds."""
    n_queries = sum(map(len, calls))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(calls[0])
    for number in range(rounds):
        for name, way in turns(ways.items(), number):
            spent_s = seconds(lambda way=way: [way(queries_QD) for queries_QD in calls])
            times[name].append(1e3 * spent_s / n_queries)
    return {name: spread_of(values) for name, values in times.items()}


def holds(row: dict) -> bool:
    """Say whether a filter keeps to the bar, a query a call and in batches, by its medians."""
    ratios = []
    for mode in ("single_ms", "batch_ms"):
        times = {name: spread["median"] for name, spread in row[mode].items()}
        bar_ms = min(times["unfiltered_search"], times["unfiltered_exact"])
        ratios.append(times["search"] / bar_ms)
    row["single_ratio"], row["batch_ratio"] = ratios
    least = min(row["recall"]["search"], row["recall"]["single_search"])
    return least >= MIN_RECALL and max(ratios) <= MAX_RATIO


def filters_of(collection: Collection) -> dict[str, tuple[float, str]]:
    """Write filters by id that leave each share, and one by label."""
    ids_N = np.sort(collection.ids)
    cuts = {share: ids_N[max(1, round(share * len(ids_N))) - 1] for share in SHARES}
    filters = {name_of(share): (share, f"id <= {cut}") for share, cut in cuts.items()}
    labels = collection.labels()
    share = labels.count(labels[0]) / len(labels)
    return filters | {LABEL: (share, f"label = '{labels[0]}'")}


def name_of(share: float) -> str:
    """Name the filter that leaves a share."""
    return f"{100 * share:g}%"


def recall(found_QK: NDArray[np.int64], truth_QK: NDArray[np.int64]) -> float:
    """Give the mean share of the true neighbours that were found."""
    found = [np.isin(t[t >= 0], f).mean() for f, t in zip(found_QK, truth_QK, strict=True)]
    return float(np.mean(found))


def seconds(work: Callable[[], object]) -> float:
    """Time one run."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def make_queries(path: Path, options: FilterBenchmarkOptions) -> NDArray[np.float32]:
    """Embed test images, or draw more vectors of the clusters."""
    if options.synthetic:
        return draw_clustered(options.queries, seed=1)
    with Collection.open(path, verify=False) as collection:
        encoder = open_encoder(collection.manifest.encoder)
    arrays = open_fashion_mnist("test")
    return finish_vectors(encoder.encode(arrays.images[: options.queries, :, :, None]))


def draw_clustered(n: int, *, seed: int) -> NDArray[np.float32]:
    """Draw unit vectors around common centres, in a space of few directions."""
    shape = np.random.default_rng(0)
    centres = shape.standard_normal((CLUSTERS, SYNTHETIC_DIM))
    spread = shape.standard_normal((32, SYNTHETIC_DIM))
    draw = np.random.default_rng(seed)
    rows = centres[draw.integers(0, CLUSTERS, n)] + draw.standard_normal((n, 32)) @ spread * 0.3
    return finish_vectors((rows + 0.1 * draw.standard_normal(rows.shape)).astype(np.float32))


def write_synthetic(path: Path, count: int) -> Path:
    """Write a collection of clustered vectors; a label is a cluster's, the nearest's."""
    vectors_ND = draw_clustered(count, seed=2)
    keys = [f"{n:08}" for n in range(count)]
    directions = draw_clustered(10, seed=3)
    labels = (vectors_ND @ directions.T).argmax(axis=1).astype(str)
    columns = {
        "id": [id_of(key) for key in keys],
        "key": keys,
        "label": labels,
        "source": ["synthetic"] * count,
    }
    block = Block(rows=pa.table(columns, schema=ROW_SCHEMA), vectors_ND=vectors_ND)
    entry = SegmentEntry(
        name="000000", count=count, factory=HNSW, parameters={"efSearch": EF_SEARCH}
    )
    names = write_segment(path, entry, [block], SYNTHETIC_DIM)
    manifest = Manifest(
        name="synthetic", fingerprint="0" * 64, dim=SYNTHETIC_DIM, encoder="none",
        preprocessing={}, sources={"synthetic": count}, segments=(entry,),
        files=hash_files(path, names), versions={}, build={},
    )  # fmt: skip
    write_manifest(path, manifest)
    return path


def as_table(report: dict) -> str:
    """Lay the figures out for people."""
    lines = [
        f"unfiltered recall {report['unfiltered_recall']:.4f}; bar holds: {report['bar_holds']}, "
        f"at every share: {report['every_share_holds']}, for a label: {report['label_holds']}",
        f"{'':>6} {'recall':>7} {'selector':>8} | ms a query alone: {'plain':>6} {'exact':>6} "
        f"{'search':>6} {'index':>6} {'rows':>6} {'x':>5} | in batches: {'plain':>6} {'exact':>6} "
        f"{'search':>6} {'index':>6} {'rows':>6} {'x':>5}",
    ]
    names = ("unfiltered_search", "unfiltered_exact", "search", "index", "rows")
    for row in report["filters"]:
        single, batch = (
            " ".join(f"{row[mode].get(name, {}).get('median', np.nan):6.3f}" for name in names)
            for mode in ("single_ms", "batch_ms")
        )
        selector = row["recall"].get("selector", np.nan)
        lines.append(
            f"{row['name']:>6} {row['recall']['single_search']:7.4f} "
            f"{selector:8.4f} | {'':>17} {single} {row['single_ratio']:5.2f} | "
            f"{'':>11} {batch} {row['batch_ratio']:5.2f}{'' if row['holds'] else '  below the bar'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(FilterBenchmarkOptions, main, prog="python -m benchmarks.filters"))
