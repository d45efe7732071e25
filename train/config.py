"""What a pretraining run can be told, and the presets that say it for people.

Rules:
    Every option has a value in every preset, so that a run's `config.json` is complete.
    Options name their units. Values are checked here; whether a data set suits them is
    found out by those who open it.
    No torch: `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from models.bundle import Json
from models.errors import UsageError
from train.errors import RunError

PresetName = Literal["fashion-mnist", "folder"]

FREE_OPTIONS = (
    "checkpoint_every_s",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "knn_every_epochs",
    "log_every_steps",
)
"""Options that change no weight, so that a run may go on with others."""


def _require(is_sound: bool, option: str, expected: str, found: object) -> None:
    """Refuse an option's value."""
    if not is_sound:
        raise UsageError(option, expected=expected, found=str(found))


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The backbone that will be exported, and the projector that will not."""

    layout: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    """Blocks of the ResNet; resnet10 has one basic block a stage."""

    width: int = 64
    """Channels of the first stage; each later stage doubles them."""

    stem: Literal["small", "large"] = "small"
    """`small` keeps the full resolution, for images up to about 64 pixels; `large` is the
    published stem, which quarters it."""

    zero_init_residual: bool = True
    """Start every residual branch at zero, as published."""

    projector_widths: tuple[int, ...] = (2048, 2048, 2048)
    """Output width of each Linear layer; the last is the D of the loss."""

    def __post_init__(self) -> None:
        _require(self.width >= 1, "--network.width", "at least 1", self.width)
        widths_are_sound = bool(self.projector_widths) and min(self.projector_widths) >= 1
        _require(
            widths_are_sound, "--network.projector-widths", "one or more widths, each at least 1",
            self.projector_widths,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """The random views: one value for both, or a pair for view 1 and view 2."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""

    flip_probability: float = 0.5
    """How often a view is mirrored left to right."""

    jitter_probability: float = 0.8
    """How often brightness, contrast, saturation and hue are changed."""

    brightness: float = 0.4
    """Brightness is multiplied by 1 - this to 1 + this."""

    contrast: float = 0.4
    """Contrast is multiplied by 1 - this to 1 + this."""

    saturation: float = 0.2
    """Saturation is multiplied by 1 - this to 1 + this; three channels only."""

    hue: float = 0.1
    """Hue is turned by up to this share of the circle, at most .5; three channels only."""

    grey_probability: float = 0.2
    """How often colour is taken away; three channels only."""

    blur_probability: tuple[float, float] = (0.0, 0.0)
    """How often view 1 and view 2 are blurred; the paper has 1 and .1."""

    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest deviation of the blur, in pixels."""

    solarise_probability: tuple[float, float] = (0.0, 0.0)
    """How often values above the middle are inverted; the paper has 0 and .2."""

    def __post_init__(self) -> None:
        low, high = self.crop_area
        _require(0 < low <= high <= 1, "--views.crop-area", "0 < low <= high <= 1", self.crop_area)
        low, high = self.blur_sigma_px
        _require(0 < low <= high, "--views.blur-sigma-px", "0 < low <= high", self.blur_sigma_px)
        _require(0 <= self.hue <= 0.5, "--views.hue", "0 to .5", self.hue)
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            value = getattr(self, f"{name}_probability")
            shares = value if isinstance(value, tuple) else (value,)
            sound = all(0 <= share <= 1 for share in shares)
            _require(sound, f"--views.{name}-probability", "0 to 1", value)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"--views.{name}", "0 to 1", value)


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
    """Images a step, each in two views."""

    objective: Literal["barlow", "hsic"] = "barlow"
    """What correlations of unlike features are drawn to: 0, or -1."""

    lambd: float = 0.005
    """Weight of the redundancy term."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum .9."""

    lr_peak: float = 1e-3
    """Learning rate at the end of the warm-up."""

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

    network: NetworkOptions = field(default_factory=NetworkOptions)
    views: ViewOptions = field(default_factory=ViewOptions)

    def __post_init__(self) -> None:
        least = {
            "image_size_px": 8, "epochs": 1, "batch_size": 2, "val_images": 0, "bank_images": 1,
            "knn_every_epochs": 0, "checkpoint_every_steps": 1, "keep_checkpoints": 1,
            "checkpoint_every_s": 1, "log_every_steps": 1, "seed": 0, "warmup_epochs": 0,
            "weight_decay": 0, "lambd": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            _require(value >= bound, f"--{name.replace('_', '-')}", f"at least {bound}", value)
        _require(self.lr_peak > 0, "--lr-peak", "more than 0", self.lr_peak)
        for name in ("limit_images", "threads"):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            _require(value is None or value >= 1, option, "at least 1", value)

    @property
    def run_path(self) -> Path:
        """The run directory: `out`, or one named after the source."""
        if self.out is not None:
            return self.out
        stem = Path(self.source.rpartition(":")[2]).name.split(".")[0] or "run"
        return Path("artifacts/runs") / stem


PRESETS: dict[PresetName, PretrainOptions] = {
    # The prototype that reached 82.8 kNN (global pooling, 60k against 10k) in nine minutes
    # on two cores; small stem and narrow, so that an epoch is about a minute.
    "fashion-mnist": PretrainOptions(
        source="fashion-mnist",
        preset="fashion-mnist",
        image_size_px=28,
        channels=1,
        epochs=8,
        lambd=0.003,
        lr_peak=3e-3,
        # Branches that start at zero leave an untrained network of kNN 62.6 (5,000 held-out
        # images against 20,000) where the usual start has 78.7: too weak a baseline.
        network=NetworkOptions(
            layout="resnet10",
            width=16,
            zero_init_residual=False,
            projector_widths=(512, 512, 512),
        ),
        views=ViewOptions(crop_area=(0.25, 1.0)),
    ),
    # Photographs on two cores: the published stem at 96 pixels and half the width keep an
    # epoch of 3,000 images near half a minute.
    "folder": PretrainOptions(
        preset="folder",
        # As above: with zero-initialised branches the untrained baseline falls from kNN 72.7
        # to 25.2 here.
        network=NetworkOptions(
            width=32, stem="large", zero_init_residual=False, projector_widths=(1024, 1024, 1024)
        ),
        views=ViewOptions(
            crop_area=(0.2, 1.0), blur_probability=(0.5, 0.1), solarise_probability=(0.0, 0.2)
        ),
    ),
}


def options_json(options: PretrainOptions) -> dict[str, Json]:
    """Give the options by dotted name (`views.hue`), as `config.json` holds them.

    `out` and `resume` say where and how to run, not what, and are left out.
    """
    flat: dict[str, Json] = {}
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": _plain(item) for inner, item in value.items()})
        elif name not in ("out", "resume"):
            flat[name] = _plain(value)
    return flat


def options_from_json(flat: Mapping[str, Json]) -> PretrainOptions:
    """Give the options that `options_json` made `flat` of; what it lacks has its default.

    Raises:
        RunError: there is an option that does not exist here.
        UsageError: a value is out of range.
    """
    nested: dict[str, dict[str, object]] = {"": {}, "network": {}, "views": {}}
    try:
        for dotted, value in flat.items():
            group, _, name = dotted.rpartition(".")
            nested[group][name] = tuple(value) if isinstance(value, list) else value
        network = NetworkOptions(**nested["network"])  # type: ignore[arg-type]  # from JSON
        views = ViewOptions(**nested["views"])  # type: ignore[arg-type]  # from JSON
        groups = {"network": network, "views": views}
        return PretrainOptions(**nested[""], **groups)  # type: ignore[arg-type]  # from JSON
    except (TypeError, KeyError) as error:
        raise RunError(
            "the options of a run",
            expected="those of this Horace",
            found=str(error),
            mend="go on with the Horace that started it",
        ) from error


def _plain(value: object) -> Json:
    """Give tuples as lists, as JSON reads them back."""
    return cast(Json, list(value) if isinstance(value, tuple) else value)
