"""The three forms of the loss against the authors' and lightly's: time, memory, exactness.

`official` is the loss of facebookresearch/barlowtwins written out below: BatchNorm without
affine, product, division, diagonal and off-diagonal by the view of a flattened matrix.
`lightly` is `lightly.loss.BarlowTwinsLoss` as it is installed, where it is.

Time: forward and backward of float32 embeddings that are leaves. The candidates take turns
within every repeat, so that a noisy moment hits all of them; a ratio is the median of the
repeats' own ratios. Where other programs run, look at `cpu_s`, the CPU time of all threads.

Memory: each candidate once, in a process of its own, on embeddings that exist already: the
peak of the resident set (VmHWM) after it, less the one before it; on a GPU the peak of what
torch's allocator has handed out. The two gradients count.

Exactness: value and gradients against the paper's formula in float64.

Run from the root: `python -m benchmarks.loss --out benchmarks/results/loss.json`; with
`--device cuda` on one GPU, in float32 without TF32.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.clock import now_s
from benchmarks.measuring import command_line, spread_of, turns
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from train.loss import barlow_twins_loss
from train.loss.forms import device_memory_bytes

Loss = Callable[[Tensor, Tensor], Tensor]

LAMBD = 0.0051
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class LossBenchmarkOptions:
    """Compare the forms of the loss with the authors' and lightly's."""

    sizes: tuple[str, ...] = (
        "256x512", "256x2048", "256x8192", "1024x2048", "1024x8192", "4096x2048", "4096x512",
    )  # fmt: skip
    """Batch x dimensions to time everything at."""
    large: str = "256x65536"
    """Where only the exact forms of Horace are run, for C would take 17 GB; empty: nowhere."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the embeddings are."""
    repeats: int = 7
    """How often the candidates take turns at each size."""
    threads: int | None = None
    """CPU threads; what affinity and cgroup leave where not given."""
    out: Path | None = None
    """Where to write the figures as JSON."""
    memory_of: str = ""
    """`CANDIDATE:SIZE`: measure that one's memory, print bytes and end (used by itself)."""


def official(z1: Tensor, z2: Tensor) -> Tensor:
    """The authors' loss, as their `main.py` computes it on one process."""
    norm = nn.BatchNorm1d(z1.shape[1], affine=False, device=z1.device)
    c = norm(z1).T @ norm(z2)
    c.div_(len(z1))
    on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
    size = len(c)
    off_diagonal = c.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()
    return on_diagonal + LAMBD * off_diagonal.pow_(2).sum()


def candidates(*, is_large: bool) -> dict[str, Loss]:
    """Name what is compared."""
    found: dict[str, Loss] = {
        "gram": lambda a, b: barlow_twins_loss(a, b, lambd=LAMBD, form="gram"),
        "tiled": lambda a, b: barlow_twins_loss(a, b, lambd=LAMBD, form="tiled"),
    }
    if is_large:
        return found
    found["direct"] = lambda a, b: barlow_twins_loss(a, b, lambd=LAMBD, form="direct")
    found["official"] = official
    try:
        from lightly.loss import BarlowTwinsLoss
    except ModuleNotFoundError:
        return found
    found["lightly"] = BarlowTwinsLoss(lambda_param=LAMBD)
    return found


