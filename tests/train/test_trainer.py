"""One step: views by rank, the options of the loss, the rates of the groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.backbones import build_network
from train.config import LossOptions, NetworkOptions, PretrainOptions, ViewOptions
from train.device import Compute, DeviceBatch
from train.loss import loss_terms
from train.ranks import Ranks
from train.trainer import LOGGED, Trainer, TwoViews, step_seed, view_recipes
from train.views import Normaliser

RunOptions = Callable[..., PretrainOptions]
CPU = torch.device("cpu")


@pytest.fixture
def options(run_options: RunOptions, tmp_path: Path) -> PretrainOptions:
    """A batch of eight colour images of 16 x 16."""
    return run_options(
        tmp_path, batch_size=8, channels=3, image_size_px=16, optimizer="lars", lr_peak=0.1,
        lr_biases=0.01, views=ViewOptions(crop_area=(0.4, 1.0), blur_probability=(1.0, 0.5)),
    )  # fmt: skip


def make_trainer(options: PretrainOptions) -> Trainer:
    """A trainer of one rank in float32 on the CPU."""
    ones = torch.ones(3, 1, 1)
    return Trainer(
        options,
        steps_per_epoch=5,
        normaliser=Normaliser(mean=0.5 * ones, std=0.25 * ones),
        compute=Compute(device=CPU, precision="fp32"),
        ranks=Ranks(),
    )


def make_batch(*, views: int = 1, step: int = 3) -> DeviceBatch:
    """Eight random images, or so many views of each."""
    draw = torch.Generator().manual_seed(1)
    pixels = [
        torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=draw)
        for _ in range(views)
    ]
    return DeviceBatch(step=step, pixels=tuple(pixels))


@pytest.mark.parametrize("views", [1, 2])
def test_ranks_make_the_views_of_one_process(options: PretrainOptions, views: int) -> None:
    """Each rank's views are, to the bit, its rows of the whole batch's: cut here or before."""
    trainer, batch = make_trainer(options), make_batch(views=views)
    whole = trainer.views(batch)
    for rank in range(4):
        rows = slice(2 * rank, 2 * rank + 2)
        trainer.rows = rows
        mine = trainer.views(replace(batch, pixels=tuple(p[rows] for p in batch.pixels)))
        for part, view in zip(mine, whole, strict=True):
            assert torch.equal(part, view[rows])


def test_views_are_a_function_of_the_step(options: PretrainOptions) -> None:
    """Drawing others in between changes nothing; another step has others."""
    trainer = make_trainer(options)
    first, again, other = (trainer.views(make_batch(step=step))[0] for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_views_that_workers_made_are_only_normalised(options: PretrainOptions) -> None:
    """What comes whole from the threads of a stream is not changed again."""
    views = replace(options.views, views_in="workers")
    trainer, batch = make_trainer(replace(options, views=views)), make_batch(views=2)
    for view, pixels in zip(trainer.views(batch), batch.pixels, strict=True):
        expected = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        torch.testing.assert_close(view, expected)


@pytest.mark.parametrize(
    "loss",
    [
        LossOptions(objective="hsic", lambd=0.3, form="direct"),
        LossOptions(objective="cross-entropy", temperature=0.7),
        LossOptions(terms="redundancy"),
        LossOptions(normalise="features"),
    ],
    ids=["hsic", "cross-entropy", "redundancy", "features"],
)
def test_the_options_of_the_loss_reach_it(options: PretrainOptions, loss: LossOptions) -> None:
    """The loss of a step is that of its embeddings with the options given."""
    options = replace(options, loss=loss)
    outcome = make_trainer(options).step(make_batch())
    terms = loss_terms(
        outcome.z1_ND,
        outcome.z2_ND,
        lambd=options.lambd,
        objective=loss.objective,
        form=loss.form,
        terms=loss.terms,
        normalise=loss.normalise,
        temperature=loss.temperature,
    )
    logged = dict(zip(LOGGED, outcome.logged.tolist(), strict=True))
    assert logged["loss"] == pytest.approx(float(terms.loss))
    assert logged["loss_redundancy"] == pytest.approx(float(terms.redundancy))
    assert logged["c_off_diagonal_rms"] == pytest.approx(float(terms.off_diagonal_rms))


def test_stop_gradient_and_predictor_break_the_symmetry(options: PretrainOptions) -> None:
    """View 2's embedding becomes a constant; view 1's passes the predictor."""
    network = NetworkOptions(
        layout="resnet10", width=8, projector_widths=(16, 16), predictor_width=8
    )
    built = build_network(network, options.channels, options.image_size_px)
    view = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    _, z1_ND, z2_ND = TwoViews(built, stop_gradient=True)(view, view)
    assert z1_ND.requires_grad
    assert not z2_ND.requires_grad
    assert not torch.allclose(z1_ND, z2_ND)
    _, _, z2_ND = TwoViews(built, stop_gradient=False)(view, view)
    assert z2_ND.requires_grad


def test_weights_and_biases_have_rates_of_their_own(options: PretrainOptions) -> None:
    """After the warm-up both are at the peaks that the options give."""
    trainer = make_trainer(options)
    trainer.step(make_batch(step=trainer.warmup_steps - 1))
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.01])


def test_each_view_has_its_half_of_the_probabilities() -> None:
    """Pairs are for view 1 and view 2; everything else is shared."""
    first, second = view_recipes(
        ViewOptions(blur_probability=(1.0, 0.1), interpolation="bicubic", hue=0.2)
    )
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.1)
    assert first == replace(second, blur_probability=1.0)
    assert (first.interpolation, first.hue) == ("bicubic", 0.2)


def test_every_step_has_a_seed_of_its_own() -> None:
    """Seeds of neighbouring steps and runs do not meet."""
    assert len({step_seed(seed, step) for seed in range(10) for step in range(100)}) == 1000


def test_views_made_in_the_recording_are_those_made_before_it(options: PretrainOptions) -> None:
    """A step learns the same from images with parameters as from the views of these."""
    trainer, batch = make_trainer(options), make_batch()
    trainer.is_recorded = True
    assert trainer.makes_views_whole(batch)
    assert not trainer.makes_views_whole(make_batch(views=2))
    made = trainer._whole_views(*trainer._whole(batch))
    for view, expected in zip(made, trainer.views(batch), strict=True):
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)
