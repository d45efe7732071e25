import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from index.build import BuildOptions, build
from index.collection import Collection
from index.errors import EvaluationError
from index.evaluate import run
from index.evaluation import evaluate_retrieval as module
from index.evaluation.evaluate_retrieval import RetrievalOptions, evaluate
from index.evaluation.retrieval_scores import MEASURES
from index.evaluation.same_images import same_content_line, same_vector_line
from index.storage.writer import CollectionWriter
from models.bundle import read_bundle
from models.errors import FingerprintMismatchError, UsageError


@pytest.fixture
def noisy(tmp_path, make_collection, unit_rows):
    """90 vectors of three classes, so near together that rankings are far from ideal."""
    vectors = unit_rows(90, 8, seed=3)
    vectors[np.arange(90), np.arange(90) % 3] += 0.6
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return make_collection(tmp_path / "noisy", vectors, n_segments=2)


def direct(bank, bank_labels, queries, labels, own):
    """P@1, R-precision and mAP@R by sorting everything, a query at a time, in float64."""
    found = []
    for n, (query, label) in enumerate(zip(queries, labels, strict=True)):
        order = np.lexsort((np.arange(len(bank)), -(bank @ query)))
        order = [row for row in order if not own or row != n]
        hits = [bank_labels[row] == label for row in order]
        n_relevant = sum(hits)
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        average = sum(p for p, hit in zip(precision[:n_relevant], hits, strict=False) if hit)
        found.append((hits[0], sum(hits[:n_relevant]) / n_relevant, average / n_relevant))
    return np.mean(found, axis=0)


def means(report, *names):
    """Give the means of measures."""
    return [report.measures[name].mean for name in names]


def test_a_collection_against_itself_equals_a_direct_computation(noisy, monkeypatch):
    """The query is no answer to itself; blocks of a few queries change nothing."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 36 * 29 * 7)
    report = evaluate(RetrievalOptions(collection=str(noisy)))
    with Collection.open(noisy) as collection:
        vectors = collection.vectors(collection.ids).astype(np.float64)
        labels = collection.labels()
    expected = direct(vectors, labels, vectors, labels, own=True)
    assert means(report, "P@1", "R-precision", "mAP@R") == pytest.approx(expected, abs=1e-6)
    assert (report.is_against_itself, report.n_queries) == (True, 90)
    assert report.duplicates.without is None
    worst = min(report.per_class, key=lambda one: one.means["mAP@R"])
    assert report.worst_class == worst.label
    assert np.mean([one.means["mAP@R"] for one in report.per_class]) == pytest.approx(
        report.measures["mAP@R"].mean
    )
    for estimate in report.measures.values():
        assert estimate.low <= estimate.mean <= estimate.high


def test_another_collection_asks(noisy, tmp_path, make_collection, unit_rows):
    """Nothing is left out then; R counts every image of the class."""
    other = make_collection(tmp_path / "other", unit_rows(30, 8, seed=9))
    report = evaluate(RetrievalOptions(collection=str(noisy), queries=str(other)))
    with Collection.open(noisy) as collection, Collection.open(other) as asking:
        expected = direct(
            collection.vectors(collection.ids), collection.labels(),
            asking.vectors(asking.ids), asking.labels(), own=False,
        )  # fmt: skip
    assert means(report, "P@1", "R-precision", "mAP@R") == pytest.approx(expected, abs=1e-6)
    assert [one.n_images for one in report.per_class] == [30, 30, 30]


def test_a_collection_that_changed_is_ranked_as_it_is(noisy):
    """Deleted images are in no ranking and no R, added ones are, wherever they are kept."""
    with CollectionWriter.open(noisy) as writer:
        before = writer.collection
        gone, back = before.ids[:20], np.arange(5, 15)
        writer.delete(gone)
        writer.add(
            before.table().take(back), before.vectors(gone[back]), fingerprint=before.fingerprint
        )
    report = evaluate(RetrievalOptions(collection=str(noisy)))
    with Collection.open(noisy) as collection:
        vectors, labels = collection.vectors(collection.ids), collection.labels()
    expected = direct(vectors, labels, vectors, labels, own=True)
    assert len(labels) == report.n_queries == 80
    assert means(report, "P@1", "R-precision", "mAP@R") == pytest.approx(expected, abs=1e-6)


def test_a_sample_is_the_seeds(noisy):
    """The same queries for the same seed, and said."""
    reports = [
        evaluate(RetrievalOptions(collection=str(noisy), n_queries=20, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert reports[0] == reports[1] != reports[2]
    assert (reports[0].n_queries, reports[0].n_all_queries) == (20, 90)


def test_duplicates_across_splits_are_flagged(tmp_path, bundle, built, new_folder, train_folder):
    """By vector and byte for byte; the figures stand there with them and without."""
    folder = new_folder()
    shutil.copy(train_folder / "red/003.png", folder / "red/copy.png")
    with Image.open(train_folder / "blue/004.png") as picture:
        picture.save(folder / "blue/again.png", compress_level=1)  # other bytes, same pixels
    report = evaluate(RetrievalOptions(collection=str(built), queries=str(folder), contents=True))
    found = report.duplicates
    assert (found.same_vector, found.same_content, found.n_flagged) == (2, 1, 2)
    (folder / "red/copy.png").unlink()
    (folder / "blue/again.png").unlink()
    clean = evaluate(RetrievalOptions(collection=str(built), queries=str(folder), contents=True))
    assert found.without == clean.measures
    assert clean.duplicates.n_flagged == 0
    assert clean.duplicates.without is None


def without_digests(path, out):
    """Write a collection's images into another, whose rows say nothing of their content."""
    with Collection.open(path) as collection:
        rows, vectors = collection.table(["key", "label", "source"]), collection.vectors
        manifest = collection.manifest
        with CollectionWriter.create(
            out, name="plain", fingerprint=collection.fingerprint, dim=collection.dim,
            encoder=manifest.encoder, preprocessing=manifest.preprocessing,
        ) as writer:  # fmt: skip
            writer.add(rows, vectors(collection.ids), fingerprint=collection.fingerprint)
    return out


