import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.errors import UsageError
from models.vectors import PackedVectors, finish_vectors, pack_vectors, unpack_vectors

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24),
    elements=st.floats(-(2.0**127), 2.0**127, width=32),
)

moderate = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24),
    elements=st.floats(-1e3, 1e3, width=32),
)


@given(matrices, st.data())
def test_truncated_vectors_are_normalised_again(vectors, data):
    """The order is truncate, then normalise: every row has unit length, or was zero."""
    dims = data.draw(st.integers(1, vectors.shape[1]))
    finished = finish_vectors(vectors, dims=dims)
    assert finished.shape == (len(vectors), dims)
    assert finished.dtype == np.float32
    norms = np.linalg.norm(finished.astype(np.float64), axis=1)
    lengths = np.linalg.norm(vectors[:, :dims].astype(np.float64), axis=1)
    np.testing.assert_allclose(norms[lengths > 0], 1, atol=1e-6)
    assert not np.isnan(finished).any()


@given(matrices)
def test_a_row_does_not_depend_on_its_batch(vectors):
    """One row alone gives the same bits as in company."""
    together = finish_vectors(vectors)
    alone = np.concatenate([finish_vectors(vectors[n : n + 1]) for n in range(len(vectors))])
    assert together.tobytes() == alone.tobytes()


def test_unnormalised_vectors_pass_unchanged():
    """Without normalisation only the cut is made."""
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(
        finish_vectors(vectors, dims=2, normalize=False), [[0, 1], [3, 4]]
    )


@pytest.mark.parametrize("dims", [0, -1, 4])
def test_dims_outside_the_vector_are_refused(dims):
    """A cut that cannot be made says what can."""
    with pytest.raises(UsageError, match=f"dims: expected 1 to 3, found {dims}"):
        finish_vectors(np.ones((1, 3), np.float32), dims=dims)


@given(moderate, st.sampled_from([("fp32", 0.0), ("fp16", 2**-11), ("int8", 0.5 / 127)]))
def test_packing_round_trips_within_the_dtype(vectors, kind):
    """fp32 is exact, fp16 to half its step, int8 to half a 127th of the row's largest."""
    dtype, relative = kind
    packed = pack_vectors(vectors, dtype)
    assert len(packed.data) == vectors.size * {"fp32": 4, "fp16": 2, "int8": 1}[dtype]
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    error = np.abs(unpack_vectors(packed) - vectors)
    assert (error <= largest * relative * 1.01 + (6e-8 if dtype == "fp16" else 1e-37)).all()


def test_no_vectors_pack_to_no_bytes():
    """An empty batch keeps its dimension."""
    for dtype in ("fp32", "fp16", "int8"):
        packed = pack_vectors(np.empty((0, 7), np.float32), dtype)
        assert unpack_vectors(packed).shape == (0, 7)


def test_unknown_dtype_is_refused_both_ways():
    """A dtype of nobody's is refused with the list of those there are."""
    with pytest.raises(UsageError, match="expected fp32 or fp16 or int8, found 'fp64'"):
        pack_vectors(np.ones((1, 1), np.float32), "fp64")
    with pytest.raises(UsageError, match="found 'fp64'"):
        unpack_vectors(PackedVectors(data=b"", dtype="fp64", shape=(0, 1)))


def test_bytes_that_do_not_fit_the_shape_are_refused():
    """A short payload is an error, never a misread vector."""
    with pytest.raises(UsageError, match="expected 24 bytes, found 20 bytes"):
        unpack_vectors(PackedVectors(data=bytes(20), dtype="fp32", shape=(2, 3)))


def test_missing_scales_are_refused():
    """int8 without a scale a row cannot be read."""
    with pytest.raises(UsageError, match="int8 scales: expected 2, one a row, found 0"):
        unpack_vectors(PackedVectors(data=bytes(6), dtype="int8", shape=(2, 3)))
