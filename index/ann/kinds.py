"""The kinds of index that a segment may have: a closed list, by FAISS's factory strings.

    HNSW32                        a graph over the segment's own vectors
    HNSW32,SQ8,RFlat              a graph over 8-bit codes, re-ranked; SQfp16 likewise
    IVF256,PQ64x4fs,RFlat         lists of 4-bit product codes that are scanned in registers
    PCAR128,IVF256,PQ128x4fs,RFlat  the same after a PCA to 128 dimensions and a random rotation
    RR,IVF256,RaBitQ,RFlat        lists of 1-bit codes of rotated vectors, re-ranked; RaBitQ4 takes
                                  4 bits, RaBitQfs scans in registers
    CAGRA64                       a graph that a GPU built, searched on the CPU

Rules:
    What is stored in codes is always re-ranked (`RFlat`) by the segment's own float32 vectors, so
    that scores are exact whatever the kind, and the vectors are on the disk once.
    A kind says which search parameters it has, by FAISS's own names, and what they are where
    nobody says otherwise; and what it weighs in memory, before anything is built.
    `CAGRA` is no word of FAISS's factory; the others are.

Sources: HNSW arXiv 1603.09320; PQ fast scan arXiv 1704.07355; RaBitQ arXiv 2405.12497; CAGRA
arXiv 2308.15136.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import faiss

from models.errors import UsageError

FLAT = "Flat"
FLAT_MAX_COUNT = 20_000
"""Up to here every vector may be compared: a millisecond or two a query, and always exact."""

EXACTLY = "search exactly: `index.tune --index Flat`, `index.build --index flat`"
"""For errors: what reaches any recall within any memory."""

HNSW = "HNSW32"
EF_SEARCH = 64
NPROBE = 16
K_FACTOR = 10
NEIGHBOURS = 10
"""How many neighbours a segment's search parameters are for; for others see `AnnIndex.scale`."""

MAX_LISTS = 1 << 20
MAX_LINKS = 256

Family = Literal["graph", "lists"]

_GRAPH = re.compile(r"HNSW(\d{1,3})(?:,Flat|,(SQ8|SQfp16),RFlat)?")
_CAGRA = re.compile(r"CAGRA(\d{1,3})")
_PQ = re.compile(r"(?:PCAR([1-9]\d{0,3}),)?IVF(\d{1,7}),PQ(\d{1,4})x4fs,RFlat")
_RABITQ = re.compile(r"RR,IVF(\d{1,7}),RaBitQ(fs)?([1-8])?,RFlat")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a factory string asks for.

    Attributes:
        factory: as in the manifest.
        base: what FAISS's factory makes, without the re-ranking.
        family: a graph, or inverted lists.
        codec: `Flat`, `SQ8`, `SQfp16`, `PQ` or `RaBitQ`.
        links: a graph's links a node, below the top twice as many; 0 for lists.
        lists: number of inverted lists; 0 for a graph.
        sub_vectors: that a product code has, of 4 bits each; 0 of other codecs.
        reduced: dimensions that a PCA leaves; 0 where there is none.
        bits: a dimension, of RaBitQ's codes.
        is_fast_scan: whether codes are scanned in registers.
        is_cagra: whether a GPU builds it.
    """

    factory: str
    base: str
    family: Family
    codec: str
    links: int = 0
    lists: int = 0
    sub_vectors: int = 0
    reduced: int = 0
    bits: int = 1
    is_fast_scan: bool = False
    is_cagra: bool = False

    @property
    def refines(self) -> bool:
        """Whether found rows are ranked again by their float32 vectors."""
        return self.codec != "Flat"

    @property
    def rotates(self) -> bool:
        """Whether vectors are rotated, or brought to fewer dimensions, before they are coded."""
        return self.codec == "RaBitQ" or self.reduced > 0

    def coded_dim(self, dim: int) -> int:
        """Give the dimensions of what is coded of a vector."""
        return self.reduced or dim

    @cached_property
    def defaults(self) -> Mapping[str, int]:
        """The search parameters that there are, and what they are where nobody says otherwise."""
        first = {"efSearch": EF_SEARCH} if self.family == "graph" else {"nprobe": NPROBE}
        # A graph over codes is searched by distances that are nearly right: a few more do.
        factor = K_FACTOR if self.family == "lists" else 2
        return first | ({"k_factor": factor} if self.refines else {})

    @property
    def least_count(self) -> int:
        """The fewest vectors that it can be learnt from: of a code of 4 bits 16 for its centres."""
        return max(self.lists, self.reduced, 16 if self.codec == "PQ" else 1)

    def code_bytes(self, dim: int) -> int:
        """Give the bytes of one vector's code."""
        rabitq = (dim * self.bits + 7) // 8 + (8 if self.bits == 1 else 20)
        return {
            "Flat": 4 * dim,
            "SQ8": dim,
            "SQfp16": 2 * dim,
            "PQ": (self.sub_vectors + 1) // 2,
            "RaBitQ": rabitq,
        }[self.codec]


