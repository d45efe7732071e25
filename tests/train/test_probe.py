"""The probes end to end on 400 real images: rules that hold, figures that stand beside."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.bundle import Bundle, read_bundle
from models.errors import SourceError, UsageError
from models.images import ImageData, ImageRecord, ImageSource, open_source
from train.data import memory
from train.device import Compute
from train.errors import TrainError
from train.probe import arms, linear_layers
from train.probe import finetune as finetune_probe
from train.probe import linear as linear_probe
from train.probe import transfer as transfer_probe
from train.probe.__main__ import run as run_probe
from train.probe.few_labels import draw_labels, read_budget
from train.probe.labelled import record_classes
from train.probe.linear_layers import fit_layers
from train.probe.options import (
    DistilOptions,
    FinetuneOptions,
    LinearOptions,
    RecipeOptions,
    SgdOptions,
    TransferOptions,
)
from train.probe.probed import Probed, RunEncoder, open_probed
from train.probe.report import ProbeReport, as_text, score, score_classes
from train.probe.transfer import BUNDLE_READOUT

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/data/fashion-mnist-mini"
CPU = Compute(device=torch.device("cpu"), precision="fp32")
QUICK = RecipeOptions(
    epochs=(2,), lr_head=(3e-3,), lr_backbone=(1e-3, 1e-4), scratch_epochs=(2,),
    scratch_lr=(1e-3, 3e-3), batch_size=16,
    smallest_crop=(0.8,),
)  # fmt: skip

Events = list[str]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Commands set torch's threads; so small networks are faster on one, on shared cores far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def test_source() -> str:
    """200 test images of Fashion-MNIST, with labels."""
    return f"idx:{MINI / 't10k-images-idx3-ubyte.gz'},{MINI / 't10k-labels-idx1-ubyte.gz'}"


def opened(where: Path, **options: object) -> Probed:
    """Open a run or a bundle on one thread."""
    return open_probed(str(where), device=CPU.device, threads=1, **options)  # type: ignore[arg-type]  # cases


@pytest.fixture
def run(finished_run: Path) -> Iterator[Probed]:
    """The finished run, opened."""
    with closing(opened(finished_run)) as probed:
        yield probed


@pytest.fixture
def linear(finished_run: Path, mini_source: str, test_source: str) -> LinearOptions:
    """Options of a linear probe of the run."""
    return LinearOptions(encoder=str(finished_run), images=mini_source, test=test_source)


@pytest.fixture
def finetune(finished_run: Path, mini_source: str, test_source: str) -> FinetuneOptions:
    """Options of fine-tuning the run on a quarter of its labels, in seconds."""
    return FinetuneOptions(
        run=finished_run, images=mini_source, test=test_source, labels=0.25, seeds=(0, 1),
        recipe=QUICK,
    )  # fmt: skip


class WatchedSource:
    """A source that notes when one of its images is read."""

    def __init__(self, source: ImageSource, events: Events) -> None:
        self._source, self._events = source, events
        self.uri = source.uri

    def count(self) -> int | None:
        """Count."""
        return self._source.count()

    def load(self, key: str) -> ImageData:
        """Load."""
        return self._source.load(key)

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """Yield, and note every reading."""
        for record in self._source.records(start):

            def read(record: ImageRecord = record) -> ImageData:
                self._events.append("test image")
                return record.read()

            yield ImageRecord(record.key, record.label, read)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, test_source: str) -> Events:
    """What was read and fitted, in its order; test images come from a watched source."""
    found: Events = []

    def watched(uri: str) -> ImageSource:
        source = open_source(uri)
        return WatchedSource(source, found) if uri == test_source else source

    for module in (linear_probe, finetune_probe, transfer_probe):
        monkeypatch.setattr(module, "open_source", watched)
    fit = linear_layers.fit

    def noted_fit(*arguments: object) -> object:
        made = fit(*arguments)  # type: ignore[arg-type]  # passed on
        found.append("layer fitted")
        return made

    monkeypatch.setattr(linear_layers, "fit", noted_fit)
    train_arm = arms.train_arm

    def noted_arm(*arguments: object) -> object:
        made = train_arm(*arguments)
        found.append("arm trained")
        return made

    monkeypatch.setattr(arms, "train_arm", noted_arm)
    return found


def top1(report: ProbeReport, name: str) -> float:
    """Find the figure of a row."""
    spread = next(row.top1 for row in report.rows if row.name == name)
    assert spread is not None
    return spread.mean


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


def test_no_test_image_is_read_before_all_is_chosen(
    linear: LinearOptions, finetune: FinetuneOptions, run: Probed, events: Events
) -> None:
    """Layers and arms come first; then every test image is read, each once."""
    linear_probe.evaluate_linear(linear, run)
    assert events == ["layer fitted"] * 4 + ["test image"] * 200
    events.clear()
    finetune_probe.evaluate_finetune(finetune, run, CPU)
    assert events == ["arm trained"] * 4 + ["test image"] * 200
    events.clear()
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.test, labels=0.25,
        recipe=QUICK,
    )  # fmt: skip
    report = transfer_probe.evaluate_transfer(transfer, run, CPU)
    assert events == ["layer fitted"] * 4 + ["arm trained"] * 2 + ["test image"] * 200
    assert [row.name for row in report.rows] == [
        "fine-tuned", "from scratch", "linear, encoder", "linear, random encoder",
        "linear, whitened pixels", "linear, raw pixels",
    ]  # fmt: skip
    assert report.images["images"] == 100
    assert {"c_grid", "labels", "epochs", "precision"} <= report.settings.keys()


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


@pytest.mark.parametrize("validation", ["labels", "train"])
def test_fine_tuning_stands_beside_the_same_network_from_scratch(
    finetune: FinetuneOptions, run: Probed, validation: str
) -> None:
    """Both arms have the same labels and held-out images, and say what they chose from what."""
    options = replace(finetune, validation=validation, val_images=50)
    report = finetune_probe.evaluate_finetune(options, run, CPU)
    tuned, scratch, *layers = report.rows
    assert (tuned.name, scratch.name) == ("fine-tuned", "from scratch")
    assert [row.name for row in layers] == ["frozen, linear layer", "random, linear layer"]
    for row, names in ((tuned, {"lr_backbone"}), (scratch, {"lr_head", "lr_backbone"})):
        tried = row.chosen["tried"]
        assert isinstance(tried, list)
        assert len(tried) == 2
        assert all(isinstance(one, dict) and one.keys() == {*names, "val_top1"} for one in tried)
        assert row.top1 is not None
        assert len(row.top1.values) == 2
    assert report.difference is not None
    assert report.difference.mean == pytest.approx(tuned.top1.mean - scratch.top1.mean)
    assert report.images["labels_by_seed"] == {"0": 100, "1": 100}
    read = report.images["images"]
    assert isinstance(read, int)
    if validation == "labels":
        assert (report.split["fitted_on"], report.split["held_out"]) == (80, 20)
        assert 100 < read <= 200
    else:
        assert (report.split["fitted_on"], report.split["held_out"]) == (100, 50)
        assert 150 < read <= 250
    text = as_text(report)
    assert f"trained on 100 labelled images a seed ({read} read) of {finetune.images}\n" in text
    assert "points of top-1 above from scratch, seeds 0, 1" in text
    fewer = replace(report, images={**report.images, "labels_by_seed": {"0": 100, "1": 98}})
    assert "trained on 98 to 100 labelled images a seed" in as_text(fewer)


def test_fine_tuning_twice_gives_the_same_figures(finetune: FinetuneOptions, run: Probed) -> None:
    """Labels, initial weights, order and views are functions of the seed."""
    one, other = (
        finetune_probe.evaluate_finetune(replace(finetune, seeds=(3,)), run, CPU) for _ in range(2)
    )
    assert [row.top1 for row in one.rows] == [row.top1 for row in other.rows]
    assert [row.chosen for row in one.rows] == [row.chosen for row in other.rows]


def test_too_few_labels_are_refused(finetune: FinetuneOptions, run: Probed) -> None:
    """Each class needs two: one to learn from, one to choose by."""
    with pytest.raises(TrainError, match=r"each of 10 classes two labels .* found 0.01, which is"):
        finetune_probe.evaluate_finetune(replace(finetune, labels=0.01), run, CPU)


def test_a_bundle_is_trained_further_without_its_run(
    finetune: FinetuneOptions, bundle: Bundle, run: Probed
) -> None:
    """The network is had back from the graph: every row does about as that of the run does."""
    of_run = finetune_probe.evaluate_finetune(finetune, run, CPU)
    with closing(opened(bundle.path)) as probed:
        options = replace(finetune, run=bundle.path)
        of_bundle = finetune_probe.evaluate_finetune(options, probed, CPU)
        transfer = TransferOptions(
            encoder=str(bundle.path), images=finetune.images, test=finetune.test, labels=0.25,
            recipe=QUICK, baselines=False, stages=(2,), grid=2,
        )  # fmt: skip
        transferred = transfer_probe.evaluate_transfer(transfer, probed, CPU)
    assert [row.name for row in of_bundle.rows] == [row.name for row in of_run.rows]
    for row in of_bundle.rows:
        assert top1(of_bundle, row.name) == pytest.approx(top1(of_run, row.name), abs=0.05)
    assert [row.name for row in transferred.rows] == ["fine-tuned", "linear, encoder"]
    assert [row.note for row in transferred.rows] == ["", BUNDLE_READOUT]
    assert (transferred.settings["stages"], transferred.settings["grid"]) == ([2], 2)
    assert transferred.rows[1].dim == bundle.output.dim


def test_a_transfer_names_all_images_that_it_learned_from(
    finetune: FinetuneOptions, run: Probed
) -> None:
    """Those of every seed and those held out are hashed, and looked for in the test images."""
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.images, labels=0.25,
        seeds=(0, 1), validation="train", val_images=50, recipe=QUICK, baselines=False,
    )  # fmt: skip
    report = transfer_probe.evaluate_transfer(transfer, run, CPU)
    _, images, draw = read_budget(transfer, run.encoder)
    assert len(draw.used) > 150
    assert report.images["sha256"] == images.sha256
    assert report.images["labels_by_seed"] == {"0": 100, "1": 100}
    of_layers = report.images["linear"]
    assert isinstance(of_layers, dict)
    taught = np.union1d(draw.by_seed[0], draw.by_seed[1])
    assert 100 < len(taught) == of_layers["images"]
    assert of_layers["labels_by_seed"] == {"0": 100, "1": 100}
    assert of_layers["sha256"] != images.sha256
    assert report.notes == [f"{len(draw.used)} test images are training images pixel for pixel"]
    text = as_text(report)
    assert f"trained on 100 labelled images a seed ({len(draw.used)} read) of" in text


def test_every_row_of_a_transfer_is_over_all_seeds(finetune: FinetuneOptions, run: Probed) -> None:
    """Linear layers, too, are fitted on the labels of each; the first seed's C is every seed's."""
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.test, labels=0.25,
        seeds=(0, 1),
        recipe=replace(
            QUICK, epochs=(1,), lr_backbone=(1e-3,), scratch_epochs=(1,), scratch_lr=(1e-3,)
        ),
    )  # fmt: skip
    report = transfer_probe.evaluate_transfer(transfer, run, CPU)
    assert len(report.rows) == 6
    for row in report.rows:
        assert row.top1 is not None
        assert row.top5 is not None
        assert len(row.top1.values) == len(row.top5.values) == 2, row.name
    alone = transfer_probe.evaluate_transfer(replace(transfer, seeds=(0,)), run, CPU)
    for row, first in zip(report.rows[2:], alone.rows[2:], strict=True):
        assert row.top1 is not None
        assert first.top1 is not None
        assert row.top1.values[0] == first.top1.mean
        assert row.chosen["C"] == first.chosen["C"]


def test_a_run_that_trains_on_may_delete_what_was_opened(
    finetune: FinetuneOptions, finished_run: Path, tmp_path: Path
) -> None:
    """The trained weights are read when the run is opened, for every arm, recipe and seed."""
    where = tmp_path / "run"
    shutil.copytree(finished_run, where)
    options = replace(finetune, run=where)
    with closing(opened(where)) as probed:
        for checkpoint in (where / "checkpoints").iterdir():
            checkpoint.unlink()
        report = finetune_probe.evaluate_finetune(options, probed, CPU)
    assert [row.name for row in report.rows][:1] == ["fine-tuned"]


def test_too_many_images_end_it_before_anything_is_trained(
    finetune: FinetuneOptions, linear: LinearOptions, run: Probed, events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Those of the test set, and those that are cropped anew, are counted at the start."""
    read = len(draw_labels(record_classes(open_source(finetune.images))[1], finetune).used)
    fits = 200 + read + 100 - 1  # each set alone, and any two
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: (fits + 0.5) * 14 * 14 / 0.4)
    with_unlabelled = replace(
        finetune, unlabelled=finetune.images, distil=DistilOptions(images=100)
    )
    message = (
        rf"{fits} images of 14x14 here, found {read} \+ 200 \+ 100 \({(fits + 1) * 196:,} bytes"
    )
    with pytest.raises(TrainError, match=message):
        finetune_probe.evaluate_finetune(with_unlabelled, run, CPU)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: (200 + read - 0.5) * 14 * 14 / 0.4)
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.test, labels=0.25,
        seeds=finetune.seeds,
    )  # fmt: skip
    with pytest.raises(TrainError, match=rf"14x14 here, found {read} \+ 200 \("):
        transfer_probe.evaluate_transfer(transfer, run, CPU)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 100 * 14 * 14)
    options = replace(linear, solver="sgd", augment=True)
    with pytest.raises(TrainError, match=r"expected at most 40 images of 14x14 here, found 400 \("):
        linear_probe.evaluate_linear(options, run)
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


