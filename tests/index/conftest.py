"""Encoders, images and collections small enough to make anew for a test session."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from index.build import BuildOptions, build
from index.collection import id_of
from index.storage.manifest import Manifest, SegmentEntry, hash_files, write_manifest
from index.storage.rows import ROW_SCHEMA
from index.storage.segment import Block, write_segment
from index.storage.writer import CollectionWriter
from models.bundle import Bundle, OutputSpec, write_bundle
from models.images import open_source
from models.preprocess import PreprocessSpec
from models.runtime import open_bundle
from tests.milvusserver import milvus_server

SIDE, DIM = 12, 16
FINGERPRINT = "f" * 64
COLOURS = {"blue": (20, 40, 200), "green": (20, 190, 50), "red": (210, 30, 20)}


def write_graph(path: Path, *, seed: int, side: int = SIDE, dim: int = DIM) -> None:
    """Write an ONNX graph that scales, flattens and projects (N, side, side, 3) images."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((side * side * 3, dim)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "mean"], ["centred"]),
        helper.make_node("Flatten", ["centred"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["embeddings"]),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["N", dim])],
        [
            numpy_helper.from_array(np.float32(110), "mean"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, path)


def make_bundle(path: Path, *, seed: int = 0, random_twin: bool = True) -> Bundle:
    """Write a bundle around two such graphs; another seed makes another encoder."""
    graphs = path.parent / f"{path.name}.graphs"
    graphs.mkdir(parents=True)
    write_graph(graphs / "encoder.onnx", seed=seed)
    write_graph(graphs / "random.onnx", seed=seed + 1000)
    names = ["encoder.onnx", "random.onnx"] if random_twin else ["encoder.onnx"]
    return write_bundle(
        path,
        name=path.name,
        files={name: graphs / name for name in names},
        preprocessing=PreprocessSpec(height=SIDE, width=SIDE, channels=3, resize=SIDE),
        output=OutputSpec(dim=DIM),
        provenance={"command": "tests"},
    )


def make_folder(root: Path, *, per_class: int, seed: int = 0) -> Path:
    """Write PNGs of noisy colours into one folder a colour."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for n in range(per_class):
            noise = rng.integers(-60, 60, (16, 20, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{n:03}.png")
    return root


def write_collection(
    path: Path, vectors: NDArray[np.float32], *, factory: str = "Flat", n_segments: int = 1
) -> Path:
    """Write vectors as a collection of one segment or several."""
    cuts = np.array_split(np.arange(len(vectors)), n_segments)
    entries, names = [], []
    for number, rows in enumerate(cuts):
        table = pa.table(
            {
                "id": [id_of(f"{row:04}") for row in rows],
                "key": [f"{row:04}" for row in rows],
                "label": [str(row % 3) for row in rows],
                "source": ["folder:/nowhere"] * len(rows),
            },
            schema=ROW_SCHEMA,
        )
        entry = SegmentEntry(name=f"{number:06}", count=len(rows), factory=factory)
        block = Block(rows=table, vectors_ND=vectors[rows])
        names += write_segment(path, entry, [block], vectors.shape[1])
        entries.append(entry)
    manifest = Manifest(
        name="made",
        fingerprint=FINGERPRINT,
        dim=vectors.shape[1],
        encoder="/nowhere",
        preprocessing={},
        sources={"folder:/nowhere": len(vectors)},
        segments=tuple(entries),
        files=hash_files(path, names),
        versions={},
        build={},
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture
def make_collection() -> Callable[..., Path]:
    """Give a function that writes vectors as a collection; the key of row 7 is `0007`."""
    return write_collection


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny encoder with its untrained twin."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another encoder of the same dimension, without a twin."""
    folder = tmp_path_factory.mktemp("bundle")
    return make_bundle(folder / "other", seed=7, random_twin=False)


@pytest.fixture(scope="session")
def train_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 labelled images, 3 classes."""
    return make_folder(tmp_path_factory.mktemp("images") / "train", per_class=20)


@pytest.fixture(scope="session")
def test_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 more of the same classes."""
    return make_folder(tmp_path_factory.mktemp("images") / "test", per_class=5, seed=1)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, train_folder: Path) -> Path:
    """A Flat collection over `train_folder`; do not change it, see `collection_copy`."""
    out = tmp_path_factory.mktemp("collections") / "colours"
    build(BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=out))
    return out


@pytest.fixture(scope="session")
def built_hnsw(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, train_folder: Path
) -> Path:
    """An HNSW collection over `train_folder`; do not change it."""
    out = tmp_path_factory.mktemp("collections") / "colours-hnsw"
    build(BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=out, index="hnsw"))
    return out


@pytest.fixture(scope="session")
def built_euclidean(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, train_folder: Path
) -> Path:
    """The encoder's own output over `train_folder`, compared by distances; do not change it."""
    out = tmp_path_factory.mktemp("collections") / "colours-euclidean"
    records = list(open_source(str(train_folder)).records())
    encoder = open_bundle(bundle.path)
    vectors_ND = encoder.encode(np.stack([encoder.preprocess(one.read()) for one in records]))
    rows = pa.table(
        {
            "key": [one.key for one in records],
            "label": [one.label for one in records],
            "source": [f"folder:{train_folder}"] * len(records),
        }
    )
    with CollectionWriter.create(
        out, name="far", fingerprint=bundle.fingerprint, dim=DIM, encoder=str(bundle.path),
        metric="euclidean",
    ) as writer:  # fmt: skip
        writer.add(rows, vectors_ND, fingerprint=bundle.fingerprint)
    return out


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Milvus for the tests of a module; each takes names of its own.

    Not for the session: pymilvus pings a server that it asks nothing, and Milvus Lite bears that
    for some minutes alone.
    """
    with milvus_server(tmp_path_factory.mktemp("milvus")) as uri:
        yield uri


@pytest.fixture
def copy_collection(tmp_path: Path) -> Callable[[Path], Path]:
    """Give a function that copies a collection, so that a test may damage it."""

    def copy(path: Path) -> Path:
        target = tmp_path / f"copy-{path.name}"
        shutil.copytree(path, target)
        return target

    return copy


@pytest.fixture
def unit_rows() -> Callable[..., NDArray[np.float32]]:
    """Give a function that makes (n, dim) random unit vectors."""

    def make(n: int, dim: int, *, seed: int = 0) -> NDArray[np.float32]:
        rows = np.random.default_rng(seed).standard_normal((n, dim))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return make


@pytest.fixture
def new_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """Give a function that writes a bundle for this test alone."""

    def make(name: str = "own", *, seed: int = 3, random_twin: bool = True) -> Bundle:
        return make_bundle(tmp_path / name, seed=seed, random_twin=random_twin)

    return make


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[..., Path]:
    """Give a function that writes a folder of images for this test alone."""

    def make(name: str = "images", *, per_class: int = 4, seed: int = 5) -> Path:
        return make_folder(tmp_path / name, per_class=per_class, seed=seed)

    return make
