import dataclasses
import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.build import BuildOptions, build, sync
from index.collection import Collection
from index.embed import embed
from index.errors import EvaluationError
from index.evaluate import run
from index.evaluation import evaluate_knn
from index.evaluation.baselines import Seen
from index.evaluation.evaluate_knn import KnnOptions, evaluate
from index.evaluation.knn_task import make_task
from index.storage.manifest import read_manifest, write_manifest
from index.storage.writer import CollectionWriter
from models.bundle import read_bundle
from models.errors import UsageError
from models.images import open_source
from models.runtime import open_bundle

ROOT = Path(__file__).parents[3]
MINI = ROOT / "tests/data/fashion-mnist-mini"
KS = (1, 5, 10, 20, 100, 200)


def idx(split):
    """Name a split of the small Fashion-MNIST."""
    return f"idx:{MINI / f'{split}-images-idx3-ubyte.gz'}"


@pytest.fixture(scope="module")
def mini(tmp_path_factory, bundle):
    """A collection of the 400 training images."""
    out = tmp_path_factory.mktemp("mini") / "mini"
    build(BuildOptions(images=idx("train"), encoder=str(bundle.path), out=out))
    return out


def direct_knn(queries, bank, bank_labels, truth, classes, k, temperature):
    """Top-1 and top-5 of the weighted vote, in plain numpy and float64, a query at a time."""
    top1 = top5 = 0
    for query, true_label in zip(queries, truth, strict=True):
        similarities = bank @ query
        nearest = np.lexsort((np.arange(len(bank)), -similarities))[:k]
        votes = {label: 0.0 for label in classes}
        for row in nearest:
            if bank_labels[row] is not None:
                votes[bank_labels[row]] += np.exp(np.float64(similarities[row]) / temperature)
        voted = [label for label in classes if votes[label] > 0]
        ranked = sorted(voted, key=lambda label: (-votes[label], classes.index(label)))
        top1 += true_label in ranked[:1]
        top5 += true_label in ranked[:5]
    return top1 / len(truth), top5 / len(truth)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_exact_evaluation_equals_a_direct_computation(mini, bundle, temperature):
    """Every k, top-1 and top-5; 200 queries against 400 images of ten classes."""
    report = evaluate(
        KnnOptions(collection=mini, images=idx("t10k"), temperature=temperature, baselines=False)
    )
    with Collection.open(mini) as collection:
        bank, labels = collection.vectors(collection.ids), collection.labels()
    with_labels = list(open_source(idx("t10k")).records())
    encoder = open_bundle(bundle.path)
    vectors = encoder.encode(np.stack([encoder.preprocess(r.read()) for r in with_labels]))
    queries = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    truth, classes = [record.label for record in with_labels], sorted(set(labels))
    for k in KS:
        expected = direct_knn(queries, bank, labels, truth, classes, k, temperature)
        found = report.encoder_by_k[k]
        assert (found.top1, found.top5) == pytest.approx(expected, abs=1e-12), k
    assert report.n_queries == 200
    assert report.per_class[0].n == 20
    assert np.trace(report.confusion) / 200 == report.encoder_by_k[20].top1