def test_copies_within_a_collection_are_flagged(tmp_path, bundle, new_folder):
    """Both of them, and no image is a copy of itself; by the digests that the build took."""
    folder = new_folder()
    shutil.copy(folder / "red/000.png", folder / "red/copy.png")
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    plain = without_digests(tmp_path / "c", tmp_path / "plain")
    copies = {
        contents: evaluate(RetrievalOptions(collection=str(plain), contents=contents)).duplicates
        for contents in (False, True)
    }
    assert (copies[False].same_content, copies[False].n_flagged) == (None, 2)
    assert (copies[True].same_vector, copies[True].same_content, copies[True].n_flagged) == (2,) * 3
    (folder / "red/copy.png").unlink()
    assert evaluate(RetrievalOptions(collection=str(tmp_path / "c"))).duplicates == copies[True]
    with pytest.raises(EvaluationError, match=r"found no image 'red/copy.png'; put them"):
        evaluate(RetrievalOptions(collection=str(plain), contents=True))
    shutil.rmtree(folder)
    with pytest.raises(EvaluationError, match="put them back, or leave --contents out"):
        evaluate(RetrievalOptions(collection=str(plain), contents=True))


@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_copies_are_told_by_distance_at_any_scale(tmp_path, unit_rows, scale):
    """Two of ten vectors are equal, whatever the lengths of all."""
    vectors = scale * unit_rows(10, 8)
    vectors[9] = vectors[0]
    rows = {"key": list("abcdefghij"), "label": ["x"] * 10, "source": ["folder:/nowhere"] * 10}
    with CollectionWriter.create(
        tmp_path / "c", name="far", fingerprint="f" * 64, dim=8, metric="euclidean"
    ) as writer:
        writer.add(pa.table(rows), vectors, fingerprint="f" * 64)
    report = evaluate(RetrievalOptions(collection=str(tmp_path / "c")))
    assert report.duplicates.same_vector == 2


