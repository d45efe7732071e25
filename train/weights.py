"""Weights in: what a network may start from, mapped by name, and a report of what fitted.

Rules:
    A tensor is taken where name and shape agree; nothing is cut, repeated or interpolated.
    Whatever is not taken is in the report, with the reason.
    Weights of which nothing fits the backbone are refused; a projector may be missing.

These layouts are understood, each with or without what wrappers put before a name
(`module.`, `_orig_mod.`): our own; the authors' `resnet50.pth` and `checkpoint.pth`;
torchvision and timm models; lightly, with `backbone.conv1` or the numbered `backbone.0` of a
Sequential of a network's children, and `projection_head.layers`; solo-learn, with `backbone`
or the older `encoder`, and `projector`.

A Sequential of the children of lightly's `ResNetGenerator` has no ReLU after its stem, since
that is no child: weights trained so start here from a slightly different function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.networks import BarlowTwins
from train.errors import TrainError
from train.weight_files import read_tensors

WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|network)\.)+")
PARTS = {
    "backbone.": "backbone.",
    "encoder.": "backbone.",
    "projector.": "projector.",
    "projection_head.layers.": "projector.",
    "projection_head.": "projector.",
    "predictor.": "predictor.",
}
"""How names of a part begin in a file, and how they begin here."""

CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
"""Children of a ResNet that have weights, in order."""

MOST_NAMES = 4
"""Names of one kind that a summary lists."""


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What came of initialising a network.

    Attributes:
        source: the file that was read.
        taken: names of tensors, as they are here, that have the file's values now.
        unfit: by name, the shapes in the file and here, where they differ.
        absent: names that the file has no tensor for; they keep their random start.
        unused: the file's names of tensors that there is no place for here.
    """

    source: Path
    taken: tuple[str, ...]
    unfit: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    absent: tuple[str, ...]
    unused: tuple[str, ...]

    def summary(self) -> str:
        """Say it in one line: counts by part, and the first names of what was not taken."""
        every = (*self.taken, *self.unfit, *self.absent)
        parts = list(dict.fromkeys(name.partition(".")[0] for name in every))
        counts = [
            f"{_count(self.taken, part)} of {_count(every, part)} tensors of the {part}"
            for part in parts
        ]
        clauses = [f"{self.source}: took {', '.join(counts)}"]
        misfits = [
            f"{k} ({_by(theirs)}, here {_by(own)})" for k, (theirs, own) in self.unfit.items()
        ]
        for what, names in (
            ("of another shape", misfits),
            ("not in the file", self.absent),
            ("unused of the file", self.unused),
        ):
            if names:
                clauses.append(f"{what}: {_first(names)}")
        return "; ".join(clauses)


def initialise_from(path: Path, network: BarlowTwins) -> WeightsReport:
    """Give a network the weights that a run, a bundle's run or a file has for it.

    Args:
        path: see `train.weight_files.read_tensors`.
        network: changed in place, in all that fits.

    Raises:
        TrainError: the file cannot be read, or nothing in it fits the backbone.
    """
    file, found = read_tensors(path)
    own = network.state_dict()
    names = name_tensors(found, own)
    taken = {
        name: found[theirs] for name, theirs in names.items()
        if found[theirs].shape == own[name].shape
    }  # fmt: skip
    report = WeightsReport(
        source=file,
        taken=tuple(name for name in own if name in taken),
        unfit={
            name: (tuple(found[names[name]].shape), tuple(own[name].shape))
            for name in own
            if name in names and name not in taken
        },
        absent=tuple(name for name in own if name not in names),
        unused=tuple(theirs for theirs in found if theirs not in set(names.values())),
    )
    # One number a BatchNorm, and vectors of usual widths, agree by chance.
    if not any(k.startswith("backbone.") and own[k].ndim > 1 for k in taken):
        raise _nothing_fits(report, found)
    network.load_state_dict(own | taken)
    return report


def name_tensors(found: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """Say for names of a network which name of a file has its value.

    Args:
        found: names in the file, of any layout that the module's docstring lists.
        own: names of a `BarlowTwins`.

    Returns:
        The file's names by ours, for those that are in both.
    """
    found, wanted = list(found), set(own)
    best: dict[str, str] = {}
    for part in (_part, _all_backbone):
        parts = {part(name): name for name in found}
        for read in (_as_it_is, _numbered(parts), _in_library):
            names = {read(name): theirs for name, theirs in parts.items()}
            names = {name: theirs for name, theirs in names.items() if name in wanted}
            best = max(best, names, key=len)
    return best


def _part(name: str) -> str:
    """Give a file's name as one of backbone, projector or predictor."""
    bare = WRAPPERS.sub("", name)
    for start, part in PARTS.items():
        if bare.startswith(start):
            return part + WRAPPERS.sub("", bare.removeprefix(start))
    return f"backbone.{bare}"


def _all_backbone(name: str) -> str:
    """Give a name as one of the backbone: in torchvision's ViT, `encoder` is a part of it."""
    return "backbone." + WRAPPERS.sub("", name)


def _as_it_is(name: str) -> str:
    """Read torchvision's names, but for lightly's own word for a shortcut."""
    return name.replace(".shortcut.", ".downsample.")


def _in_library(name: str) -> str:
    """Read a library's names, which are one level down in our module for its networks."""
    return re.sub(r"^backbone\.", "backbone.model.", name)


def _numbered(parts: Iterable[str]) -> Callable[[str], str]:
    """Read names of a Sequential: its numbers, in order, are a ResNet's children."""
    pattern = re.compile(r"^backbone\.(\d+)\.")
    numbers = sorted({int(match[1]) for match in map(pattern.match, parts) if match})
    children = dict(zip(map(str, numbers), CHILDREN, strict=False))

    def read(name: str) -> str:
        named = pattern.sub(lambda match: f"backbone.{children.get(match[1], match[1])}.", name)
        return _as_it_is(named)

    return read


def _nothing_fits(report: WeightsReport, found: Mapping[str, Tensor]) -> TrainError:
    """Make the error for weights of another network."""
    misfits = [k for k in report.unfit if k.startswith("backbone.")]
    is_other_size = any("weight" in name for name in misfits)
    example = next(iter(found))
    return TrainError(
        f"weights {report.source}",
        expected="some that fit the backbone",
        found=f"tensors of other shapes: {report.summary()}"
        if is_other_size
        else f"other names, such as {example}",
        mend="name the network that they are of by --network.layout, --network.width and "
        "--network.stem",
    )


def _count(names: Iterable[str], part: str) -> int:
    """Count the names of a part."""
    return sum(name.startswith(f"{part}.") for name in names)


def _by(shape: tuple[int, ...]) -> str:
    """Write a shape as 64x3x7x7."""
    return "x".join(map(str, shape)) or "one number"


def _first(names: Iterable[str]) -> str:
    """List the first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + rest