def test_a_bundle_of_another_maker_has_the_linear_layer_alone(
    linear: LinearOptions, make_bundle: Callable[..., Bundle]
) -> None:
    """Transfer leaves the networks out and says so."""
    encoder = str(make_bundle().path)
    options = TransferOptions(
        encoder=encoder, images=linear.images, test=linear.test, labels=0.25, baselines=False
    )
    with closing(opened(Path(encoder))) as probed:
        report = transfer_probe.evaluate_transfer(options, probed, CPU)
    assert [row.name for row in report.rows] == ["linear, encoder"]
    assert "its network cannot be trained further" in report.notes[-1]
    assert report.settings.keys() == {"solver", "features", "c_grid", "labels", "balanced"}


def test_a_readout_that_nothing_has_is_refused(
    linear: LinearOptions, make_bundle: Callable[..., Bundle]
) -> None:
    """A linear layer on a bundle has the bundle's; so has a transfer where nothing is trained."""
    encoder = str(make_bundle().path)
    chosen = replace(linear, encoder=encoder, stages=(2,), grid=2)
    transfer = TransferOptions(encoder=encoder, images=linear.images, test=linear.test, grid=2)
    with closing(opened(Path(encoder))) as probed:
        with pytest.raises(UsageError) as refused:
            linear_probe.evaluate_linear(chosen, probed)
        assert str(refused.value) == (
            f"--stages: expected a run, whose readout is chosen here, found {encoder}, which has "
            "a readout of its own; leave the option out, or name a run"
        )
        with pytest.raises(UsageError, match=r"^--grid: expected a run, whose readout"):
            transfer_probe.evaluate_transfer(transfer, probed, CPU)


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


