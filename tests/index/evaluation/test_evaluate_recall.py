import dataclasses
import json
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from benchmarks.indexed import give_index
from index.collection import Collection
from index.errors import EvaluationError
from index.evaluate import run
from index.evaluation import evaluate_retrieval
from index.evaluation.evaluate_recall import RecallOptions, _bytes_by_file, evaluate
from index.evaluation.evaluate_retrieval import RetrievalOptions
from index.evaluation.queries import open_queries
from index.storage.manifest import read_manifest, write_manifest
from index.storage.writer import CollectionWriter
from models.errors import UsageError


@pytest.fixture
def hasty(tmp_path, make_collection, unit_rows):
    """600 images behind an index that weighs a single candidate, so that it misses many."""
    path = make_collection(tmp_path / "hasty", unit_rows(600, 24), factory="HNSW32")
    manifest = read_manifest(path)
    segment = dataclasses.replace(manifest.segments[0], parameters={"efSearch": 1})
    write_manifest(path, dataclasses.replace(manifest, segments=(segment,)))
    return path


def conditions(report):
    """Give the conditions by name."""
    return {one.name: one for one in report.conditions}


def test_recall_equals_a_direct_count(hasty, tmp_path, make_collection, unit_rows):
    """Every k is searched for itself; the exact nearest by sorting all cosines in float64."""
    other = make_collection(tmp_path / "queries", unit_rows(50, 24, seed=9))
    report = evaluate(
        RecallOptions(
            collection=str(hasty), queries=str(other), churn=0, selectivity=(), k=(1, 5, 20)
        )
    )
    with Collection.open(hasty) as collection, Collection.open(other) as asking:
        queries = asking.vectors(asking.ids)
        cosines = queries.astype(np.float64) @ collection.vectors(collection.ids).T
        nearest = collection.ids[np.argsort(-cosines, axis=1)]
        for k in (1, 5, 20):
            found = collection.search(queries, k, fingerprint=collection.fingerprint)
            recall = [np.isin(nearest[n, :k], found.ids[n]).mean() for n in range(50)]
            row = conditions(report)["all images"].by_k[k]
            assert row.mean == pytest.approx(np.mean(recall))
            assert row.worst_5_percent == pytest.approx(np.mean(sorted(recall)[:2]))
            assert row.low <= row.mean <= row.high
            assert row.complete == pytest.approx(np.mean(np.array(recall) == 1))
    assert report.conditions[0].by_k[1].mean < 1
    assert (report.n_queries, report.n_all_queries, report.factory) == (50, 50, "HNSW32")


def test_filters_leave_the_shares_that_were_asked_for(hasty):
    """By bounds of ids; a query that is an image of the collection is no answer to itself."""
    report = evaluate(
        RecallOptions(collection=str(hasty), n_queries=40, churn=0, selectivity=(0.5, 0.1, 0.0001))
    )
    found = conditions(report)
    assert [one.n_images for one in report.conditions] == [600, 300, 60]
    assert found["10% by a filter"].by_k[10].mean == 1.0  # so few are compared one by one
    assert list(report.notes) == ["a filter of 0.0001 of 600 images leaves none"]
    assert report.is_against_itself
    with Collection.open(hasty) as collection:
        filter = found["50% by a filter"].filter
        chosen = collection.select(filter)
        assert chosen.count == 300
        assert filter == f"id <= {np.sort(collection.ids)[299]}"


def test_churn_is_measured_on_a_copy(hasty, tmp_path):
    """Deleted and added back, each against an exact search of what is there then."""
    before = sorted((file, file.stat().st_mtime_ns) for file in hasty.rglob("*"))
    report = evaluate(
        RecallOptions(collection=str(hasty), n_queries=60, selectivity=(), scratch=tmp_path)
    )
    assert [(one.name, one.n_images) for one in report.conditions] == [
        ("all images", 600),
        ("20% deleted", 480),
        ("and added back", 600),
    ]
    for one in report.conditions[1:]:
        assert 0.1 < one.by_k[10].mean <= 1
    assert sorted((file, file.stat().st_mtime_ns) for file in hasty.rglob("*")) == before
    assert list(tmp_path.glob("churn-*")) == []


def test_an_exact_collection_finds_everything(built, test_folder):
    """Flat, with queries from a source of images: everything is 1, and it is said why."""
    report = evaluate(RecallOptions(collection=str(built), queries=str(test_folder)))
    for one in report.conditions:
        for recall in one.by_k.values():
            assert (recall.mean, recall.worst_5_percent, recall.complete) == (1.0, 1.0, 1.0)
    assert "the collection is Flat: every search is exact" in report.notes
    assert conditions(report)["1% by a filter"].n_images == 1
    size = sum(entry.size_bytes for entry in read_manifest(built).files.values())
    assert report.bytes_a_vector == pytest.approx(size / 60)
    assert report.bytes_by_file["vectors.npy"] == pytest.approx(4 * 16 + 128 / 60)


def test_queries_that_cannot_be_read_are_said(built, new_folder):
    """Figures are of the others; where there is none, the line says why, in retrieval as well."""
    folder = new_folder()
    (folder / "blue/000.png").write_text("no image")
    options = {"collection": str(built), "queries": str(folder)}
    report = evaluate(RecallOptions(**options, churn=0, selectivity=()))
    assert report.n_queries == 11
    assert report.notes[0].startswith("1 query could not be read, the first blue/000.png: image")
    for file in folder.rglob("*.png"):
        file.write_text("no image")
    for kind, asked in ((evaluate, RecallOptions), (evaluate_retrieval.evaluate, RetrievalOptions)):
        with pytest.raises(EvaluationError) as error:
            kind(asked(**options))
        assert str(error.value).startswith(
            f"--queries {folder}: expected images that can be read, found none, and 12 that "
            "cannot, the first blue/000.png: image"
        )


