"""Holds an opened index against the vectors that it was made of: nobody else does.

Rules:
    What an index keeps of a vector is made again from `vectors.npy` by the index's own codec. A
    sum that BLAS rounds otherwise may change a byte of it, another vector changes most.
    A graph whose nodes are the rows of `vectors.npy` keeps nothing of them, and RaBitQ's scanned
    codes are not to be had again: there some rows are searched for, and most must be found. Lists
    are searched by the parameters of the collection, a graph by the default: with more candidates
    one of other vectors would find them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import faiss
import numpy as np
from numpy.typing import NDArray

from index.ann.ann_index import AnnIndex
from index.ann.kinds import K_FACTOR, NEIGHBOURS, lists_of
from index.ann.memory import BUILD_BLOCK, release_pages
from index.knn import knn_search

PROBES = 64
MIN_FOUND = 0.5
"""Of the probes: an index of these vectors finds nearly all of them, one of others hardly any."""

MAX_RANKED = 1 / 8
"""Of all rows: with more, an index of other vectors would find them, too."""

MAX_CHANGED = 0.25
"""Of the bytes of a code."""

CENTRE = 1e-3
"""Of a vector's length: nearer to its list's centre, it is that centre."""

Codes = NDArray[np.uint8]
CodesOf = Callable[[NDArray[np.float32], int], tuple[Codes, Codes]]
"""Gives the stored and the remade codes, (n, bytes) each, of n vectors from a row on."""


def index_fault(index: AnnIndex, parameters: Mapping[str, int]) -> str | None:
    """Say in what an index differs from the vectors that it should be of, if in anything.

    Args:
        index: the opened index.
        parameters: by which it is searched for ten.
    """
    codes_of = _choose(index)
    if codes_of is None:
        return _find_self(index, parameters)
    for start in range(0, index.count, BUILD_BLOCK):
        stop = min(index.count, start + BUILD_BLOCK)
        stored, made = codes_of(np.ascontiguousarray(index.vectors_ND[start:stop]), start)
        release_pages(index.vectors_ND, start, stop)
        changed_N = (stored != made).mean(axis=1)
        if (changed_N > MAX_CHANGED).any():
            row = start + int((changed_N > MAX_CHANGED).argmax())
            return f"expected the vectors of vectors.npy, found another in row {row}"
    return None


def _choose(index: AnnIndex) -> CodesOf | None:
    """Choose how to remake an index's codes; None where there are none to be had."""
    kind = index.kind
    if kind.family == "graph":
        return _graph_codes(index) if kind.refines else None
    # What was rotated rounds by the size of its block: a code of four bits may be the next one.
    return None if kind.rotates and kind.is_fast_scan else _list_codes(index)


def _graph_codes(index: AnnIndex) -> CodesOf:
    """Compare the codes of a graph's nodes, which lie in the order of the rows."""
    storage = faiss.downcast_index(index.base.storage)
    stored = faiss.rev_swig_ptr(storage.codes.data(), storage.codes.size())
    stored_NB = stored.reshape(-1, storage.code_size)

    def codes_of(block_ND: NDArray[np.float32], start: int) -> tuple[Codes, Codes]:
        return stored_NB[start : start + len(block_ND)], storage.sa_encode(block_ND)

    return codes_of


def _list_codes(index: AnnIndex) -> CodesOf:
    """Compare the codes of inverted lists, which lie anywhere."""
    lists = lists_of(index.base)
    list_N, place_N = _find_places(lists, index.count)

    def codes_of(block_ND: NDArray[np.float32], start: int) -> tuple[Codes, Codes]:
        if index.kind.rotates:
            block_ND = faiss.downcast_VectorTransform(index.base.chain.at(0)).apply(block_ND)
        rows = slice(start, start + len(block_ND))
        numbers = np.ascontiguousarray(list_N[rows])
        made = np.zeros((len(block_ND), lists.code_size), np.uint8)
        pointers = [faiss.swig_ptr(a) for a in (block_ND, numbers, made)]
        lists.encode_vectors(len(block_ND), *pointers)
        stored = _stored_codes(lists, numbers, place_N[rows])
        return _signs(lists, block_ND, numbers, stored, made) if index.kind.rotates else (
            stored, made
        )  # fmt: skip

    return codes_of


