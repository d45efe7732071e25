"""What a run says while it works: JSON lines, TensorBoard events, and a bar or log lines.

Rules:
    A record is one JSON object with `step`; numbers only, so that any tool can read it.
    TensorBoard has the same numbers, grouped by what they are about, and as soon.
    After a resume the log has the records of an undisturbed run, at the same steps: those past
    the checkpoint are dropped before the first new one; without a checkpoint, all. The first
    new one may average fewer steps: see `train.books`.
    A bar is shown on a terminal, a log line now and then elsewhere.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]  # it has no types
    Event,
    SessionLog,
)
from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]  # as above
    Summary,
)
from torch.utils.tensorboard import RecordWriter
from tqdm import tqdm

from models.command import LOG_EVERY_S
from models.files import atomic_file

TAG_PREFIXES = {"loss_": "loss/", "knn_": "knn/", "z_": "embeddings/", "c_": "correlation/"}
"""From the start of a value's name to its group in TensorBoard."""

FEATURE_NAMES = frozenset({"spread", "rankme", "rankme_limit", "alpha_req", "dead_share"})
"""Values of the backbone's features, which have no prefix."""

log = logging.getLogger("horace")


def tensorboard_tag(name: str) -> str:
    """Give the name under which TensorBoard shows a value, such as `loss/invariance`."""
    if name == "loss":
        return "loss/total"
    if name in FEATURE_NAMES:
        return f"features/{name}"
    for prefix, group in TAG_PREFIXES.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"progress/{name}"


class RunLog:
    """The log of one run; whoever opens it closes it.

    Args:
        jsonl: the file of JSON lines.
        tensorboard: the folder of TensorBoard's events.
        step: where the run goes on; later records of an earlier sitting are dropped.
    """

    def __init__(self, jsonl: Path, tensorboard: Path, *, step: int) -> None:
        kept = [record for record in read_log(jsonl) if step and record["step"] <= step]
        with atomic_file(jsonl) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = jsonl.open("a")
        self._events = EventFile(tensorboard, first_step=step + 1 if step else 0)

    def close(self) -> None:
        """Close the JSON lines; the events are never open for longer than a record takes."""
        self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one record; what is not finite becomes null, which JSON can say.

        Raises:
            OSError: the disk is full or may not be written, or the run was taken away.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        self._events.write(step, {tensorboard_tag(name): v for name, v in values.items()})


class EventFile:
    """A file of scalars for TensorBoard, opened anew for every record.

    torch's SummaryWriter does that in a thread of its own, whose errors are a traceback, and
    come to light at some later record.

    Args:
        folder: where the events of a run lie; made if it is not there.
        first_step: what earlier files have of this step and later ones is void.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard knows a file by `tfevents`, and reads several in their names' order.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._add(Event(step=first_step, file_version="brain.Event:2"))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one record by its tags."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _add(self, event: Event) -> None:
        """Append one event."""
        event.wall_time = time.time()
        with self._path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())


def read_log(jsonl: Path) -> list[dict[str, float]]:
    """Read the records of a log; a last line that a kill tore off is left out."""
    records: list[dict[str, float]] = []
    if not jsonl.exists():
        return records
    for line in jsonl.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class ProgressDisplay:
    """How far a training is, how fast, when it ends, and with what loss; to be closed.

    Args:
        total_images: of all epochs.
        done_images: by earlier sittings.
        clock: gives seconds.
    """

    def __init__(
        self,
        total_images: int,
        done_images: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bar = tqdm(
            total=total_images, initial=done_images, desc="training", unit=" images",
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._clock = clock
        self._total, self._done, self._start = total_images, done_images, done_images
        self._start_s = self._shown_s = clock()
        self._window_done, self._window_s = done_images, self._start_s

    def advance(self, images: int) -> None:
        """Count the images of a step."""
        self._done += images
        self._bar.update(images)

    def show(self, values: Mapping[str, float]) -> None:
        """Show the latest values beside the bar, or in a log line if the last is a while ago."""
        texts = {name: f"{value:.4g}" for name, value in values.items()}
        self._bar.set_postfix(texts, refresh=False)
        now_s = self._clock()
        if not self._bar.disable or now_s - self._shown_s < LOG_EVERY_S:
            return
        self._shown_s = now_s
        rate = max((self._done - self._start) / max(now_s - self._start_s, 1e-9), 1e-9)
        left_s = (self._total - self._done) / rate
        numbers = ", ".join(f"{name} {text}" for name, text in texts.items())
        log.info(
            "training %d/%d images, %.0f/s, %.0f s left, %s",
            self._done, self._total, rate, left_s, numbers,
        )  # fmt: skip

    def images_per_s(self) -> float:
        """Give the rate since this was last asked, without what was `paused`."""
        now_s = self._clock()
        images, elapsed_s = self._done - self._window_done, now_s - self._window_s
        self._window_done, self._window_s = self._done, now_s
        return images / elapsed_s if elapsed_s > 0 else 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of this block, in which no image is learnt from."""
        start_s = self._clock()
        try:
            yield
        finally:
            self._window_s += self._clock() - start_s

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
