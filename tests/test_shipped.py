"""The encoder that ships: sound, small, honest about itself, and served in one command."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from index.knn import knn_search
from models.bundle import SHIPPED_BUNDLE, read_bundle
from models.encoder import Encoder, open_encoder
from models.idx import open_idx
from models.runtime import open_random_twin
from models.vectors import finish_vectors
from serve.client import Client

ROOT = Path(__file__).parents[1]
MINI = ROOT / "tests/data/fashion-mnist-mini"
MAX_BYTES = 6_000_000
MAX_DIM = 512
MAX_TRAINING_S = 2 * 3600


def mini(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Give (N, 28, 28, 1) uint8 images and (N,) labels of the small Fashion-MNIST."""
    arrays = open_idx(MINI / f"{split}-images-idx3-ubyte.gz")
    assert arrays.labels is not None
    return arrays.images[..., None], np.array(arrays.labels)


def nearest_neighbour_top1(encoder: Encoder) -> float:
    """Classify the small test split by the nearest of the small training split."""
    (bank, labels), (queries, truth) = mini("train"), mini("t10k")
    vectors = [finish_vectors(encoder.encode(images)) for images in (queries, bank)]
    _, rows = knn_search(*vectors, 1)
    return float((labels[rows[:, 0]] == truth).mean())


def test_it_is_sound_and_small():
    """Every file has its recorded hash; the encoder takes at most 6 MB, and gives 512 numbers."""
    bundle = read_bundle(SHIPPED_BUNDLE)
    assert bundle.encoder_path.stat().st_size <= MAX_BYTES
    assert bundle.dim <= MAX_DIM
    assert "int8" in bundle.precisions


def test_it_says_where_it_comes_from_and_how_good_it_is():
    """Command, seed, data, versions, and an evaluation with its baselines."""
    provenance = read_bundle(SHIPPED_BUNDLE).provenance
    assert provenance["command"].startswith("python -m train.pretrain fashion-mnist ")
    assert {"seed", "data", "versions", "parity", "training"} <= set(provenance)
    assert provenance["training"]["elapsed_s"] < MAX_TRAINING_S
    knn = provenance["evaluations"]["knn"]
    assert (knn["n_collection"], knn["n_queries"]) == (60_000, 10_000)
    assert knn["fingerprint"] == read_bundle(SHIPPED_BUNDLE).fingerprint
    assert [row["name"] for row in knn["baselines"]] == [
        "whitened pixels",
        "raw pixels",
        "random encoder",
    ]


def test_training_taught_it_something():
    """On 200 images against 400 it is ahead of its own untrained twin."""
    twin = open_random_twin(SHIPPED_BUNDLE)
    assert twin is not None
    assert nearest_neighbour_top1(open_encoder(SHIPPED_BUNDLE)) > nearest_neighbour_top1(twin)


def test_a_server_without_options_serves_it():
    """`python -m serve` is ready with the shipped encoder, and embeds to the bit as here."""
    argv = [sys.executable, "-m", "serve", "--port", "0"]
    images, _ = mini("t10k")
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            with Client(server.stdout.readline().split()[3]) as client:
                assert client.health()
                assert client.health("horace.v1.Horace")
                result = client.embed(list(images)).raise_for_status()
        finally:
            server.terminate()
    encoder = open_encoder(SHIPPED_BUNDLE)
    assert result.fingerprint == encoder.fingerprint
    assert result.vectors.tobytes() == finish_vectors(encoder.encode(images)).tobytes()
