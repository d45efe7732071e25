"""Presets: the paper's figures in the preset of the paper, and those of solo-learn's recipe."""

from __future__ import annotations

import pytest

from train.optim import peak_rates
from train.option_groups import OWN_LAYOUTS, LossOptions, NetworkOptions, ViewOptions
from train.presets import PRESETS

PAPER_VIEWS = {
    "crop_area": (0.08, 1.0),
    "interpolation": "bicubic",
    "flip_probability": 0.5,
    "jitter_probability": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grey_probability": 0.2,
    "blur_probability": (1.0, 0.1),
    "blur_sigma_px": (0.1, 2.0),
    "solarise_probability": (0.0, 0.2),
    "views_in": "batch",
}
"""The augmentations of arXiv 2103.03230, section 2.2, and the crops of its code."""


def test_the_papers_preset_is_the_papers() -> None:
    """Section 2.2 of arXiv 2103.03230, figure by figure."""
    options = PRESETS["imagenet-resnet50"]
    assert options.views == ViewOptions(**PAPER_VIEWS)  # type: ignore[arg-type]  # a table
    assert options.network == NetworkOptions(
        layout="resnet50",
        width=64,
        stem="large",
        zero_init_residual=True,
        projector_widths=(8192, 8192, 8192),
        projector_batch_norm=True,
        predictor_width=0,
    )
    assert options.loss == LossOptions(lambd=5e-3)
    assert (options.epochs, options.batch_size, options.warmup_epochs) == (1000, 2048, 10)
    assert (options.image_size_px, options.channels) == (224, 3)
    assert (options.optimizer, options.lars_eta, options.lars_clip) == ("lars", 0.001, False)
    assert options.weight_decay == 1.5e-6


@pytest.mark.parametrize(
    ("batch_size", "rate"),
    [(128, 0.7), (256, 0.4), (512, 0.3), (1024, 0.25), (2048, 0.2), (4096, 0.2)],
)
def test_the_papers_preset_has_its_rate_for_each_batch(batch_size: int, rate: float) -> None:
    """Its batch may be changed alone: the learning rates follow the paper's ablation."""
    options = PRESETS["imagenet-resnet50"]
    rates = peak_rates(
        options.optimizer, batch_size, lr_peak=options.lr_peak, lr_biases=options.lr_biases,
        is_linear=options.lr_scaling == "linear",
    )  # fmt: skip
    assert rates.weights == pytest.approx(rate * batch_size / 256)
    assert rates.biases == pytest.approx(0.0048 * batch_size / 256)


def test_the_papers_preset_writes_its_checkpoints_seldom() -> None:
    """Each has 1.4 GB; by the clock and by the steps of the paper's pace, every half hour."""
    options = PRESETS["imagenet-resnet50"]
    assert (options.checkpoint_every_s, options.checkpoint_every_steps) == (1800, 2500)


def test_the_cifar_preset_takes_the_steps_of_solo_learn() -> None:
    """A loss times .1 moves weights as rates times .1 and a decay over .1 do."""
    options, scale_loss = PRESETS["cifar10-resnet18"], 0.1
    rates = peak_rates(
        options.optimizer, options.batch_size, lr_peak=options.lr_peak,
        lr_biases=options.lr_biases, is_linear=options.lr_scaling == "linear",
    )  # fmt: skip
    assert rates.weights == rates.biases == pytest.approx(0.3 * scale_loss)
    assert options.weight_decay * scale_loss == pytest.approx(1e-4)
    assert (options.optimizer, options.lars_eta, options.lars_clip) == ("lars", 0.02, True)
    assert (options.epochs, options.batch_size, options.warmup_epochs) == (1000, 256, 10)
    assert (options.network.layout, options.network.stem) == ("resnet18", "small")
    assert options.network.projector_widths == (2048, 2048, 2048)
    assert options.image_size_px == 32
    views = PAPER_VIEWS | {"blur_probability": (0.0, 0.0)}
    assert options.views == ViewOptions(**views)  # type: ignore[arg-type]  # a table


def test_presets_are_named_as_they_say() -> None:
    """A run's configuration says which preset it was."""
    assert all(options.preset == name for name, options in PRESETS.items())


def test_own_layouts_are_those_of_the_networks() -> None:
    """The options, which know no torch, list the layouts that there are."""
    from models.networks import LAYOUTS

    assert tuple(LAYOUTS) == OWN_LAYOUTS
