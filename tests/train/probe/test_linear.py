"""A linear layer on a frozen encoder: what stands beside it, and what is refused."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.bundle import Bundle, read_bundle
from models.errors import SourceError, UsageError
from models.images import open_source
from tests.train.probe.probing import Events, WatchedSource, opened, top1
from train.errors import TrainError
from train.probe import linear as linear_probe
from train.probe import linear_layers
from train.probe.__main__ import run as run_probe
from train.probe.labelled import record_classes
from train.probe.linear_layers import fit_layers
from train.probe.options import LinearOptions, SgdOptions
from train.probe.probed import Probed, RunEncoder
from train.probe.report import as_text, score, score_classes


def test_a_linear_probe_stands_beside_its_baselines(linear: LinearOptions, run: Probed) -> None:
    """Encoder, untrained twin and pixels, each above chance, at the optimum of its own C."""
    report = linear_probe.evaluate_linear(linear, run)
    assert [row.name for row in report.rows] == [
        "encoder", "random encoder", "whitened pixels", "raw pixels"
    ]  # fmt: skip
    assert [row.dim for row in report.rows] == [64, 64, 196, 196]
    for row in report.rows:
        assert row.top1 is not None
        assert row.top5 is not None
        assert 0.25 < row.top1.mean < row.top5.mean <= 1, row.name
        assert isinstance(row.chosen["gradient"], float)
        assert row.chosen["gradient"] <= 1e-4, row.name
    assert sum(one.n for one in report.per_class) == 200
    assert (report.split["fitted_on"], report.split["held_out"]) == (360, 40)
    assert report.images["images"] == 400
    assert report.images["sha256"] != report.test["sha256"]
    assert report.notes == ["0 test images are training images pixel for pixel"]
    json.dumps(report.to_json(), allow_nan=False)
    text = as_text(report)
    assert text.startswith(f"linear: {100 * top1(report, 'encoder'):.2f}% top-1 on 200 images")
    assert f"\n  trained on 400 labelled images of {linear.images}\n" in text
    assert "random encoder: the same network and readout, untrained" in text
    rows = [line for line in text.splitlines() if line.startswith("  raw pixels")]
    assert rows[0].endswith(f" C {report.rows[-1].chosen['C']:.4g}"), "nothing else of the choice"


def test_too_few_images_for_a_linear_layer_are_told(
    linear: LinearOptions, finished_run: Path
) -> None:
    """And what judges by few, instead."""
    few = replace(linear, baselines=False, stages=(2, 3, 4), grid=2)
    with closing(opened(finished_run, stages=(2, 3, 4), grid=2)) as probed:
        report = linear_probe.evaluate_linear(few, probed)
    dim = report.rows[0].dim
    assert dim is not None
    assert dim > 400
    assert report.notes[-1].startswith(f"400 labelled images are fewer than {dim} dimensions, too")


def test_a_bundle_gives_what_its_run_gives(
    linear: LinearOptions, run: Probed, bundle: Bundle
) -> None:
    """The same features under ONNX Runtime and under torch lead to the same figures."""
    options = replace(linear, baselines=False)
    of_run = linear_probe.evaluate_linear(options, run)
    with closing(opened(bundle.path)) as probed:
        of_bundle = linear_probe.evaluate_linear(options, probed)
    assert top1(of_bundle, "encoder") == pytest.approx(top1(of_run, "encoder"), abs=0.02)
    assert of_bundle.images == of_run.images
    assert of_bundle.encoder["fingerprint"] == bundle.fingerprint


def test_the_frozen_encoder_stays_as_it_was(linear: LinearOptions, finished_run: Path) -> None:
    """Weights and BatchNorm's statistics are the same to the bit, also with augmentation."""
    options = replace(linear, solver="sgd", augment=True, sgd=SgdOptions(epochs=2), baselines=False)
    with closing(opened(finished_run)) as probed:
        assert isinstance(probed.encoder, RunEncoder)
        graph = probed.encoder.graph
        before = {name: value.clone() for name, value in graph.state_dict().items()}
        report = linear_probe.evaluate_linear(options, probed)
        assert not graph.training
        assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())
    assert any("running_mean" in name for name in before)
    assert report.settings["augmentation"] == linear_probe.AUGMENTATION
    assert top1(report, "encoder") > 0.15


def test_the_readout_of_a_run_is_a_choice(linear: LinearOptions, finished_run: Path) -> None:
    """Several stages on a grid give their dimensions, to the twin, too."""
    with closing(opened(finished_run, stages=(2, 4), grid=2)) as probed:
        assert probed.twin is not None
        assert probed.encoder.dim == probed.twin.dim == (16 + 64) * 4
    with pytest.raises(UsageError, match="expected different numbers of 1 to 4, found 5"):
        opened(finished_run, stages=(5,))