def _signs(
    lists: faiss.IndexIVF,
    block_ND: NDArray[np.float32],
    numbers: NDArray[np.int64],
    stored: Codes,
    made: Codes,
) -> tuple[Codes, Codes]:
    """Take the signs of RaBitQ's codes; the factors behind them are sums, which round.

    A vector that is the centre of its list has the signs of what was rounded.
    """
    quantizer = faiss.downcast_index(lists.quantizer)
    off_N = np.linalg.norm(block_ND - quantizer.reconstruct_batch(numbers), axis=1)
    is_centre_N = off_N <= CENTRE * np.linalg.norm(block_ND, axis=1)
    n_bytes = (block_ND.shape[1] + 7) // 8
    made[is_centre_N] = stored[is_centre_N]
    return stored[:, :n_bytes], made[:, :n_bytes]


def _find_places(lists: faiss.IndexIVF, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the list of every row, and its place there."""
    list_N, place_N = np.empty(count, np.int64), np.empty(count, np.int64)
    for number in range(lists.nlist):
        size = lists.invlists.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(lists.invlists.get_ids(number), size)
            list_N[ids], place_N[ids] = number, np.arange(size)
    return list_N, place_N


def _stored_codes(
    lists: faiss.IndexIVF, list_N: NDArray[np.int64], place_N: NDArray[np.int64]
) -> Codes:
    """Collect codes from their lists."""
    found = np.zeros((len(list_N), lists.code_size), np.uint8)
    invlists = faiss.downcast_InvertedLists(lists.invlists)
    is_packed = isinstance(invlists, faiss.BlockInvertedLists)
    for number in np.unique(list_N):
        here = np.flatnonzero(list_N == number)
        if is_packed:
            found[here] = _unpack(invlists, int(number), place_N[here], lists.code_size)
        else:
            size = invlists.list_size(int(number))
            data = faiss.rev_swig_ptr(invlists.get_codes(int(number)), size * lists.code_size)
            found[here] = data.reshape(size, -1)[place_N[here]]
    return found


def _unpack(
    invlists: faiss.BlockInvertedLists, number: int, place_M: NDArray[np.int64], code_size: int
) -> Codes:
    """Give the codes at some places of a list, (M, bytes), which are packed for registers.

    Only the blocks that hold one of them are unpacked: a list may be as long as all rows.
    """
    n_block, block_bytes = invlists.n_per_block, invlists.block_size
    blocks, block_of_M = np.unique(place_M // n_block, return_inverse=True)
    packed = faiss.rev_swig_ptr(invlists.get_codes(number), (int(blocks[-1]) + 1) * block_bytes)
    codes = np.zeros((len(blocks), n_block, code_size), np.uint8)
    for block, unpacked in zip(blocks, codes, strict=True):
        invlists.packer.unpack_all(
            faiss.swig_ptr(packed[block * block_bytes :]), faiss.swig_ptr(unpacked)
        )
    wanted: Codes = codes[block_of_M, place_M % n_block]
    return wanted


def _find_self(index: AnnIndex, parameters: Mapping[str, int]) -> str | None:
    """Search for some of the rows: what is found is as near to them as they are themselves.

    Short codes of vectors that lie close together tell them apart no better than the recall needs
    that they were chosen for: as many are ranked again as for that, but for `MAX_RANKED`.
    """
    rows = np.unique(np.linspace(0, index.count - 1, PROBES).astype(np.int64))
    queries_QD = np.ascontiguousarray(index.vectors_ND[rows])
    effort: dict[str, int] = {}
    if index.kind.refines:
        most = max(K_FACTOR, int(MAX_RANKED * index.count))
        effort = index.scale(parameters, NEIGHBOURS, 1)
        effort["k_factor"] = min(most, effort["k_factor"])
    scores, _ = index.search(queries_QD, 1, parameters=effort, threads=1)
    own, _ = knn_search(queries_QD, queries_QD, 1, metric=index.metric, threads=1)
    found = float(np.mean(scores[:, 0] >= own[:, 0] - 1e-4 * np.abs(own[:, 0])))
    if found >= MIN_FOUND:
        return None
    return f"expected the vectors of vectors.npy, found {found:.0%} of those that were searched for"
