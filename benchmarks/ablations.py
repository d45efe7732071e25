"""The paper's ablations at small scale: what each part of the loss is worth on Fashion-MNIST.

Every row is a whole run of `train.pretrain` with one thing changed, judged by the kNN
accuracy (k=20, T=.07, cosine) of the pooled features of the last stage, in eval mode, on
images held out of the *training* set; the test set is never read. The figures of the paper
beside it are ImageNet linear top-1 after 300 epochs (arXiv 2103.03230, tables 5 and 6 and
figures 2 to 4): only their order can be compared, and the rank correlation says how far it
agrees.

What differs from the paper besides the scale: AdamW instead of LARS, its learning rate times
sqrt(batch/128); of the projector only the last layer is widened, since three layers of 16,384
hold half a billion weights.

Runs are kept under `--runs`, and one that is whole is not repeated, so the benchmark can be
stopped and started again. Run from the root:
`python -m benchmarks.ablations --out benchmarks/results/ablations.json`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import operator
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.measuring import command_line
from models.bundle import Json
from models.command import run_command
from train.config import NetworkOptions, PretrainOptions, options_json
from train.errors import TrainError
from train.log import read_log
from train.loop import pretrain
from train.presets import PRESETS
from train.run import RunDirectory, describe_environment

HIDDEN_WIDTHS = (512, 512)
NETWORK = NetworkOptions(
    layout="resnet10", width=16, zero_init_residual=False, projector_widths=(*HIDDEN_WIDTHS, 512)
)
"""Small, so that sixty runs take an hour or two."""
BASELINE = "Barlow Twins"


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """Train every ablation of the paper at small scale, several seeds each."""

    runs: Path = Path("artifacts/bench/ablations")
    """Where the runs are kept."""
    epochs: int = 2
    """Passes over the training images, in every run."""
    seeds: int = 2
    """Runs of each row; each seed also has held-out images of its own."""
    limit_images: int | None = None
    """Use only the first so many images."""
    out: Path | None = None
    """JSON file for the result; the plot goes beside it, as PNG."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing changed.

    Attributes:
        table: which of the paper's tables or figures it belongs to.
        name: what people call it.
        paper: the paper's figure, top-1 in percent, where it has one.
        change: options by dotted name.
    """

    table: str
    name: str
    paper: float | None
    change: dict[str, object]


def rows() -> list[Row]:
    """List the ablations, the baseline first."""
    no_norm: dict[str, object] = {"network.projector_batch_norm": False}
    terms = [
        Row(table="loss", name=BASELINE, paper=71.4, change={}),
        Row(table="loss", name="invariance only", paper=57.3,
            change={"loss.terms": "invariance"}),
        Row(table="loss", name="redundancy only", paper=0.1,
            change={"loss.terms": "redundancy"}),
        Row(table="loss", name="normalised along features", paper=69.8,
            change={"loss.normalise": "features"}),
        Row(table="loss", name="no BN in the projector", paper=71.2, change=no_norm),
        Row(table="loss", name="no BN, no normalisation", paper=53.4,
            change={**no_norm, "loss.normalise": "none"}),
        Row(table="loss", name="cross-entropy", paper=63.3,
            change={"loss.objective": "cross-entropy"}),
        Row(table="loss", name="HSIC, lambda 1/D", paper=None,
            change={"loss.objective": "hsic", "loss.lambd": None}),
        Row(table="loss", name="HSIC, same lambda", paper=None,
            change={"loss.objective": "hsic"}),
        Row(table="asymmetry", name=BASELINE, paper=71.4, change={}),
        Row(table="asymmetry", name="stop-gradient", paper=70.5,
            change={"loss.stop_gradient": True}),
        Row(table="asymmetry", name="predictor", paper=70.2,
            change={"network.predictor_width": 512}),
        Row(table="asymmetry", name="stop-gradient and predictor", paper=61.3,
            change={"loss.stop_gradient": True, "network.predictor_width": 512}),
    ]  # fmt: skip
    batches = {64: None, 128: 69.7, 256: 70.7, 512: 71.4, 1024: 71.7}
    widths = (16, 64, 256, 1024, 4096, 16384)
    lambdas = {0.0003: None, 0.001: None, 0.003: None, 0.01: None, 0.03: None}
    return [
        *terms,
        *(Row(table="batch", name=str(b), paper=paper, change={"batch_size": b})
          for b, paper in batches.items()),
        *(Row(table="projector width", name=str(w), paper=None,
              change={"network.projector_widths": (*HIDDEN_WIDTHS, w)}) for w in widths),
        *(Row(table="lambda", name=f"{value:g}", paper=paper, change={"loss.lambd": value})
          for value, paper in lambdas.items()),
    ]  # fmt: skip


def main(options: AblationOptions) -> None:
    """Train what is missing, print the table, write the result."""
    results: list[dict[str, Json]] = []
    baseline: list[float | None] = []
    for row in rows():
        top1s = [measure(row, options, seed) for seed in range(options.seeds)]
        baseline = baseline or top1s
        results.append(describe(row, top1s, baseline))
        print(_line(results[-1]), flush=True)
    report: dict[str, Json] = {
        "command": command_line(),
        "measure": "kNN top-1 (k=20, T=.07) of pooled features, held-out training images",
        "held_out_images": RunDirectory(path=run_options(rows()[0], options, 0).run_path)
        .read_config()
        .data["val_images"],
        "epochs": options.epochs,
        "seeds": options.seeds,
        "limit_images": options.limit_images,
        "environment": describe_environment(),
        "baselines": baselines(options),
        "rank_correlation_with_paper": agreement(results),
        "claims_of_paper": claims(results),
        "rows": list[Json](results),
    }
    for name in ("rank_correlation_with_paper", "claims_of_paper"):
        print(json.dumps({name: report[name]}, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        plot(results, options.out.with_suffix(".png"))


def run_options(row: Row, options: AblationOptions, seed: int) -> PretrainOptions:
    """Give the preset with one thing changed; rows of equal options share a run."""
    base = dataclasses.replace(PRESETS["fashion-mnist"], network=NETWORK)
    batch_size = row.change.get("batch_size", base.batch_size)
    assert isinstance(batch_size, int)
    assert base.lr_peak is not None
    groups: dict[str, dict[str, object]] = {"": {}, "loss": {}, "network": {}}
    slug = f"{options.epochs}-{seed}"
    for dotted, value in row.change.items():
        if operator.attrgetter(dotted)(base) != value:
            group, _, name = dotted.rpartition(".")
            groups[group][name] = value
            slug += f"-{name}-{value}"
    changed = dataclasses.replace(
        base,
        **groups[""],  # type: ignore[arg-type]  # the rows name options of the right types
        loss=dataclasses.replace(base.loss, **groups["loss"]),  # type: ignore[arg-type]  # same
        network=dataclasses.replace(base.network, **groups["network"]),  # type: ignore[arg-type]  # same
        lr_peak=base.lr_peak * math.sqrt(batch_size / base.batch_size),
        epochs=options.epochs,
        warmup_epochs=min(1.0, options.epochs / 4),
        bank_images=60_000,
        limit_images=options.limit_images,
        knn_every_epochs=options.epochs,
        seed=seed,
    )
    path = options.runs / "".join(c if c.isalnum() else "-" for c in slug)
    return dataclasses.replace(changed, out=path)


def measure(row: Row, options: AblationOptions, seed: int) -> float | None:
    """Train one run unless it is there, and read its last kNN accuracy; None if it diverged."""
    run_of = run_options(row, options, seed)
    run = RunDirectory(path=run_of.run_path)
    values = _knn_values(run)
    if "knn_top1" not in values or not _is_of(run, run_of):
        shutil.rmtree(run.path, ignore_errors=True)
        try:
            pretrain(run_of)
        except TrainError as error:
            logging.getLogger("horace").warning("%s: %s", row.name, error)
        values = _knn_values(run)
    for checkpoint in run.checkpoints.glob("*.pt"):
        checkpoint.unlink()
    return values.get("knn_top1")


def baselines(options: AblationOptions) -> dict[str, Json]:
    """Give the raw pixels and the untrained network of the baseline's runs."""
    logs = [
        _knn_values(RunDirectory(path=run_options(rows()[0], options, seed).run_path))
        for seed in range(options.seeds)
    ]
    return {
        name: round(100 * statistics.mean(log[name] for log in logs), 2)
        for name in ("knn_pixels", "knn_random")
    }


