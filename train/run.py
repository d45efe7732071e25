"""The run directory: its files, who may start or go on in it, and the configuration it keeps.

Rules:
    A directory that holds a run is never written over: it is resumed or refused. One that holds
    anything else is refused.
    One process at a time works in it.
    A run is resumed only with the options, data and preprocessing that it was started with;
    a difference is named. Options that change no weight are free.
    `config.json` appears whole and is never changed.

Layout: `config.json`, `initial.pt` (the backbone before its first step), `checkpoints/`,
`log.jsonl`, `tensorboard/`, `curves.png`, and `rejects.jsonl` where images were skipped.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from models.bundle import Json
from models.cpu import cpu_budget, cpu_name
from models.errors import reason_of
from models.files import TEMPORARY_PREFIX, atomic_file
from models.preprocess import PreprocessSpec
from models.providers import gpu_names
from train.config import FREE_OPTIONS
from train.errors import RunError, writing

SCHEMA_VERSION = 1
STATISTICS_TOLERANCE = 1e-3
"""Of the mean and deviation of channels of values in [0, 1]: a quarter of a step of uint8. Other
images of a scene differ by more; the same differ where a few more or fewer can be read."""
DISTRIBUTIONS = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxscript", "onnxruntime")
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

    def is_of(
        self, uri: Json, sha256: Json, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> bool:
        """Say whether images are those of the run, from where they are and what they are.

        The hash of a stream knows names and sizes alone, and two cameras may have the same: of
        images of another place the statistics of the channels are compared, too.
        """
        if sha256 != self.data["sha256"]:
            return False
        was, now = (*self.channel_mean, *self.channel_std), (*mean, *std)
        return uri == self.data["uri"] or all(
            abs(a - b) <= STATISTICS_TOLERANCE for a, b in zip(was, now, strict=True)
        )

    @property
    def total_steps(self) -> int:
        """The steps that the run has when it is finished."""
        steps_per_epoch = cast(int, self.data["train_images"]) // cast(
            int, self.options["batch_size"]
        )
        return steps_per_epoch * cast(int, self.options["epochs"])

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

    @property
    def rejects_file(self) -> Path:
        """The images that were skipped, one JSON object a line."""
        return self.path / "rejects.jsonl"

    @contextmanager
    def held(self, *, resume: bool) -> Iterator[None]:
        """Keep other processes out, from before the images are read to the end.

        On resuming, what a killed process left half-written is cleared away. A directory made
        here goes again if nothing came into it.

        Raises:
            RunError: another process is at work in it, it cannot be written, or it is not
                one to start in, or to resume.
        """
        self.check_may_run(resume=resume)
        is_new = not self.path.exists()
        lock_file = self.path / ".lock"
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(lock)
            try:
                self.check_may_run(resume=resume)  # another may just have been at work
                if resume:
                    self._clean()
                yield
            finally:
                with suppress(OSError):
                    lock_file.unlink()
                    if is_new:
                        self.path.rmdir()  # refused unless it is empty
        finally:
            os.close(lock)

    def _clean(self) -> None:
        """Delete what a killed process had half-written.

        A directory is none of a training's: an export into the run may be at work on it.
        """
        with self.writing():
            for folder in (self.path, self.checkpoints):
                for left_over in folder.glob(f"{TEMPORARY_PREFIX}*"):
                    if not left_over.is_dir():
                        left_over.unlink(missing_ok=True)

    def writing(self) -> AbstractContextManager[None]:
        """Give a context in which an OSError becomes a `RunError` of this directory."""
        mend = "mend that or choose another --out; a run that has begun goes on with --resume"
        return writing(self.path, mend=mend)

    def _lock(self, lock: int) -> None:
        """Lock an open file; the lock ends with the process."""
        is_ours = False
        with self.writing(), suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(lock).st_nlink > 0  # else its holder has just deleted it
        if not is_ours:
            raise RunError(
                str(self.path),
                expected="no other process in this run",
                found="one at work",
                mend="wait for it, or choose another --out",
            )

    def check_may_run(self, *, resume: bool) -> None:
        """Refuse to start where a run is, or anything else, and to resume where no run is.

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
        if not has_run and (foreign := self._foreign()) is not None:
            raise RunError(
                str(self.path),
                expected="a new directory, or an empty one",
                found=f"other files in it, such as {foreign}",
                mend="choose another --out",
            )

    def _foreign(self) -> str | None:
        """Name something in the directory that no start of a run left there, if there is any."""
        with self.writing():
            names = sorted(os.listdir(self.path)) if self.path.exists() else []
        # What is written before `config.json`, and what a file system keeps.
        own = (self.initial_file.name, "lost+found")
        return next((n for n in names if n not in own and not n.startswith(".")), None)

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
        except OSError as error:
            raise RunError(
                str(self.config_file), expected="a file that can be read", found=reason_of(error)
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                str(self.config_file),
                expected=f"the configuration of a run, schema {SCHEMA_VERSION}",
                found=f"{type(error).__name__}: {error}",
                mend="start the run again in another directory",
            ) from error

    def check_options(
        self, kept: RunConfig, options: Mapping[str, Json], spec: PreprocessSpec
    ) -> None:
        """Refuse to go on with options that would change the weights.

        Args:
            kept: what the run was started with.
            options: all options by dotted name.
            spec: how images would become arrays.

        Raises:
            RunError: naming the first thing that differs.
        """
        before, now = _decisive(kept.options, kept.preprocessing), _decisive(options, spec)
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                raise RunError(
                    f"resuming {self.path}: {name}",
                    expected=repr(kept.options.get(name, before[name])),
                    found=repr(options.get(name, now[name])),
                    mend=self._mend_of(name),
                )

    def _mend_of(self, name: str) -> str:
        """Say what to do instead of resuming with another value of an option."""
        free = ", ".join(f"--{option.replace('_', '-')}" for option in FREE_OPTIONS)
        if name == "epochs":
            return (
                "the learning rate of every step depends on the length: train longer or shorter as "
                f"a new run, with another --out, {self._from_its_weights}"
            )
        return (
            "leave it out, or start another run with another --out; "
            f"only {free} may change on the way"
        )

    def check_data(self, kept: RunConfig, now: RunConfig) -> None:
        """Refuse to go on with images that are not those the run was started with.

        The same images may lie elsewhere by now.

        Raises:
            RunError: with the number of images, then and now.
        """
        data = now.data
        if kept.is_of(data["uri"], data["sha256"], now.channel_mean, now.channel_std):
            return
        is_there = data["uri"] == kept.data["uri"]
        raise RunError(
            f"resuming {self.path}: the images of {data['uri']}"
            + (" have changed" if is_there else ""),
            expected=f"the {kept.data['images']} images that it was started with"
            + ("" if is_there else f", from {kept.data['uri']}"),
            found=other_images(kept, cast(int, data["images"])),
            mend=("bring the old ones back" if is_there else "leave the source out")
            + f", or start another run with another --out, {self._from_its_weights}",
        )

    @property
    def _from_its_weights(self) -> str:
        """Say how another run begins with its weights."""
        return f"from these weights with --init-from {shlex.quote(str(self.path))}"