def test_ties_and_a_k_beyond_the_collection(tmp_path, bundle):
    """Nine pictures of three kinds, each three times: ties everywhere, and still the same."""

    def write(folder, copies):
        for n, (name, level) in enumerate((("b", 30), ("a", 120), ("c", 220)) * copies):
            (folder / name).mkdir(parents=True, exist_ok=True)
            grey = np.full((12, 12), level, np.uint8)
            grey[: 1 + n % 3] = 0
            Image.fromarray(grey).save(folder / name / f"{n}.png")
        return str(folder)

    out = tmp_path / "c"
    build(BuildOptions(images=write(tmp_path / "train", 3), encoder=str(bundle.path), out=out))
    images = write(tmp_path / "test", 2)
    report = evaluate(KnnOptions(collection=out, images=images))
    with Collection.open(out) as collection:
        bank, labels = collection.vectors(collection.ids), collection.labels()
        truth = [record.label for record in open_source(images).records()]
        keys = {key: n for n, key in enumerate(collection.keys())}
        queries = bank[[keys[record.key] for record in open_source(images).records()]]
    for k in KS:
        expected = direct_knn(queries, bank, labels, truth, ["a", "b", "c"], k, 0.07)
        assert (report.encoder_by_k[k].top1, report.encoder_by_k[k].top5) == expected, k
    assert "k above 9 takes all 9 images" in report.notes
    assert "top-5 is left out: there are 3 classes" in report.notes
    assert report.duplicates == 6  # the very files are in the collection
    assert report.same_vector == 6
    huge = evaluate(KnnOptions(collection=out, images=images, k=(2_000_000_000,)))
    assert huge.encoder_by_k[2_000_000_000] == report.encoder_by_k[200]
    assert huge.baselines[0].by_k[2_000_000_000] == report.baselines[0].by_k[200]


def test_distances_are_no_votes(built_euclidean, test_folder):
    """The vote is over cosines; of a collection of distances it would mean nothing."""
    with pytest.raises(UsageError, match="kNN evaluation: expected a collection of cosines, found"):
        evaluate(KnnOptions(collection=built_euclidean, images=str(test_folder)))


def test_baselines_stand_beside_the_encoder(mini):
    """Whitened pixels, raw pixels and the untrained twin, from the same run."""
    report = evaluate(KnnOptions(collection=mini, images=idx("t10k")))
    assert [row.name for row in report.baselines] == [
        "whitened pixels",
        "raw pixels",
        "random encoder",
    ]
    assert [row.dim for row in report.baselines] == [256, 432, 16]
    for row in report.baselines:
        assert row.by_k is not None
        assert row.by_k[20].top1 > 0.5
    assert report.baselines[-1].note == "the same network and readout, untrained"
    assert report.index is None
    assert report.duplicates == 0


def test_an_encoder_without_a_twin_says_so(tmp_path, other_bundle, train_folder, test_folder):
    """The row stays, with the reason."""
    out = tmp_path / "c"
    build(BuildOptions(images=str(train_folder), encoder=str(other_bundle.path), out=out))
    report = evaluate(KnnOptions(collection=out, images=str(test_folder)))
    assert report.baselines[-1].by_k is None
    assert report.baselines[-1].note.startswith("none: the bundle has no random.onnx")


def test_the_index_is_a_difference(built_hnsw, test_folder):
    """Model scores are exact; what HNSW changes stands beside them with its recall."""
    report = evaluate(KnnOptions(collection=built_hnsw, images=str(test_folder), baselines=False))
    assert report.index is not None
    assert report.index.factory == "HNSW32"
    assert report.index.recall_at_10 == 1.0
    assert report.index.worst_5_percent == 1.0
    assert {k: delta.top1 for k, delta in report.index.by_k.items()} == dict.fromkeys(KS, 0.0)


def test_the_index_is_searched_as_people_search_it(tmp_path, bundle):
    """Each k for itself: a search for 200 looks at more candidates than one for a single."""
    out = tmp_path / "c"
    build(BuildOptions(images=idx("train"), encoder=str(bundle.path), out=out, index="hnsw"))
    manifest = read_manifest(out)
    hasty = dataclasses.replace(manifest.segments[0], parameters={"efSearch": 1})
    write_manifest(out, dataclasses.replace(manifest, segments=(hasty,)))
    report = evaluate(KnnOptions(collection=out, images=idx("t10k"), baselines=False))
    records = list(open_source(idx("t10k")).records())
    with Collection.open(out) as collection, closing(open_bundle(bundle.path)) as encoder:
        queries = embed(encoder, np.stack([encoder.preprocess(r.read()) for r in records]))
        found = collection.search(queries, 1, fingerprint=collection.fingerprint)
        nearest = [row.label for row in collection.rows(found.ids[:, 0])]
    through = np.mean([label == r.label for label, r in zip(nearest, records, strict=True)])
    assert report.index is not None
    assert report.index.by_k[1].top1 == through - report.encoder_by_k[1].top1
    assert report.index.by_k[1].top1 < 0


