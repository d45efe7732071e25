"""The report of a tuning: as JSON for the manifest, as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from index.ann.kinds import FLAT, settings_text
from index.ann.making import SEED
from index.ann.memory import as_size
from index.ann.trials import Figures, Trial
from index.ann.tuning import Tuned
from index.ann.versions import library_versions
from models.bundle import Json
from models.cpu import cpu_budget, cpu_name
from models.files import atomic_file
from models.memory import memory_bytes

DPI = 130


def to_json(tuned: Tuned) -> dict[str, Json]:
    """Lay the report out for the manifest."""
    goal = tuned.goal
    return {
        "recall": goal.recall,
        "k": goal.k,
        "memory_bytes": goal.memory_bytes,
        "metric": tuned.metric,
        "count": tuned.count,
        "dim": tuned.dim,
        "queries": tuned.queries,
        "queries_choosing": (tuned.n_queries + 1) // 2,
        "queries_confirming": tuned.n_queries // 2,
        "seed": SEED,
        "chosen": _trial_json(tuned, tuned.chosen),
        "trials": [_trial_json(tuned, trial, points=True) for trial in tuned.trials],
        "too_large": [one.factory for one in tuned.candidates if not one.fits],
        "peak_memory_bytes": tuned.peak_bytes,
        "peak_resident_bytes": tuned.resident_bytes,
        "seconds": round(tuned.seconds, 3),
        "hardware": {"cpu": cpu_name(), "cpus": cpu_budget(), "memory_bytes": memory_bytes()},
        "versions": dict(library_versions()),
    }


def in_short(report: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    """Say by name what a report in a manifest found: the recall, the setting, and who asked."""
    chosen, k = cast(dict[str, Json], report["chosen"]), report["k"]
    recall = cast(dict[str, float], chosen["recall_at"])[f"{k}"]
    parameters = cast(dict[str, int], chosen["parameters"])
    choosing, confirming = report["queries_choosing"], report["queries_confirming"]
    yield "tuning", f"recall@{k} {recall:.4f}; the target was {report['recall']}"
    yield "setting", _named(cast(str, chosen["factory"]), parameters)
    asked = f": {choosing} chose and {confirming} confirmed" if choosing else ""
    yield "queries", f"{report['queries']}{asked}"


def as_text(tuned: Tuned) -> str:
    """Lay the report out for a terminal."""
    goal, chosen = tuned.goal, tuned.chosen
    figures = chosen.figures
    head = (
        f"{'index':<28} {'build s':>8} {'bytes/vec':>9} {'recall@' + str(goal.k):>10} "
        f"{'worst 5%':>8} {'p50 ms':>8} {'p99 ms':>8} {'QPS':>7} {'batched':>8}  parameters"
    )
    lines = [head, *(_row(tuned, trial) for trial in tuned.trials)]
    lines += [
        f"{one.factory:<28} would take {as_size(max(one.build_bytes, one.search_bytes))}"
        for one in tuned.candidates
        if not one.fits
    ]
    at = ", ".join(f"@{k} {value:.4f}" for k, value in figures.recall.items())
    budget = "" if goal.memory_bytes is None else f" of {as_size(goal.memory_bytes)}"
    asked = f"{tuned.n_queries} queries ({tuned.queries}), half of which chose and half confirmed"
    if not tuned.n_queries:
        asked = f"exact search was timed with {tuned.queries}"
    lines += [
        "",
        f"taken: {_name(chosen)}; recall {at}",
        f"{asked}; single queries on one thread",
        f"memory at most {as_size(tuned.peak_bytes)}{budget}; "
        f"{as_size(tuned.resident_bytes)} resident with mapped files; {tuned.seconds:.0f} s",
    ]
    return "\n".join(lines)


def draw(path: Path, tuned: Tuned) -> None:
    """Draw recall against queries a second for every kind, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to load
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for trial in tuned.trials:
        points = sorted(trial.points, key=lambda point: point.recall)
        axes.plot(
            [1 - point.recall for point in points],
            [1 / point.query_s for point in points],
            "o-" if trial.candidate.factory != FLAT else "s",
            markersize=4,
            linewidth=1,
            label=trial.candidate.factory,
        )
    chosen = tuned.chosen.figures
    axes.plot(
        [1 - chosen.recall[tuned.goal.k]], [1 / chosen.p50_s], "*", markersize=15, color="#cf222e",
        label="taken",
    )  # fmt: skip
    least = 1e-4
    axes.set_xscale("symlog", linthresh=least)
    axes.axvline(1 - tuned.goal.recall, color="#656d76", linestyle="--", linewidth=1)
    axes.invert_xaxis()
    ticks = [0.5, 0.1, 0.05, 0.01, 0.001, 0.0]
    axes.set_xticks(ticks, [f"{1 - tick:g}" for tick in ticks])
    axes.set_yscale("log")
    axes.set_xlabel(f"recall@{tuned.goal.k}")
    axes.set_ylabel("single queries a second, one thread")
    axes.set_title(f"{tuned.count} x {tuned.dim}, {tuned.metric}")
    axes.grid(visible=True, linewidth=0.3)
    axes.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


def _trial_json(tuned: Tuned, trial: Trial, *, points: bool = False) -> dict[str, Json]:
    """Lay one kind out."""
    size = None if trial.file_bytes is None else round(trial.file_bytes / tuned.count, 2)
    found: dict[str, Json] = {
        "factory": trial.candidate.factory,
        "parameters": None if trial.parameters is None else dict(trial.parameters),
        **_figures_json(trial.figures),
        "bytes_per_vector": size,
        "build_s": round(trial.build_s, 3),
        "build_memory_bytes": trial.grown_bytes,
    }
    if points:
        found["points"] = [
            {
                "parameters": dict(point.parameters),
                "recall": round(point.recall, 6),
                "margin": round(point.margin, 6),
                "single_qps": round(1 / point.query_s, 1),
            }
            for point in trial.points
        ]
    return found


def _figures_json(figures: Figures) -> dict[str, Json]:
    """Lay figures out."""
    recall: Mapping[str, Json] = {f"{k}": round(value, 6) for k, value in figures.recall.items()}
    return {
        "recall_at": dict(recall),
        "worst_5_percent": round(figures.worst, 6),
        "p50_ms": round(1e3 * figures.p50_s, 4),
        "p99_ms": round(1e3 * figures.p99_s, 4),
        "single_qps": round(figures.single_qps, 1),
        "batch_qps": round(figures.batch_qps, 1),
    }


def _row(tuned: Tuned, trial: Trial) -> str:
    """Lay one kind out in a line."""
    figures = trial.figures
    size = f"{trial.file_bytes / tuned.count:.1f}" if trial.file_bytes else "-"
    verdict = "below the target"
    if trial.parameters is not None:
        verdict = settings_text(trial.parameters)
    return (
        f"{trial.candidate.factory:<28} {trial.build_s:8.1f} {size:>9} "
        f"{figures.recall[tuned.goal.k]:10.4f} {figures.worst:8.3f} {1e3 * figures.p50_s:8.3f} "
        f"{1e3 * figures.p99_s:8.3f} {figures.single_qps:7.0f} {figures.batch_qps:8.0f}  {verdict}"
    )


def _name(trial: Trial) -> str:
    """Name a kind and its setting."""
    return _named(trial.candidate.factory, trial.parameters or {})


def _named(factory: str, parameters: Mapping[str, int]) -> str:
    """Say `HNSW32 with efSearch 64`."""
    return f"{factory} with {settings_text(parameters)}" if parameters else factory
