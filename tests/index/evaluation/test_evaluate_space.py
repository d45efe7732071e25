import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy.stats import ortho_group

from index.build import BuildOptions, build
from index.collection import Collection
from index.errors import EvaluationError
from index.evaluate import run
from index.evaluation import evaluate_space as module
from index.evaluation.evaluate_space import SpaceOptions, evaluate
from index.storage.writer import CollectionWriter
from models.bundle import read_bundle
from models.errors import UsageError


@pytest.fixture
def vectors(unit_rows):
    """120 unit vectors of 10 dimensions."""
    return unit_rows(120, 10, seed=4)


def test_a_space_is_measured_over_all_its_images(tmp_path, make_collection, vectors, monkeypatch):
    """In blocks, over several segments; against numpy on the whole matrix."""
    monkeypatch.setattr(module, "BLOCK_ROWS", 17)
    report = evaluate(
        SpaceOptions(collection=str(make_collection(tmp_path / "c", vectors, n_segments=3)))
    )
    sigma = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    shares = sigma / sigma.sum()
    assert report.rankme == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert (report.rankme_limit, report.dead, report.n_sample) == (10, [], 120)
    distances = 2 - 2 * vectors.astype(np.float64) @ vectors.T
    pairs = distances[np.triu_indices(120, 1)]
    assert report.mean_distance == pytest.approx(pairs.mean())
    assert report.uniformity == pytest.approx(np.log(np.exp(-2 * pairs).mean()), abs=1e-6)
    own = [distances[a, b] for a in range(120) for b in range(a) if a % 3 == b % 3]
    assert report.alignment == pytest.approx(np.mean(own))
    assert sum(n * count for n, count in enumerate(report.occurrence_histogram)) == 1200
    assert report.largest_hubs[0].occurrences == report.hubness.largest
    assert report.drift is None


def test_images_are_compared_among_a_sample(tmp_path, make_collection, vectors):
    """The seed's; sums are over all images all the same."""
    c = make_collection(tmp_path / "c", vectors)
    once, again, other = (
        evaluate(SpaceOptions(collection=str(c), sample=40, seed=seed)) for seed in (1, 1, 2)
    )
    assert once == again != other
    assert (once.n, once.n_sample, once.hubness.n) == (120, 40, 40)
    assert once.rankme == other.rankme


def test_drift_joins_images_by_key(tmp_path, make_collection, vectors):
    """A turned space of fewer images, in another encoder's collection: nothing has drifted."""
    turned = (vectors @ ortho_group.rvs(10, random_state=1)).astype(np.float32)
    c = make_collection(tmp_path / "c", vectors)
    other = make_collection(tmp_path / "other", turned[:100], n_segments=2)
    report = evaluate(SpaceOptions(collection=str(c), other=str(other), sample=0))
    drift = report.drift
    assert drift.n_pairs == 100
    assert drift.linear_cka == pytest.approx(1, abs=1e-4)
    assert drift.procrustes_residual == pytest.approx(0, abs=1e-4)
    assert drift.neighbour_overlap == 1.0
    assert drift.overlap_by_chance == 10 / 99
    assert drift.overlap_histogram == [0] * 10 + [100]
    assert list(report.notes) == ["20 images are not in made"]
    most = make_collection(tmp_path / "most", turned[:119])
    report = evaluate(SpaceOptions(collection=str(c), other=str(most)))
    assert list(report.notes) == ["1 image is not in made"]
    shuffled = make_collection(tmp_path / "shuffled", np.roll(vectors, 1, axis=0))
    apart = evaluate(SpaceOptions(collection=str(c), other=str(shuffled))).drift
    assert apart.linear_cka < 0.3
    assert apart.neighbour_overlap < 0.3


def test_few_images_in_common_have_few_neighbours(tmp_path, make_collection, vectors, capsys):
    """The line says how many were compared."""
    c, few = make_collection(tmp_path / "c", vectors), make_collection(tmp_path / "d", vectors[:4])
    assert run(["space", "--collection", str(c), "--other", str(few)]) == 0
    assert "  same 3 nearest       100.00%  100.00% by chance" in capsys.readouterr().out