def test_queries_that_vote_for_themselves_are_said_first(built_hnsw, train_folder, capsys):
    """An accuracy on images that the collection has is none on unseen ones."""
    args = ["knn", "--collection", str(built_hnsw), "--images", str(train_folder)]
    assert run([*args, "--no-baselines"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("kNN: ")
    assert second.startswith("  not of unseen images: 100.00% of the queries are in the collection")


def test_the_report_in_every_form(built_hnsw, test_folder, tmp_path, capsys):
    """Text says how it was measured; JSON has everything; the picture is a PNG."""
    out = tmp_path / "report"
    args = ["knn", "--collection", str(built_hnsw), "--images", str(test_folder)]
    assert run([*args, "--out", str(out), "--k", "1", "3"]) == 0
    text = capsys.readouterr().out
    for words in (
        "kNN: 100.00% top-1 (k = 20, exact)",
        "60 images; queries",
        "vote exp(s / T), T = 0.07, s = cosine, not centred; k = 20 (*) was fixed beforehand",
        "k=1     k=3   k=20*",
        "through HNSW32",
        "HNSW32 finds 100.00% of the exact 10 nearest",
        "raw pixels: 12 x 12 x 3",
        "0 queries (0.00%) are in the collection byte for byte",
        "most confused with",
        "rows are true classes, columns predicted ones, by the numbers of the rows",
        "0 queries (0.00%) have a neighbour of the same vector",
        "top-5 is left out: there are 3 classes",
    ):
        assert words in text
    assert "top-5 %" not in text
    assert "not of unseen images" not in text
    assert (out / "report.txt").read_text().strip() in text
    report = json.loads((out / "report.json").read_text())
    assert report["confusion"] == [[5, 0, 0], [0, 5, 0], [0, 0, 5]]
    assert (report["metric"], report["centring"]) == ("cosine", "none")
    assert set(report["versions"]) == {"faiss", "horace", "numpy"}
    with Image.open(out / "confusion.png") as picture:
        assert picture.format == "PNG"
    assert run([*args, "--json", "--no-baselines"]) == 0
    assert json.loads(capsys.readouterr().out)["headline_k"] == 20


def test_the_confusion_of_many_classes_is_left_out(built, test_folder, tmp_path, monkeypatch):
    """Of ten thousand it would be gigabytes of JSON; what each is confused with is there."""
    monkeypatch.setattr(evaluate_knn, "MAX_CONFUSION_CLASSES", 2)
    out = tmp_path / "report"
    args = ("--images", str(test_folder), "--no-baselines", "--out", str(out))
    assert run(["knn", "--collection", str(built), *args]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["confusion"] == []
    assert report["notes"][-1] == "the confusion matrix is left out: there are 3 classes"
    assert [one["n"] for one in report["per_class"]] == [5, 5, 5]
    assert sorted(file.name for file in out.iterdir()) == ["report.json", "report.txt"]


def test_labels_that_differ_are_noted(tmp_path, bundle, built, new_folder, capsys):
    """Unseen classes are wrong, absent ones are named, unlabelled and bad images left out."""
    folder = new_folder()
    (folder / "red").rename(folder / "purple")
    shutil.copy(folder / "blue/000.png", folder / "top.png")
    (folder / "blue/bad.png").write_text("no image")
    report = evaluate(KnnOptions(collection=built, images=str(folder), baselines=False))
    assert report.n_queries == 12
    assert report.encoder_by_k[1].top1 == pytest.approx(8 / 12)
    assert report.duplicates == 0
    notes = "\n".join(report.notes)
    assert re.search(r"1 query could not be read, the first blue/bad.png: image: exp", notes)
    assert "1 query has no label and is left out" in notes
    assert "4 queries are of classes that the collection lacks (purple) and count as wrong" in notes
    assert "no query is of 1 class: red" in notes


def test_of_many_classes_each_is_looked_at_once(tmp_path, make_collection, unit_rows):
    """Or a hundred thousand would take hours."""

    class Label(str):
        looks = 0

        def __hash__(self):
            Label.looks += 1
            return super().__hash__()

    class Labelled(Collection):
        def labels(self):
            return [Label(f"{n:03}") for n in range(self.count)]

    path = make_collection(tmp_path, unit_rows(300, 16))
    with Labelled.open(path) as collection:
        queries = Seen(
            keys=[""] * 300, labels=collection.labels(), rejects=[], digests=[""] * 300,
            vectors_ND=[], pixels_NP=None,
        )  # fmt: skip
        make_task(collection, queries, images="images", ks=(20,), temperature=0.07)
    assert Label.looks < 10 * 300


def test_a_label_forges_no_line(tmp_path, bundle, new_folder, capsys):
    """Of the tables of classes, and no name one of the hubs; folders' names are labels."""
    folder, out = new_folder(), tmp_path / "c"
    (folder / "red").rename(folder / "red\n  blue  \x1b[2J")
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out))
    (folder / "blue\x1b[2J.png").write_text("no image")
    images = ("--images", str(folder), "--no-baselines")
    asked = ("retrieval", "--queries", str(folder))
    for command, times in ((("knn", *images), 2), (asked, 1), (("space", "--k", "3"), 0)):
        assert run([command[0], "--collection", str(out), *command[1:]]) == 0
        text = capsys.readouterr().out
        assert text.count("red\\n  blue  \\x1b[2J  ") == times
        assert "\x1b" not in text


def test_queries_that_nobody_votes_for_are_wrong(tmp_path, bundle, new_folder, test_folder):
    """In the table of classes as in the headline: the neighbours of the blue ones have no label."""
    folder = new_folder(per_class=25)
    for file in (folder / "blue").iterdir():
        file.rename(folder / file.name)
    shutil.copy(folder / "red/000.png", folder / "blue/red.png")
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    report = evaluate(
        KnnOptions(collection=tmp_path / "c", images=str(test_folder), baselines=False)
    )
    assert "5 queries have no labelled neighbour among 20 and count as wrong" in report.notes
    blue = report.per_class[0]
    assert (blue.label, blue.n, blue.accuracy, blue.confused_with) == ("blue", 5, 0.0, None)
    right = sum(one.n * one.accuracy for one in report.per_class)
    assert report.encoder_by_k[20].top1 == pytest.approx(right / report.n_queries)


def test_evaluations_that_mean_nothing_are_refused(tmp_path, bundle, built, new_folder):
    """No labels, or none in common, is an error and not a table of zeros."""
    folder = new_folder()
    flat = tmp_path / "flat"
    flat.mkdir()
    for n, file in enumerate(folder.rglob("*.png")):
        shutil.copy(file, flat / f"{n}.png")
    with pytest.raises(EvaluationError, match=r"--images .*: expected labels, found none"):
        evaluate(KnnOptions(collection=built, images=str(flat)))
    for n in range(12):
        (flat / f"{n}.png").write_text("no image")
    with pytest.raises(EvaluationError, match=r"none, and 12 that cannot, the first 0\.png: image"):
        evaluate(KnnOptions(collection=built, images=str(flat)))
    for name in ("red", "green", "blue"):
        (folder / name).rename(folder / f"dark {name}")
    with pytest.raises(EvaluationError) as error:
        evaluate(KnnOptions(collection=built, images=str(folder)))
    assert str(error.value) == (
        f"labels of --images {folder}: expected some of the collection's: blue, green, red, found "
        "dark blue, dark green, dark red; evaluate with images of the same classes"
    )
    for n, file in enumerate(folder.rglob("*.png")):
        shutil.copy(file, flat / f"{n}.png")
    build(BuildOptions(images=str(flat), encoder=str(bundle.path), out=tmp_path / "c"))
    with pytest.raises(EvaluationError, match="collection c: expected labels, found none"):
        evaluate(KnnOptions(collection=tmp_path / "c", images=str(folder)))


def test_baselines_need_the_images_that_were_indexed(tmp_path, bundle, new_folder, test_folder):
    """A source that has changed gives other pixels: said, with the way out."""
    folder = new_folder()
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    (folder / "red/000.png").unlink()
    options = {"collection": tmp_path / "c", "images": str(test_folder)}
    with pytest.raises(EvaluationError) as error:
        evaluate(KnnOptions(**options))
    assert str(error.value) == (
        "sources of collection c: expected the 12 images that were indexed, for the baselines, "
        "found no image 'red/000.png'; bring the collection up to date with `index.build --sync`, "
        "or leave the baselines out with --no-baselines"
    )
    (folder / "red/001.png").unlink()
    with pytest.raises(EvaluationError, match=r"found no image 'red/000.png', and 1 more missing;"):
        evaluate(KnnOptions(**options))
    assert evaluate(KnnOptions(**options, baselines=False)).n_queries == 15
    source = {"images": str(folder), "encoder": str(bundle.path)}
    sync(BuildOptions(**source, out=tmp_path / "c", sync=True))
    assert evaluate(KnnOptions(**options)).n_queries == 15


def test_images_that_were_moved_are_asked_for(tmp_path, bundle, new_folder, test_folder):
    """Only the baselines need them, which the error says; the encoder's row goes without."""
    folder = new_folder()
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    folder.rename(tmp_path / "moved")
    options = {"collection": tmp_path / "c", "images": str(test_folder)}
    with pytest.raises(EvaluationError) as error:
        evaluate(KnnOptions(**options))
    assert str(error.value) == (
        "sources of collection c: expected the images that were indexed, which the baselines need, "
        f"found nothing for image folder {folder}; put them back, or leave the baselines out with "
        "--no-baselines"
    )
    assert evaluate(KnnOptions(**options, baselines=False)).n_queries == 15


def test_leakage_is_seen_without_baselines(built, train_folder, capsys):
    """Queries that are in the collection make any encoder look good: the report says so."""
    args = ["knn", "--collection", str(built), "--images", str(train_folder), "--no-baselines"]
    assert run(args) == 0
    text = capsys.readouterr().out
    assert "60 queries (100.00%) have a neighbour of the same vector" in text
    assert "60 queries (100.00%) are in the collection byte for byte" in text


def test_a_key_that_a_source_gives_twice_counts_once(tmp_path, bundle, new_folder):
    """The collection has the first of them, and so have the baselines."""
    folder = new_folder()
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name in ("red/000", "blue/000", "green/000", "red/000"):
            archive.add(folder / f"{name}.png", f"{name}.png")
            label = tarfile.TarInfo(f"{name}.cls")
            label.size = len(name) - 4
            archive.addfile(label, io.BytesIO(name[:-4].encode()))
    images = str(tmp_path / "twice.tar")
    build(BuildOptions(images=images, encoder=str(bundle.path), out=tmp_path / "c"))
    report = evaluate(KnnOptions(collection=tmp_path / "c", images=images))
    assert (report.n_collection, report.n_queries, report.duplicates) == (3, 3, 3)


def test_a_result_that_cannot_be_recorded_is_one_line(tmp_path, mini, bundle, capsys):
    """And the report, which took its time, is shown all the same."""
    own = tmp_path / "own"
    shutil.copytree(bundle.path, own)
    argv = ["knn", "--collection", str(mini), "--images", idx("t10k"), "--encoder", str(own)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # stops root, too
    try:
        status = run([*argv, "--no-baselines", "--record"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out.startswith("kNN: ")
    assert captured.err.splitlines()[-1] == (
        f"python -m index.evaluate knn: --record: expected a bundle at {own} that can be written, "
        "found File too large; make room, or choose another place"
    )


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "kind of evaluation: expected knn"),
        (["k-means"], 2, "found 'k-means'; see python -m index.evaluate --help"),
        (["knn", "--collection", "/no", "--images", "TEST"], 1, "/no: expected a collection dir"),
        (["knn", "--collection", "BUILT", "--images", "/no"], 1, "images '/no': expected"),
        (["knn", "--collection", "BUILT", "--images", "TEST", "--k", "0"], 2, "--k: expected num"),
        (
            ["knn", "--collection", "BUILT", "--images", "TEST", "--temperature", "inf"],
            2,
            "--temperature: expected above 0, and finite, found inf",
        ),
        (
            ["knn", "--collection", "BUILT", "--images", "TEST", "--temperature", "0"],
            2,
            "--temperature: expected above 0, and finite, found 0.0",
        ),
        (
            ["knn", "--collection", "BUILT", "--images", "TEST", "--encoder", "OTHER"],
            1,
            "collection colours: expected encoder ",
        ),
        (
            ["knn", "--collection", "BUILT", "--images", "TEST", "--out", "/dev/null/x"],
            1,
            "--out /dev/null/x: expected a directory that can be written",
        ),
    ],
)
def test_errors_are_one_line(capsys, built, other_bundle, test_folder, args, status, message):
    """Bad use is status 2, failed work status 1."""
    names = {"BUILT": str(built), "TEST": str(test_folder), "OTHER": str(other_bundle.path)}
    assert run([names.get(arg, arg) for arg in args]) == status
    err = capsys.readouterr().err
    assert message in err
    assert sum("python -m index.evaluate" in line for line in err.splitlines()) == 1


def test_help_lists_the_kinds():
    """The command as people type it."""
    done = subprocess.run(
        [sys.executable, "-m", "index.evaluate", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "knn        accuracy of a weighted vote" in done.stdout


def test_a_result_is_recorded_with_its_encoder(tmp_path, mini, bundle):
    """With --record the bundle says how good it is, and is the same encoder as before."""
    own = tmp_path / "own"
    shutil.copytree(bundle.path, own)
    argv = ["knn", "--collection", str(mini), "--images", idx("t10k"), "--encoder", str(own)]
    assert run([*argv, "--no-baselines", "--record"]) == 0
    again = read_bundle(own)
    assert again.fingerprint == bundle.fingerprint
    recorded = again.provenance["evaluations"]["knn"]
    assert recorded["n_queries"] == 200
    assert recorded["encoder_by_k"]["20"]["top1"] > 0
    assert recorded["command"].startswith("python ")


def test_a_collection_that_changed_is_evaluated_as_it_is(tmp_path, bundle, new_folder, test_folder):
    """Deleted images do not vote, added ones do; the baselines follow, through an index too."""
    folder, out = new_folder(per_class=8), tmp_path / "c"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out, index="hnsw"))
    with CollectionWriter.open(out) as writer:
        before = writer.collection
        gone = before.ids[[0, 9, 17]]
        rows, vectors = before.table().take([9]), before.vectors(gone[1:2])
        writer.delete(gone)
        writer.add(rows, vectors, fingerprint=before.fingerprint)
    report = evaluate(KnnOptions(collection=out, images=str(test_folder)))
    assert report.n_collection == 22
    for row in before.rows(gone[[0, 2]]):
        (folder / row.key).unlink()
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "fresh"))
    fresh = evaluate(KnnOptions(collection=tmp_path / "fresh", images=str(test_folder)))
    assert report.encoder_by_k == fresh.encoder_by_k
    assert [row.by_k for row in report.baselines] == [row.by_k for row in fresh.baselines]
    assert report.confusion == fresh.confusion
    assert report.index.recall_at_10 == 1.0
