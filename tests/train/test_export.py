"""Export: what a bundle holds, that it is the trained network, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from models.bundle import ENCODER_FILE, Bundle, read_bundle
from models.encoder import open_encoder
from models.errors import BundleError, EncoderError
from models.runtime import open_random_twin
from train.checkpoint import list_checkpoints
from train.errors import ExportError, RunError
from train.export import (
    ExportOptions,
    check_graph,
    export_run,
    graph_of,
    last_checkpoint,
    main,
    read_images,
)
from train.graph import BATCH_NAME, INPUT_NAME, OUTPUT_NAME, embed_with_torch, write_onnx
from train.run import RunConfig, RunDirectory


@pytest.fixture(scope="module")
def run(finished_run: Path) -> RunDirectory:
    """The finished run."""
    return RunDirectory(path=finished_run)


@pytest.fixture(scope="module")
def config(run: RunDirectory) -> RunConfig:
    """Its configuration."""
    return run.read_config()


@pytest.fixture(scope="module")
def images_NHWC(config: RunConfig) -> NDArray[np.uint8]:
    """Its images."""
    return read_images(config)


@pytest.fixture(scope="module")
def bundle(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle."""
    return export_run(run, tmp_path_factory.mktemp("bundles") / "mini", name="mini")


def test_the_graph_takes_uint8_nhwc_and_gives_float32(bundle: Bundle) -> None:
    """One input and one output of the promised names, types and shapes, in a single file."""
    model = onnx.load(bundle.encoder_path, load_external_data=False)
    onnx.checker.check_model(model)
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == (INPUT_NAME, OUTPUT_NAME)
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (given, made)
    ]
    assert shapes == [[BATCH_NAME, 14, 14, 1], [BATCH_NAME, 32]]
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert made.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {path.name for path in bundle.path.iterdir()} == {
        "bundle.json", "encoder.onnx", "random.onnx"
    }  # fmt: skip


def test_the_graph_tells_nothing_of_the_machine_that_made_it(bundle: Bundle) -> None:
    """Stack traces and module paths of the exporter are gone."""
    content = bundle.encoder_path.read_bytes()
    assert b"stack_trace" not in content
    assert b".py" not in content


def test_the_bundle_is_the_trained_network(
    bundle: Bundle, run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8]
) -> None:
    """Opened as a server opens it, it gives torch's vectors; the twin gives the untrained ones."""
    encoder = open_encoder(bundle.path, threads=1)
    twin = open_random_twin(bundle.path, threads=1)
    assert twin is not None
    for opened, graph in (
        (encoder, graph_of(last_checkpoint(run), config)[0]),
        (twin, graph_of(run.initial_file, config)[0]),
    ):
        expected = embed_with_torch(graph, images_NHWC)
        np.testing.assert_allclose(opened.encode(images_NHWC), expected, rtol=1e-3, atol=1e-5)
        opened.close()


def test_the_provenance_is_complete(bundle: Bundle, config: RunConfig) -> None:
    """Command, seed, data, training, validation, parity and versions are in bundle.json."""
    provenance = json.loads((bundle.path / "bundle.json").read_text())["provenance"]
    assert provenance["command"] == config.command
    assert provenance["seed"] == 0
    assert provenance["data"]["sha256"] == config.data["sha256"]
    training = provenance["training"]
    assert (training["steps"], training["epochs"], training["images_seen"]) == (33, 3, 1056)
    assert training["elapsed_s"] > 0
    validation = provenance["validation"]
    assert validation["split"] == "held out of the training images; no test image was seen"
    assert (validation["queries"], validation["bank"]) == (40, 360)
    assert {"knn_top1", "knn_pixels", "knn_random"} <= validation.keys()
    assert provenance["parity"]["images"] == 400
    assert provenance["parity"]["min_cosine"] >= 0.9999
    assert {"python", "torch", "onnx", "onnxruntime", "horace"} <= provenance["versions"].keys()


def test_equal_runs_give_equal_fingerprints(
    run: RunDirectory, bundle: Bundle, tmp_path: Path
) -> None:
    """Exporting twice gives the same bytes, so the same name for the encoder."""
    again = export_run(run, tmp_path / "again", name="again", with_random_twin=False)
    assert again.fingerprint == bundle.fingerprint
    assert again.random_path is None


def test_a_graph_of_other_weights_fails(
    run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8], tmp_path: Path
) -> None:
    """A graph that is not the network is refused by its least cosine."""
    write_onnx(graph_of(run.initial_file, config)[0], config.preprocessing, tmp_path / ENCODER_FILE)
    with pytest.raises(ExportError, match=r"least cosine to torch, over 400 images: expected at"):
        check_graph(
            tmp_path / ENCODER_FILE, graph_of(last_checkpoint(run), config)[0], config, images_NHWC
        )