def test_unlabelled_images_add_students_beside_their_teachers(
    finetune: FinetuneOptions, run: Probed, events: Events
) -> None:
    """The network pretrained and the one from scratch, both distilled, before a test image."""
    options = replace(
        finetune, unlabelled=finetune.images, validation="train", val_images=50,
        distil=DistilOptions(epochs=1, images=100, batch_size=32),
    )  # fmt: skip
    report = finetune_probe.evaluate_finetune(options, run, CPU)
    assert [row.name for row in report.rows] == [
        "self-distilled", "fine-tuned", "from scratch", "frozen, linear layer",
        "random, linear layer", "from scratch, self-distilled",
    ]  # fmt: skip
    assert events == ["arm trained"] * 4 + ["test image"] * 200
    assert report.difference is not None
    assert report.against == "from scratch"
    gain = top1(report, "self-distilled") - top1(report, "from scratch")
    assert report.difference.mean == pytest.approx(gain)
    notes = {row.name: row.note for row in report.rows}
    assert re.fullmatch(
        r"taught by 'frozen, linear layer' on (\d+) unlabelled images", notes["self-distilled"]
    )
    distil = report.settings["distil"]
    assert isinstance(distil, dict)
    assert distil["images"] == 100
    assert report.notes[:2] == [
        "0 test images are training images pixel for pixel",
        "0 test images are among the unlabelled ones pixel for pixel",
    ]
    alone = finetune_probe.evaluate_finetune(replace(options, baselines=False), run, CPU)
    assert "from scratch" not in [row.name for row in alone.rows]
    assert alone.rows[0].top1 == report.rows[0].top1
    assert alone.against is None


