"""Builds the FAISS index of a segment from its memory-mapped vectors, and writes its file.

Rules:
    Memory holds the index, a block of vectors and a bounded sample; what was read of the map is
    given back as it goes.
    The same vectors and the same kind give the same bytes: samples are drawn evenly from all
    rows by a fixed seed, lists are learnt from fixed beginnings, and a graph is linked by one
    thread. With `graph_threads=2` a graph takes a little over half the time, and depends on the
    race between them.
    A graph's file has no vectors: `vectors.npy` beside it does.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from index.ann.kinds import Kind, lists_of, parse_kind
from index.ann.memory import BUILD_BLOCK, check_budget, release_pages, sample_rows
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
    graph_threads: int = 1,
    memory_bytes: int | None = None,
) -> faiss.Index:
    """Build an index over vectors.

    Args:
        vectors_ND: (N, D) float32, best a memory map; of unit length where `metric` is `cosine`.
        factory: one of `index.ann.kinds`.
        metric: `cosine` or `euclidean`.
        threads: CPU threads for what does not depend on their number; the CPU budget where None.
        graph_threads: CPU threads that link a graph; with more than one its bytes differ from
            build to build.
        memory_bytes: most that building may take; unbounded where None.

    Returns:
        The index without its re-ranking, for `write_index`.

    Raises:
        UsageError: the kind is unknown or does not fit the vectors or the budget.
    """
    count, dim = vectors_ND.shape
    kind = parse_kind(factory, dim)
    check_budget(kind, count, dim, memory_bytes)
    if kind.is_cagra:
        return _build_cagra(kind, vectors_ND, metric)
    index = faiss.index_factory(dim, kind.base, faiss_metric(metric))
    if kind.family == "graph":
        index.hnsw.efConstruction = EF_CONSTRUCTION
    _train(index, kind, vectors_ND, threads or cpu_budget())
    n_threads = graph_threads if kind.family == "graph" else threads or cpu_budget()
    for start in range(0, count, BUILD_BLOCK):
        block_ND = np.ascontiguousarray(vectors_ND[start : start + BUILD_BLOCK])
        release_pages(vectors_ND, start, min(count, start + BUILD_BLOCK))
        inner, block_ND = _rotate(index, block_ND)
        with faiss_threads(n_threads):
            inner.add(block_ND)
    index.ntotal = count
    return index


def write_index(index: faiss.Index, file: Path, factory: str) -> None:
    """Write an index as `index.ann.opening` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    flags = faiss.IO_FLAG_SKIP_STORAGE if parse_kind(factory).codec == "Flat" else 0
    try:
        writer = faiss.FileIOWriter(str(file))
        faiss.write_index(index, writer, flags)
        del writer  # closes the file
    except RuntimeError as error:
        raise OSError(None, str(error).splitlines()[0]) from error


def _train(index: faiss.Index, kind: Kind, vectors_ND: NDArray[np.float32], threads: int) -> None:
    """Learn lists and codes from a sample of the vectors, the same for the same vectors."""
    if index.is_trained:
        return
    if kind.lists > len(vectors_ND):
        raise UsageError(
            f"index {kind.factory}",
            expected=f"at most as many lists as there are vectors, {len(vectors_ND)}",
            found=str(kind.lists),
        )
    if kind.family == "lists":
        lists = lists_of(index)
        lists.cp.niter, lists.cp.seed = KMEANS_ITERATIONS, SEED
        lists.cp.min_points_per_centroid = 1  # few vectors are no reason for a warning
    sample_ND = draw_rows(vectors_ND, sample_rows(kind, len(vectors_ND)))
    if kind.rotates:
        faiss.downcast_VectorTransform(index.chain.at(0)).train(sample_ND)
    inner, sample_ND = _rotate(index, sample_ND)
    with faiss_threads(threads):
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


def draw_rows(vectors_ND: NDArray[np.float32], n: int, *, seed: int = SEED) -> NDArray[np.float32]:
    """Copy n of the vectors, drawn from all of them; the memory map's pages are given back."""
    if n >= len(vectors_ND):
        rows = np.arange(len(vectors_ND))
    else:
        rows = np.sort(np.random.default_rng(seed).choice(len(vectors_ND), n, replace=False))
    drawn = np.empty((len(rows), vectors_ND.shape[1]), np.float32)
    for start in range(0, len(vectors_ND), BUILD_BLOCK):
        stop = min(len(vectors_ND), start + BUILD_BLOCK)
        first, last = np.searchsorted(rows, (start, stop))
        drawn[first:last] = vectors_ND[rows[first:last]]
        release_pages(vectors_ND, start, stop)
    return drawn


def _build_cagra(kind: Kind, vectors_ND: NDArray[np.float32], metric: str) -> faiss.Index:
    """Build the graph on a GPU, and bring it to where the CPU searches it."""
    if not hasattr(faiss, "GpuIndexCagra") or faiss.get_num_gpus() == 0:
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
