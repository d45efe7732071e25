"""Which images to label: accuracy against the number of labels, by every method of index.select.

Fashion-MNIST, embedded by a frozen encoder that never saw a label. A method chooses from the
training images, the data set's labels answer for the person, and a classifier that has those labels
alone is judged on images that are in no pool. Selection sees no other image and no other label;
`--judge validation` judges on training images that are held out, which is what settings were
chosen by, and `--judge test` on the test images.

Judges: `probe`, the linear probe of `index.curation.softmax_probe`, and `knn`, the nearest labelled
image; both on vectors averaged over their neighbourhood among the pool, as `index.select` averages
them for its probe; and `probe_plain`, the probe on the encoder's vectors as they are.

Arms: margin and entropy need labels to begin with: the first budget is random, or typicality's
where the name says so. As in index.select their probe sees averaged vectors and the others choose
by the vectors as they are; `plain` and `averaged` are the other way round.

Run from the root, after `python -m index.build --images fashion-mnist --encoder
models/shipped/fashion-mnist --out C`:
`python -m benchmarks.selection C --out benchmarks/results/selection.json`, which draws
`selection.png` beside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.measuring import command_line
from index.collection import Collection
from index.curation.choosing import METHODS, Pool
from index.curation.smoothing import NEIGHBOURS, ROUNDS, smooth
from index.curation.softmax_probe import fit_probe
from index.knn import MISSING, knn_search
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.encoder import open_encoder
from models.fashion_mnist import open_fashion_mnist
from models.vectors import finish_vectors

ENCODE_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to choose: a method, the one that the first budget is chosen by, and the space."""

    name: str
    method: str
    start: str
    is_smooth: bool = False


ARMS = (
    Arm(name="random", method="random", start="random"),
    Arm(name="kcentre", method="kcentre", start="kcentre"),
    Arm(name="typicality", method="typicality", start="typicality"),
    Arm(name="margin", method="margin", start="random", is_smooth=True),
    Arm(name="entropy", method="entropy", start="random", is_smooth=True),
    Arm(name="margin after typicality", method="margin", start="typicality", is_smooth=True),
    Arm(name="kcentre, averaged", method="kcentre", start="kcentre", is_smooth=True),
    Arm(name="typicality, averaged", method="typicality", start="typicality", is_smooth=True),
    Arm(name="margin, plain", method="margin", start="random"),
)
"""The first six are what index.select does where nobody asks for another --smoothing."""


@dataclass(frozen=True, kw_only=True)
class SelectionBenchmarkOptions:
    """Draw accuracy against budget for every method of index.select."""

    collection: tyro.conf.Positional[Path]
    """A collection of Fashion-MNIST's training images."""
    budgets: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000)
    """Labels in all, ascending; an arm goes on from one to the next."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of what is drawn."""
    images: int | None = None
    """So many of the training images, drawn, are the pool; all where not given."""
    smoothing: int = ROUNDS
    """Rounds of averaging."""
    judge: Literal["test", "validation"] = "test"
    """The test images, or as many training images that are held out of the pool."""
    judged: int = 10_000
    """How many are judged on."""
    out: Path | None = None
    """JSON file for the result; a plot is drawn beside it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is chosen from, and what is judged on.

    Attributes:
        plain_ND: (P + J, D) vectors of the pool, then of the judged.
        smooth_ND: the same, averaged over the pool.
        classes_N: (P + J,) their classes.
        n_pool: P.
    """

    plain_ND: NDArray[np.float32]
    smooth_ND: NDArray[np.float32]
    classes_N: NDArray[np.int64]
    n_pool: int


