"""The options of the three probes, checked without torch.

What a recipe of fine-tuning does not name comes from its preset: `paper` is the published
semi-supervised recipe, for large networks and images; `small` was found on Fashion-MNIST's
training images, see `benchmarks/labels.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from models.errors import UsageError
from train.config import MAX_SEED
from train.option_groups import require


def _require_all(
    name: str, values: tuple[float, ...] | None, holds: Callable[[float], bool], expected: str
) -> None:
    """Refuse a list of the recipe that is empty or holds a value that cannot be meant."""
    option = f"--recipe.{name.replace('_', '-')}"
    require(values is None or (bool(values) and all(map(holds, values))), option, expected, values)


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every probe is told."""

    images: str
    """Labelled images to learn from: a source, as for train.pretrain."""

    test: str
    """Labelled images that are read once, at the end."""

    stages: tuple[int, ...] = ()
    """Stages of the network whose maps are read out, from 1; the last where not given. Of a
    run, and of what is trained further; a linear layer on a bundle has the bundle's readout."""

    grid: int = 1
    """Cells a side that each of these maps is pooled to."""

    baselines: bool = True
    """Measure the baselines, too."""

    out: Path | None = None
    """JSON file for the report."""

    json: bool = False
    """Print the report as JSON."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a run's network computes."""

    threads: int | None = None
    """CPU threads; what affinity and cgroup leave where not given."""

    def __post_init__(self) -> None:
        require(self.grid >= 1, "--grid", "at least 1", self.grid)
        sound = self.threads is None or self.threads >= 1
        require(sound, "--threads", "at least 1", self.threads)


