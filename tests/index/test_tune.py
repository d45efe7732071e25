"""The command that chooses an index by its measured recall."""

import errno
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from index.ann.trials import Goal
from index.ann.tuning import _not_reached, hold_back, plan, tuning_bytes
from index.collection import Collection, id_of
from index.storage.manifest import read_manifest
from index.storage.writer import CollectionWriter
from index.tune import TuneOptions, main
from index.verify import verify
from models.command import run_command
from models.errors import UsageError

COUNT, DIM, K = 4000, 32, 10
FINGERPRINT = "f" * 64
KINDS = ["HNSW8", "IVF32,PQ16x4fs,RFlat", "RR,IVF32,RaBitQfs,RFlat"]


def draw(n, *, seed):
    """Draw unit vectors around thirty centres."""
    shape, draw = np.random.default_rng(0), np.random.default_rng(seed)
    centres = shape.standard_normal((30, DIM))
    rows = centres[draw.integers(0, 30, n)] + 0.8 * draw.standard_normal((n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def collection(tmp_path, make_collection):
    """A collection of clustered vectors, searched exactly so far."""
    return make_collection(tmp_path / "made", draw(COUNT, seed=1))


def run(*args):
    """Run the command."""
    return run_command(
        TuneOptions, main, prog="python -m index.tune", argv=[str(arg) for arg in args]
    )


def fresh_recall(path, k=K):
    """Give the recall of the collection's own search on vectors that nobody has seen."""
    queries = draw(1000, seed=77)
    with Collection.open(path) as opened:
        found = opened.search(queries, k, fingerprint=FINGERPRINT).ids
        exact = opened.search(queries, k, fingerprint=FINGERPRINT, exact=True).ids
    return np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)])