def other_images(kept: RunConfig, now: int) -> str:
    """Say what was found in the place of a run's images, given how many."""
    is_as_many = now == kept.data["images"]
    return "as many, with other pixels or labels" if is_as_many else f"{now} images"


def describe_environment() -> dict[str, Json]:
    """Name the versions and the hardware that a result depends on."""
    versions: dict[str, Json] = {"python": platform.python_version()}
    for distribution in ("horace", *DISTRIBUTIONS):
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[distribution] = None
    hardware = ", ".join([cpu_name(), f"{cpu_budget()} CPUs", *gpu_names()])
    return {"versions": versions, "hardware": hardware, "system": platform.platform()}


def _decisive(options: Mapping[str, Json], spec: PreprocessSpec) -> dict[str, Json]:
    """Give, by dotted name, what decides the weights a run ends with."""
    fields = {k: v for k, v in options.items() if k not in (*FREE_OPTIONS, "source")}
    # How often kNN is measured changes nothing; whether at all decides what is held out.
    fields["knn_every_epochs"] = options["knn_every_epochs"] != 0
    return fields | {f"preprocessing.{k}": v for k, v in spec.to_json().items()}


def _parse_config(document: dict[str, Json]) -> RunConfig:
    """Build the configuration from its JSON; anything missing raises KeyError."""
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {document['schema_version']}")
    data = cast(dict[str, Json], document["data"])
    for name in ("uri", "sha256", "images"):
        if name not in data:
            raise KeyError(f"data.{name}")
    return RunConfig(
        options=dict(cast(dict[str, Json], document["options"])),
        data=data,
        preprocessing=PreprocessSpec.from_json(cast(dict[str, Json], document["preprocessing"])),
        channel_mean=tuple(cast(list[float], document["channel_mean"])),
        channel_std=tuple(cast(list[float], document["channel_std"])),
        command=cast(str, document["command"]),
        environment=cast(dict[str, Json], document["environment"]),
    )
