"""What an export can be told, and the readout that each preset's runs have by default.

No torch: `--help` answers at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import tyro

from models.bundle import Json, Precision
from models.errors import UsageError
from train.config import PresetName, options_json
from train.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How vectors are made of the backbone's maps.

    Attributes:
        stages: numbers of stages, from 1, whose pooled maps are laid side by side; the last
            one where empty.
        grid: cells a side that maps are averaged over; one number for all, or one a stage.
        dim: dimensions of the PCA-whitening that comes last; None for no whitening.
        shrinkage: share of the largest variance that whitening adds to each.
        fit_images: training images that whitening is fitted on, at most.
    """

    stages: tuple[int, ...] = ()
    grid: tuple[int, ...] = (1,)
    dim: int | None = None
    shrinkage: float = 1e-3
    fit_images: int = 20_000


PRESET_READOUTS: Mapping[str, Readout] = {
    "fashion-mnist": Readout(stages=(3,), grid=(4,), dim=512, fit_images=60_000),
}
"""The readout of the runs of a preset, where it is not plain pooling of the last stage."""

READ_OF = ("image_size_px", "network.layout", "network.width", "network.stem", "network.stages")
"""What decides which maps there are to be read, by the names of a run's options."""

log = logging.getLogger("horace")


def usual_readout(options: Mapping[str, Json]) -> Readout:
    """Give the readout of a run's preset; of a run with another network that of none."""
    preset = str(options["preset"])
    if preset not in PRESET_READOUTS:
        return Readout()
    own = options_json(PRESETS[cast(PresetName, preset)])
    others = [name for name in READ_OF if options[name] != own[name]]
    if not others:
        return PRESET_READOUTS[preset]
    log.info(
        "the readout of preset %s is for its own network, and this run has another (--%s): "
        "pooling the last stage plainly; --readout.stages and the like choose more",
        preset, others[0].replace("_", "-"),
    )  # fmt: skip
    return Readout()


@dataclass(frozen=True, kw_only=True)
class ReadoutOptions:
    """How vectors are made of the backbone's maps; what is not given is the preset's."""

    stages: tuple[int, ...] | None = None
    """Stages whose maps are read, from 1; several are laid side by side."""

    grid: tuple[int, ...] | None = None
    """Cells a side that each map is averaged over, one number for all stages or one for each;
    1 pools a map whole."""

    dim: int | None = None
    """Dimensions that PCA-whitening leaves, ordered by variance; 0 for no whitening."""

    shrinkage: float | None = None
    """Share of the largest variance that whitening adds to each, so that noise is not blown
    up."""

    fit_images: int | None = None
    """Training images that whitening is fitted on, at most, without their labels."""

    def __post_init__(self) -> None:
        bounds = {"dim": 0, "fit_images": 2}
        for name, least in bounds.items():
            value = getattr(self, name)
            option = f"--readout.{name.replace('_', '-')}"
            if value is not None and value < least:
                raise UsageError(option, expected=f"at least {least}", found=str(value))
        if self.grid is not None and (not self.grid or min(self.grid) < 1):
            found = " ".join(map(str, self.grid)) or "none"
            raise UsageError("--readout.grid", expected="numbers of at least 1", found=found)
        if self.shrinkage is not None and not 0 < self.shrinkage < math.inf:
            raise UsageError(
                "--readout.shrinkage", expected="a finite number above 0", found=str(self.shrinkage)
            )

    def resolve(self, options: Mapping[str, Json]) -> Readout:
        """Fill what was not given from the readout of the run's preset.

        Args:
            options: of the run, by dotted name.

        Raises:
            UsageError: there is no whitening that shrinkage and images would be for.
        """
        default = usual_readout(options)
        dim = default.dim if self.dim is None else self.dim
        if not dim and (self.shrinkage, self.fit_images) != (None, None):
            raise UsageError(
                "--readout.shrinkage and --readout.fit-images",
                expected="none without whitening",
                found="one of them",
                mend="say how many dimensions whitening leaves, with --readout.dim",
            )
        return Readout(
            stages=default.stages if self.stages is None else self.stages,
            grid=default.grid if self.grid is None else self.grid,
            dim=dim or None,
            shrinkage=default.shrinkage if self.shrinkage is None else self.shrinkage,
            fit_images=default.fit_images if self.fit_images is None else self.fit_images,
        )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export a run's encoder as a bundle, which serve and index read without torch."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run directory of `train.pretrain`."""

    out: Path | None = None
    """Bundle to write; artifacts/bundles/NAME after the run where not given."""

    name: str | None = None
    """What the bundle is called; the name of its directory where not given."""

    source: str | None = None
    """Where the run's images are now, if they have moved."""

    random_twin: bool = True
    """Also write the network before its first step, the baseline of evaluations."""

    int8: bool = False
    """Also write the encoder in 8-bit integers, calibrated on training images, for CPUs."""

    fp16: bool = False
    """Also write the encoder in half precision, for GPUs."""

    triton_repository: Path | None = None
    """Also lay the encoder out as a model in this repository of Triton; for more than the
    defaults `python -m train.export.triton` takes the bundle."""

    tensorrt: bool = False
    """Also compile an engine for this machine's GPU, in half precision with --fp16; for more
    than the defaults `python -m train.export.tensorrt` takes the bundle."""

    replace: bool = False
    """Replace an existing bundle, and model of Triton."""

    json: bool = False
    """Print the summary as JSON."""

    readout: ReadoutOptions = field(default_factory=ReadoutOptions)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What else to write than fp32."""
        asked: dict[Precision, bool] = {"int8": self.int8, "fp16": self.fp16}
        return tuple(name for name, is_asked in asked.items() if is_asked)

    @property
    def bundle_path(self) -> Path:
        """The bundle to write."""
        return self.out or Path("artifacts/bundles") / self.run.resolve().name
