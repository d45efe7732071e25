"""Opens the file of an HNSW index that somebody else may have written.

Rules:
    It is deserialised within the bytes that it has: sizes claimed in its header are bounded
    (faiss#5400), and one of another type, size or metric is refused.
    Links are checked once, since every search follows them unchecked. faiss 1.15 does so
    itself, earlier versions do not.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from index.errors import CollectionError

_deserialisation = threading.Lock()  # faiss's limit is one for the whole process


def open_hnsw(file: Path, *, factory: str, count: int, dim: int) -> faiss.IndexHNSW:
    """Deserialise an index within bounds and hold it against what it must be."""
    mend = "the file is not this collection's: copy or build the collection again"
    expected = f"{factory} of {count} x {dim}, inner product"
    with _deserialisation:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(file.stat().st_size)
        try:
            index = faiss.read_index(str(file))
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0]
            raise CollectionError(
                str(file), expected=expected, found=f"no FAISS index ({reason})", mend=mend
            ) from error
        finally:
            faiss.set_deserialization_vector_byte_limit(before)
    found = f"{type(index).__name__} of {index.ntotal} x {index.d}, metric {index.metric_type}"
    sound = (
        isinstance(index, faiss.IndexHNSW)
        and (index.ntotal, index.d) == (count, dim)
        and index.metric_type == faiss.METRIC_INNER_PRODUCT
    )
    if not sound:
        raise CollectionError(str(file), expected=expected, found=found, mend=mend)
    if (wrong := graph_fault(cast(faiss.IndexHNSW, index))) is not None:
        raise CollectionError(str(file), expected="links between its rows", found=wrong, mend=mend)
    return cast(faiss.IndexHNSW, index)


def stored_vectors(index: faiss.IndexHNSW, start: int, count: int) -> NDArray[np.float32]:
    """Give vectors as an HNSW index keeps them, (count, D) float32."""
    return cast(NDArray[np.float32], index.reconstruct_n(start, count))


def graph_fault(index: faiss.IndexHNSW) -> str | None:
    """Say what is wrong with an index's links, if anything: faiss follows them unchecked."""
    hnsw = index.hnsw
    levels, widths = _view(hnsw.levels), _view(hnsw.cum_nneighbor_per_level)
    offsets = _view(hnsw.offsets).astype(np.int64)  # type: ignore[attr-defined]  # as the next,
    neighbours = _view(hnsw.neighbors)  # type: ignore[attr-defined]  # not in its stubs
    if faiss.downcast_index(index.storage).ntotal != index.ntotal or len(levels) != index.ntotal:
        return f"{len(levels)} nodes for {index.ntotal} rows"
    if len(offsets) != index.ntotal + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        return "offsets that do not rise"
    if offsets[-1] != len(neighbours):
        return f"{len(neighbours)} links where {offsets[-1]} are spoken of"
    if neighbours.size and not -1 <= neighbours.min() <= neighbours.max() < index.ntotal:
        return f"a link to row {neighbours.max()}"
    if not 0 <= hnsw.entry_point < index.ntotal or hnsw.max_level > int(levels.max()) - 1:
        return f"an entry at row {hnsw.entry_point}, level {hnsw.max_level}"
    if levels.min() < 1 or levels.max() >= len(widths):
        return f"a node of level {levels.max()}"
    if not np.array_equal(np.diff(offsets), widths[levels]):
        return "nodes with other numbers of links than their levels have"
    return None


class _FaissVector(Protocol):
    """A std::vector of faiss."""

    def data(self) -> object:
        """Point to its values."""

    def size(self) -> int:
        """Count them."""


def _view(vector: _FaissVector) -> NDArray[np.int64]:
    """Look at a vector of faiss without copying it."""
    return cast(NDArray[np.int64], faiss.rev_swig_ptr(vector.data(), vector.size()))
