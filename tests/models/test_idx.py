"""IDX files: what they hold, and how a wrong one is told."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from models.errors import SourceError
from models.idx import ArraySource, open_idx, read_idx


def idx(array: NDArray[np.uint8]) -> bytes:
    """Write an array as IDX."""
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.tobytes())
    )


IMAGES = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)
LABELS = np.array([7, 0, 9], np.uint8)


@given(
    array=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=1, max_dims=4, min_side=0)),
    gzipped=st.booleans(),
)
def test_an_array_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, array: NDArray[np.uint8], gzipped: bool
) -> None:
    """Any shape, gzipped or not, whatever the name says."""
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx(array)) if gzipped else idx(array))
    assert np.array_equal(read_idx(path, dimensions=(1, 2, 3, 4)), array)


def test_labels_are_found_beside_images_by_their_usual_name(tmp_path: Path) -> None:
    """MNIST's names say what belongs together and what the split is called."""
    (tmp_path / "val-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "val-labels-idx1-ubyte").write_bytes(idx(LABELS))
    source = open_idx(tmp_path / "val-images-idx3-ubyte")
    assert [(r.key, r.label) for r in source.records()] == [
        ("val/00000", "7"),
        ("val/00001", "0"),
        ("val/00002", "9"),
    ]
    assert np.array_equal(source.load("val/00001"), IMAGES[1])


def test_colour_images_and_no_labels_are_fine(tmp_path: Path) -> None:
    """Four dimensions are (N, H, W, C)."""
    path = tmp_path / "photos.idx"
    path.write_bytes(idx(np.zeros((2, 4, 5, 3), np.uint8)))
    (first, _) = open_idx(path).records()
    assert (first.key, first.label, np.shape(first.read())) == ("photos/00000", None, (4, 5, 3))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "found an empty file"),
        (b"PK\3\4", "expected magic number 00000803 (bytes, 3 dimensions), found 504b0304"),
        (idx(LABELS), "found 00000801; name images first, then labels: idx:IMAGES,LABELS"),
        (idx(IMAGES)[:9], "expected magic number 00000803"),
        (idx(IMAGES)[:-1], "expected 12 bytes of elements, as its shape (3, 2, 2) says, found 11"),
        (idx(IMAGES) + b"\0", "as its shape (3, 2, 2) says, found more; get the file again"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-9], "found Compressed file ended before"),
        (
            bytes((0, 0, 8, 3)) + b"\xff" * 12,
            "as its shape (4294967295, 4294967295, 4294967295) says, found 0",
        ),
        (
            bytes((0, 0, 8, 3)) + b"\0" * 4 + b"\xff" * 8,
            "expected sizes that an array can have, found (0, 4294967295, 4294967295); get the",
        ),
    ],
)
def test_a_wrong_file_is_told_apart(tmp_path: Path, data: bytes, text: str) -> None:
    """Another kind, a cut, a surplus, a lie about its size: each with what was expected."""
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_idx(path, dimensions=(3,))
    assert str(caught.value).startswith(f"IDX file {path}: ")
    assert text in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """The path is what to look at."""
    with pytest.raises(SourceError, match="found No such file or directory; check the path"):
        open_idx(tmp_path / "nothing")


def test_a_pipe_is_told(tmp_path: Path) -> None:
    """It would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="found no regular file; check the path"):
        open_idx(tmp_path / "pipe")


def test_labels_of_another_set_are_refused() -> None:
    """Every image has a label or none has."""
    with pytest.raises(SourceError) as caught:
        ArraySource("idx:x", "x", IMAGES, ["a", "b"])
    assert str(caught.value) == (
        "labels of idx:x: expected 3, one an image, found 2;"
        " name the label file that belongs to these images"
    )