@pytest.mark.parametrize("target", [0.9, 0.99])
def test_fresh_queries_meet_the_target(collection, capsys, target):
    """Of kinds that reach it by search parameters, on queries that had no part in anything."""
    assert run(collection, "--recall", target, "--index", *KINDS, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert fresh_recall(collection) >= target - 0.002
    (entry,) = read_manifest(collection).segments
    assert report["chosen"]["factory"] == entry.factory
    assert report["chosen"]["parameters"] == entry.parameters
    assert entry.factory in KINDS
    assert verify(collection).faults == []


def test_the_report_lands_in_the_manifest(collection, capsys, tmp_path):
    """As it is printed, with everything that somebody asks who was not there."""
    kinds = KINDS[1:]
    plot = tmp_path / "plot.png"
    assert run(collection, "--index", *kinds, "--json", "--plot", plot) == 0
    report = json.loads(capsys.readouterr().out)
    assert read_manifest(collection).tuning == report
    assert {"hardware", "versions", "seed", "peak_memory_bytes"} <= set(report)
    assert [trial["factory"] for trial in report["trials"]] == kinds
    chosen = report["chosen"]
    assert set(chosen["recall_at"]) == {"1", "10", "100"}
    assert chosen["recall_at"]["10"] >= 0.99
    assert chosen["worst_5_percent"] <= chosen["recall_at"]["10"]
    assert 0 < chosen["p50_ms"] <= chosen["p99_ms"]
    assert 0 < chosen["bytes_per_vector"] < 4 * DIM
    assert report["queries_choosing"] == report["queries_confirming"] == 200
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_cheapest_is_taken(collection, capsys):
    """Of those that reach the target, by the measured time of a single query."""
    assert run(collection, "--recall", ".95", "--index", "Flat", *KINDS[1:2], "--json") == 0
    report = json.loads(capsys.readouterr().out)
    reached = [trial for trial in report["trials"] if trial["parameters"] is not None]
    assert report["chosen"]["p50_ms"] == min(trial["p50_ms"] for trial in reached)
    assert report["chosen"]["factory"] == read_manifest(collection).segments[0].factory


def test_what_was_not_written_has_no_size(collection, capsys):
    """A kind below the target has no file, and so no bytes a vector: not none of them."""
    kinds = ("Flat", "HNSW2")
    assert run(collection, "--recall", "1", "--queries", 20, "--index", *kinds, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    sizes = {trial["factory"]: trial["bytes_per_vector"] for trial in report["trials"]}
    assert sizes == {"Flat": 0, "HNSW2": None}


def test_a_target_that_none_reaches_fails_and_changes_nothing(collection, capsys):
    """The one line says what the best reached and what to change."""
    before = (collection / "manifest.json").read_bytes()
    assert run(collection, "--recall", "1", "--queries", 20, "--index", "HNSW2") == 1
    error = capsys.readouterr().err
    assert "tuning: expected recall@10 of at least 1, with a margin for the sample, found " in error
    assert " at best, by HNSW2 with efSearch " in error
    assert "ask for less, give more memory, or search exactly: `index.tune --index Flat`" in error
    assert (collection / "manifest.json").read_bytes() == before


def test_a_tuned_index_outlives_a_tuning_that_fails(collection, capsys):
    """Also where rows were written and deleted since, which the new one would have had."""
    assert run(collection, "--recall", ".8", "--index", "HNSW8") == 0
    with CollectionWriter.open(collection) as writer:
        rows, vectors = writer.collection.table().slice(5, 1), draw(1, seed=3)
        writer.delete([id_of("0001")])
        writer.upsert(rows, vectors, fingerprint=FINGERPRINT)
    tuned = read_manifest(collection)
    assert run(collection, "--recall", "1", "--queries", 20, "--index", "HNSW2") == 1
    after = read_manifest(collection)
    assert [one.factory for one in after.segments] == ["HNSW8", "Flat"]
    assert (after.tuning, after.count) == (tuned.tuning, COUNT - 1)
    assert verify(collection).faults == verify(collection).unknown == []
    assert run(collection, "--recall", ".8", "--index", "HNSW4") == 0
    assert [one.factory for one in read_manifest(collection).segments] == ["HNSW4"]
    assert verify(collection).faults == verify(collection).unknown == []
    capsys.readouterr()


KILLED = """
import logging, os, signal, sys
from index.tune import TuneOptions, main
from models.command import run_command

class Killer(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("HNSW8: built"):  # HNSW4 waits on the disk
            os.kill(os.getpid(), signal.SIGKILL)

logging.getLogger("horace.index").addHandler(Killer())
run_command(TuneOptions, main, prog="tune", argv=sys.argv[1:])
"""


def test_a_tuning_that_is_killed_leaves_nothing_for_long(tmp_path, make_collection):
    """What it had built is no part of the collection, and gone with the next writer."""
    path = make_collection(tmp_path / "one" / "made", draw(COUNT, seed=1), n_segments=2)
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(path),
        "--recall",
        ".8",
        "--index",
        "HNSW4",
        "HNSW8",
    ]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert list(path.parent.iterdir()) == [path]
    found = verify(path)
    assert found.faults == []
    assert [name for name in found.unknown if name.endswith(".faiss")] != []
    with Collection.open(path) as opened:
        assert (opened.count, opened.factory) == (COUNT, "Flat")
    with CollectionWriter.open(path):
        assert verify(path).unknown == []
    assert sorted(file.name for file in (path / "segments").iterdir()) == ["000000", "000001"]


def test_a_memory_in_which_nothing_fits_is_refused(collection, capsys):
    """Before anything is built, and with the least that would do."""
    assert run(collection, "--index", KINDS[0], "--memory", "10kB") == 2
    assert "memory: expected more than the " in capsys.readouterr().err


def test_a_memory_that_is_taken_already_is_refused(monkeypatch):
    """By the process, and by what queries and their searches take beside an index."""
    monkeypatch.setattr("index.ann.tuning.held_bytes", lambda: 1 << 20)
    taken = (1 << 20) + tuning_bytes(COUNT, DIM, Goal())
    with pytest.raises(UsageError, match=r"memory: expected more than the .* that this process"):
        plan(COUNT, DIM, Goal(memory_bytes=taken, factories=KINDS))
    more = Goal(memory_bytes=taken + (64 << 20), factories=KINDS)
    assert all(candidate.fits for candidate in plan(COUNT, DIM, more))


def test_what_queries_take_grows_with_them():
    """Never beyond the rows there are; and by the neighbours, of which a hundred are counted."""
    least, more = tuning_bytes(100, DIM, Goal()), tuning_bytes(COUNT, DIM, Goal())
    assert least < tuning_bytes(COUNT, DIM, Goal(n_queries=200)) < more
    assert tuning_bytes(COUNT, DIM, Goal(k=1)) == more < tuning_bytes(COUNT, DIM, Goal(k=500))


def test_rows_are_held_back_in_their_order():
    """They are added so, a block at a time; each is held back once."""
    rows = hold_back(100_000, Goal())
    assert len(rows) == 2000
    assert (np.diff(rows) > 0).all()


def test_what_came_nearest_to_the_target_is_said():
    """Of kinds, the one of the highest recall, and of its settings, too."""

    def trial(factory, recall, *recalls):
        points = [
            SimpleNamespace(recall=one, parameters={"efSearch": n}) for n, one in enumerate(recalls)
        ]
        return SimpleNamespace(
            candidate=SimpleNamespace(factory=factory),
            figures=SimpleNamespace(recall={10: recall}),
            points=points,
        )

    trials = [trial("HNSW4", 0.5, 0.5), trial("HNSW16", 0.8, 0.6, 0.82, 0.7), trial("HNSW8", 0.7)]
    message = str(_not_reached(Goal(), trials))
    assert "found 0.8000 at best, by HNSW16 with efSearch 1; ask for less" in message


def test_what_does_not_fit_is_not_built(collection, capsys, monkeypatch):
    """The budget is what the process may hold, less what it holds already."""
    monkeypatch.setattr("index.ann.tuning.held_bytes", lambda field="RssAnon": 0)
    monkeypatch.setattr("index.ann.tuning.tuning_bytes", lambda count, dim, goal: 0)
    assert run(collection, "--memory", "1MB", "--dry-run", "--index", *KINDS) == 2
    assert "memory for an index over 4000 x 32: expected at least " in capsys.readouterr().err
    kinds = ["HNSW64", "RR,IVF16,RaBitQfs,RFlat"]
    assert run(collection, "--memory", "3MB", "--dry-run", "--json", "--index", *kinds) == 0
    fits = {one["factory"]: one["fits"] for one in json.loads(capsys.readouterr().out)}
    assert fits == {kinds[0]: False, kinds[1]: True}
    assert run(collection, "--memory", "3MB", "--json", "--recall", ".5", "--index", *kinds) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [trial["factory"] for trial in trials] == kinds[1:]


def test_a_plan_of_exact_search_names_no_sizes(tmp_path, capsys, make_collection):
    """Nothing would be built, which is no size of 0 bytes."""
    few = make_collection(tmp_path / "few", draw(50, seed=1))
    assert run(few, "--dry-run") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split(maxsplit=3) == ["Flat", "-", "-", "exact: there is nothing to build"]


def test_queries_of_another_collection(collection, capsys, tmp_path, make_collection):
    """Nothing is held back then."""
    others = make_collection(tmp_path / "others", draw(200, seed=5))
    assert run(collection, "--query-from", others, "--index", KINDS[1], "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["queries"] == str(others)
    assert report["queries_choosing"] + report["queries_confirming"] == 200


def test_so_many_queries_are_enough(collection, capsys, tmp_path, make_collection):
    """Ten to choose by and ten to confirm; with one less no margin means anything."""
    for count, status in ((19, 2), (20, 0)):
        others = make_collection(tmp_path / str(count), draw(count, seed=5))
        args = ("--query-from", others, "--recall", ".3", "--index", KINDS[1])
        assert run(collection, *args) == status
    assert "queries: expected at least 20, found 19" in capsys.readouterr().err


def test_several_segments_become_one(tmp_path, make_collection, capsys):
    """Which is then tuned."""
    path = make_collection(tmp_path / "made", draw(COUNT, seed=1), n_segments=3)
    assert run(path, "--index", KINDS[1]) == 0
    (entry,) = read_manifest(path).segments
    assert (entry.factory, entry.count) == (KINDS[1], COUNT)
    assert f"taken: {KINDS[1]} with nprobe " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recall", "1.5"], "recall: expected above 0 and up to 1, found 1.5"),
        (["--k", "0"], "k: expected 1 to 1000, found 0"),
        (["--memory", "much"], "memory: expected a size such as 500MB"),
        (["--threads", "0"], "threads: expected at least 1, found 0"),
        (["--queries", "3"], "queries: expected at least 20, found 3"),
        (["--index", "NSG32"], "index: expected Flat, HNSW32"),
        (["--index", "HNSW1"], "other numbers: HNSW of 2 to 256 links, IVF of 1 to 1048576 lists"),
        (["--index", "IVF0,PQ16x4fs,RFlat"], "PQ of 1 sub-vector or more, RaBitQ of 1 to 8 bits"),
        (["--index", "PCAR0,IVF32,PQ16x4fs,RFlat"], "index: expected Flat, HNSW32"),
        (["--index", "IVF32,PQ15x4fs,RFlat"], "a number of sub-vectors that divides 32"),
        (["--index", "CAGRA64"], "expected an NVIDIA GPU and faiss-gpu-cuvs"),
    ],
)
def test_what_makes_no_sense_is_refused(collection, capsys, args, message):
    """With status 2, and the collection as it was."""
    before = (collection / "manifest.json").read_bytes()
    assert run(collection, *args) == 2
    assert message in capsys.readouterr().err
    assert (collection / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("factory", "least"),
    [
        ("IVF30,PQ8x4fs,RFlat", 30),
        ("PCAR32,IVF4,PQ8x4fs,RFlat", 32),
        ("IVF4,PQ8x4fs,RFlat", 16),
    ],
)
def test_what_cannot_be_learnt_from_so_few_is_refused(
    tmp_path, make_collection, capsys, factory, least
):
    """Lists, directions of a PCA, and centres of a code: of each vector comes one at most."""
    others = make_collection(tmp_path / "others", draw(20, seed=5))
    for count, status in ((least - 1, 2), (least, 0)):
        path = make_collection(tmp_path / str(count), draw(count, seed=1))
        args = ("--query-from", others, "--recall", ".1", "--index", factory)
        assert run(path, *args) == status
    error = capsys.readouterr().err
    assert (
        f"index {factory}: expected at least {least} vectors to learn from, found {least - 1}"
        in (error)
    )


