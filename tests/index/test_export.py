import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index import export
from index.collection import Collection
from index.export import ExportOptions, main
from index.storage.writer import CollectionWriter
from models.command import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys):
    """Run the command in this process: status, standard output, standard error's last line."""

    def command(*args):
        argv = [*map(str, args)]
        status = run_command(ExportOptions, main, prog="python -m index.export", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err.rpartition("python -m ")[2]

    return command


@pytest.fixture
def written(built, copy_collection):
    """A collection with deleted images, a delta, and a column of its own."""
    path = copy_collection(built)
    with CollectionWriter.open(path) as writer:
        before = writer.collection
        writer.delete(before.ids[:3])
        rows = before.table().slice(3, 2).append_column("stars", pa.array([4, 5]))
        vectors = before.vectors(before.ids[5:7])
        writer.upsert(rows, vectors, fingerprint=before.fingerprint)
    return path


def test_a_table_has_everything(run, written, tmp_path, monkeypatch):
    """Living images alone, all columns, vectors to the bit, block by block, and whose they are."""
    monkeypatch.setattr(export, "BLOCK_ROWS", 16)
    out = tmp_path / "x.parquet"
    status, said, _ = run(written, "--out", out)
    assert (status, said) == (0, f"{out}: 57 images of 16 dimensions\n")
    table = pq.read_table(out)
    with Collection.open(written) as collection:
        assert table.column_names == ["id", "key", "label", "source", "digest", "stars", "vector"]
        assert table["id"].to_pylist() == collection.ids.tolist()
        assert table.drop_columns(["vector"]).equals(collection.table())
        vectors = np.stack(table["vector"].to_numpy())
        np.testing.assert_array_equal(vectors, collection.vectors(collection.ids))
        facts = json.loads(pq.read_schema(out).metadata[b"horace"])
        assert facts["fingerprint"] == collection.fingerprint
    assert table["stars"].to_pylist().count(None) == 55


def test_arrays_are_row_by_row_the_same(run, written, tmp_path):
    """Vectors and ids for NumPy, metadata beside them."""
    out = tmp_path / "x.npy"
    status, said, _ = run(written, "--out", out, "--json")
    assert (status, json.loads(said)["count"]) == (0, 57)
    with Collection.open(written) as collection:
        ids = np.load(out / "ids.npy")
        np.testing.assert_array_equal(ids, collection.ids)
        np.testing.assert_array_equal(np.load(out / "vectors.npy"), collection.vectors(ids))
        assert pq.read_table(out / "rows.parquet").equals(collection.table())
    assert json.loads((out / "export.json").read_text())["metric"] == "cosine"


def test_a_filter_chooses(run, written, tmp_path):
    """And may leave nothing."""
    out = tmp_path / "x.parquet"
    assert run(written, "--out", out, "--filter", "label = 'red'")[0] == 0
    assert set(pq.read_table(out)["label"].to_pylist()) == {"red"}
    status, said, _ = run(written, "--out", tmp_path / "none", "--filter", "label = 'pink'")
    assert (status, "0 images" in said) == (0, True)
    assert np.load(tmp_path / "none" / "vectors.npy").shape == (0, 16)
    status, _, err = run(written, "--out", tmp_path / "bad", "--filter", "colour = 'red'")
    assert (status, "found 'colour'" in err) == (2, True)


def test_only_an_export_is_replaced(run, written, tmp_path):
    """And only on request; a picture of the holidays stays."""
    out = tmp_path / "x"
    assert run(written, "--out", out)[0] == 0
    status, _, err = run(written, "--out", out)
    assert (status, err.endswith("choose another name, or add --replace\n")) == (2, True)
    assert run(written, "--out", out, "--replace")[0] == 0
    other = tmp_path / "holidays"
    other.mkdir()
    (other / "me.jpg").write_bytes(b"x")
    status, _, err = run(written, "--out", other, "--replace")
    assert (status, "expected a new name, or an earlier export" in err) == (2, True)
    assert [file.name for file in other.iterdir()] == ["me.jpg"]


def test_only_a_table_of_an_export_is_replaced(run, written, tmp_path):
    """Not the facts of the images, which are parquet as well."""
    out = tmp_path / "x.parquet"
    assert run(written, "--out", out)[0] == run(written, "--out", out, "--replace")[0] == 0
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "facts.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    for name in ("facts.parquet", "damaged.parquet"):
        before = (tmp_path / name).read_bytes()
        status, _, err = run(written, "--out", tmp_path / name, "--replace")
        assert (status, "expected a new name, or an earlier export" in err) == (2, True)
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["x", "x.parquet"])
def test_an_export_is_whole_or_not_there(run, written, tmp_path, monkeypatch, name):
    """Where it fails on the way nothing is left, and what stood there stands there still."""
    out = tmp_path / "out" / name
    assert run(written, "--out", out)[0] == 0
    before = {file: file.read_bytes() for file in out.parent.rglob("*") if file.is_file()}

    def fail(*args):
        yield from list(read(*args))
        raise OSError(28, os.strerror(28))

    read = export._read
    monkeypatch.setattr(export, "_read", fail)
    status, _, err = run(written, "--out", out, "--replace")
    assert (status, "found No space left on device; make room, or choose another place" in err) == (
        1,
        True,
    )
    after = {file: file.read_bytes() for file in out.parent.rglob("*") if file.is_file()}
    assert before == after


def test_memory_is_bounded(tmp_path):
    """Exporting 48 MiB of vectors takes some blocks of them, not all."""
    path = tmp_path / "large"
    count, dim = 24_576, 512
    with CollectionWriter.create(path, name="large", fingerprint="a" * 64, dim=dim) as writer:
        for start in range(0, count, 8_192):
            keys = [f"{n}" for n in range(start, start + 8_192)]
            rows = pa.table({"key": keys, "label": keys, "source": ["s"] * len(keys)})
            vectors = np.random.default_rng(start).standard_normal((len(keys), dim), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            writer.add(rows, vectors, fingerprint="a" * 64)
    code = (
        "import sys; from pathlib import Path; import index.export as e; "
        "from index.collection import Collection; e.BLOCK_ROWS = 1024; "
        "o = e.ExportOptions(collection=sys.argv[1], out=Path(sys.argv[2])); "
        "c = Collection.open(o.collection, verify=False); c.table(); status = '/proc/self/status'; "
        "rss = lambda: int(open(status).read().split('RssAnon:')[1].split()[0]); "
        "before = rss(); peak = [0]; read = e._read; "
        "e._read = lambda *a: (peak.append(rss()) or b for b in read(*a)); "
        "e.export(c, o); print((max(peak) - before) >> 10)"
    )
    argv = [sys.executable, "-c", code, path, tmp_path / "out"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24, done.stdout  # MiB: some blocks of 2 MiB and what pyarrow keeps
