"""An index that was opened over a segment's vectors, and how it is searched.

Rules:
    Parameters of a search belong to the call: every field that FAISS has is set each time, since
    what is left out goes back to the class's own default (efSearch 16, nprobe 1), and the
    shared index is never changed.
    Re-ranking reads the segment's memory-mapped float32 vectors where they lie, within the same
    call of FAISS: one call a query, no second copy in memory. Where only some rows may be found,
    it is a call of its own, for those alone.
    Scores are better when higher: cosines, or minus the squared distance.
    No parameter makes a search weigh more rows than there are, and memory holds the candidates of
    a block of queries: what a caller asks for is time, never all of the memory.

Any number of threads may search it.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import faiss
import numpy as np
from numpy.typing import NDArray

from index.ann.kinds import EF_SEARCH, NEIGHBOURS, Kind, lists_of
from index.knn import (
    EUCLIDEAN,
    MISSING,
    faiss_metric,
    faiss_threads,
    pad_neighbours,
    search_threads,
)
from index.selection import Chosen, keep_chosen

LIST_CANDIDATES = 2
"""Of lists, for each neighbour; with these and `scale` a filter that leaves half finds .996 of the
ten nearest, a search without one .995 (`benchmarks/results/filters_tuned.json`)."""

GRAPH_SLACK, PROBES_GROW, FACTOR_FALLS = 2, 1 / 2, 1 / 4
"""Of `scale`: candidates of a graph for each neighbour, and exponents for lists. With these
recall@100 is about that at 10: decision 0015."""

FILTER_SLACK = 1.1
"""The same of a graph whose candidates a filter chooses from: it misses some of the last, of which
few were chosen (decision 0014)."""

LISTS_SLACK = 1.2
"""Of lists, for each of the rows that a filter's k are among as a rule: without it too many of the
last lie in lists that nobody looks into (decision 0014)."""

MAX_KEPT_SETTINGS = 256
"""Sets of FAISS's search parameters that are kept made; a few microseconds each to make."""


BLOCK_CANDIDATES = 1 << 20
"""Rows to rank again that are held at a time, of all queries of a block; FAISS takes 29 bytes for
each: 30 MB, or what a single query needs."""


