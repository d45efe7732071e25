"""Export: what a bundle holds, that it is the trained network, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import tyro
from numpy.typing import NDArray
from onnx import helper

from models.bundle import ENCODER_FILE, Bundle, read_bundle
from models.encoder import open_encoder
from models.errors import BundleError, EncoderError, SourceError, UsageError
from models.runtime import open_bundle, open_random_twin
from train.checkpoint import list_checkpoints
from train.config import PretrainOptions
from train.data.training_data import TrainingData
from train.errors import ExportError, RunError
from train.export.__main__ import main, summarise
from train.export.bundle import check_target, export_run
from train.export.graph import embed_with_torch
from train.export.graph_names import BATCH_NAME, INPUT_NAME, OUTPUT_NAME
from train.export.images import load_run_images
from train.export.options import ExportOptions, ReadoutOptions
from train.export.run_graph import graph_of, last_checkpoint
from train.export.write_graph import check_graph
from train.loop import pretrain
from train.presets import PRESETS
from train.run import RunConfig, RunDirectory

RunOptions = Callable[..., PretrainOptions]


@pytest.fixture(scope="module")
def run(finished_run: Path) -> RunDirectory:
    """The finished run."""
    return RunDirectory(path=finished_run)


@pytest.fixture(scope="module")
def config(run: RunDirectory) -> RunConfig:
    """Its configuration."""
    return run.read_config()


@pytest.fixture(scope="module")
def images_NHWC(run: RunDirectory, config: RunConfig) -> NDArray[np.uint8]:
    """Its images."""
    data = load_run_images(run, config)
    return data.read(np.arange(data.images), config.preprocessing)


@pytest.fixture(scope="module")
def unwatched(run_options: RunOptions, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that looks at no label."""
    out = tmp_path_factory.mktemp("runs") / "unwatched"
    pretrain(run_options(out, epochs=1, knn_every_epochs=0))
    return RunDirectory(path=out)


