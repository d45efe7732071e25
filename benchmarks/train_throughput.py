"""Compare the training speed with lightly's: same network, batch, views, data and threads.

Two cases: Fashion-MNIST at 28 x 28 with the network of the preset `fashion-mnist`, and a
folder of 3,000 JPEGs of 500 x 375 (`benchmarks.photographs`) at 224 with that of `folder`.

Horace trains as `train.pretrain` does: its own source of batches, views, loss and step, by
default, with `--compile`, and at float32. lightly trains as its documentation shows: its BYOL
transforms with our probabilities and ranges, torchvision's image loading, a DataLoader (that
pins memory for a GPU), its BarlowTwinsLoss; with several numbers of workers, of which the
best counts. It gets our network and optimiser. One more contender is what a user of lightly
could add by hand: bf16 autocast and channels_last.

Each measurement is a process of its own: some steps to warm up, then as many as fit in the
time. What DataLoader workers had prepared before the clock starts counts in lightly's
favour. What compiling takes counts for nobody. Contenders take turns within every round;
ratios are paired within rounds. The bar is for the best of Horace's against the best of
lightly's; ratios of each of Horace's stand beside it.

Run from the root, after `apt-get install mate-backgrounds`:
`python -m benchmarks.train_throughput --out benchmarks/results/train_throughput.json`; with
`--device cuda` on one GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.clock import now_s
from benchmarks.measuring import command_line, spread_of, turns
from benchmarks.photographs import DEBIAN_PHOTOS, make_jpegs
from models.command import progress, run_command
from models.cpu import cpu_budget
from train.config import PretrainOptions
from train.presets import PRESETS
from train.run import describe_environment

Case = Literal["fashion-mnist", "photographs"]
Step = Callable[[], int]
"""Takes one training step and gives the number of its images."""

CASES: tuple[Case, ...] = ("fashion-mnist", "photographs")
BARS: dict[Case, float] = {"fashion-mnist": 3.0, "photographs": 1.3}
WORKERS = (0, 1, 2, 4) if cpu_budget() <= 4 else tuple(cpu_budget() // n for n in (4, 2, 1))
OURS: dict[str, dict[str, object]] = {
    "horace": {},
    "horace compiled": {"compile": True},
    "horace fp32": {"precision": "fp32"},
}
"""What a user of Horace may say: the options of each of its contenders."""
TUNED = "lightly tuned"
CONTENDERS = (*OURS, *(f"lightly {n} workers" for n in WORKERS), TUNED)
TUNED_WORKERS = cpu_budget()
JPEGS = 3000
PHOTOGRAPH_PX = 224
PHOTOGRAPH_BATCH = 64
WARM_UP_STEPS = 4
PART_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure images trained on a second, by Horace and by lightly."""

    cases: tuple[Case, ...] = CASES
    """What to train on."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where both train."""

    contenders: tuple[str, ...] = CONTENDERS
    """Which of them; one of Horace's and one of lightly's at least."""

    rounds: int = 3
    """How often every contender is measured."""

    seconds: float = 30.0
    """How long each measurement takes, at least."""

    photos: Path = DEBIAN_PHOTOS
    """Folder of large photographs that the JPEGs are cut from."""

    jpegs: Path = Path("artifacts/bench/photographs-3000")
    """Folder of the JPEGs; made if it is not there."""

    out: Path | None = None
    """JSON file for the result."""

    only: Annotated[str, tyro.conf.arg(metavar="CONTENDER")] = ""
    """Measure one contender on the first case, here, and print it: what a round runs."""


