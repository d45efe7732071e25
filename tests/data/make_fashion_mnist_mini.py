"""Cut a small Fashion-MNIST out of the whole, so that tests need no download.

The first images of each class are taken, 40 of training and 20 of test, and kept in the
order in which the data set has them; the files are gzipped IDX, the same on every run.

Run from the root: `python -m tests.data.make_fashion_mnist_mini`.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.fashion_mnist import CLASS_NAMES, FILES, open_fashion_mnist

MINI = Path(__file__).parent / "fashion-mnist-mini"
PER_CLASS = {"train": 40, "test": 20}


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write a gzipped IDX file without a time in its header."""
    header = bytes((0, 0, 0x08, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))


def main() -> None:
    """Write the four files."""
    MINI.mkdir(exist_ok=True)
    for split, per_class in PER_CLASS.items():
        source = open_fashion_mnist(split)
        classes = np.array([CLASS_NAMES.index(label) for label in source.labels or []], np.uint8)
        first = [np.flatnonzero(classes == c)[:per_class] for c in range(len(CLASS_NAMES))]
        chosen = np.sort(np.concatenate(first))
        for name, array in zip(FILES[split], (source.images, classes), strict=True):
            write_idx(MINI / name, array[chosen])


if __name__ == "__main__":
    main()