@pytest.fixture(scope="module")
def white(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle with everything: two stages in cells, whitened, in every precision."""
    return export_run(
        run,
        tmp_path_factory.mktemp("bundles") / "white",
        name="white",
        readout=ReadoutOptions(stages=(2, 3), grid=(2, 1), dim=24, shrinkage=1e-3),
        precisions=("int8", "fp16"),
    )


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
    assert shapes == [[BATCH_NAME, 14, 14, 1], [BATCH_NAME, 64]]
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
    assert provenance["parity"]["images"] == 360
    assert provenance["readout"] == {"stages": [4], "grids": [1], "whitening": None}
    plain = validation["readouts"]["trained"]["plain"]
    assert plain == pytest.approx(validation["knn_top1"], abs=1e-6)
    assert validation["readouts"]["untrained"]["plain"] == pytest.approx(
        validation["knn_random"], abs=1e-6
    )
    assert provenance["parity"]["min_cosine"] >= 0.9999
    assert {"python", "torch", "onnx", "onnxruntime", "horace"} <= provenance["versions"].keys()


def test_a_graph_of_other_weights_fails(
    bundle: Bundle, run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8]
) -> None:
    """A graph that is not the network is refused by its least cosine."""
    assert bundle.random_path is not None
    graph, _, _ = graph_of(last_checkpoint(run), config)
    with pytest.raises(ExportError, match=r"least cosine to torch, over 400 images: expected at"):
        check_graph(bundle.random_path, graph, config, images_NHWC)


def test_a_network_that_diverged_is_not_taken_for_a_bad_graph(
    bundle: Bundle, run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8]
) -> None:
    """No other version of torch would help: the run has to be looked at."""
    graph, _, _ = graph_of(last_checkpoint(run), config)
    with torch.no_grad():
        next(graph.backbone.parameters()).fill_(torch.nan)
    with pytest.raises(ExportError) as error:
        check_graph(bundle.encoder_path, graph, config, images_NHWC)
    assert str(error.value) == (
        "the network's vectors of the training images: expected finite numbers, found NaN or "
        "infinity in 400 of 400; look at the run's curves, and train it again with other options"
    )


def test_a_graph_that_depends_on_the_batch_fails(
    bundle: Bundle, run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8],
    tmp_path: Path,
) -> None:  # fmt: skip
    """A graph that scales its output by a trace of the batch passes parity, and is refused."""
    graph, _, _ = graph_of(last_checkpoint(run), config)
    file = tmp_path / ENCODER_FILE
    model = onnx.load(bundle.encoder_path)
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
    with pytest.raises(ExportError, match="vectors in batches of 2: expected those that each"):
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


def test_an_existing_bundle_is_replaced_only_on_request(
    run: RunDirectory, bundle: Bundle, tmp_path: Path
) -> None:
    """Without --replace it stays as it is; with it, the same run gives the same bytes."""
    out = tmp_path / "bundle"
    shutil.copytree(bundle.path, out)
    with pytest.raises(BundleError, match="--replace"):
        export_run(run, out, name="second", with_random_twin=False)
    assert read_bundle(out).name == "mini"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"own: .* found something else of that name"):
        check_target(tmp_path / "own", replace=True)
    export_run(run, out, name="second", with_random_twin=False, replace=True)
    second = read_bundle(out)
    assert (second.name, second.fingerprint) == ("second", bundle.fingerprint)
    assert second.random_path is None


def test_a_damaged_twin_or_target_ends_the_export_early(finished_run: Path, tmp_path: Path) -> None:
    """initial.pt is checked as checkpoints are; a place below a file cannot be written."""
    damaged = tmp_path / "damaged"
    shutil.copytree(finished_run, damaged)
    content = bytearray((damaged / "initial.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "initial.pt").write_bytes(content)
    with pytest.raises(
        RunError, match=r"initial\.pt: .* does not match .*; bring it back .*--no-random-twin$"
    ):
        export_run(RunDirectory(path=damaged), tmp_path / "bundle", name="x")
    out = damaged / "initial.pt" / "bundle"
    with pytest.raises(RunError, match=r"room for what comes, found .*; make room, in "):
        export_run(RunDirectory(path=finished_run), out, name="x")


def test_the_command_writes_all_that_is_asked_for_and_says_so(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bundle, other precisions and a model for Triton from one command; a line about each."""
    main(
        ExportOptions(
            run=finished_run, out=tmp_path / "mini", random_twin=False, int8=True, fp16=True,
            triton_repository=tmp_path / "repository",
        )
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "bundle", "dim", "size", "parity", "trained", "fp32", "int8", "fp16", "triton",
        "fingerprint",
    ]  # fmt: skip
    assert (tmp_path / "repository/mini/1/model.onnx").is_file()


def test_a_summary_for_machines_is_json(bundle: Bundle) -> None:
    """It has the figures that the lines are made of."""
    summary = json.loads(json.dumps(summarise(bundle)))
    assert (summary["name"], summary["dim"], summary["precisions"]) == ("mini", 64, {})
    assert summary["readouts"]["trained"]["whitened"] is None
    assert summary["fingerprint"] == bundle.fingerprint


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


def test_a_checkpoint_that_a_run_at_work_deletes_is_exported(
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was read before the images, which take longer than the next checkpoints."""
    at_work = tmp_path / "a run"
    shutil.copytree(finished_run, at_work)
    list_checkpoints(at_work / "checkpoints")[-1].unlink()

    def load(run: RunDirectory, config: RunConfig, source: str | None) -> TrainingData:
        for path in list_checkpoints(at_work / "checkpoints"):
            path.unlink()
        return load_run_images(run, config, source)

    monkeypatch.setattr("train.export.bundle.load_run_images", load)
    made = export_run(
        RunDirectory(path=at_work), tmp_path / "bundle", name="x", with_random_twin=False
    )
    assert f"{at_work} has taken 32 of 33 steps, and the encoder is what it was then" in caplog.text
    assert f"train.pretrain --resume --out '{at_work}'`" in caplog.text, "as a shell takes it"
    assert made.provenance["training"]["checkpoint"] == "step-00000032.pt"  # type: ignore[index,call-overload]  # JSON


def test_an_export_prepares_the_device(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it computes in fp32 is float32 on a GPU, too."""
    prepared: list[str] = []
    monkeypatch.setattr("train.device.prepare_device", lambda c, **_: prepared.append(c.precision))
    out = tmp_path / "file/bundle"
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="found File exists"):
        main(ExportOptions(run=finished_run, out=out))
    assert prepared == ["fp32"]


def test_a_run_without_a_checkpoint_is_refused(finished_run: Path, tmp_path: Path) -> None:
    """A run killed early has nothing to export yet."""
    early = tmp_path / "an early run"
    shutil.copytree(finished_run, early)
    for path in list_checkpoints(early / "checkpoints"):
        path.unlink()
    with pytest.raises(RunError, match=r"a checkpoint, found none yet; .* --out '.*an early run'`"):
        export_run(RunDirectory(path=early), tmp_path / "bundle", name="early")


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 99}', "[]"])
def test_a_damaged_configuration_is_refused(content: str, tmp_path: Path) -> None:
    """config.json must be that of a run of this schema."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match="expected the configuration of a run, schema 1, found"):
        RunDirectory(path=tmp_path).read_config()


@pytest.mark.parametrize("name", ["uri", "sha256", "images"])
def test_a_configuration_that_names_no_images_is_refused(
    name: str, finished_run: Path, tmp_path: Path
) -> None:
    """Reports and exports look for them; what is missing is named."""
    config = json.loads((finished_run / "config.json").read_text())
    del config["data"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"schema 1, found KeyError: 'data\.{name}'; start the run"):
        RunDirectory(path=tmp_path).read_config()


def test_whitening_is_fitted_fused_and_scored(
    white: Bundle, run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8]
) -> None:
    """Vectors of training images are centred, uncorrelated, and fall in variance; so says JSON."""
    train = load_run_images(run, config).train
    with closing(open_bundle(white.path, threads=1)) as encoder:
        vectors_ND = encoder.encode(images_NHWC[train]).astype(np.float64)
    assert vectors_ND.shape == (360, 24)
    covariance_DD = np.cov(vectors_ND.T, bias=True)
    variances_D = np.diag(covariance_DD)
    np.testing.assert_allclose(vectors_ND.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(covariance_DD, np.diag(variances_D), atol=1e-3)
    assert variances_D[0] == pytest.approx(1 / 1.001, abs=1e-3)
    assert (np.diff(variances_D) < 1e-3).all()
    described = white.provenance["readout"]
    assert (described["stages"], described["grids"]) == ([2, 3], [2, 1])
    assert described["whitening"]["images"] == 360
    assert (described["whitening"]["dims_in"], described["whitening"]["dims_out"]) == (96, 24)


def test_the_twin_has_the_same_readout_and_its_own_fit(
    white: Bundle, run: RunDirectory, config: RunConfig, images_NHWC: NDArray[np.uint8]
) -> None:
    """The untrained network's vectors are white, too; both are scored at every step."""
    train = load_run_images(run, config).train
    twin = open_random_twin(white.path, threads=1)
    assert twin is not None
    vectors_ND = twin.encode(images_NHWC[train]).astype(np.float64)
    twin.close()
    np.testing.assert_allclose(vectors_ND.mean(axis=0), 0, atol=1e-3)
    assert vectors_ND[:, 0].var() == pytest.approx(1 / 1.001, abs=1e-3)
    assert twin.fingerprint != white.fingerprint
    readouts = white.provenance["validation"]["readouts"]
    for name in ("trained", "untrained"):
        assert list(readouts[name]) == ["plain", "pooled", "whitened"]
        assert all(0 < score < 1 for score in readouts[name].values())


