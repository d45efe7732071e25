"""Opens the file of an index that somebody else may have written.

Rules:
    It is deserialised within the bytes that it has: sizes claimed in its header are bounded
    (faiss#5400), and one of another type, size, metric or make is refused.
    What every search follows unchecked is checked once: a graph's links, the rows that lists
    name and the sizes of their codes.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from index.ann.ann_index import AnnIndex
from index.ann.hnsw_file import graph_fault
from index.ann.kinds import Kind, lists_of, parse_kind
from index.errors import CollectionError, first_line, refuse_to_blame
from index.knn import EUCLIDEAN, faiss_metric
from models.errors import UsageError

SCAN = (0, 32, 0, 0)
"""FAISS's own choices of implementation, block and batch sizes, which no kind of ours changes."""

MEND = "the file is not this collection's: copy or build the collection again"

_OF_CONTENT = frozenset(
    ("is_trained", "ntotal", "nprobe", "qb", "own_fields", "own_invlists", "thisown", "verbose")
)
"""Of an index: what is checked elsewhere, what every search sets itself, and who frees it."""

_deserialisation = threading.Lock()  # faiss's limit is one for the whole process


def open_index(
    file: Path,
    *,
    factory: str,
    count: int,
    dim: int,
    metric: str,
    vectors_ND: NDArray[np.float32],
) -> AnnIndex:
    """Open the index of a segment.

    Args:
        file: `index.faiss`.
        factory: what the manifest says that it is.
        count: vectors in it.
        dim: their length.
        metric: `cosine` or `euclidean`.
        vectors_ND: (N, D) float32, the segment's memory-mapped vectors.

    Raises:
        CollectionError: the file is damaged, or is not what it is said to be.
    """
    measure = "squared distance" if metric == EUCLIDEAN else "inner product"
    expected = f"{factory} of {count} x {dim}, {measure}"
    try:
        kind = parse_kind(factory, dim)
    except UsageError as error:
        raise CollectionError(
            str(file), expected="a kind of index that is known", found=factory, mend=MEND
        ) from error
    index = _deserialise(file, kind, expected)
    found = f"{type(index).__name__} of {index.ntotal} x {index.d}, metric {index.metric_type}"
    if not _is_of(kind, index, (count, dim), faiss_metric(metric)):
        raise CollectionError(str(file), expected=expected, found=found, mend=MEND)
    if kind.family == "graph":
        fault, sound = _graph_fault(kind, index), "links between its rows"
    else:
        fault, sound = _lists_fault(kind, index, count), "lists of its rows"
    if fault is not None:
        raise CollectionError(str(file), expected=sound, found=fault, mend=MEND)
    return AnnIndex(kind, index, vectors_ND, metric=metric)


def _limit(kind: Kind, size_bytes: int) -> int:
    """Say how long a vector in a file may be.

    FAISS 1.15 counts tables that it would make for codes of residuals, and that it does not make
    for ours, against the limit: a small file with many lists would be refused.
    """
    tables = 4 * 16 * kind.lists * kind.sub_vectors
    return size_bytes + min(tables, 16 * size_bytes)