def embeddings(size: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two views that share half of their variance."""
    n, dim = map(int, size.split("x"))
    draw = torch.Generator().manual_seed(0)
    views = []
    shared = torch.randn(n, dim, generator=draw)
    for _ in range(2):
        view = shared + torch.randn(n, dim, generator=draw)
        views.append(view.to(device, dtype).requires_grad_())
    return views[0], views[1]


def run_once(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[float, float]:
    """Go forward and backward; give wall and CPU seconds."""
    z1.grad = z2.grad = None
    wall_s, cpu_s = now_s(), time.process_time()
    torch.autograd.backward(loss(z1, z2))
    return now_s() - wall_s, time.process_time() - cpu_s


def time_in_turns(
    losses: dict[str, Loss], size: str, device: str, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Give each candidate's seconds, a figure a repeat; the first repeat does not count."""
    z1, z2 = embeddings(size, device)
    figures: dict[str, dict[str, list[float]]] = {
        name: {"wall_s": [], "cpu_s": []} for name in losses
    }
    for repeat in range(repeats + 1):
        for name, loss in turns(losses.items(), repeat):
            gc.collect()
            wall_s, cpu_s = run_once(loss, z1, z2)
            if repeat:
                figures[name]["wall_s"].append(wall_s)
                figures[name]["cpu_s"].append(cpu_s)
    return figures


def times_as_fast(figures: dict[str, dict[str, list[float]]], name: str) -> dict[str, object]:
    """Compare a candidate with the official one, repeat by repeat."""
    if "official" not in figures:
        return {}
    ratios = {
        kind: [
            theirs / ours
            for theirs, ours in zip(figures["official"][kind], figures[name][kind], strict=True)
        ]
        for kind in ("wall_s", "cpu_s")
    }
    return {
        "times_as_fast_as_official": spread_of(ratios["wall_s"], 6),
        "times_less_cpu_than_official": spread_of(ratios["cpu_s"], 6),
    }


def peak_bytes() -> int:
    """Give the most memory this process ever had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) * 1024


def measure_memory(name: str, size: str, device: str) -> int:
    """Give the bytes that one forward and backward takes beyond the embeddings."""
    loss = candidates(is_large=False)[name]
    small1, small2 = embeddings("64x64", device)
    run_once(loss, small1, small2)  # libraries load, pools start
    z1, z2 = embeddings(size, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(loss, z1, z2)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = peak_bytes()
    run_once(loss, z1, z2)
    return peak_bytes() - before


def memory_in_own_process(name: str, size: str, device: str) -> int:
    """Measure memory where nothing else has been."""
    command = [
        sys.executable, "-m", "benchmarks.loss", "--memory-of", f"{name}:{size}",
        "--device", device,
    ]  # fmt: skip
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def errors(losses: dict[str, Loss], size: str, device: str) -> dict[str, dict[str, float]]:
    """Give each candidate's relative error in value and gradient against float64."""
    z1, z2 = embeddings(size, device, torch.float64)
    exact = barlow_twins_loss_written_out(z1, z2)
    torch.autograd.backward(exact)
    assert z1.grad is not None
    rows = {}
    for name, loss in losses.items():
        w1, w2 = embeddings(size, device)
        value = loss(w1, w2)
        torch.autograd.backward(value)
        assert w1.grad is not None
        rows[name] = {
            "value": abs(value.item() / exact.item() - 1),
            "gradient": float((w1.grad.double() - z1.grad).norm() / z1.grad.norm()),
        }
    return rows


def barlow_twins_loss_written_out(z1: Tensor, z2: Tensor) -> Tensor:
    """The paper's formula."""
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    c = a.T @ b / len(z1)
    diagonal = c.diagonal()
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + LAMBD * off_diagonal


def main(options: LossBenchmarkOptions) -> None:
    """Measure, print tables and write the figures."""
    torch.set_num_threads(options.threads or cpu_budget())
    if options.memory_of:
        print(measure_memory(*options.memory_of.split(":"), options.device))
        return
    report: dict[str, object] = {
        "command": command_line(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "memory_bytes": device_memory_bytes(torch.device(options.device)),
        "load_average_before": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()} | package_versions(),
        "repeats": options.repeats,
        "lambd": LAMBD,
    }
    sizes = [*options.sizes, *([options.large] if options.large else [])]
    for i in progress(range(len(sizes)), what="measuring", total=len(sizes), unit="size"):
        size = sizes[i]
        losses = candidates(is_large=size == options.large)
        figures = time_in_turns(losses, size, options.device, options.repeats)
        rows: dict[str, dict[str, object]] = {
            name: {kind: spread_of(values, 6) for kind, values in figures[name].items()}
            | times_as_fast(figures, name)
            | {"peak_extra_bytes": memory_in_own_process(name, size, options.device)}
            for name in losses
        }
        if size != options.large:
            for name, error in errors(losses, size, options.device).items():
                rows[name]["relative_error"] = error
        report[size] = rows
        print(table(size, rows), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def table(size: str, rows: dict[str, dict[str, object]]) -> str:
    """Lay out one size for people."""
    lines = [
        f"\n{size:12} {'wall ms':>10} {'CPU ms':>10} {'speed':>8} {'extra MB':>9} {'error':>9}"
    ]
    for name, row in rows.items():
        wall, cpu = (row[kind]["median"] * 1e3 for kind in ("wall_s", "cpu_s"))  # type: ignore[index]  # JSON
        ratio = row.get("times_as_fast_as_official", {"median": float("nan")})["median"]  # type: ignore[index]  # JSON
        error = row.get("relative_error", {"gradient": float("nan")})["gradient"]  # type: ignore[index]  # JSON
        extra = row["peak_extra_bytes"] / MIB  # type: ignore[operator]  # JSON
        lines.append(f"{name:12} {wall:10.1f} {cpu:10.1f} {ratio:7.1f}x {extra:9.1f} {error:9.1e}")
    return "\n".join(lines)


def package_versions() -> dict[str, str]:
    """Say what is installed of what is compared."""
    versions = {}
    for name in ("torch", "lightly"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    sys.exit(run_command(LossBenchmarkOptions, main, prog="python -m benchmarks.loss"))