def test_every_precision_is_written_scored_and_opened(
    white: Bundle, images_NHWC: NDArray[np.uint8]
) -> None:
    """INT8 and FP16 have files, fingerprints and scores of their own, and open by their path."""
    scores = white.provenance["precisions"]
    assert list(scores) == ["fp32", "int8", "fp16"] == list(white.precisions)
    assert len({score["fingerprint"] for score in scores.values()}) == 3
    assert scores["fp32"]["parity"] is None
    assert scores["int8"]["parity"]["mean_cosine"] > 0.9
    assert scores["fp16"]["parity"]["min_cosine"] > 0.999
    for precision, score in scores.items():
        assert score["size_bytes"] == white.path_of(precision).stat().st_size
        assert score["knn_delta"] == pytest.approx(score["knn_top1"] - scores["fp32"]["knn_top1"])
        encoder = open_encoder(white.path_of(precision), threads=1)
        assert encoder.fingerprint == score["fingerprint"]
        assert encoder.encode(images_NHWC[:3]).shape == (3, 24)
        encoder.close()


def test_a_run_whose_images_have_changed_is_refused(finished_run: Path, tmp_path: Path) -> None:
    """What was held out is no longer known, so nothing can be fitted or scored honestly."""
    changed = tmp_path / "changed"
    shutil.copytree(finished_run, changed)
    config = json.loads((changed / "config.json").read_text())
    config["data"]["sha256"] = "0" * 64
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError) as error:
        export_run(RunDirectory(path=changed), tmp_path / "bundle", name="x")
    uri = config["data"]["uri"]
    assert str(error.value) == (
        f"the images of {uri}: expected the 400 that the run was trained on, found as many, with "
        "other pixels or labels; bring the old ones back: whitening is fitted on them, and scores "
        "are taken on those that were held out; or go on from its weights on what there is now and "
        f"export that: `python -m train.pretrain {uri} --init-from {changed} --epochs 1 --out NEW`"
        ", with the run's other options"
    )