def test_only_the_content_is_weighed(built, copy_collection):
    """Not what a sync remembers, nor a lock, nor what a killed writer left; the journal is."""
    path = copy_collection(built)
    before = _bytes_by_file(Collection.open(path))
    for name in (".lock", "sync/state.stamps", "segments/000077/vectors.npy"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(bytes(10_000))
    assert _bytes_by_file(Collection.open(path)) == before
    with CollectionWriter.open(path) as writer:
        writer.delete(writer.collection.ids[:1])
        after = _bytes_by_file(writer.collection)
    assert after.pop("journal") == (64 + 64 + 8) / 59
    assert after == pytest.approx({name: size * 60 / 59 for name, size in before.items()})


def test_the_report_in_every_form(hasty, tmp_path, capsys):
    """Text says what was measured; JSON has everything; the picture is a PNG."""
    out = tmp_path / "report"
    args = ["recall", "--collection", str(hasty), "--n-queries", "30", "--threads", "1"]
    assert run([*args, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for words in (
        "] of the 10 nearest, ",
        "for the worst 5% of queries (HNSW32)",
        "found is what is as near as the exact k-th neighbour; every k is a search of its own;",
        "queries of made itself, 30 of 600, seed 0, each left out of its own answers",
        f"  50% by a filter{300:>10}",
        f"  and added back {600:>10}",
        ", 1 thread\n",
        "  exact, all images",
        "bytes a vector on the disk: index.faiss",
    ):
        assert words in text
    assert (out / "report.txt").read_text().strip() in text
    report = json.loads((out / "report.json").read_text())
    assert len(report["exact"]["latencies_ms"]) == 30
    with Image.open(out / "recall.png") as picture:
        assert picture.format == "PNG"
    assert run([*args, "--churn", "0", "--selectivity", "--k", "3", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["conditions"][0]["by_k"]) == ["3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": ()}, "--k: expected numbers of at least 1"),
        ({"n_queries": -1}, "--n-queries: expected at least 0, found -1"),
        ({"selectivity": (0.5, 1.0)}, "--selectivity: expected shares above 0, below 1"),
        ({"churn": 1.0}, "--churn: expected 0 to below 1, found 1.0"),
        ({"seed": -1}, "--seed: expected at least 0, found -1"),
        ({"threads": 0}, "--threads: expected at least 1, found 0"),
        ({"scratch": "nowhere"}, "--scratch: expected a directory, found nowhere"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, options, message):
    """Before anything is opened."""
    if "scratch" in options:
        options = {"scratch": tmp_path / "nowhere"}
        message = f"--scratch: expected a directory, found {tmp_path / 'nowhere'}"
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        RecallOptions(collection=str(tmp_path), **options)


def test_a_single_image_has_no_neighbours(tmp_path, make_collection, unit_rows):
    """Nothing can be found."""
    with pytest.raises(EvaluationError, match="collection made: expected at least 2 images"):
        evaluate(RecallOptions(collection=str(make_collection(tmp_path / "c", unit_rows(1, 8)))))


def test_distances_are_the_right_way_round(tmp_path):
    """Euclidean vectors of any length through HNSW: near is found, by brute force in float64."""
    rng = np.random.default_rng(5)
    vectors = (rng.standard_normal((300, 12)) * rng.uniform(0.5, 3, (300, 1))).astype(np.float32)
    rows = pa.table({"key": [f"{n}" for n in range(300)], "source": ["folder:/nowhere"] * 300})
    with CollectionWriter.create(
        tmp_path / "c", name="far", fingerprint="f" * 64, dim=12, metric="euclidean"
    ) as writer:
        writer.add(rows, vectors, fingerprint="f" * 64)
        give_index(writer, "HNSW32")
    report = evaluate(RecallOptions(collection=str(tmp_path / "c"), churn=0.2, k=(1, 10)))
    assert (report.metric, report.factory, report.n_queries) == ("euclidean", "HNSW32", 300)
    distances = np.square(vectors[:, None].astype(np.float64) - vectors[None]).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    with Collection.open(tmp_path / "c") as collection:
        keys = np.array(collection.keys()).astype(int)
        own = np.argsort(keys)
        found = collection.search_ids(collection.ids[own], 10)
        places = keys[collection.row_numbers(found.ids)]
    nearest = np.argsort(distances, axis=1)[:, :10]
    direct = [np.isin(nearest[n], places[n]).mean() for n in range(300)]
    assert report.conditions[0].by_k[10].mean == pytest.approx(np.mean(direct))
    assert np.mean(direct) > 0.9


@pytest.mark.parametrize("fixture", ["built", "built_euclidean"])
def test_images_ask_as_the_collections_own_vectors_are(fixture, request, train_folder):
    """Of unit length for cosines, and as the encoder gives them for distances."""
    with (
        Collection.open(request.getfixturevalue(fixture)) as collection,
        ExitStack() as stack,
    ):
        queries = open_queries(stack, collection, str(train_folder))
        asked = queries.vectors(np.arange(len(queries)))
        stored = collection.vectors([collection.find_key(key) for key in queries.keys])
        np.testing.assert_allclose(asked, stored, rtol=1e-4, atol=1e-5)