def main(options: Options) -> None:
    """Measure in turns, print and write."""
    if options.only:
        print(json.dumps(measure(options.cases[0], options.only, options)))
        return
    if "photographs" in options.cases:
        make_jpegs(options.jpegs, JPEGS, photos=options.photos)
    order = [
        (case, contender)
        for number in range(options.rounds)
        for case in options.cases
        for contender in turns(options.contenders, number)
    ]
    figures: dict[Case, dict[str, list[dict[str, float]]]] = {case: {} for case in options.cases}
    load = os.getloadavg()[0]
    for case, contender in progress(order, what="measuring", total=len(order), unit="turn"):
        figures[case].setdefault(contender, []).append(in_process(case, contender, options))
    report = {
        "command": command_line(),
        "device": options.device,
        "hardware": describe_environment()["hardware"],
        "load_average_before": round(load, 1),
        "versions": {
            name: version(name)
            for name in ("torch", "torchvision", "lightly", "pillow", "simplejpeg", "numpy")
        },
        "rounds": options.rounds,
        "seconds": options.seconds,
        "cases": {case: summarise(case, rows) for case, rows in figures.items()},
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def in_process(case: Case, contender: str, options: Options) -> dict[str, float]:
    """Measure one contender in a fresh process."""
    command = [
        sys.executable, "-m", "benchmarks.train_throughput", "--cases", case,
        "--only", contender, "--seconds", str(options.seconds), "--jpegs", str(options.jpegs),
        "--device", options.device,
    ]  # fmt: skip
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def measure(case: Case, contender: str, options: Options) -> dict[str, float]:
    """Train with one contender and give its figures."""
    pretraining = replace(pretrain_options(case, options.jpegs), device=options.device)
    if contender in OURS:
        told = replace(pretraining, **OURS[contender])  # type: ignore[arg-type]  # of many types
        return measure_horace(told, options.seconds)
    workers = TUNED_WORKERS if contender == TUNED else int(contender.split()[1])
    step = lightly_step(pretraining, workers, is_tuned=contender == TUNED)
    return {"images_per_s": time_steps(step, options.seconds)}


def pretrain_options(case: Case, jpegs: Path) -> PretrainOptions:
    """Give what both train: the preset of the case."""
    changes = {"threads": cpu_budget(), "epochs": 1000}
    if case == "photographs":
        changes |= {
            "source": f"folder:{jpegs}",
            "image_size_px": PHOTOGRAPH_PX,
            "batch_size": PHOTOGRAPH_BATCH,
            "data_in": "stream",
        }
    preset = PRESETS["fashion-mnist" if case == "fashion-mnist" else "folder"]
    return replace(preset, **changes)  # type: ignore[arg-type]  # options of many types


def time_steps(step: Step, seconds: float) -> float:
    """Give images a second, after some steps that do not count."""
    for _ in range(WARM_UP_STEPS):
        step()
    start_s, images = now_s(), 0
    while time.perf_counter() - start_s < seconds:
        images += step()
    return images / (now_s() - start_s)


def measure_horace(options: PretrainOptions, seconds: float) -> dict[str, float]:
    """Train as `train.pretrain` does, but for log, checkpoints and kNN accuracy.

    Gives, beside images a second, the milliseconds an image that reading and views take
    where nothing else is computed; on a GPU, where they are part of a recording, not.
    """
    from train.begin import make_source, make_trainer, read_data
    from train.device import on_device, prepare_device, resolve_compute
    from train.ranks import Ranks
    from train.run import RunDirectory

    compute = resolve_compute(options.device, options.precision)
    prepare_device(compute, threads=cpu_budget())
    ranks = Ranks()
    data, options, config = read_data(options, RunDirectory(path=Path("unused")), None, ranks)
    batch_size = options.batch_size
    with closing(make_source(options, data, ranks)) as source:
        trainer = make_trainer(
            options, config, compute, ranks, steps_per_epoch=source.steps_per_epoch
        )
        batches = on_device(source.batches(0, trainer.total_steps), compute.device)

        def step() -> int:
            trainer.step(next(batches))
            return batch_size

        speed = time_steps(step, seconds)
        if compute.name == "cuda":
            return {"images_per_s": speed}
        last = next(batches)
        return {
            "images_per_s": speed,
            "views_ms": part_ms(lambda: trainer.views(last), batch_size),
            "reading_ms": part_ms(lambda: next(batches), batch_size),
        }


def part_ms(part: Callable[[], object], images: int) -> float:
    """Give the milliseconds an image that a part of a step takes."""
    start_s = now_s()
    for _ in range(PART_STEPS):
        part()
    return (now_s() - start_s) / (PART_STEPS * images) * 1e3


def lightly_step(options: PretrainOptions, workers: int, *, is_tuned: bool) -> Step:
    """Make lightly's training step on our network and optimiser."""
    import torch
    from lightly.loss import BarlowTwinsLoss

    from train.backbones import build_network
    from train.device import has_native_bf16
    from train.optim import make_optimizer

    torch.set_num_threads(cpu_budget())
    torch.manual_seed(options.seed)
    layout = torch.channels_last if is_tuned else torch.contiguous_format
    device = torch.device(options.device)
    network = build_network(options.network, options.channels, options.image_size_px)
    network.to(device=device, memory_format=layout)
    optimizer = make_optimizer(network, options.optimizer, weight_decay=options.weight_decay)
    criterion = BarlowTwinsLoss(lambda_param=options.lambd)
    is_bf16 = is_tuned and has_native_bf16(device)
    pairs = endless(lightly_loader(options, workers))

    def step() -> int:
        view1, view2 = (view.to(device, non_blocking=True) for view in next(pairs))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
            _, z1_ND = network(view1.contiguous(memory_format=layout))
            _, z2_ND = network(view2.contiguous(memory_format=layout))
        loss = criterion(z1_ND.float(), z2_ND.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(view1)

    return step


def lightly_loader(options: PretrainOptions, workers: int):
    """Make the DataLoader of lightly's examples, whose batches are pairs of views."""
    from lightly.data import LightlyDataset
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from models.idx import ArraySource
    from models.images import open_source

    views = options.views
    is_grey = options.channels == 1
    common = {
        "input_size": options.image_size_px,
        "cj_prob": views.jitter_probability,
        "cj_bright": views.brightness,
        "cj_contrast": views.contrast,
        "cj_sat": 0.0 if is_grey else views.saturation,
        "cj_hue": 0.0 if is_grey else views.hue,
        "min_scale": views.crop_area[0],
        "random_gray_scale": 0.0 if is_grey else views.grey_probability,
        "hf_prob": views.flip_probability,
        "sigmas": views.blur_sigma_px,
        "normalize": {"mean": [0.5] * options.channels, "std": [0.25] * options.channels},
    }
    first, second = (
        view(
            gaussian_blur=views.blur_probability[i],
            solarization_prob=views.solarise_probability[i],
            **common,
        )
        for i, view in enumerate((BYOLView1Transform, BYOLView2Transform))
    )
    transform = BYOLTransform(view_1_transform=first, view_2_transform=second)
    source = open_source(options.source)

    class FashionMNIST(Dataset):
        """The images as torchvision's data set of that name gives them."""

        def __len__(self) -> int:
            """Count the images."""
            return len(source.images)

        def __getitem__(self, row: int) -> tuple[object, int, str]:
            """Give the views of one image."""
            return transform(Image.fromarray(source.images[row])), 0, ""

    folder = options.source.removeprefix("folder:")
    return DataLoader(
        FashionMNIST()
        if isinstance(source, ArraySource)
        else LightlyDataset(folder, transform=transform),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=options.device == "cuda",
        persistent_workers=workers > 0,
    )


def endless(loader) -> Iterator[tuple]:
    """Yield the pairs of views of one epoch after the other."""
    for batch in chain.from_iterable(repeat(loader)):
        yield batch[0]


def summarise(case: Case, rows: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Give each contender's spread, and what ours are against lightly's."""
    speeds = {name: [row["images_per_s"] for row in rounds] for name, rounds in rows.items()}
    usual = [name for name in speeds if name.startswith("lightly") and name != TUNED]
    best, best_of_ours = (
        max(names, key=lambda name: statistics.median(speeds[name]))
        for names in (usual, [name for name in speeds if name in OURS])
    )
    parts = {
        name: {
            part: round(statistics.median(row[part] for row in rounds), 3)
            for part in ("reading_ms", "views_ms")
        }
        for name, rounds in rows.items()
        if "views_ms" in rounds[0]
    }
    return {
        "images_per_s": {name: spread_of(values, 2) for name, values in speeds.items()},
        "best_of_horace": best_of_ours,
        "best_of_lightly": best,
        "ratio": spread_of(ratios(speeds[best_of_ours], speeds[best]), 2),
        "ratio_of_each": {
            ours: {
                theirs: spread_of(ratios(speeds[ours], speeds[theirs]), 2)
                for theirs in (best, TUNED)
                if theirs in speeds
            }
            for ours in OURS
            if ours in speeds
        },
        "bar": BARS[case],
        "parts_of_horace": parts,
    }


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.train_throughput"))