@dataclass(frozen=True, kw_only=True)
class SgdOptions:
    """The paper's recipe for the linear layer."""

    epochs: int = 100
    """Passes over the training images."""

    lr: float = 0.3
    """Learning rate at the start; it falls as a cosine."""

    batch_size: int = 256
    """Images a step."""

    weight_decay: float = 1e-6
    """Decay of the layer."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "--sgd.epochs", "at least 1", self.epochs)
        require(0 < self.lr < math.inf, "--sgd.lr", "a finite number above 0", self.lr)
        require(self.batch_size >= 1, "--sgd.batch-size", "at least 1", self.batch_size)
        sound = 0 <= self.weight_decay < math.inf
        require(sound, "--sgd.weight-decay", "finite, at least 0", self.weight_decay)


DEFAULT_C = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class LinearOptions(CommonOptions):
    """Train a linear layer on a frozen encoder, and measure it on test images.

    Beside it stand raw pixels, PCA-whitened pixels and the untrained encoder, each with a
    linear layer and a C of its own.
    """

    encoder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="BUNDLE_OR_RUN")]]
    """A bundle, a run, or horace://host:port/model."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs goes to the optimum, with a chosen C; sgd is the paper's recipe."""

    c: tuple[float, ...] = DEFAULT_C
    """Values of C to choose from, as in scikit-learn; larger is weaker regularisation."""

    val_share: float = 0.1
    """Share of the training images, of every class, that C is chosen on."""

    seed: int = 0
    """Decides the held-out images, and the order of sgd."""

    augment: bool = False
    """Crop and flip the images anew every epoch of sgd; of a run only, and slow. Crops are of
    the square that preprocessing cuts from a photograph's middle. All images are in memory."""

    record: bool = False
    """Keep the report in the bundle's bundle.json, too."""

    sgd: SgdOptions = field(default_factory=SgdOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        sound = bool(self.c) and all(0 < c < math.inf for c in self.c)
        require(sound, "--c", "finite numbers above 0", self.c)
        require(0 < self.val_share < 1, "--val-share", "between 0 and 1", self.val_share)
        require(self.seed >= 0, "--seed", "at least 0", self.seed)
        require(self.seed <= MAX_SEED, "--seed", f"at most {MAX_SEED}", self.seed)
        if self.augment and self.solver == "lbfgs":
            raise UsageError(
                "--augment", expected="--solver sgd", found="lbfgs, which needs fixed features"
            )
        if self.solver == "sgd" and self.c != DEFAULT_C:
            raise UsageError("--c", expected="--solver lbfgs", found="sgd, which has no C")
        if self.solver == "lbfgs" and self.sgd != SgdOptions():
            raise UsageError("--sgd.*", expected="--solver sgd", found="lbfgs, which takes none")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How both sides of a comparison are trained; lists are tried, one by one.

    None stands for the preset's value; docs/training.md has a table of them.
    """

    epochs: tuple[int, ...] | None = None
    """Passes over the labelled images."""

    lr_head: tuple[float, ...] | None = None
    """Learning rates of the linear layer, when fine-tuning."""

    lr_backbone: tuple[float, ...] | None = None
    """Learning rates of the pretrained network."""

    scratch_epochs: tuple[int, ...] | None = None
    """Passes over the labelled images, from scratch."""

    scratch_lr: tuple[float, ...] | None = None
    """Learning rates of everything, from scratch."""

    batch_size: int | None = None
    """Images a step."""

    optimizer: Literal["adamw", "sgd"] | None = None
    """sgd has momentum .9."""

    weight_decay: float | None = None
    """Decay of weights; biases and BatchNorm have none."""

    schedule: Literal["cosine", "drops"] | None = None
    """To zero, or to a fifth at 60% and again at 80%."""

    warmup_share: float | None = None
    """Share of the steps in which the learning rate rises."""

    head_c: tuple[float, ...] | None = None
    """C of the fit on frozen features that the linear layer starts from, when fine-tuning;
    0 lets it start at zero."""

    label_smoothing: float | None = None
    """Share of the target that goes to all classes alike."""

    smallest_crop: tuple[float, ...] | None = None
    """Smallest share of the image that a random crop covers, of both sides; 1 for no crops.
    The image is the square that preprocessing cuts from a photograph's middle."""

    flip_probability: float | None = None
    """How often an image is mirrored."""

    freeze_batch_norm: bool | None = None
    """Keep BatchNorm's statistics of pretraining when fine-tuning."""

    def __post_init__(self) -> None:
        for name in ("epochs", "scratch_epochs"):
            _require_all(name, getattr(self, name), lambda value: value >= 1, "at least 1")
        for name in ("lr_head", "lr_backbone", "scratch_lr", "head_c"):
            values = getattr(self, name)
            _require_all(name, values, lambda x: 0 <= x < math.inf, "finite, at least 0")
        crops = self.smallest_crop
        _require_all("smallest_crop", crops, lambda x: 0 < x <= 1, "more than 0, at most 1")
        for name in ("warmup_share", "label_smoothing", "flip_probability"):
            value = getattr(self, name)
            _require_all(name, None if value is None else (value,), lambda x: 0 <= x <= 1, "0 to 1")
        size, decay = self.batch_size, self.weight_decay
        require(size is None or size >= 2, "--recipe.batch-size", "at least 2", size)
        sound = decay is None or 0 <= decay < math.inf
        require(sound, "--recipe.weight-decay", "finite, at least 0", decay)


RECIPES: dict[str, RecipeOptions] = {
    # arXiv 2103.03230, section 3.2 and appendix A.3. When fine-tuning, the learning rates are
    # those it names, the best of a search on the test images; from scratch, where layer and
    # backbone share one, three are tried on held-out images.
    "paper": RecipeOptions(
        epochs=(20,),
        lr_head=(0.5,),
        lr_backbone=(0.002,),
        scratch_epochs=(20,),
        scratch_lr=(0.02, 0.1, 0.5),
        batch_size=256,
        optimizer="sgd",
        weight_decay=0.0,
        schedule="drops",
        warmup_share=0.0,
        head_c=(0.0,),
        label_smoothing=0.0,
        smallest_crop=(0.08,),
        flip_probability=0.5,
        freeze_batch_norm=False,
    ),
    "small": RecipeOptions(
        epochs=(30,),
        lr_head=(1e-4,),
        lr_backbone=(1e-4, 3e-4),
        scratch_epochs=(100,),
        scratch_lr=(1e-3, 3e-3, 1e-2),
        batch_size=64,
        optimizer="adamw",
        weight_decay=0.05,
        schedule="cosine",
        warmup_share=0.05,
        head_c=(0.03,),
        label_smoothing=0.1,
        smallest_crop=(0.7, 1.0),
        flip_probability=0.5,
        freeze_batch_norm=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """How a classifier of few labels teaches its network on unlabelled images."""

    images: int = 60_000
    """Unlabelled images, at most; drawn by the first seed."""

    epochs: int = 1
    """Passes over them, and the labelled ones."""

    lr: float = 1e-3
    """Learning rate of layer and network, at its peak."""

    batch_size: int = 128
    """Images a step."""

    smallest_crop: float = 0.7
    """Smallest share of the image that a random crop covers; 1 for no crops."""

    neighbours: int = 10
    """Nearest images over which the teacher's probabilities are smoothed."""

    smoothing: float = 0.7
    """What the neighbours count against the image itself; 0 for no smoothing."""

    temperature: float = 0.3
    """Below 1 the smoothed probabilities are sharpened, above 1 softened."""

    def __post_init__(self) -> None:
        for name, least in {"images": 1, "epochs": 1, "batch_size": 2, "neighbours": 1}.items():
            option = f"--distil.{name.replace('_', '-')}"
            require(getattr(self, name) >= least, option, f"at least {least}", getattr(self, name))
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            sound = 0 < value < math.inf
            require(sound, f"--distil.{name}", "a finite number above 0", value)
        crop = self.smallest_crop
        require(0 < crop <= 1, "--distil.smallest-crop", "more than 0, at most 1", crop)
        sound = 0 <= self.smoothing < 1
        require(sound, "--distil.smoothing", "at least 0, less than 1", self.smoothing)


@dataclass(frozen=True, kw_only=True)
class FewLabelsOptions(CommonOptions):
    """What is told to a probe that trains the whole network."""

    labels: float = 0.01
    """Share of the labels that may be used."""

    balanced: bool = True
    """As many labels of each class as of any other; else drawn from all images alike."""

    validation: Literal["labels", "train"] = "labels"
    """Where settings are chosen: on a fifth of the labels that may be used, or on other
    labelled training images, which are then more labels than those trained on."""

    val_images: int = 5_000
    """How many other training images, with --validation train; at most half of them."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws labels, what starts at random, and order; the first chooses settings."""

    preset: Literal["small", "paper"] = "small"
    """Where the values of the recipe come from that are not given. The paper's crops are of
    the whole photograph, here of the square that preprocessing cuts from its middle."""

    recipe: RecipeOptions = field(default_factory=RecipeOptions)

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the network; auto is bf16 where the device computes it natively."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.labels <= 1, "--labels", "more than 0, at most 1", self.labels)
        require(self.val_images >= 1, "--val-images", "at least 1", self.val_images)
        sound = (
            bool(self.seeds) and min(self.seeds) >= 0 and len(set(self.seeds)) == len(self.seeds)
        )
        require(sound, "--seeds", "different numbers of at least 0", self.seeds)
        require(max(self.seeds) <= MAX_SEED, "--seeds", f"at most {MAX_SEED}", self.seeds)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(FewLabelsOptions):
    """Fine-tune a network with few labels, against the same one trained from scratch on them.

    With --unlabelled the network learns from images without labels, too: self-distillation.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_OR_BUNDLE")]]
    """A run of `train.pretrain`, or a bundle."""

    unlabelled: str | None = None
    """Images to learn from without their labels, if they have any; may be those of --images."""

    distil: DistilOptions = field(default_factory=DistilOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unlabelled is None and self.distil != DistilOptions():
            raise UsageError("--distil.*", expected="--unlabelled, to learn from", found="none")


@dataclass(frozen=True, kw_only=True)
class TransferOptions(FewLabelsOptions):
    """Take an encoder to other labelled images: linear layer and fine-tuning, with baselines.

    A bundle whose network cannot be had back from its graph gets the linear layer alone.
    """

    encoder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_OR_BUNDLE")]]
    """A run, or a bundle."""

    labels: float = 1.0
    """Share of the labels that may be used."""

    seeds: tuple[int, ...] = (0,)
    """Each draws labels, what starts at random, and order; the first chooses settings."""
