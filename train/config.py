"""What a pretraining run can be told, and how a run keeps it.

Rules:
    Every option has a value in every preset, so that a run's `config.json` is complete; None
    means a rule, which the option's help names.
    Options name their units. Values are checked here; whether a data set suits them is
    found out by those who open it.
    No torch: `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from models.bundle import Json
from train.errors import RunError
from train.option_groups import LossOptions, NetworkOptions, ViewOptions, require

__all__ = [
    "FREE_OPTIONS",
    "LossOptions",
    "NetworkOptions",
    "PresetName",
    "PretrainOptions",
    "ViewOptions",
    "options_from_json",
    "options_json",
]

PresetName = Literal["fashion-mnist", "folder", "cifar10-resnet18", "imagenet-resnet50"]

FREE_OPTIONS = (
    "checkpoint_every_s",
    "checkpoint_every_steps",
    "cuda_graph",
    "keep_checkpoints",
    "knn_every_epochs",
    "log_every_steps",
    "workers",
)
"""Options that change no weight beyond rounding, so that a run may go on with others."""

UNKEPT_OPTIONS = ("out", "resume", "show_views")
"""Options that say where and how to run, not what: `config.json` leaves them out."""

MAX_SEED = 2**64 - 1
"""Of torch's generators."""

BARLOW_LAMBD = 5e-3
"""Weight of the redundancy term in the paper, section 2.2; its code has .0051."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pretrain an image encoder without labels, by Barlow Twins.

    The source is `fashion-mnist`, `folder:PATH`, `wds:PATTERN` or `idx:IMAGES[,LABELS]`;
    it also chooses the preset that the other options start from. Labels, where the source
    has any, are used only to watch the kNN accuracy on images held out from training.
    """

    source: tyro.conf.Positional[
        Annotated[
            str, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="(known where a run goes on)")
        ]
    ] = ""
    """Images to learn from."""

    preset: PresetName = "folder"
    """Values to start from; chosen by the source unless given."""

    out: Path | None = None
    """Run directory; artifacts/runs/NAME after the source where not given."""

    resume: bool = False
    """Go on with the run in the directory, from its last checkpoint and with its options."""

    image_size_px: int = 96
    """Side of the square that images are brought to."""

    channels: Literal[1, 3] = 3
    """1 for grey images, 3 for colour."""

    limit_images: int | None = None
    """Use only the first so many images of the source."""

    epochs: int = 100
    """Passes over the training images."""

    batch_size: int = 128
    """Images a step over all ranks, each in two views."""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """sgd and lars have momentum .9."""

    lr_peak: float | None = None
    """Learning rate at the end of the warm-up. Where not given: .001 for adamw, .06 times
    batch/128 for sgd, and for lars the paper's rate for the batch, times batch/256."""

    lr_biases: float | None = None
    """The same for biases and BatchNorm. Where not given: .0048 times batch/256 for lars, as
    in the paper, whose code moved them by 1/32 of that; else that of the weights."""

    lr_scaling: Literal["none", "linear"] = "none"
    """Take the learning rates that are given, and adamw's own, as they are or times batch/256."""

    lars_eta: float = 1e-3
    """Of lars: a weight's step over its norm, before the learning rate."""

    lars_clip: bool = False
    """Of lars: let the adapted learning rate be at most the learning rate, as solo-learn."""

    weight_decay: float = 1e-4
    """Decay of weights; biases and BatchNorm have none."""

    warmup_epochs: float = 1.0
    """Length of the linear warm-up; at most half of the run."""

    val_images: int = 5_000
    """Labelled images held out from training for the kNN monitor; at most a tenth."""

    bank_images: int = 10_000
    """Labelled training images that the kNN monitor compares with."""

    knn_every_epochs: int = 1
    """Epochs between two kNN measurements; 0 for none."""

    checkpoint_every_steps: int = 500
    """Steps between two checkpoints, at most."""

    checkpoint_every_s: int = 60
    """Seconds between two checkpoints, at most; Ctrl-C and SIGTERM make one, too."""

    keep_checkpoints: int = 2
    """How many checkpoints to keep."""

    log_every_steps: int = 50
    """Steps between two lines of the log; a short run has twenty of them or more."""

    seed: int = 0
    """Decides initial weights, order, views and the held-out images."""

    threads: int | None = None
    """CPU threads; what affinity and cgroup leave where not given."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes; auto is cuda where there is one."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the network's products; the loss is always computed in float32. auto is
    bf16 where the device computes it natively."""

    compile: bool = False
    """Compile the network, half a minute or more at the start, with a C++ compiler: in bf16, on
    CPUs that multiply it, faster steps for small images, and no faster ones for photographs or
    in fp32."""

    cuda_graph: bool = True
    """On one GPU, without --compile: record what every step does alike, and replay it. What
    cannot be recorded is told and computed as it is; then leave it off."""

    data_in: Literal["auto", "memory", "stream"] = "auto"
    """Hold the decoded images in memory, or read them anew in every epoch; auto holds what
    fits."""

    workers: int | None = None
    """Threads that decode a stream; as many as `threads` where not given."""

    init_from: Path | None = None
    """Weights to start from: a run, a bundle of one, or a file of the authors, torchvision,
    lightly or solo-learn."""

    show_views: Path | None = None
    """Write a picture of the views to this file and stop."""

    network: NetworkOptions = field(default_factory=NetworkOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    views: ViewOptions = field(default_factory=ViewOptions)

    def __post_init__(self) -> None:
        least = {
            "image_size_px": 8, "epochs": 1, "batch_size": 2, "val_images": 0, "bank_images": 1,
            "knn_every_epochs": 0, "checkpoint_every_steps": 1, "keep_checkpoints": 1,
            "checkpoint_every_s": 1, "log_every_steps": 1, "seed": 0, "warmup_epochs": 0,
            "weight_decay": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            require(value >= bound, option, f"at least {bound}", value)
            require(value < math.inf, option, "a finite number", value)
        for name in ("lr_peak", "lr_biases", "lars_eta"):
            value = getattr(self, name)
            sound = value is None or 0 < value < math.inf
            require(sound, f"--{name.replace('_', '-')}", "a finite number above 0", value)
        for name in ("limit_images", "threads", "workers"):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            require(value is None or value >= 1, option, "at least 1", value)
        require(self.seed <= MAX_SEED, "--seed", f"at most {MAX_SEED}", self.seed)

    @property
    def lambd(self) -> float:
        """Weight of the redundancy term: the one given, or the objective's own."""
        if self.loss.lambd is not None:
            return self.loss.lambd
        is_hsic = self.loss.objective == "hsic"
        return 1 / self.network.projector_widths[-1] if is_hsic else BARLOW_LAMBD

    @property
    def run_path(self) -> Path:
        """The run directory: `out`, or one named after the source."""
        if self.out is not None:
            return self.out
        source = Path(self.source.rpartition(":")[2])
        # Up to a suffix or a pattern: a run called `*` would stand for all runs in a shell.
        stems = (
            re.split(r"[.*?\[{]", part.name)[0].rstrip("-_ ") for part in (source, source.parent)
        )
        return Path("artifacts/runs") / next(filter(None, stems), "run")


def options_json(options: PretrainOptions) -> dict[str, Json]:
    """Give the options by dotted name (`views.hue`), as `config.json` holds them.

    `UNKEPT_OPTIONS` are left out.
    """
    flat: dict[str, Json] = {}
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": _plain(item) for inner, item in value.items()})
        elif name not in UNKEPT_OPTIONS:
            flat[name] = _plain(value)
    return flat


def options_from_json(flat: Mapping[str, Json]) -> PretrainOptions:
    """Give the options that `options_json` made `flat` of; what it lacks has its default.

    Raises:
        RunError: there is an option that does not exist here.
        UsageError: a value is out of range.
    """
    nested: dict[str, dict[str, object]] = {"": {}, "network": {}, "loss": {}, "views": {}}
    try:
        for dotted, value in flat.items():
            group, _, name = dotted.rpartition(".")
            nested[group][name] = tuple(value) if isinstance(value, list) else value
        path = nested[""].get("init_from")
        nested[""]["init_from"] = Path(path) if isinstance(path, str) else None
        network = NetworkOptions(**nested["network"])  # type: ignore[arg-type]  # from JSON
        loss = LossOptions(**nested["loss"])  # type: ignore[arg-type]  # from JSON
        views = ViewOptions(**nested["views"])  # type: ignore[arg-type]  # from JSON
        groups = {"network": network, "loss": loss, "views": views}
        return PretrainOptions(**nested[""], **groups)  # type: ignore[arg-type]  # from JSON
    except (TypeError, KeyError) as error:
        raise RunError(
            "the options of a run",
            expected="those of this Horace",
            found=str(error),
            mend="go on with the Horace that started it",
        ) from error


def _plain(value: object) -> Json:
    """Give tuples as lists, as JSON reads them back, and paths as text."""
    if isinstance(value, Path):
        return str(value)
    return cast(Json, list(value) if isinstance(value, tuple) else value)
