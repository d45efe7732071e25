"""Groups of a run's options: the network, the loss, the views.

Rules:
    Each group checks its own values, without torch; whether a named backbone exists is
    found out by `train.backbones`, which has the libraries to ask.
    The defaults are those of a small network on two cores; the paper's stand in
    `train.presets`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from models.errors import UsageError

OWN_LAYOUTS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101")
LIBRARIES = ("torchvision", "timm")
"""What a layout may name a backbone of, as in `timm:convnext_tiny`."""


LEAST_WIDTH = 8
"""On CPUs without AVX-512 the oneDNN of torch 2.14.1 writes past its buffers in the backward pass
of a strided 1x1 convolution, channels last, of fewer channels: seen with 4, on an AMD EPYC
(family 25)."""


def require(is_sound: bool, option: str, expected: str, found: object) -> None:
    """Refuse an option's value.

    Raises:
        UsageError: it is not sound.
    """
    if not is_sound:
        raise UsageError(option, expected=expected, found=str(found))


def unknown_name(what: str, found: str, names: Iterable[str], *, expected: str) -> UsageError:
    """Make the error for a misspelt name, with those that come close."""
    close = difflib.get_close_matches(found, list(names), n=3)
    mend = f"did you mean {' or '.join(close)}?" if close else None
    return UsageError(what, expected=expected, found=repr(found), mend=mend)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The backbone that will be exported, and the projector that will not."""

    layout: str = "resnet18"
    """resnet10 (one basic block a stage), resnet18, resnet34, resnet50 or resnet101; or any
    backbone of a library: torchvision:NAME, timm:NAME."""

    width: int = 64
    """Channels of the first stage; each later stage doubles them. Own ResNets only, as are
    the stem and the start of residual branches."""

    stem: Literal["small", "large"] = "small"
    """`small` keeps the full resolution, for images up to about 64 pixels; `large` is the
    published stem, which quarters it."""

    stages: int = 4
    """Stages of an own ResNet; what is exported may well come before the last, and a smaller
    network trains faster."""

    zero_init_residual: bool = True
    """Start every residual branch at zero, as published."""

    projector_widths: tuple[int, ...] = (2048, 2048, 2048)
    """Output width of each Linear layer; the last is the D of the loss."""

    projector_batch_norm: bool = True
    """BatchNorm between the projector's layers; without it they have biases."""

    predictor_width: int = 0
    """Hidden width of a predictor on view 1's embedding, an ablation; 0 for none."""

    def __post_init__(self) -> None:
        _check_layout(self.layout)
        least = f"at least {LEAST_WIDTH}"
        require(self.width >= LEAST_WIDTH, "--network.width", least, self.width)
        require(1 <= self.stages <= 4, "--network.stages", "1 to 4", self.stages)
        widths_are_sound = bool(self.projector_widths) and min(self.projector_widths) >= 1
        require(
            widths_are_sound, "--network.projector-widths", "one or more widths, each at least 1",
            self.projector_widths,
        )  # fmt: skip
        width = self.predictor_width
        require(width >= 0, "--network.predictor-width", "at least 0", width)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What correlations of the two views' embeddings are drawn to, and how it is computed."""

    objective: Literal["barlow", "hsic", "cross-entropy"] = "barlow"
    """Unlike features are drawn to correlation 0 (barlow) or -1 (hsic); cross-entropy takes
    the correlations as logits, an ablation."""

    lambd: float | None = None
    """Weight of the redundancy term; where not given .005, and for hsic one over the
    embedding's dimensions."""

    form: Literal["auto", "direct", "gram", "tiled"] = "auto"
    """How the loss is computed; auto takes the cheapest. All give the same."""

    terms: Literal["both", "invariance", "redundancy"] = "both"
    """Which terms count; one alone is an ablation."""

    normalise: Literal["batch", "features", "none"] = "batch"
    """What embeddings are standardised along; all but batch are ablations."""

    temperature: float = 0.1
    """What correlations are divided by, for cross-entropy."""

    stop_gradient: bool = False
    """Let view 2's embedding have no gradient, an ablation."""

    def __post_init__(self) -> None:
        is_weight = self.lambd is None or 0 <= self.lambd < math.inf
        require(is_weight, "--loss.lambd", "finite, at least 0", self.lambd)
        sound = 0 < self.temperature < math.inf
        require(sound, "--loss.temperature", "a finite number above 0", self.temperature)
        is_ablation = self.objective == "cross-entropy" or self.normalise == "features"
        require(
            not is_ablation or self.form in ("auto", "direct"), "--loss.form",
            f"auto or direct for {self.objective} with normalise {self.normalise}", self.form,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """The random views: one value for both, or a pair for view 1 and view 2."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How a crop is brought to size; the paper has bicubic."""

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

    views_in: Literal["batch", "workers"] = "batch"
    """Make the views of a whole batch at once, on the device, or image by image in the threads
    that decode."""

    def __post_init__(self) -> None:
        low, high = self.crop_area
        require(0 < low <= high <= 1, "--views.crop-area", "0 < low <= high <= 1", self.crop_area)
        low, high = self.blur_sigma_px
        sound = 0 < low <= high < math.inf
        require(sound, "--views.blur-sigma-px", "0 < low <= high, finite", self.blur_sigma_px)
        require(0 <= self.hue <= 0.5, "--views.hue", "0 to .5", self.hue)
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            value = getattr(self, f"{name}_probability")
            shares = value if isinstance(value, tuple) else (value,)
            sound = all(0 <= share <= 1 for share in shares)
            require(sound, f"--views.{name}-probability", "0 to 1", value)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--views.{name}", "0 to 1", value)


def _check_layout(layout: str) -> None:
    """Refuse what is neither an own layout nor a library's backbone."""
    library, colon, name = layout.partition(":")
    if layout in OWN_LAYOUTS or (library in LIBRARIES and name):
        return
    names = LIBRARIES if colon else OWN_LAYOUTS
    expected = f"{', '.join(OWN_LAYOUTS)}, torchvision:NAME or timm:NAME"
    raise unknown_name("--network.layout", library if colon else layout, names, expected=expected)