def test_two_views_by_one_encoder_are_aligned(tmp_path, make_collection, vectors):
    """The mean squared distance of an image's two vectors, as only one encoder defines it."""
    noisy = vectors + 0.1
    noisy = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
    c, other = make_collection(tmp_path / "c", vectors), make_collection(tmp_path / "o", noisy)
    drift = evaluate(SpaceOptions(collection=str(c), other=str(other))).drift
    assert drift.is_same_encoder
    assert drift.alignment == pytest.approx(((vectors - noisy) ** 2).sum(axis=1).mean(), rel=1e-5)


def test_two_encoders_have_no_alignment(tmp_path, built, other_bundle, train_folder):
    """Real bundles over the same images: drift has a figure, alignment none."""
    out = tmp_path / "other"
    build(BuildOptions(images=str(train_folder), encoder=str(other_bundle.path), out=out))
    report = evaluate(SpaceOptions(collection=str(built), other=str(out)))
    assert (report.drift.is_same_encoder, report.drift.alignment) == (False, None)
    assert report.drift.fingerprint == other_bundle.fingerprint
    assert 0 < report.drift.neighbour_overlap < 1
    assert "CKA is biased upwards: 60 images for 16 dimensions" in report.notes


def test_what_cannot_be_measured_is_refused(tmp_path, make_collection, vectors, unit_rows, built):
    """Fewer images than neighbours, no image in common, options that mean nothing."""
    few = make_collection(tmp_path / "few", unit_rows(5, 10))
    with pytest.raises(EvaluationError, match=r"expected more than k = 10 images, found 5; take"):
        evaluate(SpaceOptions(collection=str(few)))
    c = make_collection(tmp_path / "c", vectors)
    with pytest.raises(EvaluationError, match=r"such as '0000', found 0 of them among its 60"):
        evaluate(SpaceOptions(collection=str(c), other=str(built)))
    with pytest.raises(UsageError, match="--k: expected at least 1, found 0"):
        SpaceOptions(collection=str(c), k=0)
    with pytest.raises(UsageError, match="--sample: expected 0, or more than --k, found 10"):
        SpaceOptions(collection=str(c), sample=10)
    with pytest.raises(UsageError, match="--seed: expected at least 0, found -1"):
        SpaceOptions(collection=str(c), seed=-1)


def test_vectors_of_zeros_have_no_spectrum_and_no_spread(tmp_path, capsys):
    """A picture without a curve; what lies in one point is not spread evenly."""
    rows = {
        "key": [str(n) for n in range(20)], "label": ["x"] * 20, "source": ["folder:/nowhere"] * 20
    }  # fmt: skip
    with CollectionWriter.create(
        tmp_path / "c", name="c", fingerprint="f" * 64, dim=8, metric="euclidean"
    ) as writer:
        writer.add(pa.table(rows), np.zeros((20, 8), np.float32), fingerprint="f" * 64)
    out = tmp_path / "out"
    assert run(["space", "--collection", str(tmp_path / "c"), "--out", str(out)]) == 0
    assert "space: RankMe 0.0 of 8, uniformity -, hubness " in capsys.readouterr().out
    assert (out / "space.png").is_file()


def test_the_report_in_every_form(tmp_path, built, bundle, capsys):
    """Text for people, JSON with everything, a picture, and a place in the bundle."""
    own, c, out = tmp_path / "own", tmp_path / "c", tmp_path / "report"
    shutil.copytree(bundle.path, own)
    with Collection.open(built) as collection:
        images = collection.rows(collection.ids[:1])[0].source
    build(BuildOptions(images=images, encoder=str(own), out=c))
    args = ["space", "--collection", str(c), "--other", str(built)]
    assert run([*args, "--out", str(out), "--record"]) == 0
    text = capsys.readouterr().out
    for words in (
        "space: RankMe ",
        "  dead dimensions            0\n",
        "mean squared distance within a class",
        "of the images are in nobody's list",
        "beside collection colours, the same encoder, 16 dimensions: 60 images in both",
        "same 10 nearest      100.00%",
    ):
        assert words in text
    assert (out / "report.txt").read_text().strip() in text
    report = json.loads((out / "report.json").read_text())
    assert len(report["singular_values"]) == 16
    with Image.open(out / "space.png") as picture:
        assert picture.format == "PNG"
    assert read_bundle(own).provenance["evaluations"]["space"]["rankme"] == report["rankme"]
    assert run(["space", "--collection", str(c), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drift"] is None
