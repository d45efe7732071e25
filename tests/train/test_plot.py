"""The curves of a run: each where it was measured, and beside what it is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from train.plot import MANY_RECORDS, draw_curves, draw_panel, panels, plot_curves

LOSS = {"step": 5, "epoch": 0.5, "loss": 9.0, "loss_invariance": 6.0, "loss_redundancy": 3.0}
ALL = [
    {"step": 0, "knn_pixels": 0.8, "knn_random": 0.7},
    LOSS,
    {"step": 10, "epoch": 1.0, "knn_top1": 0.8},
]


@pytest.mark.parametrize("records", [[], [LOSS], ALL], ids=["empty", "loss only", "all"])
def test_any_log_makes_a_picture(records: list[dict[str, float]], tmp_path: Path) -> None:
    """A run without labels, or killed early, has its curves, too; an old picture goes."""
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    plot_curves(records, path, title="run")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["a$b$c", "a$_$c"])
def test_a_path_is_no_formula(name: str, tmp_path: Path) -> None:
    """The title is the run directory as it is, also where it would not parse."""
    plot_curves([LOSS], tmp_path / "curves.png", title=f"runs/{name}")
    (title,) = draw_curves([LOSS], title=name).texts
    assert (title.get_text(), title.get_parse_math()) == (name, False)


def test_a_single_record_can_be_seen() -> None:
    """One point makes no line, so few records have markers; many have none."""
    (losses,) = draw_curves([LOSS], title="run").axes
    assert [line.get_marker() for line in losses.lines] == [".", ".", "."]
    many = [LOSS | {"epoch": float(i)} for i in range(MANY_RECORDS)]
    (losses,) = draw_curves(many, title="run").axes
    assert {line.get_marker() for line in losses.lines} == {""}


def test_there_is_a_panel_for_what_was_measured() -> None:
    """The log's values decide; a log without any has an empty loss."""
    titles = [axes.get_title(loc="left") for axes in draw_curves(ALL, title="run").axes]
    assert titles == ["Loss", "kNN accuracy"]
    everything = {curve.name: 1.0 for panel in panels() for curve in panel.curves}
    shown = [axes for axes in draw_curves([everything | {"epoch": 1.0}], title="run").axes
             if axes.get_title(loc="left")]  # fmt: skip
    assert len(shown) == len(panels())
    assert len(draw_curves([], title="run").axes) == 1


def test_both_baselines_are_drawn() -> None:
    """Raw pixels and the untrained encoder stand beside the encoder, in per cent."""
    _, accuracies = draw_curves(ALL, title="run").axes
    heights = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in accuracies.lines}
    assert heights == {
        "this encoder": [80.0],
        "raw pixels": [80.0, 80.0],
        "untrained encoder": [70.0, 70.0],
    }


def test_the_weights_that_a_run_starts_from_are_drawn() -> None:
    """They take the place of the untrained encoder."""
    records = [{"step": 0, "knn_pixels": 0.8, "knn_start": 0.75}, *ALL[1:]]
    assert panels()[1].in_words(records).endswith("raw pixels 80; weights it starts from 75")


def test_the_loss_is_drawn_above_its_floor() -> None:
    """The floor of the redundancy term is a line where it is known."""
    axes = Figure().add_subplot()
    draw_panel(axes, panels(redundancy_floor=2.0)[0], [LOSS])
    heights = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert heights["floor of redundancy"] == [2.0, 2.0]
    assert heights["redundancy"] == [3.0]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("least", [0.0, -40.0])
def test_a_loss_that_is_not_above_zero_is_drawn(least: float) -> None:
    """The axis is linear where a logarithmic one would leave values out."""
    records = [LOSS, LOSS | {"epoch": 1.0, "loss": least}]
    (losses,) = draw_curves(records, title="run").axes
    assert losses.get_yscale() == "linear"
    assert np.asarray(losses.lines[0].get_ydata()).tolist() == [9.0, least]
    assert f"loss 9 at epoch 0.5, {least:.4g} at epoch 1" in panels()[0].in_words(records)


def test_losses_have_plain_labels() -> None:
    """The axis is logarithmic and says 20, not 2 x 10^1."""
    records = [LOSS | {"epoch": float(i), "loss": 10.0 * (i + 1)} for i in range(3)]
    figure = draw_curves(records, title="run")
    figure.canvas.draw()
    assert {"5", "10", "20"} <= {text.get_text() for text in figure.axes[0].get_yticklabels()}


def test_a_panel_has_words() -> None:
    """Title, unit, first and last value of each curve, and what they are compared with."""
    assert panels()[1].in_words(ALL) == (
        "kNN accuracy, top-1, %: this encoder 80 at epoch 1, 80 at epoch 1; raw pixels 80; "
        "untrained encoder 70"
    )
