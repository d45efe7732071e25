"""The graphs that `benchmarks.ann` compares with: faiss, hnswlib, usearch and voyager.

Rules:
    All have the same numbers: links a node, EF_CONSTRUCTION, float32 vectors, the task's metric,
    two threads to build and one to search, and a list of the same efforts to search with.
    A single query goes in as the library likes it best, and only what a caller needs is timed.

Shapes: Q queries, D dimensions, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import hnswlib
import numpy as np
import usearch.index
import voyager
from numpy.typing import NDArray

from benchmarks.nearest.tasks import K, Task
from index.knn import EUCLIDEAN, faiss_metric, faiss_threads

EF_CONSTRUCTION = 200
EFFORTS = tuple(sorted({round(10 * 1.06**n) for n in range(90)}))
"""What every graph's search may look at: from 10 to 1,790 candidates, in steps of 6%."""

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A built graph.

    Attributes:
        name: the library, and the links.
        links: a node's, on the upper layers; twice as many at the bottom.
        build_s: seconds to build, on all threads.
        set_effort: says how many candidates the next searches weigh.
        single: finds the K nearest of one query (D,), on one thread: row numbers.
        batch: finds those of many (Q, D) on so many threads: (Q, K).
    """

    name: str
    links: int
    build_s: float
    set_effort: Callable[[int], None]
    single: Callable[[NDArray[np.float32]], Rows]
    batch: Callable[[NDArray[np.float32], int], Rows]


def build_faiss(task: Task, links: int, threads: int) -> Peer:
    """Build faiss's IndexHNSWFlat."""
    index = faiss.IndexHNSWFlat(task.vectors_ND.shape[1], links, faiss_metric(task.metric))
    index.hnsw.efConstruction = EF_CONSTRUCTION
    start_s = time.perf_counter()
    with faiss_threads(threads):
        index.add(task.vectors_ND)
    build_s = time.perf_counter() - start_s

    def set_effort(effort: int) -> None:
        index.hnsw.efSearch = effort

    def batch(queries_QD: NDArray[np.float32], threads: int) -> Rows:
        with faiss_threads(threads):
            return index.search(queries_QD, K)[1]

    return Peer(
        name="faiss HNSW", links=links, build_s=build_s, set_effort=set_effort,
        single=lambda query_D: index.search(query_D[None], K)[1][0], batch=batch,
    )  # fmt: skip


def build_hnswlib(task: Task, links: int, threads: int) -> Peer:
    """Build hnswlib's Index."""
    n_rows, dim = task.vectors_ND.shape
    index = hnswlib.Index("l2" if task.metric == EUCLIDEAN else "ip", dim)
    index.init_index(n_rows, M=links, ef_construction=EF_CONSTRUCTION)
    start_s = time.perf_counter()
    index.add_items(task.vectors_ND, num_threads=threads)
    build_s = time.perf_counter() - start_s
    return Peer(
        name="hnswlib", links=links, build_s=build_s, set_effort=index.set_ef,
        single=lambda query_D: index.knn_query(query_D, K, num_threads=1)[0][0],
        batch=lambda queries_QD, threads: index.knn_query(queries_QD, K, num_threads=threads)[
            0
        ].astype(np.int64),
    )  # fmt: skip


def build_usearch(task: Task, links: int, threads: int) -> Peer:
    """Build usearch's Index."""
    index = usearch.index.Index(
        ndim=task.vectors_ND.shape[1],
        metric="l2sq" if task.metric == EUCLIDEAN else "ip",
        dtype="f32",
        connectivity=links,
        expansion_add=EF_CONSTRUCTION,
    )
    start_s = time.perf_counter()
    index.add(np.arange(len(task.vectors_ND)), task.vectors_ND, threads=threads)
    build_s = time.perf_counter() - start_s

    def set_effort(effort: int) -> None:
        index.expansion_search = effort

    return Peer(
        name="usearch", links=links, build_s=build_s, set_effort=set_effort,
        single=lambda query_D: index.search(query_D, K, threads=1).keys,
        batch=lambda queries_QD, threads: index.search(queries_QD, K, threads=threads).keys.astype(
            np.int64
        ),
    )  # fmt: skip


def build_voyager(task: Task, links: int, threads: int) -> Peer:
    """Build voyager's Index."""
    n_rows, dim = task.vectors_ND.shape
    space = voyager.Space.Euclidean if task.metric == EUCLIDEAN else voyager.Space.InnerProduct
    index = voyager.Index(
        space, dim, M=links, ef_construction=EF_CONSTRUCTION, max_elements=n_rows,
        storage_data_type=voyager.StorageDataType.Float32,
    )  # fmt: skip
    start_s = time.perf_counter()
    index.add_items(task.vectors_ND, num_threads=threads)
    build_s = time.perf_counter() - start_s

    def set_effort(effort: int) -> None:
        index.ef = effort

    return Peer(
        name="voyager", links=links, build_s=build_s, set_effort=set_effort,
        single=lambda query_D: index.query(query_D, K, num_threads=1)[0],
        batch=lambda queries_QD, threads: index.query(queries_QD, K, num_threads=threads)[0].astype(
            np.int64
        ),
    )  # fmt: skip


BUILDERS = (build_faiss, build_hnswlib, build_usearch, build_voyager)