def test_the_bounds_of_what_is_asked_for():
    """Those that are named are within."""
    Goal(recall=1, k=1000, n_queries=20)
    for beyond in ({"recall": 0}, {"recall": 1.01}, {"k": 0}, {"k": 1001}, {"n_queries": 19}):
        with pytest.raises(UsageError, match=", found "):
            Goal(**beyond)


def test_few_vectors_are_searched_exactly(tmp_path, make_collection, capsys):
    """No index is worth it, and none is built."""
    path = make_collection(tmp_path / "made", draw(300, seed=1))
    assert run(path) == 0
    assert "taken: Flat; recall @1 1.0000, @10 1.0000" in capsys.readouterr().out
    assert read_manifest(path).segments[0].factory == "Flat"


@pytest.mark.parametrize("count", [1, 7, 199])
def test_of_too_few_images_exact_search_is_taken(tmp_path, make_collection, capsys, count):
    """None can be held back to measure with, and it reaches any recall without; that is said."""
    path = make_collection(tmp_path / "made", draw(count, seed=1))
    assert run(path, "--recall", "1") == 0
    out = capsys.readouterr().out
    assert "taken: Flat; recall @1 1.0000" in out
    assert "exact search was timed with stored rows: too few to hold any back" in out
    report = read_manifest(path).tuning
    assert report["queries_choosing"] == report["queries_confirming"] == 0
    assert set(report["chosen"]["recall_at"]) == {"1", "10", *(["100"] if count > 100 else [])}
    assert run(path, "--index", "HNSW8", "Flat", "--json") == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [trial["factory"] for trial in trials] == ["Flat"]
    assert run(path, "--index", "HNSW8") == 2
    error = capsys.readouterr().err
    assert f"vectors: expected at least 200, so that some can be held back, found {count}" in error
    assert "or search exactly: `index.tune --index Flat`, `index.build --index flat`" in error