def _deserialise(file: Path, kind: Kind, expected: str) -> faiss.Index:
    """Read an index within the bytes that its file has."""
    try:
        with file.open("rb") as opened:  # for FAISS every error is the file's
            size_bytes = os.fstat(opened.fileno()).st_size
    except OSError as error:
        refuse_to_blame(file, error)
        raise
    with _deserialisation:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(_limit(kind, size_bytes))
        try:
            # No tables for codes of residuals, which ours are not.
            return faiss.read_index(str(file), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        except (RuntimeError, MemoryError) as error:
            found = f"no FAISS index ({first_line(error)})"
            raise CollectionError(str(file), expected=expected, found=found, mend=MEND) from error
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


def _is_of(kind: Kind, index: faiss.Index, shape: tuple[int, int], metric: int) -> bool:
    """Tell whether an index is of a kind, a size and a metric."""
    if (index.ntotal, index.d) != shape or index.metric_type != metric or not index.is_trained:
        return False
    if kind.family == "graph":
        types = {"Flat": faiss.IndexHNSWFlat, "SQ8": faiss.IndexHNSWSQ, "SQfp16": faiss.IndexHNSWSQ}
        expected = faiss.IndexHNSWCagra if kind.is_cagra else types[kind.codec]
        return type(index) is expected and (kind.is_cagra or _is_of_links(kind, index))
    if kind.rotates:
        if type(index) is not faiss.IndexPreTransform or index.chain.size() != 1:
            return False
        turn = faiss.downcast_VectorTransform(index.chain.at(0))
        made = faiss.PCAMatrix if kind.reduced else faiss.RandomRotationMatrix
        if type(turn) is not made or not _is_rotation(kind, turn, shape[1]):
            return False
        index = faiss.downcast_index(index.index)
        shape = (shape[0], kind.coded_dim(shape[1]))
    return _is_of_lists(kind, index, shape, metric)


def _is_rotation(kind: Kind, turn: faiss.LinearTransform, dim: int) -> bool:
    """Tell whether a transformation has all the numbers that it goes by, and no others."""
    left = kind.coded_dim(dim)
    return bool(
        (turn.d_in, turn.d_out, turn.A.size()) == (dim, left, left * dim)
        and turn.is_trained
        and turn.have_bias == (kind.reduced > 0)
        and turn.b.size() == kind.reduced
    )


def _is_of_links(kind: Kind, index: faiss.IndexHNSW) -> bool:
    """Tell whether a graph's nodes have as many links as they should."""
    return bool(index.hnsw.nb_neighbors(1) == kind.links)


def _is_of_lists(kind: Kind, index: faiss.Index, shape: tuple[int, int], metric: int) -> bool:
    """Tell whether inverted lists are of a kind."""
    types = {
        ("PQ", True): faiss.IndexIVFPQFastScan,
        ("RaBitQ", True): faiss.IndexIVFRaBitQFastScan,
        ("RaBitQ", False): faiss.IndexIVFRaBitQ,
    }
    if type(index) is not types[kind.codec, kind.is_fast_scan]:
        return False
    quantizer = faiss.downcast_index(index.quantizer)
    sound = (
        (index.ntotal, index.d) == shape
        and index.metric_type == metric
        and index.is_trained
        and index.nlist == kind.lists
        and isinstance(quantizer, faiss.IndexFlat)
        and quantizer.is_trained
        and (quantizer.ntotal, quantizer.d) == (kind.lists, shape[1])
        and quantizer.codes.size() == 4 * kind.lists * shape[1]
    )
    sound = sound and index.parallel_mode == 0
    if sound and kind.is_fast_scan:  # how it is scanned: FAISS looks at these in a search only
        sound = (index.implem, index.bbs, index.qbs, index.skip) == SCAN
    if sound and kind.codec == "PQ":
        sound = not index.by_residual and (index.pq.M, index.pq.nbits, index.pq.d) == (
            kind.sub_vectors,
            4,
            shape[1],
        )
        sound = sound and index.pq.centroids.size() == (1 << 4) * shape[1]
    if sound and kind.codec == "RaBitQ":
        sound = index.rabitq.nb_bits == kind.bits and index.rabitq.d == shape[1]
    return bool(sound) and _has_own_numbers(kind, index, shape[1], metric)


def _has_own_numbers(kind: Kind, index: faiss.IndexIVF, dim: int, metric: int) -> bool:
    """Tell whether every size that faiss's scans go by is the one that this kind has.

    There are some dozens of them, which no check by name would keep up with: an empty index of
    the kind says what they are.
    """
    base = faiss.index_factory(dim, kind.base, metric)
    empty = faiss.downcast_index(base.index) if kind.rotates else base
    pairs = [(index, empty)]
    for name in ("pq", "rabitq"):
        if hasattr(empty, name):
            pairs.append((getattr(index, name), getattr(empty, name)))
    if index.invlists is not None:
        pairs.append(
            (
                faiss.downcast_InvertedLists(index.invlists),
                faiss.downcast_InvertedLists(empty.invlists),
            )
        )
    return all(_numbers(one) == _numbers(other) for one, other in pairs)


def _numbers(thing: object) -> dict[str, object]:
    """Give the sizes and switches of a thing of faiss's, but those that say what is in it."""
    values = {name: getattr(thing, name) for name in dir(thing) if not name.startswith("_")}
    return {
        name: value
        for name, value in values.items()
        if type(value) in (int, bool, float) and name not in _OF_CONTENT
    }


def _graph_fault(kind: Kind, index: faiss.IndexHNSW) -> str | None:
    """Say what is wrong with a graph: its links, and the codes that they lead to."""
    if (index.storage is not None) != kind.refines:
        return "no codes" if kind.refines else "vectors of its own"
    if kind.refines:
        storage = faiss.downcast_index(index.storage)
        sound = (storage.ntotal, storage.d, storage.metric_type) == (
            index.ntotal,
            index.d,
            index.metric_type,
        )
        if not sound or storage.codes.size() != storage.ntotal * storage.code_size:
            return f"codes of {storage.ntotal} x {storage.d} for {index.ntotal} rows"
    return graph_fault(index)


def _lists_fault(kind: Kind, index: faiss.Index, count: int) -> str | None:
    """Say what is wrong with inverted lists: every row there once, and as many codes as rows."""
    lists = lists_of(index)
    invlists = lists.invlists
    if invlists is None or invlists.nlist != kind.lists:
        return "no lists" if invlists is None else f"{invlists.nlist} lists"
    seen = np.zeros(count, np.bool_)
    for number in range(kind.lists):
        size = invlists.list_size(number)
        if size == 0:
            continue
        if size > count:
            return f"{size} rows in list {number}"
        ids = faiss.rev_swig_ptr(invlists.get_ids(number), size)
        if ids.min() < 0 or ids.max() >= count:
            return f"row {ids.min() if ids.min() < 0 else ids.max()} in list {number}"
        if seen[ids].any():
            return f"row {ids[seen[ids]][0]} twice"
        seen[ids] = True
    return None if seen.all() else f"row {int(np.argmin(seen))} in no list"
