"""What the tests of the probes share: quick options, and sources that are watched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from models.images import ImageData, ImageRecord, ImageSource
from train.device import Compute
from train.probe.options import RecipeOptions
from train.probe.probed import Probed, open_probed
from train.probe.report import ProbeReport

MINI = Path(__file__).parents[2] / "data/fashion-mnist-mini"
CPU = Compute(device=torch.device("cpu"), precision="fp32")
QUICK = RecipeOptions(
    epochs=(2,), lr_head=(3e-3,), lr_backbone=(1e-3, 1e-4), scratch_epochs=(2,),
    scratch_lr=(1e-3, 3e-3), batch_size=16,
    smallest_crop=(0.8,),
)  # fmt: skip

Events = list[str]


def opened(where: Path, **options: object) -> Probed:
    """Open a run or a bundle on one thread."""
    return open_probed(str(where), device=CPU.device, threads=1, **options)  # type: ignore[arg-type]  # cases


class WatchedSource:
    """A source that notes when one of its images is read."""

    def __init__(self, source: ImageSource, events: Events) -> None:
        self._source, self._events = source, events
        self.uri = source.uri

    def count(self) -> int | None:
        """Count."""
        return self._source.count()

    def load(self, key: str) -> ImageData:
        """Load."""
        return self._source.load(key)

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """Yield, and note every reading."""
        for record in self._source.records(start):

            def read(record: ImageRecord = record) -> ImageData:
                self._events.append("test image")
                return record.read()

            yield ImageRecord(record.key, record.label, read)


def top1(report: ProbeReport, name: str) -> float:
    """Find the figure of a row."""
    spread = next(row.top1 for row in report.rows if row.name == name)
    assert spread is not None
    return spread.mean
