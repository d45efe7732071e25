"""Combined queries, as a client writes them: more like these, less like those.

Rules:
    An example is an image, a stored id, or a vector whose encoder's fingerprint goes along.
    A combination is never cut: it goes whole into one request.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from models.errors import UsageError
from models.image_source import ImageData
from models.wire import image_to_wire, mend_image, vectors_to_wire
from protos import horace_pb2 as pb
from serve.client.arguments import MAX_UINT64, ONE_IMAGE, check_integer, check_number, describe

NEGATIVE_WEIGHT = 0.5
MAX_NEGATIVE_WEIGHT = 10.0

Example: TypeAlias = ImageData | NDArray[np.float32] | int
"""An encoded file or uint8 pixels; a (D,) vector of floats; or the id of a stored image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Combination:
    """One query made of several examples.

    The query is the mean of the positives, less `negative_weight` times that of the negatives,
    all of unit length. Stored examples are left out of the answer.

    Attributes:
        positives: at least one.
        negatives: any number.
        negative_weight: 0 to 10.
    """

    positives: Sequence[Example]
    negatives: Sequence[Example] = ()
    negative_weight: float = NEGATIVE_WEIGHT

    def __post_init__(self) -> None:
        """Refuse what no server can mean.

        Raises:
            UsageError: there is no positive, or the weight is no number or out of bounds.
        """
        for name, examples in (("positives", self.positives), ("negatives", self.negatives)):
            one = isinstance(examples, (*ONE_IMAGE, np.ndarray))
            if one or not isinstance(examples, Sequence):
                raise UsageError(name, expected="a list of examples", found=describe(examples))
        if not self.positives:
            raise UsageError("positives", expected="at least one", found="none")
        check_number("negative_weight", self.negative_weight, 0, MAX_NEGATIVE_WEIGHT)


def check_combined(combined: Sequence[Combination], fingerprint: str) -> list[pb.Combination]:
    """Write combined queries.

    Raises:
        UsageError: they are no sequence, there are none, or something else stands among them.
    """
    if not isinstance(combined, Sequence):
        is_one = isinstance(combined, Combination)
        raise UsageError(
            "combined",
            expected="a sequence of Combination",
            found="one" if is_one else describe(combined),
            mend="put it into a list" if is_one else "make a list of them",
        )
    if not combined:
        raise UsageError("combined", expected="at least one", found="none")
    for one in combined:
        if not isinstance(one, Combination):
            raise UsageError("combined", expected="a Combination each", found=describe(one))
    return [combination_to_wire(one, fingerprint) for one in combined]


def combination_to_wire(combination: Combination, fingerprint: str) -> pb.Combination:
    """Write a combination.

    Args:
        combination: what was asked.
        fingerprint: of the encoder that made the vectors in it; empty where there are none.

    Raises:
        UsageError: an example is none, or a vector comes without a fingerprint.
    """
    return pb.Combination(
        positives=[_example(one, fingerprint) for one in combination.positives],
        negatives=[_example(one, fingerprint) for one in combination.negatives],
        negative_weight=float(combination.negative_weight),
    )


def group_combinations(
    combinations: Iterable[pb.Combination], *, max_examples: int, max_bytes: int
) -> Iterator[list[pb.Combination]]:
    """Put as many combinations into a request as it takes, at least one."""
    group: list[pb.Combination] = []
    examples = size_bytes = 0
    for one in combinations:
        n, n_bytes = len(one.positives) + len(one.negatives), one.ByteSize()
        if group and (examples + n > max_examples or size_bytes + n_bytes > max_bytes):
            yield group
            group, examples, size_bytes = [], 0, 0
        group.append(one)
        examples, size_bytes = examples + n, size_bytes + n_bytes
    if group:
        yield group


def _example(example: Example, fingerprint: str) -> pb.Example:
    """Write one example.

    Raises:
        UsageError: it is none.
    """
    if isinstance(example, np.ndarray) and np.issubdtype(example.dtype, np.floating):
        return pb.Example(vector=_vector(cast(NDArray[np.float32], example), fingerprint))
    if isinstance(example, bytes | bytearray | memoryview | np.ndarray):
        return pb.Example(image=image_to_wire(cast(ImageData, example)))
    try:
        id_ = operator.index(example)
    except TypeError:
        is_id = isinstance(example, str) and example.isdecimal()
        raise UsageError(
            "example",
            expected="an image's bytes, uint8 pixels, a vector as an array of floats, or an id",
            found=describe(example),
            mend="make an id an integer" if is_id else mend_image(example),
        ) from None
    return pb.Example(id=check_integer("id of an example", id_, 0, MAX_UINT64))


def _vector(vector: NDArray[np.float32], fingerprint: str) -> pb.VectorQueries:
    """Write a vector with the fingerprint of its encoder."""
    if vector.ndim != 1 or not vector.size:
        raise UsageError("vector of an example", expected="shape (D,)", found=str(vector.shape))
    if not fingerprint:
        raise UsageError(
            "vector of an example",
            expected="the fingerprint of the encoder that made it",
            found="none",
            mend="pass fingerprint=result.fingerprint",
        )
    row = np.asarray(vector, np.float32)[None]
    return pb.VectorQueries(vectors=vectors_to_wire(row), fingerprint=fingerprint)
