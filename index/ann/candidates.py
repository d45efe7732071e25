"""Which kinds of index are worth building over so many vectors, within so much memory.

Rules:
    By rule, not by trial: what is built and measured is `index.ann.tuning`'s matter.
    A kind whose building would not fit the memory is no candidate; nor is one that, searched,
    would not leave its vectors room to stay in memory, where every step of a search reads them.
    Where nothing fits, the least that would is named.

Sources of the numbers: docs/decisions/0015-choice-and-tuning.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from index.ann.kinds import EXACTLY, FLAT, FLAT_MAX_COUNT, HNSW, can_build_cagra, parse_kind
from index.ann.memory import as_size, build_bytes, search_bytes
from models.errors import UsageError

INDEX_MIN_COUNT = 2_000
"""Below, an index saves nothing that anybody would notice."""

GRAPH_MAX_COUNT = 300_000
"""Beyond, linking a graph takes two cores more than a few minutes; ask for it by name."""

PCA_DIM, PCA_MIN_DIM = 128, 513
"""Longer vectors, raw pixels as a rule, may have few directions: centres and codes of those cost a
sixth. Where they have many, as whitened embeddings, it is measured that the recall is missed."""

MIN_LISTS, MAX_LISTS = 16, 8192


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A kind that may be built.

    Attributes:
        factory: FAISS's factory string, or `Flat`.
        build_bytes: memory that building holds at its peak.
        search_bytes: memory that it holds when it is open, with the vectors where each search
            reads all over them.
        fits: whether both are within the budget.
    """

    factory: str
    build_bytes: int
    search_bytes: int
    fits: bool


def choose_candidates(
    count: int,
    dim: int,
    *,
    memory_bytes: int | None,
    factories: Sequence[str] = (),
    recall: float = 0.0,
) -> list[Candidate]:
    """Give the kinds to build, those that do not fit among them.

    Args:
        count: vectors.
        dim: their length.
        memory_bytes: the budget; unbounded where None.
        factories: kinds that were asked for by name, instead of the rule's.
        recall: what they must reach; where it is all, exact search is worth a look at any size.

    Raises:
        UsageError: none fits, or one that was asked for is unknown.
    """
    names = list(dict.fromkeys(factories)) or _by_rule(count, dim, recall)
    candidates = [_weigh(name, count, dim, memory_bytes) for name in names]
    if not any(candidate.fits for candidate in candidates):
        least = min(candidates, key=_peak)
        raise UsageError(
            f"memory for an index over {count} x {dim}",
            expected=f"at least {as_size(_peak(least))}, for {least.factory}",
            found=as_size(memory_bytes or 0),
            mend=f"give more, or {EXACTLY}",
        )
    return candidates


def _by_rule(count: int, dim: int, recall: float) -> list[str]:
    """Name the kinds, the likely ones first."""
    names = [FLAT] if count <= FLAT_MAX_COUNT or recall == 1 else []
    if count < INDEX_MIN_COUNT:
        return names
    lists = list_count(count)
    names += [f"IVF{lists},PQ{m}x4fs,RFlat" for m in sub_vectors(dim)]
    if dim >= PCA_MIN_DIM:
        names += [f"PCAR{PCA_DIM},IVF{lists},PQ{PCA_DIM}x4fs,RFlat"]
    names += [f"RR,IVF{lists},RaBitQfs,RFlat"]
    if count <= GRAPH_MAX_COUNT:
        names += [HNSW, f"{HNSW},SQ8,RFlat"]
    if can_build_cagra():
        names += ["CAGRA64"]
    return names


def list_count(count: int) -> int:
    """Give a number of lists: the power of two next to the root of the number of vectors.

    A search reads the centres of all lists and a few lists whole: both cost alike there.
    """
    return min(MAX_LISTS, max(MIN_LISTS, 1 << round(math.log2(max(1, count)) / 2)))


def sub_vectors(dim: int) -> list[int]:
    """Give numbers of sub-vectors: of two dimensions each and of four, as far as that goes."""
    found = []
    for width in (4, 2):
        fitting = [m for m in range(1, dim + 1) if dim % m == 0 and m <= math.ceil(dim / width)]
        found.append(max(fitting))
    return [m for m in dict.fromkeys(found) if 2 <= dim // m <= 8] or [dim]


def _weigh(name: str, count: int, dim: int, memory_bytes: int | None) -> Candidate:
    """Say what a kind weighs."""
    if name == FLAT:
        return Candidate(factory=name, build_bytes=0, search_bytes=0, fits=True)
    kind = parse_kind(name, dim)
    building, searching = build_bytes(kind, count, dim), search_bytes(kind, count, dim)
    if not kind.refines:
        searching += 4 * count * dim
    fits = memory_bytes is None or max(building, searching) <= memory_bytes
    return Candidate(factory=name, build_bytes=building, search_bytes=searching, fits=fits)


def _peak(candidate: Candidate) -> int:
    """Give the most memory that a candidate ever holds."""
    return max(candidate.build_bytes, candidate.search_bytes)