def test_a_run_whose_images_are_gone_is_refused_with_a_way_on(
    finished_run: Path, tmp_path: Path
) -> None:
    """The way on is a command that parses, with another source in it."""
    moved = tmp_path / "moved"
    shutil.copytree(finished_run, moved)
    config = json.loads((moved / "config.json").read_text())
    uri, config["data"]["uri"] = config["data"]["uri"], f"folder:{tmp_path / 'gone'}"
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="or name their new place with --source; or go") as error:
        export_run(RunDirectory(path=moved), tmp_path / "bundle", name="x")
    command = str(error.value).split("`")[1]
    assert command.startswith("python -m train.pretrain SOURCE ")
    options = tyro.cli(PretrainOptions, args=command.split()[3:], default=PRESETS["folder"])
    assert (options.source, options.init_from, options.epochs) == ("SOURCE", moved, 1)
    made = export_run(RunDirectory(path=moved), tmp_path / "bundle", name="x", source=uri)
    assert made.path.exists()


def test_the_weights_of_a_run_go_on_to_an_export_of_other_images(
    finished_run: Path, run_options: RunOptions, mini_source: str, tmp_path: Path
) -> None:
    """What the errors above advise is possible."""
    others = mini_source.replace("train-", "t10k-")
    options = run_options(tmp_path / "new", source=others, init_from=finished_run, epochs=1)
    pretrain(options)
    made = export_run(
        RunDirectory(path=options.run_path), tmp_path / "bundle", name="x", with_random_twin=False
    )
    assert read_bundle(made.path).dim == 64


def test_a_run_without_labels_is_exported_without_scores(
    unwatched: RunDirectory, tmp_path: Path
) -> None:
    """Whitening needs no label; there is nothing to score with."""
    bundle = export_run(
        unwatched, tmp_path / "bundle", name="x", precisions=("fp16",),
        with_random_twin=False, readout=ReadoutOptions(dim=8),
    )  # fmt: skip
    assert bundle.provenance["validation"] is None
    assert bundle.provenance["precisions"]["fp16"]["knn_top1"] is None
    assert bundle.dim == 8


def test_a_run_of_a_stream_is_exported_like_another(
    run_options: RunOptions, tmp_path: Path
) -> None:
    """Whitening, scores and precisions come of images that are decoded for them."""
    out = tmp_path / "streamed"
    pretrain(run_options(out, epochs=1, data_in="stream", workers=1))
    bundle = export_run(
        RunDirectory(path=out), tmp_path / "bundle", name="x", precisions=("int8",),
        with_random_twin=False, readout=ReadoutOptions(dim=8, fit_images=100),
    )  # fmt: skip
    assert bundle.provenance["readout"]["whitening"]["images"] == 100
    validation = bundle.provenance["validation"]
    plain = validation["readouts"]["trained"]["plain"]
    assert plain == pytest.approx(validation["knn_top1"], abs=1e-6)
    assert bundle.provenance["precisions"]["int8"]["knn_top1"] > 0


def test_a_grid_that_no_map_has_is_refused_as_such(unwatched: RunDirectory, tmp_path: Path) -> None:
    """Also where nothing is fitted or scored, so that the exporter would be the first to see."""
    with pytest.raises(UsageError, match=r"grid of the readout: expected at most 2, the pixels of"):
        export_run(unwatched, tmp_path / "b", name="x", readout=ReadoutOptions(grid=(3,)))


def test_a_model_of_triton_that_may_not_be_written_is_refused_before_the_work(
    tmp_path: Path,
) -> None:
    """There is no run here, and nobody has looked for it."""
    (tmp_path / "repository/cats").mkdir(parents=True)
    options = ExportOptions(
        run=tmp_path / "none", name="cats", triton_repository=tmp_path / "repository"
    )
    with pytest.raises(ExportError, match="expected no model of that name, found something else"):
        main(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_without_a_gpu_is_refused_before_the_work(tmp_path: Path) -> None:
    """The line says what is missing; no image is read for nothing."""
    with pytest.raises(ExportError, match=r"found .*no CUDA device; run this on the machine that"):
        main(ExportOptions(run=tmp_path / "none", tensorrt=True))
