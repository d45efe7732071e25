"""What a probe found, as one record, and as the text that people read.

A report names everything that its figures depend on: data with hashes, split, seeds, the
encoder's fingerprint, versions and hardware; and beside the encoder stand its baselines.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.evaluation.knn_scores import ClassScore, class_scores
from models.bundle import Json
from models.errors import reason_of
from models.files import atomic_file
from train.errors import TrainError
from train.probe.labelled import LabelledSet

HOW_CHOSEN = frozenset({"val_top1", "tried", "gradient", "iterations", "fit_s"})
"""What stands beside the chosen settings, for machines alone."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares of the test images, 0 to 1."""

    top1: float
    top5: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over seeds."""

    mean: float
    min: float
    max: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise."""
        return cls(
            mean=statistics.fmean(values), min=min(values), max=max(values), values=tuple(values)
        )


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """One line of the table.

    Attributes:
        name: what was judged.
        dim: of its features; None where it is a whole network.
        top1, top5: over seeds; None where it could not be had.
        chosen: the settings that were chosen, and how they did on the held-out images.
        note: what a reader should know of it.
    """

    name: str
    dim: int | None
    top1: Spread | None
    top5: Spread | None
    chosen: Mapping[str, Json]
    note: str


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """A whole result.

    Attributes:
        kind: linear, finetune or transfer.
        command: as it was given.
        encoder: what was judged.
        images, test: uri, hash and counts.
        split: how settings were chosen, on which images, by which seed.
        settings: what was the same for every row.
        seeds: of labels, initial weights and order.
        rows: the encoder's first, then the baselines.
        difference: top-1 of the first row less that of the baseline named in `against`.
        per_class: of the first row at the first seed.
        notes: for people.
        environment: versions and hardware.
    """

    kind: str
    command: str
    encoder: Mapping[str, Json]
    images: Mapping[str, Json]
    test: Mapping[str, Json]
    split: Mapping[str, Json]
    settings: Mapping[str, Json]
    seeds: tuple[int, ...]
    rows: Sequence[ProbeRow]
    difference: Spread | None
    against: str | None
    per_class: Sequence[ClassScore]
    notes: Sequence[str]
    environment: Mapping[str, Json]

    def to_json(self) -> dict[str, Json]:
        """Give the report as JSON has it."""
        document: dict[str, Json] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return document


def command_line() -> str:
    """Give the command of this process as a person would type it."""
    return f"python {shlex.join(sys.orig_argv[1:])}"


def score(scores_NC: NDArray[np.float64], truth_N: NDArray[np.int64]) -> Scores:
    """Count the images whose class has the largest score, and one of the five largest.

    Of equal scores the first class comes first; an image of no known class, or with a score
    that is not a number, is wrong.
    """
    true_N1 = scores_NC[np.arange(len(truth_N)), np.maximum(truth_N, 0)][:, None]
    is_before_NC = scores_NC > true_N1
    is_before_NC |= (scores_NC == true_N1) & (np.arange(scores_NC.shape[1]) < truth_N[:, None])
    rank_N = is_before_NC.sum(axis=1)
    is_known_N = (truth_N >= 0) & ~np.isnan(scores_NC).any(axis=1)
    return Scores(
        top1=float(((rank_N < 1) & is_known_N).mean()),
        top5=float(((rank_N < 5) & is_known_N).mean()),
    )


def score_classes(
    scores_NC: NDArray[np.float64], truth_N: NDArray[np.int64], class_names: Sequence[str]
) -> list[ClassScore]:
    """Give every class its accuracy, and what it is most taken for.

    An image with a score that is not a number is taken for no class, and is wrong.
    """
    predicted_N = np.where(np.isnan(scores_NC).any(axis=1), -1, scores_NC.argmax(axis=1))
    return class_scores(truth_N, predicted_N, class_names)


def as_text(report: ProbeReport) -> str:
    """Lay the report out for people: the figure, the table, the classes, the remarks."""
    parts = [_header(report), _table(report), _classes(report), _remarks(report)]
    return "\n\n".join(part for part in parts if part)


def notes_of(
    train: LabelledSet, test: LabelledSet, unlabelled_digests: Set[bytes] | None = None
) -> list[str]:
    """Say what was left out, and what cannot be right.

    `unlabelled_digests` are of the images that taught without a label, if any did.
    """
    known = set(train.digests)
    duplicates = sum(digest in known for digest in test.digests)
    notes = [f"{duplicates} test images are training images pixel for pixel"]
    if unlabelled_digests is not None:
        duplicates = sum(digest in unlabelled_digests for digest in test.digests)
        notes.append(f"{duplicates} test images are among the unlabelled ones pixel for pixel")
    for images in (train, test):
        if images.n_rejects or images.n_unlabelled:
            notes.append(
                f"{images.uri}: {images.n_rejects} images could not be used and "
                f"{images.n_unlabelled} have no label; they are left out"
            )
    unknown = int((test.labels_N < 0).sum())
    if unknown:
        notes.append(f"{unknown} test images are of classes never trained on: wrong in any case")
    return notes


