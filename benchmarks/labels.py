"""Few labels: a pretrained network fine-tuned, against the same network from scratch.

The claim of arXiv 2103.03230, section 3.2, at the scale of two cores: Fashion-MNIST, 1% and
10% of the labels (600 and 6,000, as many of each class), three seeds that each draw labels,
random weights and order.

What is the same for all rows: the network, its readout (all stages on a 4 x 4 grid), the
labels of a seed, batch, augmentation, label smoothing, weight decay, arithmetic, and the 5,000
other labelled training images on which each row chooses its settings, with the labels of the
first seed. From scratch has the longer schedule and more learning rates to choose from.

The first row is fine-tuned by self-distillation (decision 0023) on training images without
their labels, none of them held out; how, was found on the held-out images. Since it sees what
the row from scratch does not, that one, too, is distilled by itself on the same images in the
same way. The test images are read when every network has been trained.

Training takes hours on one core: with `--keep DIR` what has been trained lies there, and the
same command goes on where it was.

Run from the root:
`python -m benchmarks.labels --keep artifacts/bench/labels --out benchmarks/results/labels.json`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from benchmarks.measuring import command_line
from models.bundle import Json
from models.command import run_command
from models.cpu import cpu_budget
from models.files import atomic_file
from models.images import open_source
from train.option_groups import require
from train.probe.finetune import FROM_SCRATCH, STUDENTS, sample_of
from train.probe.labelled import read_labelled
from train.probe.opening import opened_on_device, require_weights
from train.probe.options import CommonOptions, DistilOptions, FinetuneOptions, RecipeOptions
from train.probe.report import ProbeRow, Spread
from train.run import describe_environment

if TYPE_CHECKING:
    from train.device import Compute
    from train.probe.arms import Arm, TrainedArm
    from train.probe.probed import Probed

STAGES, GRID = (1, 2, 3), 4
"""The readout: that of all stages of the preset `fashion-mnist`."""

RECIPES = {
    0.01: RecipeOptions(
        epochs=(20,),
        head_c=(0.01, 0.03),
        lr_head=(1e-4,),
        lr_backbone=(3e-4,),
        scratch_epochs=(100,),
        scratch_lr=(3e-4, 1e-3, 3e-3, 1e-2),
        smallest_crop=(0.8,),
    ),
    0.1: RecipeOptions(
        epochs=(10,),
        head_c=(0.003,),
        lr_head=(1e-4,),
        lr_backbone=(3e-4, 1e-3),
        scratch_epochs=(25,),
        scratch_lr=(1e-3, 3e-3),
        smallest_crop=(0.8,),
    ),
}
"""What differs from `train.probe.options`'s preset `small`, by share of the labels."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune with 1% and 10% of the labels, against the same network from scratch."""

    run: tyro.conf.Positional[Path] = Path("models/shipped/fashion-mnist")
    """A run of a pretraining on Fashion-MNIST, or its bundle."""
    images: str = "fashion-mnist"
    """Labelled training images."""
    test: str = "fashion-mnist:test"
    """Labelled test images; read once, at the end."""
    labels: tuple[float, ...] = (0.01, 0.1)
    """Shares of the labels."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of labels, random weights and order."""
    val_images: int = 5_000
    """Other training images that settings are chosen on."""
    effort: float = 1.0
    """Multiplies every length of training with labels; the figures are those of 1."""
    distil: DistilOptions = field(default_factory=DistilOptions)
    """Of the rows that are self-distilled."""
    keep: Path | None = None
    """Directory for what has been trained, which is not trained again."""
    threads: int | None = None
    """CPU threads; what affinity and cgroup leave where not given."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        known = set(self.labels) <= set(RECIPES)
        require(known, "--labels", f"some of {', '.join(map(str, RECIPES))}", self.labels)
        require(bool(self.labels), "--labels", "one or more", self.labels)
        require(self.effort > 0, "--effort", "more than 0", self.effort)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All rows of one share of the labels, trained, before the test."""

    share: float
    class_names: tuple[str, ...]
    arms: list[TrainedArm]
    facts: dict[str, Json]