class AnnIndex:
    """An opened index over a segment's vectors. Made by `index.ann.opening.open_index`.

    Attributes:
        kind: what it is.
        metric: `cosine` or `euclidean`.
        count: vectors in it.
        vectors_ND: (N, D) float32, the segment's.
        base: FAISS's index, without re-ranking.
    """

    def __init__(
        self,
        kind: Kind,
        base: faiss.Index,
        vectors_ND: NDArray[np.float32],
        *,
        metric: str,
        rows_M: NDArray[np.int64] | None = None,
    ) -> None:
        """Take over an index that was checked, and put the vectors beneath it.

        Args:
            kind: of the index.
            base: the index, without re-ranking.
            vectors_ND: (N, D) float32, whose rows the index finds.
            metric: `cosine` or `euclidean`.
            rows_M: the rows that it has, where those are not all: a graph's n-th node is the n-th
                of them, and it keeps its own vectors.
        """
        self.kind = kind
        self.metric = metric
        self.count = len(vectors_ND)
        self.base = base
        self.vectors_ND = vectors_ND  # FAISS borrows it, and what follows
        self._flat = flat_over(vectors_ND, metric)
        self._settings: dict[tuple[int | bool, ...], tuple[faiss.SearchParameters, int]] = {}
        searched = base
        if kind.family == "graph" and rows_M is not None:
            searched = self._numbered = _number(base, rows_M)
        elif kind.family == "graph" and not kind.refines:
            base.storage, base.own_fields = self._flat, False
        self._coarse = self._top = searched
        if kind.refines:
            self._flat.ntotal = searched.ntotal  # FAISS wants the same number of both at first
            self._top = faiss.IndexRefine(searched, self._flat)
            self._top.ntotal = self._flat.ntotal = len(vectors_ND)

    def __repr__(self) -> str:
        return f"<AnnIndex {self.kind.factory} over {self.count} vectors, {self.metric}>"

    def search(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        *,
        parameters: Mapping[str, int],
        threads: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find about the k nearest rows: (Q, k) scores and rows, padded with -inf and -1.

        Args:
            queries_QD: (Q, D) float32, C-contiguous.
            k: how many.
            parameters: of this call, by FAISS's names; the kind's defaults where left out.
            threads: CPU threads.
        """
        n_asked = min(k, self.count)
        settings, n_block = self._settings_of(n_asked, {**self.kind.defaults, **parameters})
        with faiss_threads(search_threads(threads, len(queries_QD))):
            if len(queries_QD) <= n_block:
                scores, rows = self._top.search(queries_QD, n_asked, params=settings)
            else:
                scores, rows = self._search_blocks(queries_QD, n_asked, settings, n_block)
        if self.metric == EUCLIDEAN:
            np.negative(scores, out=scores)
        if len(rows) != 1 or rows.item(-1) < 0:  # what is missing comes last
            scores[rows < 0] = -np.inf
        return pad_neighbours(scores, rows, k) if n_asked < k else (scores, rows)

    def search_among(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        among: Chosen,
        *,
        candidates: int,
        parameters: Mapping[str, int],
        threads: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Find about the k nearest of the chosen rows, among so many candidates.

        Codes give `k_factor` times as many, and the chosen ones alone are ranked again.

        Args:
            queries_QD: (Q, D) float32, C-contiguous.
            k: how many, at most as many as were chosen.
            among: the rows that may be found.
            candidates: rows to choose from, at least k.
            parameters: see `search`.
            threads: see there.

        Returns:
            (Q, k) scores and rows, padded, and the queries that have too few chosen rows among
            their candidates: fewer than k, or, of codes, than `k_factor` times k.
        """
        if not self.kind.refines:
            found = self.search(queries_QD, candidates, parameters=parameters, threads=threads)
            return keep_chosen(*found, among.mask_N, k)
        parameters = within({**self.kind.defaults, **parameters}, candidates, self.base.ntotal)
        factor = parameters["k_factor"]
        n_coarse = min(candidates * factor, self.base.ntotal)
        settings, n_block = self._settings_of(n_coarse, parameters, is_coarse=True)
        scores_QK = np.empty((len(queries_QD), k), np.float32)
        rows_QK = np.empty((len(queries_QD), k), np.int64)
        counts_Q = np.empty(len(queries_QD), np.int64)
        with faiss_threads(search_threads(threads, len(queries_QD))):
            for start in range(0, len(queries_QD), n_block):
                block = slice(start, start + n_block)
                rows_QC = self._coarse.search(queries_QD[block], n_coarse, params=settings)[1]
                rows_QC[~among.mask_N[rows_QC]] = MISSING
                counts_Q[block] = (rows_QC != MISSING).sum(axis=1)
                scores_QK[block], rows_QK[block] = self._rank(queries_QD[block], rows_QC, k)
        wanted = min(k * factor, among.count)
        return scores_QK, rows_QK, np.flatnonzero(counts_Q < wanted)

    def _rank(
        self, queries_QD: NDArray[np.float32], rows_QC: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Give the k nearest of each query's own rows, best first; row -1 is none."""
        scores_QC = np.empty(rows_QC.shape, np.float32)
        arrays = (scores_QC, queries_QD, self.vectors_ND, rows_QC)
        is_euclidean = self.metric == EUCLIDEAN
        score = faiss.fvec_L2sqr_by_idx if is_euclidean else faiss.fvec_inner_products_by_idx
        score(*map(faiss.swig_ptr, arrays), self.vectors_ND.shape[1], *rows_QC.shape)
        if is_euclidean:
            np.negative(scores_QC, out=scores_QC)
        best_QK = np.argsort(-scores_QC, axis=1)[:, :k]  # sorting all of them is the fastest
        lines_Q = np.arange(len(rows_QC))[:, None]
        return scores_QC[lines_Q, best_QK], rows_QC[lines_Q, best_QK]

    def _search_blocks(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        settings: faiss.SearchParameters,
        n_block: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Search for so many queries at a time."""
        scores_QK = np.empty((len(queries_QD), k), np.float32)
        rows_QK = np.empty((len(queries_QD), k), np.int64)
        for start in range(0, len(queries_QD), n_block):
            block = slice(start, start + n_block)
            self._top.search(
                queries_QD[block], k, params=settings, D=scores_QK[block], I=rows_QK[block]
            )
        return scores_QK, rows_QK

    def scale(
        self, parameters: Mapping[str, int], k: int, wanted: int, *, slack: float = GRAPH_SLACK
    ) -> dict[str, int]:
        """Give the parameters by which `wanted` neighbours are found as well as k by these.

        A graph that keeps no more candidates than it is asked for misses many of the last:
        it keeps `slack` times as many. Lists that held the k nearest hold less of the next ones:
        more are looked into. For fewer as many are ranked again, or the first of one would not be
        the first of k.
        """
        found = {**self.kind.defaults, **parameters}
        ratio = wanted / max(1, k)
        if ratio < 1 and "k_factor" in found:
            found["k_factor"] = math.ceil(found["k_factor"] / ratio)
        elif ratio > 1 and self.kind.family == "graph":
            found["efSearch"] = max(found["efSearch"], math.ceil(slack * wanted))
        elif ratio > 1:
            found["nprobe"] = min(self.kind.lists, round(found["nprobe"] * ratio**PROBES_GROW))
            found["k_factor"] = max(2, math.ceil(found["k_factor"] / ratio**FACTOR_FALLS))
        return found

    def scale_among(
        self, parameters: Mapping[str, int], k: int, *, candidates: int, nearest: int
    ) -> dict[str, int]:
        """Give the parameters by which a filter's rows are found among so many candidates.

        Lists are looked into for `LISTS_SLACK` times the `nearest`, of which as many as are wanted
        pass the filter as a rule: the other candidates are there for chance, in the same lists.

        Args:
            parameters: which find k neighbours.
            k: see there.
            candidates: rows to choose from.
            nearest: how many rows are wanted, divided by the share that the filter leaves.
        """
        found = self.scale(parameters, k, candidates, slack=FILTER_SLACK)
        if self.kind.family == "lists":
            looked_into = self.scale(parameters, k, math.ceil(LISTS_SLACK * nearest))
            found["nprobe"] = looked_into["nprobe"]
        return found

    def candidates(self, k: int, parameters: Mapping[str, int]) -> int:
        """Say how many rows a filter may choose from that cost a search for k nothing more.

        `scale` makes a graph keep `FILTER_SLACK` times as many.
        """
        found = {**self.kind.defaults, **parameters}
        is_graph = self.kind.family == "graph"
        return max(1, int(found["efSearch"] / FILTER_SLACK)) if is_graph else LIST_CANDIDATES * k

    def effort_parameters(
        self, candidates: int, k: int, parameters: Mapping[str, int]
    ) -> dict[str, int]:
        """Give the parameters by which a search for k weighs so many candidates a query.

        Of lists as many more are looked into, as these are more than `parameters` weigh for
        `NEIGHBOURS`.
        """
        found = {**self.kind.defaults, **parameters}
        if self.kind.family == "graph":
            return {**self.scale(parameters, NEIGHBOURS, k), "efSearch": candidates}
        ratio = candidates / (NEIGHBOURS * found["k_factor"])
        return {
            "nprobe": min(self.kind.lists, max(1, round(found["nprobe"] * ratio))),
            "k_factor": max(1, round(candidates / k)),
        }

    def _settings_of(
        self, k: int, parameters: Mapping[str, int], *, is_coarse: bool = False
    ) -> tuple[faiss.SearchParameters, int]:
        """Make FAISS's own parameters, or take those that were made before.

        Args:
            k: how many rows are asked for.
            parameters: all that there are.
            is_coarse: whether they are for the index without its re-ranking.

        Returns:
            Those, and for how many queries at a time memory is taken.
        """
        key = (is_coarse, k, *parameters.values())
        kept = self._settings.get(key)
        if kept is not None:
            return kept
        bounded = within(parameters, k, self.base.ntotal)
        if is_coarse:
            n_block = max(1, BLOCK_CANDIDATES // max(1, k))
            made = make_coarse_settings(self.kind, self.base, k, bounded), n_block
        else:
            n_block = max(1, BLOCK_CANDIDATES // max(1, k * bounded.get("k_factor", 1)))
            made = make_settings(self.kind, self.base, k, bounded), n_block
        if len(self._settings) < MAX_KEPT_SETTINGS:
            self._settings[key] = made
        return made


def within(parameters: Mapping[str, int], k: int, count: int) -> dict[str, int]:
    """Bound what a search weighs by the vectors that there are: more would find no more."""
    most = {"k_factor": math.ceil(count / max(1, k)), "efSearch": max(count, k)}
    return {name: max(1, min(value, most.get(name, value))) for name, value in parameters.items()}


def _number(base: faiss.Index, rows_M: NDArray[np.int64]) -> faiss.IndexIDMap:
    """Let an index know its vectors by other numbers."""
    numbered = faiss.IndexIDMap(faiss.IndexFlat(base.d, base.metric_type))  # it wants an empty one
    numbered.index, numbered.ntotal = base, base.ntotal
    faiss.copy_array_to_vector(rows_M, numbered.id_map)
    return numbered


def make_settings(
    kind: Kind, base: faiss.Index, k: int, parameters: Mapping[str, int]
) -> faiss.SearchParameters:
    """Make FAISS's search parameters with every field set."""
    factor = parameters.get("k_factor", 1)
    settings = make_coarse_settings(kind, base, k * factor, parameters)
    if kind.refines:
        settings = faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=settings)
    return settings


def make_coarse_settings(
    kind: Kind, base: faiss.Index, k: int, parameters: Mapping[str, int]
) -> faiss.SearchParameters:
    """Make those of the index without its re-ranking, of which k are asked."""
    if kind.family == "lists":
        return _list_settings(kind, base, parameters["nprobe"])
    return faiss.SearchParametersHNSW(
        efSearch=max(parameters.get("efSearch", EF_SEARCH), k),
        check_relative_distance=True,
        bounded_queue=True,
    )


def _list_settings(kind: Kind, base: faiss.Index, nprobe: int) -> faiss.SearchParameters:
    """Make the parameters of inverted lists."""
    fields = {
        "nprobe": min(nprobe, kind.lists),
        "max_codes": 0,
        "max_lists_num": 0,
        "ensure_topk_full": False,
        "max_empty_result_buckets": 0,
    }
    if kind.codec == "RaBitQ":
        qb = lists_of(base).qb
        settings = faiss.IVFRaBitQSearchParameters(**fields, qb=qb, centered=False)
    else:
        settings = faiss.SearchParametersIVF(**fields)
    return faiss.SearchParametersPreTransform(index_params=settings) if kind.rotates else settings


def flat_over(vectors_ND: NDArray[np.float32], metric: str) -> faiss.IndexFlat:
    """Make a flat index whose vectors are those of an array: nothing is copied.

    FAISS borrows the array, which must outlive the index.
    """
    assert vectors_ND.dtype == np.float32
    assert vectors_ND.flags.c_contiguous
    flat = faiss.IndexFlat(vectors_ND.shape[1], faiss_metric(metric))
    if len(vectors_ND):
        data = faiss.swig_ptr(vectors_ND.reshape(-1).view(np.uint8))
        codes = flat.codes  # faiss's MaybeOwnedVector; `create_view` wants an owner
        codes.is_owned = False
        codes.view_data = codes.c_ptr = data
        codes.view_size = codes.c_size = vectors_ND.nbytes
    flat.ntotal = len(vectors_ND)
    return cast(faiss.IndexFlat, flat)