def show(report: ProbeReport, *, as_json: bool, out: Path | None) -> None:
    """Print the report, then write it.

    Raises:
        TrainError: `out` cannot be written; what was measured is on the screen by then.
    """
    document = json.dumps(report.to_json(), indent=2)
    print(document if as_json else as_text(report))
    if out is None:
        return
    try:
        with atomic_file(out) as temporary:
            temporary.write_text(document + "\n")
    except OSError as error:
        raise TrainError(
            f"--out {out}",
            expected="a file that can be written",
            found=reason_of(error),
            mend="choose another place",
        ) from error


def _header(report: ProbeReport) -> str:
    """State what was measured, and on what."""
    first = report.rows[0]
    figure = "none" if first.top1 is None else f"{100 * first.top1.mean:.2f}% top-1"
    lines = [
        f"{report.kind}: {figure} on {report.test['images']:,} images of {report.test['uri']}",
        f"  encoder {report.encoder['name']} ({report.encoder['kind']}), "
        f"{report.encoder['fingerprint']}",
        f"  trained on {_labels(report.images)} of {report.images['uri']}",
        f"  settings chosen {report.split['how']}",
    ]
    if report.difference is not None:
        lines.append(
            f"  {_points(report.difference)} points of top-1 above {report.against}, "
            f"seeds {', '.join(map(str, report.seeds))}"
        )
    return "\n".join(lines)


def _labels(images: Mapping[str, Json]) -> str:
    """Say `600 labelled images a seed (1,780 read)`, or just how many where all taught alike.

    What is read is the labels of all seeds and the held-out images together.
    """
    by_seed = images.get("labels_by_seed")
    if not isinstance(by_seed, dict):
        return f"{images['images']:,} labelled images"
    counts = [n for n in by_seed.values() if isinstance(n, int)]
    low, high = min(counts), max(counts)
    labels = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    return f"{labels} labelled images a seed ({images['images']:,} read)"


def _points(difference: Spread) -> str:
    """Say `+3.20 (+2.90 to +3.60)`."""
    low, high = 100 * difference.min, 100 * difference.max
    return f"{100 * difference.mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _table(report: ProbeReport) -> str:
    """Lay out the rows: mean, and least to largest where there are several seeds.

    Top-5 has a column where five guesses can be wrong.
    """
    width = max(len(row.name) for row in report.rows) + 2
    has_top5 = len(report.per_class) > 5
    top5 = f"{'top-5 %':<10}" if has_top5 else ""
    lines = [f"  {'':<{width}}{'dims':>6}  {'top-1 %':<24}{top5}chosen"]
    for row in report.rows:
        chosen = ", ".join(
            f"{name} {_short(value)}"
            for name, value in row.chosen.items()
            if name not in HOW_CHOSEN
        )
        top5 = f"{_cell(row.top5, spread_shown=False):<10}" if has_top5 else ""
        head = f"  {row.name:<{width}}{row.dim or '-':>6}  {_cell(row.top1):<24}"
        lines.append(f"{head}{top5}{chosen}".rstrip())
    return "\n".join(lines)


def _short(value: Json) -> str:
    """Show a setting in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(spread: Spread | None, *, spread_shown: bool = True) -> str:
    """Show a figure, and its range over seeds."""
    if spread is None:
        return "-"
    mean = f"{100 * spread.mean:.2f}"
    if len(spread.values) == 1 or not spread_shown:
        return mean
    return f"{mean} ({100 * spread.min:.2f} to {100 * spread.max:.2f})"


def _classes(report: ProbeReport) -> str:
    """Lay out the classes, the worst first."""
    if not report.per_class:
        return ""
    width = max(5, *(len(one.label) for one in report.per_class))
    lines = [f"  {'class':<{width}}{'n':>7}{'top-1 %':>9}  most confused with"]
    for one in sorted(report.per_class, key=lambda one: (one.accuracy is None, one.accuracy)):
        accuracy = "-" if one.accuracy is None else f"{100 * one.accuracy:.2f}"
        confused = "" if one.confused_with is None else f"{one.confused_with} ({one.n_confused})"
        lines.append(f"  {one.label:<{width}}{one.n:>7}{accuracy:>9}  {confused}".rstrip())
    return "\n".join(lines)


def _remarks(report: ProbeReport) -> str:
    """Say what stands behind the rows."""
    lines = [f"{row.name}: {row.note}" for row in report.rows if row.note]
    return "\n".join(f"  - {line}" for line in [*lines, *report.notes])
