import json
from dataclasses import replace

import numpy as np
import pytest

from index.ann.trials import Goal
from index.building.tuned import tune_collection
from index.collection import Collection
from index.compact import CompactOptions, main
from index.describe import describe
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.command import run_command


@pytest.fixture
def run(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def command(*args):
        argv = [*map(str, args)]
        status = run_command(CompactOptions, main, prog="python -m index.compact", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_content_stays_and_space_comes_back(run, built, copy_collection):
    """The same living images, fewer segments and bytes; old snapshots go on answering."""
    path = copy_collection(built)
    with CollectionWriter.open(path) as writer:
        rows, vectors = writer.collection.table(), writer.collection.vectors(writer.collection.ids)
        writer.delete(writer.collection.ids[:30])
        for start in (0, 5, 10):
            some = slice(start, start + 5)
            writer.add(
                rows.slice(start, 5), vectors[some], fingerprint=writer.collection.fingerprint
            )
            writer.seal()
    with Collection.open(path) as old:
        ids = old.ids
        status, out, err = run(path, "--all", "--json")
        done = json.loads(out)
        assert (status, err) == (0, "")
        assert (done["count"], done["segments_before"], done["segments"]) == (45, 4, 1)
        assert done["bytes"] < done["bytes_before"]
        new = old.latest()
        assert set(new.ids) == set(ids) == set(old.ids)
        np.testing.assert_array_equal(new.vectors(ids), old.vectors(ids))
        assert new.rows(ids) == old.rows(ids)
        assert sum(new.deleted.values()) == 0
    found = verify(path)
    assert (found.faults, found.unknown) == ([], [])
    with Collection.open(path) as collection:
        size = describe(collection).size_bytes["total"]
    assert found.size_bytes == done["bytes"] == size
    assert run(path) == (0, f"{path}: 45 images, 1 -> 1 segment, {size} -> {size} bytes\n", "")


def test_a_measured_index_that_goes_is_said(run, tmp_path, unit_rows, make_collection, caplog):
    """In one line, with the command for the new one; what stays exact needs none."""
    path = make_collection(tmp_path / "made", unit_rows(300, 8))
    goal = Goal(recall=0.5, k=3, n_queries=20, factories=("HNSW8",))
    tune_collection(path, goal)
    assert run(path)[0] == 0
    assert [one for one in caplog.messages if "measured" in one] == []
    with CollectionWriter.open(path) as writer:
        writer.delete(writer.collection.ids[:5])
    assert run(path, "--all")[0] == 0
    assert [one for one in caplog.messages if "measured" in one] == [
        f"{path}: recall was measured of the index before, and not of the present "
        f"Flat; run `python -m index.tune {path} --recall 0.5 --k 3`"
    ]
    tune_collection(path, replace(goal, factories=("Flat",)))
    with CollectionWriter.open(path) as writer:
        writer.delete(writer.collection.ids[:5])
    assert run(path, "--all")[0] == 0
    assert len([one for one in caplog.messages if "measured" in one]) == 1


def test_another_writer_is_named(run, built, copy_collection):
    """One writer at a time."""
    path = copy_collection(built)
    with CollectionWriter.open(path):
        status, _, err = run(path)
    assert (status, "expected no other writer, found process " in err) == (1, True)