def test_more_neighbours_than_there_are(tmp_path, make_collection, capsys):
    """All there are must be found then."""
    path = make_collection(tmp_path / "made", draw(300, seed=1))
    assert run(path, "--k", "500", "--index", "HNSW16", "Flat", "--json") == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["recall_at"]["500"] >= 0.99


def test_all_neighbours_are_what_exact_search_finds():
    """At any size, where no index could be sure of them."""
    kinds = {recall: plan(100_000, 64, Goal(recall=recall)) for recall in (0.99, 1.0)}
    assert kinds[1.0][0].factory == "Flat"
    assert [one.factory for one in kinds[0.99]] == [one.factory for one in kinds[1.0][1:]]


@pytest.mark.parametrize(
    ("place", "found"), [("nowhere/x.png", "no such directory"), (".", "a directory")]
)
def test_a_picture_without_a_place_is_refused_first(collection, tmp_path, capsys, place, found):
    """Before anything is built."""
    before = (collection / "manifest.json").read_bytes()
    assert run(collection, "--plot", tmp_path / place) == 2
    assert f"{place}: expected a file that can be written, found {found}" in (
        capsys.readouterr().err.replace(str(tmp_path), ".")
    )
    assert (collection / "manifest.json").read_bytes() == before


def test_a_disk_without_room_for_what_is_tried_out_is_told(collection, capsys, monkeypatch):
    """With the collection, which is as it was."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (collection / "manifest.json").read_bytes()
    monkeypatch.setattr("index.ann.trials.write_index", full)
    assert run(collection, "--recall", ".3", "--index", "HNSW8") == 1
    error = capsys.readouterr().err
    assert f"collection {collection}: expected one that can be written, with room for the" in error
    assert "found No space left on device; make room; it keeps the index that it has" in error
    assert (collection / "manifest.json").read_bytes() == before


def test_a_picture_that_fails_is_one_line(collection, tmp_path, capsys, monkeypatch):
    """The report is printed, and the index is in its place."""

    def full(path, tuned):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("index.ann.report.draw", full)
    assert run(collection, "--index", KINDS[0], "--plot", tmp_path / "x.png") == 1
    captured = capsys.readouterr()
    assert f"taken: {KINDS[0]} with " in captured.out
    assert "found No space left on device; the index is in its place" in captured.err
    assert read_manifest(collection).segments[0].factory == KINDS[0]
