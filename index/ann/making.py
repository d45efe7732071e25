"""Builds the FAISS index of a segment from its memory-mapped vectors, and writes its file.

Rules:
    Memory holds the index, a block of vectors and a bounded sample; what was read of the map is
    given back as it goes.
    The same vectors and the same kind give the same bytes, whatever the number of threads: samples
    are drawn from all rows by a fixed seed, lists are learnt from fixed beginnings, rotations
    are made by one thread, and FAISS links graphs in a fixed order since 1.15; before that one
    thread links them.
    A graph's file has no vectors: `vectors.npy` beside it does.
    Some rows may be held back, so that the index is tried out with vectors that it does not have;
    they are added at the end, and the index is one over all rows in their order.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from index.ann.kinds import Kind, can_build_cagra, lists_of, parse_kind
from index.ann.memory import BUILD_BLOCK, release_pages, sample_rows
from index.knn import COSINE, faiss_metric, faiss_threads
from models.cpu import cpu_budget
from models.errors import UsageError

EF_CONSTRUCTION = 80
SEED = 1234
KMEANS_ITERATIONS = 10
"""FAISS's own number for lists."""


def build_index(
    vectors_ND: NDArray[np.float32],
    factory: str,
    *,
    metric: str = COSINE,
    threads: int | None = None,
) -> faiss.Index:
    """Build an index over vectors.

    Args:
        vectors_ND: (N, D) float32, best a memory map; of unit length where `metric` is `cosine`.
        factory: one of `index.ann.kinds`.
        metric: `cosine` or `euclidean`.
        threads: CPU threads; the CPU budget where None.

    Returns:
        The index without its re-ranking, for `write_index`.

    Raises:
        UsageError: the kind is unknown or does not fit the vectors.
    """
    builder = Builder(vectors_ND, factory, metric=metric, threads=threads)
    builder.start()
    return builder.finish()


class Builder:
    """Builds an index in two steps: most rows, and those that were held back."""

    def __init__(
        self,
        vectors_ND: NDArray[np.float32],
        factory: str,
        *,
        metric: str = COSINE,
        threads: int | None = None,
        held_back: NDArray[np.int64] | None = None,
    ) -> None:
        """Set out to build; nothing is read yet.

        Args:
            vectors_ND: as of `build_index`.
            factory: likewise.
            metric: likewise.
            threads: likewise.
            held_back: rows that are added at the end, ascending.
        """
        self.kind = parse_kind(factory, vectors_ND.shape[1])
        self.metric = metric
        self.held_back = np.empty(0, np.int64) if held_back is None else held_back
        self.rows_M = np.delete(np.arange(len(vectors_ND)), self.held_back)
        self._vectors_ND = vectors_ND
        self._threads = threads or cpu_budget()
        self._index: faiss.Index | None = None

    def start(self) -> faiss.Index:
        """Build over all rows but those held back; lists know rows by their numbers.

        A graph's n-th node is the n-th of `rows_M`, and keeps its own copy of the vectors.
        """
        vectors_ND, kind = self._vectors_ND, self.kind
        if kind.least_count > len(self.rows_M):
            raise UsageError(
                f"index {kind.factory}",
                expected=f"at least {kind.least_count} vectors to learn from",
                found=str(len(self.rows_M)),
            )
        if kind.is_cagra:
            self._index = _build_cagra(kind, vectors_ND[self.rows_M], self.metric)
            return self._index
        index = faiss.index_factory(vectors_ND.shape[1], kind.base, faiss_metric(self.metric))
        if kind.family == "graph":
            index.hnsw.efConstruction = EF_CONSTRUCTION
        if not index.is_trained:
            _train(index, kind, vectors_ND, self.rows_M, self._threads)
        self._add(index, self.rows_M)
        self._index = index
        return index

    def finish(self) -> faiss.Index:
        """Add the rows that were held back, and bring all into their order."""
        index, self._index = self._index, None
        assert index is not None, "start comes first"
        if not len(self.held_back):
            return index
        if self.kind.is_cagra:
            del index  # its graph takes no rows, and another comes
            return _build_cagra(self.kind, self._vectors_ND, self.metric)
        self._add(index, self.held_back)
        if self.kind.family == "graph":
            order = np.argsort(np.concatenate([self.rows_M, self.held_back]))
            index.permute_entries(order)
        return index

    def _add(self, index: faiss.Index, rows: NDArray[np.int64]) -> None:
        """Add rows, a block at a time."""
        for start in range(0, len(self._vectors_ND), BUILD_BLOCK):
            stop = min(len(self._vectors_ND), start + BUILD_BLOCK)
            first, last = np.searchsorted(rows, (start, stop))
            if first == last:
                continue
            own = rows[first:last]
            whole = len(own) == stop - start
            block_ND = np.ascontiguousarray(
                self._vectors_ND[start:stop] if whole else self._vectors_ND[own]
            )
            release_pages(self._vectors_ND, start, stop)
            inner, block_ND = _rotate(index, block_ND)
            with faiss_threads(
                self._threads if self.kind.family == "lists" else graph_threads(self._threads)
            ):
                if self.kind.family == "lists":
                    inner.add_with_ids(block_ND, own)
                else:
                    inner.add(block_ND)
            index.ntotal = inner.ntotal


