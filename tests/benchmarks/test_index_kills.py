import random
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import build_kills
from benchmarks.index_kills import kill_writers
from benchmarks.ledger import DIM, FINGERPRINT, Ledger, Write, read_state, rows_of, vectors_of
from index.collection import Collection
from index.storage.manifest import MANIFEST_FILE
from index.storage.writer import CollectionWriter


@pytest.fixture
def path(tmp_path):
    """A collection of three images, `a`, `b` and `c`, in version 1."""
    put = {"a": 1, "b": 1, "c": 1}
    with CollectionWriter.create(
        tmp_path / "c", name="c", fingerprint=FINGERPRINT, dim=DIM
    ) as writer:
        writer.add(rows_of(put), vectors_of(put), fingerprint=FINGERPRINT)
    return tmp_path / "c"


def settle(path, state, under_way):
    """Hold the collection against a ledger of this state, with a write under way."""
    ledger = Ledger(state=state, under_way=under_way)
    with Collection.open(path) as collection:
        return ledger.settle(collection)


@pytest.mark.parametrize(
    ("state", "under_way", "is_there"),
    [
        ({"a": 1, "b": 1, "c": 1}, None, None),
        ({"a": 1, "b": 1, "c": 1}, Write(kind="upsert", put={"a": 2, "d": 2}), False),
        ({"a": 1}, Write(kind="add", put={"b": 1, "c": 1}), True),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, Write(kind="delete", taken=("d",)), True),
        ({"a": 1, "b": 1, "c": 1}, Write(kind="compact", all=True), None),
    ],
)
def test_what_may_be_there(path, state, under_way, is_there):
    """All that was acknowledged, and of what was under way all or nothing."""
    assert settle(path, state, under_way) is is_there


@pytest.mark.parametrize(
    ("state", "under_way", "message"),
    [
        ({"a": 1, "b": 1, "c": 1, "d": 1}, None, r"1 lost.*\(d\)"),
        ({"a": 1, "b": 1}, None, r"1 more.*\(c\)"),
        ({"a": 1, "b": 2, "c": 1}, None, "1 of another version"),
        ({"a": 1}, Write(kind="add", put={"b": 1, "c": 1, "d": 1}), "1 lost"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, Write(kind="delete", taken=("c", "d")), "1 lost"),
    ],
)
def test_what_may_not_be_there_is_told(path, state, under_way, message):
    """Something lost, too much, of another version, or half of a write."""
    with pytest.raises(AssertionError, match=message):
        settle(path, state, under_way)


def test_a_vector_of_another_image_is_told(path):
    """Though every key is there in its version."""
    with CollectionWriter.open(path) as writer:
        rows = rows_of({"a": 1})
        writer.upsert(rows, vectors_of({"b": 1}), fingerprint=FINGERPRINT)
        with pytest.raises(AssertionError, match="a has another vector"):
            read_state(writer.collection)
        other = rows.set_column(3, "source", pa.array(["elsewhere:"]))
        writer.upsert(other, vectors_of({"a": 1}), fingerprint=FINGERPRINT)
        with pytest.raises(AssertionError):
            read_state(writer.collection)


def test_a_build_that_is_killed_after_its_last_step_is_not_begun_again(tmp_path, monkeypatch):
    """Its collection is there, and a build refuses to write where one is."""

    def finish(build, *_):
        out = Path(build[build.index("--out") + 1])
        out.mkdir()  # as a build, refuses where something is
        (out / MANIFEST_FILE).touch()
        return False

    for name in ("run_to_end", "kill_at"):
        monkeypatch.setattr(build_kills, name, finish)
    monkeypatch.setattr(build_kills, "hashes_of", lambda path: {})
    found = build_kills.kill_builds(tmp_path, 1, 2, random.Random(0))
    assert (found["kills"], found["finished_builds"]) == (2, 2)


@pytest.mark.slow
def test_five_kills_lose_nothing(tmp_path):
    """Of a writer that opens, adds, upserts, deletes and compacts; the benchmark makes more."""
    found = kill_writers(tmp_path / "c", 5, random.Random(3))
    assert found["kills"] == 5
    assert sum(found["acknowledged"].values()) > 0
