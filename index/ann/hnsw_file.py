"""Checks the links of an HNSW graph: FAISS follows them unchecked.

faiss 1.15 checks most of this itself when it reads a file, earlier versions do not.
"""

from __future__ import annotations

from typing import Protocol, cast

import faiss
import numpy as np
from numpy.typing import NDArray


def graph_fault(index: faiss.IndexHNSW) -> str | None:
    """Say what is wrong with an index's links, if anything: faiss follows them unchecked."""
    hnsw = index.hnsw
    levels, widths = _view(hnsw.levels), _view(hnsw.cum_nneighbor_per_level)
    offsets = _view(hnsw.offsets).astype(np.int64)
    neighbours = _view(hnsw.neighbors)
    if len(levels) != index.ntotal:
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
