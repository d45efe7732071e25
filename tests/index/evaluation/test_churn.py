from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest

from index.collection import Collection
from index.errors import EvaluationError
from index.evaluation.churn import churned
from index.storage import incoming
from index.storage.writer import CollectionWriter


def contents(collection):
    """Give key, label and vector of every image, in the order of the ids."""
    order = np.argsort(collection.ids)
    rows = collection.rows(collection.ids[order])
    return [(row.key, row.label) for row in rows], collection.vectors(collection.ids[order])


def files(path):
    """Give every file's content."""
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_images_go_and_come_back(tmp_path, make_collection, unit_rows):
    """A fifth is deleted from the copy, and is as it was when it is back; nothing is left over."""
    path = make_collection(tmp_path / "c", unit_rows(90, 8), factory="HNSW32", n_segments=2)
    before, scratch = files(path), tmp_path / "scratch"
    scratch.mkdir()
    with Collection.open(path) as collection:
        steps = churned(collection, 0.2, seed=1, scratch=scratch, threads=1)
        name, copy = next(steps)
        assert (name, copy.count) == ("20% deleted", 72)
        gone = np.setdiff1d(collection.ids, copy.ids)
        found = copy.search(collection.vectors(gone), 1, fingerprint=copy.fingerprint)
        assert not np.isin(found.ids, gone).any()
        name, copy = next(steps)
        assert (name, copy.count) == ("and added back", 90)
        rows, vectors = contents(copy)
        expected_rows, expected_vectors = contents(collection)
        assert rows == expected_rows
        np.testing.assert_array_equal(vectors, expected_vectors)
        found = copy.search(collection.vectors(gone), 1, fingerprint=copy.fingerprint)
        assert found.ids[:, 0].tolist() == gone.tolist()
        assert next(steps, None) is None
    assert list(scratch.iterdir()) == []
    assert files(path) == before


def test_images_come_back_without_dates_that_may_not_come_in_any_more(
    tmp_path, make_collection, unit_rows, monkeypatch
):
    """As older collections have, of years beyond 9999: what is measured are vectors."""
    path = make_collection(tmp_path / "c", unit_rows(3, 8))
    days = pa.array([3_000_000], pa.int32()).cast(pa.date32())
    rows = pa.table({"key": ["x"], "source": ["s"], "label": ["a"], "day": days})
    with CollectionWriter.open(path) as writer, monkeypatch.context() as patch:
        patch.setattr(incoming, "first_unheld", lambda _: None)
        writer.add(rows, unit_rows(1, 8), fingerprint=writer.collection.fingerprint)
    with Collection.open(path) as collection:
        _, (_, copy) = churned(collection, 0.99, seed=0, scratch=None, threads=1)
        assert copy.count == 4


def test_what_is_deleted_is_the_seeds(tmp_path, make_collection, unit_rows):
    """The same images for the same seed; the copy goes when nobody asks on."""
    path = make_collection(tmp_path / "c", unit_rows(40, 8))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    kept = []
    with Collection.open(path) as collection:
        for seed in (1, 1, 2):
            with closing(churned(collection, 0.5, seed=seed, scratch=scratch, threads=1)) as steps:
                kept.append(next(steps)[1].ids.tolist())
            assert list(scratch.iterdir()) == []
    assert kept[0] == kept[1] != kept[2]


def test_a_copy_that_has_no_room_is_said(tmp_path, make_collection, unit_rows):
    """With the way out, and of one file; here two are gone before the collection is copied."""
    path = make_collection(tmp_path / "c", unit_rows(40, 8))
    with Collection.open(path) as collection:
        (path / "segments/000000/ids.npy").unlink()
        (path / "segments/000000/ids.npy").symlink_to(tmp_path / "nowhere")
        (path / "segments/000000/rows.parquet").unlink()
        (path / "segments/000000/rows.parquet").symlink_to(tmp_path / "nowhere")
        with pytest.raises(
            EvaluationError, match=r"copy of collection made: .*with --churn 0"
        ) as said:
            next(churned(collection, 0.5, seed=0, scratch=None, threads=1))
        assert said.value.found is not None
        assert said.value.found.startswith("[Errno 2] No such file or directory: ")
        assert said.value.found.count("segments/000000/") == 1
