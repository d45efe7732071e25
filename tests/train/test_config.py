"""Options: presets, values that are refused, and what config.json will hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tyro

from models.errors import UsageError
from train.config import (
    LossOptions,
    NetworkOptions,
    PresetName,
    PretrainOptions,
    ViewOptions,
    options_from_json,
    options_json,
)
from train.errors import RunError
from train.presets import PRESETS
from train.pretrain import choose_defaults


@pytest.mark.parametrize(
    ("argv", "preset"),
    [
        (["fashion-mnist"], "fashion-mnist"),
        (["--epochs", "2", "fashion-mnist:train"], "fashion-mnist"),
        (["folder:photos"], "folder"),
        (["folder:photos", "--preset", "fashion-mnist"], "fashion-mnist"),
        (["--preset=folder", "fashion-mnist"], "folder"),
        (["--preset", "no-such", "fashion-mnist"], "folder"),
        ([], "folder"),
        (["folder:photos", "--out", "fashion-mnist"], "folder"),
        (["--network.projector-widths", "8", "8", "--out", "x", "fashion-mnist"], "fashion-mnist"),
        (["fashion-mnist", "--help"], "fashion-mnist"),
        (["fashion-mnist", "--epochs", "0"], "folder"),
    ],
)
def test_the_preset_follows_the_source_unless_named(argv: list[str], preset: str) -> None:
    """`--preset` wins, then the source alone; what does not parse is left to the parser."""
    assert choose_defaults(argv).preset == preset


@pytest.mark.parametrize(
    ("argv", "rates"),
    [
        (["fashion-mnist"], (3e-3, None)),
        (["fashion-mnist", "--optimizer", "adamw"], (3e-3, None)),
        (["fashion-mnist", "--optimizer", "lars"], (None, None)),
        (["folder:x", "--preset", "cifar10-resnet18", "--optimizer=adamw"], (None, None)),
        (["folder:x", "--preset", "cifar10-resnet18", "--optimizer=lars"], (0.03, 0.03)),
    ],
)
def test_a_presets_rates_are_for_its_own_optimizer(
    argv: list[str], rates: tuple[float | None, float | None]
) -> None:
    """Another one starts from its own rule; a rate that is given counts as ever."""
    defaults = choose_defaults(argv)
    assert (defaults.lr_peak, defaults.lr_biases) == rates
    given = tyro.cli(PretrainOptions, args=[*argv, "--lr-peak", ".2"], default=defaults)
    assert given.lr_peak == 0.2


@pytest.mark.parametrize("preset", ["fashion-mnist", "cifar10-resnet18", "imagenet-resnet50"])
def test_a_presets_lambda_is_for_its_own_objective(preset: PresetName) -> None:
    """Another one has its own; one that is given counts as ever."""
    argv = ["folder:x", "--preset", preset, "--loss.objective", "hsic"]
    options = tyro.cli(PretrainOptions, args=argv, default=choose_defaults(argv))
    assert options.lambd == 1 / options.network.projector_widths[-1]
    argv += ["--loss.lambd", ".1"]
    assert tyro.cli(PretrainOptions, args=argv, default=choose_defaults(argv)).lambd == 0.1
    barlow = [*argv[:3], "--loss.objective=barlow"]
    assert choose_defaults(barlow).loss == PRESETS[preset].loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs: expected at least 1, found 0"),
        ({"batch_size": 1}, "--batch-size: expected at least 2, found 1"),
        ({"lr_peak": 0.0}, "--lr-peak: expected a finite number above 0, found 0.0"),
        ({"lr_biases": -1.0}, "--lr-biases: expected a finite number above 0, found -1.0"),
        ({"lars_eta": 0.0}, "--lars-eta: expected a finite number above 0, found 0.0"),
        ({"threads": 0}, "--threads: expected at least 1, found 0"),
        ({"workers": 0}, "--workers: expected at least 1, found 0"),
        ({"lr_peak": math.inf}, "--lr-peak: expected a finite number above 0, found inf"),
        ({"warmup_epochs": math.inf}, "--warmup-epochs: expected a finite number, found inf"),
        ({"seed": 2**64}, f"--seed: expected at most {2**64 - 1}, found {2**64}"),
    ],
)
def test_a_senseless_value_is_named(changes: dict[str, float], message: str) -> None:
    """The option, what it may be, and what it was."""
    with pytest.raises(UsageError) as error:
        PretrainOptions(source="x", **changes)  # type: ignore[arg-type]  # any option
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_area": (0.5, 0.2)}, "--views.crop-area: expected 0 < low <= high <= 1, found"),
        ({"hue": 0.6}, "--views.hue: expected 0 to .5, found 0.6"),
        ({"blur_probability": (0.1, 1.1)}, "--views.blur-probability: expected 0 to 1, found"),
        ({"contrast": -0.1}, "--views.contrast: expected 0 to 1, found -0.1"),
        ({"blur_sigma_px": (0.1, math.inf)}, "--views.blur-sigma-px: expected 0 < low <= high, "),
    ],
)
def test_a_senseless_view_is_named(changes: dict[str, object], message: str) -> None:
    """View options are checked as the others are."""
    with pytest.raises(UsageError) as error:
        ViewOptions(**changes)  # type: ignore[arg-type]  # any option
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 7}, "--network.width: expected at least 8, found 7"),
        ({"projector_widths": ()}, "--network.projector-widths: expected one or more widths,"),
        ({"predictor_width": -1}, "--network.predictor-width: expected at least 0, found -1"),
        (
            {"layout": "resnet19"},
            "--network.layout: expected resnet10, resnet18, resnet34, resnet50, resnet101, "
            "torchvision:NAME or timm:NAME, found 'resnet19'; did you mean resnet18 or resnet10",
        ),
        ({"layout": "tim:vit"}, "--network.layout: expected resnet10, resnet18, resnet34, "),
        ({"layout": "timm:"}, "--network.layout: expected resnet10, resnet18, resnet34, "),
    ],
)
def test_a_senseless_network_is_named(changes: dict[str, object], message: str) -> None:
    """A layout of another name is answered with those that come close."""
    with pytest.raises(UsageError) as error:
        NetworkOptions(**changes)  # type: ignore[arg-type]  # any option
    assert str(error.value).startswith(message)


def test_a_misspelt_library_is_guessed() -> None:
    """`tim:` is close to timm."""
    with pytest.raises(UsageError, match=r"found 'tim'; did you mean timm\?$"):
        NetworkOptions(layout="tim:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambd": -1.0}, "--loss.lambd: expected finite, at least 0, found -1.0"),
        ({"lambd": math.inf}, "--loss.lambd: expected finite, at least 0, found inf"),
        ({"temperature": 0.0}, "--loss.temperature: expected a finite number above 0, found 0.0"),
        (
            {"objective": "cross-entropy", "form": "gram"},
            "--loss.form: expected auto or direct for cross-entropy with normalise batch, "
            "found gram",
        ),
        (
            {"normalise": "features", "form": "tiled"},
            "--loss.form: expected auto or direct for barlow with normalise features, found tiled",
        ),
    ],
)
def test_a_senseless_loss_is_named(changes: dict[str, object], message: str) -> None:
    """Loss options are checked as the others are."""
    with pytest.raises(UsageError) as error:
        LossOptions(**changes)  # type: ignore[arg-type]  # any option
    assert str(error.value) == message


def test_lambda_is_the_objectives_own_unless_given() -> None:
    """.005 for barlow, 1/D for hsic as published; a given one stands, 0 as well."""
    network = NetworkOptions(projector_widths=(64, 128))

    def lambd_of(loss: LossOptions) -> float:
        return PretrainOptions(network=network, loss=loss).lambd

    assert lambd_of(LossOptions()) == 5e-3
    assert lambd_of(LossOptions(objective="hsic")) == 1 / 128
    assert lambd_of(LossOptions(objective="hsic", lambd=0.0)) == 0.0


def test_a_path_to_start_from_survives_json() -> None:
    """It is text in config.json and a path in the options."""
    options = PretrainOptions(source="x", init_from=Path("runs/a"), show_views=Path("v.png"))
    kept = options_json(options)
    assert kept["init_from"] == "runs/a"
    assert "show_views" not in kept
    assert options_from_json(kept).init_from == Path("runs/a")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: str(preset.preset))
def test_options_survive_json(preset: PretrainOptions) -> None:
    """What a run keeps is what a resume compares, to the value."""
    kept = options_json(preset)
    assert json.loads(json.dumps(kept)) == kept
    assert kept["network.width"] == preset.network.width
    assert not {"out", "resume"} & kept.keys()
    assert options_from_json(kept) == preset


def test_options_of_another_version_are_refused() -> None:
    """A run of a Horace with other options is not guessed at."""
    with pytest.raises(RunError, match=r"expected those of this Horace, found .*'no_such'"):
        options_from_json({"no_such": 1})


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("fashion-mnist", "artifacts/runs/fashion-mnist"),
        ("folder:/data/birds/", "artifacts/runs/birds"),
        ("wds:/data/shard-{000..009}.tar", "artifacts/runs/shard"),
        ("wds:/data/birds/*.tar", "artifacts/runs/birds"),
        ("wds:*.tar", "artifacts/runs/run"),
    ],
)
def test_the_run_is_named_after_its_source(source: str, path: str) -> None:
    """Without `--out` the last part of the source names the directory, and no pattern does."""
    assert PretrainOptions(source=source).run_path == Path(path)
