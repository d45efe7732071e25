"""The loss across ranks against one process: gloo groups of 2 and 4 that share a batch.

Every rank has rows of its own, whose level drifts over the batch, so that no two ranks have
alike statistics. The mean that DistributedDataParallel takes over the ranks must be the
gradient of one process on the whole batch: rank by rank, the gradient by its rows, over
`world`, is compared with those rows of the gradient that one process has, in the same form
and dtype. An error is the norm of the difference over the norm of what is right; of all
ranks the worst counts. A tile has a third of the rows of C here, so that there are three or
four; at its real size of 64 MiB a second one would take D above 4,096.

`gradient_error_without_collectives` says what the bars can catch: it is that of ranks that
take the loss of their own rows alone.

There is no network in this, and no GPU: for both see `tests/train`. Run from the root:
`python -m benchmarks.ranks --out benchmarks/results/ranks.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measuring import command_line
from models.bundle import Json
from models.command import run_command
from models.errors import UsageError
from train.collectives import Group
from train.errors import TrainError
from train.loss import forms, loss_terms
from train.loss.forms import Chosen
from train.run import describe_environment

DTypeName = Literal["float32", "float64"]
QuadraticObjective = Literal["barlow", "hsic"]
Found = tuple[Tensor, Tensor, Tensor]
"""The loss, and the gradient by each view."""

DTYPES: dict[DTypeName, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
BARS: dict[DTypeName, float] = {"float32": 1e-5, "float64": 1e-10}
"""Relative errors that count as none; rounding leaves about 1e-7 and 1e-16."""

ERROR_NAMES = ("value_error", "gradient1_error", "gradient2_error")
LAMBD = 0.0051
"""Of the authors' code."""
WORKER_TIMEOUT_S = 240


@dataclass(frozen=True, kw_only=True)
class RanksOptions:
    """Compare the loss's gradients across ranks with those of one process."""

    sizes: tuple[str, ...] = ("32x96", "64x64", "96x32", "256x1024", "1024x256")
    """Whole batch x dimensions, on both sides of N = D."""
    worlds: tuple[int, ...] = (2, 4)
    """How many processes share the batch."""
    out: Path | None = None
    """JSON file for the result."""
    worker: str = ""
    """`RANK:WORLD:FOLDER`: be that rank, and leave its share there (used by itself)."""

    def __post_init__(self) -> None:
        for size, world in itertools.product(self.sizes, self.worlds):
            n = int(size.split("x")[0])
            if world < 2 or n % world or n // world < 2:
                expected = f"a batch that {world} ranks share, two rows or more each"
                raise UsageError("--sizes and --worlds", expected=expected, found=size)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked of the loss.

    Attributes:
        objective: what the off-diagonal is drawn to.
        form: how it is computed.
        n: rows of the whole batch.
        dim: dimensions of an embedding.
        dtype: of the embeddings, and so of all arithmetic.
    """

    objective: QuadraticObjective
    form: Chosen
    n: int
    dim: int
    dtype: DTypeName


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far the worst rank is from one process, relative to what is right.

    Attributes:
        value_error: of the loss.
        gradient1_error: of the gradient by the first view.
        gradient2_error: of the gradient by the second view.
    """

    value_error: float
    gradient1_error: float
    gradient2_error: float

    @property
    def worst(self) -> float:
        """The largest of them; NaN where one is."""
        return float(torch.tensor(list(asdict(self).values()), dtype=torch.float64).max())


def all_cases(sizes: Sequence[str]) -> list[Case]:
    """List every objective, form, size and dtype, in an order that all processes share."""
    return [
        Case(objective=objective, form=form, n=n, dim=dim, dtype=dtype)
        for n, dim in (map(int, size.split("x")) for size in sizes)
        for dtype in DTYPES
        for objective in get_args(QuadraticObjective)
        for form in get_args(Chosen)
    ]


def embeddings(case: Case) -> tuple[Tensor, Tensor]:
    """Make both views of the whole batch, (N, D) each; no two ranks have alike rows."""
    draw = torch.Generator().manual_seed(0)
    shared, noise1, noise2 = torch.randn(3, case.n, case.dim, generator=draw, dtype=torch.float64)
    drift_N1 = torch.linspace(0, 3, case.n, dtype=torch.float64)[:, None]
    views = 3 * (shared + noise1) + drift_N1, shared + noise2 - 2 * drift_N1
    return views[0].to(DTYPES[case.dtype]), views[1].to(DTYPES[case.dtype])


def loss_and_gradients(case: Case, rows: slice, group: Group) -> Found:
    """Compute the loss of some rows of the batch, and its gradient by them."""
    z1, z2 = (z[rows].clone().requires_grad_() for z in embeddings(case))
    forms.TILE_BYTES = case.dim // 3 * case.dim * z1.element_size()
    terms = loss_terms(z1, z2, lambd=LAMBD, objective=case.objective, form=case.form, group=group)
    torch.autograd.backward(terms.loss)
    assert z1.grad is not None
    assert z2.grad is not None
    return terms.loss.detach(), z1.grad, z2.grad


def rows_of(rank: int, world: int, n: int) -> slice:
    """Say which rows of the batch a rank has."""
    return slice(rank * n // world, (rank + 1) * n // world)


def work(rank: int, world: int, folder: Path, cases: Sequence[Case]) -> None:
    """Be one rank: compute its share of every case and leave it in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world,
        timeout=timedelta(seconds=WORKER_TIMEOUT_S),
    )  # fmt: skip
    found = [loss_and_gradients(case, rows_of(rank, world, case.n), "world") for case in cases]
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_group(world: int, sizes: Sequence[str]) -> list[list[Found]]:
    """Start a group for all cases; give what each of its ranks found.

    Raises:
        TrainError: a rank failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = [start_rank(rank, world, Path(folder), sizes) for rank in range(world)]
        try:
            for worker in workers:
                _, said = worker.communicate(timeout=WORKER_TIMEOUT_S)
                if worker.returncode:
                    raise TrainError(
                        f"a rank of {world}", expected="its share", found=last_line(said)
                    )
        except subprocess.TimeoutExpired as error:
            raise TrainError(
                f"{world} ranks", expected=f"an end within {WORKER_TIMEOUT_S} s", found="none"
            ) from error
        finally:
            for worker in workers:  # one that failed leaves the others waiting for it
                worker.kill()
                worker.communicate()
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(world)]