def parse_kind(factory: str, dim: int | None = None) -> Kind:
    """Read a factory string.

    Args:
        factory: such as `HNSW32`.
        dim: length of the vectors, where it is to be checked that they can be cut up so.

    Raises:
        UsageError: it is none of the kinds, or its numbers are out of bounds.
    """
    kind = _parse(factory)
    if kind is None or not _is_within_bounds(kind):
        raise UsageError(
            "index",
            expected="Flat, HNSW32, HNSW32,SQ8,RFlat, HNSW32,SQfp16,RFlat, IVF256,PQ64x4fs,RFlat, "
            "RR,IVF256,RaBitQ,RFlat or CAGRA64, or one of these with other numbers: "
            f"HNSW of 2 to {MAX_LINKS} links, IVF of 1 to {MAX_LISTS} lists, PQ of 1 sub-vector or "
            f"more, RaBitQ of 1 to 8 bits, CAGRA of 4 to {2 * MAX_LINKS} neighbours a node",
            found=factory,
        )
    if dim is not None and kind.reduced > dim:
        raise UsageError(
            f"index {factory}",
            expected=f"a PCA to at most {dim} dimensions",
            found=str(kind.reduced),
        )
    if dim is not None and kind.codec == "PQ" and kind.coded_dim(dim) % kind.sub_vectors:
        raise UsageError(
            f"index {factory}",
            expected=f"a number of sub-vectors that divides {kind.coded_dim(dim)} dimensions",
            found=str(kind.sub_vectors),
        )
    return kind


def lists_of(index: faiss.Index) -> faiss.IndexIVF:
    """Give the inverted lists below a rotation, or the index itself."""
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def parameter_names(factory: str) -> tuple[str, ...]:
    """Name the search parameters of an index; none for `Flat`."""
    return () if factory == FLAT else tuple(parse_kind(factory).defaults)


def default_parameters(factory: str) -> dict[str, int]:
    """Give the search parameters of an index where nobody says otherwise."""
    return {} if factory == FLAT else dict(parse_kind(factory).defaults)


def settings_text(parameters: Mapping[str, int]) -> str:
    """Say `nprobe 8, k_factor 4`."""
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def can_build_cagra() -> bool:
    """Tell whether there is a GPU here, and a FAISS that builds graphs on it."""
    return hasattr(faiss, "GpuIndexCagra") and faiss.get_num_gpus() > 0


def _parse(factory: str) -> Kind | None:
    """Match the string against each form."""
    base = factory.removesuffix(",RFlat")
    if match := _GRAPH.fullmatch(factory):
        links, codec = match.groups()
        return Kind(
            factory=factory, base=base, family="graph", codec=codec or "Flat", links=int(links)
        )
    if match := _CAGRA.fullmatch(factory):
        degree = int(match[1])
        return Kind(
            factory=factory, base=base, family="graph", codec="Flat", links=degree // 2,
            is_cagra=True,
        )  # fmt: skip
    if match := _PQ.fullmatch(factory):
        return Kind(
            factory=factory, base=base, family="lists", codec="PQ", lists=int(match[2]),
            sub_vectors=int(match[3]), reduced=int(match[1] or 0), is_fast_scan=True,
        )  # fmt: skip
    if match := _RABITQ.fullmatch(factory):
        return Kind(
            factory=factory, base=base, family="lists", codec="RaBitQ", lists=int(match[1]),
            bits=int(match[3] or 1), is_fast_scan=match[2] is not None,
        )  # fmt: skip
    return None


def _is_within_bounds(kind: Kind) -> bool:
    """Tell whether the numbers are such as FAISS can bear."""
    if kind.family == "graph":
        return 2 <= kind.links <= MAX_LINKS
    return 1 <= kind.lists <= MAX_LISTS and (kind.codec != "PQ" or kind.sub_vectors >= 1)
