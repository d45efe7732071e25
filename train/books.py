"""What the first rank does after every step: log, kNN accuracy, checkpoint, in this order.

Rules:
    The log comes first, then the kNN accuracy, then the checkpoint, so that the records up
    to a checkpoint are all there when it is.
    A loss that is not finite ends the run before another checkpoint is written.
    Between two records nothing waits for a GPU.
    Losses are means over the steps since the record before, which no checkpoint keeps: the
    first record after a resume is of fewer steps, and `steps_averaged` says of how many.
    The images that this rank has skipped are written down with every checkpoint and however
    the run ends: they may never be met again. Those of other ranks come when all of them stop.

Shapes: N images, D dimensions.
"""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import Tensor

from train.checkpoint import Progress, save_checkpoint
from train.data.rejects import Rejects, write_rejects
from train.diagnostics import embedding_diagnostics
from train.errors import TrainError
from train.log import ProgressDisplay, RunLog, read_log
from train.monitor import HealthWatch
from train.run import RunDirectory
from train.trainer import LOGGED, StepOutcome, Trainer
from train.watch import Watch

log = logging.getLogger("horace")


class Books:
    """Keeps the log and the checkpoints of one sitting of a run.

    Args:
        trainer: what learns; it is looked at and never changed.
        watch: the kNN accuracy.
        run: where checkpoints go.
        run_log: where records go.
        display: shows people how far it is.
        rejects: the images that were skipped so far.
        start: where the run goes on.
    """

    def __init__(
        self,
        trainer: Trainer,
        watch: Watch,
        run: RunDirectory,
        run_log: RunLog,
        display: ProgressDisplay,
        rejects: Rejects,
        start: Progress,
    ) -> None:
        self._trainer, self._watch, self._run = trainer, watch, run
        self._run_log, self._display = run_log, display
        self._rejects, self._start = rejects, start
        self._began_s = self._saved_s = time.monotonic()
        self._window: list[Tensor] = []
        self._health = HealthWatch(read_log(run.log_file))

    def open(self) -> None:
        """Measure what there is before the first step."""
        if self._watch and self._start.step == 0:
            with self._display.paused():
                is_untrained = self._trainer.options.init_from is None
                values = self._watch.baselines(self._trainer.network, is_untrained=is_untrained)
                self._run_log.write(0, values)

    def after_step(self, outcome: StepOutcome, done: int, *, must_save: bool) -> None:
        """Do what is due after `done` steps.

        Raises:
            TrainError: the loss is not finite.
            OSError: the disk is full or may not be written.
        """
        trainer = self._trainer
        is_last = done == trainer.total_steps
        self._window.append(outcome.logged)
        self._display.advance(trainer.options.batch_size)
        if done % trainer.log_every_steps == 0 or is_last:
            self._record(outcome, done)
        if self._watch.is_due(
            done, steps_per_epoch=trainer.steps_per_epoch, total_steps=trainer.total_steps
        ):
            self._record_knn(done)
        if must_save or is_last or self._is_save_due(done):
            self._save(done)

    def _record(self, outcome: StepOutcome, done: int) -> None:
        """Log and show what the steps since the last record gave."""
        trainer = self._trainer
        means, steps_averaged = mean_of_window(self._window, done), len(self._window)
        self._window.clear()
        values = {
            "epoch": done / trainer.steps_per_epoch,
            "steps_averaged": steps_averaged,
            "lr": trainer.lr(done - 1),
            **embedding_diagnostics(outcome.features_ND, outcome.z1_ND, outcome.z2_ND),
            **means,
            "c_off_diagonal_floor": outcome.off_diagonal_floor,
            "images_per_s": self._display.images_per_s(),
        }
        self._run_log.write(done, values)
        self._display.show({name: values[name] for name in ("epoch", "loss")})
        for text in self._health.warnings_in_words(values):
            log.warning("step %d: %s", done, text)

    def _record_knn(self, done: int) -> None:
        """Measure and log the kNN accuracy at the end of an epoch."""
        with self._display.paused():
            epoch = done / self._trainer.steps_per_epoch
            top1 = self._watch.knn_top1(self._trainer.network)
            self._run_log.write(done, {"epoch": epoch, "knn_top1": top1})
            log.info("epoch %d: kNN %.2f%% on held-out images", round(epoch), 100 * top1)

    def _is_save_due(self, done: int) -> bool:
        """Say whether a checkpoint is due by the clock or by the steps."""
        options = self._trainer.options
        is_due = time.monotonic() - self._saved_s >= options.checkpoint_every_s
        return is_due or done % options.checkpoint_every_steps == 0

    def _save(self, done: int) -> None:
        """Write a checkpoint, unless a broken loss has left it nothing to keep."""
        mean_of_window(self._window, done)
        with self._display.paused():
            elapsed_s = self._start.elapsed_s + time.monotonic() - self._began_s
            trainer = self._trainer
            save_checkpoint(
                self._run.checkpoints,
                Progress(step=done, elapsed_s=elapsed_s),
                trainer.network,
                trainer.optimizer,
                trainer.scaler,
                keep=trainer.options.keep_checkpoints,
            )
            self._saved_s = time.monotonic()
        self.keep_rejects()

    def keep_rejects(self) -> None:
        """Write down the images that were skipped."""
        write_rejects(self._run.rejects_file, self._rejects.all())


def mean_of_window(window: list[Tensor], step: int) -> dict[str, float]:
    """Average what `LOGGED` names over the steps since the last record.

    Raises:
        TrainError: the loss is not finite.
    """
    if not window:
        return {}
    means = dict(zip(LOGGED, torch.stack(window).mean(dim=0).tolist(), strict=True))
    if not math.isfinite(means["loss"]):
        raise TrainError(
            f"loss up to step {step}",
            expected="a finite number",
            found=str(means["loss"]),
            mend="resume is of no use with these options: lower --lr-peak, or raise "
            "--warmup-epochs or --batch-size, and start another run",
        )
    return means
