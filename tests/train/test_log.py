"""The log: JSON lines that any tool reads, and that a resume leaves without a seam."""

from __future__ import annotations

import json
import logging
import math
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import log as train_log
from train.log import ProgressDisplay, RunLog, read_log, tensorboard_tag


def test_records_are_json_lines_and_events(tmp_path: Path) -> None:
    """Each record is one line with its step; infinities become null; events lie beside."""
    with closing(RunLog(tmp_path / "log.jsonl", tmp_path / "events", step=0)) as log:
        log.write(1, {"loss": 2.5, "lr": 0.1})
        log.write(2, {"loss": math.nan})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5, "lr": 0.1},
        {"step": 2, "loss": None},
    ]
    assert list((tmp_path / "events").glob("events.out.tfevents.*"))


def test_tensorboard_groups_what_belongs_together(tmp_path: Path) -> None:
    """Loss and parts, kNN, features, embeddings, C and progress each have a group."""
    names = ["loss", "loss_invariance", "knn_top1", "spread", "z_rankme", "c_diagonal", "lr"]
    with closing(RunLog(tmp_path / "log.jsonl", tmp_path / "events", step=0)) as log:
        log.write(3, dict.fromkeys(names, 0.5))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    tags = ["loss/total", "loss/invariance", "knn/top1", "features/spread", "embeddings/rankme",
            "correlation/diagonal", "progress/lr"]  # fmt: skip
    assert [tensorboard_tag(name) for name in names] == tags
    assert sorted(events.Tags()["scalars"]) == sorted(tags)
    assert [(e.step, e.value) for e in events.Scalars("knn/top1")] == [(3, 0.5)]


def test_a_resume_drops_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    """Records of later steps and a torn last line go; the rest stays."""
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [r["step"] for r in read_log(file)] == [1, 2, 3]
    with closing(RunLog(file, tmp_path / "events", step=2)) as log:
        log.write(3, {"loss": 1.0})
    assert read_log(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_resume_voids_the_events_past_the_checkpoint(tmp_path: Path) -> None:
    """TensorBoard reads the sittings' files in their order, and shows each step once."""
    for step, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0})):
        with closing(RunLog(tmp_path / "log.jsonl", tmp_path / "events", step=step)) as log:
            for at, loss in values.items():
                log.write(at, {"loss": loss})
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("loss/total")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_start_without_a_checkpoint_drops_all(tmp_path: Path) -> None:
    """The baselines of step 0 are measured again, and are there once."""
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 0, "knn_pixels": 0.5}\n')
    with closing(RunLog(file, tmp_path / "events", step=0)) as log:
        log.write(0, {"knn_pixels": 0.5})
    assert len(read_log(file)) == 1


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """A run may be killed before its first record."""
    assert read_log(tmp_path / "log.jsonl") == []


def test_progress_is_a_line_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line has images done and to do, rate, seconds left, and the latest loss."""
    monkeypatch.setattr(train_log, "LOG_EVERY_S", 0.0)
    with (
        closing(ProgressDisplay(100, 20)) as display,
        caplog.at_level(logging.INFO, logger="horace"),
    ):
        display.advance(30)
        display.show({"epoch": 1.0, "loss": 12.3456})
    assert "training 50/100 images, " in caplog.text
    assert " s left, epoch 1, loss 12.35" in caplog.text


def test_progress_lines_are_rare(caplog: pytest.LogCaptureFixture) -> None:
    """Within ten seconds of the last there is none."""
    with (
        closing(ProgressDisplay(100, 0)) as display,
        caplog.at_level(logging.INFO, logger="horace"),
    ):
        display.show({"loss": 1.0})
    assert caplog.text == ""


def test_the_rate_is_that_of_the_steps_since_the_last_record() -> None:
    """Each window stands for itself, and pauses for other work are left out."""
    now_s = 100.0
    with closing(ProgressDisplay(1000, 500, clock=lambda: now_s)) as display:
        assert display.images_per_s() == 0
        display.advance(100)
        now_s += 4
        assert display.images_per_s() == 25
        display.advance(60)
        with display.paused():
            now_s += 1000
        now_s += 1
        assert display.images_per_s() == 60
