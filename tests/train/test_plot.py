"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.plot import plot_curves

LOSS = {"step": 5, "epoch": 0.5, "loss": 9.0, "loss_invariance": 6.0, "loss_redundancy": 3.0}


@pytest.mark.parametrize(
    "records",
    [
        [],
        [LOSS],
        [{"step": 0, "knn_pixels": 0.8, "knn_random": 0.7}, LOSS,
         {"step": 10, "epoch": 1.0, "knn_top1": 0.8}],
    ],
    ids=["empty", "loss only", "all"],
)  # fmt: skip
def test_any_log_makes_a_picture(records: list[dict[str, float]], tmp_path: Path) -> None:
    """A run without labels, or killed early, has its curves, too; an old picture goes."""
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    plot_curves(records, path, title="run")
    assert path.read_bytes().startswith(b"\x89PNG")
