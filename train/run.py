"""The run directory: its files, who may start or go on in it, and the configuration it keeps.

Rules:
    A directory that holds a run is never written over: it is resumed or refused.
    A run is resumed only with the options, data and preprocessing that it was started with;
    a difference is named.
    `config.json` appears whole and is never changed.

Layout: `config.json`, `initial.pt` (the backbone before its first step), `checkpoints/`,
`log.jsonl`, `tensorboard/`, `curves.png`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from models.bundle import Json
from models.cpu import cpu_budget
from models.files import atomic_file
from models.preprocess import PreprocessSpec
from train.errors import RunError

SCHEMA_VERSION = 1
DISTRIBUTIONS = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime")
"""Packages whose version decides what a run or an export gives."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `config.json` holds.

    Attributes:
        options: every option of the run by dotted name.
        data: uri, hash, counts and classes of the images.
        preprocessing: how images became arrays.
        channel_mean, channel_std: over the training images, of values in [0, 1].
        command: the command line.
        environment: versions and hardware at the start.
    """

    options: Mapping[str, Json]
    data: Mapping[str, Json]
    preprocessing: PreprocessSpec
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    command: str
    environment: Mapping[str, Json]

    def to_json(self) -> dict[str, Json]:
        """Give the content of `config.json`."""
        preprocessing: dict[str, Json] = {**self.preprocessing.to_json()}
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "options": dict(self.options),
            "data": dict(self.data),
            "preprocessing": preprocessing,
            "channel_mean": list(self.channel_mean),
            "channel_std": list(self.channel_std),
            "environment": dict(self.environment),
        }

    def decisive(self) -> dict[str, Json]:
        """Give, by dotted name, all that decides the weights a run ends with."""
        fields = {**self.options, **{f"data.{k}": v for k, v in self.data.items()}}
        fields |= {f"preprocessing.{k}": v for k, v in self.preprocessing.to_json().items()}
        return fields


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration; its presence makes a directory a run."""
        return self.path / "config.json"

    @property
    def initial_file(self) -> Path:
        """The backbone's weights before the first step."""
        return self.path / "initial.pt"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def log_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def curves_file(self) -> Path:
        """Loss and kNN accuracy as a picture."""
        return self.path / "curves.png"

    def check_may_run(self, *, resume: bool) -> None:
        """Refuse to start where a run is, or to resume where none is.

        Raises:
            RunError: with what to do instead.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(str(self.path), expected="a directory", found="a file")
        has_run = self.config_file.exists()
        if has_run and not resume:
            raise RunError(
                str(self.path),
                expected="a directory without a run",
                found="a run",
                mend="go on with it by --resume, or choose another --out",
            )
        if resume and not has_run:
            raise RunError(
                str(self.path),
                expected="a run to resume",
                found="none",
                mend="check --out, or start it without --resume",
            )

    def write_config(self, config: RunConfig) -> None:
        """Write `config.json`, whole."""
        with atomic_file(self.config_file) as temporary:
            temporary.write_text(json.dumps(config.to_json(), indent=2, allow_nan=False) + "\n")

    def read_config(self) -> RunConfig:
        """Read `config.json`.

        Raises:
            RunError: it is missing, of another schema, or damaged.
        """
        if not self.config_file.is_file():
            raise RunError(
                str(self.path),
                expected="a run directory",
                found="no config.json" if self.path.exists() else "no such directory",
                mend="make one with `python -m train.pretrain SOURCE --out RUN`",
            )
        try:
            document = json.loads(self.config_file.read_bytes())
            return _parse_config(document)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                str(self.config_file),
                expected=f"the configuration of a run, schema {SCHEMA_VERSION}",
                found=f"{type(error).__name__}: {error}",
                mend="start the run again in another directory",
            ) from error

    def check_same(self, config: RunConfig) -> None:
        """Refuse to go on with anything but the configuration the run was started with.

        Raises:
            RunError: naming the first field that differs.
        """
        kept, given = self.read_config().decisive(), config.decisive()
        for field in sorted(kept.keys() | given.keys()):
            if kept.get(field) != given.get(field):
                raise RunError(
                    f"resuming {self.path}: {field}",
                    expected=repr(kept.get(field)),
                    found=repr(given.get(field)),
                    mend="resume with what the run was started with, or start another",
                )


def describe_environment() -> dict[str, Json]:
    """Name the versions and the hardware that a result depends on."""
    versions: dict[str, Json] = {"python": platform.python_version()}
    for distribution in ("horace", *DISTRIBUTIONS):
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[distribution] = None
    hardware = f"{_cpu_name()}, {cpu_budget()} CPUs"
    return {"versions": versions, "hardware": hardware, "system": platform.platform()}


def _cpu_name() -> str:
    """Give the processor's name as Linux has it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parse_config(document: dict[str, Json]) -> RunConfig:
    """Build the configuration from its JSON; anything missing raises KeyError."""
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {document['schema_version']}")
    return RunConfig(
        options=cast(dict[str, Json], document["options"]),
        data=cast(dict[str, Json], document["data"]),
        preprocessing=PreprocessSpec.from_json(cast(dict[str, Json], document["preprocessing"])),
        channel_mean=tuple(cast(list[float], document["channel_mean"])),
        channel_std=tuple(cast(list[float], document["channel_std"])),
        command=cast(str, document["command"]),
        environment=cast(dict[str, Json], document["environment"]),
    )