def describe(row: Row, top1s: list[float | None], baseline: list[float | None]) -> dict[str, Json]:
    """Give mean and spread of a row's seeds, in percent, and its points above the baseline.

    Seeds have held-out images of their own, so points are taken seed by seed.
    """
    points = [
        round(100 * (value - theirs), 2)
        for value, theirs in zip(top1s, baseline, strict=True)
        if value is not None and theirs is not None
    ]
    values = [round(100 * value, 2) for value in top1s if value is not None]
    return {
        "table": row.table,
        "name": row.name,
        "paper": row.paper,
        "knn_top1": round(statistics.mean(values), 2) if values else None,
        "each": list[Json](values),
        "spread": round(max(values) - min(values), 2) if values else None,
        "points_above_baseline": list[Json](points),
    }


def agreement(results: list[dict[str, Json]]) -> dict[str, Json]:
    """Compute Spearman's rank correlation with the paper, for each table with its figures."""
    found: dict[str, Json] = {}
    for table in dict.fromkeys(str(r["table"]) for r in results):
        pairs = [
            (r["paper"], r["knn_top1"])
            for r in results
            if r["table"] == table and r["paper"] is not None and r["knn_top1"] is not None
        ]
        if len(pairs) > 2:
            ranks = np.argsort(np.argsort(np.array(pairs, dtype=float), axis=0), axis=0)
            found[table] = round(float(np.corrcoef(ranks.T)[0, 1]), 2)
    return found