def last_line(said: str) -> str:
    """Give the line that says what was wrong."""
    return said.strip().rpartition("\n")[2] or "no word"


def start_rank(rank: int, world: int, folder: Path, sizes: Sequence[str]) -> subprocess.Popen[str]:
    """Start one rank, on one thread."""
    command = [sys.executable, "-m", "benchmarks.ranks", "--sizes", *sizes]
    return subprocess.Popen(
        [*command, "--worlds", str(world), "--worker", f"{rank}:{world}:{folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def compare(case: Case, whole: Found, ranks: Sequence[Found]) -> Errors:
    """Give the errors of the worst rank.

    Args:
        case: whose batch it was.
        whole: of one process.
        ranks: of each rank its value and gradients, as the loss gives them: `world` times its
            share, of which DDP takes the mean.
    """
    world = len(ranks)
    rows = [rows_of(rank, world, case.n) for rank in range(world)]
    value, *gradients = (
        torch.stack([
            relative_error(each[i] / (world if i else 1), whole[i][own] if i else whole[i])
            for each, own in zip(ranks, rows, strict=True)
        ]).max().item()
        for i in range(3)
    )  # fmt: skip
    return Errors(value_error=value, gradient1_error=gradients[0], gradient2_error=gradients[1])


def relative_error(found: Tensor, right: Tensor) -> Tensor:
    """Give the norm of the difference over the norm of what is right."""
    error: Tensor = (found.double() - right.double()).norm() / right.double().norm()
    return error


def without_collectives(case: Case, whole: Found, world: int) -> float:
    """Give the worst gradient error of ranks that know nothing of one another."""
    alone = [loss_and_gradients(case, rows_of(rank, world, case.n), None) for rank in range(world)]
    errors = compare(case, whole, alone)
    return max(errors.gradient1_error, errors.gradient2_error)


def describe(case: Case, whole: Found, ranks: Sequence[Found]) -> dict[str, Json]:
    """Say how a case came out with so many ranks."""
    errors = compare(case, whole, ranks)
    return {
        "world": len(ranks),
        **asdict(case),
        **asdict(errors),
        "gradient_error_without_collectives": without_collectives(case, whole, len(ranks)),
        "bar": BARS[case.dtype],
        "holds": errors.worst < BARS[case.dtype],
    }


def main(options: RanksOptions) -> None:
    """Compare, print, and write the result.

    Raises:
        TrainError: a rank failed, or a bar does not hold; in the latter case the result is
            written all the same.
    """
    cases = all_cases(options.sizes)
    if options.worker:
        rank, ranks, folder = options.worker.split(":", 2)
        return work(int(rank), int(ranks), Path(folder), cases)
    start_s = time.perf_counter()
    torch.set_num_threads(1)  # as each rank has
    wholes = [loss_and_gradients(case, slice(None), None) for case in cases]
    results: list[dict[str, Json]] = []
    for world in options.worlds:
        by_rank = run_group(world, options.sizes)
        for i, case in enumerate(cases):
            results.append(describe(case, wholes[i], [found[i] for found in by_rank]))
            print(line(results[-1]), flush=True)
    environment = describe_environment()
    failed = [line(result) for result in results if not result["holds"]]
    report: dict[str, Json] = {
        "command": command_line(),
        "hardware": environment["hardware"],
        "versions": environment["versions"],
        "backend": "gloo",
        "lambd": LAMBD,
        "elapsed_s": round(time.perf_counter() - start_s, 1),
        "holds": not failed,
        "worst": worst_by_dtype(results),
        "cases": list[Json](results),
    }
    print(json.dumps({name: report[name] for name in ("elapsed_s", "holds", "worst")}, indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    if failed:
        raise TrainError(
            f"{len(failed)} of {len(results)} cases",
            expected="the gradients of one process", found=f"others, the first in {failed[0]}",
        )  # fmt: skip


def worst_by_dtype(results: Sequence[dict[str, Json]]) -> dict[str, Json]:
    """Give the worst of each error in each dtype, and the least that a mistake would have."""
    worst: dict[str, Json] = {}
    for dtype in DTYPES:
        own = [result for result in results if result["dtype"] == dtype]
        apart = [number(result["gradient_error_without_collectives"]) for result in own]
        worst[dtype] = {
            **{name: max(number(result[name]) for result in own) for name in ERROR_NAMES},
            "least_gradient_error_without_collectives": min(apart),
        }
    return worst


def number(value: Json) -> float:
    """Read a number of the report."""
    assert isinstance(value, float)
    return value


def line(result: dict[str, Json]) -> str:
    """Lay out one case for people."""
    case = (
        f"{result['world']} ranks {result['n']:>5} x {result['dim']:<5} {result['dtype']} "
        f"{result['objective']:6} {result['form']:6}"
    )
    value, *gradients = (number(result[name]) for name in ERROR_NAMES)
    said = "holds" if result["holds"] else "FAILS"
    return f"{case}  value {value:.1e}  gradients {max(gradients):.1e}  {said}"


if __name__ == "__main__":
    sys.exit(run_command(RanksOptions, main, prog="python -m benchmarks.ranks"))
