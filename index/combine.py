"""One query made of several examples: more like these, less like those.

    q = normalise(mean(p_1, ..., p_P) - w * mean(n_1, ..., n_N))

with unit vectors p of the positives and n of the negatives, and w .5 unless said otherwise.

Rules:
    Every example counts alike within its side, however long its vector is, and however many
    there are on the other.
    Stored examples, positive or negative, are left out of the answer.
    Examples that cancel out are refused: what is left has no direction.

Source: Rocchio's relevance feedback (Manning et al., Introduction to Information Retrieval,
section 9.1.1) without an initial query; w = .5 gives the direction of Qdrant's
`average_vector`, p + (p - n).

Shapes: P positives, N negatives, Q queries, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from index.knn import MISSING
from index.neighbours import require_cosine
from models.errors import UsageError
from models.vectors import finish_vectors

if TYPE_CHECKING:
    from index.interface import AnyCollection

NEGATIVE_WEIGHT = 0.5
MAX_NEGATIVE_WEIGHT = 10.0

MIN_NORM = 1e-5
"""Below it, the sum of unit vectors in float32 is what rounding left of it."""

Example: TypeAlias = int | NDArray[np.float32]
"""The id of a stored image, or a (D,) vector of the collection's encoder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Combination:
    """One query.

    Attributes:
        positives: at least one; the answer is near them.
        negatives: the answer is away from them.
        negative_weight: of the negatives' mean, 0 to 10.
    """

    positives: Sequence[Example]
    negatives: Sequence[Example] = ()
    negative_weight: float = NEGATIVE_WEIGHT

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: there is no positive, or the weight is out of bounds.
        """
        if not self.positives:
            raise UsageError("positives", expected="at least one", found="none")
        check_negative_weight(self.negative_weight)

    @property
    def ids(self) -> list[int]:
        """The stored images among the examples."""
        examples = (*self.positives, *self.negatives)
        return [int(one) for one in examples if not isinstance(one, np.ndarray)]


def check_negative_weight(weight: float) -> None:
    """Refuse a weight that is not 0 to 10.

    Raises:
        UsageError: it is not.
    """
    if not (math.isfinite(weight) and 0 <= weight <= MAX_NEGATIVE_WEIGHT):
        raise UsageError(
            "negative weight", expected=f"0 to {MAX_NEGATIVE_WEIGHT:g}", found=f"{weight:g}"
        )


def combine_vectors(
    positives_PD: NDArray[np.float32],
    negatives_ND: NDArray[np.float32],
    *,
    negative_weight: float = NEGATIVE_WEIGHT,
) -> NDArray[np.float32]:
    """Give the (D,) query of unit length; see the module for the formula.

    Args:
        positives_PD: at least one row, of any length but zero.
        negatives_ND: any number of rows, of any length but zero.
        negative_weight: of the negatives.

    Raises:
        UsageError: they cancel out.
    """
    query_D: NDArray[np.float64] = finish_vectors(positives_PD).mean(axis=0, dtype=np.float64)
    if len(negatives_ND):
        query_D = query_D - negative_weight * finish_vectors(negatives_ND).mean(
            axis=0, dtype=np.float64
        )
    norm = float(np.linalg.norm(query_D))
    if norm < MIN_NORM:
        raise UsageError(
            "examples",
            expected="positives and negatives that leave a direction",
            found="ones that cancel out",
            mend="change the negatives, or give them less weight",
        )
    unit_D: NDArray[np.float32] = (query_D / norm).astype(np.float32)
    return unit_D


def pad_ids(ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Lay lists of ids out as one array (Q, W), -1 where a list is shorter."""
    width = max(map(len, ids), default=0)
    padded_QW = np.full((len(ids), width), MISSING, np.int64)
    for line, padded_W in zip(ids, padded_QW, strict=True):
        padded_W[: len(line)] = line
    return padded_QW


def query_vector(collection: AnyCollection, combination: Combination) -> NDArray[np.float32]:
    """Look up the stored examples of a combination, and give its (D,) query.

    Raises:
        UnknownIdError: an example is not in the collection.
        UsageError: examples cancel out, or the collection compares no cosines.
    """
    require_cosine(collection.metric, "combined query")
    return combine_vectors(
        _vectors(collection, combination.positives),
        _vectors(collection, combination.negatives),
        negative_weight=combination.negative_weight,
    )


def _vectors(collection: AnyCollection, examples: Sequence[Example]) -> NDArray[np.float32]:
    """Give the vectors of examples."""
    rows_ND = np.empty((len(examples), collection.dim), np.float32)
    for row_D, example in zip(rows_ND, examples, strict=True):
        if isinstance(example, np.ndarray):
            row_D[:] = example
        else:
            row_D[:] = collection.vectors([example])[0]
    return rows_ND