def main(options: SelectionBenchmarkOptions) -> None:
    """Choose, judge, print, and write the result."""
    start_s = time.monotonic()
    task = make_task(options)
    rows: list[dict] = []
    for arm in ARMS:
        runs = [run_arm(task, arm, options.budgets, seed) for seed in options.seeds]
        rows.append(summarise(arm, options.budgets, runs))
        print(as_line(rows[-1], options.budgets), flush=True)
    report = {
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {name: version(name) for name in ("faiss-cpu", "numpy")},
        "seconds": round(time.monotonic() - start_s),
        "pool": task.n_pool,
        "judge": options.judge,
        "judged": len(task.classes_N) - task.n_pool,
        "smoothing": options.smoothing,
        "neighbours": NEIGHBOURS,
        "seeds": list(options.seeds),
        "budgets": list(options.budgets),
        "arms": rows,
        "best": {
            judge: {
                str(budget): max(rows, key=lambda row, n=n: row[judge]["mean"][n])["arm"]
                for n, budget in enumerate(options.budgets)
            }
            for judge in ("probe", "knn", "probe_plain")
        },
    }
    print(json.dumps(report["best"], indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        plot(report, options.out.with_suffix(".png"))


def run_arm(task: Task, arm: Arm, budgets: Sequence[int], seed: int) -> list[dict[str, float]]:
    """Choose from budget to budget, and judge at each."""
    vectors_PD = (task.smooth_ND if arm.is_smooth else task.plain_ND)[: task.n_pool]
    is_taken_P = np.zeros(task.n_pool, np.bool_)
    classes_P = np.full(task.n_pool, MISSING, np.int64)
    judged = []
    for number, budget in enumerate(budgets):
        pool = Pool(
            vectors_ND=vectors_PD,
            is_taken_N=is_taken_P,
            classes_N=classes_P,
            ids_N=np.arange(task.n_pool),
        )
        method = METHODS[arm.start if number == 0 else arm.method]
        chosen = method(pool, budget - int(is_taken_P.sum()), 1000 * seed + number).ids_B
        is_taken_P[chosen] = True
        classes_P[chosen] = task.classes_N[chosen]
        judged.append(judge(task, np.flatnonzero(is_taken_P)))
    return judged


def judge(task: Task, labelled: NDArray[np.int64]) -> dict[str, float]:
    """Give the accuracy of classifiers that have these labels alone."""
    truth_J = task.classes_N[task.n_pool :]
    classes = task.classes_N[labelled]
    present, own = np.unique(classes, return_inverse=True)
    scores = {"classes": float(len(present))}
    for name, vectors_ND in (("probe", task.smooth_ND), ("probe_plain", task.plain_ND)):
        probe = fit_probe(vectors_ND[labelled], own, len(present))
        said_J = present[probe.probabilities(vectors_ND[task.n_pool :]).argmax(axis=1)]
        scores[name] = float((said_J == truth_J).mean())
    nearest_J1 = knn_search(task.smooth_ND[task.n_pool :], task.smooth_ND[labelled], 1)[1]
    scores["knn"] = float((classes[nearest_J1[:, 0]] == truth_J).mean())
    return scores


def summarise(arm: Arm, budgets: Sequence[int], runs: Sequence[list[dict[str, float]]]) -> dict:
    """Give mean and sample deviation over the seeds, at each budget."""
    row: dict = {"arm": arm.name, "method": arm.method, "start": arm.start, "n": len(runs)}
    row["smooth"] = arm.is_smooth
    for name in ("probe", "knn", "probe_plain", "classes"):
        values_SB = np.array([[at[name] for at in run] for run in runs])
        spread_B = values_SB.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(budgets))
        row[name] = {
            "mean": values_SB.mean(axis=0).round(5).tolist(),
            "deviation": spread_B.round(5).tolist(),
        }
    return row


def make_task(options: SelectionBenchmarkOptions) -> Task:
    """Read the collection, embed the test images, and average everything over the pool."""
    with Collection.open(options.collection) as collection:
        ids = collection.ids
        rng = np.random.default_rng(0)
        order = rng.permutation(len(ids))
        n_held = options.judged if options.judge == "validation" else 0
        held, pool = order[:n_held], order[n_held:][: options.images]
        plain_PD = collection.vectors(ids[pool])
        names, classes_N = np.unique(np.array(collection.labels()), return_inverse=True)
        judged_JD, classes_J = collection.vectors(ids[held]), classes_N[held]
        encoder_path = collection.manifest.encoder
    if options.judge == "test":
        arrays = open_fashion_mnist("test")
        assert arrays.labels is not None
        images = arrays.images[: options.judged, :, :, None]
        encoder = open_encoder(encoder_path)
        starts = progress(
            range(0, len(images), ENCODE_ROWS), what="embedding", unit="batch",
            total=-(-len(images) // ENCODE_ROWS),
        )  # fmt: skip
        blocks = [encoder.encode(images[start : start + ENCODE_ROWS]) for start in starts]
        judged_JD = finish_vectors(np.concatenate(blocks))
        classes_J = np.searchsorted(names, arrays.labels[: options.judged])
    plain_ND = np.concatenate([plain_PD, judged_JD])
    own_PK = knn_search(plain_PD, plain_PD, NEIGHBOURS + 1)[1]
    is_self_PK = own_PK == np.arange(len(pool))[:, None]
    is_self_PK[~is_self_PK.any(axis=1), -1] = True  # a copy stands in its place
    own_PK = own_PK[~is_self_PK].reshape(len(pool), NEIGHBOURS)
    places_NK = np.concatenate([own_PK, knn_search(judged_JD, plain_PD, NEIGHBOURS)[1]])
    return Task(
        plain_ND=plain_ND,
        smooth_ND=smooth(plain_ND, places_NK, options.smoothing, unit=True),
        classes_N=np.concatenate([classes_N[pool], classes_J]).astype(np.int64),
        n_pool=len(pool),
    )


def as_line(row: dict, budgets: Sequence[int]) -> str:
    """Lay the figures of an arm out for people."""
    lines = [row["arm"]]
    for name in ("probe", "knn", "probe_plain"):
        figures = zip(budgets, row[name]["mean"], row[name]["deviation"], strict=True)
        cells = "  ".join(f"{n}: {mean:.3f} ±{spread:.3f}" for n, mean, spread in figures)
        lines.append(f"  {name:>11}  {cells}")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Draw accuracy against budget, with bands of one deviation, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "probe": "linear probe, averaged vectors",
        "knn": "nearest labelled image, averaged vectors",
    }
    for place, (name, title) in enumerate(titles.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        for number, row in enumerate(report["arms"]):
            mean, spread = np.array(row[name]["mean"]), np.array(row[name]["deviation"])
            style = "--" if "," in row["arm"] else "-"
            colour = "black" if row["arm"] == "random" else f"C{number}"
            axes.plot(
                report["budgets"], mean, style, marker="o", ms=3, color=colour, label=row["arm"]
            )
            axes.fill_between(
                report["budgets"], mean - spread, mean + spread, color=colour, alpha=0.12, lw=0
            )
        axes.set_xscale("log")
        axes.set_xticks(report["budgets"], [str(budget) for budget in report["budgets"]])
        axes.minorticks_off()
        axes.set_xlabel("labels")
        axes.set_ylabel(f"accuracy on {report['judged']:,} {report['judge']} images")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"Fashion-MNIST, {report['pool']:,} images to choose from, {len(report['seeds'])} seeds "
        "(bands: one deviation)",
        fontsize=11,
    )
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(run_command(SelectionBenchmarkOptions, main, prog="python -m benchmarks.selection"))
