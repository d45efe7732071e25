"""What a run directory says of its run without any network: status, records, skipped images.

Rules:
    Nothing is written; a run at work goes on.
    What is missing is None or empty; a run that was killed early has its facts, too.
    A line of a log that cannot be read ends it, as after a kill.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from index.embed import Reject
from train.config import PretrainOptions, options_from_json
from train.data.rejects import read_rejects
from train.log import read_log
from train.monitor import HealthWatch
from train.run import RunConfig, RunDirectory

Status = Literal["finished", "running", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        path: its directory.
        config: what it was started with.
        options: the same as the options of today.
        records: its log.
        is_held: whether a process is at work in it.
        rejects: the images that were skipped.
    """

    path: Path
    config: RunConfig
    options: PretrainOptions
    records: list[dict[str, float]]
    is_held: bool
    rejects: list[Reject]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that the training images fill."""
        return self.count("train_images") // self.options.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.options.epochs

    @property
    def steps(self) -> int:
        """Steps up to the last record."""
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def status(self) -> Status:
        """Whether the run is over, at work, or waits to be resumed."""
        if self.is_held:
            return "running"
        return "finished" if self.steps >= self.total_steps else "stopped"

    def count(self, name: str) -> int:
        """Give a count of the data, such as `train_images`."""
        return cast(int, self.config.data.get(name) or 0)

    def first(self, name: str) -> float | None:
        """Give the first value of that name in the log."""
        return next((r[name] for r in self.records if r.get(name) is not None), None)

    def last(self, name: str) -> float | None:
        """Give the last value of that name in the log."""
        return next((r[name] for r in self.records[::-1] if r.get(name) is not None), None)

    @property
    def redundancy_floor(self) -> float | None:
        """What the redundancy term costs by chance; None where no formula says so.

        Of N independent standardised samples the squares of C's D (D - 1) off-diagonal
        entries are 1 / N on average.
        """
        loss = self.options.loss
        if (loss.objective, loss.normalise) != ("barlow", "batch") or loss.terms == "invariance":
            return None
        dim = self.options.network.projector_widths[-1]
        floor = self.options.lambd * dim * (dim - 1) / self.options.batch_size
        return floor if floor > 0 else None

    @property
    def skipped(self) -> dict[str, int]:
        """How many images were skipped, by fault; a stream finds them as it goes."""
        at_start = cast(dict[str, int], self.config.data.get("skipped") or {})
        return dict(sorted(Counter(r.fault for r in self.rejects).items())) or at_start

    def warnings(self) -> list[str]:
        """Say what the log shows of trouble, each kind once, with the step it began at."""
        watch, texts = HealthWatch(), []
        for record in self.records:
            texts += [f"Step {record['step']:.0f}: {t}" for t in watch.warnings_in_words(record)]
        broken = [r["step"] for r in self.records if "loss" in r and r["loss"] is None]
        if broken:
            texts.append(f"Step {broken[0]:.0f}: the loss was no finite number.")
        return texts


def read_facts(run: RunDirectory) -> RunFacts:
    """Read what a run directory holds beside its weights.

    Raises:
        RunError: it is no run, or its configuration is damaged.
    """
    config = run.read_config()
    return RunFacts(
        path=run.path,
        config=config,
        options=options_from_json(config.options),
        records=read_log(run.log_file),
        is_held=is_held(run.path),
        rejects=read_rejects(run.rejects_file),
    )


def is_held(path: Path) -> bool:
    """Say whether a process is at work in a run directory."""
    try:
        lock = os.open(path / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def duration(seconds: float) -> str:
    """Say a time as people do: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def number(value: float) -> str:
    """Write a number with four digits, and whole ones with commas."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