def graph_threads(threads: int) -> int:
    """Say how many threads may link a graph without a race between them."""
    return threads if hasattr(faiss, "hnsw_add_vertices_deterministic") else 1


def write_index(index: faiss.Index, file: Path, factory: str) -> None:
    """Write an index as `index.ann.opening` reads it.

    FAISS's own writer prints what the disk says of the last bytes, and takes them for written.

    Raises:
        OSError: the file cannot be written.
    """
    flags = faiss.IO_FLAG_SKIP_STORAGE if parse_kind(factory).codec == "Flat" else 0
    with file.open("wb") as opened:
        faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write), flags)


def _train(
    index: faiss.Index,
    kind: Kind,
    vectors_ND: NDArray[np.float32],
    rows_M: NDArray[np.int64],
    threads: int,
) -> None:
    """Learn lists and codes from a sample of the rows, the same for the same vectors."""
    if kind.family == "lists":
        lists = lists_of(index)
        lists.cp.niter, lists.cp.seed = KMEANS_ITERATIONS, SEED
        lists.cp.min_points_per_centroid = 1  # few vectors are no reason for a warning
        if kind.codec == "PQ":
            lists.pq.cp.min_points_per_centroid = 1
    sample_ND = draw_rows(vectors_ND, rows_M, sample_rows(kind, len(rows_M)))
    if kind.rotates:
        with faiss_threads(1):  # a PCA's sums round by the number of threads
            faiss.downcast_VectorTransform(index.chain.at(0)).train(sample_ND)
    inner, sample_ND = _rotate(index, sample_ND)
    if kind.family == "lists":
        with faiss_threads(threads):
            pointer = faiss.swig_ptr(sample_ND)
            inner.train_q1(len(sample_ND), pointer, False, inner.metric_type)
    with faiss_threads(1):  # hundreds of tiny k-means: threads would only wait for one another
        inner.train(sample_ND)
    index.is_trained = True


def _rotate(
    index: faiss.Index, block_ND: NDArray[np.float32]
) -> tuple[faiss.Index, NDArray[np.float32]]:
    """Give the index below a rotation and the vectors rotated; or both as they are.

    One thread: with several BLAS rounds otherwise, and codes of one bit turn.
    """
    if not isinstance(index, faiss.IndexPreTransform):
        return index, block_ND
    with faiss_threads(1):
        rotated_ND = faiss.downcast_VectorTransform(index.chain.at(0)).apply(block_ND)
    return faiss.downcast_index(index.index), rotated_ND


def draw_rows(
    vectors_ND: NDArray[np.float32], rows_M: NDArray[np.int64], n: int
) -> NDArray[np.float32]:
    """Copy n of the rows, drawn from all of them; the memory map's pages are given back."""
    if n < len(rows_M):
        rows_M = np.sort(np.random.default_rng(SEED).choice(rows_M, n, replace=False))
    drawn_ND = np.empty((len(rows_M), vectors_ND.shape[1]), np.float32)
    for start in range(0, len(vectors_ND), BUILD_BLOCK):
        stop = min(len(vectors_ND), start + BUILD_BLOCK)
        first, last = np.searchsorted(rows_M, (start, stop))
        drawn_ND[first:last] = vectors_ND[rows_M[first:last]]
        release_pages(vectors_ND, start, stop)
    return drawn_ND


def _build_cagra(kind: Kind, vectors_ND: NDArray[np.float32], metric: str) -> faiss.Index:
    """Build the graph on a GPU, and bring it to where the CPU searches it."""
    if not can_build_cagra():
        raise UsageError(
            f"index {kind.factory}",
            expected="an NVIDIA GPU and faiss-gpu-cuvs",
            found=f"faiss {faiss.__version__} without them",
            mend="take HNSW32, whose graph a CPU builds; it is searched in the same way",
        )
    config = faiss.GpuIndexCagraConfig()
    config.graph_degree = 2 * kind.links
    config.intermediate_graph_degree = 4 * kind.links
    on_gpu = faiss.GpuIndexCagra(
        faiss.StandardGpuResources(), vectors_ND.shape[1], faiss_metric(metric), config
    )
    on_gpu.train(np.ascontiguousarray(vectors_ND))
    index = faiss.IndexHNSWCagra()
    on_gpu.copyTo(index)
    return index