def test_a_network_that_diverged_is_right_about_nothing() -> None:
    """Scores that are not numbers count as wrong, not as ties."""
    scores_NC = np.full((4, 3), np.nan)
    scores_NC[0] = (0.1, 0.9, 0.0)
    truth_N = np.array([1, 0, 1, 2])
    found = score(scores_NC, truth_N)
    assert (found.top1, found.top5) == (0.25, 0.25)
    classes = score_classes(scores_NC, truth_N, ["a", "b", "c"])
    assert [(one.n, one.accuracy, one.n_confused) for one in classes] == [
        (1, 0.0, 0), (2, 0.5, 0), (1, 0.0, 0)
    ]  # fmt: skip


def test_a_test_set_that_is_not_there_ends_it_at_once(
    linear: LinearOptions, run: Probed, events: Events
) -> None:
    """A misspelt name is found before anything is computed."""
    with pytest.raises(SourceError, match=r"images 'fashoin-mnist': .* nothing of that name; ch"):
        linear_probe.evaluate_linear(replace(linear, test="fashoin-mnist"), run)
    assert events == []


def test_a_class_that_was_not_drawn_keeps_its_number(linear: LinearOptions, run: Probed) -> None:
    """The layers of a transfer count classes as its networks do: all of the source's."""
    class_names, labels_N = record_classes(open_source(linear.images))
    rows = np.flatnonzero(labels_N != 0)[:100]
    layers = fit_layers(replace(linear, baselines=False), run, rows, class_names)
    assert list(layers.train.class_names) == class_names
    np.testing.assert_array_equal(layers.train.labels_N, labels_N[rows])
    alone = np.flatnonzero(labels_N == 0)[:20]
    with pytest.raises(TrainError, match=rf"expected two classes or more, found {class_names[0]}"):
        fit_layers(replace(linear, baselines=False), run, alone, class_names)


def test_crops_of_what_is_no_run_are_refused_before_an_image_is_read(
    linear: LinearOptions, make_bundle: Callable[..., Bundle], events: Events,
    monkeypatch: pytest.MonkeyPatch, test_source: str,
) -> None:  # fmt: skip
    """Reading and embedding a large set may take hours."""
    encoder = make_bundle()
    watched = WatchedSource(open_source(test_source), events)
    monkeypatch.setattr(linear_layers, "open_source", lambda uri: watched)
    options = replace(linear, encoder=str(encoder.path), solver="sgd", augment=True)
    message = r"^--augment: expected a run, found encoder "
    with closing(opened(encoder.path)) as probed, pytest.raises(UsageError, match=message):
        linear_probe.evaluate_linear(options, probed)
    assert events == []


def test_one_image_a_class_is_refused_before_an_image_is_read(
    linear: LinearOptions, run: Probed, tmp_path: Path, events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """There is nothing to choose C on; the paper's recipe needs no choice."""
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (14, 14), 99 * (name == "a")).save(tmp_path / name / "0.png")
    watched = WatchedSource(open_source(str(tmp_path)), events)
    monkeypatch.setattr(linear_layers, "open_source", lambda uri: watched)
    options = replace(linear, images=str(tmp_path), baselines=False)
    message = "expected a class of two images, to choose C on, found one image a class"
    with pytest.raises(TrainError, match=message):
        linear_probe.evaluate_linear(options, run)
    assert events == []
    (tmp_path / "a/1.png").write_bytes(b"no image")
    with pytest.raises(TrainError, match=message):
        linear_probe.evaluate_linear(options, run)
    sgd = replace(options, solver="sgd", sgd=SgdOptions(epochs=1))
    assert linear_probe.evaluate_linear(sgd, run).images["images"] == 2


def test_a_report_is_kept_with_its_bundle(
    linear: LinearOptions, make_bundle: Callable[..., Bundle], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`--record` puts it into bundle.json, `--out` into a file, `--json` on the screen."""
    bundle = make_bundle()
    out = tmp_path / "report.json"
    command = ["linear", str(bundle.path), "--images", linear.images, "--test", linear.test]
    flags = ["--record", "--json", "--out", str(out), "--threads", "1", "--c", "0.01", "1"]
    assert run_probe([*command, *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == shown
    kept = read_bundle(bundle.path).provenance["evaluations"]
    assert isinstance(kept, dict)
    assert kept["linear"] == shown
    assert shown["rows"][-1]["name"] == "random encoder"
    assert shown["rows"][-1]["top1"] is None
    assert "no random.onnx" in shown["rows"][-1]["note"]
    assert read_bundle(bundle.path).fingerprint == bundle.fingerprint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # stops root, too
    try:
        status = run_probe([*command, "--record", "--no-baselines", "--threads", "1", "--c", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out.startswith("linear: ")
    assert captured.err.splitlines()[-1] == (
        f"python -m train.probe linear: {bundle.path}: expected a directory that can be written, "
        "with room for what comes, found File too large; make it writable, or keep the report "
        "elsewhere with --out"
    )
    assert run_probe([*command, "--no-baselines", "--c", "1", "--out", "/dev/null/x"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("linear: ")
    assert "--out /dev/null/x: expected a file that can be written, found" in captured.err
    assert read_bundle(bundle.path).provenance["evaluations"] == kept
