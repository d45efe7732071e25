"""The picture of a run: loss above, kNN accuracy below, over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.files import atomic_file


def plot_curves(records: Sequence[dict[str, float]], path: Path, *, title: str) -> None:
    """Draw a run's log as a PNG.

    Args:
        records: of `train.log.read_log`; those with `loss` and those with `knn_top1` count.
        path: the picture; replaced whole.
        title: what stands above it.
    """
    losses = [record for record in records if record.get("loss") is not None]
    accuracies = [record for record in records if record.get("knn_top1") is not None]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([r["epoch"] for r in losses], [r["loss"] for r in losses], label="loss")
    for name in ("invariance", "redundancy"):
        values = [r[f"loss_{name}"] for r in losses]
        above.plot([r["epoch"] for r in losses], values, label=name, linewidth=0.8)
    above.set(title=title, ylabel="loss", yscale="log")
    above.legend()
    epochs = [r["epoch"] for r in accuracies]
    below.plot(epochs, [100 * r["knn_top1"] for r in accuracies], "o-", label="this encoder")
    for record in records[:1]:
        if record.get("knn_pixels") is not None:
            below.axhline(100 * record["knn_pixels"], linestyle=":", color="grey", label="pixels")
    below.set(xlabel="epoch", ylabel="held-out kNN top-1, %")
    if accuracies:
        below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