def claims(results: list[dict[str, Json]]) -> dict[str, Json]:
    """Give our figures for what the papers say without a table.

    arXiv 2103.03230: the wider the projector, the better (figure 4); lambda hardly matters
    around .005. arXiv 2104.13712: HSIC is as good as Barlow Twins.
    """
    top1 = {(r["table"], r["name"]): r["knn_top1"] for r in results}
    widths = [
        (float(str(name)), value)
        for (table, name), value in top1.items()
        if table == "projector width" and value is not None
    ]
    ranks = np.argsort(np.argsort(np.array(widths, dtype=float), axis=0), axis=0)
    return {
        "rank correlation of accuracy with projector width": round(
            float(np.corrcoef(ranks.T)[0, 1]), 2
        ),
        "top-1 for lambda": {
            str(name): value for (table, name), value in top1.items() if table == "lambda"
        },
        "top-1 of HSIC and of Barlow Twins": {
            name: top1["loss", name] for name in (BASELINE, "HSIC, lambda 1/D", "HSIC, same lambda")
        },
    }


def plot(results: list[dict[str, Json]], path: Path) -> None:
    """Draw one panel a table: bars for the loss and its asymmetries, curves for the rest."""
    tables = list(dict.fromkeys(str(r["table"]) for r in results))
    figure, axes = plt.subplots(1, len(tables), figsize=(4 * len(tables), 4), layout="constrained")
    for axis, table in zip(axes, tables, strict=True):
        own = [r for r in results if r["table"] == table and r["each"]]
        names = [str(r["name"]) for r in own]
        for x, result in enumerate(own):
            each = [float(str(value)) for value in result["each"]]  # type: ignore[union-attr]  # a list
            axis.plot([x] * len(each), each, "o", color="C0", alpha=0.6)
        axis.plot(range(len(own)), [float(str(r["knn_top1"])) for r in own], "_", color="C0", ms=16)
        axis.set_xticks(range(len(own)), names, rotation=45, ha="right")
        axis.set_title(table)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("held-out kNN top-1 [%]")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_of(run: RunDirectory, options: PretrainOptions) -> bool:
    """Say whether a run was made with these options, not with those of an earlier preset."""
    kept, asked = run.read_config().options, options_json(options)
    settled = (None, "auto")  # by the run itself
    return all(kept.get(name) == value for name, value in asked.items() if value not in settled)


def _knn_values(run: RunDirectory) -> dict[str, float]:
    """Gather the last kNN figures of a run's log."""
    values: dict[str, float] = {}
    for record in read_log(run.log_file):
        values |= {name: value for name, value in record.items() if name.startswith("knn_")}
    return values


def _line(result: dict[str, Json]) -> str:
    """Lay a result out in one line."""
    paper = "" if result["paper"] is None else f"paper {result['paper']}"
    return (
        f"{result['table']:16} {result['name']:30} {result['knn_top1']} "
        f"(points above the baseline {result['points_above_baseline']}) {paper}"
    )


if __name__ == "__main__":
    sys.exit(run_command(AblationOptions, main, prog="python -m benchmarks.ablations"))
