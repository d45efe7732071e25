"""The main job, link by link, with the commands that people type and real images."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.collection import Collection
from models.images import open_source
from serve.client import Client

ROOT = Path(__file__).parents[1]
MINI = ROOT / "tests/data/fashion-mnist-mini"
TRAIN = f"idx:{MINI / 'train-images-idx3-ubyte.gz'}"
TEST = f"idx:{MINI / 't10k-images-idx3-ubyte.gz'}"


def run(*args: str | Path) -> str:
    """Run `python -m ARGS` and give its stdout."""
    argv = [sys.executable, "-m", *map(str, args)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(*args: str | Path) -> Iterator[Client]:
    """Run a server on a free port, give a client of it, stop it."""
    argv = [sys.executable, "-m", "serve", "--port", "0", *map(str, args)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            with Client(server.stdout.readline().split()[3]) as client:
                yield client
        finally:
            server.terminate()
    assert server.returncode == 0


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain, export and index, once for this module."""
    out = tmp_path_factory.mktemp("chain")
    small = ["--epochs", "1", "--network.width", "8", "--image-size-px", "28", "--channels", "1"]
    small += ["--network.stem", "small", "--network.projector-widths", "64", "64"]
    run("train.pretrain", TRAIN, "--out", out / "run", "--batch-size", "64", *small)
    run("train.export", out / "run", "--out", out / "bundle")
    run("index.build", "--images", TRAIN, "--encoder", out / "bundle", "--out", out / "collection")
    return out


def test_a_run_is_plotted_and_logged(artefacts):
    """A run leaves its curves, its log and its events."""
    assert (artefacts / "run/curves.png").stat().st_size > 1000
    assert (artefacts / "run/log.jsonl").read_text().count("\n") > 1
    assert list((artefacts / "run/tensorboard").iterdir())


def test_served_vectors_equal_indexed_ones_to_the_bit(artefacts):
    """The same image has the same bits from `index.build` and from `Embed`, in any batch."""
    records = list(open_source(TRAIN).records())
    with (
        Collection.open(artefacts / "collection") as collection,
        serving("--bundle", artefacts / "bundle") as client,
    ):
        indexed = collection.vectors(collection.ids)
        for size in (1, 7, 64, 400):
            rows = range(0, 400, size) if size > 1 else range(20)
            for start in rows:
                images = [record.read() for record in records[start : start + size]]
                served = client.embed(images).vectors
                assert served.tobytes() == indexed[start : start + size].tobytes()


def test_files_and_bytes_have_the_same_vector(artefacts, tmp_path):
    """A JPEG that is indexed from a folder and one that is sent have the same bits."""
    for n, record in enumerate(list(open_source(TEST).records())[:5]):
        pixels = np.asarray(record.read())
        Image.fromarray(pixels).resize((41, 57)).save(tmp_path / f"{n}.jpg", quality=90)
    collection_path = tmp_path / "collection"
    run("index.build", "--images", tmp_path, "--encoder", artefacts / "bundle",
        "--out", collection_path)  # fmt: skip
    files = [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]
    with (
        Collection.open(collection_path) as collection,
        serving("--bundle", artefacts / "bundle") as client,
    ):
        result = client.embed(files).raise_for_status()
        assert result.vectors.tobytes() == collection.vectors(collection.ids).tobytes()
        assert result.fingerprint == collection.fingerprint


def test_search_over_grpc_finds_what_the_command_finds(artefacts, tmp_path):
    """`Search` and `index.search` give the same neighbours for the same image."""
    pixels = np.asarray(next(iter(open_source(TEST).records())).read())
    query = tmp_path / "query.png"
    Image.fromarray(pixels).save(query)
    found = json.loads(run("index.search", artefacts / "collection", query, "--json"))
    with serving(
        "--bundle", artefacts / "bundle", "--collection", f"mini={artefacts / 'collection'}"
    ) as client:
        (hits,) = client.search([query.read_bytes()]).raise_for_status().hits
    (by_command,) = found["queries"]
    assert [str(hit.id) for hit in hits] == [hit["id"] for hit in by_command["hits"]]
    assert [hit.key for hit in hits] == [hit["key"] for hit in by_command["hits"]]


def test_evaluation_stands_beside_its_baselines(artefacts):
    """The encoder's row comes with pixels, whitened pixels and the untrained network."""
    argv = ["--collection", artefacts / "collection", "--images", TEST, "--json"]
    report = json.loads(run("index.evaluate", "knn", *argv))
    assert report["n_queries"] == 200
    names = [row["name"] for row in report["baselines"]]
    assert names == ["whitened pixels", "raw pixels", "random encoder"]
    assert all(row["by_k"] is not None for row in report["baselines"])
