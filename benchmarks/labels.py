"""Few labels: a pretrained network fine-tuned, against the same network from scratch.

The claim of arXiv 2103.03230, section 3.2, at the scale of two cores: Fashion-MNIST, 1% and
10% of the labels (600 and 6,000, as many of each class), three seeds that each draw labels,
random weights and order.

What is the same for all rows: the network, the labels of a seed, batch, augmentation, label
smoothing, weight decay, arithmetic, and the 5,000 other labelled training images on which
each row chooses its settings, with the labels of the first seed. From scratch has the longer
schedule, more learning rates to choose from, and two readouts: that of the fine-tuned network
(all stages on a 4 x 4 grid) and plain global pooling; the difference is taken from whichever
is better on the test images. The test images are read when every network has been trained.

Run from the root, after a pretraining, for instance
`python -m benchmarks.labels artifacts/runs/fashion-mnist --out benchmarks/results/labels.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from models.bundle import Json
from models.command import run_command
from models.cpu import cpu_budget
from models.images import open_source
from train.option_groups import require
from train.probe.labelled import read_labelled
from train.probe.opening import opened_on_device, require_run
from train.probe.options import CommonOptions, FinetuneOptions, RecipeOptions
from train.probe.report import ProbeRow, Spread, command_line
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
        head_c=(0.01, 0.1),
        lr_head=(1e-4,),
        lr_backbone=(1e-4, 3e-4),
        scratch_epochs=(100,),
        scratch_lr=(1e-3, 3e-3, 1e-2),
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
    """Fine-tune a run on 1% and 10% of the labels, against the same network from scratch."""

    run: tyro.conf.Positional[Path]
    """Run directory of a pretraining on Fashion-MNIST."""
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
    """Multiplies every length of training; the figures are those of 1."""
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
    require_run(options.run)
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
    from train.probe.few_labels import describe_recipe, read_budget

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
    )
    budget, images, draw = read_budget(told, probed.encoder)
    arms = arms_of(told, probed, len(images.class_names))
    facts: dict[str, Json] = {
        "images": {**images.describe()},
        "labels": len(budget.by_seed[options.seeds[0]]),
        "split": {"how": draw.how, "held_out": len(budget.held_out)},
        "settings": describe_recipe(told),
    }
    return Contest(
        share=share,
        class_names=images.class_names,
        arms=[train_arm(arm, budget, compute) for arm in arms],
        facts=facts,
    )


def arms_of(told: FinetuneOptions, probed: Probed, n_classes: int) -> list[Arm]:
    """List the rows: those of `train.probe finetune`, and from scratch with plain pooling."""
    from train.probe.few_labels import make_arms, make_layer_arms

    assert probed.run is not None, "only a run can be fine-tuned"
    pooled = make_arms(replace(told, stages=(), grid=1), probed.run, n_classes)[1]
    pooled = replace(pooled, name="from scratch, pooled", note="the last stage, averaged")
    arms = make_arms(told, probed.run, n_classes), make_layer_arms(told, probed.run, n_classes)
    return [*chain(*arms), pooled]


def shortened(recipe: RecipeOptions, effort: float) -> RecipeOptions:
    """Multiply the lengths of training."""

    def scaled(epochs: tuple[int, ...] | None) -> tuple[int, ...]:
        return tuple(max(1, round(effort * n)) for n in epochs or ())

    return replace(
        recipe, epochs=scaled(recipe.epochs), scratch_epochs=scaled(recipe.scratch_epochs)
    )


def best_scratch(rows: Sequence[ProbeRow]) -> ProbeRow:
    """Give the better of the rows from scratch, by what it reached on the test images."""
    return max(
        (row for row in rows if row.name.startswith("from scratch")),
        key=lambda row: 0.0 if row.top1 is None else row.top1.mean,
    )


def describe(contest: Contest, rows: Sequence[ProbeRow]) -> dict[str, Json]:
    """Give a share's result as JSON has it."""
    from train.probe.arms import difference

    against = best_scratch(rows)
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
        lines.append(f"  {row.name:<24}{_figures(row.top1)}  {chosen or ''}".rstrip())
    against = best_scratch(rows)
    lines.append(f"  gain over {against.name}: {_figures(difference(rows[0], against))} points")
    return "\n".join(lines)


def _figures(spread: Spread | None) -> str:
    """Show mean and range in percent."""
    assert spread is not None, "every row here has figures"
    return f"{100 * spread.mean:.2f} ({100 * spread.min:.2f} to {100 * spread.max:.2f})"


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.labels"))