def test_a_graph_that_depends_on_the_batch_fails(
    run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8], tmp_path: Path
) -> None:
    """A graph that scales its output by a trace of the batch passes parity, and is refused."""
    graph, _ = graph_of(last_checkpoint(run), config)
    file = tmp_path / ENCODER_FILE
    write_onnx(graph, config.preprocessing, file)
    model = onnx.load(file)
    for node in model.graph.node:
        node.output[:] = ["own" if name == OUTPUT_NAME else name for name in node.output]
    one = helper.make_tensor("share", onnx.TensorProto.FLOAT, [], [1e-3])
    axes = helper.make_tensor("batch_axis", onnx.TensorProto.INT64, [1], [0])
    model.graph.initializer.extend([one, axes])
    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["own", "batch_axis"], ["mean"], keepdims=1),
            helper.make_node("Mul", ["mean", "share"], ["trace"]),
            helper.make_node("Add", ["own", "trace"], [OUTPUT_NAME]),
        ]
    )
    onnx.save(model, file)
    with pytest.raises(ExportError, match="vectors in batches of 2: expected the bits that each"):
        check_graph(file, graph, config, images_NHWC)


def test_a_graph_of_another_shape_fails(
    run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8], make_bundle: object,
) -> None:  # fmt: skip
    """A graph whose input is not what the run preprocesses to is refused on opening."""
    assert callable(make_bundle)
    foreign: Bundle = make_bundle("foreign", size=28)
    with pytest.raises(EncoderError, match=r"expected uint8 \(N, \[14, 14, 1\]\)"):
        check_graph(
            foreign.encoder_path, graph_of(last_checkpoint(run), config)[0], config, images_NHWC
        )


def test_an_existing_bundle_is_replaced_only_on_request(run: RunDirectory, tmp_path: Path) -> None:
    """Without --replace it stays as it is."""
    out = tmp_path / "bundle"
    export_run(run, out, name="first", with_random_twin=False)
    with pytest.raises(BundleError, match="--replace"):
        export_run(run, out, name="second", with_random_twin=False)
    assert read_bundle(out).name == "first"
    export_run(run, out, name="second", with_random_twin=False, replace=True)
    assert read_bundle(out).name == "second"


def test_a_damaged_twin_or_target_ends_the_export_early(finished_run: Path, tmp_path: Path) -> None:
    """initial.pt is checked as checkpoints are; a place below a file cannot be written."""
    damaged = tmp_path / "damaged"
    shutil.copytree(finished_run, damaged)
    content = bytearray((damaged / "initial.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "initial.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"initial\.pt: .* does not match its SHA-256; start the"):
        export_run(RunDirectory(path=damaged), tmp_path / "bundle", name="x")
    out = damaged / "initial.pt" / "bundle"
    with pytest.raises(RunError, match=r"room for what comes, found .*; make room or"):
        export_run(RunDirectory(path=finished_run), out, name="x")


def test_the_summary_is_short_or_json(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """People read five lines; machines the same facts as JSON."""
    out = tmp_path / "bundle"
    options = ExportOptions(run=finished_run, out=out, random_twin=False)
    main(options)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bundle", "dim", "size", "parity", "fingerprint"]
    main(ExportOptions(run=finished_run, out=out, random_twin=False, replace=True, json=True))
    summary = json.loads(capsys.readouterr().out)
    assert summary["dim"] == 32
    assert summary["name"] == "bundle"
    assert summary["fingerprint"] == read_bundle(out).fingerprint


def test_a_missing_run_is_one_line_and_status_1(tmp_path: Path) -> None:
    """The command says how to make a run."""
    done = subprocess.run(
        [sys.executable, "-m", "train.export", str(tmp_path / "none")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"python -m train.export: {tmp_path / 'none'}: expected a run directory, found no such "
        "directory; make one with `python -m train.pretrain SOURCE --out RUN`"
    ]


def test_a_run_without_a_checkpoint_is_refused(finished_run: Path, tmp_path: Path) -> None:
    """A run killed early has nothing to export yet."""
    early = tmp_path / "early"
    shutil.copytree(finished_run, early)
    for path in list_checkpoints(early / "checkpoints"):
        path.unlink()
    with pytest.raises(RunError, match="expected a run with a checkpoint, found none yet"):
        export_run(RunDirectory(path=early), tmp_path / "bundle", name="early")


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 99}', "[]"])
def test_a_damaged_configuration_is_refused(content: str, tmp_path: Path) -> None:
    """config.json must be that of a run of this schema."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match="expected the configuration of a run, schema 1, found"):
        RunDirectory(path=tmp_path).read_config()
