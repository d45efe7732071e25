"""Fixtures of collections that are written to."""

import pyarrow as pa
import pytest

from index.ann.making import build_index, write_index
from index.storage.writer import CollectionWriter

FINGERPRINT, DIM = "f" * 64, 8


def table(*keys, **columns):
    """Rows of these keys."""
    return pa.table({"key": list(keys), "source": ["folder:/nowhere"] * len(keys), **columns})


def write_hnsw(vectors, file):
    """Write an index of vectors, and say what it is."""
    write_index(build_index(vectors, "HNSW32", metric="cosine"), file, "HNSW32")
    return {"factory": "HNSW32", "parameters": {"efSearch": 77}, "tuning": {"recall": 0.99}}


@pytest.fixture
def writer(tmp_path):
    """The writer of an empty collection."""
    with CollectionWriter.create(
        tmp_path / "c", name="made", fingerprint=FINGERPRINT, dim=DIM
    ) as writer:
        yield writer


@pytest.fixture
def vectors(unit_rows):
    """40 unit vectors."""
    return unit_rows(40, DIM)
