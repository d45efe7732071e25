import json
from dataclasses import replace

import pyarrow as pa
import pytest

from index.ann.trials import Goal
from index.building.tuned import tune_collection
from index.collection import Collection
from index.describe import DescribeOptions, _as_lines, describe, main
from index.storage.writer import CollectionWriter
from models.command import run_command

TUNING = {
    "recall": 0.99,
    "k": 10,
    "queries": "rows held back",
    "queries_choosing": 10,
    "queries_confirming": 10,
    "chosen": {"factory": "HNSW32", "parameters": {"efSearch": 64}, "recall_at": {"10": 0.995}},
}


@pytest.fixture
def run(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def command(*args):
        argv = [*map(str, args)]
        status = run_command(DescribeOptions, main, prog="python -m index.describe", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_what_a_collection_is(run, built_hnsw, bundle, train_folder):
    """Every fact on a line of its own."""
    status, out, err = run(built_hnsw)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0] == "colours-hnsw: 60 images of 16 dimensions, cosine, HNSW32"
    assert lines[1].split(maxsplit=1) == ["images", "60 live, 0 of them in the delta; 0 deleted"]
    assert f"  encoder      {bundle.path}" in lines
    assert f"  fingerprint  {bundle.fingerprint}" in lines
    assert f"  source       folder:{train_folder}: 60" in lines
    assert "  metadata     id, key, label, source" in out
    assert "  segment      000000: 60 vectors, 0 deleted, HNSW32 efSearch=64, " in out
    assert lines[-2] == "  tuning       none: run `python -m index.tune C --recall .99`"


def test_what_a_tuning_found_is_said(run, tmp_path, unit_rows, make_collection):
    """Recall and target, setting and queries on a line each; exact search needs no tuning."""
    path = make_collection(tmp_path / "made", unit_rows(300, 8))
    assert run(path)[1].splitlines()[-2] == "  tuning       none: every search is exact"
    tune_collection(path, Goal(recall=0.5, k=3, n_queries=20, factories=("HNSW8",)))
    with Collection.open(path) as collection:
        tuning = collection.manifest.tuning
    chosen = tuning["chosen"]
    assert run(path)[1].splitlines()[-4:-1] == [
        f"  tuning       recall@3 {chosen['recall_at']['3']:.4f}; the target was 0.5",
        f"  setting      HNSW8 with efSearch {chosen['parameters']['efSearch']}",
        "  queries      rows held back: 10 chose and 10 confirmed",
    ]
    tune_collection(path, Goal(recall=0.5, k=3, factories=("Flat",), n_queries=20))
    assert "  setting      Flat" in run(path)[1].splitlines()


def test_a_later_index_is_said_to_be_unmeasured(built_hnsw):
    """A tuning is of the first segment; what is searched exactly needs none."""
    with Collection.open(built_hnsw) as collection:
        described = describe(collection)
    (one,) = described.segments
    flat, later = replace(one, name="000001", index="Flat"), replace(one, name="000002")
    unmeasured = "  unmeasured   the index of 000002: the tuning is of 000000"
    for segments, tuning, is_said in [
        ([one, flat, later], TUNING, True),
        ([one, flat], TUNING, False),
        ([one, later], {}, False),
    ]:
        lines = _as_lines(replace(described, segments=segments, tuning=tuning))
        assert (unmeasured in lines) == is_said


def test_columns_of_the_users_own_are_shown_with_their_types(run, built, copy_collection):
    """As filters know them."""
    path = copy_collection(built)
    with CollectionWriter.open(path) as writer:
        before = writer.collection
        rows = before.table().slice(0, 2).append_column("price", pa.array([1.5, None]))
        writer.upsert(rows, before.vectors(before.ids[:2]), fingerprint=before.fingerprint)
    _, out, _ = run(path)
    assert "  metadata     id, key, label, source, digest, price (double)" in out.splitlines()
    _, out, _ = run(path, "--json")
    assert json.loads(out)["column_types"] == {"price": "double"}


def test_names_are_no_more_than_names(run, built, copy_collection):
    """A source or a column that is called so forges no line, and moves no cursor."""
    path = copy_collection(built)
    with CollectionWriter.open(path) as writer:
        rows = pa.table({"key": ["x"], "source": ["folder:/a\n  images  0 live"], "b\x1b[2J": [1]})
        vectors = writer.collection.vectors(writer.collection.ids[:1])
        writer.add(rows, vectors, fingerprint=writer.collection.fingerprint)
    _, out, _ = run(path)
    assert "  source       folder:/a\\n  images  0 live: 1" in out.splitlines()
    assert "digest, b\\x1b[2J (int64)" in out


@pytest.fixture
def written(built, copy_collection):
    """60 images, 7 of them deleted, and 2 written again."""
    path = copy_collection(built)
    with CollectionWriter.open(path) as writer:
        before = writer.collection
        rows, vectors = before.table(), before.vectors(before.ids)
        writer.delete(before.ids[:7])
        writer.upsert(rows.slice(7, 2), vectors[7:9], fingerprint=before.fingerprint)
    return path


def test_what_was_written_since(run, written, built):
    """Deleted images still take space, and new ones wait in the delta."""
    status, out, _ = run(written, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["count"], found["deleted"], found["delta"]) == (53, 9, 2)
    assert found["segments"][0]["deleted"] == 9
    assert found["version"] != json.loads(run(built, "--json")[1])["version"]
    total = sum(
        file.stat().st_size
        for file in written.rglob("*")
        if file.is_file() and file.name != ".lock"
    )
    assert found["size_bytes"]["total"] == total
    assert found["size_bytes"]["journal"] > 0


def test_tombstones_are_one_kind_of_file(written):
    """Whatever generations they are of."""
    with CollectionWriter.open(written) as writer:
        writer.seal()
        writer.delete(writer.collection.ids[-1:])
        writer.seal()
        described = describe(writer.collection)
    files = written.rglob("tombstones-*.npy")
    assert described.size_bytes["tombstones"] == sum(file.stat().st_size for file in files)
    assert set(described.size_bytes) == {
        "ids", "journal", "manifest", "rejects", "rows", "tombstones", "total", "vectors"
    }  # fmt: skip


def test_what_is_replaced_meanwhile_is_described_as_it_was(written):
    """The snapshot's journal may be gone: its bytes are not counted, and the rest is said."""
    with Collection.open(written) as collection:
        with CollectionWriter.open(written) as writer:
            writer.compact(all=True)
        described = describe(collection)
    assert (described.count, described.delta) == (53, 2)
    assert "journal" not in described.size_bytes