def test_one_query_is_no_plural():
    """In the lines on queries that are in the collection."""
    assert same_vector_line(1, 8) == "1 query (12.50%) has a neighbour of the same vector"
    assert same_content_line(2, 8) == "2 queries (25.00%) are in the collection byte for byte"


def test_what_cannot_be_scored_is_left_out_and_said(tmp_path, bundle, new_folder):
    """No label, no other image of the class, not to be read."""
    folder = new_folder()
    for n in (1, 2, 3):
        (folder / f"red/00{n}.png").unlink()
    shutil.copy(folder / "blue/000.png", folder / "top.png")
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    itself = evaluate(RetrievalOptions(collection=str(tmp_path / "c")))
    assert list(itself.notes) == [
        "1 query has no label and is left out",
        "1 query has no other image of its class and is left out",
        "1 image of the collection has no label or relevance",
    ]
    assert itself.n_queries == 8
    assert [one.means is None for one in itself.per_class] == [False, False, True]
    (folder / "green/bad.png").write_text("no image")
    asked = evaluate(RetrievalOptions(collection=str(tmp_path / "c"), queries=str(folder)))
    assert asked.notes[0].startswith("1 query could not be read, the first green/bad.png: image")
    assert asked.n_queries == 9


def test_what_means_nothing_is_refused(tmp_path, built, new_folder, make_collection, unit_rows):
    """No class in common, another encoder's queries, a sample of fewer than none."""
    folder = new_folder()
    for name in ("red", "green", "blue"):
        (folder / name).rename(folder / f"dark {name}")
    with pytest.raises(EvaluationError) as error:
        evaluate(RetrievalOptions(collection=str(built), queries=str(folder)))
    assert str(error.value) == (
        f"queries {folder}: expected an image of a class that collection colours has another "
        "image of, found none among 12; evaluate with labelled images of the collection's classes"
    )
    other = make_collection(tmp_path / "other", unit_rows(5, 16))
    with pytest.raises(FingerprintMismatchError):
        evaluate(RetrievalOptions(collection=str(built), queries=str(other)))
    with pytest.raises(UsageError, match="--n-queries: expected at least 0, found -1"):
        RetrievalOptions(collection=str(built), n_queries=-1)
    with pytest.raises(UsageError, match="--seed: expected at least 0, found -1"):
        RetrievalOptions(collection=str(built), seed=-1)


def test_the_report_in_every_form(built, train_folder, bundle, tmp_path, capsys):
    """Text says what was measured; JSON has everything; the picture is a PNG."""
    own, out = tmp_path / "own", tmp_path / "report"
    shutil.copytree(bundle.path, own)
    args = ["retrieval", "--collection", str(built), "--queries", str(train_folder)]
    assert run([*args, "--out", str(out), "--record", "--encoder", str(own)]) == 0
    text = capsys.readouterr().out
    for words in (
        "P@1 (exact)",
        "relevant is what has the query's label\n",
        "[..] holds 95% of 1,000 bootstrap means over the queries, seed 0",
        "worst class: ",
        "60 queries (100.00%) have a neighbour of the same vector",
        "60 queries (100.00%) are in the collection byte for byte",
    ):
        assert words in text
    assert "without duplicates" not in text  # there is no such query, and no such column
    assert (out / "report.txt").read_text().strip() in text
    report = json.loads((out / "report.json").read_text())
    assert set(report["measures"]) == set(MEASURES)
    with Image.open(out / "retrieval.png") as picture:
        assert picture.format == "PNG"
    recorded = read_bundle(own).provenance["evaluations"]["retrieval"]
    assert recorded["measures"] == report["measures"]
    assert recorded["command"].startswith("python ")
    plain = without_digests(built, tmp_path / "plain")
    assert run(["retrieval", "--collection", str(plain)]) == 0
    assert "images were not compared byte for byte (--contents does)" in capsys.readouterr().out
    assert run(["retrieval", "--collection", str(built), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_against_itself"] is True