def test_test_images_that_were_learned_from_without_a_label_are_counted(
    finetune: FinetuneOptions, run: Probed
) -> None:
    """By their pixels; the student has seen them all the same."""
    recipe = replace(QUICK, epochs=(1,), lr_backbone=(1e-3,), scratch_epochs=(1,))
    options = replace(
        finetune, unlabelled=finetune.test, seeds=(0,), baselines=False, recipe=recipe,
        distil=DistilOptions(epochs=1, images=150),
    )  # fmt: skip
    report = finetune_probe.evaluate_finetune(options, run, CPU)
    assert "150 test images are among the unlabelled ones pixel for pixel" in report.notes
    assert "150 test images are among the unlabelled ones" in as_text(report)


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


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        ("", 2, "kind of probe: expected linear, finetune or transfer, found none; see"),
        ("best", 2, "found 'best'; see python -m train.probe --help"),
        ("linear {run} --images a --test b --c 0", 2, "--c: expected finite numbers above 0, fo"),
        ("linear {run} --images a --test b --c 1 inf", 2, "--c: expected finite numbers above 0,"),
        ("linear {run} --images a --test b --augment", 2, "--augment: expected --solver sgd, foun"),
        ("linear {run} --images a --test b --record", 2, "--record: expected an encoder that is"),
        ("linear {none} --images a --test b", 1, "expected a bundle directory, found no such"),
        ("finetune {none} --images a --test b", 1, "expected a run directory, found no such dir"),
        ("transfer {none} --images a --test b", 1, "expected a bundle directory, found no such"),
        ("finetune {run} --images a --test b --labels 2", 2, "--labels: expected more than 0, at"),
        (
            "finetune {run} --images a --test b --distil.lr 0",
            2,
            "--distil.lr: expected a finite number above 0, found 0.0",
        ),
        (
            "finetune {run} --images a --test b --distil.temperature inf",
            2,
            "--distil.temperature: expected a finite number above 0, found inf",
        ),
        ("finetune {run} --images a --test b --seeds 1 1", 2, "--seeds: expected different num"),
        (
            "finetune {run} --images a --test b --recipe.epochs 0",
            2,
            "--recipe.epochs: expected at least 1, found (0,)",
        ),
        (
            "finetune {run} --images a --test b --recipe.weight-decay -1",
            2,
            "--recipe.weight-decay: expected at least 0, found -1",
        ),
    ],
)
def test_bad_input_is_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    command: str, status: int, line: str,
) -> None:  # fmt: skip
    """What was wrong, what was expected, what was found; 2 for bad use, 1 for failed work."""
    argv = command.format(run=finished_run, none=tmp_path / "none").split()
    assert run_probe(argv) == status
    captured = capsys.readouterr()
    assert line in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_help_loads_no_torch() -> None:
    """Options are shown at once; torch takes seconds to load."""
    code = (
        "import sys, contextlib, train.probe.__main__\n"
        "with contextlib.suppress(SystemExit): train.probe.__main__.run(['finetune', '--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--recipe.lr-backbone" in shown.stdout


def test_the_paper_recipe_is_the_papers() -> None:
    """20 epochs, .5 for the layer, .002 for the backbone, a fifth at epochs 12 and 16, no decay."""
    from train.probe.classifier import lr_share
    from train.probe.few_labels import finetune_recipes, resolve

    options = FinetuneOptions(run=Path("r"), images="a", test="b", preset="paper")
    (recipe,) = finetune_recipes(resolve(options))
    assert (recipe.epochs, recipe.lr_head, recipe.lr_backbone) == (20, 0.5, 0.002)
    assert (recipe.weight_decay, recipe.head_c, recipe.label_smoothing) == (0, None, 0)
    shares = [lr_share(recipe, step, 20) for step in range(20)]
    np.testing.assert_allclose(shares, [1.0] * 12 + [0.2] * 4 + [0.04] * 4)