def main(options: Options) -> None:
    """Train everything, then measure, print and write."""
    start_s = time.monotonic()
    threads = options.threads or cpu_budget()
    require_weights(options.run)
    test_source = open_source(options.test)
    common = CommonOptions(
        images=options.images, test=options.test, stages=STAGES, grid=GRID, threads=threads
    )
    with opened_on_device(str(options.run), common, precision="auto") as (probed, compute):
        contests = [train_all(options, share, probed, compute) for share in options.labels]
        test = read_labelled(
            test_source,
            [],
            preprocess_for=probed.encoder,
            what="test images",
            class_names=contests[0].class_names,
            with_images=True,
        )
    from train.probe.arms import score_arms
    from train.probe.finetune import labelled_images

    shares: list[Json] = []
    for contest in contests:
        rows, _ = score_arms(contest.arms, labelled_images(test), compute)
        print(table(contest.share, rows), flush=True)
        shares.append(describe(contest, rows))
    result: dict[str, Json] = {
        "command": command_line(),
        "encoder": probed.description,
        "test": {**test.describe()},
        "seeds": list(options.seeds),
        "effort": options.effort,
        "device": compute.name,
        "precision": compute.precision,
        "threads": threads,
        "total_s": round(time.monotonic() - start_s),
        "shares": shares,
        "environment": {**describe_environment()},
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def train_all(options: Options, share: float, probed: Probed, compute: Compute) -> Contest:
    """Let every row choose, and train it on every seed."""
    from train.probe.arms import train_arm
    from train.probe.distil import read_unlabelled, train_student
    from train.probe.few_labels import describe_recipe, make_arms, make_layer_arms, read_budget
    from train.probe.pretrained import read_pretrained

    told = FinetuneOptions(
        run=options.run,
        images=options.images,
        test=options.test,
        stages=STAGES,
        grid=GRID,
        labels=share,
        validation="train",
        val_images=options.val_images,
        seeds=options.seeds,
        recipe=shortened(RECIPES[share], options.effort),
        unlabelled=options.images,
        distil=options.distil,
    )
    budget, images, draw = read_budget(told, probed.encoder)
    given = told, read_pretrained(options.run), len(images.class_names), sample_of(images)
    arms = {arm.name: arm for arm in (*make_layer_arms(*given), *reversed(make_arms(*given)))}
    data = (probed.description["fingerprint"], images.sha256, share, options.seeds, STAGES, GRID)
    store = Store(folder=options.keep, data=str(data))
    unlabelled_NHWC = read_unlabelled(
        open_source(options.images),
        probed.encoder,
        limit=options.distil.images,
        without=budget.held_out,
        seed=options.seeds[0],
    )
    students = {teacher: name for name, teacher in STUDENTS.items()}
    trained: dict[str, TrainedArm] = {}
    for name, arm in arms.items():
        taught = store.get(arm, partial(train_arm, arm, budget, compute))
        trained[name] = taught
        if name in students:
            trained[students[name]] = store.get(
                replace(arm, name=students[name]),
                partial(
                    train_student,
                    students[name],
                    taught,
                    budget,
                    unlabelled_NHWC,
                    options.distil,
                    compute,
                ),
                told=str(options.distil),
            )
    facts: dict[str, Json] = {
        "images": {**images.describe()},
        "labels": len(budget.by_seed[options.seeds[0]]),
        "split": {"how": draw.how, "held_out": len(budget.held_out)},
        "settings": describe_recipe(told),
        "unlabelled": len(unlabelled_NHWC),
        "distil": {**asdict(options.distil)},
    }
    return Contest(
        share=share,
        class_names=images.class_names,
        arms=[trained[name] for name in (*STUDENTS, *arms)],
        facts=facts,
    )


@dataclass(frozen=True, kw_only=True)
class Store:
    """What has been trained of one share of the labels, a file an arm.

    Attributes:
        folder: where; None to keep nothing.
        data: what all arms have in common.
    """

    folder: Path | None
    data: str

    def get(self, arm: Arm, train: Callable[[], TrainedArm], told: str = "") -> TrainedArm:
        """Give a trained arm, from its file where there is one of the same data and recipes.

        `told` is what else decides what comes of it.
        """
        import torch

        from train.probe.arms import TrainedArm
        from train.probe.classifier import Recipe

        if self.folder is None:
            return train()
        decisive = f"{self.data} {arm.name} {arm.recipes} {told}".encode()
        file = self.folder / f"{hashlib.sha256(decisive).hexdigest()[:16]}.pt"
        if not file.is_file():
            trained = train()
            self.folder.mkdir(parents=True, exist_ok=True)
            states = {seed: one.state_dict() for seed, one in trained.by_seed.items()}
            kept = {
                "recipes": [asdict(recipe) for recipe in trained.arm.recipes],
                "chosen": asdict(trained.chosen),
                "tried": trained.tried,
                "note": trained.arm.note,
                "by_seed": states,
            }
            with atomic_file(file) as temporary:
                torch.save(kept, temporary)
            return trained
        kept = torch.load(file, weights_only=True)
        by_seed = {seed: arm.make(seed) for seed in kept["by_seed"]}
        for seed, classifier in by_seed.items():
            classifier.load_state_dict(kept["by_seed"][seed])
        recipes = tuple(Recipe(**recipe) for recipe in kept["recipes"])
        return TrainedArm(
            arm=replace(arm, recipes=recipes, note=kept["note"]),
            chosen=Recipe(**kept["chosen"]),
            tried=tuple(kept["tried"]),
            by_seed=by_seed,
        )


def shortened(recipe: RecipeOptions, effort: float) -> RecipeOptions:
    """Multiply the lengths of training."""

    def scaled(epochs: tuple[int, ...] | None) -> tuple[int, ...]:
        return tuple(max(1, round(effort * n)) for n in epochs or ())

    return replace(
        recipe, epochs=scaled(recipe.epochs), scratch_epochs=scaled(recipe.scratch_epochs)
    )


def from_scratch(rows: Sequence[ProbeRow]) -> ProbeRow:
    """Give the row that the claim is about."""
    return next(row for row in rows if row.name == FROM_SCRATCH)


def describe(contest: Contest, rows: Sequence[ProbeRow]) -> dict[str, Json]:
    """Give a share's result as JSON has it."""
    from train.probe.arms import difference

    against = from_scratch(rows)
    return {
        "share": contest.share,
        **contest.facts,
        "rows": json.loads(json.dumps([asdict(row) for row in rows])),
        "gain": json.loads(json.dumps(asdict(difference(rows[0], against)))),
        "against": against.name,
    }


def table(share: float, rows: Sequence[ProbeRow]) -> str:
    """Lay one share out for people."""
    from train.probe.arms import difference

    lines = [f"{100 * share:g}% of the labels   top-1 %: mean (least to largest)"]
    for row in rows:
        chosen = {name: value for name, value in row.chosen.items() if name != "tried"}
        lines.append(f"  {row.name:<30}{_figures(row.top1)}  {chosen or ''}".rstrip())
    against = from_scratch(rows)
    lines.append(f"  gain over {against.name}: {_figures(difference(rows[0], against))} points")
    return "\n".join(lines)


def _figures(spread: Spread | None) -> str:
    """Show mean and range in percent."""
    assert spread is not None, "every row here has figures"
    return f"{100 * spread.mean:.2f} ({100 * spread.min:.2f} to {100 * spread.max:.2f})"


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.labels"))
