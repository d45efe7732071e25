"""The picture of a run: loss above and, where it was measured, kNN accuracy below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from models.files import atomic_file

BASELINES = {"knn_pixels": ("raw pixels", "grey"), "knn_random": ("untrained encoder", "tab:red")}
"""What a trained encoder has to beat: the label and colour of each line."""


def plot_curves(records: Sequence[dict[str, float]], path: Path, *, title: str) -> None:
    """Draw a run's log as a PNG.

    Args:
        records: of `train.log.read_log`; those with `loss`, `knn_top1` or a baseline count.
        path: the picture; replaced whole.
        title: what stands above it.
    """
    figure = draw_curves(records, title=title)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_curves(records: Sequence[dict[str, float]], *, title: str) -> Figure:
    """Draw one panel, or two where kNN accuracy was measured; see `plot_curves`."""
    accuracies = [record for record in records if record.get("knn_top1") is not None]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if accuracies else 1, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].set_title(title)
    _draw_losses(panels[0], [r for r in records if r.get("loss") is not None])
    if accuracies:
        _draw_accuracies(panels[1], accuracies, baselines=records[0])
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    return figure


def _draw_losses(axes: Axes, losses: Sequence[dict[str, float]]) -> None:
    """Draw the loss and its parts; every record has a marker, so that a single one shows."""
    epochs = [r["epoch"] for r in losses]
    axes.plot(epochs, [r["loss"] for r in losses], ".-", label="loss")
    for name in ("invariance", "redundancy"):
        values = [r[f"loss_{name}"] for r in losses]
        axes.plot(epochs, values, ".-", label=name, linewidth=0.8, markersize=3)
    axes.set(ylabel="loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()


def _draw_accuracies(
    axes: Axes, accuracies: Sequence[dict[str, float]], *, baselines: dict[str, float]
) -> None:
    """Draw the accuracies in per cent, and a line for each baseline."""
    top1s = [100 * r["knn_top1"] for r in accuracies]
    axes.plot([r["epoch"] for r in accuracies], top1s, "o-", label="this encoder")
    for name, (label, colour) in BASELINES.items():
        if baselines.get(name) is not None:
            axes.axhline(100 * baselines[name], linestyle=":", color=colour, label=label)
    axes.set_ylabel("held-out kNN top-1, %")
    axes.legend()
